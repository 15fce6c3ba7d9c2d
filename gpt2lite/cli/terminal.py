"""What the commands print with: tables, sizes, progress bars, and the arguments that they share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from gpt2lite.config import ACTIVATIONS
from gpt2lite.errors import UsageError
from gpt2lite.opening import locate

DATA = Path(__file__).resolve().parent.parent / "data"
EMBEDDED = DATA / "embedded.pth"
DTYPES = ("float32", "bfloat16", "float16", "float64")


def table(*lines: Sequence[str]) -> str:
    """Columns under their headers, the first line; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *rest = widths
    padded = (
        [line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], rest, strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values, a line each."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)


def as_json(content: Any) -> str:
    """`content` for programs."""
    return json.dumps(content, indent=2)


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a progress callback (bytes done, bytes in all); none where standard error is no terminal."""
    with tqdm(desc=what, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


@contextmanager
def count_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """The same for a callback that counts (done, in all) of a unit."""
    with tqdm(desc=what, unit=unit, leave=False, disable=not sys.stderr.isatty()) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def steps_bar(steps: Sequence[str], what: str) -> Any:
    """A bar over named steps; `set_postfix_str` says which one runs."""
    return tqdm(total=len(steps), desc=what, unit="run", leave=False, disable=not sys.stderr.isatty())


def read_text(name: str) -> str:
    """A file's text, or for - standard input's. Raises UsageError where it is not UTF-8."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8 ({error})") from None


def add_revision_argument(parser: argparse.ArgumentParser) -> None:
    """Which state of a model on the Hub."""
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the Hub")


def local_path(name: str | Path, revision: str | None) -> Path:
    """A path as it is, or where the Hub's model of this name lies once it is fetched.

    The client draws its own bars, and those only where standard error is a terminal.
    """
    return locate(name, {"revision": revision})


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """What checkpoints cannot always say of themselves."""
    parser.add_argument("--n-heads", type=int, metavar="N", help="attention heads, where the file cannot say")
    parser.add_argument(
        "--activation", choices=ACTIVATIONS, help="where the file cannot say (nanoGPT, minGPT)"
    )


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """What the weights are to be."""
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: as in the file)")


def add_quantize_argument(parser: argparse.ArgumentParser) -> None:
    """What the weights are to become."""
    parser.add_argument("--quantize", choices=("int8",), help="int8 weights with a scale a row, as they load")


def add_cap_arguments(parser: argparse.ArgumentParser) -> None:
    """What a load may take at most."""
    for place in ("host", "device"):
        parser.add_argument(
            f"--max-{place}-memory",
            metavar="SIZE",
            help=f"cap what loading adds to {place} memory, as 512MiB or 2GiB",
        )


def config_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The part of the config that the arguments give."""
    said = {"n_heads": args.n_heads, "activation": args.activation}
    return {key: value for key, value in said.items() if value is not None} or None


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """--dtype as torch means it."""
    return getattr(torch, args.dtype) if args.dtype else None
