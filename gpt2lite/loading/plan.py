"""What a load has to do: which stored tensor fills which parameters, checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint import Manifest, TensorSpan
from gpt2lite.checkpoint.manifest import contiguous_stride
from gpt2lite.checkpoint.source import LocalFile
from gpt2lite.dialects import Adapter, Placement, Reading
from gpt2lite.errors import CheckpointError, UsageError, listed
from gpt2lite.loading.options import LoadOptions, Progress, check_values
from gpt2lite.loading.schedule import MIB, Schedule, Tuning, make_schedule
from gpt2lite.loading.skeleton import own_loading, saved_tensors, sketch, tied_names
from gpt2lite.quantization import quantize_skeleton

SMALLEST_RING = 2 * MIB
COMPUTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the module: all names that share it, where its values lie, what it will be.

    `built` is the dtype that the module's own constructor gives it.
    """

    names: tuple[str, ...]
    placement: Placement
    span: TensorSpan
    shape: tuple[int, ...]
    dtype: torch.dtype
    built: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on the device once loaded, without the scale."""
        return self.numel * self.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scale of rows that are quantised on the way: fp32, one for each."""
        return 4 * self.shape[0] if self.is_quantized else 0

    @property
    def is_quantized(self) -> bool:
        """Whether the load makes int8 of what is stored otherwise."""
        return self.dtype == torch.int8 and self.span.dtype.is_floating_point


@dataclass(frozen=True)
class LoadPlan:
    """Everything that a strategy needs. `skeleton` is the module on meta, for one strategy to fill.

    `lost` names what of the module exists only where it is built with its memory, `own_loading` what of it
    decides by itself what is loaded from `state`; the spans of its targets stand for its own tensors.
    """

    manifest: Manifest
    build: Callable[[], nn.Module]
    skeleton: nn.Module
    targets: tuple[Target, ...]
    device: torch.device
    tuning: Tuning
    progress: Progress
    adapters: tuple[Adapter, ...]
    lost: tuple[str, ...]
    own_loading: tuple[str, ...]
    state: Mapping[str, Placement]

    @cached_property
    def spans(self) -> dict[str, TensorSpan]:
        """The stored tensors that are needed, each once, in the order in which they lie on disk."""
        spans = {target.span.name: target.span for target in self.targets}
        if self.own_loading:
            spans = {p.source: self.manifest.tensors[p.source] for p in self.state.values()}
        return dict(sorted(spans.items(), key=lambda item: (str(item[1].source), item[1].offset)))

    @cached_property
    def model_bytes(self) -> int:
        """Bytes that the loaded module takes on its device."""
        return sum(target.nbytes + target.scale_bytes for target in self.targets)

    @cached_property
    def schedule(self) -> Schedule:
        """What `stream` reads, in which order: its forecast and its run use this one."""
        return make_schedule(self.spans, self.targets, self.device, self.tuning)

    @property
    def is_quantized(self) -> bool:
        """Whether some targets are quantised, which only `stream` can do."""
        return any(target.is_quantized for target in self.targets)


def _dtype_of(tensor: Tensor, span: TensorSpan, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not (span.dtype.is_floating_point and tensor.dtype.is_floating_point):
        return span.dtype
    return dtype


def _mismatches(reading: Reading, groups: list[tuple[tuple[str, ...], Tensor]]) -> list[str]:
    """One line for every way in which file and module do not fit."""
    tensors, placements = reading.manifest.tensors, reading.placements
    lines = [f"{name}: unexpected, not in the model" for name in reading.unexpected]
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
            gives = f", which gives {shape}" if shape != span.shape else ""
            lines.append(f"{span.name} has shape {span.shape}{gives}; {wanted}")
        if tensor.is_floating_point() and not span.dtype.is_floating_point:
            lines.append(f"{span.name} holds {span.dtype}, {names[0]} needs floating point")
        if len({tensors[placement.source].address for placement in placed}) > 1:
            sources = " and ".join(placement.source for placement in placed)
            lines.append(f"{sources} are two tensors; the model ties {' and '.join(names)}")
    for adapter in reading.adapters:
        placed = [adapter.a, adapter.b, placements[adapter.weight]]
        a, b, weight = (placement.shape_of(tensors[placement.source].shape) for placement in placed)
        sources = " and ".join(f"{p.source} {tensors[p.source].shape}" for p in placed[:2])
        if len(a) != 2 or (*b, *a) != (*weight[:1], *a[:1], *a[:1], *weight[1:]):
            lines.append(f"{sources} do not fit {adapter.weight}, which is {weight}")
        if any(adapter.weight in names and len(names) > 1 for names, _ in groups):
            lines.append(f"{sources} change {adapter.weight} alone, which the model ties to another")
    return sorted(lines)


def _check(reading: Reading, groups: list[tuple[tuple[str, ...], Tensor]], hint: Callable[[], str]) -> None:
    lines, unreadable = _mismatches(reading, groups), reading.manifest.unreadable.items()
    if lines:
        lines += [f"{name} {reason}" for name, reason in unreadable if name.startswith(reading.container)]
        raise CheckpointError(
            reading.manifest.path, f"does not fit the model in {len(lines)} place(s){hint()}{listed(lines)}"
        )


def make_plan(
    reading: Reading,
    build: Callable[[], nn.Module],
    device: torch.device,
    options: LoadOptions | None = None,
    *,
    hint: Callable[[], str] = str,
    quantizable: Callable[[str], bool] | None = None,
) -> LoadPlan:
    """Match a checkpoint with the module that `build` makes; nothing but the skeleton on meta is allocated.

    `device` need not be there to plan for it. Raises CheckpointError that lists every missing, unexpected and
    misshapen tensor at once, after what `hint()` says of the whole; UsageError for an option that cannot
    work. Linear layers and embeddings of whose names `quantizable` is true become int8 where that is asked
    for.
    """
    options = options or {}
    check_values(options)
    dtype, (skeleton, lost) = options.get("dtype"), sketch(build)
    groups = tied_names(saved_tensors(skeleton))
    own = own_loading(skeleton, reading.placements.keys())
    if own and (quantizable or reading.adapters or reading.unexpected):
        raise UsageError(
            f"{reading.manifest.path}: a module that changes its own loading ({', '.join(own[:5])}) takes no "
            "quantize, no LoRA layers and no other names"
        )
    if own:
        targets = tuple(_own_target(reading, names, tensor, dtype) for names, tensor in groups)
    else:
        _check(reading, groups, hint)
        first = {span.address: span for span in reversed(list(reading.manifest.tensors.values()))}
        targets = tuple(_target(reading, first, names, tensor, dtype) for names, tensor in groups)
    if quantizable is not None and options.get("quantize"):
        targets = _quantized(skeleton, targets, quantizable, reading)
    report = options.get("progress") or (lambda done, total: None)
    tuning = options.get("tuning") or Tuning()
    facts = (reading.adapters, lost, own, reading.placements)
    return LoadPlan(reading.manifest, build, skeleton, targets, device, tuning, report, *facts)


def _quantized(
    skeleton: nn.Module, targets: tuple[Target, ...], quantize: Callable[[str], bool], reading: Reading
) -> tuple[Target, ...]:
    if reading.adapters:
        raise UsageError(
            f"{reading.manifest.path}: LoRA layers are merged into weights that are not int8; save it merged "
            "first, then quantize: GPTModel.from_checkpoint(…).save_checkpoint(…)"
        )
    names = quantize_skeleton(skeleton, quantize)
    return tuple(
        replace(target, dtype=torch.int8) if names.issuperset(target.names) else target for target in targets
    )


def _target(
    reading: Reading,
    first: Mapping[tuple[object, ...], TensorSpan],
    names: tuple[str, ...],
    tensor: Tensor,
    dtype: torch.dtype | None,
) -> Target:
    """What fills one tensor; of names that share their bytes in the file, the `first` stands for all."""
    placement = next(reading.placements[name] for name in names if name in reading.placements)
    span = first[reading.manifest.tensors[placement.source].address]
    return Target(names, placement, span, tuple(tensor.shape), _dtype_of(tensor, span, dtype), tensor.dtype)


def _own_target(
    reading: Reading, names: tuple[str, ...], tensor: Tensor, dtype: torch.dtype | None
) -> Target:
    """One tensor of a module that loads itself: as it is built, or cast; it decides what fills it."""
    shape, source = tuple(tensor.shape), LocalFile(reading.manifest.path)
    span = TensorSpan(names[0], tensor.dtype, shape, contiguous_stride(shape), source, 0)
    return Target(names, Placement(names[0]), span, shape, _dtype_of(tensor, span, dtype), tensor.dtype)


def require_one_dtype(reading: Reading, dtype: torch.dtype | None, *, quantized: bool = False) -> None:
    """Raise where a GPTModel could not compute with the floating dtypes that it would be loaded in.

    CheckpointError for those of the file, of which matrices that become int8 may have any; UsageError for the
    `dtype` to which all are cast.
    """
    if getattr(dtype, "is_floating_point", False) and dtype not in COMPUTABLE:
        raise UsageError(f"GPTModel cannot compute in {dtype}; pass dtype=torch.float32 (--dtype float32)")
    spans = {name: reading.manifest.tensors[p.source] for name, p in reading.placements.items()}
    found = {span.dtype: name for name, span in spans.items() if span.dtype.is_floating_point}
    kept = {
        span.dtype
        for name, span in spans.items()
        if span.dtype in found and (not quantized or len(span.shape) < 2 or name == "pos_emb.weight")
    }
    if dtype is None and (not found.keys() <= COMPUTABLE or len(kept) > 1):
        listing = ", ".join(f"{stored} ({name} …)" for stored, name in found.items())
        raise CheckpointError(
            reading.manifest.path,
            f"holds {listing}; GPTModel computes in one of float64, float32, "
            "float16, bfloat16. Pass dtype=torch.float32 (--dtype float32 for commands)",
        )
