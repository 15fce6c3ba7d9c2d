"""Byte ranges of an ordinary file → parameters, through a ring of small buffers.

A chunk is one read: a run of neighbouring pieces that fits a slot. A piece is a box of a stored tensor that
is contiguous on disk; it is scattered into every parameter that views it, cast and transposed on the way, on
the device. A tensor may be larger than the ring. On a CPU target, what needs no change is read straight into
the parameter's own memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import torch
from torch import Tensor

from gpt2lite.checkpoint.manifest import TensorSpan, contiguous_stride
from gpt2lite.checkpoint.reading import (
    as_strided,
    drop_cached,
    forget_cached,
    memory_of,
    read_bytes_into,
    read_file_into,
)
from gpt2lite.loading.plan import Progress, Target
from gpt2lite.loading.tuning import Tuning

FEWEST_SLOTS = 8
MAX_GAP = 4096  # between two tensors that one read takes together: a zip header, some padding
LANE_BUFFERS = 2  # on a CUDA device, each as large as a slot
MAX_ITEM_BYTES = 16  # complex128; slots begin at multiples of it, so that bytes can be viewed as any dtype


@dataclass(frozen=True, slots=True)
class Destination:
    """A parameter turned to stand like its stored tensor, filling [start, stop) of the latter's `axis`."""

    tensor: Tensor
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor, its dimensions ordered as they lie on disk, and everything that it fills."""

    span: TensorSpan
    shape: tuple[int, ...]
    destinations: tuple[Destination, ...]
    is_row_major: bool  # whether the bytes on disk are exactly the elements in the order of `shape`


@dataclass(frozen=True, slots=True)
class Piece:
    """`source[prefix][start:stop]`: `nbytes` of disk from byte `offset`."""

    source: Source
    prefix: tuple[int, ...]
    start: int
    stop: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read."""

    path: Path
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]


def _disk_order(span: TensorSpan) -> tuple[tuple[int, ...], bool]:
    """The dimensions from the slowest to the fastest on disk, and whether the elements lie so, without gaps.

    As they are where no order is row-major.
    """
    order = tuple(sorted(range(len(span.shape)), key=lambda dim: -span.stride[dim]))
    shape = [span.shape[dim] for dim in order]
    steps = contiguous_stride(shape)
    row_major = all(
        size < 2 or span.stride[dim] == step for dim, size, step in zip(order, shape, steps, strict=True)
    )
    return (order if row_major else tuple(range(len(span.shape)))), row_major


def make_source(span: TensorSpan, filled: Iterable[tuple[Target, Tensor]]) -> Source:
    """One stored tensor and the (target, parameter) pairs that it fills."""
    order, is_row_major = _disk_order(span)
    shape = tuple(span.shape[dim] for dim in order) or (1,)
    destinations = []
    for target, parameter in filled:
        place = target.placement
        turned = place.unplace(parameter.detach()).permute(order) if order else parameter.detach().view(1)
        axis = order.index(place.axis + place.squeezed) if order else 0
        size = shape[axis] // place.parts
        destinations.append(Destination(turned, axis, place.part * size, (place.part + 1) * size))
    return Source(span, shape, tuple(destinations), is_row_major)


def cut(source: Source, max_bytes: int) -> Iterator[Piece]:
    """Boxes of at most `max_bytes` that together are the tensor; one piece if it is not row-major."""
    span, shape = source.span, source.shape
    if not span.numel:
        return
    if not source.is_row_major:
        yield Piece(source, (), 0, shape[0], span.offset, span.extent)
        return
    split = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) * span.dtype.itemsize <= max_bytes)
    row = math.prod(shape[split + 1 :]) * span.dtype.itemsize
    rows = max_bytes // row
    for number in range(math.prod(shape[:split])):
        begin = span.offset + number * shape[split] * row
        for start in range(0, shape[split], rows):
            stop = min(start + rows, shape[split])
            yield Piece(
                source,
                _unravel(number, shape[:split]),
                start,
                stop,
                begin + start * row,
                (stop - start) * row,
            )


def _unravel(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        number, remainder = divmod(number, size)
        index.append(remainder)
    return tuple(reversed(index))


def joined(pieces: Iterable[Piece], max_bytes: int) -> Iterator[Chunk]:
    """Neighbouring pieces as one read, while that stays within `max_bytes` and aligned to every dtype."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _fits(run, piece, max_bytes):
            yield _chunk(run)
            run = []
        run.append(piece)
    if run:
        yield _chunk(run)


def _fits(run: list[Piece], piece: Piece, max_bytes: int) -> bool:
    first, last = run[0], run[-1]
    at = piece.offset - first.offset
    gap = piece.offset - last.offset - last.nbytes
    same_file = piece.source.span.path == first.source.span.path
    aligned = at % piece.source.span.dtype.itemsize == 0
    return same_file and aligned and 0 <= gap <= MAX_GAP and at + piece.nbytes <= max_bytes


def _chunk(run: list[Piece]) -> Chunk:
    begin, end = run[0].offset, run[-1].offset + run[-1].nbytes
    return Chunk(run[0].source.span.path, begin, end - begin, tuple(run))


def landings(piece: Piece, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (part of a parameter, part of the piece's values) of equal shape: what is to be copied where."""
    depth = len(piece.prefix)
    for to in piece.source.destinations:
        if to.axis > depth:
            yield (
                to.tensor[piece.prefix][piece.start : piece.stop],
                values.narrow(to.axis - depth, to.start, to.stop - to.start),
            )
        elif to.axis == depth:
            start, stop = max(piece.start, to.start), min(piece.stop, to.stop)
            if start < stop:
                rows = to.tensor[piece.prefix][start - to.start : stop - to.start]
                yield rows, values[start - piece.start : stop - piece.start]
        elif to.start <= piece.prefix[to.axis] < to.stop:
            index = list(piece.prefix)
            index[to.axis] -= to.start
            yield to.tensor[tuple(index)][piece.start : piece.stop], values


def values_of(piece: Piece, flat: Tensor) -> Tensor:
    """The piece's values over its bytes (uint8), in the shape of the box."""
    source = piece.source
    if not source.is_row_major:
        return as_strided(flat, source.span)
    shape = (piece.stop - piece.start, *source.shape[len(piece.prefix) + 1 :])
    return flat.view(source.span.dtype).view(shape)


def _is_direct(source: Source) -> bool:
    """Whether disk and parameter hold the same bytes in the same order, so that a CPU needs no buffer."""
    return (
        len(source.destinations) == 1
        and source.is_row_major
        and source.destinations[0].tensor.shape == source.shape
        and source.destinations[0].tensor.is_contiguous()
        and source.destinations[0].tensor.dtype == source.span.dtype
    )


def shares(pieces: list[Piece], count: int) -> list[list[Piece]]:
    """Runs of neighbours on disk for `count` readers, of about as many bytes each."""
    total, before = sum(piece.nbytes for piece in pieces), 0
    found: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        found[before * count // total].append(piece)
        before += piece.nbytes
    return [share for share in found if share]


def _read_share(share: list[Piece], done: SimpleQueue[int | BaseException], stop: Event, keep: bool) -> None:
    """One reader's part of what needs no buffer, in order, so that the system can read ahead for it.

    Tells how many bytes it has read, or why it cannot go on.
    """
    try:
        for path, pieces in groupby(share, lambda piece: piece.source.span.path):
            with open(path, "rb", buffering=0) as file:
                for piece in takewhile(lambda _: not stop.is_set(), pieces):
                    rows = piece.source.destinations[0].tensor[piece.prefix][piece.start : piece.stop]
                    read_file_into(memory_of(rows), file, piece.offset)
                    if not keep:
                        drop_cached(file.fileno(), piece.offset, piece.nbytes)
                    done.put(piece.nbytes)
    except BaseException as error:
        done.put(error)


def _read_in_place(pieces: list[Piece], pool: ThreadPoolExecutor, tuning: Tuning) -> Iterator[int]:
    """Read what needs no buffer; yields the bytes of each piece. Stops all readers when one fails."""
    done: SimpleQueue[int | BaseException] = SimpleQueue()
    stop = Event()
    try:
        for share in shares(pieces, tuning.readers):
            pool.submit(_read_share, share, done, stop, tuning.keep_cached)
        for _ in pieces:
            said = done.get()
            if isinstance(said, BaseException):
                raise said
            yield said
    finally:
        stop.set()


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
            for rows, values in landings(piece, values_of(piece, flat[begin : begin + piece.nbytes])):
                rows.copy_(values)
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
        while waiting and ring.slots:
            chunk, slot = waiting.popleft(), ring.take()
            ahead.append((chunk, slot, pool.submit(_read_chunk, chunk, slot, keep_cached)))
        chunk, slot, reading = ahead.popleft()
        reading.result()
        ring.deliver(chunk, slot)
        yield chunk.nbytes


def ring_shape(chunks: list[Chunk], tuning: Tuning) -> tuple[int, int]:
    """(slots, bytes of each): no more and no larger than the chunks need; one for a chunk above the ring."""
    largest = max((chunk.nbytes for chunk in chunks), default=0)
    slot_bytes = -(-largest // MAX_ITEM_BYTES) * MAX_ITEM_BYTES
    return (max(min(len(chunks), tuning.ring_bytes // slot_bytes), 1), slot_bytes) if chunks else (0, 0)


def reads(sources: list[Source], device: torch.device, tuning: Tuning) -> tuple[list[Piece], list[Chunk]]:
    """What is read straight into its parameter, and what goes through the ring."""
    chunk_bytes = min(tuning.chunk_bytes, tuning.ring_bytes // FEWEST_SLOTS)
    slot_bytes = max(chunk_bytes // MAX_ITEM_BYTES, 1) * MAX_ITEM_BYTES
    in_place = [device.type == "cpu" and _is_direct(source) for source in sources]
    direct = [
        p
        for source, yes in zip(sources, in_place, strict=True)
        if yes
        for p in cut(source, tuning.chunk_bytes)
    ]
    staged = (
        p for source, yes in zip(sources, in_place, strict=True) if not yes for p in cut(source, slot_bytes)
    )
    return direct, list(joined(staged, slot_bytes))


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
    total = sum(piece.nbytes for piece in direct) + sum(chunk.nbytes for chunk in chunks)
    pool = ThreadPoolExecutor(tuning.readers, thread_name_prefix="gpt2lite-reader")
    done = 0
    try:
        in_place = _read_in_place(direct, pool, tuning)
        ring = Ring(*ring_shape(chunks, tuning), device) if chunks else None
        staged = _deliver_all(chunks, ring, pool, tuning.keep_cached) if ring else ()
        for nbytes in chain(in_place, staged):
            done += nbytes
            progress(done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not tuning.keep_cached:  # again: pages that two reads share, and what the system read ahead
            for path in {source.span.path for source in sources}:
                forget_cached(path)
