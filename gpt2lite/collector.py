"""Python's cyclic garbage collector, paused while thousands of small objects are made that all stay alive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_pauses: list[bool] = []  # one for each load under way: whether the first of them found it enabled


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector; also a decorator. It is as it was once the last thread has left.

    The pause must last until those objects are gone, otherwise the walk is only put off. Without it, reading
    the headers of gpt2-xl makes the collector walk all of torch's objects: 85 of the 170 ms of mapping it.
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
