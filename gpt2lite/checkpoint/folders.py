"""Which file of a folder is the checkpoint: decided by what lies there, asked where two could be."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

from gpt2lite.checkpoint.foreign import shortened
from gpt2lite.errors import CheckpointError

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
