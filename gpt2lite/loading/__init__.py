"""Checkpoint + module = loaded module: `load` for what a dialect reads, `load_module` for any module."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.dialects import Reading, read_names
from gpt2lite.errors import InsufficientMemoryError, UsageError
from gpt2lite.loading.plan import LoadPlan, Progress, make_plan
from gpt2lite.loading.skeleton import build_on_meta, prove_complete, restore_unsaved_buffers
from gpt2lite.loading.strategies import AUTO, STRATEGIES
from gpt2lite.loading.stream import DEFAULT_RING_BYTES
from gpt2lite.memory import is_out_of_memory

__all__ = ["AUTO", "STRATEGIES", "LoadPlan", "Progress", "load", "load_module"]


def load(
    reading: Reading,
    build: Callable[[], nn.Module],
    device: str | torch.device,
    strategy: str,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    hint: Callable[[], str] = str,
) -> nn.Module:
    """The module that `build` makes, filled from `reading` and proven complete, in eval mode.

    Every mismatch is found before anything is allocated. Raises UsageError for an unknown strategy or device,
    CheckpointError for a checkpoint that does not fit or changes while it is read, InsufficientMemoryError,
    with nothing left allocated, where memory runs out.
    """
    if strategy != "auto" and strategy not in STRATEGIES:
        raise UsageError(f"no strategy is called {strategy!r}; there are auto, {', '.join(STRATEGIES)}")
    run = STRATEGIES[AUTO if strategy == "auto" else strategy]
    plan = make_plan(
        reading, build, device, dtype=dtype, ring_bytes=DEFAULT_RING_BYTES, progress=progress, hint=hint
    )
    try:
        module = _filled(run, plan)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    else:
        reading.manifest.check_unchanged()
        dtypes = {name: target.dtype for target in plan.targets for name in target.names}
        return prove_complete(module, dtypes, plan.device)
    # Raised out here, where neither the plan's tensors nor the first error's frames are held any more.
    del plan
    raise InsufficientMemoryError(
        f'{reading.manifest.path}: memory ran out on {device} with strategy="{strategy}" ({reason}). '
        'strategy="stream" needs least, dtype=torch.bfloat16 half of float32.'
    )


def _filled(run: Callable[[LoadPlan], nn.Module], plan: LoadPlan) -> nn.Module:
    module = run(plan)
    restore_unsaved_buffers(module, plan.build, plan.device)
    return module


def load_module(
    build: Callable[[], nn.Module],
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    strategy: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Load a checkpoint into any module: `build()` returns one, the names in the file are its own.

    `strategy` is one of `STRATEGIES` or auto (stream); each says there what it costs. `dtype` casts
    floating-point tensors, None keeps the file's dtypes. `progress` is called with (bytes done, bytes in
    all). The module comes back in eval mode. Raises CheckpointError, UsageError.
    """
    reading = read_names(open_checkpoint(path), build_on_meta(build).state_dict().keys())
    return load(reading, build, device, strategy, dtype=dtype, progress=progress)
