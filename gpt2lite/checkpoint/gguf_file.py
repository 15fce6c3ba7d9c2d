"""llama.cpp's GGUF files, written through the package gguf, an extra, and read back to be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from gpt2lite.checkpoint.manifest import Manifest, contiguous_span
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.checkpoint.writing import TensorToWrite, Wrote
from gpt2lite.errors import UsageError

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KINDS = {str: "STRING", int: "UINT32", float: "FLOAT32", bool: "BOOL", list: "ARRAY"}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UsageError("to write .gguf files, pip install 'gpt2lite[gguf]'") from None
    return gguf


def fill_gguf(
    path: Path, tensors: Sequence[TensorToWrite], wrote: Wrote, architecture: str, fields: Mapping[str, Any]
) -> None:
    """Write a new file, a chunk in memory at a time; `fields` are its keys and values, in their types.

    Raises UsageError for a dtype that llama.cpp does not compute in, or without the package gguf.
    """
    gguf = _gguf()
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        for key, value in fields.items():
            writer.add_key_value(key, value, gguf.GGUFValueType[KINDS[type(value)]])
        for tensor in tensors:
            if tensor.dtype not in CODES:
                raise UsageError(f"{tensor.name} is {tensor.dtype}; pass a dtype (--dtype float32)")
            code = gguf.GGMLQuantizationType[CODES[tensor.dtype]]
            writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            for chunk in tensor.chunks():
                file.write(chunk)
                wrote(len(chunk))
        writer.write_padding(file, file.tell())


def read_back(path: Path) -> Manifest:
    """The tensors of a file that `fill_gguf` wrote."""
    source, dtypes = ByteSource(path), {code: dtype for dtype, code in CODES.items()}
    spans = {}
    for found in _gguf().GGUFReader(path).tensors:
        shape, offset = tuple(map(int, reversed(found.shape))), int(found.data_offset)
        dtype = dtypes[found.tensor_type.name]
        spans[found.name] = contiguous_span(found.name, dtype, shape, source, offset, int(found.n_bytes))
    return Manifest(path, "gguf", spans, files={source: source.state()})
