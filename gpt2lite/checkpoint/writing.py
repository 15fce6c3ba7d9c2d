"""Writers: tensor by tensor, so that a file larger than memory can be written, and never half a file.

Everything is written under a temporary name beside its destination and renamed at the end: `fill_…` functions
write where they are told, `replacing` gives them the place.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import stat
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.chunks import TensorToWrite, made_ahead
from gpt2lite.checkpoint.manifest import TensorSpan, contiguous_stride
from gpt2lite.checkpoint.reading import read_span
from gpt2lite.checkpoint.torch_zip import CONFIG_ENTRY
from gpt2lite.errors import UsageError

__all__ = [
    "ALIGNMENT",
    "Progress",
    "TensorToWrite",
    "destination_of",
    "fill_tensor_folder",
    "fill_torch_zip",
    "replacing",
    "require_new_folder",
    "require_space",
    "save_per_tensor",
    "spans_on_disk",
    "write_torch_zip",
]

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Config = Mapping[str, Any]  # the fields of a model's config
ALIGNMENT = 64  # torch.save's own, so that mapped tensors are aligned
MAX_PREFIX = 20  # characters of a temporary name that are the file's own: it must fit wherever the file does
NO_PLACE = {errno.ELOOP: "links lead in a circle", errno.ENAMETOOLONG: "longer than the file system allows"}
LOCAL_HEADER_BYTES = 30
ZIP64_EXTRA_BYTES = 20
STORAGES = torch.storage._dtype_to_storage_type_map()  # newer dtypes than these have no class of their own


def _flush(path: Path) -> None:
    """Have the disk hold a file, or every file of a folder, before its name says that it does."""
    for file in path.iterdir() if path.is_dir() else (path,):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        wrong = "is a file, not a folder" if folder.exists() else "does not exist; make it first"
        raise UsageError(f"the folder {folder} {wrong}")


def _state_of(path: Path) -> os.stat_result | None:
    """What lies at `path`, links followed; None if nothing does. UsageError for a path that never can."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in NO_PLACE:
            raise UsageError(f"{path}: {NO_PLACE[error.errno]}; choose another name") from None
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
    return None


def destination_of(path: Path) -> Path:
    """Where the file that is to be written at `path` will lie: a link is followed, and stays a link.

    Raises UsageError where no file can be put: its folder does not exist, the name is too long, links lead in
    a circle, or a folder, FIFO, socket or device lies there.
    """
    found = _state_of(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a FIFO, socket or device"
        raise UsageError(f"{path}: is {kind}, and a file is to be written there; choose another name")
    followed = Path(os.path.realpath(path))
    if path.is_symlink() and not followed.parent.exists():
        raise UsageError(
            f"{path}: is a link to {followed}, whose folder does not exist; make it, or mend the link"
        )
    _require_folder(followed.parent)
    return followed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds and vanishes when not.

    A link is followed, and a file that is replaced hands on its mode. What is written there is on the disk
    before it is renamed. A process that is killed leaves the old file and a folder `.<name>.….part` beside
    it. Raises UsageError as `destination_of`.
    """
    target = destination_of(path)
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{target.name[:MAX_PREFIX]}.", suffix=".part", dir=target.parent)
    )
    try:
        yield temporary / target.name
        _flush(temporary / target.name)
        if (replaced := _state_of(target)) is not None:
            os.chmod(temporary / target.name, stat.S_IMODE(replaced.st_mode))
        os.replace(temporary / target.name, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _StoredAs:
    """Stands for a storage in the pickle; torch.load finds its bytes in the zip entry `data/<key>`."""

    key: str
    dtype: torch.dtype
    numel: int


class _DescribingPickler(pickle.Pickler):
    """Writes the pickle that torch.save would write, of tensors that are not there."""

    def persistent_id(self, obj: object) -> Any:
        if not isinstance(obj, _StoredAs):
            return None
        storage = STORAGES.get(obj.dtype)
        if storage is None:
            return ("storage", torch.UntypedStorage, obj.key, "cpu", obj.numel * obj.dtype.itemsize)
        return ("storage", getattr(torch, storage), obj.key, "cpu", obj.numel)


class _Described:
    """Pickles as the call that rebuilds one contiguous tensor."""

    def __init__(self, key: str, tensor: TensorToWrite) -> None:
        self.key, self.tensor = key, tensor

    def __reduce__(self) -> Any:
        shape, dtype = self.tensor.shape, self.tensor.dtype
        stored = _StoredAs(self.key, dtype, torch.Size(shape).numel())
        described: tuple[object, ...] = (stored, 0, shape, contiguous_stride(shape), False, OrderedDict())
        if dtype in STORAGES:
            return torch._utils._rebuild_tensor_v2, described
        return torch._utils._rebuild_tensor_v3, (*described, dtype)


def _entry(archive: zipfile.ZipFile, name: str, nbytes: int) -> zipfile.ZipInfo:
    """A stored entry whose data begin at a multiple of ALIGNMENT, padded as torch does: by an extra field."""
    info = zipfile.ZipInfo(name)
    info.file_size = nbytes
    is_zip64 = nbytes * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
    assert archive.fp is not None
    begin = archive.fp.tell() + LOCAL_HEADER_BYTES + len(name) + (ZIP64_EXTRA_BYTES if is_zip64 else 0)
    padding = -(begin + 4) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


Arrange = Callable[[dict[str, Any]], object]  # a state dict → what the pickle holds


def _stored_once(tensors: Sequence[TensorToWrite]) -> list[TensorToWrite]:
    return [tensor for tensor in tensors if not tensor.shares]


def fill_torch_zip(
    path: Path,
    tensors: Sequence[TensorToWrite],
    progress: Progress,
    config: Config | None,
    arrange: Arrange = OrderedDict,
) -> None:
    """Write a new file as `torch.save` does; `arrange` puts the state dict into what surrounds it.

    The model's config goes into an entry of its own, which torch.load passes over: in the weights' own file
    it cannot become another model's. Tensors that share another's bytes are stored with it. No date is in it:
    equal tensors, equal bytes. Holds two chunks in memory.
    """
    stored = _stored_once(tensors)
    keys = {tensor.name: str(i) for i, tensor in enumerate(stored)}
    described = OrderedDict((t.name, _Described(keys[t.shares or t.name], t)) for t in tensors)
    total, done = sum(tensor.nbytes for tensor in stored), 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("archive/data.pkl"), "w") as entry:
            _DescribingPickler(entry, protocol=2).dump(arrange(described))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        if config is not None:
            archive.writestr(zipfile.ZipInfo(f"archive/{CONFIG_ENTRY}"), json.dumps(config, indent=2))
        for i, tensor in enumerate(stored):
            with archive.open(_entry(archive, f"archive/data/{i}", tensor.nbytes), "w") as entry:
                for chunk in made_ahead(tensor.chunks()):
                    entry.write(chunk)
                    done += len(chunk)
                    progress(done, total)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def write_torch_zip(
    path: Path, tensors: Sequence[TensorToWrite], progress: Progress, config: Config | None = None
) -> None:
    """Write a state dict as `torch.save` does, two chunks in memory at a time.

    torch.load, also with mmap, and every reader of `.pth` opens it. The file appears whole or not at all.
    """
    with replacing(path) as temporary:
        fill_torch_zip(temporary, tensors, progress, config)


def _require_file_name(folder: Path, name: str) -> None:
    """Raise UsageError for a tensor whose name cannot be a file's in `folder`."""
    if not name or name.startswith(".") or set(name) & {os.sep, "\0"}:
        raise UsageError(f"{folder}: a tensor is called {name!r}, which is no file name")
    _state_of(folder.parent / f"{name}.pt")


def fill_tensor_folder(
    folder: Path, tensors: Sequence[TensorToWrite], progress: Progress, config: Config
) -> None:
    """Write `<name>.pt` for every tensor, those that share another's bytes left out, and the config, to a
    folder.

    Raises UsageError for a name that is no file name.
    """
    stored = _stored_once(tensors)
    total, done = sum(tensor.nbytes for tensor in stored), 0
    for tensor in stored:
        _require_file_name(folder, tensor.name)
    folder.mkdir()
    for tensor in stored:
        fill_torch_zip(
            folder / f"{tensor.name}.pt",
            [tensor],
            lambda *_: None,
            None,
            lambda state: next(iter(state.values())),
        )
        done += tensor.nbytes
        progress(done, total)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once, under their first name: apart, in a file each, the tie would be lost."""
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        address = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        seen.setdefault(address if tensor.numel() else (name,), name)
    return {name: state[name] for name in seen.values()}


def _tensors_of(source: nn.Module | str | os.PathLike[str]) -> dict[str, Callable[[], Tensor]]:
    """Names, and what makes the host tensor of each."""
    if isinstance(source, nn.Module):
        state = _distinct(source.state_dict())
        return {name: tensor.detach().cpu().clone for name, tensor in state.items()}
    spans = open_checkpoint(source).tensors
    distinct = {span.address: span for span in reversed(list(spans.values()))}.values()
    return {span.name: lambda span=span: read_span(span).contiguous() for span in distinct}  # type: ignore[misc]


def require_new_folder(folder: Path) -> None:
    """Raise UsageError where a folder is to be made and something lies already."""
    if _state_of(folder) is not None:
        kind = "already exists" if folder.is_dir() else "is a file, and a folder is to be made there"
        raise UsageError(f"{folder}: {kind}; choose a new folder")


def save_per_tensor(
    model_or_path: nn.Module | str | os.PathLike[str], folder: str | os.PathLike[str]
) -> Path:
    """Write `<name>.pt` for every tensor of a model or checkpoint, for strategy="per_tensor".

    Holds one tensor in memory at a time. The folder must not exist, and appears whole or not at all. Tied
    tensors are written once. Raises UsageError, CheckpointError.
    """
    folder = Path(folder)
    require_new_folder(folder)
    tensors = _tensors_of(model_or_path)
    for name in tensors:
        _require_file_name(folder, name)
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, make in tensors.items():
            torch.save(make(), temporary / f"{name}.pt")
    return folder


def require_space(path: Path, nbytes: int) -> None:
    """Raise OSError before writing `nbytes` into a folder, or a file, if the disk has no room.

    Raises UsageError for a file as `destination_of`.
    """
    folder = path if os.path.isdir(path) else destination_of(path).parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"{nbytes / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free",
            str(folder),
        )


def spans_on_disk(files: Iterable[Path]) -> dict[str, TensorSpan]:
    """Every tensor of some files that were just written; what the system cached of them is dropped."""
    manifests = [open_checkpoint(file) for file in files]
    for manifest in manifests:
        for file in manifest.files:
            file.forget()
    return {name: span for manifest in manifests for name, span in manifest.tensors.items()}
