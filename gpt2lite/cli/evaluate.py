"""`gpt2lite evaluate`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import math

import torch

from gpt2lite.cli.loading import add_load_arguments, load_to_read
from gpt2lite.cli.terminal import (
    EMBEDDED,
    add_quantize_argument,
    as_json,
    count_bar,
    facts,
    local_path,
    read_text,
)
from gpt2lite.evaluation import evaluate
from gpt2lite.generation.decoding import require_language_head
from gpt2lite.tokenizer import tokenizer_for

PROTOCOL = """\
perplexity: e to the mean loss of a token, each predicted once, the first not at all,
from what a window holds before it. bits per byte does not depend on the vocabulary."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "path",
        nargs="?",
        default=EMBEDDED,
        help="a checkpoint, or a model on the Hub: gpt2 … gpt2-xl, owner/name (default: the embedded model)",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8; - reads standard input")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a window reads (default: all the model can)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from window to window (default: half the context)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_load_arguments(parser)
    add_quantize_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the perplexity."""
    path, text = local_path(args.path, args.revision), read_text(args.text)
    model = load_to_read(path, args, args.quantize)
    require_language_head(model.config)
    encoding = tokenizer_for(path, model.config.vocab_size)
    ids = torch.tensor(encoding.encode(text, allowed_special="all"), dtype=torch.int64)
    with count_bar("reading", "token") as progress:
        found = evaluate(model, ids, context=args.context, stride=args.stride, progress=progress)
    context = args.context or model.config.context_length
    said = {
        "perplexity": round(found.perplexity, 4),
        "loss": round(found.nats / found.tokens, 5),
        "bits_per_byte": round(found.nats / math.log(2) / len(text.encode()), 5),
        "tokens": found.tokens,
        "tokens_per_second": round(found.tokens_per_second, 1),
        "context": context,
        "stride": args.stride or max(context // 2, 1),
    }
    if args.json:
        print(as_json({"path": str(path), "text": args.text, **said}))
    else:
        print(facts([(name.replace("_", " "), value) for name, value in said.items()]) + f"\n\n{PROTOCOL}")
    return 0
