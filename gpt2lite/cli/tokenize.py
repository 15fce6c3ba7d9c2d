"""`gpt2lite tokenize`: a text as a token file, which is trained on without being tokenized again."""

from __future__ import annotations

import argparse

from gpt2lite.cli.loading import local_path
from gpt2lite.cli.terminal import bytes_bar
from gpt2lite.finetuning.data import tokenize_file
from gpt2lite.model import open_model
from gpt2lite.tokenizer import gpt2_encoding, tokenizer_for


def run(args: argparse.Namespace) -> int:
    """Tokenize, and say how much it was."""
    model = local_path(args.model, args.revision) if args.model else None
    encoding = tokenizer_for(model, open_model(model).sizes.vocab_size) if model else gpt2_encoding()
    with bytes_bar(f"tokenizing {args.text.name}") as progress:
        count = tokenize_file(args.text, args.tokens, encoding, progress)
    print(f"{count} tokens to {args.tokens}")
    return 0
