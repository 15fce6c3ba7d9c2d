"""The safetensors format: 8 bytes of header length, a JSON header, the tensors without gaps.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from gpt2lite.checkpoint.manifest import (
    Manifest,
    TensorSpan,
    are_sizes,
    contiguous_stride,
    is_countable,
    validate,
)
from gpt2lite.checkpoint.source import LocalFile
from gpt2lite.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What a JSON object becomes, for `object_pairs_hook`; ValueError where a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the byte where the tensors begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                path,
                f"announces a header of {length} bytes in a file of {size}. "
                "It is truncated or not safetensors: copy or download it again.",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"its header is not sound JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(path, f"its header is a {type(header).__name__}, not an object")
    return header, 8 + length


def _span(path: Path, name: str, entry: Any, start: int) -> TensorSpan:
    match entry:
        case {"dtype": str(code), "shape": [*sizes], "data_offsets": [begin, end]} if are_sizes(
            (*sizes, begin, end)
        ):
            shape = tuple(sizes)
        case _:
            raise CheckpointError(
                path, f"{name} is described by {str(entry)[:200]}, which is not dtype, shape, offsets"
            )
    if code not in DTYPES:
        raise CheckpointError(
            path, f"{name} has dtype {code}, which torch does not have; known: {' '.join(DTYPES)}"
        )
    if not is_countable(shape, DTYPES[code]):
        raise CheckpointError(path, f"{name} has shape {shape}, more bytes than can be counted")
    span = TensorSpan(name, DTYPES[code], shape, contiguous_stride(shape), LocalFile(path), start + begin)
    if end - begin != span.nbytes:
        raise CheckpointError(path, f"{name} takes {end - begin} bytes, {code} {shape} needs {span.nbytes}")
    return span


def _check_gapless(path: Path, spans: list[TensorSpan], start: int, size: int) -> None:
    """The tensors must fill the file from header to end: no gap to hide data in, no overlap, nothing cut."""
    for span in sorted(spans, key=lambda span: (span.offset, span.nbytes)):
        if span.offset != start:
            raise CheckpointError(path, f"{span.name} begins at byte {span.offset}, expected at {start}")
        start += span.nbytes
    if start != size:
        raise CheckpointError(
            path,
            f"its tensors end at byte {start}, the file at {size}. "
            "It is truncated or damaged: copy or download it again.",
        )


def open_safetensors(path: Path) -> Manifest:
    """The manifest of a `.safetensors` file. Raises CheckpointError for a header that lies."""
    state = LocalFile(path).state()
    header, start = _read_header(path, os.path.getsize(path))
    metadata = header.pop("__metadata__", {})
    spans = {name: _span(path, name, entry, start) for name, entry in header.items()}
    _check_gapless(path, list(spans.values()), start, state.size)
    values = (
        {f"__metadata__.{key}": value for key, value in metadata.items()}
        if isinstance(metadata, dict)
        else {}
    )
    return validate(Manifest(path, "safetensors", spans, values, {LocalFile(path): state}))
