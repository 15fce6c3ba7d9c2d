"""The command `gpt2lite`: each subcommand parses, calls the library and prints. Nothing else prints."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from gpt2lite._version import __version__
from gpt2lite.errors import GPT2LiteError

COMMANDS = {
    "generate": "write text with a model, the embedded one by default",
    "bench": "measure what every way of loading costs in memory and time",
    "plan": "say what a load will cost before it begins, what fits, and what auto takes",
    "convert": "write a checkpoint with another program's names, layout and file format",
    "inspect": "say what a checkpoint is, from its headers alone",
    "verify": "load a checkpoint by two independent ways and compare what they compute",
    "evaluate": "say how well a model predicts a text: its perplexity",
    "finetune": "train a checkpoint further, on text, instructions or labelled texts",
    "tokenize": "write a text as a token file, to train on",
    "env": "say what this machine is and what memory can be had",
}
EPILOG = """examples:
  gpt2lite generate
  gpt2lite generate --model model.pth --prompt "Every effort" --temperature 0.8 --top-k 40
  gpt2lite generate --model gpt2
  gpt2lite plan model.pth --device cuda --max-device-memory 8GiB
  gpt2lite bench --size gpt2-xl --device cuda
  gpt2lite convert model.pth gpt2-folder --to hf
  gpt2lite inspect model.pth
  gpt2lite verify model.pth --against transformers
  gpt2lite evaluate model.pth --text book.txt --quantize int8
  gpt2lite plan gpt2 --train --batch-size 8 --fit 4GiB
  gpt2lite finetune gpt2 --text book.txt --out book-model --steps 500"""


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; a subcommand's module is imported, with torch, only when it is the one that is called."""
    parser = argparse.ArgumentParser(
        prog="gpt2lite",
        description="A minimal GPT-2 whose constructors know memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpt2lite {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if name == command:
            module = importlib.import_module(f"gpt2lite.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 an error said in one line, 2 usage, 130 Ctrl-C."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = next((word for word in words if word in COMMANDS), None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no é must not end the program
    try:
        args = _parser(command).parse_args(words)
        return int(args.run(args))
    except (GPT2LiteError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"gpt2lite: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngpt2lite: interrupted", file=sys.stderr)
        return 130
