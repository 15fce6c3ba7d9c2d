"""JSON out of files: objects and lists whose size, depth and memory are limited before they are believed."""

from __future__ import annotations

import json
from typing import Any

from gpt2lite.checkpoint.foreign import DAMAGED
from gpt2lite.checkpoint.remote import Place
from gpt2lite.checkpoint.source import ByteSource, may_take, read_all, source_of
from gpt2lite.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20
MAX_NEST, NESTS = 64, frozenset((dict, list))
COSTS = {"{": 256, "[": 80, ":": 192, ",": 64}  # bytes that parsing takes at most for each of these


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _is_deep(found: Any) -> bool:
    """Whether objects and lists lie in more than MAX_NEST others; no recursion, which may end the process."""
    level, levels = [found] if type(found) in NESTS else [], 0
    while level and (levels := levels + 1) <= MAX_NEST:
        inner = (node.values() if type(node) is dict else node for node in level)
        level = [child for children in inner for child in children if type(child) in NESTS]
    return bool(level)


def _parsed(text: str) -> Any:
    takes = sum(nbytes * text.count(mark) for mark, nbytes in COSTS.items())
    if takes > may_take(len(text)):
        raise ValueError(f"its {len(text)} bytes would take {takes >> 20} MiB of memory")
    found = json.loads(text, object_pairs_hook=_unique)
    if _is_deep(found):
        raise ValueError(f"nested more than {MAX_NEST} levels deep")
    return found


def json_object(where: object, raw: bytes | str, what: str = "", kind: type = dict) -> Any:
    """The object, or list, that some JSON is, at most MAX_NEST levels deep; costs at most `may_take`.

    Raises CheckpointError, also where a key occurs twice.
    """
    try:
        found = _parsed(raw if isinstance(raw, str) else raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(where, f"{what}not valid JSON ({error}): {DAMAGED}") from None
    if not isinstance(found, kind):
        wanted = "an object" if kind is dict else "a list"
        raise CheckpointError(where, f"holds a JSON {type(found).__name__}, expected {wanted}")
    return found


def read_json(file: Place | ByteSource, kind: type = dict, most: int = MAX_JSON_BYTES) -> Any:
    """The object, or list, that a JSON file of at most `most` bytes holds. Raises CheckpointError."""
    source = source_of(file) if isinstance(file, Place) else file
    return json_object(source, read_all(source, most), kind=kind)
