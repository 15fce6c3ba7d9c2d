"""Ctrl-C while a model or a file is between two states: it waits, and then goes to whoever handles it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class CtrlC:
    """A handler that only counts, but for a second press while what runs may end anywhere.

    Elsewhere a second press goes to a handler of the caller's own, at once: Python's would raise in the
    middle of a step.
    """

    def __init__(self) -> None:
        self.presses, self.may_end, self.signal = 0, False, signal.SIGINT
        self.before: dict[int, Any] = {}

    def __call__(self, number: int, frame: object = None) -> None:
        """Count a press."""
        self.signal = signal.Signals(number)
        self.presses += 1
        was = self.before.get(number)
        if self.presses > 1 and self.may_end:
            self.may_end = False
            raise KeyboardInterrupt(self.signal)
        if self.presses > 1 and callable(was) and was is not signal.default_int_handler:
            was(number, frame)

    def check(self, *_: object) -> None:
        """Raise KeyboardInterrupt where it was pressed."""
        if self.presses:
            raise KeyboardInterrupt(self.signal)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """What changes nothing and may take long: a second press ends it at once."""
        self.may_end = True
        try:
            if self.presses > 1:
                raise KeyboardInterrupt(self.signal)
            yield
        finally:
            self.may_end = False


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """Ctrl-C and SIGTERM go to a handler; yields those that there were before.

    Where one is ignored it stays so; in a thread other than the main one nothing is changed.
    """
    is_main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
    # None: a handler that is not Python's
    before: dict[int, Any] = {n: was for n, was in found.items() if was not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@contextmanager
def held() -> Iterator[CtrlC]:
    """Ctrl-C or SIGTERM waits until the block ends, and goes then to the handler that was there before."""
    own = CtrlC()
    try:
        with handled_by(own) as own.before:
            yield own
    except KeyboardInterrupt:
        own.presses = 0  # this is what it came to
        raise
    finally:
        if own.presses and own.before:
            signal.raise_signal(own.signal)
