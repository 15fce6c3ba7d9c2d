"""Checkpoint + module = loaded module: what is planned, chosen, filled and proven."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gpt2lite.devices import resolve_device
from gpt2lite.errors import InsufficientMemoryError, UsageError, first_line, is_out_of_memory
from gpt2lite.loading.adapters import merge_adapters
from gpt2lite.loading.choice import Verdict, choose, forecasts, helps, judge
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.options import LoadOptions, OpenOptions, Options, Progress
from gpt2lite.loading.plan import LoadPlan, make_plan
from gpt2lite.loading.schedule import Tuning
from gpt2lite.loading.skeleton import prove_complete, restore_unsaved_buffers
from gpt2lite.loading.strategies import AUTO, STRATEGIES
from gpt2lite.memory import find_budget

__all__ = [
    "AUTO",
    "STRATEGIES",
    "Forecast",
    "LoadOptions",
    "LoadPlan",
    "OpenOptions",
    "Options",
    "Progress",
    "Tuning",
    "Verdict",
    "choose",
    "forecasts",
    "helps",
    "judge",
    "load",
    "make_plan",
]


def load(
    make: Callable[[torch.device], LoadPlan], device: str | torch.device, strategy: str, options: LoadOptions
) -> nn.Module:
    """The module that the plan of `make` fills, proven complete, in eval mode.

    Every mismatch, and insufficient memory, is found before anything is allocated. Raises UsageError for an
    unknown strategy or device or a wrong cap, CheckpointError for a checkpoint that does not fit or changes
    while it is read, InsufficientMemoryError, with nothing left allocated, where memory runs out.
    """
    resolved = resolve_device(device)
    budget = find_budget(resolved, options.get("max_host_memory"), options.get("max_device_memory"))
    plan = make(resolved)
    manifest = plan.manifest
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
        manifest.check_unchanged()
        targets = () if plan.own_loading else plan.targets  # its loading may change dtypes, too
        dtypes = {name: target.dtype for target in targets for name in target.names}
        return prove_complete(module, dtypes, plan.device)
    # Raised out here, where neither the plan's tensors nor the first error's frames are held any more.
    del plan
    raise InsufficientMemoryError(
        f'{manifest.path}: memory ran out on {device} with strategy="{name}", though the forecast '
        f"fits: others may have taken it meanwhile ({reason}). Try again."
    )


def _filled(strategy: str, plan: LoadPlan) -> nn.Module:
    module = STRATEGIES[strategy].load(plan)
    merge_adapters(plan, module)
    restore_unsaved_buffers(module, plan.build, plan.device)
    return module
