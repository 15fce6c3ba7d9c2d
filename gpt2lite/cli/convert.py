"""`gpt2lite convert`: one program's checkpoint as another's."""

from __future__ import annotations

import argparse

from gpt2lite.cli.arguments import DIALECTS
from gpt2lite.cli.loading import config_of, dtype_of, local_path
from gpt2lite.cli.terminal import bytes_bar, facts
from gpt2lite.converting import plan_conversion, run_conversion
from gpt2lite.memory import human


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was made."""
    job = plan_conversion(
        local_path(args.source, args.revision),
        args.destination,
        to=DIALECTS[args.to],
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
