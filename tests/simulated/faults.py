"""Faults of which each is planted in the package in turn, while every check of checks.py is run.

    python tests/simulated/faults.py > table.json

A fault is a line of the source that says something else. The answer is a JSON object: by fault, the checks
that caught it.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from checks import CHECKS

from gpt2lite import devices


class Fault(NamedTuple):
    """In a function, `right` is replaced by `wrong`."""

    place: str  # module:function, or module:Class.method
    right: str
    wrong: str


STREAM, GRAPHS = "gpt2lite.loading.stream:", "gpt2lite.generation.engines:"
FAULTS = {
    "a buffer on the device is refilled before it was read": Fault(
        f"{STREAM}Lane.carry", "if self.turn in self.scattered:", "if False:"
    ),
    "a buffer is read before its copy has arrived": Fault(
        f"{STREAM}Lane.carry", "self.scattering.wait_event(copied)", "pass"
    ),
    "a buffer is copied to before its memory is ready": Fault(
        f"{STREAM}Lane.__init__", "self.copying.wait_stream(self.scattering)", "pass"
    ),
    "an event is recorded on the wrong stream": Fault(
        f"{STREAM}Lane.carry", "self.copying.record_event()", "self.scattering.record_event()"
    ),
    "a release is recorded on the wrong stream": Fault(
        f"{STREAM}Lane.release", "self.scattering.record_event()", "self.copying.record_event()"
    ),
    "the copying stream is another device's": Fault(
        f"{STREAM}Lane.__init__", "torch.Stream(device)", "torch.Stream(torch.device(device.type, 0))"
    ),
    "a slot is reused without waiting for its copy": Fault(f"{STREAM}Ring.take", "wait_for(copied)", "pass"),
    "a slot is freed before its copy is done": Fault(
        f"{STREAM}Ring.deliver", "self.free.put((memory, copied))", "self.free.put((memory, None))"
    ),
    "slots are not page-locked": Fault(f"{STREAM}allocate_slot", "if pinned:", "if False:"),
    "an event is waited for by a busy processor": Fault(
        "gpt2lite.devices:wait_for", "while not event.query():", "while not event.synchronize() and False:"
    ),
    "a load returns before the device is done": Fault(f"{STREAM}load", "synchronize(plan.device)", "pass"),
    "a thread that saves works on a stream of its own": Fault(
        "gpt2lite.checkpoint.writing:made_ahead", "with on_stream(stream):", "with on_stream(None):"
    ),
    "a graph is recorded on another device's stream": Fault(
        "gpt2lite.devices:record", "torch.Stream)(device)", "torch.Stream)(torch.device(device.type, 0))"
    ),
    "every recording takes a stream of its own": Fault(
        "gpt2lite.devices:record", "if device not in _recording_streams:", "if True:"
    ),
    "a replay reads an old token": Fault(f"{GRAPHS}_graph_step", "own.copy_(ids)", "pass"),
    "a replay writes where the last one wrote": Fault(
        f"{GRAPHS}CursorCache.follow", "self.cursor.fill_(cache.length)", "pass"
    ),
    "a replay masks the pads of an earlier window": Fault(
        f"{GRAPHS}CursorCache.follow", "if cache.pads is not self.followed:", "if self.followed is None:"
    ),
    "free memory is not merged in the forecast": Fault(
        "gpt2lite.loading.forecast:CachingPool.give", "size += free.pop(block + size, 0)", "pass"
    ),
    "segments are not rounded in the forecast": Fault(
        "gpt2lite.loading.forecast:CachingPool._add_segment",
        "20 * MIB if size < 10 * MIB else round_up(size, 2 * MIB)",
        "size",
    ),
    "an error keeps what was allocated": Fault(
        "gpt2lite.loading.choice:_load",
        "first_line(error))",
        "first_line(error)); ran_out[name].__cause__ = error",
    ),
    "a cache outlives the error": Fault(
        "gpt2lite.generation.decoding:_with_numbers", "reason = first_line(error)", "reason = error"
    ),
}


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The package with a fault in it."""
    module_name, _, path = fault.place.partition(":")
    module: Any = import_module(module_name)
    *outer, name = path.split(".")
    owner = getattr(module, outer[0]) if outer else module
    real = owner.__dict__[name]
    source = textwrap.dedent(inspect.getsource(getattr(real, "__wrapped__", real)))
    assert source.count(fault.right) == 1, f"{fault.place} says {fault.right!r} {source.count(fault.right)} times"
    made: dict[str, Any] = {}
    exec(compile(source.replace(fault.right, fault.wrong), module.__file__, "exec"), vars(module), made)
    users = [owner] if outer else [m for m in sys.modules.values() if vars(m).get(name) is real]
    devices._recording_streams.clear()
    for user in users:
        setattr(user, name, made[name])
    replaced = fault.place == f"{STREAM}load"
    rows = import_module("gpt2lite.loading.strategies").STRATEGIES
    before = rows["stream"]
    if replaced:
        rows["stream"] = before._replace(load=made[name])
    try:
        yield
    finally:
        rows["stream"] = before
        for user in users:
            setattr(user, name, real)
        devices._recording_streams.clear()


def catching(fault: Fault) -> list[str]:
    """The checks that fail with a fault."""
    found = []
    with planted(fault):
        for name, check in CHECKS.items():
            try:
                check()
            except Exception as error:
                found.append(name)
                del error
    return found


if __name__ == "__main__":
    wanted = sys.argv[1:] or FAULTS
    print(json.dumps({name: catching(FAULTS[name]) for name in wanted}, indent=1))
