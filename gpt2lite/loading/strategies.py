"""The ways to load: the article's five recipes and `stream`, a row of `STRATEGIES` each.

A strategy takes a `LoadPlan` and returns the filled module; its `forecast` writes the same allocations, in
the same order, in a `Ledger`; `refuses` says why it cannot do what is planned. The five allocate where and
when the article's code does, so that comparing them is honest; its gaps are closed (buffers, ties).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.manifest import TensorSpan
from gpt2lite.checkpoint.reading import map_tensors, prefetch, read_tensors, sizes_read, stored_versions
from gpt2lite.checkpoint.source import ByteSource, in_memory
from gpt2lite.errors import CheckpointError, is_out_of_memory
from gpt2lite.loading import stream
from gpt2lite.loading.forecast import Ledger, Pool
from gpt2lite.loading.plan import LoadPlan, Target
from gpt2lite.loading.skeleton import (
    initialised,
    replace_tensor,
    saved_tensors,
    storage_bytes,
    unsaved_buffers,
)
from gpt2lite.loading.stream import forecast_allocated, forecast_unsaved_buffers
from gpt2lite.parallel import local_of

CPU = torch.device("cpu")
COPIED_BYTES = 1 << 20  # of a mapped tensor, read at a time


# ---- building the model with its initial values ------------------------------------------------------------


def _built_for_real(plan: LoadPlan) -> nn.Module:
    """`build().to(device)`: the whole model with its initial values, on the host first."""
    module = initialised(plan.build)
    tensors = saved_tensors(module)
    for target in plan.targets:
        tensor = tensors[target.names[0]]
        moved = tensor.data.to(plan.device, target.dtype)
        if torch._has_compatible_shallow_copy_type(tensor, moved):
            tensor.data = moved
            continue
        replace_tensor(module, target.names, moved)  # a device that torch knows from outside alone
        for name in target.names:
            del tensors[name]
        del tensor
    return module.to(plan.device)


def _forecast_built(plan: LoadPlan, ledger: Ledger) -> None:
    unsaved = unsaved_buffers(plan.skeleton)
    built = [target.numel * target.built.itemsize for target in plan.targets]
    ledger.host.take(sum(built) + storage_bytes(unsaved))
    for target, nbytes in zip(plan.targets, built, strict=True):
        is_cast = target.dtype != target.built
        if is_cast and not ledger.on_cpu:  # on the host, before it is copied over
            ledger.host.touch(target.nbytes)
        if is_cast or not ledger.on_cpu:
            ledger.device.take(target.nbytes)
            ledger.host.give(nbytes)
    if not ledger.on_cpu:
        for buffer in unsaved:
            ledger.device.take(buffer.nbytes)
        ledger.host.give(storage_bytes(unsaved))


# ---- allocating it without ---------------------------------------------------------------------------------


def _allocated(plan: LoadPlan) -> nn.Module:
    """The skeleton with memory on the device, one by one, tied ones once: `to_empty` without its holes."""
    for target in plan.targets:
        memory = torch.empty(target.shape, dtype=target.dtype, device=plan.device)
        replace_tensor(plan.skeleton, target.names, memory)
    return plan.skeleton


# ---- reading and copying -----------------------------------------------------------------------------------


@torch.no_grad()
def _copy_all(plan: LoadPlan, module: nn.Module, read: Callable[[str], Tensor]) -> nn.Module:
    """`parameter.copy_(value)` for each, as `load_state_dict` does."""
    tensors, done = saved_tensors(module), 0
    for target in plan.targets:
        value = target.placement.of(read(target.span.name).to(plan.device))
        local_of(tensors[target.names[0]]).copy_(value)
        del value
        done += target.nbytes
        plan.progress(done, plan.model_bytes)
    return module


def _copy_file(plan: LoadPlan, module: nn.Module, device: torch.device) -> nn.Module:
    """The whole file on a device, at once, and from there into the parameters."""
    return _copy_all(plan, module, read_tensors(plan.manifest, plan.spans, device).__getitem__)


def _forecast_file(plan: LoadPlan, ledger: Ledger, pool: Pool) -> None:
    blocks = _forecast_read(plan, ledger, plan.spans, pool)
    for target in plan.targets if pool is not ledger.device else ():
        ledger.device.touch(target.span.nbytes)
    for block in blocks:
        pool.give(block)


def _forecast_read(plan: LoadPlan, ledger: Ledger, names: Iterable[str], pool: Pool) -> list[int]:
    """What `read_tensors` allocates: on the host, and from there to the device, one after the other."""
    blocks = []
    for nbytes in sizes_read(plan.manifest, names):
        if pool is not ledger.host:
            ledger.host.touch(nbytes)
        blocks.append(pool.take(nbytes))
    return blocks


# ---- the strategies ----------------------------------------------------------------------------------------


def baseline(plan: LoadPlan) -> nn.Module:
    """Build, move, `load_state_dict(torch.load(path, map_location=device))`: what everybody writes.

    Device: the model and the whole file, at once. Host: the model with its initial values.
    """
    if plan.own_loading:
        return _loaded_by_itself(plan)
    return _copy_file(plan, _built_for_real(plan), plan.device)


def _loaded_by_itself(plan: LoadPlan) -> nn.Module:
    """`module.load_state_dict(state)` with all its hooks, versions included."""
    placements = plan.reading.placements.items()
    prefix = next((placement.source.removesuffix(name) for name, placement in placements), "")
    versions = stored_versions(plan.manifest, prefix)
    module = _built_for_real(plan)
    stored = read_tensors(plan.manifest, plan.spans, plan.device)
    state = OrderedDict((name, placement.of(stored[placement.source])) for name, placement in placements)
    state._metadata = versions  # type: ignore[attr-defined]
    try:
        module.load_state_dict(state)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = f"load_state_dict of {type(module).__name__} refuses it: {error}"
        raise CheckpointError(plan.manifest.path, said) from error
    plan.progress(plan.model_bytes, plan.model_bytes)
    return module


def _forecast_baseline(plan: LoadPlan, ledger: Ledger) -> None:
    _forecast_built(plan, ledger)
    _forecast_file(plan, ledger, ledger.device)


def sequential(plan: LoadPlan) -> nn.Module:
    """Build, move, load the file to the host, copy parameter by parameter.

    Device: the model and its largest tensor. Host: the model, then the whole file. Over ranks, which never
    build a whole model: this rank's part is allocated as `meta` does.
    """
    return _copy_file(plan, (_allocated if plan.is_divided else _built_for_real)(plan), CPU)


def _forecast_sequential(plan: LoadPlan, ledger: Ledger) -> None:
    (forecast_allocated if plan.is_divided else _forecast_built)(plan, ledger)
    _forecast_file(plan, ledger, ledger.host)
    if plan.is_divided:
        forecast_unsaved_buffers(plan, ledger)


def meta(plan: LoadPlan) -> nn.Module:
    """Build on meta, allocate on the device, load the file onto the device, copy.

    Device: the model and the whole file, at once, as in the article; `stream` needs the model once. Host: one
    tensor at a time, unless the host is the device.
    """
    return _copy_file(plan, _allocated(plan), plan.device)


def _forecast_meta(plan: LoadPlan, ledger: Ledger) -> None:
    forecast_allocated(plan, ledger)
    _forecast_file(plan, ledger, ledger.device)
    forecast_unsaved_buffers(plan, ledger)


@torch.no_grad()
def mmap(plan: LoadPlan) -> nn.Module:
    """Build on meta, map the file, assign: `load_state_dict(torch.load(path, mmap=True), assign=True)`.

    On CPU nothing is read before it is used, and all of it can be reclaimed. **While the model lives, do not
    overwrite the file in place** (`torch.save` to the same path does): that kills the process. Elsewhere
    each tensor is copied over once, a few rows at a time; device: the model, plus its largest tensor where
    that is cast or transposed.
    """
    mapped, done = map_tensors(plan.spans.values()), 0
    if plan.tuning.prefetch:
        prefetch(mapped.values(), plan.tuning.readers, plan.tuning.chunk_bytes)
    total = sum(span.nbytes for span in plan.spans.values())
    for name, targets in plan.filled.items():
        stored = mapped.pop(name)
        _assign(plan, stored if plan.device == CPU else _copied(stored, stored.dtype, plan.device), targets)
        done += plan.spans[name].nbytes
        plan.progress(done, total)
    return plan.skeleton


def _copied(mapped: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in fresh memory; of a mapped one a part is read at a time (`in_memory`), as it lies there."""
    found = torch.empty(mapped.shape, dtype=dtype, device=device)
    axis, rows, _ = _copied_at_once(mapped.shape, mapped.stride(), mapped.dtype)
    places, pieces = (torch.atleast_1d(tensor).split(rows, axis) for tensor in (found, mapped))
    for place, piece in zip(places, pieces, strict=True):
        place.copy_(in_memory(piece))
    return found


def _copied_at_once(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> tuple[int, int, int]:
    """How much of a mapped tensor is read at once: so many of its slowest axis, and their bytes."""
    sizes = list(shape) or [1]
    axis = max(range(len(shape)), key=lambda axis: (sizes[axis] > 1) * stride[axis], default=0)
    row_bytes = max(math.prod(sizes) // max(sizes[axis], 1) * dtype.itemsize, 1)
    rows = max(COPIED_BYTES // row_bytes, 1)
    return axis, rows, min(rows, sizes[axis]) * row_bytes


def _forecast_copied(span: TensorSpan) -> int:
    return _copied_at_once(span.shape, span.stride, span.dtype)[2]


def _assign(plan: LoadPlan, stored: Tensor, targets: Iterable[Target]) -> None:
    """Put one stored tensor in the place of parameters: views of it where they can be, else copies.

    A function of its own, so that no local keeps the tensor on the device when the next one comes.
    """
    for i, target in enumerate(targets):
        value = target.placement.of(stored)
        if not _is_view(plan, target, again=i > 0):
            value = _copied(value, target.dtype, plan.device)
        replace_tensor(plan.skeleton, target.names, value)


def _is_view(plan: LoadPlan, target: Target, *, again: bool) -> bool:
    """Whether a parameter can be a view of its stored tensor; not one that the file ties and we do not."""
    if target.dtype != target.span.dtype or (again and not target.placement.narrows):
        return False
    can_turn = plan.device == CPU and not plan.is_divided
    return can_turn or (target.placement.is_contiguous and target.span.is_contiguous)


def _forecast_mmap(plan: LoadPlan, ledger: Ledger) -> None:
    touched, reached = Counter[ByteSource](), Counter[ByteSource]()
    last = {span.source: name for name, span in plan.spans.items()}
    for name, targets in plan.filled.items():
        are_views = [_is_view(plan, t, again=i > 0) for i, t in enumerate(targets)]
        stored = _used(plan.spans[name], targets)
        source, end = stored.source, stored.offset + stored.extent
        fresh = max(end - max(stored.offset, reached[source]), 0)  # spans come in order, and may overlap
        reached[source] = max(end, reached[source])
        is_read = not ledger.on_cpu or not all(are_views) or plan.tuning.prefetch
        touched[source] += ledger.mapped.take(fresh if is_read else 0)
        block = 0 if ledger.on_cpu else ledger.device.take(plan.spans[name].nbytes)
        for target, is_view in zip(targets, are_views, strict=True):
            ledger.device.take(0 if is_view else target.nbytes)
            if ledger.on_cpu and not is_view:
                ledger.host.touch(_forecast_copied(target.span.part(target.placement.box(target.span.shape))))
        if not ledger.on_cpu:
            ledger.host.touch(_forecast_copied(plan.spans[name]))
        if not (any(are_views) or ledger.on_cpu):
            ledger.device.give(block)
        ledger.stays_mapped += fresh if ledger.on_cpu and any(are_views) else 0
        if last[source] == name and not plan.tuning.prefetch:  # with its last tensor the mapping goes
            ledger.mapped.give(touched[source])
    forecast_unsaved_buffers(plan, ledger)


def _used(span: TensorSpan, targets: Sequence[Target]) -> TensorSpan:
    """What its targets view of a stored tensor, from the first row to the last."""
    if any(not target.placement.narrows for target in targets):
        return span
    boxes = [target.placement.box(span.shape) for target in targets if target.numel]
    hull = [range(min(r.start for r in rows), max(r.stop for r in rows)) for rows in zip(*boxes, strict=True)]
    return span.part(hull if boxes else [range(0) for _ in span.shape])


def per_tensor(plan: LoadPlan) -> nn.Module:
    """Build on meta, allocate on the device, load and copy one file a tensor.

    Device: the model and its largest tensor. Host: the largest tensor. Needs a folder that
    `gpt2lite.save_per_tensor` wrote.
    """
    module = _allocated(plan)
    return _copy_all(plan, module, lambda name: read_tensors(plan.manifest, [name], CPU)[name])


def _forecast_per_tensor(plan: LoadPlan, ledger: Ledger) -> None:
    if not ledger.on_cpu:
        forecast_allocated(plan, ledger)
    for target in plan.targets:
        loaded = _forecast_read(plan, ledger, [target.span.name], ledger.host)
        if ledger.on_cpu:
            ledger.host.take(target.nbytes)
        else:
            ledger.device.touch(target.span.nbytes)
        for block in loaded:
            ledger.host.give(block)
    forecast_unsaved_buffers(plan, ledger)


# ---- the table ---------------------------------------------------------------------------------------------


def _needs(plan: LoadPlan) -> Iterator[tuple[str, str]]:
    """Each (ability that a plan needs of its strategy, sentence that says which strategies have it)."""
    if plan.own_loading:
        names = ", ".join(plan.own_loading[:5])
        yield "own loading", f'a module that loads itself ({names}) needs strategy="baseline" or "auto"'
    if plan.lost:
        what = f"a module that cannot be built on meta ({', '.join(plan.lost[:5])})"
        yield "building", f'{what} needs strategy="sequential", "baseline" or "auto"'
    if plan.is_divided:
        yield "ranks", 'a model over several ranks is never built whole; use strategy="stream" or "auto"'
    sources = {span.source for span in plan.spans.values()}
    if not all(source.is_local for source in sources):
        said = "a file that lies elsewhere is read by ranges, with"
        yield "elsewhere", f'{said} strategy="stream" or "auto"; download it for the others'
    elif not all(source.can_map for source in sources):
        yield "joined", 'the parts of a distributed checkpoint cannot be mapped; use strategy="stream"'
    if plan.away:
        yield "offload", 'offload goes with strategy="stream" or "auto"'
    if plan.is_quantized:
        yield "quantize", 'quantize goes with strategy="stream" or "auto"'
    if not plan.tuning.keep_cached:
        yield "keep_cached", 'keep_cached=False goes with strategy="stream" or "auto"'
    if plan.tuning.broadcast:
        yield "broadcast", 'broadcast=True goes with strategy="stream" or "auto"'
    if plan.tuning.prefetch:
        yield "prefetch", 'prefetch=True goes with strategy="mmap" or "auto"'
    if plan.manifest.format != "tensor_folder":
        made = "make one with gpt2lite.save_per_tensor(path, folder)"
        yield "files", f'per_tensor reads a folder with one file per tensor; {made}, or use "stream"'


def _beyond(*abilities: str) -> Callable[[LoadPlan], str]:
    """What says why a plan needs more than these abilities, "" where it does not."""
    return lambda plan: next((why for need, why in _needs(plan) if need not in abilities), "")


class Strategy(NamedTuple):
    """A way to load: what does it, what enters its cost, and why it cannot do a plan ("" where it can)."""

    load: Callable[[LoadPlan], nn.Module]
    forecast: Callable[[LoadPlan, Ledger], None]
    refuses: Callable[[LoadPlan], str]


STRATEGIES: dict[str, Strategy] = {
    "baseline": Strategy(baseline, _forecast_baseline, _beyond("files", "building", "own loading", "joined")),
    "sequential": Strategy(sequential, _forecast_sequential, _beyond("files", "building", "ranks", "joined")),
    "meta": Strategy(meta, _forecast_meta, _beyond("files", "ranks", "joined")),
    "mmap": Strategy(mmap, _forecast_mmap, _beyond("files", "prefetch", "ranks")),
    "per_tensor": Strategy(per_tensor, _forecast_per_tensor, _beyond("ranks")),
    "stream": Strategy(
        stream.load,
        stream.forecast,
        _beyond(
            *("files", "quantize", "keep_cached", "broadcast", "ranks", "joined", "elsewhere", "offload")
        ),
    ),
}
AUTO = ("stream", "mmap", "sequential", "baseline")  # the fastest first, and copying before mapping
