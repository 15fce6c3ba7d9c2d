"""`gpt2lite evaluate`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import math

import torch

from gpt2lite.cli.loading import load_to_read, local_path
from gpt2lite.cli.terminal import as_json, bytes_bar, facts, read_text
from gpt2lite.evaluation import evaluate
from gpt2lite.generation.decoding import require_language_head
from gpt2lite.tokenizer import tokenizer_for

PROTOCOL = """\
perplexity: e to the mean loss per token. Each token but the first is predicted once,
from the tokens before it in its window. bits per byte: comparable across vocabularies."""


def run(args: argparse.Namespace) -> int:
    """Print the perplexity."""
    path, text = local_path(args.path, args.revision), read_text(args.text)
    model = load_to_read(path, args)
    require_language_head(model.config)
    encoding = tokenizer_for(path, model.config.vocab_size)
    ids = torch.tensor(encoding.encode(text, allowed_special="all"), dtype=torch.int64)
    with bytes_bar("reading", "token") as progress:
        found = evaluate(model, ids, context=args.context, stride=args.stride, progress=progress)
    context = args.context or model.config.context_length
    result = {
        "perplexity": round(found.perplexity, 4),
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
