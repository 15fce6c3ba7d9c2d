"""Byte ranges of an ordinary file → parameters, through a ring of small buffers.

A chunk fills a slot of the ring, its pieces go on to their parameters, cast and transposed on the way, on the
device; a tensor may be larger than the ring. On a CPU target, what needs no change is read straight into the
parameter's own memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, groupby
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor

from gpt2lite.checkpoint.page_cache import drop_cached, forget_cached
from gpt2lite.checkpoint.reading import memory_of, read_bytes_into, read_file_into
from gpt2lite.loading.pieces import (
    MAX_GAP,
    Chunk,
    Piece,
    Source,
    cut,
    is_direct,
    joined,
    landings,
    shares,
    values_of,
)
from gpt2lite.loading.plan import Progress
from gpt2lite.loading.tuning import Tuning
from gpt2lite.quantization import quantize_into

FEWEST_SLOTS = 8
FAILED = -1
LANE_BUFFERS = 2  # on a CUDA device, each as large as a slot
MAX_ITEM_BYTES = 16  # complex128; slots begin at multiples of it, so that bytes can be viewed as any dtype


def _places(chunk: Chunk, between: memoryview) -> Iterator[memoryview]:
    """Where the bytes of a chunk go that needs no buffer: parameters, and what lies `between` them."""
    at = chunk.offset
    for piece in chunk.pieces:
        yield between[: piece.offset - at]
        yield memory_of(piece.source.destinations[0].tensor[piece.prefix][piece.start : piece.stop])
        at = piece.offset + piece.nbytes


def _read_share(share: list[Chunk], done: SimpleQueue[int], stop: Event, keep_cached: bool) -> None:
    """One reader's part of what needs no buffer, in order, so that the system can read ahead for it.

    Tells how many bytes it has read, or FAILED.
    """
    between = memoryview(bytearray(MAX_GAP))
    try:
        for path, chunks in groupby(share, lambda chunk: chunk.path):
            with open(path, "rb", buffering=0) as file:
                for chunk in chunks:
                    if stop.is_set():
                        return
                    read_file_into(_places(chunk, between), file, chunk.offset)
                    if not keep_cached:
                        drop_cached(file.fileno(), chunk.offset, chunk.nbytes)
                    done.put(chunk.nbytes)
    except BaseException:
        stop.set()
        done.put(FAILED)
        raise


def _read_in_place(
    chunks: list[Chunk], pool: ThreadPoolExecutor, tuning: Tuning
) -> Generator[int, None, None]:
    """Read what needs no buffer; yields the bytes of each chunk. Stops all readers when one fails."""
    done: SimpleQueue[int] = SimpleQueue()
    stop, futures = Event(), list[Future[None]]()
    try:
        for share in shares(chunks, tuning.readers):
            futures.append(pool.submit(_read_share, share, done, stop, tuning.keep_cached))
        for _ in chunks:
            nbytes = done.get()
            if nbytes == FAILED:
                for _ in map(Future.result, futures):  # raises what that reader did
                    continue
            yield nbytes
    finally:
        stop.set()
        futures.clear()  # or an error holds this frame, this frame the error, and both the parameters


def _read_chunk(chunk: Chunk, slot: Tensor, keep_cached: bool) -> int:
    read_bytes_into(memory_of(slot)[: chunk.nbytes], chunk.path, chunk.offset, keep_cached=keep_cached)
    return chunk.nbytes


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


class Ring:
    """Equal host buffers in one allocation, page-locked and with a lane to the device where that is CUDA.

    Costs `count × slot_bytes` on the host and, for a CUDA device, two of them there (or `count`, if less).
    """

    def __init__(self, count: int, slot_bytes: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.slots = deque(allocate_ring(count * slot_bytes, pinned=on_cuda).split(slot_bytes))
        self.lane = Lane(min(count, LANE_BUFFERS), slot_bytes, device) if on_cuda else None
        self.copied: dict[int, torch.cuda.Event] = {}
        self.spare = 1 if on_cuda else 0  # the slot whose copy has just begun: to take it is to wait for that

    def take(self) -> Tensor:
        """The oldest slot, once its last copy is done."""
        slot = self.slots.popleft()
        event = self.copied.pop(slot.data_ptr(), None)
        if event is not None:
            event.synchronize()
        return slot

    @torch.no_grad()
    def deliver(self, chunk: Chunk, slot: Tensor) -> None:
        """Copy a chunk that lies in `slot` to its parameters, and queue the slot for its next use."""
        flat = slot[: chunk.nbytes]
        if self.lane:
            flat, self.copied[slot.data_ptr()] = self.lane.carry(flat)
        for piece in chunk.pieces:
            begin = piece.offset - chunk.offset
            for rows, scale, values in landings(piece, values_of(piece, flat[begin : begin + piece.nbytes])):
                if scale is None:
                    rows.copy_(values)
                else:
                    quantize_into(rows, scale, values)
        if self.lane:
            self.lane.release()
        self.slots.append(slot)


def allocate_ring(nbytes: int, *, pinned: bool) -> Tensor:
    """Host memory for the ring, page-locked if asked and possible, else ordinary."""
    if pinned:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # a limit on locked memory: slower, still inside the cap
            pass
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _deliver_all(
    chunks: list[Chunk], ring: Ring, pool: ThreadPoolExecutor, keep_cached: bool
) -> Iterator[int]:
    """Read ahead into every free slot, deliver in order; yields the bytes of each chunk delivered."""
    waiting, ahead = deque(chunks), deque[tuple[Chunk, Tensor, Future[int]]]()
    while waiting or ahead:
        while waiting and (len(ring.slots) > ring.spare or (ring.slots and not ahead)):
            chunk, slot = waiting.popleft(), ring.take()
            ahead.append((chunk, slot, pool.submit(_read_chunk, chunk, slot, keep_cached)))
        chunk, slot, reading = ahead.popleft()
        nbytes = reading.result()
        ring.deliver(chunk, slot)
        yield nbytes


def ring_shape(chunks: list[Chunk], tuning: Tuning) -> tuple[int, int]:
    """(slots, bytes of each): no more and no larger than the chunks need; one for a chunk above the ring."""
    largest = max((chunk.nbytes for chunk in chunks), default=0)
    slot_bytes = -(-largest // MAX_ITEM_BYTES) * MAX_ITEM_BYTES
    return (max(min(len(chunks), tuning.ring_bytes // slot_bytes), 1), slot_bytes) if chunks else (0, 0)


def reads(sources: list[Source], device: torch.device, tuning: Tuning) -> tuple[list[Chunk], list[Chunk]]:
    """What is read straight into its parameters, and what goes through the ring."""
    chunk_bytes = min(tuning.chunk_bytes, tuning.ring_bytes // FEWEST_SLOTS)
    slot_bytes = max(chunk_bytes // MAX_ITEM_BYTES, 1) * MAX_ITEM_BYTES
    direct, staged = list[Piece](), list[Piece]()
    for source in sources:
        if device.type == "cpu" and is_direct(source):
            direct += cut(source, tuning.chunk_bytes)
        else:
            staged += cut(source, max(slot_bytes, source.least_bytes))
    return list(joined(direct, tuning.chunk_bytes)), list(joined(staged, slot_bytes))


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
    direct, chunks = reads(sources, device, tuning)
    total = sum(chunk.nbytes for chunk in direct + chunks)
    pool = ThreadPoolExecutor(tuning.readers, thread_name_prefix="gpt2lite-reader")
    done, in_place = 0, _read_in_place(direct, pool, tuning)
    try:
        ring = Ring(*ring_shape(chunks, tuning), device) if chunks else None
        staged = _deliver_all(chunks, ring, pool, tuning.keep_cached) if ring else ()
        for nbytes in chain(in_place, staged):
            done += nbytes
            progress(done, total)
    finally:
        in_place.close()
        pool.shutdown(wait=True, cancel_futures=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not tuning.keep_cached:  # again: pages that two reads share, and what the system read ahead
            for path in {source.span.path for source in sources}:
                with suppress(OSError):
                    forget_cached(path)
