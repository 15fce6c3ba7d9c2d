"""What shape a checkpoint's model has: said by its tensors, beside them, or by the caller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from gpt2lite.checkpoint import side_file
from gpt2lite.config import OFFICIAL_HEADS, GPTConfig
from gpt2lite.dialects.reading import Reading, block_of
from gpt2lite.errors import CheckpointError, UsageError

# Their words for our config's fields, in config.json, hparams.json and beside the weights in a file.
CONFIG_WORDS = {
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "n_embd": "emb_dim",
    "resid_pdrop": "drop_rate",
    "dropout": "drop_rate",
    "activation_function": "activation",
}
ACTIVATION_WORDS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# What weights do not tell, what it is where nobody can know, and what no memory depends on.
UNSAYABLE: dict[str, Any] = {"n_heads": 1, "activation": "gelu_tanh"}
# Variants of GPT-2 that share its names and not its arithmetic.
CONFIG_MUST_BE = {
    "activation_function": tuple(ACTIVATION_WORDS),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


def size_of(reading: Reading) -> tuple[int, int]:
    """(n_layers, emb_dim) by names and shapes; emb_dim is 0 where no embedding tells it."""
    token = reading.placements.get("tok_emb.weight")
    shape = reading.manifest.tensors[token.source].shape if token else ()
    return 1 + max(map(block_of, reading.placements)), shape[1] if len(shape) == 2 else 0


def _said_elsewhere(reading: Reading) -> dict[str, Any]:
    """What `<stem>.json`, the file's own wrapper, and a Hub folder's config say of n_heads and drop_rate.

    The nearer to the weights, the more it counts; a config of other sizes belongs to another model.
    """
    manifest = reading.manifest
    said: dict[str, Any] = {}
    beside = side_file(manifest.path, ".json")
    folder = beside.parent
    own_words = {name.rpartition(".")[2]: value for name, value in manifest.values.items()}
    configs = [
        _read_json(path) for path in (folder / "hparams.json", folder / "config.json") if path.is_file()
    ]
    for words in (*configs, own_words, _read_json(beside) if beside.is_file() else {}):
        ours = {CONFIG_WORDS.get(key, key): value for key, value in words.items()}
        sizes = dict(zip(("n_layers", "emb_dim"), size_of(reading), strict=True))
        if all(ours.get(key, size) == size for key, size in sizes.items()):
            said |= words | ours
    if "activation" in said:
        said["activation"] = ACTIVATION_WORDS.get(said["activation"], said["activation"])
    for key, allowed in CONFIG_MUST_BE.items():
        if key in said and said[key] not in allowed:
            raise CheckpointError(
                f"{manifest.path}: its config has {key}={said[key]!r}; GPT-2 has {allowed[0]!r}"
            )
    kinds = {"n_heads": (int, float), "drop_rate": (int, float), "activation": (str,)}
    return _known_activation(reading) | {k: said[k] for k, kind in kinds.items() if type(said.get(k)) in kind}


def _known_activation(reading: Reading) -> dict[str, str]:
    """What a dialect's own program computes with; of nanoGPT's names several programs make use.

    nanoGPT's files hold model_args and, of late, no masks; minGPT's hold masks and no model_args.
    """
    if reading.dialect != "nanogpt" or reading.manifest.format == "llmc":
        return {"activation": "gelu_tanh"}
    is_nano = any(".model_args." in f".{name}" for name in reading.manifest.values)
    if is_nano == bool(reading.masks):
        return {}
    return {"activation": "gelu" if is_nano else "gelu_tanh"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not sound JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, wanted an object of config fields")
    return found


def _said_by_shapes(reading: Reading) -> dict[str, Any]:
    """Everything that names, shapes and shared storage tell; all but n_heads, drop_rate and activation."""
    tensors, placements = reading.manifest.tensors, reading.placements
    lacking = [name for name in ("tok_emb.weight", "pos_emb.weight") if name not in placements]
    if lacking:
        raise CheckpointError(f"{reading.manifest.path}: holds no {' and no '.join(lacking)}")
    token = tensors[placements["tok_emb.weight"].source]
    position = tensors[placements["pos_emb.weight"].source]
    head = tensors[placements["out_head.weight"].source]
    if len(token.shape) != 2 or len(position.shape) != 2:
        raise CheckpointError(
            f"{reading.manifest.path}: {token.name} {token.shape} and {position.name} {position.shape} "
            "must be (vocab_size, emb_dim) and (context_length, emb_dim)"
        )
    changed_alone = {"tok_emb.weight", "out_head.weight"} & {adapter.weight for adapter in reading.adapters}
    return {
        "vocab_size": token.shape[0],
        "context_length": position.shape[0],
        "emb_dim": token.shape[1],
        "n_layers": size_of(reading)[0],
        "qkv_bias": any(name.endswith(".W_query.bias") for name in placements),
        "bias": "final_norm.shift" in placements,
        "tied_head": token.address == head.address and not changed_alone,
        "n_classes": head.shape[0] if head.shape[:1] != token.shape[:1] else 0,
        "head_bias": "out_head.bias" in placements,
    }


def find_config(reading: Reading, config: GPTConfig | Mapping[str, Any] | None = None) -> GPTConfig:
    """The config of a checkpoint; what `config` says wins, what it leaves out is found.

    The head count is in no shape. It is looked for in `<stem>.json`, in the file's own wrapper, in
    config.json or hparams.json, and last among the official sizes. Raises CheckpointError where it cannot be
    known.
    """
    if isinstance(config, GPTConfig):
        return config
    if not isinstance(config, (Mapping, NoneType)):
        raise UsageError(f"config must be a GPTConfig, a dict or None, got {config!r}")
    GPTConfig.check_names(config or {})
    shapes = _said_by_shapes(reading)
    merged = _said_elsewhere(reading) | shapes | dict(config or {})
    merged.setdefault("n_heads", OFFICIAL_HEADS.get((merged["n_layers"], merged["emb_dim"])))
    if merged["n_heads"] is None:
        raise CheckpointError(
            f"{reading.manifest.path}: the number of attention heads cannot be read off weights, and "
            f"{merged['n_layers']} layers of {merged['emb_dim']} are no official size. Pass "
            f'config={{"n_heads": …}} (--n-heads for commands) or put it as {{"n_heads": …}} into '
            f"{side_file(reading.manifest.path, '.json').name} beside it."
        )
    if "activation" not in merged:
        raise CheckpointError(
            f"{reading.manifest.path}: may be of nanoGPT, whose GELU is exact, or of minGPT or older "
            'nanoGPT, whose GELU is the tanh approximation. Pass config={"activation": "gelu"} or '
            '{"activation": "gelu_tanh"} (--activation for commands)'
        )
    try:
        return GPTConfig.of(merged)
    except UsageError as error:
        blame = UsageError if config else CheckpointError
        raise blame(f"{reading.manifest.path}: {error}") from None
