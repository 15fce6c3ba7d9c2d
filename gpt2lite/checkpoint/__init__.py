"""What lies on disk: `open_checkpoint` recognises a file by its content and returns its `Manifest`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gpt2lite.checkpoint.manifest import Manifest, TensorSpan
from gpt2lite.checkpoint.safetensors_file import open_safetensors
from gpt2lite.checkpoint.tensor_folder import open_tensor_folder
from gpt2lite.checkpoint.tf_bundle import MAGIC, open_tf_bundle
from gpt2lite.checkpoint.torch_zip import RESAVE, open_torch_zip
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

__all__ = ["Manifest", "TensorSpan", "open_checkpoint", "side_file"]

# A folder from the Hub holds its weights under one of these names.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")

MAX_NOTE = 1 << 16  # characters of it that are read

OPENERS = {
    "zip": open_torch_zip,
    "safetensors": open_safetensors,
    "tensor folder": open_tensor_folder,
    "tf bundle": open_tf_bundle,
}


def _kind_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(max(os.path.getsize(path) - len(MAGIC), 0))
        tail = file.read(len(MAGIC))
    if not head:
        raise CheckpointError(f"{path}: is empty. Copy or download it again.")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if tail == MAGIC:
        return "tf bundle"
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"):
        raise CheckpointError(
            f"{path}: written before torch 1.6, without byte ranges. Re-save it: "
            "torch.save(torch.load(path, weights_only=True), path)"
        )
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{path}: a bare pickle, which only running it could read. {RESAVE}")
    raise CheckpointError(
        f"{path}: begins with {head[:8]!r}, wanted a torch.save zip (PK), a safetensors header, or the index "
        "of a TensorFlow checkpoint (not its data)"
    )


def _index_of(prefix: Path) -> Path:
    """What TensorFlow's users call a checkpoint, `model.ckpt`, is no file; its index is."""
    return prefix.with_name(prefix.name + ".index")


def _current_index(folder: Path, indices: list[Path]) -> Path:
    """The only index of a folder, or the one that TensorFlow's own note `checkpoint` says is current."""
    if len(indices) == 1:
        return indices[0]
    note = folder / "checkpoint"
    if note.is_file():
        with open(note, encoding="utf-8", errors="replace") as file:
            said = re.search(r'^model_checkpoint_path: "([^"\n]*)"', file.read(MAX_NOTE), re.MULTILINE)
        current = folder / f"{Path(said[1]).name}.index" if said else None
        if current in indices:
            return current
    raise CheckpointError(
        f"{folder}: holds several TensorFlow checkpoints, and its file `checkpoint` names none of them. "
        f"Name one: {', '.join(index.name for index in indices[:5])}"
    )


def _locate(path: Path) -> tuple[Path, str]:
    """The file or folder to open, and its kind."""
    if not path.exists():
        return _index_of(path), "tf bundle"
    if not path.is_dir():
        return path, _kind_of_file(path)
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name, _kind_of_file(path / name)
    if any(path.glob("*.pt")):
        return path, "tensor folder"
    if indices := sorted(path.glob("*.index")):
        return _current_index(path, indices), "tf bundle"
    found = sorted(child.name for child in path.iterdir())[:5]
    raise CheckpointError(
        f"{path}: a folder without weights; wanted {', '.join(FOLDER_FILES)}, one .pt file a tensor or a "
        f".index of TensorFlow, found {', '.join(found) or 'nothing'}"
    )


def side_file(path: Path, suffix: str) -> Path:
    """What lies beside a checkpoint and belongs to it: `model.pth` → `model.json`, `hub/` → `hub.json`."""
    path = path.absolute()
    return path.with_name(path.name + suffix) if path.is_dir() else path.with_suffix(suffix)


def open_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """Read the headers of a checkpoint, whatever its extension, and say what lies where.

    Reads no tensor data and allocates none. Raises CheckpointNotFoundError, or CheckpointError for a file
    that is damaged, of an unknown kind, or wants to run code.
    """
    path = Path(path)
    if not path.exists() and not _index_of(path).is_file():
        raise CheckpointNotFoundError(f"{path}: no such file or folder")
    located, kind = _locate(path)
    return OPENERS[kind](located)
