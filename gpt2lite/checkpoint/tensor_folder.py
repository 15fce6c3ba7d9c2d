"""The article's last recipe: a folder with one tensor per file, `<parameter name>.pt`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gpt2lite.checkpoint.manifest import Manifest
from gpt2lite.checkpoint.source import LocalFile
from gpt2lite.checkpoint.torch_zip import fill_torch_zip, open_torch_zip
from gpt2lite.checkpoint.writing import TensorToWrite, Wrote, state_of
from gpt2lite.errors import CheckpointError, UsageError


def open_tensors(folder: Path) -> dict[Path, Manifest]:
    """The `.pt` files of a folder that are one tensor each, named as its file is. Reads all headers."""
    found = {}
    for file in sorted(folder.glob("*.pt")):
        with suppress(CheckpointError):  # a damaged file is not one of them
            manifest = open_torch_zip(LocalFile(file))
            if list(manifest.tensors) == [""]:
                span = replace(manifest.tensors[""], name=file.stem)
                found[file] = replace(
                    manifest, path=folder, format="tensor_folder", tensors={file.stem: span}
                )
    return found


def fill_tensor_folder(folder: Path, tensors: Sequence[TensorToWrite], wrote: Wrote) -> None:
    """Write `<name>.pt` for every tensor, those that share another's bytes left out.

    Raises UsageError for a tensor whose name cannot be a file's, before anything is written.
    """
    stored = [tensor for tensor in tensors if not tensor.shares]
    for name in (tensor.name for tensor in stored):
        if not name or name.startswith(".") or set(name) & {os.sep, "\0"}:
            raise UsageError(f"{folder}: a tensor is called {name!r}, which cannot be a file's name")
        state_of(folder.parent / f"{name}.pt")
    folder.mkdir()
    for tensor in stored:
        path = folder / f"{tensor.name}.pt"
        fill_torch_zip(path, [tensor], wrote, arrange=lambda state: next(iter(state.values())))
