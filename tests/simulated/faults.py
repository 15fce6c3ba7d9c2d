"""Faults of which each is planted in the package in turn: does a check of checks.py catch it?

    python tests/simulated/faults.py [--all] > table.json

A fault is a line of the source that says something else. The answer is a JSON object: by fault, the checks
that caught it, of the one that should, or of all.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from typing import Any, NamedTuple

from checks import CHECKS

from gpt2lite import devices


class Fault(NamedTuple):
    """In a function, `right` is replaced by `wrong`, which the check `caught_by` notices."""

    place: str  # module:function, or module:Class.method
    right: str
    wrong: str
    caught_by: str


STREAM, GRAPHS = "gpt2lite.loading.stream:", "gpt2lite.generation.engines:"
FAULTS = {
    "a buffer on the device is refilled before it was read": Fault(
        f"{STREAM}Lane.carry",
        "if self.turn in self.scattered:",
        "if False:",
        "late copies within the device change no bit",
    ),
    "a buffer is read before its copy has arrived": Fault(
        f"{STREAM}Lane.carry",
        "self.scattering.wait_event(copied)",
        "pass",
        "late copies over the bus change no bit",
    ),
    "a buffer is copied to before its memory is ready": Fault(
        f"{STREAM}Lane.__init__",
        "self.copying.wait_stream(self.scattering)",
        "pass",
        "late copies within the device change no bit",
    ),
    "an event is recorded on the wrong stream": Fault(
        f"{STREAM}Lane.carry",
        "self.copying.record_event()",
        "self.scattering.record_event()",
        "late copies over the bus change no bit",
    ),
    "a release is recorded on the wrong stream": Fault(
        f"{STREAM}Lane.release",
        "self.scattering.record_event()",
        "self.copying.record_event()",
        "late copies within the device change no bit",
    ),
    "the copying stream is another device's": Fault(
        f"{STREAM}Lane.__init__",
        "torch.Stream(device)",
        "torch.Stream(torch.device(device.type, 0))",
        "the second device is as good as the first",
    ),
    "a slot is reused without waiting for its copy": Fault(
        f"{STREAM}Ring.take", "wait_for(copied)", "pass", "late copies over the bus change no bit"
    ),
    "a slot is freed before its copy is done": Fault(
        f"{STREAM}Ring.deliver",
        "self.free.put((memory, copied))",
        "self.free.put((memory, None))",
        "late copies over the bus change no bit",
    ),
    "slots are not page-locked": Fault(
        f"{STREAM}allocate_slot", "if pinned:", "if False:", "slots are page locked once and used again"
    ),
    "an event is waited for by a busy processor": Fault(
        "gpt2lite.devices:wait_for",
        "while not event.query():",
        "while not event.synchronize() and False:",
        "slots are page locked once and used again",
    ),
    "a load returns before the device is done": Fault(
        f"{STREAM}fill", "synchronize(device)", "pass", "another stream finds what was loaded"
    ),
    "a thread that saves works on a stream of its own": Fault(
        "gpt2lite.checkpoint.writing:made_ahead",
        "with on_stream(stream):",
        "with on_stream(None):",
        "a model is saved as its stream leaves it",
    ),
    "a graph is recorded on another device's stream": Fault(
        "gpt2lite.devices:record",
        "torch.Stream)(device)",
        "torch.Stream)(torch.device(device.type, 0))",
        "a graph belongs to its models device",
    ),
    "every recording takes a stream of its own": Fault(
        "gpt2lite.devices:record",
        "if device not in _recording_streams:",
        "if True:",
        "recording takes no more than is asked for",
    ),
    "a replay reads an old token": Fault(
        f"{GRAPHS}_graph_step", "own.copy_(ids)", "pass", "a recorded graph writes torchs tokens"
    ),
    "a replay writes where the last one wrote": Fault(
        f"{GRAPHS}CursorCache.follow",
        "self.cursor.fill_(cache.length)",
        "pass",
        "a recorded graph writes torchs tokens",
    ),
    "a replay masks the pads of an earlier window": Fault(
        f"{GRAPHS}CursorCache.follow",
        "if cache.pads is not self.followed:",
        "if self.followed is None:",
        "a graph goes on past the context",
    ),
    "free memory is not merged in the forecast": Fault(
        "gpt2lite.loading.forecast:CachingPool.give",
        "size += free.pop(block + size, 0)",
        "size += 0",
        "forecasts are what the allocator counts",
    ),
    "segments are not rounded in the forecast": Fault(
        "gpt2lite.loading.forecast:CachingPool._add_segment",
        "20 * MIB if size < 10 * MIB else round_up(size, 2 * MIB)",
        "size",
        "forecasts are what the allocator counts",
    ),
    "an error keeps what was allocated": Fault(
        "gpt2lite.loading.choice:_load",
        "first_line(error))",
        "first_line(error)); ran_out[name].__cause__ = error",
        "memory that runs out leaves nothing and another strategy takes over",
    ),
    "a cache outlives the error": Fault(
        "gpt2lite.generation.decoding:_with_numbers",
        "reason = first_line(error)",
        "reason = error",
        "generation that runs out of memory leaves nothing",
    ),
}


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The package with a fault in it, wherever a function is held."""
    module_name, _, path = fault.place.partition(":")
    module = import_module(module_name)
    function: Any = inspect.unwrap(reduce(getattr, path.split("."), module))
    source, made = textwrap.dedent(inspect.getsource(function)), dict[str, Any]()
    assert source.count(fault.right) == 1, (
        f"{fault.place}: {fault.right!r} is there {source.count(fault.right)} times"
    )
    exec(compile(source.replace(fault.right, fault.wrong), fault.place, "exec"), vars(module), made)
    right = function.__code__
    devices._recording_streams.clear()
    function.__code__ = inspect.unwrap(made[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = right
        devices._recording_streams.clear()


def catching(fault: Fault, names: Iterable[str]) -> list[str]:
    """Those checks that fail with a fault."""
    found = []
    with planted(fault):
        for name in names:
            try:
                CHECKS[name]()
            except Exception as error:
                found.append(name)
                del error
    return found


if __name__ == "__main__":
    every = CHECKS if "--all" in sys.argv else ()
    caught = {name: catching(fault, every or [fault.caught_by]) for name, fault in FAULTS.items()}
    print(json.dumps(caught))
