"""The command `gpt2lite`: each subcommand parses, calls the library and prints. Nothing else prints.

A subcommand's module, and torch with it, is imported only when it runs: `--help` needs neither.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from gpt2lite._version import __version__
from gpt2lite.cli.arguments import COMMANDS, add_arguments, check_needs
from gpt2lite.cli.terminal import quietly
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.errors import GPT2LiteError, did_you_mean, visible
from gpt2lite.finetuning.interrupts import handled_by, held

FINISHING = ("convert", "prune", "verify", "finetune", "tokenize")  # their work is not what they print

EPILOG = """gpt2lite COMMAND --help explains a command.

examples:
  gpt2lite generate
  gpt2lite generate model.pth --prompt "Every effort" --temperature 0.8
  gpt2lite generate gpt2
  gpt2lite classify run/model.pth "You have won a prize"
  gpt2lite plan gpt2-xl --device cuda --max-device-memory 8GiB
  gpt2lite bench --size gpt2-xl --device cuda
  gpt2lite convert model.pth gpt2-folder --to hf
  gpt2lite prune gpt2 small.pth --keep-blocks 6 --text held-out.txt
  gpt2lite inspect model.pth
  gpt2lite verify model.pth --against transformers
  gpt2lite evaluate model.pth --text book.txt --quantize int8
  gpt2lite plan gpt2 --train --batch-size 8 --fit 4GiB
  gpt2lite finetune gpt2 --text book.txt --out book-model --steps 500"""


class _Parser(argparse.ArgumentParser):
    """argparse's, whose errors name what is nearest to a word that it does not know."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with 2."""
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            names = re.findall(r"[\w.-]+", found[2])
            message = message[: found.start()] + f"unknown name {found[1]!r}{did_you_mean(found[1], names)}"
        super().error(message)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says. Exits with 2 where it is wrong."""
    parser = _Parser(
        prog="gpt2lite",
        description="A minimal GPT-2 that knows what loading costs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpt2lite {__version__}")
    subparsers, commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), {}
    for name, command in COMMANDS.items():
        said = f"{command.summary[0].upper()}{command.summary[1:]}."
        commands[name] = subparsers.add_parser(name, help=command.summary, description=said)
        add_arguments(commands[name], command)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    args, unknown = parser.parse_known_args(arguments)
    own = commands[args.command]
    if unknown:
        options = [option for option in own._option_string_actions if option.startswith("--")]
        near = get_close_matches((word := unknown[0]).partition("=")[0], options, 1)
        quotes = "" if word.startswith("-") else "; a text of several words needs quotes"
        own.error(f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else quotes))
    check_needs(own, args)
    return args


def _nearest_file(error: BaseException) -> str:
    """The file or size that was likely meant, where nothing has a name."""
    name = getattr(error, "path", None) or getattr(error, "filename", None)
    if not isinstance(error, FileNotFoundError) or not isinstance(name, str):
        return ""
    folder = Path(name).parent
    names = [*OFFICIAL_SIZES, *(os.listdir(folder) if folder.is_dir() else ())]
    near = get_close_matches(Path(name).name, names, 1, 0.75)
    return "".join(f". Did you mean {each if each in OFFICIAL_SIZES else folder / each}?" for each in near)


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


class _Unheard:
    """Standard output for a command that has work to finish: it goes on where nobody reads any more."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or drop what nobody reads."""
        try:
            return int(self.stream.write(text))
        except BrokenPipeError:
            _drop(self.stream)
            return len(text)

    def flush(self) -> None:
        """The same."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            _drop(self.stream)


def _drop(stream: Any) -> None:
    """What is written from now on, and what waits, goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _end(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number))


def _run(args: argparse.Namespace) -> int:
    with held() as ctrl_c, ctrl_c.looking():  # torch, half imported, would make another error of it
        importlib.import_module("gpt2lite._torch")
        module = importlib.import_module(f"gpt2lite.cli.{COMMANDS[args.command].module}")
        ranks = importlib.import_module("gpt2lite.cli.loading").ranks
    heard = _Unheard(sys.stdout) if args.command in FINISHING else sys.stdout
    with redirect_stdout(heard), quietly(args.quiet), ranks(args):
        code = int(getattr(module, f"run_{args.command}")(args))
        print(end="", flush=True)
        return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 an error said in one line, 2 usage, 130 Ctrl-C, 143 SIGTERM. Where the reader of its output goes
    away, as `head` does, a command in FINISHING goes on to its end, and others stop: that is an error where
    a measurement is lost.
    """
    command = ""
    try:
        with handled_by(_end), _plain_output():
            args = _parsed(arguments)
            command = args.command
            return _run(args)
    except BrokenPipeError:
        _drop(sys.stdout)
        return int(command in (*FINISHING, "bench"))
    except (GPT2LiteError, OSError, MemoryError) as error:
        print(visible(f"gpt2lite: {error}{_nearest_file(error)}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("\ngpt2lite: interrupted", file=sys.stderr)
        return 128 + int(*error.args or (signal.SIGINT,))
