"""What can go wrong, as a tree.

GPT2LiteError
├── CheckpointError               a file is damaged, foreign or incomplete
│   └── CheckpointNotFoundError   nothing is there (also FileNotFoundError)
├── InsufficientMemoryError       what was asked does not fit (also MemoryError)
├── DiskFullError                 what is to be written does not fit (also OSError)
├── TrainingDivergedError         a loss is no longer a number
└── UsageError                    an argument is wrong (also ValueError)

Every message says where, what was wanted, what was found, and what to do next. What a program may want of it
is an attribute, so that nobody has to parse English.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

MAX_LISTED, MAX_LINE = 20, 1000
CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def listed(lines: Sequence[str]) -> str:
    """The end of a message that reports everything at once: a line each, up to MAX_LISTED."""
    more = [f"… and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "".join(f"\n  {line:.{MAX_LINE}}" for line in [*lines[:MAX_LISTED], *more])


def visible(text: str) -> str:
    """A text without what a terminal would obey: controls but tab and line end, and marks of direction.

    They are written as Python writes them, \\x1b; so are halves of characters, which no file can hold.
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest of those that are known, else all of them."""
    known = list(names)
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(known)}"


class GPT2LiteError(Exception):
    """The root: catch this to catch everything that gpt2lite raises on purpose. Its message is `visible`."""

    def __init__(self, message: object) -> None:
        super().__init__(visible(str(message)))


class CheckpointError(GPT2LiteError):
    """A checkpoint is damaged, of an unknown kind, or does not hold what the model needs.

    `CheckpointError(path, what is wrong)`: `path` is None while it is not known, `name` is that of the tensor
    or parameter, where it is about one.
    """

    def __init__(self, *where_and_what: object, name: str | None = None) -> None:
        super().__init__(": ".join(map(str, where_and_what)))
        self.path = str(where_and_what[0]) if len(where_and_what) > 1 else None
        self.name = name


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path."""

    __str__ = Exception.__str__  # FileNotFoundError would print an errno


class InsufficientMemoryError(GPT2LiteError, MemoryError):
    """A load does not fit into the memory that the process really has.

    `needed` and `available` are bytes by the kind of memory that is too small ("host", "device", "virtual");
    `fits` are the changes of the arguments with which it would fit.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: Mapping[str, int] = MappingProxyType({}),
        available: Mapping[str, int] = MappingProxyType({}),
        fits: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.needed, self.available, self.fits = dict(needed), dict(available), tuple(fits)


class DiskFullError(GPT2LiteError, OSError):
    """A disk has no room for what is to be written; what lay at the destination is there, and nothing new.

    `missing` and `free` are bytes; `missing` is the least, 0 where it is not known how much was to come.
    """

    __str__ = Exception.__str__

    def __init__(self, folder: object, code: int, *, needed: int, free: int) -> None:
        self.missing, self.free = max(needed - free, 0), free
        counts = {
            f"needs {needed:,} bytes": needed,
            f"{free:,} bytes are free": 1,
            f"{self.missing:,} bytes are missing": self.missing,
        }
        said = [words for words, is_known in counts.items() if is_known]
        what = f"{os.strerror(code)}: {', '.join(said)}. Free some, or choose another disk."
        super().__init__(f"{folder}: {what}")
        self.errno, self.strerror, self.filename = code, what, str(folder)


class TrainingDivergedError(GPT2LiteError):
    """A loss or a gradient is no longer finite."""


class UsageError(GPT2LiteError, ValueError):
    """An argument has a value that cannot work."""


def require_allowed(
    values: Mapping[str, Any], rules: Mapping[str, tuple[Callable[[Any], object], str]]
) -> None:
    """Raise UsageError for the first value that is not what its rule, a test and its words, allows."""
    for name, value in values.items():
        is_allowed, wanted = rules[name]
        if not is_allowed(value):
            raise UsageError(f"{name} must be {wanted}, got {value!r:.80}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, Python or the system says that host or device memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported
        return True
    return any(said in str(error) for said in ("allocate memory", "can't start new thread"))


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]
