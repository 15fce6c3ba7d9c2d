"""llm.c's `.bin`: 256 int32 of header, then sixteen blocks, each of one parameter of all layers in a row.

Weights are (out, in) as in nanoGPT, whose names they get. Format: llm.c, `train_gpt2.py`, `write_model`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, contiguous_stride, validate
from gpt2lite.checkpoint.source import LocalFile
from gpt2lite.errors import CheckpointError

HEADER = struct.Struct("<256i")
MAGIC = (20240326).to_bytes(4, "little")  # by which `open_checkpoint` knows it
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
MAX_LAYERS = 10_000

# The blocks in the order of the file; "{i}" stands for every layer. Shapes in the words of the header.
BLOCKS = (
    ("wte.weight", ("Vp", "C")),
    ("wpe.weight", ("T", "C")),
    ("h.{i}.ln_1.weight", ("C",)),
    ("h.{i}.ln_1.bias", ("C",)),
    ("h.{i}.attn.c_attn.weight", ("3C", "C")),
    ("h.{i}.attn.c_attn.bias", ("3C",)),
    ("h.{i}.attn.c_proj.weight", ("C", "C")),
    ("h.{i}.attn.c_proj.bias", ("C",)),
    ("h.{i}.ln_2.weight", ("C",)),
    ("h.{i}.ln_2.bias", ("C",)),
    ("h.{i}.mlp.c_fc.weight", ("4C", "C")),
    ("h.{i}.mlp.c_fc.bias", ("4C",)),
    ("h.{i}.mlp.c_proj.weight", ("C", "4C")),
    ("h.{i}.mlp.c_proj.bias", ("C",)),
    ("ln_f.weight", ("C",)),
    ("ln_f.bias", ("C",)),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says, in its order; `padded_vocab_size` rows are stored, `vocab_size` of them used."""

    version: int
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    padded_vocab_size: int

    @property
    def dtype(self) -> torch.dtype:
        """That of all tensors."""
        return DTYPES[self.version]

    @property
    def sizes(self) -> dict[str, int]:
        """What the words in BLOCKS stand for."""
        C = self.n_embd
        return {"Vp": self.padded_vocab_size, "T": self.block_size, "C": C, "3C": 3 * C, "4C": 4 * C}


def _check(path: Path, header: Header) -> None:
    """Refuse numbers that no model can have, all at once."""
    lines = [
        f"{name} is {value}, wanted at least 1"
        for name in Header.__slots__
        if (value := getattr(header, name)) < 1
    ]
    if header.n_layer > MAX_LAYERS:
        lines.append(f"n_layer is {header.n_layer}, wanted at most {MAX_LAYERS}")
    if header.padded_vocab_size < header.vocab_size:
        lines.append(
            f"padded_vocab_size is {header.padded_vocab_size}, wanted at least vocab_size {header.vocab_size}"
        )
    if header.n_head > 0 and header.n_embd % header.n_head:
        lines.append(f"n_embd {header.n_embd} is no multiple of n_head {header.n_head}")
    if lines:
        raise CheckpointError(path, f"its llm.c header is damaged: {'; '.join(lines)}")


def _read_header(path: Path) -> Header:
    with open(path, "rb") as file:
        data = file.read(HEADER.size)
    if len(data) < HEADER.size:
        raise CheckpointError(
            path,
            f"ends within its llm.c header, at byte {len(data)} of {HEADER.size}. "
            "It is truncated: copy or download it again.",
        )
    _, version, *numbers = HEADER.unpack(data)
    if version not in DTYPES:
        raise CheckpointError(
            path,
            f"an llm.c file of version {version}; wanted version 3 (float32) "
            "or 5 (bfloat16). Write it again with a newer llm.c.",
        )
    header = Header(version, *numbers[:6])
    _check(path, header)
    if any(numbers[6:]):
        raise CheckpointError(path, "its llm.c header goes on after eight numbers: it is damaged")
    return header


def _blocks(header: Header) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and how often for every block, in the order of the file."""
    for name, words in BLOCKS:
        shape = tuple(header.sizes[word] for word in words)
        yield name, shape, header.n_layer if "{i}" in name else 1


def _spans(path: Path, header: Header) -> Iterator[TensorSpan]:
    """Every layer's part of every block, one after the other as they lie in the file."""
    offset = HEADER.size
    for name, shape, count in _blocks(header):
        for i in range(count):
            stride = contiguous_stride(shape)
            span = TensorSpan(name.format(i=i), header.dtype, shape, stride, LocalFile(path), offset)
            yield span
            offset += span.nbytes


def open_llmc(path: Path) -> Manifest:
    """The manifest of an llm.c checkpoint, version 3 or 5, under nanoGPT's names, (out, in).

    `wte.weight` has the vocabulary's rows alone, without the padding after them. Raises CheckpointError for
    another version, a header that no model can have, and a file that is not exactly as long as it says.
    """
    state = LocalFile(path).state()
    header = _read_header(path)
    numel = sum(math.prod(shape) * count for _, shape, count in _blocks(header))
    end = HEADER.size + numel * header.dtype.itemsize
    if end != state.size:
        raise CheckpointError(
            path,
            f"its llm.c header describes {end} bytes, the file has {state.size}. "
            "It is truncated or damaged: copy or download it again.",
        )
    spans = {span.name: span for span in _spans(path, header)}
    spans["wte.weight"] = replace(spans["wte.weight"], shape=(header.vocab_size, header.n_embd))
    values: dict[str, object] = {
        "n_head": header.n_head,
        "format": "llm.c",
        "vocab_size": header.vocab_size,
        "block_size": header.block_size,
    }
    return validate(Manifest(path, "llmc", spans, values, {LocalFile(path): state}))
