"""What lies on disk: `open_checkpoint` recognises a file by its content and returns its `Manifest`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpt2lite.checkpoint import llmc_bin, tf_bundle, torch_legacy
from gpt2lite.checkpoint.folders import FOLDER_FILES, candidates, refuse_divided, without_weights
from gpt2lite.checkpoint.foreign import READABLE, is_optimizer_state, shortened, what_is, what_is_zip
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan
from gpt2lite.checkpoint.safetensors_file import open_safetensors
from gpt2lite.checkpoint.sharded import INDEX_SUFFIX, open_sharded
from gpt2lite.checkpoint.tensor_folder import join_tensors, open_tensors
from gpt2lite.checkpoint.torch_zip import open_torch_zip
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

__all__ = ["FOLDER_FILES", "Manifest", "TensorSpan", "open_checkpoint", "side_file"]


def _open_shard(path: Path) -> Manifest:
    kind = _kind_of_file(path)
    if kind == "sharded":
        raise CheckpointError(path, "an index, where a shard is wanted")
    return OPENERS[kind](path)


def _open_zip(path: Path) -> Manifest:
    try:
        return open_torch_zip(path)
    except CheckpointError as error:
        if said := what_is_zip(path):
            raise CheckpointError(path, f"{said}") from error
        raise


OPENERS: dict[str, Callable[[Path], Manifest]] = {
    "zip": _open_zip,
    "legacy": torch_legacy.open_torch_legacy,
    "safetensors": open_safetensors,
    "sharded": partial(open_sharded, open_shard=_open_shard),
    "llmc": llmc_bin.open_llmc,
    "tf bundle": tf_bundle.open_tf_bundle,
}


def _kind_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(max(os.path.getsize(path) - len(tf_bundle.MAGIC), 0))
        tail = file.read(len(tf_bundle.MAGIC))
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(llmc_bin.MAGIC) and head[4:8] != bytes(4):
        return "llmc"
    if head.lstrip()[:1] == b"{" and b"\0" not in head[:8]:  # not the length of a safetensors header
        return "sharded"
    if tail == tf_bundle.MAGIC:
        return "tf bundle"
    said = what_is(head)
    if head[8:9] == b"{" and not (any(head[4:8]) and said):
        return "safetensors"
    if torch_legacy.MAGIC in head[:32] or head.startswith(torch_legacy.MAGIC_TEXT):
        return "legacy"
    raise CheckpointError(f"{path}: is {said}" if said else f"{path}: begins with {head[:8]!r}, {READABLE}")


def _open_file(path: Path) -> Manifest:
    return OPENERS[_kind_of_file(path)](path)


def _open_folder(path: Path) -> Manifest:
    """The checkpoint that a folder is or holds. Raises CheckpointError where none or more than one does."""
    if named := next((path / name for name in FOLDER_FILES if (path / name).is_file()), None):
        return _open_file(named)
    refuse_divided(path)
    tensors = open_tensors(path)
    files = candidates(path, tensors)
    if tensors and not files:
        return join_tensors(path, tensors)
    are_many = len(tensors) > len(files)
    if len(files) == 1 and not are_many:
        return _open_file(files[0])
    if files:
        found = f"{len(tensors)} files of exactly one tensor each and " if are_many else ""
        names = shortened(file.name for file in files)
        raise CheckpointError(path, f"holds {found}{names}; pass the one that is the checkpoint")
    if indices := sorted(path.glob("*.index")):
        return tf_bundle.open_tf_bundle(tf_bundle.current_index(path, indices))
    raise without_weights(path)


def side_file(path: Path, suffix: str) -> Path:
    """What lies beside a checkpoint and belongs to it: `model.pth` → `model.json`, `hub/` → `hub.json`.

    Beside an index it has the name that it would have beside the whole: `model.safetensors.index.json` →
    `model.json`.
    """
    path = path.absolute()
    if os.path.isdir(path):
        return path.with_name(path.name + suffix)
    return path.with_name(path.name.removesuffix(INDEX_SUFFIX)).with_suffix(suffix)


def open_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Read the headers of a checkpoint, whatever its extension, and say what lies where.

    A folder is what its content says: a Hub model's (the first of FOLDER_FILES counts), one file, or a tensor
    a file. Reads no tensor data and allocates none. Raises CheckpointNotFoundError, or CheckpointError for a
    file that is damaged, of an unknown kind, or wants to run code, and for a folder that holds two.
    """
    path = Path(path)
    if os.path.exists(path):
        manifest = _open_folder(path) if path.is_dir() else _open_file(path)
    elif os.path.isfile(index := tf_bundle.index_of(path)):
        manifest = tf_bundle.open_tf_bundle(index)
    else:
        raise CheckpointNotFoundError(path, "no such file or folder")
    if is_optimizer_state(manifest.tensors):
        raise CheckpointError(manifest.path, "an optimizer's state alone; pass the file of the weights")
    return manifest
