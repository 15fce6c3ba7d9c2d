"""The article's last recipe: a folder with one `torch.save`d tensor a file, `<parameter name>.pt`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gpt2lite.checkpoint.manifest import Manifest, TensorSpan
from gpt2lite.checkpoint.torch_zip import open_torch_zip
from gpt2lite.errors import CheckpointError


def _open_one(path: Path) -> tuple[TensorSpan, Manifest]:
    manifest = open_torch_zip(path)
    if list(manifest.tensors) != [""]:
        raise CheckpointError(f"{path}: a folder of tensors needs exactly one tensor a file, this is a dict")
    return replace(manifest.tensors[""], name=path.stem), manifest


def open_tensor_folder(path: Path) -> Manifest:
    """The manifest of a folder of `.pt` files, one tensor each."""
    opened = [_open_one(file) for file in sorted(path.glob("*.pt"))]
    spans = {span.name: span for span, _ in opened}
    files = {file: state for _, manifest in opened for file, state in manifest.files.items()}
    storages = {file: sizes for _, manifest in opened for file, sizes in manifest.storages.items()}
    is_plain = all(manifest.is_plain for _, manifest in opened)
    return Manifest(path, "tensor_folder", spans, {}, files, storages, is_plain=is_plain)
