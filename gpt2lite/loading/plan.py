"""What a load has to do: which stored tensor fills which parameters, checked before anything is allocated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint import Manifest, TensorSpan
from gpt2lite.checkpoint.manifest import Shaped, contiguous_stride
from gpt2lite.dialects.reading import Placement, Reading
from gpt2lite.errors import CheckpointError, UsageError, listed
from gpt2lite.loading.options import LoadOptions, Progress, check_values
from gpt2lite.loading.schedule import Schedule, Tuning, make_schedule
from gpt2lite.loading.skeleton import own_loading, saved_tensors, sketch, tied_names
from gpt2lite.memory import MIB
from gpt2lite.parallel import DDP, divide, is_divided, is_first, local_of, views_of
from gpt2lite.quantization import quantize_skeleton

SMALLEST_RING = 2 * MIB
REMOTE_READERS = 8  # connections at once: what each can carry, and how long it waits, is the network's
COMPUTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True, slots=True)
class Target(Shaped):
    """One tensor of the module: all names that share it, where its values lie, what it will be.

    `built` is the dtype that the module's own constructor gives it. `nbytes` are those on the device once it
    is loaded, without the scale.
    """

    names: tuple[str, ...]
    placement: Placement
    span: TensorSpan
    shape: tuple[int, ...]
    dtype: torch.dtype
    built: torch.dtype

    @property
    def scale_bytes(self) -> int:
        """Bytes of the fp32 scales, one per row, if the load quantises; else 0."""
        return 4 * self.shape[0] if self.is_quantized else 0

    @property
    def is_quantized(self) -> bool:
        """Whether the load turns stored floats into int8."""
        return self.dtype == torch.int8 != self.built


@dataclass(frozen=True)
class LoadPlan:
    """Everything that a strategy needs. `skeleton` is the module on meta, for one strategy to fill.

    `lost` names what only a build with real memory gives, `own_loading` the hooks by which the module loads
    itself; then a target's span describes the module's tensor, not a place in the file. `is_repeated`: other
    processes load the same; `receives`: the first of them sends it to this one. What `away` fills is
    no part of the load, and stays where `offload` says.
    """

    reading: Reading
    build: Callable[[], nn.Module]
    skeleton: nn.Module
    targets: tuple[Target, ...]
    device: torch.device
    tuning: Tuning
    progress: Progress
    lost: tuple[str, ...]
    own_loading: tuple[str, ...]
    is_repeated: bool = False
    receives: bool = False
    away: tuple[Target, ...] = ()
    offload: str = ""

    @property
    def manifest(self) -> Manifest:
        """What lies where in the checkpoint."""
        return self.reading.manifest

    @cached_property
    def spans(self) -> dict[str, TensorSpan]:
        """The stored tensors that are needed, each once, in the order in which they lie on disk."""
        spans = {target.span.name: target.span for target in self.targets}
        if self.own_loading:
            spans = {p.source: self.manifest.tensors[p.source] for p in self.reading.placements.values()}
        return dict(sorted(spans.items(), key=lambda item: (str(item[1].source), item[1].offset)))

    @cached_property
    def filled(self) -> dict[str, tuple[Target, ...]]:
        """What each stored tensor fills, in the order in which they lie on disk."""
        filled = defaultdict[str, list[Target]](list)
        for target in self.targets:
            filled[target.span.name].append(target)
        return {name: tuple(filled[name]) for name in self.spans}

    @cached_property
    def model_bytes(self) -> int:
        """Bytes that the loaded module takes on its device."""
        return sum(target.nbytes + target.scale_bytes for target in self.targets)

    @cached_property
    def schedule(self) -> Schedule:
        """What `stream` reads, in which order: its forecast and its run use this one."""
        stored = ((span, self.filled[name]) for name, span in self.spans.items() if not self.receives)
        return make_schedule(stored, self.device, self.tuning)

    @cached_property
    def is_divided(self) -> bool:
        """Whether other ranks have other parts of the module."""
        return any(map(is_divided, self.skeleton.parameters()))

    @property
    def identity(self) -> tuple[object, ...]:
        """What is loaded, and as what: equal on ranks that load one model, each its part or all of it."""
        stored = [(t.names, t.dtype, t.span.name, t.span.shape, t.span.checksum) for t in self.targets]
        return self.manifest.path.name, stored, self.tuning.broadcast

    @property
    def is_quantized(self) -> bool:
        """Whether some targets are quantised, which only `stream` can do."""
        return any(target.is_quantized for target in self.targets)


Groups = list[tuple[tuple[str, ...], Tensor]]  # (every name of a tied tensor, that tensor)


def _mismatches(reading: Reading, groups: Groups) -> Iterator[str]:
    """One line for every way in which file and module do not fit."""
    tensors, placements = reading.manifest.tensors, reading.placements
    yield from (f"{name}: unexpected, not in the model" for name in reading.unexpected)
    for ours in placements.keys() - {name for names, _ in groups for name in names}:
        yield f"{placements[ours].source}: unexpected, the model has no {ours}"
    for names, tensor in groups:
        placed = [placements[name] for name in names if name in placements]
        if not placed:
            yield f"{names[0]}: missing"
            continue
        span, wanted = tensors[placed[0].source], tuple(tensor.shape)
        shape = placed[0].shape_of(span.shape)
        if shape != wanted:
            gives = f", which gives {shape}" if shape != span.shape else ""
            yield f"{span.name} has shape {span.shape}{gives}; {names[0]} needs {wanted}"
        if tensor.is_floating_point() and not span.dtype.is_floating_point:
            yield f"{span.name} holds {span.dtype}, {names[0]} needs floating point"
        if len({tensors[placement.source].address for placement in placed}) > 1:
            sources = " and ".join(placement.source for placement in placed)
            yield f"{sources} are two tensors; the model ties {' and '.join(names)}"
    tied = {name for names, _ in groups if len(names) > 1 for name in names}
    for adapter in reading.adapters:
        stored = [placements[adapter.weight], adapter.a, adapter.b]
        weight, a, b = (placement.shape_of(tensors[placement.source].shape) for placement in stored)
        sources = " and ".join(f"{p.source} {tensors[p.source].shape}" for p in stored[1:])
        if len(a) != 2 or (*b, *a) != (*weight[:1], *a[:1], *a[:1], *weight[1:]):
            yield f"{sources} do not fit {adapter.weight}, which is {weight}"
        if adapter.weight in tied:
            yield f"{sources} change only {adapter.weight}, which the model ties to another"


def _check(reading: Reading, groups: Groups, hint: Callable[[], str]) -> None:
    lines = sorted(_mismatches(reading, groups))
    if lines:
        found = f"does not fit the model in {len(lines)} place(s){hint()}"
        unreadable = reading.manifest.unreadable.items()
        lines += [f"{name} {reason}" for name, reason in unreadable if name.startswith(reading.container)]
        raise CheckpointError(reading.manifest.path, f"{found}{listed(lines)}")


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

    An absent device can be planned for. Raises CheckpointError that lists every missing, unexpected and
    misshapen tensor at once, preceded by `hint()`; UsageError for an option that cannot
    work. Linear layers and embeddings for whose names `quantizable` is true become int8 where `options` ask
    for it.
    """
    options = options or {}
    check_values(options)
    path, (skeleton, lost) = reading.manifest.path, sketch(build)
    groups = tied_names(saved_tensors(skeleton))
    own = own_loading(skeleton, reading.placements.keys())
    if not own:
        _check(reading, groups, hint)
    elif quantizable or reading.adapters or reading.unexpected:
        said = f"{path}: a module that loads itself ({', '.join(own[:5])})"
        raise UsageError(f"{said} takes no quantize, LoRA layers or unknown names")
    if odd := [name for name, value in skeleton.state_dict().items() if not isinstance(value, Tensor)]:
        do = "use torch.load and load_state_dict, or make it a tensor"
        said = f"{path}: {', '.join(odd)} of the module is no tensor"
        raise UsageError(f"{said}, and only those are read; {do}")
    targets = tuple(_targets(reading, groups, options.get("dtype"), bool(own)))
    if quantizable is not None and options.get("quantize"):
        if reading.adapters:
            said = f"{path}: LoRA layers do not merge into int8 weights"
            raise UsageError(f"{said}; save the merged model first")
        int8 = quantize_skeleton(skeleton, quantizable)
        targets = tuple(replace(t, dtype=torch.int8) if int8.issuperset(t.names) else t for t in targets)
    if (mesh := options.get("mesh")) is not None:
        (options.get("parallelize") or divide)(skeleton, mesh)
        divided = any(map(is_divided, skeleton.parameters()))
        if divided and (reading.adapters or own or lost or options.get("quantize")):
            said = "LoRA layers, int8 weights and modules that load themselves or cannot be built on meta"
            raise UsageError(f"{path}: {said} are not divided over ranks; load it without mesh")
        tensors = saved_tensors(skeleton)
        targets = tuple(_own_part(target, tensors[target.names[0]]) for target in targets)
    report = options.get("progress") or (lambda done, total: None)
    is_local = all(source.is_local for source in reading.manifest.files)
    tuning = options.get("tuning") or (Tuning() if is_local else Tuning(readers=REMOTE_READERS))
    is_repeated = mesh is not None and mesh.mesh_dim_names == (DDP,)
    if tuning.broadcast and not is_repeated:
        raise UsageError(
            'Tuning(broadcast=True) needs a mesh with mesh_dim_names=("ddp",), whose ranks load the same'
        )
    rest = lost, own, is_repeated, tuning.broadcast and not is_first(mesh)
    return LoadPlan(reading, build, skeleton, targets, device, tuning, report, *rest)


def _targets(reading: Reading, groups: Groups, dtype: torch.dtype | None, own: bool) -> Iterator[Target]:
    """What fills each tensor; if the module loads itself (`own`), the tensor as built."""
    # Of names that share their bytes in the file, the first stands for all.
    first = {span.address: span for span in reversed(list(reading.manifest.tensors.values()))}
    for names, tensor in groups:
        shape = tuple(tensor.shape)
        if own:
            source, placement = next(iter(reading.manifest.files)), Placement(names[0])
            span = TensorSpan(names[0], tensor.dtype, shape, contiguous_stride(shape), source, 0)
        else:
            placement = next(reading.placements[name] for name in names if name in reading.placements)
            span = first[reading.manifest.tensors[placement.source].address]
        is_float = span.dtype.is_floating_point and tensor.is_floating_point()
        cast = (dtype or span.dtype) if is_float else tensor.dtype  # as `load_state_dict` casts what counts
        yield Target(names, placement, span, shape, cast, tensor.dtype)


def _own_part(target: Target, tensor: Tensor) -> Target:
    placement = replace(target.placement, views=(*target.placement.views, *views_of(tensor)))
    return replace(target, placement=placement, shape=tuple(local_of(tensor).shape))


def require_one_dtype(reading: Reading, dtype: torch.dtype | None, *, quantized: bool = False) -> None:
    """Raise where a GPTModel could not compute with the floating dtypes that it would be loaded in.

    CheckpointError for dtypes in the file (matrices that become int8 may have any), UsageError for `dtype`.
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
        said = f"holds {listing}; GPTModel computes in one of float64, float32, float16, bfloat16"
        help = "Pass dtype=torch.float32 (--dtype float32 for commands)"
        raise CheckpointError(reading.manifest.path, f"{said}. {help}")
