"""What lies where: a stored tensor cut into boxes, neighbours joined into reads, and what each box fills.

A piece is a box of a stored tensor that is contiguous on disk; it is scattered into every parameter that
views it. A chunk is one read: a run of neighbouring pieces. Nothing here reads or allocates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from gpt2lite.checkpoint.manifest import TensorSpan, contiguous_stride
from gpt2lite.checkpoint.reading import as_strided
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.loading.plan import Target

MAX_GAP = 4096  # between two tensors that one read takes together: a zip header, some padding


@dataclass(frozen=True, slots=True)
class Destination:
    """A parameter turned to stand like its stored tensor, filling [start, stop) of the latter's `axis`.

    `scale`, of one that is quantised, is turned likewise and has stride 0 along the rows of the layer.
    """

    tensor: Tensor
    scale: Tensor | None
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

    @property
    def least_bytes(self) -> int:
        """What a piece must hold at least: of what is quantised, whole rows of the layer."""
        scales = [to.scale for to in self.destinations if to.scale is not None]
        runs_down = any(scale.stride(0) == 0 for scale in scales)
        return self.span.nbytes if runs_down else self.span.nbytes // self.shape[0] if scales else 0


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
    """One read, straight into the parameters (`in_place`) or not."""

    file: ByteSource
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]
    in_place: bool


def _disk_order(span: TensorSpan) -> tuple[tuple[int, ...], bool]:
    """The dimensions from the slowest to the fastest on disk, and whether the elements lie so, without gaps.

    As they are where no order is row-major.
    """
    if span.is_contiguous:
        return tuple(range(len(span.shape))), True
    order = tuple(sorted(range(len(span.shape)), key=lambda dim: -span.stride[dim]))
    shape = [span.shape[dim] for dim in order]
    steps = contiguous_stride(shape)
    row_major = all(
        size < 2 or span.stride[dim] == step for dim, size, step in zip(order, shape, steps, strict=True)
    )
    return (order if row_major else tuple(range(len(span.shape)))), row_major


def make_source(span: TensorSpan, filled: Iterable[tuple[Target, Tensor, Tensor | None]]) -> Source:
    """One stored tensor and the (target, parameter, scale of one that is quantised) that it fills."""
    order, is_row_major = _disk_order(span)
    shape = tuple(span.shape[dim] for dim in order) or (1,)
    destinations = []
    for target, parameter, scale in filled:
        place = target.placement
        turned = place.unplace(parameter.detach()).permute(order) if order else parameter.detach().view(1)
        if scale is not None:
            scale = place.unplace(scale.detach()[:, None].expand(parameter.shape)).permute(order)
        axis = order.index(place.axis + place.squeezed) if order else 0
        size = shape[axis] // place.parts
        destinations.append(Destination(turned, scale, axis, place.part * size, (place.part + 1) * size))
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


def joined(pieces: Iterable[Piece], max_bytes: int, *, in_place: bool) -> Iterator[Chunk]:
    """Neighbouring pieces as one read, while that stays within `max_bytes` and aligned to every dtype."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _fits(run, piece, max_bytes):
            yield _chunk(run, in_place)
            run = []
        run.append(piece)
    if run:
        yield _chunk(run, in_place)


def _fits(run: list[Piece], piece: Piece, max_bytes: int) -> bool:
    first, last = run[0], run[-1]
    at = piece.offset - first.offset
    gap = piece.offset - last.offset - last.nbytes
    same_file = piece.source.span.source == first.source.span.source
    aligned = at % piece.source.span.dtype.itemsize == 0
    return same_file and aligned and 0 <= gap <= MAX_GAP and at + piece.nbytes <= max_bytes


def _chunk(run: list[Piece], in_place: bool) -> Chunk:
    begin, end = run[0].offset, run[-1].offset + run[-1].nbytes
    return Chunk(run[0].source.span.source, begin, end - begin, tuple(run), in_place)


def landings(piece: Piece, values: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Parts of equal shape of a parameter, its scale and the piece's values: what is to be written where."""
    depth = len(piece.prefix)
    for to in piece.source.destinations:
        index, rows, part = piece.prefix, slice(piece.start, piece.stop), values
        if to.axis > depth:
            part = values.narrow(to.axis - depth, to.start, to.stop - to.start)
        elif to.axis == depth:
            start, stop = max(piece.start, to.start), min(piece.stop, to.stop)
            if start >= stop:
                continue
            rows, part = (
                slice(start - to.start, stop - to.start),
                values[start - piece.start : stop - piece.start],
            )
        elif to.start <= piece.prefix[to.axis] < to.stop:
            index = tuple(at - to.start * (axis == to.axis) for axis, at in enumerate(piece.prefix))
        else:
            continue
        yield to.tensor[index][rows], None if to.scale is None else to.scale[index][rows], part


def values_of(piece: Piece, flat: Tensor) -> Tensor:
    """The piece's values over its bytes (uint8), in the shape of the box."""
    source = piece.source
    if not source.is_row_major:
        return as_strided(flat, source.span)
    shape = (piece.stop - piece.start, *source.shape[len(piece.prefix) + 1 :])
    return flat.view(source.span.dtype).view(shape)


def is_direct(source: Source) -> bool:
    """Whether disk and parameter hold the same bytes in the same order, so that a CPU needs no buffer."""
    return (
        len(source.destinations) == 1
        and source.is_row_major
        and source.destinations[0].tensor.shape == source.shape
        and source.destinations[0].tensor.is_contiguous()
        and source.destinations[0].tensor.dtype == source.span.dtype
    )


def shares(chunks: list[Chunk], count: int) -> list[list[Chunk]]:
    """Runs of neighbours on disk for `count` readers, of about as many bytes each."""
    total, before = sum(chunk.nbytes for chunk in chunks), 0
    found: list[list[Chunk]] = [[] for _ in range(count)]
    for chunk in chunks:
        found[before * count // total].append(chunk)
        before += chunk.nbytes
    return [share for share in found if share]
