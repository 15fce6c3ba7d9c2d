"""`gpt2lite generate`, `classify`, `evaluate`, `tokenize`: texts written, judged, predicted, cut."""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2lite.cli.arguments import DEFAULT_PROMPT, EMBEDDED_PROMPT
from gpt2lite.cli.loading import load_to_read, open_to_read
from gpt2lite.cli.terminal import (
    as_json,
    bytes_bar,
    facts,
    is_watched,
    one_line,
    read_text,
    shown_text,
    steps_bar,
)
from gpt2lite.config import EMBEDDED
from gpt2lite.errors import UsageError
from gpt2lite.evaluation import evaluate
from gpt2lite.finetuning.data import tokenize_file
from gpt2lite.finetuning.examples import READERS, read_records
from gpt2lite.generation import Instruction
from gpt2lite.generation.classifying import require_labels
from gpt2lite.generation.decoding import require_language_model, room_after
from gpt2lite.generation.prompts import Text, tokenizer_of
from gpt2lite.model import open_model
from gpt2lite.opening import locate
from gpt2lite.reading_text import filled_lines, typed_text
from gpt2lite.tokenizer import Encoding, gpt2_encoding, text_ids

ROWS_AT_ONCE = 8
RULE = "─" * 40 + "\n"
PATIENCE = 2.0  # seconds to wait for the second token before saying what takes so long
COMPILING = "[the first run compiles its loops for this processor, which takes half a minute]"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "window", "engine")


def _prompts(args: argparse.Namespace) -> list[Text]:
    """The prompts, each repeated --num-samples times."""
    if args.num_samples < 1:
        raise UsageError(f"--num-samples must be at least 1, got {args.num_samples}")
    if args.num_samples > 1 and args.temperature == 0:
        raise UsageError("greedy samples are all the same: --num-samples needs a --temperature above 0")
    default = EMBEDDED_PROMPT if Path(args.path) == EMBEDDED else DEFAULT_PROMPT
    prompts: list[Text] = [default if args.prompt is None else typed_text("--prompt", args.prompt)]
    if args.instruction is not None:
        asked = typed_text("--instruction", args.instruction), typed_text("--input", args.input or "")
        prompts = [Instruction(*asked)]
    if args.prompts is not None:
        prompts = [line for _, line in filled_lines(read_text(args.prompts))]
        if not prompts:
            raise UsageError(f"{args.prompts}: no line with a prompt")
    return [prompt for prompt in prompts for _ in range(args.num_samples)]


def _write_one(pieces: Iterator[str]) -> int:
    """Print a text as it comes; returns the number of its pieces. A slow start is explained on a terminal."""
    slow, count = threading.Timer(PATIENCE, print, [COMPILING], {"file": sys.stderr, "flush": True}), 0
    if is_watched():
        slow.start()
    try:
        for count, piece in enumerate(pieces, 1):
            print(shown_text(piece), end="", flush=True)
            if count == 2:
                slow.cancel()
        print()
    finally:
        slow.cancel()
    return count


def run_generate(args: argparse.Namespace) -> int:
    """Print prompts and continuations: one as it comes, more of them in batches."""
    if args.model and args.path != EMBEDDED:
        raise UsageError(f"the model is said twice: {args.path} and --model {args.model}")
    args.path = args.model or args.path
    if " " in str(args.path) and not Path(args.path).exists():
        raise UsageError(f"{args.path:.60}: no such file; a text to go on with stands behind --prompt")
    path = locate(args.path, {"revision": args.revision})
    model, prompts = load_to_read(open_to_read(path, args), args), _prompts(args)
    options: Any = {name: getattr(args, name) for name in SAMPLING}
    options["stop"] = [typed_text("--stop", text) for text in args.stop]
    room, began = room_after(model, prompts, args.max_new_tokens, options), time.perf_counter()
    if len(prompts) == 1:
        pieces = model.generate_tokens(prompts[0], room, seed=args.seed, **options)
        print(shown_text(prompts[0]) if isinstance(prompts[0], str) else "", end="", flush=True)
        count, unit = _write_one(pieces), "tokens"
    else:
        count, unit = len(prompts), "texts"
        with steps_bar(prompts, "writing", "text") as bar:
            for start in range(0, len(prompts), ROWS_AT_ONCE):
                seed = None if args.seed is None else args.seed + start
                some = model.generate(prompts[start : start + ROWS_AT_ONCE], room, seed=seed, **options)
                for place, text in enumerate(some, start):
                    print(RULE * bool(place) + shown_text(text))
                bar.update(len(some))
    if is_watched():
        seconds = time.perf_counter() - began
        print(f"\n{count} {unit}, {count / seconds:.1f} {unit}/s", file=sys.stderr)
    return 0


def run_classify(args: argparse.Namespace) -> int:
    """Print the label of each text with its probability, likeliest first for a single one."""
    path = locate(args.path, {"revision": args.revision})
    model = load_to_read(open_to_read(path, args), args)
    require_labels(model)
    texts = _texts(args)
    with bytes_bar("classifying", "text") as progress:
        found = model.classify(texts, progress=progress)
    if args.json:
        print(as_json([{"text": text, **each._asdict()} for text, each in zip(texts, found, strict=True)]))
    elif args.file:
        width = max(map(len, model.purpose.labels))
        for text, (label, shares) in zip(texts, found, strict=True):
            print(one_line(f"{label.ljust(width)}  {shares[label]:.4f}  {' '.join(text.split())}"))
    else:
        likeliest = sorted(found[0].probabilities.items(), key=lambda pair: -pair[1])
        print(facts([(label, f"{share:.4f}") for label, share in likeliest]))
    return 0


def _texts(args: argparse.Namespace) -> list[str]:
    """The text, or those of --file: of records, else a line each."""
    if args.file is None:
        return [typed_text("text", args.text)]
    if Path(args.file).suffix.lower() in READERS:
        return [record["text"] for record in read_records(Path(args.file), ("text",))]
    texts = [line for _, line in filled_lines(read_text(args.file))]
    if not texts:
        raise UsageError(f"{args.file}: holds no text to classify")
    return texts


PROTOCOL = """\
perplexity: e to the mean loss per token. Each token but the first is predicted
once, from the tokens before it in its window. bits per byte: comparable across
vocabularies."""


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the perplexity."""
    path, text = locate(args.path, {"revision": args.revision}), read_text(args.text)
    model = load_to_read(open_to_read(path, args), args)
    require_language_model(model)
    ids = text_ids(tokenizer_of(model), text)
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
    encoding: Encoding = open_model(model).beside.tokenizer if model else gpt2_encoding()
    with bytes_bar(f"tokenizing {args.text.name}") as progress:
        count = tokenize_file(args.text, args.tokens, encoding, progress)
    print(f"{count} tokens to {args.tokens}")
    return 0
