"""Memory for a model that was built without any, and what of it a forecast counts.

On the host it is one piece, on huge pages where the system has them. Fresh memory costs more than reading
into it: the kernel clears it, and takes one fault for each page. Pages of 2 MiB instead of 4 KiB read a
gpt2-xl in 0.6 instead of 1.5 s (two cores, file cached); tensors allocated one by one have fewer of them that
are aligned.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gpt2lite.checkpoint.manifest import contiguous_stride
from gpt2lite.devices import caches_in_blocks
from gpt2lite.loading.forecast import MIB, Ledger, round_up
from gpt2lite.loading.plan import LoadPlan, Target
from gpt2lite.loading.skeleton import replace_tensor, storage_bytes, unsaved_buffers
from gpt2lite.quantization import scale_of

ALIGNMENT = 64


def allocate_pages(nbytes: int) -> torch.UntypedStorage:
    """Fresh host memory. Raises MemoryError where the system refuses it."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate memory: {nbytes} bytes ({error})") from None
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _allocate_together(targets: Sequence[Target]) -> Iterator[tuple[Target, Tensor]]:
    """Host memory for each target out of one piece, which lives until the last of them is gone.

    Each has a storage of its own, so that torch.save of one does not write all. The largest come first, those
    of one shape in their order: W_query, W_key and W_value of a block are neighbours.
    """
    room = {id(target): max(round_up(target.nbytes, ALIGNMENT), ALIGNMENT) for target in targets}
    storage, at = allocate_pages(sum(room.values())), 0
    for target in sorted(targets, key=lambda each: -each.nbytes):
        own = storage[at : at + target.nbytes]
        empty = torch.empty(0, dtype=target.dtype, device="cpu")
        yield target, empty.set_(own, 0, target.shape, contiguous_stride(target.shape))
        at += room[id(target)]


def _allocate_each(targets: Sequence[Target], device: torch.device) -> Iterator[tuple[Target, Tensor]]:
    """Memory on the device for each target, which CUDA's caching allocator fetches at once, to split it.

    Fetched tensor by tensor, each large one would be rounded up by as much as 1 MiB (135 MiB on gpt2-xl).
    """
    if caches_in_blocks(device):
        with suppress(torch.OutOfMemoryError):  # no such piece is free; tensor by tensor it may still fit
            torch.empty(_large_bytes(targets), dtype=torch.uint8, device=device)
    for target in targets:
        yield target, torch.empty(target.shape, dtype=target.dtype, device=device)


def _large_bytes(targets: Sequence[Target]) -> int:
    """Bytes of all tensors that torch's CUDA allocator does not keep in segments for small ones."""
    return sum(n for n in (round_up(target.nbytes, 512) for target in targets) if n > MIB)


def fill_skeleton(plan: LoadPlan) -> dict[str, Tensor]:
    """Give the plan's skeleton memory; returns every target's by its first name, and scales by theirs."""
    on_cpu = plan.device.type == "cpu"
    found = {}
    for target, memory in (
        _allocate_together(plan.targets) if on_cpu else _allocate_each(plan.targets, plan.device)
    ):
        replace_tensor(plan.skeleton, target.names, memory)
        found[target.names[0]] = memory
    for target in plan.targets:
        if target.is_quantized:
            memory = torch.empty(target.shape[0], dtype=torch.float32, device=plan.device)
            replace_tensor(plan.skeleton, map(scale_of, target.names), memory)
            found[scale_of(target.names[0])] = memory
    return found


def enter_one_segment(plan: LoadPlan, ledger: Ledger) -> None:
    """What `fill_skeleton` fetches for a moment."""
    if caches_in_blocks(plan.device):
        ledger.device.touch(_large_bytes(plan.targets))


def enter_allocated(plan: LoadPlan, ledger: Ledger) -> None:
    """The memory of all targets, then of their scales."""
    for nbytes in [target.nbytes for target in plan.targets] + [
        target.scale_bytes for target in plan.targets
    ]:
        ledger.device.take(nbytes)


def enter_unsaved_buffers(plan: LoadPlan, ledger: Ledger) -> None:
    """What `restore_unsaved_buffers` adds: it builds all buffers again, then moves those that it needs."""
    unsaved = unsaved_buffers(plan.skeleton)
    if not unsaved:
        return
    ledger.host.touch(storage_bytes(plan.skeleton.buffers()))
    if ledger.on_cpu:
        ledger.host.take(storage_bytes(unsaved))
    for buffer in unsaved if not ledger.on_cpu else ():
        ledger.device.take(buffer.nbytes)
