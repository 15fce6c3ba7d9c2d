"""`gpt2lite tokenize`: a text as a token file, which is trained on without being tokenized again."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpt2lite.cli.terminal import add_revision_argument, bytes_bar, local_path
from gpt2lite.finetuning.data import tokenize_file
from gpt2lite.model import open_model
from gpt2lite.tokenizer import gpt2_encoding, tokenizer_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the file to write, and whose tokenizer."""
    parser.add_argument("text", type=Path, metavar="TEXT", help="UTF-8; <|endoftext|> parts its documents")
    parser.add_argument(
        "tokens",
        type=Path,
        metavar="TOKENS",
        help="what is written: .npy, which says its width, or .bin, 16 bits a token like nanoGPT's train.bin",
    )
    parser.add_argument(
        "--model",
        metavar="PATH|NAME",
        help="the checkpoint, or the model on the Hub, whose tokenizer to take (default: GPT-2's tokenizer)",
    )
    add_revision_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Tokenize, and say how much it was."""
    model = local_path(args.model, args.revision) if args.model else None
    encoding = tokenizer_for(model, open_model(model).sizes.vocab_size) if model else gpt2_encoding()
    with bytes_bar(f"tokenizing {args.text.name}") as progress:
        count = tokenize_file(args.text, args.tokens, encoding, progress)
    print(f"{count} tokens to {args.tokens}")
    return 0
