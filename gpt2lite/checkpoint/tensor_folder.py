"""The article's last recipe: a folder with one `torch.save`d tensor a file, `<parameter name>.pt`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gpt2lite.checkpoint.manifest import Manifest
from gpt2lite.checkpoint.torch_zip import open_torch_zip
from gpt2lite.errors import CheckpointError


def _tensor_in(path: Path) -> Manifest | None:
    """The manifest of a file that is one tensor, None for anything else, damaged files too."""
    try:
        manifest = open_torch_zip(path) if path.suffix == ".pt" else None
    except CheckpointError:
        return None
    return manifest if manifest and list(manifest.tensors) == [""] else None


def sort_out(files: Iterable[Path]) -> tuple[list[Manifest], list[Path]]:
    """(those that are one tensor each, opened; the others). Reads headers, each file's once."""
    opened = {file: _tensor_in(file) for file in files}
    tensors = [manifest for manifest in opened.values() if manifest is not None]
    return tensors, [file for file, manifest in opened.items() if manifest is None]


def join_tensors(path: Path, opened: Sequence[Manifest]) -> Manifest:
    """The manifest of a folder from those of its files, one tensor each, named as its file is."""
    spans = {each.path.stem: replace(each.tensors[""], name=each.path.stem) for each in opened}
    files = {file: state for manifest in opened for file, state in manifest.files.items()}
    storages = {file: sizes for manifest in opened for file, sizes in manifest.storages.items()}
    return Manifest(path, "tensor_folder", spans, {}, files, storages)
