"""Byte ranges of an ordinary file → parameters, through a ring of small buffers.

Each reader has a part of the file and reads it in order. A chunk fills a slot of the ring, its pieces go on
to their parameters, cast and transposed on the way, on the device; a tensor may be larger than the ring. On a
CPU target, what needs no change is read straight into the parameters' own memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from heapq import nlargest
from itertools import groupby
from queue import SimpleQueue
from threading import Event, Thread
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.reading import memory_of
from gpt2lite.checkpoint.source import BUFFER_BYTES, ByteSource
from gpt2lite.devices import copies_async, current_stream, on_stream, synchronize
from gpt2lite.loading.forecast import Forecast, Ledger
from gpt2lite.loading.pages import enter_allocated, enter_one_segment, enter_unsaved_buffers, fill_skeleton
from gpt2lite.loading.plan import LoadPlan
from gpt2lite.loading.schedule import MAX_GAP, Chunk, Schedule, landings, memory_in_place, shares
from gpt2lite.quantization import WORKING_BYTES, quantize_into


class Lane:
    """The way onto a device with streams: buffers there, filled by turns on a stream of their own.

    So one is filled over the bus while another is scattered on the stream of whoever loads.
    """

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        self.buffers = torch.empty(count * nbytes, dtype=torch.uint8, device=device).split(nbytes)
        scattering = current_stream(device)
        assert scattering is not None, "a device with streams has a current one"
        self.copying, self.scattering = torch.Stream(device), scattering
        self.copying.wait_stream(self.scattering)  # that is where the buffers were made
        self.scattered: dict[int, torch.Event] = {}
        self.turn = 0

    def carry(self, flat: Tensor) -> tuple[Tensor, torch.Event]:
        """Start a copy of page-locked bytes; what the current stream is given next waits for its event."""
        self.turn = (self.turn + 1) % len(self.buffers)
        with on_stream(self.copying):
            if self.turn in self.scattered:
                self.copying.wait_event(self.scattered[self.turn])
            there = self.buffers[self.turn][: flat.numel()].copy_(flat, non_blocking=True)
            copied = self.copying.record_event()
        self.scattering.wait_event(copied)
        return there, copied

    def release(self) -> None:
        """The buffer that was filled last may be filled again once the current stream has come so far."""
        self.scattered[self.turn] = self.scattering.record_event()


class Slot(NamedTuple):
    """A buffer of the ring, free once its last copy to the device is done."""

    memory: Tensor
    copied: torch.Event | None = None


class Ring:
    """Equal host buffers in one allocation, page-locked and with a lane to the device where that has streams.

    Readers take slots and fill them, whoever loads delivers what they hold.
    """

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        slots, nbytes, lanes = schedule.slots, schedule.slot_bytes, schedule.lane_buffers
        self.lane = Lane(lanes, nbytes, device) if lanes else None
        self.free: SimpleQueue[Slot | None] = SimpleQueue()
        for memory in allocate_ring(slots * nbytes, pinned=bool(lanes)).split(nbytes) if slots else ():
            self.free.put(Slot(memory))

    def take(self) -> Tensor | None:
        """The next free slot, once its last copy is done; None when the ring is closed."""
        slot = self.free.get()
        if slot is None:
            return None
        if slot.copied is not None:
            slot.copied.synchronize()
        return slot.memory

    @torch.no_grad()
    def deliver(self, chunk: Chunk, memory: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copy a chunk that lies in a slot to its parameters, and free the slot for its next use."""
        flat, copied = memory[: chunk.nbytes], None
        if self.lane:
            flat, copied = self.lane.carry(flat)
        for piece in chunk.pieces:
            for rows, scale, values in landings(piece, flat[piece.span.offset - chunk.offset :], tensors):
                if scale is None:
                    rows.copy_(values)
                else:
                    quantize_into(rows, scale, values)
        if self.lane:
            self.lane.release()
        self.free.put(Slot(memory, copied))


def allocate_ring(nbytes: int, *, pinned: bool) -> Tensor:
    """Host memory for the ring, page-locked if asked and possible, else ordinary."""
    if pinned:
        with suppress(RuntimeError):  # a limit on locked memory: slower, still inside the cap
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _places(chunk: Chunk, between: memoryview, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Where the bytes of a chunk go that needs no buffer: parameters, and what lies `between` them."""
    at = chunk.offset
    for piece in chunk.pieces:
        yield between[: piece.span.offset - at]
        yield memory_in_place(piece, tensors)
        at = piece.span.offset + piece.span.extent


Read = tuple[Chunk, Tensor | None]  # a chunk that was read, and the slot where it lies; None: in its place


def _read(
    plan: LoadPlan,
    tensors: Mapping[str, Tensor],
    ring: Ring,
    todo: Iterator[list[Chunk]],
    past_cache: Mapping[ByteSource, bool],
    stop: Event,
) -> Iterator[Read]:
    """What one reader reads: shares of `todo`, each in order, so that the system can read ahead for it."""
    between = memoryview(bytearray(MAX_GAP))
    for share in todo:
        for source, chunks in groupby(share, lambda chunk: chunk.source):
            with source.reader(past_cache=past_cache[source]) as reader:
                for chunk in chunks:
                    slot = None if chunk.in_place else ring.take()
                    if stop.is_set():
                        return
                    whole = memory_of(slot)[: chunk.nbytes] if slot is not None else None
                    reader.read_into([whole] if whole else _places(chunk, between, tensors), chunk.offset)
                    if not plan.tuning.keep_cached:
                        reader.forget(chunk.offset, chunk.nbytes)
                    yield chunk, slot


def _read_all(plan: LoadPlan, tensors: Mapping[str, Tensor], ring: Ring) -> Generator[Read, None, None]:
    """Everything, each chunk as soon as it is there. Stops all readers when one fails, and raises its error.

    The system may grant fewer threads than wanted, which then read more each, or none: then this one reads.
    """
    done: SimpleQueue[Read | BaseException] = SimpleQueue()
    stop, started, todo = Event(), list[Thread](), iter(shares(plan.schedule.chunks, plan.schedule.readers))
    sources, keep_cached = {chunk.source for chunk in plan.schedule.chunks}, plan.tuning.keep_cached
    past_cache = {source: not keep_cached and source.is_best_past_cache() for source in sources}
    read = partial(_read, plan, tensors, ring, todo, past_cache, stop)

    def report() -> None:
        try:
            for each in read():
                done.put(each)
        except BaseException as error:
            stop.set()
            done.put(error)

    try:
        with suppress(RuntimeError):
            for number in range(plan.schedule.readers):
                thread = Thread(target=report, name=f"gpt2lite-reader-{number}")
                thread.start()
                started.append(thread)
        if not started:
            yield from read()
        for _ in plan.schedule.chunks if started else ():
            found = done.get()
            if isinstance(found, BaseException):
                try:
                    raise found
                finally:
                    del found  # or the error holds this frame, this frame the error, and both the parameters
            yield found
    finally:
        stop.set()
        for _ in started:
            ring.free.put(None)
        for thread in started:
            thread.join()
        while not done.empty():  # the errors of others, of which the same is true
            done.get()


def load(plan: LoadPlan) -> nn.Module:
    """Build on meta, allocate on the device, read byte ranges of the ordinary file through a small ring.

    Device: the model once, plus two chunks (16 MiB). Host: the ring (64 MiB), or less; on a CPU target the
    parameters' own memory, one piece on huge pages, is what is read into; it is given back when the last of
    them is gone, and none of them can be resized. What is quantised takes whole rows of the layer at a time:
    of a weight that lies in (in, out) order all of it, for which the ring may have to grow; so is read whole
    what no order of its dimensions makes contiguous. With `keep_cached=False`, 2 MiB a reader more, through
    which a cold file is read past the page cache. Raises CheckpointError where a file ends early; the error
    of a reader is raised as it is.
    """
    tensors, chunks = fill_skeleton(plan), plan.schedule.chunks
    done, total = 0, sum(chunk.nbytes for chunk in chunks)
    try:
        ring = Ring(plan.schedule, plan.device)
        with closing(_read_all(plan, tensors, ring)) as reads:
            for chunk, slot in reads:
                if slot is not None:
                    ring.deliver(chunk, slot, tensors)
                done += chunk.nbytes
                plan.progress(done, total)
    finally:
        synchronize(plan.device)
        if not plan.tuning.keep_cached:  # again: pages that two reads share, and what the system read ahead
            for source in {chunk.source for chunk in chunks}:
                with suppress(OSError):
                    source.forget()
    return plan.skeleton


def forecast(plan: LoadPlan) -> Forecast:
    """What `load` takes, by the schedule that it will follow."""
    ledger, schedule = Ledger(plan.device), plan.schedule
    enter_one_segment(plan, ledger)
    enter_allocated(plan, ledger)
    working = WORKING_BYTES if plan.is_quantized else 0
    buffers = 0 if plan.tuning.keep_cached else schedule.readers * BUFFER_BYTES
    if copies_async(plan.device):
        ledger.device.touch(schedule.lane_buffers * schedule.slot_bytes + working)
        ring = schedule.slots * schedule.slot_bytes  # page-locked memory comes as a power of two, and stays
        ledger.host.take(1 << (ring - 1).bit_length() if ring else 0)
        ledger.host.touch(buffers)
    else:  # a slot is written to as far as the largest of its chunks
        staged = (chunk.nbytes for chunk in schedule.chunks if not chunk.in_place)
        ledger.host.touch(sum(nlargest(schedule.slots, staged)) + working + buffers)
    enter_unsaved_buffers(plan, ledger)
    return ledger.balance()
