"""The command `gpt2lite`: each subcommand parses, calls the library and prints. Nothing else prints.

A subcommand's module, and torch with it, is imported only when it runs: `--help` needs neither.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gpt2lite._version import __version__
from gpt2lite.cli.arguments import COMMANDS, add_arguments
from gpt2lite.errors import GPT2LiteError, visible

EPILOG = """examples:
  gpt2lite generate
  gpt2lite generate --model model.pth --prompt "Every effort" --temperature 0.8 --top-k 40
  gpt2lite generate --model gpt2
  gpt2lite plan model.pth --device cuda --max-device-memory 8GiB
  gpt2lite bench --size gpt2-xl --device cuda
  gpt2lite convert model.pth gpt2-folder --to hf
  gpt2lite prune gpt2 small.pth --keep-blocks 6 --text held-out.txt
  gpt2lite inspect model.pth
  gpt2lite verify model.pth --against transformers
  gpt2lite evaluate model.pth --text book.txt --quantize int8
  gpt2lite plan gpt2 --train --batch-size 8 --fit 4GiB
  gpt2lite finetune gpt2 --text book.txt --out book-model --steps 500"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpt2lite",
        description="A minimal GPT-2 that knows what loading costs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpt2lite {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        said = f"{command.summary[0].upper()}{command.summary[1:]}."
        add_arguments(subparsers.add_parser(name, help=command.summary, description=said), command)
    return parser


@contextmanager
def _plain_output() -> Iterator[None]:
    """Warnings as one line; a terminal that cannot print é gets ? instead. Both as they were afterwards."""
    format_warning, errors = warnings.formatwarning, sys.stdout.errors
    reconfigure = getattr(sys.stdout, "reconfigure", lambda errors: None)  # what replaced it may have none
    warnings.formatwarning = lambda message, *_: f"gpt2lite: warning: {visible(str(message))}\n"
    reconfigure(errors="replace")
    try:
        yield
    finally:
        warnings.formatwarning = format_warning
        reconfigure(errors=errors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 an error said in one line, 2 usage, 130 Ctrl-C."""
    try:
        with _plain_output():
            args = _parser().parse_args(arguments)
            importlib.import_module("gpt2lite._torch")
            module = importlib.import_module(f"gpt2lite.cli.{COMMANDS[args.command].module}")
            with importlib.import_module("gpt2lite.cli.loading").ranks(args):
                return int(getattr(module, f"run_{args.command}")(args))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (GPT2LiteError, OSError, MemoryError) as error:
        print(visible(f"gpt2lite: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngpt2lite: interrupted", file=sys.stderr)
        return 130
