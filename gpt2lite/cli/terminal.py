"""What the commands print with: tables, sizes, progress bars. Imports neither torch nor the Hub's client."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from gpt2lite.errors import UsageError, visible
from gpt2lite.reading_text import decode_text

READ_BYTES = 1 << 20
QUIET = ContextVar("quiet", default=False)


def line_width() -> int:
    """Columns of the terminal that is printed to; 80 where there is none."""
    return shutil.get_terminal_size().columns


def table(*lines: Sequence[str]) -> str:
    """Columns under their headers, which are the first line; the first column left-aligned, others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return visible("\n".join("  ".join(row).rstrip() for row in rows))


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values, one pair per line; a value that is too long goes on below its beginning."""
    indent = max(len(name) for name, _ in pairs) + 2
    lines = []
    for name, value in pairs:
        parts = (_wrapped(line.strip(), line_width() - indent) for line in str(value).split("\n"))
        said = f"\n{' ' * indent}".join(line for part in parts for line in part)
        lines.append(f"{name.ljust(indent)}{said}")
    return visible("\n".join(lines))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False) or [""]


def shown_text(text: str) -> str:
    """A text of a model or of data, `visible` on a terminal, elsewhere unchanged."""
    return visible(text) if sys.stdout.isatty() else text


def one_line(text: str) -> str:
    """The same for a line: on a terminal as much of it as fits, elsewhere all of it."""
    line = shown_text(text)
    return line[: line_width()] if sys.stdout.isatty() else line


def as_json(content: Any) -> str:
    """`content` for programs."""
    return json.dumps(content, indent=2)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Inside, nothing is drawn or remarked if asked so, not by the Hub's client either."""
    before = QUIET.set(quiet)
    enable: Callable[[], object] = bool
    if quiet:
        from huggingface_hub import utils as hub  # here: it takes half a second

        if not hub.are_progress_bars_disabled():  # type: ignore[attr-defined]
            hub.disable_progress_bars()  # type: ignore[attr-defined]
            enable = hub.enable_progress_bars  # type: ignore[attr-defined]
    try:
        yield
    finally:
        QUIET.reset(before)
        enable()


def is_watched() -> bool:
    """Whether somebody looks at standard error, and wants to be told what goes on."""
    return sys.stderr.isatty() and not QUIET.get()


@contextmanager
def steps_bar(steps: Sequence[object], what: str, unit: str = "run") -> Iterator[Any]:
    """A tqdm bar over `steps`, drawn only where it `is_watched`; `set_postfix_str` says which one runs.

    Its clock goes on while a step takes long.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # here: it takes half a second

    options = {"unit_scale": True, "unit_divisor": 1024} if unit == "iB" else {}
    drawn, over = is_watched(), threading.Event()
    with tqdm(
        desc=what, total=len(steps) or None, unit=unit, leave=False, disable=not drawn, **options
    ) as bar:

        def tick() -> None:
            while not over.wait(1):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        if drawn:
            clock.start()
        try:
            yield bar
        finally:
            over.set()
            if drawn:
                clock.join()


@contextmanager
def bytes_bar(what: str, unit: str = "iB") -> Iterator[Callable[[int, int], None]]:
    """The same for a progress callback, (bytes done, bytes in all), or a count of another `unit`."""
    with steps_bar((), what, unit) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def read_text(name: str) -> str:
    """A file's text, or standard input's for "-".

    Raises UsageError where it is not UTF-8 or holds NUL, at once: /dev/zero has no end.
    """
    parts = []
    with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as source:
        while part := source.read(READ_BYTES):
            parts.append(part.partition(b"\0")[0])
            if len(parts[-1]) < len(part):
                read = decode_text(b"".join(parts), name)
                raise UsageError(f"{name}: holds NUL behind {len(read)} characters, so it is no text")
    return decode_text(b"".join(parts), name)
