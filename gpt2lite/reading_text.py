"""Bytes → text, decided once: UTF-8 without its byte order mark, every line end a \\n."""

from __future__ import annotations

import io
import os
import re
from typing import BinaryIO, TextIO

from gpt2lite.errors import UsageError

HALVES = re.compile("[\ud800-\udfff]")  # of characters: JSON's escapes may hold them, UTF-8 cannot


def text_stream(source: BinaryIO) -> TextIO:
    """A file opened for bytes, as text: strict UTF-8, a mark at its beginning left out, line ends as \\n.

    Reading it raises UnicodeDecodeError, of which `not_utf8` makes a message.
    """
    return io.TextIOWrapper(source, "utf-8-sig")


def not_utf8(name: object, read: int, error: UnicodeDecodeError) -> UsageError:
    """What to raise where the decoder fails after `read` bytes of `name`."""
    place = read - len(error.object) + error.start
    return UsageError(f"{name}: not UTF-8 at byte {place} ({error.reason}); convert it")


def decode_text(content: bytes, name: object) -> str:
    """The whole text, as `text_stream` reads it. Raises UsageError, with the byte, where it is not UTF-8."""
    try:
        return text_stream(io.BytesIO(content)).read()
    except UnicodeDecodeError as error:
        raise not_utf8(name, len(content), error) from None


def plain_text(name: str, value: str) -> str:
    """A text, read as a file of it would be. Raises UsageError for half a surrogate pair."""
    try:
        return decode_text(value.encode(), name)
    except UnicodeEncodeError as error:
        found = f"{value[error.start]!r} at character {error.start}"
        raise UsageError(f"{name}: holds {found}, which is no text") from None


def typed_text(option: str, value: str) -> str:
    """What was typed, read as a file of the same bytes would be. Raises UsageError where it is not UTF-8."""
    return decode_text(os.fsencode(value), option)


def filled_lines(text: str) -> list[tuple[int, str]]:
    """(number from 1, line) of each line that is not blank.

    Only \\n ends a line: `str.splitlines` also cuts at form feeds and U+2028, which texts and JSON may hold.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
