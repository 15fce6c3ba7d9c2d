"""A checkpoint in several files with an index: JSON whose `weight_map` says which file holds which tensor.

Format: transformers writes it for `save_pretrained(max_shard_size=…)`, around safetensors or pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gpt2lite.checkpoint.foreign import what_is_json
from gpt2lite.checkpoint.manifest import Manifest, validate
from gpt2lite.checkpoint.safetensors_file import unique_keys
from gpt2lite.checkpoint.source import ByteSource, FileState, LocalFile
from gpt2lite.errors import CheckpointError, listed

INDEX_SUFFIX = ".index.json"
MAX_INDEX_BYTES = 64 << 20


def _read_index(path: Path, size: int) -> dict[str, Any]:
    """The parsed index, with a weight_map that names something."""
    if size > MAX_INDEX_BYTES:
        raise CheckpointError(path, f"has {size} bytes; an index ends at {MAX_INDEX_BYTES >> 20} MiB")
    try:
        index = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            path, f"its index is not sound JSON ({error}). Copy or download it again."
        ) from None
    match index:
        case {"weight_map": {**placed}} if placed:
            return index
    raise CheckpointError(path, f"has no weight_map that names tensors; it is {what_is_json(index)}")


def _shard_name(said: object) -> str | None:
    """A file below the index's folder, spelled in one way; None for what could lie elsewhere."""
    if not isinstance(said, str) or "\\" in said or PureWindowsPath(said).drive:
        return None
    name = PurePosixPath(said)
    return str(name) if name.parts and not name.is_absolute() and ".." not in name.parts else None


def _open_shards(
    folder: Path, names: Mapping[str, None], open_shard: Callable[[Path], Manifest], lines: list[str]
) -> dict[str, Manifest]:
    """The manifests of all shards that can be opened; a line for each that cannot."""
    opened = {}
    for name in names:
        if not os.path.isfile(folder / name):
            lines.append(f"{name!r}: no such file")
            continue
        try:
            opened[name] = open_shard(folder / name)
        except CheckpointError as error:
            lines.append(str(error))
    formats = sorted({manifest.format for manifest in opened.values()})
    if len(formats) > 1:
        lines.append(f"the shards are of {len(formats)} formats, {' and '.join(formats)}; wanted one")
    return opened


def _mismatches(placed: Mapping[str, str | None], opened: Mapping[str, Manifest]) -> list[str]:
    """One line for every tensor that is not where the index says, or where the index says nothing."""
    lines = [
        f"{name}: is not in {shard}, where the index looks for it"
        for name, shard in placed.items()
        if shard is not None
        and shard in opened
        and name not in opened[shard].tensors.keys() | opened[shard].unreadable.keys()
    ]
    for shard, manifest in opened.items():
        for name in manifest.tensors:
            if name not in placed:
                lines.append(f"{name}: is in {shard}, the index does not name it")
            elif placed[name] != shard:
                lines.append(f"{name}: is in {shard}, the index looks for it in {placed[name]}")
    return lines


def _metadata(index: Mapping[str, Any]) -> dict[str, object]:
    """The plain values that stand beside the map."""
    metadata = index.get("metadata")
    items = metadata.items() if isinstance(metadata, dict) else ()
    return {f"metadata.{key}": value for key, value in items if isinstance(value, (str, int, float))}


def open_sharded(path: Path, open_shard: Callable[[Path], Manifest]) -> Manifest:
    """The manifest of all shards that the index at `path` names, each opened by `open_shard`.

    Its format is the shards'. A shard may be a link, as in the Hub's cache, but its name must lie below the
    index's folder. Raises one CheckpointError that lists every shard that is missing, damaged or elsewhere
    and every tensor that index and shards do not agree on.
    """
    state = LocalFile(path).state()
    index = _read_index(path, state.size)
    placed = {name: _shard_name(said) for name, said in index["weight_map"].items()}
    lines = [
        f"{name}: is said to be in {str(index['weight_map'][name])[:100]!r}, which is no file in this folder"
        for name, shard in placed.items()
        if shard is None
    ]
    shards = {shard: None for shard in placed.values() if shard is not None}
    opened = _open_shards(path.parent, shards, open_shard, lines)
    lines += _mismatches(placed, opened)
    if lines:
        raise CheckpointError(
            path,
            f"does not fit its shards in {len(lines)} place(s). Copy or download them again.{listed(lines)}",
        )
    files: dict[ByteSource, FileState] = {LocalFile(path): state}
    values, storages = _metadata(index), dict[ByteSource, tuple[int, ...]]()
    unreadable: dict[str, str] = {}
    containers: dict[str, str] = {}
    for manifest in opened.values():
        unreadable |= manifest.unreadable
        containers |= manifest.containers
        values |= manifest.values
        files |= manifest.files
        storages |= manifest.storages
    spans = {
        name: opened[shard].tensors[name]
        for name, shard in placed.items()
        if shard is not None and name not in unreadable
    }
    first, is_plain = next(iter(opened.values())), all(manifest.is_plain for manifest in opened.values())
    rest = (first.modules, unreadable, is_plain, containers)
    return validate(Manifest(path, first.format, spans, values, files, storages, *rest))
