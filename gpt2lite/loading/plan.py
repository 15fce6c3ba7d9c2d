"""What a load has to do: which stored tensor fills which parameters, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint import Manifest, TensorSpan
from gpt2lite.dialects import Placement, Reading
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.loading.skeleton import build_on_meta

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the module: all names that share it, where its values lie, what it will be."""

    names: tuple[str, ...]
    placement: Placement
    span: TensorSpan
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on the device once loaded."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LoadPlan:
    """Everything that a strategy needs. `skeleton` is the module on meta, for one strategy to fill."""

    manifest: Manifest
    build: Callable[[], nn.Module]
    skeleton: nn.Module
    targets: tuple[Target, ...]
    device: torch.device
    ring_bytes: int
    progress: Progress

    @property
    def spans(self) -> dict[str, TensorSpan]:
        """The stored tensors that are needed, each once, in the order in which they lie on disk."""
        spans = {target.span.name: target.span for target in self.targets}
        return dict(sorted(spans.items(), key=lambda item: (item[1].path, item[1].offset)))

    @property
    def model_bytes(self) -> int:
        """Bytes that the loaded module takes on its device."""
        return sum(target.nbytes for target in self.targets)


def resolve_device(device: str | torch.device) -> torch.device:
    """`device` as torch.device, with its index. Raises UsageError where this machine has no such device."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"no device is called {device!r}; try cpu, cuda or cuda:0") from None
    if found.type == "meta":
        raise UsageError("a model on the meta device holds no weights; try cpu or cuda")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            have = f"only {count} CUDA device(s)" if count else "no CUDA device that torch can use"
            raise UsageError(f'{device} was asked for, this machine has {have}. Use device="cpu".')
        return torch.device("cuda", found.index if found.index is not None else torch.cuda.current_device())
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"{device} was asked for, this machine's torch cannot use it. Use cpu.") from None
    return found


def _tied_names(module: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """The parameters and saved buffers of a module, each with all the names under which it is registered."""
    saved = module.state_dict(keep_vars=True)
    groups: dict[int, tuple[tuple[str, ...], Tensor]] = {}
    for name, tensor in saved.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"the module saves {name}, a {type(tensor).__name__}; only tensors can be loaded"
            )
        names, _ = groups.get(id(tensor), ((), tensor))
        groups[id(tensor)] = ((*names, name), tensor)
    return list(groups.values())


def _dtype_of(tensor: Tensor, span: TensorSpan, dtype: torch.dtype | None) -> torch.dtype:
    castable = dtype is not None and span.dtype.is_floating_point and tensor.dtype.is_floating_point
    return dtype if castable and dtype is not None else span.dtype


def _mismatches(reading: Reading, groups: list[tuple[tuple[str, ...], Tensor]]) -> list[str]:
    """One line for every way in which file and module do not fit."""
    tensors, placements = reading.manifest.tensors, reading.placements
    lines = [f"{name}: unexpected, the model has no place for it" for name in reading.unexpected]
    known = {name for names, _ in groups for name in names}
    for ours in placements.keys() - known:
        lines.append(f"{placements[ours].source}: unexpected, the model has no {ours}")
    for names, tensor in groups:
        placed = [placements[name] for name in names if name in placements]
        if not placed:
            lines.append(f"{names[0]}: missing")
            continue
        span = tensors[placed[0].source]
        shape = placed[0].shape_of(span.shape)
        if shape != tuple(tensor.shape):
            wanted = f"{names[0]} needs {tuple(tensor.shape)}"
            lines.append(f"{span.name} has shape {span.shape}, which gives {shape}; {wanted}")
        if len({tensors[placement.source].address for placement in placed}) > 1:
            sources = " and ".join(placement.source for placement in placed)
            lines.append(
                f"{sources} are two tensors; the model ties {' and '.join(names)} (tied_head=False unties)"
            )
    return sorted(lines)


def _check(reading: Reading, groups: list[tuple[tuple[str, ...], Tensor]], hint: str) -> None:
    lines = _mismatches(reading, groups)
    if lines:
        more = [f"… and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        listed = "\n  ".join(lines[:MAX_LISTED] + more)
        raise CheckpointError(
            f"{reading.manifest.path}: does not fit the model in {len(lines)} place(s){hint}\n  {listed}"
        )


def make_plan(
    reading: Reading,
    build: Callable[[], nn.Module],
    device: str | torch.device,
    *,
    dtype: torch.dtype | None,
    ring_bytes: int,
    progress: Progress | None,
    hint: str = "",
) -> LoadPlan:
    """Match a checkpoint with the module that `build` makes; nothing but the skeleton on meta is allocated.

    Raises CheckpointError that lists every missing, unexpected and misshapen tensor at once, UsageError for a
    device that is not there or a dtype that holds no weights.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"dtype must be a floating-point torch.dtype or None, got {dtype}")
    resolved = resolve_device(device)
    skeleton = build_on_meta(build)
    groups = _tied_names(skeleton)
    _check(reading, groups, hint)
    make_target = partial(_target, reading, dtype=dtype)
    targets = tuple(make_target(names, tensor) for names, tensor in groups)
    report = progress or (lambda done, total: None)
    return LoadPlan(reading.manifest, build, skeleton, targets, resolved, ring_bytes, report)


def _target(reading: Reading, names: tuple[str, ...], tensor: Tensor, dtype: torch.dtype | None) -> Target:
    placement = next(reading.placements[name] for name in names if name in reading.placements)
    span = reading.manifest.tensors[placement.source]
    return Target(names, placement, span, tuple(tensor.shape), _dtype_of(tensor, span, dtype))
