"""What lies on disk: `open_checkpoint` recognises a file by its content and returns its `Manifest`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpt2lite.checkpoint import llmc_bin, tf_bundle, torch_legacy
from gpt2lite.checkpoint.inert_pickle import RESAVE
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan
from gpt2lite.checkpoint.safetensors_file import open_safetensors
from gpt2lite.checkpoint.sharded import INDEX_SUFFIX, open_sharded
from gpt2lite.checkpoint.tensor_folder import open_tensor_folder
from gpt2lite.checkpoint.torch_zip import open_torch_zip
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

__all__ = ["Manifest", "TensorSpan", "open_checkpoint", "side_file"]

# A folder from the Hub holds its weights under one of these names; the first that is there counts.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _open_shard(path: Path) -> Manifest:
    kind = _kind_of_file(path)
    if kind == "sharded":
        raise CheckpointError(f"{path}: an index, where a shard is wanted")
    return OPENERS[kind](path)


OPENERS: dict[str, Callable[[Path], Manifest]] = {
    "zip": open_torch_zip,
    "legacy": torch_legacy.open_torch_legacy,
    "safetensors": open_safetensors,
    "sharded": partial(open_sharded, open_shard=_open_shard),
    "llmc": llmc_bin.open_llmc,
    "tensor folder": open_tensor_folder,
    "tf bundle": tf_bundle.open_tf_bundle,
}


def _kind_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(max(os.path.getsize(path) - len(tf_bundle.MAGIC), 0))
        tail = file.read(len(tf_bundle.MAGIC))
    if not head:
        raise CheckpointError(f"{path}: is empty. Copy or download it again.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(llmc_bin.MAGIC) and head[4:8] != bytes(4):
        return "llmc"
    if head.lstrip()[:1] == b"{" and b"\0" not in head[:8]:  # not the length of a safetensors header
        return "sharded"
    if tail == tf_bundle.MAGIC:
        return "tf bundle"
    if head[8:9] == b"{":
        return "safetensors"
    if torch_legacy.MAGIC in head[:32] or head.startswith(torch_legacy.MAGIC_TEXT):
        return "legacy"
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path}: a tar archive, written before torch 0.1.10, which torch.load reads only by running it. "
            f"{RESAVE}"
        )
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{path}: a bare pickle, which only running it could read. {RESAVE}")
    raise CheckpointError(
        f"{path}: begins with {head[:8]!r}, wanted a file of torch.save (zip or older), safetensors, an "
        "index of shards, the index of a TensorFlow checkpoint (not its data), or llm.c's .bin"
    )


def _locate(path: Path) -> tuple[Path, str]:
    """The file or folder to open, and its kind."""
    if not path.exists():
        return tf_bundle.index_of(path), "tf bundle"
    if not path.is_dir():
        return path, _kind_of_file(path)
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name, _kind_of_file(path / name)
    if any(path.glob("*.pt")):
        return path, "tensor folder"
    if indices := sorted(path.glob("*.index")):
        return tf_bundle.current_index(path, indices), "tf bundle"
    found = sorted(child.name for child in path.iterdir())[:5]
    raise CheckpointError(
        f"{path}: a folder without weights; wanted {', '.join(FOLDER_FILES)}, one .pt file a tensor or a "
        f".index of TensorFlow, found {', '.join(found) or 'nothing'}"
    )


def side_file(path: Path, suffix: str) -> Path:
    """What lies beside a checkpoint and belongs to it: `model.pth` → `model.json`, `hub/` → `hub.json`.

    Beside an index it has the name that it would have beside the whole: `model.safetensors.index.json` →
    `model.json`.
    """
    path = path.absolute()
    if path.is_dir():
        return path.with_name(path.name + suffix)
    return path.with_name(path.name.removesuffix(INDEX_SUFFIX)).with_suffix(suffix)


def open_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Read the headers of a checkpoint, whatever its extension, and say what lies where.

    Reads no tensor data and allocates none. Raises CheckpointNotFoundError, or CheckpointError for a file
    that is damaged, of an unknown kind, or wants to run code.
    """
    path = Path(path)
    if not path.exists() and not tf_bundle.index_of(path).is_file():
        raise CheckpointNotFoundError(f"{path}: no such file or folder")
    located, kind = _locate(path)
    return OPENERS[kind](located)
