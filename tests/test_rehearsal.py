"""Every strategy is run while its allocations are counted, to the byte, and compared with its forecast.

The accelerator is the device meta: what goes there has a size and no memory.
"""

from __future__ import annotations

import runpy
import weakref
from collections.abc import Callable
from heapq import nlargest
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2lite import STRATEGIES, GPTConfig, GPTModel
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint import reading as checkpoint_reading
from gpt2lite.dialects.reading import read_dialect
from gpt2lite.loading import strategies
from gpt2lite.loading.choice import forecasts
from gpt2lite.loading.forecast import Ledger
from gpt2lite.loading.plan import LoadPlan, make_plan

write = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "forecast_accuracy.py"))["write"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (strategy, device) that cannot be rehearsed, and why.
NOT_REHEARSED = {
    ("baseline", "meta"): "a parameter with memory cannot be moved to meta in place",
    ("sequential", "meta"): "a parameter with memory cannot be moved to meta in place",
}


class Counter(TorchDispatchMode):
    """Enters every storage in a ledger when an operation returns it, until nothing refers to it any more."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.ledger, self.seen = Ledger(device), set[int]()

    def take(self, storage: torch.UntypedStorage, *, mapped: bool = False) -> None:
        key, nbytes = id(storage), storage.nbytes()
        if key not in self.seen:
            on_device = storage.device.type == "meta"
            pool = self.ledger.device if on_device else self.ledger.mapped if mapped else self.ledger.host
            self.seen.add(key)
            weakref.finalize(storage, self.give, key, pool.give, pool.take(nbytes))

    def give(self, key: int, give: Callable[[int], None], block: int) -> None:
        self.seen.discard(key)
        give(block)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and found.device.type == "cpu":
            return found  # counts once an operation uses it, as pages of the host do once they are touched
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.take(tensor.untyped_storage())
        return found


def rehearse(plan: LoadPlan, strategy: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Ledger, nn.Module]:
    """Run a strategy; torch.load and mapping make storages without an operation that a mode could see."""
    counter, real_load, real_map = (
        Counter(plan.device),
        checkpoint_reading._torch_load,
        strategies.map_tensors,
    )

    def torch_load(path: Path, device: torch.device, **options: bool) -> object:
        tree = real_load(path, device, **options)
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                if device.type != "cpu":  # each storage is read into host memory first
                    counter.ledger.host.touch(tensor.untyped_storage().nbytes())
                counter.take(tensor.untyped_storage())
        return tree

    def map_tensors(*args: Any) -> dict[str, Tensor]:
        with torch.utils._python_dispatch._disable_current_modes():
            found = real_map(*args)
        for tensor in found.values():
            counter.take(tensor.untyped_storage(), mapped=True)
        return found

    monkeypatch.setattr(checkpoint_reading, "_torch_load", torch_load)
    monkeypatch.setattr(strategies, "map_tensors", map_tensors)
    for tensor in (*plan.skeleton.parameters(), *plan.skeleton.buffers()):
        storage = tensor.untyped_storage()  # of the skeleton: it stands for no memory
        counter.seen.add(id(storage))
        weakref.finalize(storage, counter.seen.discard, id(storage))
    with counter:
        module = STRATEGIES[strategy].load(plan)
    return counter.ledger, module


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dialect", ["book", "huggingface", "nanogpt", "book-fast"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_takes_what_it_forecasts(
    strategy: str, dialect: str, tied: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if why := NOT_REHEARSED.get((strategy, device)):
        pytest.skip(why)
    config = GPTConfig.of(TINY.as_dict() | {"tied_head": tied})
    for stored in DTYPES:
        path = write(
            dialect, "folder" if strategy == "per_tensor" else "pth", stored, config, tmp_path / str(stored)
        )
        reading = read_dialect(open_checkpoint(path))
        for cast in (None, torch.bfloat16, torch.float32):
            plan = make_plan(reading, lambda: GPTModel(config), torch.device(device), {"dtype": cast})
            expected = forecasts(plan)[strategy]
            ledger, module = rehearse(plan, strategy, monkeypatch)
            found = ledger.balance()
            # Slots count in the forecast as far as they are written to, in the rehearsal whole.
            staged = [chunk.nbytes for chunk in plan.schedule.chunks if not chunk.in_place]
            schedule, unwritten = plan.schedule, 0
            if strategy == "stream":
                written = sum(nlargest(schedule.slots, staged))
                unwritten = schedule.slots * schedule.slot_bytes - written
            assert found.peak_host_anonymous == expected.peak_host_anonymous + unwritten, (stored, cast)
            assert found.peak_device == expected.peak_device, (stored, cast)
            assert found.stays_host == expected.stays_host, (stored, cast)
            assert found.stays_device == expected.stays_device, (stored, cast)
            monkeypatch.undo()
            del module
