"""What lies on disk: `open_checkpoint` recognises a file by its content and returns its `Manifest`.

In a folder, which file it is is decided by what lies there, and asked where two could be; or each file is one
tensor, the article's last recipe; or an index says which file holds which tensor, as transformers'
`save_pretrained(max_shard_size=…)` writes it, around safetensors or pickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from gpt2lite.checkpoint import dcp, llmc_bin, tf_bundle, torch_zip
from gpt2lite.checkpoint.foreign import READABLE, shortened, what_is, what_is_json
from gpt2lite.checkpoint.json_text import read_json
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, joined, validate
from gpt2lite.checkpoint.remote import Place, RemotePath
from gpt2lite.checkpoint.safetensors import open_safetensors
from gpt2lite.checkpoint.source import ByteSource, children, lies, source_of
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError, listed

# A folder from the Hub holds its weights under one of these names. The first that is there counts, as in
# transformers: a single file before an index of shards, safetensors before pickles.
INDEX_SUFFIX = ".index.json"
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
FOLDER_FILES = tuple(name + end for name in WHOLE_FILES for end in ("", INDEX_SUFFIX))
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
NOT_READ = (".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".npz", ".pb")  # opened to say what they are
# What training and other programs leave beside the weights.
PASSENGER = re.compile(
    r"(optimizer|scheduler|rng_state|training_args|scaler|sampler|adapter|tokenizer|train\.|val\.).*"
    r"|.*(optim_states|_tokenizer|_debug_state|scheduler|optimizer)\.\w+"
)
ZERO_TO_FP32 = "join them with DeepSpeed's zero_to_fp32.py, which lies in the folder above"
# (pattern, so many at least): what it is, and what to do.
DIVIDED = {
    ("zero_pp_rank_*_model_states.pt", 1): f"DeepSpeed's ZeRO-3 checkpoint, in parts; {ZERO_TO_FP32}",
    ("*model_states.pt", 2): f"DeepSpeed's checkpoint of several model-parallel ranks; {ZERO_TO_FP32}",
    ("*.distcp", 1): f"a distributed checkpoint of torch (FSDP, DCP); join it: {dcp.DCP_TO_TORCH}",
}
OPTIMIZER = re.compile(r"(.*\.)?(state\.\d+|param_groups|optim\w*)\..*")  # names of an optimizer's tensors

__all__ = ["FOLDER_FILES", "Manifest", "TensorSpan", "open_checkpoint", "side_file"]


# ---- a file ------------------------------------------------------------------------------------------------


def _open_file(source: ByteSource, is_shard: bool = False) -> Manifest:
    """Open a file by its first and last bytes. Raises CheckpointError for one of no known kind."""
    size = source.state().size
    with source.open() as file:
        head = file.read(512) if size else b""  # files of /proc say so, and may not end
        file.seek(max(size - len(tf_bundle.MAGIC), 0))
        tail = file.read(len(tf_bundle.MAGIC))
    rows: dict[Callable[[ByteSource], Manifest], bool] = {
        torch_zip.open_torch_zip: head.startswith(b"PK\x03\x04"),
        llmc_bin.open_llmc: head.startswith(llmc_bin.MAGIC) and head[4:8] != bytes(4),
        # a brace that is not within the length of a safetensors header
        open_sharded: head.lstrip()[:1] == b"{" and b"\0" not in head[:8],
        tf_bundle.open_tf_bundle: tail == tf_bundle.MAGIC,
        open_safetensors: head[8:9] == b"{" and not (any(head[4:8]) and what_is(head)),
        torch_zip.open_torch_legacy: torch_zip.MAGIC in head[:32] or head.startswith(torch_zip.MAGIC_TEXT),
    }
    opener = next((opener for opener, is_it in rows.items() if is_it), None)
    if opener is None:
        said = what_is(head)
        raise CheckpointError(source, f"is {said}" if said else f"begins with {head[:8]!r}, {READABLE}")
    if is_shard and opener is open_sharded:
        raise CheckpointError(source, "expected a shard, found an index")
    return opener(source)


# ---- shards with an index ----------------------------------------------------------------------------------


def _shard_name(said: object) -> str | None:
    """A file below the index's folder, spelled in one way; None for what could lie elsewhere."""
    if not isinstance(said, str) or "\\" in said or PureWindowsPath(said).drive:
        return None
    name = PurePosixPath(said)
    return str(name) if name.parts and not name.is_absolute() and ".." not in name.parts else None


def _open_shards(index: ByteSource, placed: Mapping[str, str]) -> tuple[dict[str, Manifest], list[str]]:
    """The manifests of all shards that can be opened; a line for each that cannot, or that does not fit."""
    opened, lines = dict[str, Manifest](), list[str]()
    for shard in dict.fromkeys(placed.values()):
        try:
            opened[shard] = _open_file(index.sibling(shard), is_shard=True)
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


def open_sharded(source: ByteSource) -> Manifest:
    """The manifest of all shards that an index names.

    Its format is the shards'. A shard may be a link, as in the Hub's cache, but its name must lie below the
    index's folder. Raises one CheckpointError that lists every shard that is missing, damaged or elsewhere
    and every tensor that index and shards do not agree on.
    """
    state = source.state()
    index = read_json(source)
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
    opened, more = _open_shards(source, placed)
    if lines := lines + more:
        what = f"does not fit its shards in {len(lines)} place(s). Copy or download them again."
        raise CheckpointError(source, what + listed(lines))
    items = metadata.items() if isinstance(metadata, dict) else ()
    values = {f"metadata.{key}": value for key, value in items if isinstance(value, (str, int, float))}
    first = next(iter(opened.values()))
    own = Manifest(source.path, first.format, {}, values, {source: state})
    return joined([own, *opened.values()])


# ---- a folder ----------------------------------------------------------------------------------------------


def _candidates(folder: Place, tensors: Container[Place]) -> list[Place]:
    """The files of a folder that may be a checkpoint, by their names; else one that can only be named."""
    files = [file for file in children(folder) if file.is_file() and file not in tensors]
    found = [file for file in files if file.suffix in SUFFIXES and not PASSENGER.fullmatch(file.name)]
    return found or [file for file in files if file.suffix in NOT_READ][:1]


def _without_weights(folder: Place) -> CheckpointError:
    """The error for a folder that holds no checkpoint, with the folder in it that is likely meant."""
    names = [child.name for child in children(folder)]
    inner = sorted((child for child in children(folder) if child.is_dir()), key=_number)
    likely = f". Did you mean {inner[-1]}?" if inner and (_number(inner[-1]) >= 0 or not inner[1:]) else ""
    wanted = f"{', '.join(FOLDER_FILES)}, one file ending in {', '.join(SUFFIXES)}"
    more = f"one .pt file per tensor, or a .index of TensorFlow; found {shortened(names)}{likely}"
    return CheckpointError(folder, f"a folder without weights; wanted {wanted}, {more}")


def _number(folder: Place) -> int:
    """The step at the end of a folder's name, `checkpoint-500` or `global_step1`; -1 where there is none."""
    found = re.search(r"\d+$", folder.name)
    return int(found.group()) if found else -1


def _open_tensors(folder: Place) -> dict[Place, Manifest]:
    """The `.pt` files of a folder that are one tensor each, named as its file is. Reads all headers."""
    found = dict[Place, Manifest]()
    for file in children(folder, "*.pt"):
        with suppress(CheckpointError):  # a damaged file is not one of them
            manifest = torch_zip.open_torch_zip(source_of(file))
            if list(manifest.tensors) == [""]:
                tensors = {file.stem: replace(manifest.tensors[""], name=file.stem)}
                found[file] = replace(manifest, path=folder, format="tensor_folder", tensors=tensors)
    return found


def _open_folder(path: Place) -> Manifest:
    """The checkpoint that a folder is or holds. Raises CheckpointError where none or more than one does."""
    if named := next((path / name for name in FOLDER_FILES if lies(path / name)), None):
        return _open_file(source_of(named))
    if lies(path / dcp.METADATA) and isinstance(path, Path):
        return dcp.open_dcp(path)
    for (pattern, least), said in DIVIDED.items():
        if len(children(path, pattern)) >= least:
            raise CheckpointError(path, said)
    tensors = _open_tensors(path)
    files = _candidates(path, tensors)
    if len(files) == 1 and len(tensors) < 2:
        return _open_file(source_of(files[0]))
    if files:
        found = f"{len(tensors)} files of exactly one tensor each and " if len(tensors) > len(files) else ""
        names = shortened(file.name for file in files)
        raise CheckpointError(path, f"holds {found}{names}; pass the one that is the checkpoint")
    if tensors:
        return joined(list(tensors.values()))
    if indices := children(path, "*.index"):
        return tf_bundle.open_tf_bundle(source_of(tf_bundle.current_index(path, indices)))
    raise _without_weights(path)


# ---- a path ------------------------------------------------------------------------------------------------


def side_file(path: Place, suffix: str) -> Place:
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

    A folder is what its content says: a Hub model's (the first of FOLDER_FILES counts), one file, or a tensor
    a file. Reads no tensor data and allocates none. Raises CheckpointNotFoundError, or CheckpointError for a
    file that is damaged, of an unknown kind, or wants to run code, and for a folder that holds two.
    """
    place = path if isinstance(path, RemotePath) else Path(path)
    if lies(place):
        manifest = _open_folder(place) if place.is_dir() else _open_file(source_of(place))
    elif (index := tf_bundle.index_of(place)).is_file():
        manifest = tf_bundle.open_tf_bundle(source_of(index))
    else:
        raise CheckpointNotFoundError(path, "no such file or folder")
    if manifest.tensors and all(map(OPTIMIZER.fullmatch, manifest.tensors)):
        raise CheckpointError(manifest.path, "only an optimizer's state; pass the weights file")
    return validate(manifest)
