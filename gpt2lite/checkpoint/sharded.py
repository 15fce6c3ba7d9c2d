"""A checkpoint in several files with an index: JSON whose `weight_map` says which file holds which tensor.

Format: transformers writes it for `save_pretrained(max_shard_size=…)`, around safetensors or pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath

from gpt2lite.checkpoint.foreign import what_is_json
from gpt2lite.checkpoint.manifest import Manifest, joined
from gpt2lite.checkpoint.safetensors import json_object
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.errors import CheckpointError, listed

INDEX_SUFFIX = ".index.json"
MAX_INDEX_BYTES = 64 << 20


def _shard_name(said: object) -> str | None:
    """A file below the index's folder, spelled in one way; None for what could lie elsewhere."""
    if not isinstance(said, str) or "\\" in said or PureWindowsPath(said).drive:
        return None
    name = PurePosixPath(said)
    return str(name) if name.parts and not name.is_absolute() and ".." not in name.parts else None


def _open_shards(
    index: ByteSource, placed: Mapping[str, str], open_shard: Callable[[ByteSource], Manifest]
) -> tuple[dict[str, Manifest], list[str]]:
    """The manifests of all shards that can be opened; a line for each that cannot, or that does not fit."""
    opened, lines = dict[str, Manifest](), list[str]()
    for shard in dict.fromkeys(placed.values()):
        try:
            opened[shard] = open_shard(index.sibling(shard))
        except CheckpointError as error:
            lines.append(f"{error}")
        except (OSError, ValueError) as error:  # of a name that no file can have
            lines.append(f"{shard!r}: cannot be opened ({error})")
    stored = {shard: found.tensors.keys() | found.unreadable.keys() for shard, found in opened.items()}
    lines += [
        f"{name}: is not in {shard}, where the index looks for it"
        for name, shard in placed.items()
        if name not in stored.get(shard, {name})
    ]
    lines += [
        f"{name}: is in {shard}; the index says {placed.get(name, 'nothing')}"
        for shard, manifest in opened.items()
        for name in manifest.tensors
        if placed.get(name) != shard
    ]
    formats = sorted({manifest.format for manifest in opened.values()})
    if len(formats) > 1:
        lines.append(f"the shards are of {len(formats)} formats, {' and '.join(formats)}; wanted one")
    return opened, lines


def open_sharded(source: ByteSource, open_shard: Callable[[ByteSource], Manifest]) -> Manifest:
    """The manifest of all shards that an index names, each opened by `open_shard`.

    Its format is the shards'. A shard may be a link, as in the Hub's cache, but its name must lie below the
    index's folder. Raises one CheckpointError that lists every shard that is missing, damaged or elsewhere
    and every tensor that index and shards do not agree on.
    """
    state = source.state()
    if state.size > MAX_INDEX_BYTES:
        raise CheckpointError(source, f"has {state.size} bytes; an index ends at {MAX_INDEX_BYTES >> 20} MiB")
    with source.open() as file:
        index = json_object(source, file.read(), "index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(source, f"has no weight_map that names tensors; it is {what_is_json(index)}")
    found = {name: _shard_name(said) for name, said in weight_map.items()}
    lines = [
        f"{name}: is said to be in {str(weight_map[name])[:100]!r}, which is not a file in this folder"
        for name, shard in found.items()
        if shard is None
    ]
    placed = {name: shard for name, shard in found.items() if shard is not None}
    opened, more = _open_shards(source, placed, open_shard)
    if lines := lines + more:
        what = f"does not fit its shards in {len(lines)} place(s). Copy or download them again."
        raise CheckpointError(source, what + listed(lines))
    items = metadata.items() if isinstance(metadata, dict) else ()
    values = {f"metadata.{key}": value for key, value in items if isinstance(value, (str, int, float))}
    first = next(iter(opened.values()))
    own = Manifest(source.path, first.format, {}, values, {source: state})
    return joined([own, *opened.values()])
