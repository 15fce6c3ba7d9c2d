"""What lies on disk: `open_checkpoint` recognises a file by its content and returns its `Manifest`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpt2lite.checkpoint import dcp, folders, llmc_bin, tf_bundle, torch_zip
from gpt2lite.checkpoint.folders import FOLDER_FILES
from gpt2lite.checkpoint.foreign import READABLE, shortened, what_is
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, joined, validate
from gpt2lite.checkpoint.safetensors import open_safetensors
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

OPTIMIZER = re.compile(r"(.*\.)?(state\.\d+|param_groups|optim\w*)\..*")  # names of an optimizer's tensors

__all__ = ["FOLDER_FILES", "Manifest", "TensorSpan", "open_checkpoint", "side_file"]


OPENERS: dict[str, Callable[[ByteSource], Manifest]] = {
    "zip": torch_zip.open_torch_zip,
    "legacy": torch_zip.open_torch_legacy,
    "safetensors": open_safetensors,
    "sharded": lambda source: folders.open_sharded(source, partial(_open_file, is_shard=True)),
    "llmc": llmc_bin.open_llmc,
    "tf bundle": tf_bundle.open_tf_bundle,
}


def _open_file(source: ByteSource, is_shard: bool = False) -> Manifest:
    """Open a file by its first and last bytes. Raises CheckpointError for one of no known kind."""
    size = source.state().size
    with source.open() as file:
        head = file.read(512)
        file.seek(max(size - len(tf_bundle.MAGIC), 0))
        tail = file.read(len(tf_bundle.MAGIC))
    rows = {
        "zip": head.startswith(b"PK\x03\x04"),
        "llmc": head.startswith(llmc_bin.MAGIC) and head[4:8] != bytes(4),
        # a brace that is not within the length of a safetensors header
        "sharded": head.lstrip()[:1] == b"{" and b"\0" not in head[:8],
        "tf bundle": tail == tf_bundle.MAGIC,
        "safetensors": head[8:9] == b"{" and not (any(head[4:8]) and what_is(head)),
        "legacy": torch_zip.MAGIC in head[:32] or head.startswith(torch_zip.MAGIC_TEXT),
    }
    kind = next((kind for kind, is_it in rows.items() if is_it), None)
    if kind is None:
        said = what_is(head)
        raise CheckpointError(source, f"is {said}" if said else f"begins with {head[:8]!r}, {READABLE}")
    if is_shard and kind == "sharded":
        raise CheckpointError(source, "expected a shard, found an index")
    return OPENERS[kind](source)


def _open_folder(path: Path) -> Manifest:
    """The checkpoint that a folder is or holds. Raises CheckpointError where none or more than one does."""
    if named := next((path / name for name in FOLDER_FILES if (path / name).is_file()), None):
        return _open_file(ByteSource(named))
    if (path / dcp.METADATA).is_file():
        return dcp.open_dcp(path)
    folders.refuse_divided(path)
    tensors = folders.open_tensors(path)
    files = folders.candidates(path, tensors)
    if len(files) == 1 and len(tensors) < 2:
        return _open_file(ByteSource(files[0]))
    if files:
        found = f"{len(tensors)} files of exactly one tensor each and " if len(tensors) > len(files) else ""
        names = shortened(file.name for file in files)
        raise CheckpointError(path, f"holds {found}{names}; pass the one that is the checkpoint")
    if tensors:
        return joined(list(tensors.values()))
    if indices := sorted(path.glob("*.index")):
        return tf_bundle.open_tf_bundle(ByteSource(tf_bundle.current_index(path, indices)))
    raise folders.without_weights(path)


def side_file(path: Path, suffix: str) -> Path:
    """What lies beside a checkpoint and belongs to it: `model.pth` → `model.json`, `hub/` → `hub.json`.

    Beside an index it has the name that it would have beside the whole: `model.safetensors.index.json` →
    `model.json`.
    """
    path = path.absolute()
    if os.path.isdir(path):
        return path.with_name(path.name + suffix)
    return path.with_name(path.name.removesuffix(folders.INDEX_SUFFIX)).with_suffix(suffix)


def open_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Read the headers of a checkpoint, whatever its extension, and say what lies where.

    A folder is what its content says: a Hub model's (the first of FOLDER_FILES counts), one file, or a tensor
    a file. Reads no tensor data and allocates none. Raises CheckpointNotFoundError, or CheckpointError for a
    file that is damaged, of an unknown kind, or wants to run code, and for a folder that holds two.
    """
    path = Path(path)
    if os.path.exists(path):
        manifest = _open_folder(path) if path.is_dir() else _open_file(ByteSource(path))
    elif os.path.isfile(index := tf_bundle.index_of(path)):
        manifest = tf_bundle.open_tf_bundle(ByteSource(index))
    else:
        raise CheckpointNotFoundError(path, "no such file or folder")
    if manifest.tensors and all(map(OPTIMIZER.fullmatch, manifest.tensors)):
        raise CheckpointError(manifest.path, "only an optimizer's state; pass the weights file")
    return validate(manifest)
