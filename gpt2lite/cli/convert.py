"""`gpt2lite convert`: one program's checkpoint as another's."""

from __future__ import annotations

import argparse
from pathlib import Path

from gpt2lite.cli.terminal import (
    add_config_arguments,
    add_dtype_argument,
    add_revision_argument,
    bytes_bar,
    config_of,
    dtype_of,
    facts,
    local_path,
)
from gpt2lite.converting import WRITERS, plan_conversion, run_conversion
from gpt2lite.memory import human

NAMES = {"book": "book", "hf": "huggingface", "nanogpt": "nanogpt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", help="a checkpoint of any kind, or a model on the Hub: gpt2 …, owner/name")
    parser.add_argument(
        "destination", type=Path, help="a .pth, a .safetensors, or a folder that is not there yet"
    )
    parser.add_argument("--to", choices=NAMES, default="book", help="whose names (default: %(default)s)")
    parser.add_argument(
        "--format", choices=WRITERS, help="default: as the destination's suffix; safetensors for a folder"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="divide a folder's safetensors, as 2GiB or 5GB"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    add_revision_argument(parser)
    add_config_arguments(parser)
    add_dtype_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was made."""
    job = plan_conversion(
        local_path(args.source, args.revision),
        args.destination,
        to=NAMES[args.to],
        format=args.format,
        dtype=dtype_of(args),
        max_shard_size=args.max_shard_size,
        config=config_of(args),
    )
    with bytes_bar(f"writing {args.destination.name}") as progress:
        run_conversion(job, verified=not args.no_verify, progress=progress)
    print(facts([
        ("source", f"{args.source} ({job.dialect}, {job.source.format})"),
        ("destination", job.destination),
        ("dialect", job.to),
        ("format", job.format),
        ("size", f"{human(job.nbytes)} in {len(job.tensors)} tensors"),
        ("verified", "no" if args.no_verify else "yes, every tensor read back"),
    ]))  # fmt: skip
    return 0
