"""Byte ranges of an ordinary file → parameters, through a ring of small buffers.

Each reader has a part of the file and reads it in order. A chunk fills a slot of the ring, its pieces go on
to their parameters, cast and transposed on the way, on the device; a tensor may be larger than the ring. On a
CPU target, what needs no change is read straight into the parameters' own memory.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import groupby
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2lite.checkpoint.page_cache import PastCache, drop_cached, forget_cached, is_best_past_cache
from gpt2lite.checkpoint.reading import memory_of, read_file_into
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.loading.options import Progress
from gpt2lite.loading.pieces import (
    MAX_GAP,
    Chunk,
    Source,
    cut,
    is_direct,
    joined,
    landings,
    shares,
    values_of,
)
from gpt2lite.loading.tuning import Tuning
from gpt2lite.quantization import quantize_into

FEWEST_SLOTS = 8
LANE_BUFFERS = 2  # on a CUDA device, each as large as a slot
MAX_ITEM_BYTES = 16  # complex128; slots begin at multiples of it, so that bytes can be viewed as any dtype


class Lane:
    """The way onto a CUDA device: buffers there, filled by turns on a stream of their own.

    So one is filled over the bus while another is scattered on the stream of whoever loads.
    """

    def __init__(self, count: int, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.buffers = torch.empty(count * nbytes, dtype=torch.uint8, device=device).split(nbytes)
        self.copying = torch.cuda.Stream(device)
        self.copying.wait_stream(torch.cuda.current_stream(device))  # that is where the buffers were made
        self.scattered: dict[int, torch.cuda.Event] = {}
        self.turn = 0

    def carry(self, flat: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Start a copy of page-locked bytes; what the current stream is given next waits for its event."""
        self.turn = (self.turn + 1) % len(self.buffers)
        with torch.cuda.stream(self.copying):
            if self.turn in self.scattered:
                self.copying.wait_event(self.scattered[self.turn])
            there = self.buffers[self.turn][: flat.numel()].copy_(flat, non_blocking=True)
            copied = self.copying.record_event()
        torch.cuda.current_stream(self.device).wait_event(copied)
        return there, copied

    def release(self) -> None:
        """The buffer that was filled last may be filled again once the current stream has come so far."""
        self.scattered[self.turn] = torch.cuda.current_stream(self.device).record_event()


class Slot(NamedTuple):
    """A buffer of the ring, free once its last copy to the device is done."""

    memory: Tensor
    copied: torch.cuda.Event | None = None


class Ring:
    """Equal host buffers in one allocation, page-locked and with a lane to the device where that is CUDA.

    Readers take slots and fill them, whoever loads delivers what they hold. Costs `count × slot_bytes` on the
    host and, for a CUDA device, two of them there (or `count`, if less).
    """

    def __init__(self, count: int, slot_bytes: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda" and count > 0
        self.lane = Lane(min(count, LANE_BUFFERS), slot_bytes, device) if on_cuda else None
        self.free: SimpleQueue[Slot | None] = SimpleQueue()
        memory = allocate_ring(count * slot_bytes, pinned=on_cuda)
        for at in range(count):
            self.free.put(Slot(memory[at * slot_bytes :][:slot_bytes]))

    def take(self) -> Tensor | None:
        """The next free slot, once its last copy is done; None when the ring is closed."""
        slot = self.free.get()
        if slot is None:
            return None
        if slot.copied is not None:
            slot.copied.synchronize()
        return slot.memory

    @torch.no_grad()
    def deliver(self, chunk: Chunk, memory: Tensor) -> None:
        """Copy a chunk that lies in a slot to its parameters, and free the slot for its next use."""
        flat, copied = memory[: chunk.nbytes], None
        if self.lane:
            flat, copied = self.lane.carry(flat)
        for piece in chunk.pieces:
            begin = piece.offset - chunk.offset
            for rows, scale, values in landings(piece, values_of(piece, flat[begin : begin + piece.nbytes])):
                if scale is None:
                    rows.copy_(values)
                else:
                    quantize_into(rows, scale, values)
        if self.lane:
            self.lane.release()
        self.free.put(Slot(memory, copied))

    def close(self, readers: int) -> None:
        """Wake all readers that wait for a slot."""
        for _ in range(readers):
            self.free.put(None)


def allocate_ring(nbytes: int, *, pinned: bool) -> Tensor:
    """Host memory for the ring, page-locked if asked and possible, else ordinary."""
    if pinned:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # a limit on locked memory: slower, still inside the cap
            pass
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _places(chunk: Chunk, between: memoryview) -> Iterator[memoryview]:
    """Where the bytes of a chunk go that needs no buffer: parameters, and what lies `between` them."""
    at = chunk.offset
    for piece in chunk.pieces:
        yield between[: piece.offset - at]
        yield memory_of(piece.source.destinations[0].tensor[piece.prefix][piece.start : piece.stop])
        at = piece.offset + piece.nbytes


class Reading(NamedTuple):
    """A chunk that was read, into a slot of the ring or (None) into its place."""

    chunk: Chunk
    slot: Tensor | None


def _read_share(
    share: list[Chunk],
    files: Mapping[ByteSource, type[io.FileIO]],
    ring: Ring,
    done: SimpleQueue[Reading | None],
    stop: Event,
    keep_cached: bool,
) -> None:
    """One reader's part of the file, in order, so that the system can read ahead for it.

    Tells what it has read, and None when it fails.
    """
    between = memoryview(bytearray(MAX_GAP))
    try:
        for source, chunks in groupby(share, lambda chunk: chunk.file):
            with files[source](source.path) as file:
                for chunk in chunks:
                    slot = None if chunk.in_place else ring.take()
                    if stop.is_set():
                        return
                    places = _places(chunk, between) if slot is None else [memory_of(slot)[: chunk.nbytes]]
                    read_file_into(places, file, chunk.offset)
                    if not keep_cached:
                        drop_cached(file.fileno(), chunk.offset, chunk.nbytes)
                    done.put(Reading(chunk, slot))
    except BaseException:
        stop.set()
        done.put(None)
        raise


def _read_all(
    chunks: list[Chunk], ring: Ring, pool: ThreadPoolExecutor, tuning: Tuning
) -> Generator[Reading, None, None]:
    """Read everything; yields each chunk as it is there. Stops all readers when one fails."""
    done: SimpleQueue[Reading | None] = SimpleQueue()
    stop, futures, keep_cached = Event(), list[Future[None]](), tuning.keep_cached
    sources = {chunk.file for chunk in chunks}
    files = {
        source: io.FileIO if keep_cached or not is_best_past_cache(source.path) else PastCache
        for source in sources
    }
    try:
        for share in shares(chunks, tuning.readers):
            futures.append(pool.submit(_read_share, share, files, ring, done, stop, keep_cached))
        for _ in chunks:
            reading = done.get()
            if reading is None:
                break
            yield reading
    finally:
        stop.set()
        ring.close(tuning.readers)
    try:
        list(map(Future.result, futures))  # raises what a reader did
    finally:
        futures.clear()  # or the error holds this frame, this frame the error, and both the parameters


def ring_shape(chunks: list[Chunk], tuning: Tuning) -> tuple[int, int]:
    """(slots, bytes of each): no more and no larger than the chunks need; one for a chunk above the ring."""
    staged = [chunk.nbytes for chunk in chunks if not chunk.in_place]
    slot_bytes = -(-max(staged, default=0) // MAX_ITEM_BYTES) * MAX_ITEM_BYTES
    return (max(min(len(staged), tuning.ring_bytes // slot_bytes), 1), slot_bytes) if staged else (0, 0)


def reads(sources: list[Source], device: torch.device, tuning: Tuning) -> list[Chunk]:
    """What is read at a time, straight into its parameters or through the ring, in its order on disk."""
    chunk_bytes = min(tuning.chunk_bytes, tuning.ring_bytes // FEWEST_SLOTS)
    slot_bytes = max(chunk_bytes // MAX_ITEM_BYTES, 1) * MAX_ITEM_BYTES
    chunks: list[Chunk] = []
    for in_place, run in groupby(sources, lambda source: device.type == "cpu" and is_direct(source)):
        most = tuning.chunk_bytes if in_place else slot_bytes
        pieces = (piece for source in run for piece in cut(source, max(most, source.least_bytes)))
        chunks += joined(pieces, most, in_place=in_place)
    return chunks


def fill(
    sources: list[Source],
    device: torch.device,
    tuning: Tuning,
    progress: Progress,
) -> None:
    """Read every source into its parameters.

    Host memory: the ring, or nothing where everything is read in place; more only for a tensor that no order
    of its dimensions makes contiguous, which is read whole. CUDA memory: two chunks. Raises CheckpointError
    where a file ends early; the error of a reader is raised as it is.
    """
    chunks = reads(sources, device, tuning)
    done, total = 0, sum(chunk.nbytes for chunk in chunks)
    pool = ThreadPoolExecutor(tuning.readers, thread_name_prefix="gpt2lite-reader")
    try:
        ring = Ring(*ring_shape(chunks, tuning), device)
        with closing(_read_all(chunks, ring, pool, tuning)) as readings:
            for chunk, slot in readings:
                if slot is not None:
                    ring.deliver(chunk, slot)
                done += chunk.nbytes
                progress(done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not tuning.keep_cached:  # again: pages that two reads share, and what the system read ahead
            for file in {source.span.source for source in sources}:
                with suppress(OSError):
                    forget_cached(file.path)
