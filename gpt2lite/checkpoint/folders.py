"""A checkpoint in a folder: which file it is, or a tensor a file, or shards with an index.

Which file is decided by what lies there, and asked where two could be. A tensor a file is the article's last
recipe, `<parameter name>.pt`. An index is JSON whose `weight_map` says which file holds which tensor, as
transformers' `save_pretrained(max_shard_size=…)` writes it, around safetensors or pickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from gpt2lite.checkpoint.foreign import shortened, what_is_json
from gpt2lite.checkpoint.manifest import Manifest, joined
from gpt2lite.checkpoint.safetensors import json_object
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.checkpoint.torch_zip import fill_torch_zip, open_torch_zip
from gpt2lite.checkpoint.writing import TensorToWrite, Wrote, state_of
from gpt2lite.errors import CheckpointError, UsageError, listed

# A folder from the Hub holds its weights under one of these names. The first that is there counts, as in
# transformers: a single file before an index of shards, safetensors before pickles.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
NOT_READ = (".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".npz", ".pb")  # opened to say what they are
# What training and other programs leave beside the weights.
PASSENGER = re.compile(
    r"(optimizer|scheduler|rng_state|training_args|scaler|sampler|adapter|tokenizer|train\.|val\.).*"
    r"|.*(optim_states|_tokenizer|_debug_state|scheduler|optimizer)\.\w+"
)
ZERO_TO_FP32 = "join them with DeepSpeed's zero_to_fp32.py, which lies in the folder above"
DCP_TO_TORCH = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth"
# (pattern, so many at least): what it is, and what to do.
DIVIDED = {
    ("zero_pp_rank_*_model_states.pt", 1): f"DeepSpeed's ZeRO-3 checkpoint, in parts; {ZERO_TO_FP32}",
    ("*model_states.pt", 2): f"DeepSpeed's checkpoint of several model-parallel ranks; {ZERO_TO_FP32}",
    ("*.distcp", 1): f"a distributed checkpoint of torch (FSDP, DCP); join it: {DCP_TO_TORCH}",
}


def refuse_divided(folder: Path) -> None:
    """Raise CheckpointError for a checkpoint in parts that only the program that wrote it can join."""
    for (pattern, least), said in DIVIDED.items():
        if len(list(folder.glob(pattern))) >= least:
            raise CheckpointError(folder, said)


def candidates(folder: Path, tensors: Container[Path]) -> list[Path]:
    """The files of a folder that may be a checkpoint, by their names; else one that can only be named."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file not in tensors]
    found = [file for file in files if file.suffix in SUFFIXES and not PASSENGER.fullmatch(file.name)]
    return found or [file for file in files if file.suffix in NOT_READ][:1]


def without_weights(folder: Path) -> CheckpointError:
    """The error for a folder that holds no checkpoint, with the folder in it that is likely meant."""
    names = [child.name for child in folder.iterdir()]
    inner = sorted((child for child in folder.iterdir() if child.is_dir()), key=_number)
    likely = f". Did you mean {inner[-1]}?" if inner and (_number(inner[-1]) >= 0 or not inner[1:]) else ""
    wanted = f"{', '.join(FOLDER_FILES)}, one file ending in {', '.join(SUFFIXES)}"
    more = f"one .pt file per tensor, or a .index of TensorFlow; found {shortened(names)}{likely}"
    return CheckpointError(folder, f"a folder without weights; wanted {wanted}, {more}")


def _number(folder: Path) -> int:
    """The step at the end of a folder's name, `checkpoint-500` or `global_step1`; -1 where there is none."""
    found = re.search(r"\d+$", folder.name)
    return int(found.group()) if found else -1


# ---- a tensor a file ---------------------------------------------------------------------------------------


def open_tensors(folder: Path) -> dict[Path, Manifest]:
    """The `.pt` files of a folder that are one tensor each, named as its file is. Reads all headers."""
    found = {}
    for file in sorted(folder.glob("*.pt")):
        with suppress(CheckpointError):  # a damaged file is not one of them
            manifest = open_torch_zip(ByteSource(file))
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


# ---- shards with an index ----------------------------------------------------------------------------------


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
        raise CheckpointError(source, f"has {state.size} bytes; the limit is {MAX_INDEX_BYTES >> 20} MiB")
    with source.open() as file:
        index = json_object(source, file.read(), "its index is ")
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
