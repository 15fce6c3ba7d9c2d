"""A tensor's bytes a few MiB at a time, so that what writes them holds no tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from gpt2lite.checkpoint.reading import memory_of
from gpt2lite.errors import UsageError

CHUNK_BYTES = 8 << 20


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


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Pieces side by side, cast, contiguous, on the host; a single one that is all that is not copied.

    Transposed views are gathered along their own memory and turned together, for which torch has a blocked
    kernel; element by element it takes five times as long.
    """
    if all(map(_is_turned, pieces)):
        return torch.cat([piece.t().to("cpu", dtype) for piece in pieces]).t().contiguous()
    joined = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), -1)
    return joined.to("cpu", dtype).contiguous()


def _row_chunks(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[memoryview]:
    row_bytes = sum(part[:1].numel() for part in parts) * dtype.itemsize
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for begin in range(0, parts[0].shape[0], step):
        yield memory_of(_joined([part[begin : begin + step] for part in parts], dtype))


def chunks_of(parts: Sequence[Tensor], axis: int, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of `parts` joined along `axis` and cast, CHUNK_BYTES or a row at a time.

    Allocates at most two chunks, none for what lies ready in host memory.
    """
    for sheet in [[part] for part in parts] if axis == 0 else [parts]:
        yield from _row_chunks(sheet, dtype)


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


def chunks_ahead(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    """`chunks`, each made by a thread while the one before it is used."""
    iterator = iter(chunks)
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, iterator, None)
        while (chunk := coming.result()) is not None:
            coming = maker.submit(next, iterator, None)
            yield chunk
