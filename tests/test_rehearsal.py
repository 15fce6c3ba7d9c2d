"""Every strategy, run while what it allocates is counted, against its forecast: to the byte.

Small tensors stand for the host, and the meta device for a device: it holds nothing, and is counted apart.
As in forecasts, host memory counts once it is written to, device memory once it is allocated.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from gpt2lite import STRATEGIES, GPTConfig, open_model
from gpt2lite.checkpoint import reading
from gpt2lite.checkpoint.source import FileReader
from gpt2lite.dialects import DIALECTS
from gpt2lite.loading import LoadPlan, make_plan
from gpt2lite.model import GPTModel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIALECTS_OF_FILES = [name for name in DIALECTS if name != "openai"]  # TensorFlow's lies in no .pth
aten = torch.ops.aten
WRITES_NOTHING = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.set_.source_Storage_storage_offset,
)


class Rehearsal(TorchDispatchMode):
    """What is used of the host ("cpu") and the device ("meta"), now and at the peak, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.peak = {"cpu": 0, "meta": 0}, {"cpu": 0, "meta": 0}
        self.parts: dict[int, dict[int, int]] = {}  # of each storage: address → bytes that are in use
        self.lock = RLock()  # readers fill memory from their own threads

    def add(self, place: str, nbytes: int) -> None:
        self.used[place] += nbytes
        self.peak[place] = max(self.peak[place], self.used[place])

    def count(self, storage: torch.UntypedStorage, at: int = 0, nbytes: int | None = None) -> None:
        """All of a storage is in use, or `nbytes` at an address, until nothing refers to it."""
        key, place, size = id(storage), storage.device.type, storage.nbytes()
        with self.lock:
            if key not in self.parts:
                self.parts[key] = {}
                weakref.finalize(storage, self.forget, key, place, size)
            parts = self.parts[key]
            before = min(sum(parts.values()), size)
            parts[at] = max(parts.get(at, 0), size if nbytes is None else nbytes)
            self.add(place, min(sum(parts.values()), size) - before)

    def forget(self, key: int, place: str, size: int) -> None:
        with self.lock:
            self.add(place, -min(sum(self.parts.pop(key).values()), size))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        known = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in (each for each in tree_leaves(found) if isinstance(each, Tensor)):
            storage = tensor.untyped_storage()
            is_written = func not in WRITES_NOTHING and (func._schema.is_mutable or id(storage) not in known)
            if is_written or (tensor.is_meta and id(storage) not in known):
                self.count(storage)
            if func is aten._to_copy.default and tensor.is_meta and given[0].dtype != tensor.dtype:
                self.touch(tensor.nbytes)  # torch casts on the host what it copies to a device
        return found

    def touch(self, nbytes: int) -> None:
        """Host memory that goes again at once."""
        self.add("cpu", nbytes)
        self.add("cpu", -nbytes)


def rehearse(load: Callable[[LoadPlan], nn.Module], plan: LoadPlan) -> dict[str, int]:
    """What a load allocates, by dispatched operations, torch.load, and memory that a file is read into."""
    found, torch_load, read_into = Rehearsal(), reading._torch_load, FileReader.read_into

    def counted_load(path: Path, device: torch.device, **options: Any) -> object:
        with _disable_current_modes():
            tree = torch_load(path, device, **options)
        tensors = (each for each in tree_leaves(tree) if isinstance(each, Tensor))
        for storage in {id(storage := tensor.untyped_storage()): storage for tensor in tensors}.values():
            found.touch(storage.nbytes() if device.type == "meta" else 0)
            found.count(storage)
        return tree

    def counted_read(self: FileReader, memories: Iterable[memoryview], offset: int) -> None:
        listed = list(memories)
        for memory in listed:
            owner = getattr(memory.obj, "owner", None)  # none lies between two tensors
            if owner is not None and memory:
                found.count(owner.untyped_storage(), ctypes.addressof(memory.obj), len(memory))
        read_into(self, listed, offset)

    with pytest.MonkeyPatch.context() as patch, found:
        patch.setattr(reading, "_torch_load", counted_load)
        patch.setattr(FileReader, "read_into", counted_read)
        module = load(plan)
    assert module is not None
    return {
        "peak on the device": found.peak["meta"],
        "peak on the host": found.peak["cpu"],
        "stays on the device": found.used["meta"],
        "stays on the host": found.used["cpu"],
    }


def write(dialect: str, dtype: torch.dtype, config: GPTConfig, path: Path, *, apart: bool) -> Path:
    """A checkpoint of zeros, beside a tensor that no model wants: one file, or a folder of one per tensor."""
    with torch.device("meta"):
        ours = GPTModel(config).state_dict()
    state: dict[str, Tensor] = {}
    for theirs, mine, placement in DIALECTS[dialect].rows:
        for i in range(config.n_layers) if "{i}" in mine else (0,):
            name = mine.format(i=i)
            if name in ours and not (name == "out_head.weight" and config.tied_head):
                shape = list(placement.unplace(ours[name]).shape)
                shape[placement.rows_axis] *= 3 if placement.narrows else 1
                state[theirs.format(i=i)] = torch.zeros(shape, dtype=dtype)
    if not apart:
        torch.save({"model": state, "optimizer": {"momentum": torch.zeros(999)}}, path)
        return path
    path.mkdir()
    for name, tensor in state.items():
        torch.save(tensor, path / f"{name}.pt")
    return path


# torch exchanges no tensor's memory for that of the meta device, as what is built for real wants.
BUILT = ("baseline", "sequential")
PLACES = [
    (name, place) for name in STRATEGIES for place in ("cpu", "meta") if place == "cpu" or name not in BUILT
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dialect", DIALECTS_OF_FILES)
@pytest.mark.parametrize(("strategy", "device"), PLACES)
def test_what_a_strategy_allocates_is_its_forecast_to_the_byte(
    strategy: str, device: str, dialect: str, tied: bool, tmp_path: Path
):
    config, row, off = GPTConfig.of(TINY.as_dict() | {"tied_head": tied}), STRATEGIES[strategy], {}
    for stored in DTYPES:
        path = write(dialect, stored, config, tmp_path / f"{stored}.pth", apart=strategy == "per_tensor")
        opened = open_model(path, config=config)
        for cast in (None, *(dtype for dtype in DTYPES if dtype != stored)):
            plan = make_plan(opened.reading, opened.build, torch.device(device), {"dtype": cast})
            forecast = row.forecast(plan)
            wanted = {
                "peak on the device": forecast.peak_device,
                "peak on the host": forecast.peak_host_anonymous,
                "stays on the device": forecast.stays_device,
                "stays on the host": forecast.stays_host,
            }
            if (found := rehearse(row.load, plan)) != wanted:
                off[stored, cast] = found, wanted
    assert off == {}
