"""Tensors out of a manifest, as the article reads them: all at once, one file at a time, or mapped."""

from __future__ import annotations

import ctypes
import mmap
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, flatten
from gpt2lite.checkpoint.source import STEP, ByteSource, FileReader, memory_of
from gpt2lite.errors import CheckpointError, first_line, is_out_of_memory

MADV_WILLNEED, MADV_POPULATE_READ = 3, 22  # Python does not name the latter yet


def as_strided(flat: Tensor, span: TensorSpan) -> Tensor:
    """A span's tensor over `flat`, its bytes (uint8), which must be aligned to its dtype."""
    return flat[: span.extent].view(span.dtype).as_strided(span.shape, span.stride)


def read_span(span: TensorSpan) -> Tensor:
    """One tensor in fresh host memory. Raises CheckpointError where the file ends first."""
    (found,) = read_spans([span])
    return found


def read_spans(spans: Iterable[TensorSpan]) -> Iterator[Tensor]:
    """One tensor after the other in fresh host memory; each of their files is opened once."""
    with ExitStack() as opened:
        readers: dict[ByteSource, FileReader] = {}
        for span in spans:
            if span.source not in readers:
                readers[span.source] = opened.enter_context(span.source.reader())
            flat = torch.empty(span.extent, dtype=torch.uint8, device="cpu")
            readers[span.source].read_into([memory_of(flat)], span.offset)
            yield as_strided(flat, span)


def _torch_load(path: Path, device: torch.device, *, mmap: bool = False) -> object:
    try:
        with open(path, "rb") as file:  # torch would take a pickle that is called .safetensors at its word
            name = f"/dev/fd/{file.fileno()}" if path.suffix == ".safetensors" else path
            return torch.load(name, map_location=device, mmap=mmap, weights_only=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = f'torch.load refuses it ({first_line(error)}); strategy="stream" does not use it'
        raise CheckpointError(path, said) from None


def _planned(manifest: Manifest, names: Iterable[str]) -> tuple[list[tuple[ByteSource, str]], list[str]]:
    """The files that torch.load reads, with a name where the file is one tensor; and the names of all else.

    The others lie in a format of its own, in an adapter's file, or in a pickle that torch.load may refuse. A
    state dict is read whole: it keeps its masks to the end.
    """
    stored = manifest.storages if manifest.is_plain and all(s.is_local for s in manifest.files) else {}
    sources = [(manifest.tensors[name].source, name) for name in names]
    own = [(source, name) for source, name in sources if source in stored]
    beside = [name for source, name in sources if source not in stored]
    return (own if manifest.format == "tensor_folder" else [(source, "") for source in stored]), beside


def read_tensors(manifest: Manifest, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """At least `names`, at once, on `device`, by the format's usual call (torch.load for `.pth`).

    Costs what torch.load costs: every byte of the file on the device, passengers included, and on the way
    there one tensor of host memory. A pickle that torch.load may refuse is read tensor by tensor.
    """
    files, beside = _planned(manifest, names)
    found: dict[str, Tensor] = {}
    for source, name in files:
        tree = _torch_load(source.path, device)
        found |= flatten({name: tree} if name else tree, Tensor)  # type: ignore[arg-type]
    return found | {name: read_span(manifest.tensors[name]).to(device) for name in beside}


def sizes_read(manifest: Manifest, names: Iterable[str]) -> Sequence[int]:
    """Bytes of every allocation that `read_tensors` makes, in its order."""
    files, beside = _planned(manifest, names)
    sizes = [size for source, _ in files for size in manifest.storages[source]]
    return sizes + [manifest.tensors[name].extent for name in beside]


def stored_versions(manifest: Manifest, prefix: str) -> dict[str, object]:
    """`state_dict()._metadata` of the state dict whose names begin with `prefix`: the versions of modules.

    Only torch.save keeps it, an attribute of the state dict.
    """
    if manifest.format != "torch_zip" or len(manifest.storages) != 1:
        return {}
    (path,) = (source.path for source in manifest.storages)
    node = _torch_load(path, torch.device("cpu"), mmap=zipfile.is_zipfile(path))
    while isinstance(node, dict) and (key := prefix.partition(".")[0]) in node:
        node, prefix = node[key], prefix.partition(".")[2]
    stored = getattr(node, "_metadata", {}).items()
    return {f"{name}.".removeprefix(prefix).removesuffix("."): version for name, version in stored}


def prefetch(tensors: Iterable[Tensor], readers: int, chunk_bytes: int) -> None:
    """Read the pages of mapped tensors and enter them into the page tables, where the system allows it.

    `readers` threads; takes page cache and nothing else. (Linux 5.14; before, only reading ahead.)
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    page, step = mmap.PAGESIZE, max(chunk_bytes, STEP) // mmap.PAGESIZE * mmap.PAGESIZE

    def touch(begin: int, end: int) -> None:
        for advice in (MADV_WILLNEED, MADV_POPULATE_READ):
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)

    with ThreadPoolExecutor(readers) as pool:
        for tensor in tensors:
            begin = tensor.data_ptr() // page * page
            end = tensor.data_ptr() + tensor.untyped_storage().nbytes()
            for at in range(begin, end, step):
                pool.submit(touch, at, min(at + step, end))


def map_tensors(spans: Iterable[TensorSpan]) -> dict[str, Tensor]:
    """Tensors over a private mapping of their files: no bytes are read before they are used.

    Each has a storage of its own (torch.save of one view would else write the whole file) and need not be
    aligned. Costs address space only; what is touched lies in the page cache and can be reclaimed. A file
    that is truncated while mapped kills the process that reads it (SIGBUS), unless `in_memory` does: replace
    files instead, as `os.replace` does.
    """
    mapped: dict[ByteSource, torch.UntypedStorage] = {}
    tensors = {}
    for span in spans:
        if span.source not in mapped:
            mapped[span.source] = span.source.map()
        storage = mapped[span.source][span.offset : span.offset + span.extent]
        if storage.nbytes() < span.extent:
            raise CheckpointError(span.source, f"ends before {span.name}; it was truncated while being read")
        empty = torch.empty(0, dtype=span.dtype, device="cpu")
        tensors[span.name] = empty.set_(storage, 0, span.shape, span.stride)
    return tensors
