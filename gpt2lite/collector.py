"""Python's cyclic garbage collector, held while thousands of small objects are made that are no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_pauses: list[bool] = []  # of loads under way; what the first of them found


@contextmanager
def collector_paused() -> Iterator[None]:
    """Also a decorator; several threads may be in it.

    It has to last until those objects are gone, or the walk is only put off.
    The headers of a gpt2-xl else have the collector walk all of torch: 85 of the 170 ms of mapping it.
    """
    with _lock:
        _pauses.append(_pauses[0] if _pauses else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            if _pauses.pop() and not _pauses:
                gc.enable()
