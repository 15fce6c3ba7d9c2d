"""A folder that `torch.distributed.checkpoint` wrote, from any number of ranks; and such a folder, written.

Its pickle `.metadata` says in which bytes of which file each chunk of a tensor lies, as torch.save wrote it:
zips, one behind the other in one file. A source joins chunks of rows, going on from one to the next.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from gpt2lite.checkpoint.foreign import DAMAGED
from gpt2lite.checkpoint.inert_pickle import DescribingUnpickler, Inert, describe
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, are_sizes, contiguous_span
from gpt2lite.checkpoint.reading import map_tensors
from gpt2lite.checkpoint.safetensors import fill_safetensors, open_safetensors
from gpt2lite.checkpoint.source import ByteSource, FileReader, FileState, memory_of, read_all
from gpt2lite.checkpoint.torch_zip import MAX_SMALL_BYTES, open_torch_zip
from gpt2lite.checkpoint.writing import TensorToWrite, Wrote
from gpt2lite.errors import CheckpointError

METADATA = ".metadata"
DCP_TO_TORCH = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth"


class _Unpickler(DescribingUnpickler):
    """Keeps also what a dict holds under inert keys, which is where chunks lie."""

    def _set_items(self, items: list[object]) -> None:
        super()._set_items(items)
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, Inert))


class _Until(FileReader):
    """A file that ends at a byte, whatever follows."""

    def __init__(self, path: Path, end: int) -> None:
        super().__init__(path)
        self.end = end

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(*(self.end + offset, os.SEEK_SET) if whence == os.SEEK_END else (offset, whence))

    def readinto(self, memory: Any) -> int:
        return super().readinto(memoryview(memory)[: max(self.end - self.tell(), 0)])

    def readall(self) -> bytes:
        return self.read(max(self.end - self.tell(), 0))


@dataclass(frozen=True, slots=True)
class _Item(ByteSource):
    """A file up to the end of one of the zips in it, as a zip must end that others follow."""

    end: int = 0

    def state(self) -> FileState:
        """As of a file that ends there."""
        return replace(ByteSource.state(self), size=self.end)

    def open(self) -> BinaryIO:
        """For its headers."""
        return io.BufferedReader(_Until(self.path, self.end))


class _JoinedReader(ExitStack):
    """Reads ranges one behind the other."""

    def __init__(self, ranges: Sequence[tuple[ByteSource, int, int]]) -> None:
        super().__init__()
        begins = accumulate((nbytes for *_, nbytes in ranges), initial=0)
        self.ranges, self.readers = list(zip(ranges, begins, strict=False)), dict[ByteSource, FileReader]()

    def read_into(self, memories: Iterable[memoryview], offset: int) -> None:
        """Fill one memory after the other from byte `offset` of all ranges together."""
        for memory in memories:
            for (file, begin, nbytes), at in self.ranges:
                low, high = max(offset, at), min(offset + len(memory), at + nbytes)
                if low < high:
                    part = memory[low - offset : high - offset]
                    self._reader(file).read_into([part], begin + low - at)
            offset += len(memory)

    def _reader(self, file: ByteSource) -> FileReader:
        """Opened when it is first wanted: a thousand ranks wrote as many files, of which few are."""
        if file not in self.readers:
            self.readers[file] = self.enter_context(file.reader())
        return self.readers[file]

    def forget(self, offset: int, nbytes: int) -> None:
        """Do nothing: the whole is forgotten at the end."""

    def stop(self) -> None:
        """Do nothing: what a disk reads ends by itself."""


@dataclass(frozen=True, slots=True, order=True)
class Joined(ByteSource):
    """Ranges (file, offset, bytes) of local files as one source; `path` is the first file's."""

    can_map: ClassVar[bool] = False
    ranges: tuple[tuple[ByteSource, int, int], ...] = ()

    def state(self) -> FileState:
        """Its size; the files' own states are in the manifest beside it."""
        return FileState(sum(nbytes for *_, nbytes in self.ranges), 0, 0)

    def reader(  # type: ignore[override]
        self, *, past_cache: bool = False, ahead: Sequence[tuple[int, int]] = ()
    ) -> _JoinedReader:
        """Through the page cache."""
        return _JoinedReader(self.ranges)

    def is_best_past_cache(self) -> bool:
        """No."""
        return False

    def map(self) -> torch.UntypedStorage:
        """All of it, read into fresh memory: chunks do not begin on pages."""
        flat = torch.empty(self.state().size, dtype=torch.uint8, device="cpu")
        with self.reader() as reader:
            reader.read_into([memory_of(flat)], 0)
        return flat.untyped_storage()

    def forget(self) -> None:
        """Give back what the system caches of its files."""
        for file in {file for file, *_ in self.ranges}:
            file.forget()


def _chunk(folder: Path, stored: Inert) -> TensorSpan:
    """Where the values of a chunk lie."""
    name, begin, nbytes = (stored.attribute(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or Path(name).name != name or not are_sizes((begin, nbytes)):
        raise CheckpointError(folder, f"its {METADATA} names {str(name)[:100]!r}, which is no file in it")
    if stored.attribute("transform_descriptors"):
        raise CheckpointError(folder / name, "holds compressed chunks, which are not read")
    spans = open_torch_zip(_Item(folder / name, begin + nbytes)).tensors.values()
    if len(spans) != 1:
        raise CheckpointError(folder / name, f"holds {len(spans)} tensors where one was expected: {DAMAGED}")
    return next(iter(spans))


def _tensor(folder: Path, name: str, shape: Any, chunks: dict[Any, TensorSpan]) -> TensorSpan:
    """Chunks, by the place of their first element, as one tensor; CheckpointError unless they are rows."""
    ordered = [chunks[place] for place in sorted(chunks)]
    rows = accumulate((span.shape[0] for span in ordered if span.shape), initial=0)
    begins = [(row, *[0] * (len(shape) - 1)) for row in rows] if shape else [(), ()]
    are_rows = sorted(chunks) == begins[:-1] and {span.shape[1:] for span in ordered} == {shape[1:]}
    if not are_rows or (shape and begins[-1][0] != shape[0]) or not all(s.is_contiguous for s in ordered):
        said = f"{name} is stored in other parts than rows; join it: {DCP_TO_TORCH}"
        raise CheckpointError(folder, said, name=name)
    places = [(ByteSource(span.source.path), span.offset, span.nbytes) for span in ordered if span.nbytes]
    dtype, nbytes = ordered[0].dtype, sum(nbytes for *_, nbytes in places)
    if len(places) < 2:
        source, begin, _ = places[0] if places else (ByteSource(ordered[0].source.path), 0, 0)
        return contiguous_span(name, dtype, shape, source, begin, nbytes)
    return contiguous_span(name, dtype, shape, Joined(places[0][0].path, tuple(places)), 0, nbytes)


def open_dcp(folder: Path) -> Manifest:
    """The manifest of a distributed checkpoint, of which no class is imported.

    Raises CheckpointError for one that is damaged or has tensors divided otherwise than by rows.
    """
    own = ByteSource(folder / METADATA)
    raw = read_all(own, MAX_SMALL_BYTES)
    found = describe(own, _Unpickler(io.BytesIO(raw), len(raw)))
    facts = found if isinstance(found, Inert) else Inert("nothing")
    named, where, paths = map(facts.attribute, ("state_dict_metadata", "storage_data", "planner_data"))
    if not isinstance(named, dict) or not isinstance(where, dict):
        raise CheckpointError(own, f"not the {METADATA} of a distributed checkpoint")
    shapes = {name: said.attribute("size") for name, said in named.items() if isinstance(said, Inert)}
    is_named = {name: isinstance(name, str) and are_sizes(shape) for name, shape in shapes.items()}
    chunks = {name: dict[Any, TensorSpan]() for name in shapes if is_named[name]}
    for index, stored in where.items():
        if not isinstance(index, Inert):
            continue
        name, place = index.attribute("fqn"), index.attribute("offset")
        if isinstance(name, str) and name in chunks:
            if not are_sizes(place) or not isinstance(stored, Inert):
                raise CheckpointError(own, f"says not where a chunk of {name[:100]!r} lies", name=name)
            chunks[name][place] = _chunk(folder, stored)
    if lacking := [name for name in chunks if not chunks[name]]:
        raise CheckpointError(own, f"says of {len(lacking)} tensor(s) not where they lie: {lacking[0]}")
    tensors = {name: _tensor(folder, name, shapes[name], chunks[name]) for name in chunks}
    files = {ByteSource(span.source.path) for each in chunks.values() for span in each.values()}
    sources = {own, *files, *(span.source for span in tensors.values())}
    paths = paths if isinstance(paths, dict) else {}
    containers = {
        name: ".".join(map(str, path[:-1]))
        for name, path in paths.items()
        if name in tensors and isinstance(path, tuple) and all(type(part) in (str, int) for part in path)
    }
    states = {source: source.state() for source in sources}
    return Manifest(folder, "dcp", tensors, files=states, containers=containers)


def fill_dcp(folder: Path, tensors: Sequence[TensorToWrite], wrote: Wrote) -> None:
    """Write a new folder with torch's own writer, from a file of the same tensors, which goes again."""
    from torch.distributed.checkpoint import state_dict_saver

    folder.mkdir()
    whole = folder / "whole.safetensors"
    fill_safetensors(whole, tensors, wrote)
    mapped = map_tensors(open_safetensors(ByteSource(whole)).tensors.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_saver.save(mapped, checkpoint_id=folder, no_dist=True)
    whole.unlink()
