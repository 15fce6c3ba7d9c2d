"""A tensor's bytes a few MiB at a time, so that what writes them holds no tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from gpt2lite.checkpoint.reading import memory_of
from gpt2lite.devices import caller_stream, on_stream
from gpt2lite.errors import UsageError

CHUNK_BYTES = 8 << 20
TILE = (256, 112)  # of a transpose: fits the cache, and one thread does it (torch divides 32768 elements)


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor that will be written: `chunks()` yields its bytes in order, row-major.

    `shares` names a tensor of the same bytes that comes before it: a format that can tie stores them once.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]
    shares: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _is_turned(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.stride(0) == 1 and tensor.stride(1) > 1


def _turn(piece: Tensor, out: Tensor) -> None:
    """Copy a transposed view tile by tile, so that what is read across its memory stays in the cache."""
    tall, wide = TILE
    for row in range(0, piece.shape[0], tall):
        for column in range(0, piece.shape[1], wide):
            tile = slice(row, row + tall), slice(column, column + wide)
            out[tile].copy_(piece[tile])


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Pieces side by side, cast, contiguous, on the host; a single one that is all that is not copied."""
    if len(pieces) == 1 and not _is_turned(pieces[0]):
        return pieces[0].to("cpu", dtype).contiguous()
    rows, widths = pieces[0].shape[0], [piece.shape[1] for piece in pieces]
    joined = torch.empty((rows, sum(widths)), dtype=dtype, device="cpu")
    for piece, place in zip(pieces, joined.split(widths, 1), strict=True):
        _turn(piece, place) if _is_turned(piece) and piece.device.type == "cpu" else place.copy_(piece)
    return joined


def _row_chunks(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[memoryview]:
    row_bytes = sum(part[:1].numel() for part in parts) * dtype.itemsize
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for begin in range(0, parts[0].shape[0], step):
        yield memory_of(_joined([part[begin : begin + step] for part in parts], dtype))


def chunks_of(parts: Sequence[Tensor], axis: int, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of `parts` joined along `axis` and cast, CHUNK_BYTES or a row at a time.

    Allocates one chunk at a time, none for what lies ready in host memory.
    """
    for sheet in [[part] for part in parts] if axis == 0 else [parts]:
        yield from _row_chunks(sheet, dtype)


def made_ahead(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same chunks in the same order, the next made in a thread while one is written: two at a time."""
    coming, stream = iter(chunks), caller_stream()

    def make() -> memoryview | None:
        with on_stream(stream):  # the caller's: a thread has another one, which waits for nothing
            return next(coming, None)

    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(make)
        while (chunk := following.result()) is not None:
            following = maker.submit(make)
            yield chunk


def join(
    name: str, parts: Sequence[Tensor], *, axis: int = 0, dtype: torch.dtype | None = None
) -> TensorToWrite:
    """Tensors along `axis` as one to write; by default in the dtype that holds them all."""
    parts = [part.detach().reshape(1) if part.dim() == 0 else part.detach() for part in parts]
    dtype = dtype or reduce(torch.promote_types, (part.dtype for part in parts))
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return TensorToWrite(name, dtype, tuple(shape), partial(chunks_of, parts, axis, dtype))


def tensors_of(state: Mapping[str, Tensor]) -> list[TensorToWrite]:
    """A state dict to write; tied tensors share the bytes of the first. Raises UsageError on meta."""
    first: dict[tuple[object, ...], str] = {}
    found = []
    for name, tensor in state.items():
        if tensor.is_meta:
            raise UsageError(f"{name} is on the meta device and has no values to write")
        address = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        shared = first.setdefault(address if tensor.numel() else (name,), name)
        written = join(name, [tensor])
        shares = shared if shared != name else ""
        found.append(TensorToWrite(name, written.dtype, tuple(tensor.shape), written.chunks, shares))
    return found
