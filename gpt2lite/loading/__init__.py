"""Checkpoint + module = loaded module: `load` for what a dialect reads, `load_module` for any module."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.collector import collector_paused
from gpt2lite.dialects import Reading, read_names
from gpt2lite.errors import InsufficientMemoryError, UsageError, first_line, is_out_of_memory
from gpt2lite.loading.adapters import merge_adapters
from gpt2lite.loading.choice import Verdict, choose, forecasts, helps, judge
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.plan import LoadPlan, Progress, make_plan
from gpt2lite.loading.skeleton import build_on_meta, prove_complete, restore_unsaved_buffers
from gpt2lite.loading.strategies import AUTO, STRATEGIES
from gpt2lite.loading.tuning import Tuning
from gpt2lite.memory import find_budget, resolve_device

__all__ = [
    "AUTO",
    "STRATEGIES",
    "Forecast",
    "LoadPlan",
    "Progress",
    "Tuning",
    "Verdict",
    "choose",
    "forecasts",
    "helps",
    "judge",
    "load",
    "load_module",
    "make_plan",
]


def load(
    reading: Reading,
    build: Callable[[], nn.Module],
    device: str | torch.device,
    strategy: str,
    *,
    dtype: torch.dtype | None = None,
    max_host_memory: int | str | None = None,
    max_device_memory: int | str | None = None,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
    hint: Callable[[], str] = str,
    quantize: Callable[[str], bool] | None = None,
) -> nn.Module:
    """The module that `build` makes, filled from `reading` and proven complete, in eval mode.

    Every mismatch, and memory that will not do, is found before anything is allocated. Raises UsageError for
    an unknown strategy or device or a wrong cap, CheckpointError for a checkpoint that does not fit or
    changes while it is read, InsufficientMemoryError, with nothing left allocated, where memory runs out.
    """
    resolved = resolve_device(device)
    budget = find_budget(resolved, max_host_memory, max_device_memory)
    plan = make_plan(
        reading, build, resolved, dtype=dtype, progress=progress, tuning=tuning, hint=hint, quantize=quantize
    )
    for said, goes_with in ((not plan.tuning.keep_cached, "stream"), (plan.tuning.prefetch, "mmap")):
        if said and strategy in STRATEGIES.keys() - {goes_with}:
            option = "keep_cached=False" if goes_with == "stream" else "prefetch=True"
            raise UsageError(f'{option} goes with strategy="{goes_with}" or "auto", not {strategy!r}')
    name, plan = choose(plan, strategy, budget)
    try:
        module = _filled(name, plan)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, InsufficientMemoryError) or not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        reading.manifest.check_unchanged()
        dtypes = {name: target.dtype for target in plan.targets for name in target.names}
        return prove_complete(module, dtypes, plan.device)
    # Raised out here, where neither the plan's tensors nor the first error's frames are held any more.
    del plan
    raise InsufficientMemoryError(
        f'{reading.manifest.path}: memory ran out on {device} with strategy="{name}", though the forecast '
        f"fits: others may have taken it meanwhile ({reason}). Try again."
    )


def _filled(strategy: str, plan: LoadPlan) -> nn.Module:
    module = STRATEGIES[strategy].load(plan)
    merge_adapters(plan, module)
    restore_unsaved_buffers(module, plan.build, plan.device)
    return module


@collector_paused()
def load_module(
    build: Callable[[], nn.Module],
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    strategy: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    max_host_memory: int | str | None = None,
    max_device_memory: int | str | None = None,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Load a checkpoint into any module: `build()` returns one, the names in the file are its own.

    The arguments and errors are those of `GPTModel.from_checkpoint`. The module comes back in eval mode.
    """
    reading = read_names(open_checkpoint(path), build_on_meta(build).state_dict().keys())
    return load(
        reading,
        build,
        device,
        strategy,
        dtype=dtype,
        max_host_memory=max_host_memory,
        max_device_memory=max_device_memory,
        tuning=tuning,
        progress=progress,
    )
