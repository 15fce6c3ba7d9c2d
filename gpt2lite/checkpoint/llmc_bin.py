"""llm.c's `.bin`: 256 int32 of header, then sixteen blocks, each of one parameter of all layers in a row.

Weights are (out, in) as in nanoGPT, whose names they get. Format: llm.c, `train_gpt2.py`, `write_model`.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import torch

from gpt2lite.checkpoint.foreign import DAMAGED
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, contiguous_stride
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.errors import CheckpointError

HEADER = struct.Struct("<256i")
MAGIC = (20240326).to_bytes(4, "little")  # by which `open_checkpoint` knows it
DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
MAX_LAYERS = 1000  # of which a header of 1 KiB can speak; GPT-2 XL has 48
EMBEDDINGS = ("wte", "wpe")  # which have no bias

# Modules in the order of the file, with their weights' shapes in the words of the header. After each weight
# lies a bias of its rows, but for the embeddings; "{i}" stands for every layer.
MODULES = {
    "wte": ("Vp", "C"),
    "wpe": ("T", "C"),
    "h.{i}.ln_1": ("C",),
    "h.{i}.attn.c_attn": ("3C", "C"),
    "h.{i}.attn.c_proj": ("C", "C"),
    "h.{i}.ln_2": ("C",),
    "h.{i}.mlp.c_fc": ("4C", "C"),
    "h.{i}.mlp.c_proj": ("C", "4C"),
    "ln_f": ("C",),
}
# The header after magic and version; the padded vocabulary's rows are stored, those of the other are used.
FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "padded_vocab_size")


def _read_header(source: ByteSource) -> tuple[torch.dtype, dict[str, int]]:
    """The dtype of all tensors, and the model's numbers. Refuses what no model can have, all at once."""
    with source.open() as file:
        data = file.read(HEADER.size)
    if len(data) < HEADER.size:
        raise CheckpointError(source, f"ends within its llm.c header, at byte {len(data)}: {DAMAGED}")
    _, version, *numbers = HEADER.unpack(data)
    if version not in DTYPES:
        wanted = "wanted version 3 (float32) or 5 (bfloat16). Write it again with a newer llm.c."
        raise CheckpointError(source, f"an llm.c file of version {version}; {wanted}")
    said = dict(zip(FIELDS, numbers, strict=False))
    wrong = [f"{name} is {value}, wanted at least 1" for name, value in said.items() if value < 1]
    if said["n_layer"] > MAX_LAYERS:
        wrong.append(f"n_layer is {said['n_layer']}, wanted at most {MAX_LAYERS}")
    if said["padded_vocab_size"] < said["vocab_size"]:
        wrong.append(f"padded_vocab_size is {said['padded_vocab_size']}, less than vocab_size")
    if said["n_head"] > 0 and said["n_embd"] % said["n_head"]:
        wrong.append(f"n_embd {said['n_embd']} is not a multiple of n_head {said['n_head']}")
    if any(numbers[len(FIELDS) :]):
        wrong.append("it has more than eight numbers")
    if wrong:
        raise CheckpointError(source, f"its llm.c header is damaged: {'; '.join(wrong)}")
    return DTYPES[version], said


def open_llmc(source: ByteSource) -> Manifest:
    """The manifest of an llm.c checkpoint, version 3 or 5, under nanoGPT's names, (out, in).

    `wte.weight` has the vocabulary's rows alone, without the padding after them. Raises CheckpointError for
    another version, a header that no model can have, and a file that is not exactly as long as it says.
    """
    state = source.state()
    dtype, said = _read_header(source)
    C = said["n_embd"]
    sizes = {"Vp": said["padded_vocab_size"], "T": said["block_size"], "C": C, "3C": 3 * C, "4C": 4 * C}
    spans, offset = dict[str, TensorSpan](), HEADER.size
    for module, words in MODULES.items():
        shape, count = tuple(sizes[word] for word in words), said["n_layer"] if "{i}" in module else 1
        parts = {"weight": shape} if module in EMBEDDINGS else {"weight": shape, "bias": shape[:1]}
        for leaf, own in parts.items():
            for i in range(count):  # all layers of one parameter in a row
                name = f"{module}.{leaf}".format(i=i)
                spans[name] = TensorSpan(name, dtype, own, contiguous_stride(own), source, offset)
                offset += spans[name].nbytes
    if offset != state.size:
        what = f"its llm.c header describes {offset} bytes, the file has {state.size}: {DAMAGED}"
        raise CheckpointError(source, what)
    spans["wte.weight"] = replace(spans["wte.weight"], shape=(said["vocab_size"], C))
    values = {name: said[name] for name in ("n_head", "vocab_size", "block_size")} | {"format": "llm.c"}
    return Manifest(source.path, "llmc", spans, values, {source: state})
