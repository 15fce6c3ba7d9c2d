"""Loading for the commands that only read a model: their arguments, and the load."""

from __future__ import annotations

import argparse
from pathlib import Path

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
)
from gpt2lite.devices import resolve_device
from gpt2lite.loading import STRATEGIES
from gpt2lite.model import GPTModel


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, how, and what the file cannot say."""
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


def strategy_of(args: argparse.Namespace, quantize: str | None = None) -> str:
    """On the CPU auto maps, since nothing here writes to the file."""
    maps = args.strategy == "auto" and resolve_device(args.device).type == "cpu" and not quantize
    return "mmap" if maps else str(args.strategy)


def load_to_read(path: Path, args: argparse.Namespace, quantize: str | None = None) -> GPTModel:
    """The model, behind a progress bar; the embedded one, which is stored in fp16, computes in fp32."""
    with bytes_bar("loading") as progress:
        return GPTModel.from_checkpoint(
            path,
            resolve_device(args.device),
            strategy_of(args, quantize),
            config=config_of(args),
            dtype=dtype_of(args) or (torch.float32 if path == EMBEDDED else None),
            quantize=quantize,
            lora_alpha=args.lora_alpha,
            max_host_memory=args.max_host_memory,
            max_device_memory=args.max_device_memory,
            progress=progress,
        )
