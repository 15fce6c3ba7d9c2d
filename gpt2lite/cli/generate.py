"""`gpt2lite generate`: text, to see that a load was right."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tiktoken
import torch

from gpt2lite.cli.terminal import (
    EMBEDDED,
    add_cap_arguments,
    add_config_arguments,
    add_dtype_argument,
    add_revision_argument,
    bytes_bar,
    config_of,
    dtype_of,
    local_path,
)
from gpt2lite.errors import UsageError
from gpt2lite.generation import generate_tokens, require_language_head
from gpt2lite.loading import STRATEGIES
from gpt2lite.memory import resolve_device
from gpt2lite.model import GPTModel
from gpt2lite.tokenizer import tokenizer_for

EMBEDDED_PROMPT = "Once upon a time"
DEFAULT_PROMPT = "Hello, I am"
DEFAULT_NEW_TOKENS = 240


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="PATH|NAME",
        help="a checkpoint, or a model on the Hub: gpt2 … gpt2-xl, owner/name (default: the embedded model)",
    )
    parser.add_argument("--prompt", help=f"default: {EMBEDDED_PROMPT!r}, {DEFAULT_PROMPT!r} for other models")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"default: {DEFAULT_NEW_TOKENS}, or what the context leaves",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default), 1 as the model has it"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument("--seed", type=int, help="the same seed, the same text")
    parser.add_argument(
        "--strategy",
        choices=("auto", *STRATEGIES),
        default="auto",
        help="auto maps the file on CPU, else streams",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
    add_revision_argument(parser)
    add_config_arguments(parser)
    parser.add_argument(
        "--lora-alpha", type=float, metavar="A", help="of the book's LoRA layers, if there are any"
    )
    add_dtype_argument(parser)
    add_cap_arguments(parser)


def _load(path: Path, args: argparse.Namespace) -> GPTModel:
    """On the CPU auto maps, since nothing here writes to the file."""
    device = resolve_device(args.device)
    strategy = "mmap" if args.strategy == "auto" and device.type == "cpu" else args.strategy
    dtype = dtype_of(args) or (torch.float32 if path == EMBEDDED else None)
    with bytes_bar("loading") as progress:
        return GPTModel.from_checkpoint(
            path,
            device,
            strategy,
            config=config_of(args),
            dtype=dtype,
            lora_alpha=args.lora_alpha,
            max_host_memory=args.max_host_memory,
            max_device_memory=args.max_device_memory,
            progress=progress,
        )


def _text(tokens: Iterator[torch.Tensor], encoding: tiktoken.Encoding) -> Iterator[str]:
    """Characters as soon as all their bytes are there; ends before the end-of-text token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if int(token) == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(int(token)))
    yield decoder.decode(b"", final=True)


def _prompt_ids(prompt: str, encoding: tiktoken.Encoding) -> torch.Tensor:
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    return torch.tensor([ids])


def run(args: argparse.Namespace) -> int:
    """Print prompt and continuation as it comes."""
    path = local_path(args.model, args.revision)
    model = _load(path, args)
    require_language_head(model.config)
    encoding = tokenizer_for(path, model.config.vocab_size)
    default = EMBEDDED_PROMPT if path == EMBEDDED else DEFAULT_PROMPT
    prompt = default if args.prompt is None else args.prompt
    ids = _prompt_ids(prompt, encoding)
    room = model.config.context_length - ids.shape[1]
    if room < 1:
        raise UsageError(
            f"the prompt has {ids.shape[1]} tokens, the context {model.config.context_length}; shorten it"
        )
    tokens = generate_tokens(
        model,
        ids,
        min(DEFAULT_NEW_TOKENS, room) if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        vocabulary=encoding.n_vocab,
    )
    began, count = time.perf_counter(), -1  # the last piece is no token
    print(prompt, end="", flush=True)
    for piece in _text(tokens, encoding):
        print(piece, end="", flush=True)
        count += 1
    print()
    if sys.stderr.isatty():
        print(f"\n{count / (time.perf_counter() - began):.1f} tokens/s", file=sys.stderr)
    return 0
