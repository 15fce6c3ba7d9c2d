"""`gpt2lite generate`, `evaluate` and `tokenize`: texts written, predicted and cut into tokens."""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gpt2lite.cli.arguments import DEFAULT_NEW_TOKENS, DEFAULT_PROMPT, EMBEDDED_PROMPT
from gpt2lite.cli.loading import load_to_read
from gpt2lite.cli.terminal import EMBEDDED, as_json, bytes_bar, facts, read_text, shown_text, steps_bar
from gpt2lite.config import GPTConfig
from gpt2lite.errors import UsageError
from gpt2lite.evaluation import evaluate
from gpt2lite.finetuning.data import tokenize_file
from gpt2lite.generation.decoding import require_fit, require_language_model
from gpt2lite.generation.prompts import stream_text
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import locate
from gpt2lite.reading_text import filled_lines, typed_text
from gpt2lite.tokenizer import Encoding, end_of_text, gpt2_encoding, text_ids, tokenizer_for

ROWS_AT_ONCE = 8
RULE = "─" * 40 + "\n"
PATIENCE = 2.0  # seconds to wait for the second token before saying what takes so long
COMPILING = "[the first run compiles its loops for this processor, which takes half a minute]"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "window", "engine")


def _prompts(args: argparse.Namespace, default: str) -> list[str]:
    """The prompts, each repeated --num-samples times."""
    if args.num_samples < 1:
        raise UsageError(f"--num-samples must be at least 1, got {args.num_samples}")
    if args.num_samples > 1 and args.temperature == 0:
        raise UsageError("greedy samples are all the same: --num-samples needs a --temperature above 0")
    prompts = [default if args.prompt is None else typed_text("--prompt", args.prompt)]
    if args.prompts is not None:
        prompts = [line for _, line in filled_lines(read_text(args.prompts))]
        if not prompts:
            raise UsageError(f"{args.prompts}: no line with a prompt")
    return [prompt for prompt in prompts for _ in range(args.num_samples)]


def _room(ids: Sequence[Sequence[int]], config: GPTConfig, args: argparse.Namespace) -> int:
    """How many tokens to write. Raises UsageError, before any is written, where a prompt does not fit."""
    longest, room = max(map(len, ids)), args.max_new_tokens
    if room is None:
        left = DEFAULT_NEW_TOKENS if args.window is not None else config.context_length - longest
        room = min(DEFAULT_NEW_TOKENS, max(left, 1))
    require_fit(longest, room, args.window, config)
    return int(room)


def _write_one(prompt: str, tokens: Iterator[torch.Tensor], encoding: Encoding, stops: list[str]) -> int:
    """Print a text as it comes; returns the number of its tokens. A slow start is explained on a terminal."""
    slow = threading.Timer(PATIENCE, print, [COMPILING], {"file": sys.stderr, "flush": True})
    drawn: list[int] = []

    def counted() -> Iterator[int]:
        for token in tokens:
            drawn.append(int(token))
            if len(drawn) == 2:
                slow.cancel()
            yield drawn[-1]

    if sys.stderr.isatty():
        slow.start()
    try:
        print(shown_text(prompt), end="", flush=True)
        for piece in stream_text(counted(), encoding, stops):
            print(shown_text(piece), end="", flush=True)
        print()
    finally:
        slow.cancel()
    return len(drawn)


def _batches(
    model: GPTModel, ids: list[list[int]], room: int, seed: int | None, options: dict[str, Any]
) -> Iterator[list[int]]:
    """The new tokens of each text, computed a few texts at a time; each has the seed it would have alone."""
    for start in range(0, len(ids), ROWS_AT_ONCE):
        batch, own_seed = ids[start : start + ROWS_AT_ONCE], None if seed is None else seed + start
        rows = model.generate(batch, room, seed=own_seed, **options)
        yield from (row[len(prompt) :].tolist() for prompt, row in zip(batch, rows, strict=True))


def run_generate(args: argparse.Namespace) -> int:
    """Print prompts and continuations: one as it comes, more of them in batches."""
    path = locate(args.model, {"revision": args.revision})
    model = load_to_read(path, args)
    require_language_model(model)
    encoding = tokenizer_for(path, model.config.vocab_size)
    prompts = _prompts(args, EMBEDDED_PROMPT if path == EMBEDDED else DEFAULT_PROMPT)
    ids = [encoding.encode(text, allowed_special="all") or [end_of_text(encoding)] for text in prompts]
    room = _room(ids, model.config, args)
    stops = [typed_text("--stop", text) for text in args.stop]
    options: dict[str, Any] = {name: getattr(args, name) for name in SAMPLING} | {
        "stop": [*([] if encoding.eot_token is None else [encoding.eot_token]), *stops],
        "encoding": encoding,
    }
    began, count = time.perf_counter(), 0
    if len(prompts) == 1:
        tokens = model.generate_tokens(ids, room, seed=args.seed, **options)
        count = _write_one(prompts[0], tokens, encoding, stops)
    else:
        with steps_bar(prompts, "writing") as bar:
            for place, new in enumerate(_batches(model, ids, room, args.seed, options)):
                count += len(new)
                text = prompts[place] + "".join(stream_text(new, encoding, stops))
                print(RULE * bool(place) + shown_text(text))
                bar.update()
    if sys.stderr.isatty():
        seconds = time.perf_counter() - began
        print(f"\n{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


PROTOCOL = """\
perplexity: e to the mean loss per token. Each token but the first is predicted once,
from the tokens before it in its window. bits per byte: comparable across vocabularies."""


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the perplexity."""
    path, text = locate(args.path, {"revision": args.revision}), read_text(args.text)
    model = load_to_read(path, args)
    require_language_model(model)
    encoding = tokenizer_for(path, model.config.vocab_size)
    ids = text_ids(encoding, text)
    with bytes_bar("reading", "token") as progress:
        found = evaluate(model, ids, context=args.context, stride=args.stride, progress=progress)
    context = args.context or model.config.context_length
    result = {
        "perplexity": round(found.perplexity, 4) if found.perplexity < math.inf else None,  # JSON has no inf
        "loss": round(found.nats / found.tokens, 5),
        "bits_per_byte": round(found.nats / math.log(2) / len(text.encode()), 5),
        "tokens": found.tokens,
        "tokens_per_second": round(found.tokens_per_second, 1),
        "context": context,
        "stride": args.stride or max(context // 2, 1),
    }
    if args.json:
        print(as_json({"path": str(path), "text": args.text, **result}))
    else:
        print(facts([(name.replace("_", " "), value) for name, value in result.items()]) + f"\n\n{PROTOCOL}")
    return 0


def run_tokenize(args: argparse.Namespace) -> int:
    """Tokenize, and say how much it was."""
    model = locate(args.model, {"revision": args.revision}) if args.model else None
    encoding = tokenizer_for(model, open_model(model).sizes.vocab_size) if model else gpt2_encoding()
    with bytes_bar(f"tokenizing {args.text.name}") as progress:
        count = tokenize_file(args.text, args.tokens, encoding, progress)
    print(f"{count} tokens to {args.tokens}")
    return 0
