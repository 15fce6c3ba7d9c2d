"""Byte ranges of an ordinary file → parameters, through a ring of small buffers.

Each reader has a part of the file and reads it in order. A chunk fills a slot of the ring, its pieces go on
to their parameters, cast and transposed on the way, on the device; a tensor may be larger than the ring. On a
CPU target, what needs no change is read straight into the parameters' own memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from heapq import nlargest
from itertools import groupby
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.manifest import contiguous_stride
from gpt2lite.checkpoint.source import BUFFER_BYTES, ByteSource, memory_of
from gpt2lite.devices import caches_in_blocks, copies_async, pinned_bytes, synchronize, wait_for
from gpt2lite.loading.forecast import Ledger, round_up
from gpt2lite.loading.options import Progress
from gpt2lite.loading.plan import LoadPlan, Target
from gpt2lite.loading.schedule import MAX_GAP, Chunk, Schedule, Tuning, landings, places, shares
from gpt2lite.loading.skeleton import replace_tensor, storage_bytes, unsaved_buffers
from gpt2lite.memory import MIB
from gpt2lite.quantization import WORKING_BYTES, quantize_into, scale_of

ALIGNMENT = 64

# ---- the model's memory ------------------------------------------------------------------------------------


def allocate_pages(nbytes: int) -> torch.UntypedStorage:
    """Fresh host memory, on huge pages where the system has them. Raises MemoryError where it refuses.

    Fresh memory costs more than reading into it: the kernel clears it, and takes one fault for each page.
    Pages of 2 MiB instead of 4 KiB read a gpt2-xl in 0.6 instead of 1.5 s (two cores, file cached); tensors
    allocated one by one have fewer of them that are aligned.
    """
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
    storage, at = allocate_pages(sum(map(_room, targets))), 0
    for target in sorted(targets, key=lambda each: -each.nbytes):
        own = storage[at : at + target.nbytes]
        empty = torch.empty(0, dtype=target.dtype, device="cpu")
        yield target, empty.set_(own, 0, target.shape, contiguous_stride(target.shape))
        at += _room(target)


def _room(target: Target) -> int:
    return max(round_up(target.nbytes, ALIGNMENT), ALIGNMENT)  # an empty one has an address of its own, too


def _large_bytes(plan: LoadPlan) -> int:
    """Bytes of all tensors that torch's CUDA allocator does not keep in segments for small ones."""
    return sum(n for n in (round_up(target.nbytes, 512) for target in plan.targets) if n > MIB)


def allocate(plan: LoadPlan) -> dict[str, Tensor]:
    """Give the skeleton memory, one piece on the host; returns tensors and scales by their first names.

    CUDA's caching allocator fetches it at once, to split it: fetched tensor by tensor, each large one would
    be rounded up by as much as 1 MiB (135 MiB on gpt2-xl).
    """
    if caches_in_blocks(plan.device):
        with suppress(torch.OutOfMemoryError):  # no such piece is free; tensor by tensor it may still fit
            torch.empty(_large_bytes(plan), dtype=torch.uint8, device=plan.device)
    alone = ((t, torch.empty(t.shape, dtype=t.dtype, device=plan.device)) for t in plan.targets)
    found = {}
    for target, memory in _allocate_together(plan.targets) if plan.device.type == "cpu" else alone:
        found[target.names[0]] = memory
        replace_tensor(plan.skeleton, target.names, memory)
    for target in plan.targets:
        if target.is_quantized:
            names = [scale_of(name) for name in target.names]
            found[names[0]] = torch.empty(target.shape[0], dtype=torch.float32, device=plan.device)
            replace_tensor(plan.skeleton, names, found[names[0]])
    return found


def forecast_allocated(plan: LoadPlan, ledger: Ledger) -> None:
    """The memory of all targets, then of their scales."""
    for nbytes in (*(t.nbytes for t in plan.targets), *(t.scale_bytes for t in plan.targets)):
        ledger.device.take(nbytes)


def forecast_unsaved_buffers(plan: LoadPlan, ledger: Ledger) -> None:
    """What `restore_unsaved_buffers` adds: it builds all buffers again, then moves those that it needs."""
    unsaved = unsaved_buffers(plan.skeleton)
    if not unsaved:
        return
    ledger.host.touch(storage_bytes(plan.skeleton.buffers()))
    if ledger.on_cpu:
        ledger.host.take(storage_bytes(unsaved))
    for buffer in unsaved if not ledger.on_cpu else ():
        ledger.device.take(buffer.nbytes)


# ---- the way into it ---------------------------------------------------------------------------------------


class Lane:
    """The way onto a device with streams: buffers there, filled in turn on their own stream.

    So one is filled over the bus while another is scattered on the loading thread's stream.
    """

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        self.buffers = torch.empty(count * nbytes, dtype=torch.uint8, device=device).split(nbytes)
        self.copying, self.scattering = torch.Stream(device), torch.accelerator.current_stream(device)
        self.copying.wait_stream(self.scattering)  # that is where the buffers were made
        self.scattered: dict[int, torch.Event] = {}
        self.turn = 0

    def carry(self, flat: Tensor) -> tuple[Tensor, torch.Event]:
        """Start a copy of page-locked bytes; later work on the current stream waits for it."""
        self.turn = (self.turn + 1) % len(self.buffers)
        with self.copying:
            if self.turn in self.scattered:
                self.copying.wait_event(self.scattered[self.turn])
            there = self.buffers[self.turn][: flat.numel()].copy_(flat, non_blocking=True)
            copied = self.copying.record_event()
        self.scattering.wait_event(copied)
        return there, copied

    def release(self) -> None:
        """Let the last buffer be refilled once the current stream has reached this point."""
        self.scattered[self.turn] = self.scattering.record_event()


# A buffer of the ring, None before it is first taken, and when its last copy to the device is done.
Slot = tuple[Tensor | None, torch.Event | None]


class Ring:
    """Equal host buffers, page-locked and with a lane to the device where that has streams.

    Readers take and fill slots; the loading thread delivers their contents to the parameters, `tensors`. Each
    slot is allocated by the reader that first takes it: page-locking takes longer than reading, and goes on
    while the first slots are on their way.
    """

    def __init__(self, schedule: Schedule, device: torch.device, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.closed, self.reading = tensors, Event(), set[Any]()
        self.nbytes, lanes = schedule.slot_bytes, schedule.lane_buffers
        self.lane = Lane(lanes, self.nbytes, device) if lanes else None
        self.free: SimpleQueue[Slot | None] = SimpleQueue()
        for _ in range(schedule.slots):
            self.free.put((None, None))

    def take(self) -> Tensor | None:
        """The next free slot, once its last copy is done; None when the ring is closed."""
        if (slot := self.free.get()) is None:
            return None
        memory, copied = slot
        if copied is not None:
            wait_for(copied)
        return allocate_slot(self.nbytes, pinned=self.lane is not None) if memory is None else memory

    @torch.no_grad()
    def deliver(self, chunk: Chunk, memory: Tensor) -> None:
        """Copy a chunk that lies in a slot to its parameters, and free the slot for its next use."""
        flat, copied = memory[: chunk.nbytes], None
        if self.lane:
            flat, copied = self.lane.carry(flat)
        for piece in chunk.pieces:
            begin = piece.span.offset - chunk.offset
            for rows, scale, values in landings(piece, flat[begin:], self.tensors):
                if scale is None:
                    rows.copy_(values)
                else:
                    quantize_into(rows, scale, values)
        if self.lane:
            self.lane.release()
        self.free.put((memory, copied))

    def close(self, readers: int) -> None:
        """Stop the readers, and wake those that wait for a slot."""
        self.closed.set()
        for reader in tuple(self.reading):
            reader.stop()
        for _ in range(readers):
            self.free.put(None)


def allocate_slot(nbytes: int, *, pinned: bool) -> Tensor:
    """Host memory for a slot, page-locked if asked and possible, else ordinary."""
    if pinned:
        with suppress(RuntimeError):  # a limit on locked memory: slower, still inside the cap
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


Read = tuple[Chunk, Tensor | None]  # a chunk that was read, and its slot; None: read straight into place


def _read(
    tuning: Tuning, ring: Ring, todo: Iterator[list[Chunk]], past_cache: Mapping[ByteSource, bool]
) -> Iterator[Read]:
    """What one reader reads: shares of `todo`, each in order, so that the system can read ahead for it."""
    between = memoryview(bytearray(MAX_GAP))
    for share in todo:
        for source, run in groupby(share, lambda chunk: chunk.source):
            chunks = list(run)
            ahead = [(chunk.offset, chunk.end) for chunk in chunks]
            with source.reader(past_cache=past_cache[source], ahead=ahead) as reader:
                ring.reading.add(reader)
                for chunk in chunks:
                    slot = None if chunk.in_place else ring.take()
                    if ring.closed.is_set():
                        return
                    staged = [] if slot is None else [memory_of(slot)[: chunk.nbytes]]
                    for offset, memories in chunk.reads(staged or places(chunk, between, ring.tensors)):
                        reader.read_into(memories, offset)
                    if not tuning.keep_cached:
                        reader.forget(chunk.offset, chunk.nbytes)
                    yield chunk, slot
                ring.reading.discard(reader)


def _read_all(schedule: Schedule, tuning: Tuning, ring: Ring) -> Generator[Read, None, None]:
    """Every chunk, as soon as it has been read. Stops all readers when one fails, and raises its error.

    If the system grants fewer threads than wanted, each reads more; if it grants none, the caller reads.
    """
    chunks, readers = schedule.chunks, schedule.readers
    sources = {chunk.source for chunk in chunks}
    past_cache = {source: not tuning.keep_cached and source.is_best_past_cache() for source in sources}
    read = partial(_read, tuning, ring, iter(shares(chunks, readers)), past_cache)
    started, done = list[Thread](), SimpleQueue[Read | BaseException]()

    def report() -> None:
        try:
            for each in read():
                done.put(each)
        except BaseException as error:
            ring.closed.set()
            done.put(error)

    try:
        with suppress(RuntimeError):
            for number in range(readers):
                # a daemon: one that a disk keeps waiting must not keep a process that was told twice to end
                thread = Thread(target=report, name=f"gpt2lite-reader-{number}", daemon=True)
                started.append(thread)  # first, or Ctrl-C between the two would lose it
                thread.start()
        has_readers = any(thread.ident for thread in started)
        if not has_readers:
            yield from read()
        for _ in chunks if has_readers else ():
            found = done.get()
            if isinstance(found, BaseException):
                try:
                    raise found
                finally:
                    del found  # break the cycle of error and frame, which keeps the parameters alive
            yield found
    finally:
        ring.close(readers)
        for thread in started:
            if thread.ident:
                thread.join()
        while not done.empty():  # drop other readers' errors for the same reason
            done.get()


def load(plan: LoadPlan) -> nn.Module:
    """Build on meta, allocate on the device, read byte ranges of the ordinary file through a small ring.

    Device: the model once, plus two chunks (16 MiB). Host: the ring (64 MiB), or less; on a CPU target the
    parameters' own memory, one piece on huge pages, is what is read into; it is given back when the last of
    them is gone, and none of them can be resized. Quantising reads whole rows of a layer, which in
    (in, out) order means the whole weight, and the ring may have to grow; a tensor that is contiguous in no
    order of its axes is also read whole. With `keep_cached=False`, 2 MiB a reader more, through
    which a cold file is read past the page cache. Raises CheckpointError where a file ends early; the error
    of a reader is raised as it is.
    """
    fill(plan.schedule, plan.tuning, plan.device, allocate(plan), plan.progress)
    return plan.skeleton


def fill(
    schedule: Schedule,
    tuning: Tuning,
    device: torch.device,
    tensors: Mapping[str, Tensor],
    progress: Progress = lambda done, total: None,
) -> None:
    """Read what is scheduled into tensors on a device, by the names of its targets; then it is there."""
    done, total = 0, sum(chunk.nbytes for chunk in schedule.chunks)
    try:
        ring = Ring(schedule, device, tensors)
        with closing(_read_all(schedule, tuning, ring)) as reads:
            for chunk, slot in reads:
                if slot is not None:
                    ring.deliver(chunk, slot)
                done += chunk.nbytes
                progress(done, total)
    finally:
        synchronize(device)
        if not tuning.keep_cached:  # again: pages that two reads share, and what the system read ahead
            for source in {chunk.source for chunk in schedule.chunks}:
                with suppress(OSError):
                    source.forget()


def forecast(plan: LoadPlan, ledger: Ledger) -> None:
    """What `load` takes, by the schedule that it will follow."""
    schedule = plan.schedule
    if caches_in_blocks(plan.device):  # fetched for a moment
        ledger.device.touch(_large_bytes(plan))
    forecast_allocated(plan, ledger)
    working = WORKING_BYTES if plan.is_quantized else 0
    buffers = 0 if plan.tuning.keep_cached else schedule.readers * BUFFER_BYTES
    if copies_async(plan.device):
        ledger.device.touch(schedule.lane_buffers * schedule.slot_bytes + working)
        ledger.host.take(schedule.slots * pinned_bytes(schedule.slot_bytes))
        ledger.host.touch(buffers)
    else:  # a slot is written to as far as the largest of its chunks
        staged = (chunk.nbytes for chunk in schedule.chunks if not chunk.in_place)
        ledger.host.touch(sum(nlargest(schedule.slots, staged)) + working + buffers)
    forecast_unsaved_buffers(plan, ledger)
