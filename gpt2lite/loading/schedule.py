"""What `stream` reads, in which chunks, through how many slots: data without tensors, planned once.

`Tuning` is what a caller may say of it.

A piece is a part of a stored tensor that is contiguous on disk and that some parameter wants; it is scattered
into every parameter that views it. A chunk is one read: a run of neighbouring pieces.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, groupby, product
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2lite.checkpoint.manifest import TensorSpan, contiguous_stride
from gpt2lite.checkpoint.reading import as_strided
from gpt2lite.checkpoint.source import ByteSource, memory_of
from gpt2lite.devices import copies_async
from gpt2lite.dialects.reading import inside
from gpt2lite.errors import UsageError
from gpt2lite.memory import MIB
from gpt2lite.quantization import scale_of

if TYPE_CHECKING:
    from gpt2lite.loading.plan import Target

MAX_GAP = 4096  # between two pieces that one read takes together: a zip header, some padding
FEWEST_SLOTS = 8
SLOTS_A_READER = 2  # one is read into while the other is copied to the device
LANE_BUFFERS = 2  # on a device with streams, each as large as a slot
MAX_ITEM_BYTES = 16  # complex128; slots begin at multiples of it, so that bytes can be viewed as any dtype


def _readers() -> int:
    """Four keep a disk busy whatever the processors; eight are many for one bus."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(4, min(mine, 8))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How `stream` and `mmap` read; `benchmarks/sweep_stream.py` shows what the numbers do.

    `readers` threads read at once (eight of a file that lies elsewhere, unless said), `chunk_bytes` at most
    before they look up (for progress, or an error). What cannot be read into its place goes through a ring of
    `ring_bytes` of host memory (made smaller where that is short), two slots a reader, each an eighth of it
    at most. `keep_cached=False`, for containers that count it, leaves nothing of what `stream` read in the
    page cache: a file that is not there is read past it, where the system can, about as fast, and one that is
    there goes out of it.
    `prefetch` has `mmap` read and map everything before it returns, so that the first logits do not wait for
    the disk or for one fault a page; what it reads can be reclaimed like the rest.
    `broadcast`, for ranks that each hold all ("ddp"): the first one reads, and sends the others what they
    would have read, which pays where the machines' disks are slower than the network between them.
    Raises UsageError for numbers that cannot work.
    """

    readers: int = field(default_factory=_readers)
    chunk_bytes: int = 16 * MIB
    ring_bytes: int = 64 * MIB
    keep_cached: bool = True
    prefetch: bool = False
    broadcast: bool = False

    def __post_init__(self) -> None:
        limits = {"readers": (1, 64), "chunk_bytes": (4096, 1 << 30), "ring_bytes": (64, 1 << 36)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"Tuning: {name} must be a whole number in {least} … {most}, got {value!r}")
        for name in ("keep_cached", "prefetch", "broadcast"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"Tuning: {name} must be True or False, got {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class Piece:
    """`box` of a stored tensor, which fills parts of `targets`; `span` is its own place on disk.

    With `steps` (bytes of a run, bytes from one run to the next) it is a part of each of many rows there, and
    the span is what they are once they are read.
    """

    span: TensorSpan
    box: tuple[range, ...]
    targets: tuple[Target, ...]
    steps: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read, straight into the parameters (`in_place`) or not."""

    source: ByteSource
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]
    in_place: bool

    @property
    def end(self) -> int:
        """The byte behind the last that is read."""
        width, step = self.pieces[0].steps or (self.nbytes, 0)
        return self.offset + (self.nbytes // width - 1) * step + width

    def reads(self, memories: Iterable[memoryview]) -> Iterator[tuple[int, Iterable[memoryview]]]:
        """Each read that fills the memories: where it begins, and into what."""
        if not (steps := self.pieces[0].steps):
            yield self.offset, memories
            return
        (memory,), (width, step) = memories, steps
        for row, at in enumerate(range(0, self.nbytes, width)):
            yield self.offset + row * step, [memory[at : at + width]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is read in which order, by how many readers, through `slots` of `slot_bytes` of host memory.

    A device with streams has `lane_buffers` as large as a slot.
    """

    chunks: tuple[Chunk, ...]
    readers: int
    slots: int
    slot_bytes: int
    lane_buffers: int


def make_schedule(
    stored: Iterable[tuple[TensorSpan, tuple[Target, ...]]], device: torch.device, tuning: Tuning
) -> Schedule:
    """How each of the `stored` tensors, which come in their order on disk, fills its targets.

    There are no more and no larger slots than the chunks need; one for a chunk that is larger than the ring.
    """
    fewest = max(FEWEST_SLOTS, SLOTS_A_READER * tuning.readers)
    slot_bytes = min(tuning.chunk_bytes, tuning.ring_bytes // fewest) // MAX_ITEM_BYTES * MAX_ITEM_BYTES
    chunks: list[Chunk] = []
    for in_place, run in groupby(stored, lambda each: device.type == "cpu" and _is_direct(*each)):
        most = tuning.chunk_bytes if in_place else max(slot_bytes, MAX_ITEM_BYTES)
        pieces = (piece for span, own in run for piece in cut(span, own, most))
        chunks += joined(pieces, most, in_place=in_place)
    staged = [chunk.nbytes for chunk in chunks if not chunk.in_place]
    slot_bytes = -(-max(staged, default=0) // MAX_ITEM_BYTES) * MAX_ITEM_BYTES
    slots = max(min(len(staged), tuning.ring_bytes // slot_bytes), 1) if staged else 0
    lane_buffers = min(slots, LANE_BUFFERS) if copies_async(device) else 0
    return Schedule(tuple(chunks), min(tuning.readers, len(chunks)), slots, slot_bytes, lane_buffers)


def _is_direct(span: TensorSpan, targets: Sequence[Target]) -> bool:
    """Whether disk and parameter hold the same bytes in the same order, so that a CPU needs no buffer."""
    (target, *others) = targets
    is_same = target.placement.is_contiguous and target.dtype == span.dtype
    return is_same and span.is_contiguous and not others


def _disk_order(span: TensorSpan) -> list[int]:
    """The axes of more than one from the slowest to the fastest; none where no order of them is row-major."""
    axes = [axis for axis, size in enumerate(span.shape) if size > 1]
    order = sorted(axes, key=lambda axis: -span.stride[axis])
    steps = contiguous_stride(span.shape[axis] for axis in order)
    return order if steps == tuple(span.stride[axis] for axis in order) else []


def _united(ranges: Iterable[range]) -> list[range]:
    """The same numbers in ranges that neither touch nor overlap."""
    found: list[range] = []
    for each in sorted(ranges, key=lambda each: each.start):
        if found and each.start <= found[-1].stop:
            last = found.pop()
            each = range(last.start, max(last.stop, each.stop))
        found.append(each)
    return found


def cut(span: TensorSpan, targets: tuple[Target, ...], max_bytes: int) -> Iterator[Piece]:
    """Boxes of at most `max_bytes` that hold what is wanted of a tensor; one if it is not row-major.

    What nobody wants of the axis that is cut, of the slower ones, and of a matrix' other axis, is not read.
    """
    boxes = [box for target in targets if all(box := target.placement.box(span.shape))]
    if not boxes:
        return
    wanted = [_united(ranges) for ranges in zip(*boxes, strict=True)]
    whole, order = [range(ranges[0].start, ranges[-1].stop) for ranges in wanted], _disk_order(span)
    if not order:
        yield Piece(span.part(whole), tuple(whole), targets)
        return
    if quantized := [target for target in targets if target.is_quantized]:  # whole rows of the layer
        by_row = span.is_contiguous and all(target.placement.is_contiguous for target in quantized)
        max_bytes = max(max_bytes, span.nbytes // span.shape[0] if by_row else span.nbytes)
    sizes = [span.shape[axis] for axis in order]
    row_bytes = [math.prod(sizes[depth + 1 :]) * span.dtype.itemsize for depth in range(len(sizes))]
    split = next(depth for depth, nbytes in enumerate(row_bytes) if nbytes <= max_bytes)
    step = max_bytes // row_bytes[split]
    whole = [range(size) for size in span.shape]
    for index in product(*(chain(*wanted[axis]) for axis in order[:split])):
        for rows in wanted[order[split]]:
            for start in range(rows.start, rows.stop, step):
                box = list(whole)
                box[order[split]] = range(start, min(start + step, rows.stop))
                for axis, at in zip(order[:split], index, strict=True):
                    box[axis] = range(at, at + 1)
                yield from _pieces(span, box, order, wanted[order[-1]], targets)


def _pieces(
    span: TensorSpan, box: list[range], order: list[int], columns: list[range], targets: tuple[Target, ...]
) -> Iterator[Piece]:
    """A box as one piece, or, of a matrix of whose rows only `columns` are wanted, one for each of these."""
    is_cut = len(order) != 2 or len(box[order[1]]) != span.shape[order[1]]  # within a row
    for wanted in [box[order[-1]]] if is_cut else columns:
        box[order[-1]] = wanted
        part, itemsize = span.part(box), span.dtype.itemsize
        if part.nbytes == part.extent:
            yield Piece(part, tuple(box), targets)
            continue
        stride = tuple(len(wanted) if axis == order[0] else 1 for axis in range(len(box)))
        steps = len(wanted) * itemsize, span.stride[order[0]] * itemsize
        yield Piece(replace(part, stride=stride), tuple(box), targets, steps)


def joined(pieces: Iterable[Piece], max_bytes: int, *, in_place: bool) -> Iterator[Chunk]:
    """Neighbouring pieces as one read, while that stays within `max_bytes` and aligned to every dtype."""
    run: list[Piece] = []
    for piece in chain(pieces, [None]):
        if run and (piece is None or not _fits(run, piece, max_bytes)):
            first, last = run[0].span, run[-1].span
            nbytes = last.offset + last.extent - first.offset
            yield Chunk(first.source, first.offset, nbytes, tuple(run), in_place)
            run = []
        run += [piece] if piece else []


def _fits(run: list[Piece], piece: Piece, max_bytes: int) -> bool:
    first, last, new = run[0].span, run[-1].span, piece.span
    at, gap = new.offset - first.offset, new.offset - last.offset - last.extent
    is_aligned = new.source == first.source and at % new.dtype.itemsize == 0
    is_run = not (run[0].steps or piece.steps)
    return is_run and is_aligned and 0 <= gap <= MAX_GAP and at + new.extent <= max_bytes


def shares(chunks: Sequence[Chunk], count: int) -> list[list[Chunk]]:
    """Runs of neighbours on disk for `count` readers, of about as many bytes each."""
    total = sum(chunk.nbytes for chunk in chunks)
    begins = accumulate((chunk.nbytes for chunk in chunks), initial=0)
    numbered = zip(chunks, (begin * count // total for begin in begins), strict=False)
    return [[chunk for chunk, _ in run] for _, run in groupby(numbered, itemgetter(1))]


# ---- where it lands ----------------------------------------------------------------------------------------


def places(chunk: Chunk, between: memoryview, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Where the bytes of a chunk go that needs no slot: parameters, and what lies `between` them."""
    at = chunk.offset
    for piece in chunk.pieces:
        (target,), begin = piece.targets, piece.span.offset
        own = target.placement.box(target.span.shape)
        yield between[: begin - at]
        yield memory_of(target.placement.unplace(tensors[target.names[0]])[inside(piece.box, own)])
        at = begin + piece.span.extent


def landings(
    piece: Piece, flat: Tensor, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Parts of equal shape: of a parameter, of its scale if it has one, and of a piece's values in `flat`."""
    values = as_strided(flat, piece.span)
    for target in piece.targets:
        place, name = target.placement, target.names[0]
        own = place.box(target.span.shape)
        box = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(own, piece.box, strict=True)]
        if not all(box):
            continue
        parts = [tensors[name]]
        if target.is_quantized:
            parts.append(tensors[scale_of(name)][:, None].expand(target.shape))
        rows, *scale = [place.turn(place.unplace(part)[inside(box, own)]) for part in parts]
        yield rows, scale[0] if scale else None, place.turn(values[inside(box, piece.box)])
