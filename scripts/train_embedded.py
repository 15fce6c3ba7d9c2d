"""Make the embedded model: write stories, learn byte pairs from them, train a small GPT-2, keep its weights.

`python scripts/train_embedded.py` needs no other input and no network. It writes `embedded.tiktoken`,
`embedded.pth` and `embedded.json`, all of them at its end.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import regex  # type: ignore[import-untyped]  # tiktoken's own dependency; ships no types
import tiktoken
import torch
import torch.nn.functional as F
from stories import stories
from torch import Tensor

from gpt2lite import generate
from gpt2lite.config import GPTConfig
from gpt2lite.model import GPTModel
from gpt2lite.tokenizer import END_OF_TEXT, WORDS_AND_SPACES, read_encoding

DATA = Path(__file__).resolve().parent.parent / "gpt2lite" / "data"
TRAINING_STORIES = {"seed": 1, "count": 7000}  # 6.0 MB
HELD_OUT_STORIES = {"seed": 2, "count": 200}
CONFIG = GPTConfig(vocab_size=1024, context_length=256, emb_dim=128, n_heads=4, n_layers=4, tied_head=True)
BATCH = 8
LATE_START = 32  # tokens
LEARNING_RATE = 3e-3
SPREAD = 4.4  # initial weights are this much wider than GPT-2's 0.02, which suits six times the width
WARM_UP = 0.05  # of all steps

Word = tuple[bytes, ...]


def merged(word: Word, pair: tuple[bytes, bytes]) -> Word:
    """The word with every occurrence of the pair, left to right, made one piece."""
    pieces: list[bytes] = []
    for piece in word:
        if pieces and (pieces[-1], piece) == pair:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return tuple(pieces)


def byte_pairs(text: str, size: int) -> list[bytes]:
    """`size` tokens in the order of their ranks: the 256 bytes, then the most frequent pair again and again.

    Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units".
    """
    tokens = [bytes([byte]) for byte in range(256)]
    counts = Counter(regex.findall(WORDS_AND_SPACES, text))
    words: dict[Word, int] = {tuple(bytes([b]) for b in word.encode()): n for word, n in counts.items()}
    while len(tokens) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = {merged(word, best): count for word, count in words.items()}
        tokens.append(best[0] + best[1])
    return tokens


def tiktoken_lines(tokens: Iterable[bytes]) -> bytes:
    """What a `.tiktoken` file holds: a line a token, its bytes in base64 and its rank."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def encoded(encoding: tiktoken.Encoding, texts: Iterable[str]) -> Tensor:
    """All texts as one row of ids, `<|endoftext|>` before each."""
    end = encoding.eot_token
    return torch.tensor([token for text in texts for token in (end, *encoding.encode_ordinary(text))])


def batches(ids: Tensor, end: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each (BATCH, length); targets are one token ahead.

    Every row begins a few tokens behind the start of a text: whom it is about, it nearly always says.
    """
    random = torch.Generator().manual_seed(seed)
    beginnings = (ids == end).nonzero()[:, 0]
    beginnings = beginnings[beginnings < len(ids) - length - LATE_START]
    while True:
        chosen = torch.randint(len(beginnings), (BATCH, 1), generator=random)
        late = torch.randint(LATE_START, (BATCH, 1), generator=random)
        rows = ids[beginnings[chosen] + late + torch.arange(length + 1)]
        yield rows[:, :-1], rows[:, 1:]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def trained(config: GPTConfig, ids: Tensor, *, end: int, steps: int, seed: int) -> GPTModel:
    """A new model after `steps` of AdamW, in eval mode; prints the loss now and then."""
    torch.manual_seed(seed)
    model = GPTModel(config)
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
            matrix.mul_(SPREAD)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rows = batches(ids, end, config.context_length, seed)
    for step, (inputs, targets) in zip(range(steps), rows, strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5} of {steps}  loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def bits_per_byte(model: GPTModel, encoding: tiktoken.Encoding, texts: Iterable[str]) -> float:
    """What the model needs to tell the texts, each on its own, per byte of UTF-8.

    Of a text longer than the context, the part that fits counts.
    """
    bits, nbytes = 0.0, 0
    for text in texts:
        ids = encoded(encoding, [text])[: model.config.context_length + 1]
        bits += F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item() / math.log(2)
        nbytes += len(encoding.decode_bytes(ids[1:].tolist()))
    return bits / nbytes


def sample(model: GPTModel, encoding: tiktoken.Encoding, prompt: str, *, seed: int) -> str:
    """The prompt and what the model makes of it, up to `<|endoftext|>` or the end of the context."""
    ids = encoded(encoding, [prompt])[None]
    room = model.config.context_length - ids.shape[1]
    ids = generate(model, ids, room, temperature=0.8, top_k=40, seed=seed, stop=[encoding.eot_token])
    return encoding.decode(ids[0].tolist()).replace(END_OF_TEXT, "")


def replace_files(folder: Path, sources: Path) -> None:
    """Move every file of `sources` into `folder`, each in one step."""
    for source in sorted(sources.iterdir()):
        os.replace(source, folder / source.name)


def run(output: Path, *, steps: int, seed: int) -> None:
    """Make the files; they appear in `output` only when all of them are finished."""
    began = time.perf_counter()
    torch.set_num_threads(2)
    training = list(stories(**TRAINING_STORIES))
    known = set(training)
    held_out = [story for story in stories(**HELD_OUT_STORIES) if story not in known]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".embedded-") as name:
        unfinished = Path(name)
        vocabulary = unfinished / "embedded.tiktoken"
        vocabulary.write_bytes(tiktoken_lines(byte_pairs("\n".join(training), CONFIG.vocab_size - 1)))
        encoding = read_encoding(vocabulary)
        ids = encoded(encoding, training)
        print(f"{sum(map(len, training)):,} bytes in {len(ids):,} tokens", flush=True)
        model = trained(CONFIG, ids, end=encoding.eot_token, steps=steps, seed=seed).half()
        torch.save(model.state_dict(), unfinished / "embedded.pth")
        (unfinished / "embedded.json").write_text(json.dumps(CONFIG.as_dict(), indent=2) + "\n")
        replace_files(output, unfinished)
    model.float()  # float16 weights, computed with in float32
    print(f"trained in {time.perf_counter() - began:.0f} s: {output}")
    print(f"held-out bits per byte: {bits_per_byte(model, encoding, held_out):.4f}")
    print(f"\n{sample(model, encoding, 'Once upon a time', seed=seed)}")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description="Train the model that ships with gpt2lite.")
    parser.add_argument("--steps", type=int, default=1600, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, batches and sample (default: 1)")
    parser.add_argument("--output", type=Path, default=DATA, metavar="FOLDER", help="default: gpt2lite/data")
    arguments = parser.parse_args()
    run(arguments.output, steps=arguments.steps, seed=arguments.seed)


if __name__ == "__main__":
    main()
