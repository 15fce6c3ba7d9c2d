"""The safetensors format: 8 bytes of header length, a JSON header, the tensors without gaps.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gpt2lite.checkpoint.foreign import DAMAGED
from gpt2lite.checkpoint.json_text import MAX_JSON_BYTES, json_object
from gpt2lite.checkpoint.manifest import BOUND_CONFIG, Manifest, TensorSpan, are_sizes, contiguous_span
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.checkpoint.writing import Config, TensorToWrite, Wrote, made_ahead
from gpt2lite.errors import CheckpointError, UsageError

ALIGNMENT = 8
FLUSH_BYTES = 64 << 20

NUMBERS = (("I", "int", (8, 16, 32, 64)), ("U", "uint", (8, 16, 32, 64)), ("F", "float", (16, 32, 64)))
DTYPES = {f"{code}{n}": getattr(torch, f"{name}{n}") for code, name, bits in NUMBERS for n in bits}
DTYPES |= {"BOOL": torch.bool, "BF16": torch.bfloat16, "C64": torch.complex64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz}
DTYPES |= {"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz}
CODES = {dtype: code for code, dtype in DTYPES.items()}


# ---- reading -----------------------------------------------------------------------------------------------


def _span(source: ByteSource, name: str, entry: Any, start: int) -> TensorSpan | str:
    """Where a tensor lies, or why it is not read; `start` is the byte where the tensors begin."""
    match entry:
        case {"dtype": str(code), "shape": [*sizes], "data_offsets": [begin, end]} if are_sizes(
            (*sizes, begin, end)
        ):
            shape, nbytes = tuple(sizes), end - begin
        case _:
            what = f"{name} is described by {str(entry)[:200]}, which is not dtype, shape, offsets"
            raise CheckpointError(source, what, name=name)
    if code not in DTYPES and nbytes >= 0:
        return f"has dtype {code}, which torch lacks; known: {' '.join(DTYPES)}"
    return contiguous_span(name, DTYPES.get(code, torch.uint8), shape, source, start + begin, nbytes)


def _check_gapless(source: ByteSource, header: dict[str, Any], nbytes: int) -> None:
    """The tensors must fill the file from header to end: no gap to hide data in, no overlap, nothing cut."""
    at = 0
    for (begin, end), name in sorted((entry["data_offsets"], name) for name, entry in header.items()):
        if begin != at:
            what = f"{name} begins at byte {begin} of the data, expected at {at}"
            raise CheckpointError(source, what, name=name)
        at = end
    if at != nbytes:
        raise CheckpointError(source, f"its tensors end at byte {at} of {nbytes}: {DAMAGED}")


def open_safetensors(source: ByteSource) -> Manifest:
    """The manifest of a `.safetensors` file. Raises CheckpointError for a header that lies.

    A tensor of a dtype that torch lacks is unreadable.
    """
    state = source.state()
    with source.open() as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_JSON_BYTES or 8 + length > state.size:
            what = f"announces a header of {length} bytes in a file of {state.size}: {DAMAGED}"
            raise CheckpointError(source, what)
        header = json_object(source, file.read(length), "its header is ")
    metadata = header.pop("__metadata__", {})
    found = {name: _span(source, name, entry, 8 + length) for name, entry in header.items()}
    _check_gapless(source, header, state.size - 8 - length)
    items = metadata.items() if isinstance(metadata, dict) else ()
    spans = {name: span for name, span in found.items() if isinstance(span, TensorSpan)}
    unreadable = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    values = {f"__metadata__.{key}": value for key, value in items}
    return Manifest(source.path, "safetensors", spans, values, {source: state}, unreadable=unreadable)


# ---- writing -----------------------------------------------------------------------------------------------


def make_header(tensors: Iterable[TensorToWrite], config: Config | None) -> bytes:
    """The length and the JSON header, padded with spaces so that the data begin aligned."""
    bound = {} if config is None else {BOUND_CONFIG: json.dumps(config)}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **bound}}
    end = 0
    for tensor in tensors:
        if tensor.dtype not in CODES:
            raise UsageError(f"{tensor.name} is {tensor.dtype}, for which safetensors has no code")
        begin, end = end, end + tensor.nbytes
        offsets = {"shape": tensor.shape, "data_offsets": (begin, end)}
        entries[tensor.name] = {"dtype": CODES[tensor.dtype], **offsets}
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def fill_safetensors(
    path: Path, tensors: Sequence[TensorToWrite], wrote: Wrote, config: Config | None = None
) -> None:
    """Write a new `.safetensors` file, two chunks in memory at a time; the config goes into its metadata.

    A thread has the disk take what is written while more is made. The format cannot tie: tensors that share
    another's bytes are written again. Raises UsageError for a dtype that the format lacks.
    """
    header = make_header(tensors, config)
    with open(path, "xb") as file, ThreadPoolExecutor(1) as flusher:
        file.write(header)
        flush, waiting = Future[Any](), 0
        flush.set_result(None)
        for chunk in made_ahead(itertools.chain.from_iterable(tensor.chunks() for tensor in tensors)):
            waiting += file.write(chunk)
            if waiting >= FLUSH_BYTES and flush.done():
                flush.result()
                with suppress(RuntimeError):  # the system grants no thread
                    flush, waiting = flusher.submit(os.fsync, file.fileno()), 0
            wrote(len(chunk))
        flush.result()  # whose error no later fsync would say again


def fill_safetensors_folder(
    folder: Path, tensors: Sequence[TensorToWrite], wrote: Wrote, max_shard_bytes: int | None = None
) -> None:
    """Write a new folder of `model.safetensors`, or of shards and an index where that would be too large."""
    folder.mkdir()
    if max_shard_bytes is None:
        fill_safetensors(folder / "model.safetensors", tensors, wrote)
        return
    from huggingface_hub import split_state_dict_into_shards_factory  # half a second to import

    named = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        fill_safetensors(folder / file, [named[name] for name in names], wrote)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
