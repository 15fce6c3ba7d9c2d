"""Tokens → text as it comes: no character in parts, nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from gpt2lite.tokenizer import Encoding


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    lengths = range(max(map(len, stops), default=0) - 1, 0, -1)
    return next((n for n in lengths if n <= len(text) and any(s.startswith(text[-n:]) for s in stops)), 0)


def stream_text(tokens: Iterable[int], encoding: Encoding, stops: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of text, the last before the end-of-text token or a stop string.

    A piece holds whole characters and nothing that may turn out to begin a stop string.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    held = ""
    for token in tokens:
        if token == encoding.eot_token:
            break
        held += decoder.decode(encoding.decode_single_token_bytes(token))
        if ends := [held.find(stop) for stop in stops if stop in held]:
            yield held[: min(ends)]
            return
        ready = len(held) - _held_back(held, stops)
        yield held[:ready]
        held = held[ready:]
    yield held + decoder.decode(b"", final=True)
