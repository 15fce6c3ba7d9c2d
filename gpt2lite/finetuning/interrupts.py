"""Ctrl-C while a model or a file is between two states: it waits, and then goes to whoever handles it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CtrlC:
    """A handler that only counts, but for a second press while what runs may end anywhere."""

    def __init__(self) -> None:
        self.presses, self.may_end, self.signal = 0, False, signal.SIGINT

    def __call__(self, number: int, *_: object) -> None:
        """Count a press."""
        self.signal = signal.Signals(number)
        self.presses += 1
        if self.presses > 1 and self.may_end:
            self.may_end = False
            raise KeyboardInterrupt

    def check(self, *_: object) -> None:
        """Raise KeyboardInterrupt where it was pressed."""
        if self.presses:
            raise KeyboardInterrupt

    @contextmanager
    def looking(self) -> Iterator[None]:
        """What changes nothing and may take long: a second press ends it at once."""
        self.may_end = True
        try:
            if self.presses > 1:
                raise KeyboardInterrupt
            yield
        finally:
            self.may_end = False


@contextmanager
def held() -> Iterator[CtrlC]:
    """Ctrl-C or SIGTERM waits until the block ends, and goes then to the handler that was there before.

    Where it is ignored it stays so; in a thread other than the main one there is nothing to hold.
    """
    own, is_main = CtrlC(), threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    # None: a handler that is not Python's
    before = {number: was for number, was in found.items() if was not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, own)
    try:
        yield own
    except KeyboardInterrupt:
        own.presses = 0  # this is what it came to
        raise
    finally:
        for number, was in before.items():
            signal.signal(number, was)
        if own.presses and before:
            signal.raise_signal(own.signal)
