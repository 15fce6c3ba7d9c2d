"""What the commands print with: tables, sizes, progress bars. Imports neither torch nor the Hub's client."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lite.errors import visible
from gpt2lite.reading_text import decode_text

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "embedded.pth"


def table(*lines: Sequence[str]) -> str:
    """Columns under their headers, which are the first line; the first column left-aligned, others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return visible("\n".join("  ".join(row).rstrip() for row in rows))


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values, one pair per line."""
    width = max(len(name) for name, _ in pairs)
    return visible("\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs))


def shown_text(text: str) -> str:
    """A text of a model or of data, `visible` on a terminal, elsewhere unchanged."""
    return visible(text) if sys.stdout.isatty() else text


def as_json(content: Any) -> str:
    """`content` for programs."""
    return json.dumps(content, indent=2)


def steps_bar(steps: Sequence[object], what: str, unit: str = "run") -> Any:
    """A tqdm bar over `steps`, drawn only on a terminal; `set_postfix_str` says which one runs."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # here: it takes half a second

    options = {"unit_scale": True, "unit_divisor": 1024} if unit == "iB" else {}
    drawn = sys.stderr.isatty()
    return tqdm(desc=what, total=len(steps) or None, unit=unit, leave=False, disable=not drawn, **options)


@contextmanager
def bytes_bar(what: str, unit: str = "iB") -> Iterator[Callable[[int, int], None]]:
    """The same for a progress callback, (bytes done, bytes in all), or a count of another `unit`."""
    with steps_bar((), what, unit) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def read_text(name: str) -> str:
    """A file's text, or standard input's for "-". Raises UsageError where it is not UTF-8."""
    return decode_text(sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes(), name)
