"""The article's last recipe: a folder with one `torch.save`d tensor a file, `<parameter name>.pt`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gpt2lite.checkpoint.manifest import Manifest
from gpt2lite.checkpoint.source import ByteSource, FileState, LocalFile
from gpt2lite.checkpoint.torch_zip import open_torch_zip
from gpt2lite.errors import CheckpointError


def _tensor_in(path: Path) -> Manifest | None:
    """The manifest of a file that is one tensor, None for anything else, damaged files too."""
    with suppress(CheckpointError):
        manifest = open_torch_zip(path)
        return manifest if list(manifest.tensors) == [""] else None
    return None


def open_tensors(folder: Path) -> dict[Path, Manifest]:
    """The `.pt` files of a folder that are one tensor each. Reads the headers of all."""
    opened = {file: _tensor_in(file) for file in sorted(folder.glob("*.pt"))}
    return {file: manifest for file, manifest in opened.items() if manifest is not None}


def join_tensors(path: Path, opened: Mapping[Path, Manifest]) -> Manifest:
    """The manifest of a folder from those of its files, one tensor each, named as its file is."""
    spans = {file.stem: replace(manifest.tensors[""], name=file.stem) for file, manifest in opened.items()}
    sources = {LocalFile(file): manifest for file, manifest in opened.items()}
    files: dict[ByteSource, FileState] = {file: each.files[file] for file, each in sources.items()}
    storages: dict[ByteSource, tuple[int, ...]] = {f: each.storages[f] for f, each in sources.items()}
    is_plain = all(manifest.is_plain for manifest in opened.values())
    return Manifest(path, "tensor_folder", spans, {}, files, storages, is_plain=is_plain)
