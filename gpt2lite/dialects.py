"""Whose checkpoint is this? Tables that say which view of which stored tensor each parameter of ours is.

A row is (their name, our name, placement); `{i}` stands for the block. Nothing else in the program knows a
foreign name, so another dialect is another table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from gpt2lite.checkpoint import Manifest, TensorSpan, side_file
from gpt2lite.config import OFFICIAL_HEADS, GPTConfig
from gpt2lite.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class Placement:
    """One parameter as a view of one stored tensor: part `part` of `parts` along `axis`, then transposed.

    `squeezed` drops a first axis of size 1 before; `axis` is counted without it.
    """

    source: str
    part: int = 0
    parts: int = 1
    axis: int = 0
    transposed: bool = False
    squeezed: bool = False

    def of(self, stored: Tensor) -> Tensor:
        """The parameter as a view of the stored tensor: no bytes move."""
        if self.squeezed:
            stored = stored[0]
        if self.parts > 1:
            stored = stored.chunk(self.parts, self.axis)[self.part]
        return stored.t() if self.transposed else stored

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, from the stored tensor's; the latter itself where the view cannot be."""
        shape = list(stored)
        if self.squeezed and shape[:1] == [1]:
            del shape[0]
        elif self.squeezed:
            return stored
        rank_needed = 2 if self.transposed else self.axis + 1 if self.parts > 1 else 0
        if len(shape) < rank_needed or (self.parts > 1 and shape[self.axis] % self.parts):
            return stored
        if self.parts > 1:
            shape[self.axis] //= self.parts
        return tuple(reversed(shape)) if self.transposed else tuple(shape)

    def stored_shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """The stored tensor's shape, from the parameter's."""
        shape = list(reversed(parameter) if self.transposed else parameter)
        if self.parts > 1:
            shape[self.axis] *= self.parts
        return (1, *shape) if self.squeezed else tuple(shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the view of a contiguous tensor is contiguous, too."""
        return not self.transposed and (self.parts == 1 or self.axis == 0)

    def unplace(self, parameter: Tensor) -> Tensor:
        """The parameter turned to stand like its part of the stored tensor, as a view."""
        turned = parameter.t() if self.transposed else parameter
        return turned[None] if self.squeezed else turned


Row = tuple[str, str, Placement]


def _row(theirs: str, ours: str, transposed: bool = False) -> Row:
    return theirs, ours, Placement(theirs, transposed=transposed)


def _fused(theirs: str, ours: str, axis: int, transposed: bool = False) -> list[Row]:
    """Query, key and value, stored as one tensor in this order along `axis`."""
    names = ("W_query", "W_key", "W_value")
    return [
        (theirs, ours.format(name, i="{i}"), Placement(theirs, part, 3, axis, transposed))
        for part, name in enumerate(names)
    ]


def _pairs(theirs: str, ours: str, leaves: Mapping[str, str]) -> list[Row]:
    return [_row(f"{theirs}.{leaf}", f"{ours}.{own}") for leaf, own in leaves.items()]


BLOCK = "trf_blocks.{i}"
PLAIN = {"weight": "weight", "bias": "bias"}
BOOK_NORM = {"scale": "scale", "shift": "shift"}
TORCH_NORM = {"weight": "scale", "bias": "shift"}


def _same_as_ours(norm: Mapping[str, str]) -> list[Row]:
    """What `GPTModel` and `GPTModelFast` of the book have in common with us."""
    return [
        _row("tok_emb.weight", "tok_emb.weight"),
        _row("pos_emb.weight", "pos_emb.weight"),
        *_pairs(f"{BLOCK}.norm1", f"{BLOCK}.norm1", norm),
        *_pairs(f"{BLOCK}.norm2", f"{BLOCK}.norm2", norm),
        *_pairs(f"{BLOCK}.ff.layers.0", f"{BLOCK}.ff.layers.0", PLAIN),
        *_pairs(f"{BLOCK}.ff.layers.2", f"{BLOCK}.ff.layers.2", PLAIN),
        *_pairs("final_norm", "final_norm", norm),
        *_pairs("out_head", "out_head", PLAIN),
    ]


def _conv1d(theirs: str, ours: str) -> list[Row]:
    """A layer that Hugging Face stores (in, out)."""
    return [_row(f"{theirs}.weight", f"{ours}.weight", True), _row(f"{theirs}.bias", f"{ours}.bias")]


def _linear(theirs: str, ours: str) -> list[Row]:
    """A layer that is stored (out, in)."""
    return _pairs(theirs, ours, PLAIN)


def _hub_names(layer: Callable[[str, str], list[Row]], fused_axis: int, transposed: bool) -> list[Row]:
    """The names that Hugging Face gave GPT-2 and nanoGPT, minGPT took over with the weights turned."""
    return [
        _row("wte.weight", "tok_emb.weight"),
        _row("wpe.weight", "pos_emb.weight"),
        *_pairs("h.{i}.ln_1", f"{BLOCK}.norm1", TORCH_NORM),
        *_fused("h.{i}.attn.c_attn.weight", "trf_blocks.{i}.att.{}.weight", fused_axis, transposed),
        *_fused("h.{i}.attn.c_attn.bias", "trf_blocks.{i}.att.{}.bias", axis=0),
        *layer("h.{i}.attn.c_proj", f"{BLOCK}.att.out_proj"),
        *_pairs("h.{i}.ln_2", f"{BLOCK}.norm2", TORCH_NORM),
        *layer("h.{i}.mlp.c_fc", f"{BLOCK}.ff.layers.0"),
        *layer("h.{i}.mlp.c_proj", f"{BLOCK}.ff.layers.2"),
        *_pairs("ln_f", "final_norm", TORCH_NORM),
        _row("lm_head.weight", "out_head.weight"),
    ]


def _tf_layer(theirs: str, ours: str) -> list[Row]:
    """A layer that TensorFlow stores as a convolution of width 1: (1, in, out)."""
    weight = Placement(f"{theirs}/w", transposed=True, squeezed=True)
    return [(f"{theirs}/w", f"{ours}.weight", weight), _row(f"{theirs}/b", f"{ours}.bias")]


def _tf_norm(theirs: str, ours: str) -> list[Row]:
    return [_row(f"{theirs}/g", f"{ours}.scale"), _row(f"{theirs}/b", f"{ours}.shift")]


def _tf_fused(theirs: str, ours: str) -> list[Row]:
    weights = _fused(f"{theirs}/w", ours + ".weight", axis=1, transposed=True)
    squeezed = [(name, mine, replace(placement, squeezed=True)) for name, mine, placement in weights]
    return [*squeezed, *_fused(f"{theirs}/b", ours + ".bias", axis=0)]


@dataclass(frozen=True, slots=True)
class Dialect:
    """A family of checkpoints: `marker` is a name that only it has, `masks` end names of no weights."""

    rows: list[Row]
    marker: str
    masks: tuple[str, ...] = ()


HUB_MASKS = (".attn.bias", ".attn.masked_bias")
DIALECTS = {
    "book": Dialect(
        rows=[
            *_same_as_ours(BOOK_NORM),
            *_pairs(f"{BLOCK}.att.W_query", f"{BLOCK}.att.W_query", PLAIN),
            *_pairs(f"{BLOCK}.att.W_key", f"{BLOCK}.att.W_key", PLAIN),
            *_pairs(f"{BLOCK}.att.W_value", f"{BLOCK}.att.W_value", PLAIN),
            *_pairs(f"{BLOCK}.att.out_proj", f"{BLOCK}.att.out_proj", PLAIN),
        ],
        marker="trf_blocks.0.att.W_query.weight",
        masks=(".att.mask",),
    ),
    "book-fast": Dialect(
        rows=[
            *_same_as_ours(TORCH_NORM),
            *_fused(f"{BLOCK}.att.qkv.weight", "trf_blocks.{i}.att.{}.weight", axis=0),
            *_fused(f"{BLOCK}.att.qkv.bias", "trf_blocks.{i}.att.{}.bias", axis=0),
            *_pairs(f"{BLOCK}.att.proj", f"{BLOCK}.att.out_proj", PLAIN),
        ],
        marker="trf_blocks.0.att.qkv.weight",
    ),
    "huggingface": Dialect(
        rows=_hub_names(_conv1d, fused_axis=1, transposed=True),
        marker="h.0.attn.c_attn.weight",
        masks=HUB_MASKS,
    ),
    "nanogpt": Dialect(
        rows=_hub_names(_linear, fused_axis=0, transposed=False),
        marker="h.0.attn.c_attn.weight",
        masks=HUB_MASKS,
    ),
    "openai": Dialect(
        rows=[
            _row("model/wte", "tok_emb.weight"),
            _row("model/wpe", "pos_emb.weight"),
            *_tf_norm("model/h{i}/ln_1", f"{BLOCK}.norm1"),
            *_tf_fused("model/h{i}/attn/c_attn", "trf_blocks.{i}.att.{}"),
            *_tf_layer("model/h{i}/attn/c_proj", f"{BLOCK}.att.out_proj"),
            *_tf_norm("model/h{i}/ln_2", f"{BLOCK}.norm2"),
            *_tf_layer("model/h{i}/mlp/c_fc", f"{BLOCK}.ff.layers.0"),
            *_tf_layer("model/h{i}/mlp/c_proj", f"{BLOCK}.ff.layers.2"),
            *_tf_norm("model/ln_f", "final_norm"),
        ],
        marker="model/h0/attn/c_attn/w",
    ),
}

# What a training script, a wrapper or a compiler puts before every name; any order, any number.
WRAPPERS = ("model_state_dict.", "state_dict.", "model.")
PREFIXES = (*WRAPPERS, "module.", "_orig_mod.", "transformer.")

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


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank addition to one weight of ours: weight += alpha × (a @ b).t(), a (in, r) and b (r, out)."""

    weight: str
    a: str
    b: str
    alpha: float | None = None


@dataclass(frozen=True)
class Reading:
    """A checkpoint understood: every parameter of ours that it holds, as a placement."""

    manifest: Manifest
    dialect: str
    placements: Mapping[str, Placement]
    masks: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    passengers: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()


def _strip(name: str) -> str:
    """`name` without the prefixes that it begins with, nor what the book's LoRA puts before its leaf."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return re.sub(r"\.linear\.(weight|bias)$", r".\1", name)


def _model_names(manifest: Manifest) -> dict[str, str]:
    """Stripped name → stored name, of the model alone: what lies beside its wrapper is left out."""
    stored = list(manifest.tensors)
    markers = _by_marker()
    marker = next((name for name in stored if _strip(name) in markers), "")
    wrapper = next((prefix for prefix in WRAPPERS if marker.startswith(prefix)), "")
    names: dict[str, str] = {}
    for name in stored:
        stripped = _strip(name)
        if not name.startswith(wrapper):
            continue
        if stripped in names:
            raise CheckpointError(f"{manifest.path}: {names[stripped]} and {name} are both {stripped}")
        names[stripped] = name
    return names


def _by_marker() -> dict[str, list[str]]:
    """Marker → the dialects that have it."""
    found: dict[str, list[str]] = {}
    for key, dialect in DIALECTS.items():
        found.setdefault(dialect.marker, []).append(key)
    return found


def _dialect_of(manifest: Manifest, names: Mapping[str, str]) -> str:
    found = {marker: keys for marker, keys in _by_marker().items() if marker in names}
    if len(found) > 1:
        both = " and ".join(keys[0] for keys in found.values())
        raise CheckpointError(f"{manifest.path}: holds the names of {both} at once; save them apart")
    for marker, keys in found.items():
        stored = manifest.tensors[names[marker]]
        return next((key for key in keys if _is_square(key, stored)), keys[0])
    sample = ", ".join(list(manifest.tensors)[:4]) or "no tensors"
    raise CheckpointError(
        f"{manifest.path}: not a GPT-2 that is known here. It holds {sample} …; wanted one of "
        f"{', '.join(sorted(_by_marker()))}. For a module of your own, use gpt2lite.load_module."
    )


def _is_square(dialect: str, marker: TensorSpan) -> bool:
    """Whether a dialect's reading of the query weight gives (C, C): it tells (in, out) from (out, in)."""
    placement = next(
        row[2] for row in DIALECTS[dialect].rows if row[0].format(i=0) == DIALECTS[dialect].marker
    )
    shape = placement.shape_of(marker.shape)
    return len(shape) == 2 and shape[0] == shape[1]


def _block_of(name: str) -> int:
    found = re.search(r"(?:^|[./])(?:trf_blocks\.|h\.|h)(\d+)[./]", name)
    return int(found.group(1)) if found else -1


def expand_rows(rows: Iterable[Row], n_layers: int) -> Iterable[Row]:
    """Rows with every `{i}` replaced by every block's number."""
    for theirs, ours, placement in rows:
        for i in range(n_layers) if "{i}" in theirs else (0,):
            yield theirs.format(i=i), ours.format(i=i), placement


def read_dialect(manifest: Manifest) -> Reading:
    """Find the dialect of a GPT-2 checkpoint by its names and place every parameter that it holds.

    A checkpoint without a head is tied: its head is its token embedding. Raises CheckpointError.
    """
    names = _model_names(manifest)
    key = _dialect_of(manifest, names)
    dialect = DIALECTS[key]
    n_layers = 1 + max(map(_block_of, names))
    if n_layers > len(names):
        raise CheckpointError(
            f"{manifest.path}: names block {n_layers - 1}, but has only {len(names)} tensors"
        )
    rows = [row for row in expand_rows(dialect.rows, n_layers) if row[0] in names]
    placements = {ours: replace(placement, source=names[theirs]) for theirs, ours, placement in rows}
    for absent, present in (("out_head.weight", "tok_emb.weight"), ("tok_emb.weight", "out_head.weight")):
        if present in placements:
            placements.setdefault(absent, placements[present])
    rest = names.keys() - {theirs for theirs, _, _ in rows}
    adapters = tuple(_adapters(names, placements))
    rest -= {name for name in rest if names[name] in {part for a in adapters for part in (a.a, a.b)}}
    masks = {name for name in rest if name.endswith(dialect.masks or "\0")}
    return Reading(
        manifest,
        key,
        placements,
        masks=tuple(names[name] for name in names if name in masks),
        unexpected=tuple(names[name] for name in names if name in rest - masks),
        passengers=tuple(manifest.tensors.keys() - set(names.values())),
        adapters=adapters,
    )


def _adapters(names: Mapping[str, str], placements: Mapping[str, Placement]) -> Iterator[Adapter]:
    """The book's LoRA layers: `X.lora.A` and `X.lora.B` beside `X.linear.weight`."""
    for name, a in names.items():
        layer = name.removesuffix(".lora.A")
        b = names.get(f"{layer}.lora.B")
        if layer != name and b is not None and f"{layer}.weight" in placements:
            yield Adapter(f"{layer}.weight", a, b)


def with_lora_alpha(reading: Reading, alpha: float | None) -> Reading:
    """The reading with `alpha` for its LoRA layers. Raises CheckpointError where one lacks the other."""
    layers = len(reading.adapters)
    if layers and alpha is None:
        raise CheckpointError(
            f"{reading.manifest.path}: holds {layers} LoRA layers, whose alpha no file says; pass the one "
            "that they were made with: lora_alpha=… (--lora-alpha for commands)"
        )
    if alpha is not None and (type(alpha) not in (int, float) or not math.isfinite(alpha)):
        raise UsageError(f"lora_alpha must be a number, got {alpha!r}")
    if alpha is not None and not layers:
        raise CheckpointError(
            f"{reading.manifest.path}: holds no LoRA layers, but lora_alpha={alpha} was given"
        )
    return replace(reading, adapters=tuple(replace(adapter, alpha=alpha) for adapter in reading.adapters))


def read_names(manifest: Manifest, wanted: Collection[str]) -> Reading:
    """Place the parameters of any module by their own names, behind a wrapper or prefix if there is one."""
    if set(wanted) <= set(manifest.tensors):
        names: Mapping[str, str] = {name: name for name in manifest.tensors}
    else:
        names = _best_names(manifest, wanted)
    placements = {name: Placement(stored) for name, stored in names.items() if name in wanted}
    unexpected = tuple(stored for name, stored in names.items() if name not in wanted)
    passengers = tuple(set(manifest.tensors) - set(names.values()))
    return Reading(manifest, "the module's own", placements, (), unexpected, passengers)


def _best_names(manifest: Manifest, wanted: Collection[str]) -> Mapping[str, str]:
    """The names behind the common prefix that yields most of the wanted ones."""
    best = {name: name for name in manifest.tensors}
    pending, seen = [""], {""}
    while pending:
        prefix = pending.pop()
        names = {n[len(prefix) :]: n for n in manifest.tensors if n.startswith(prefix)}
        if len(names.keys() & set(wanted)) > len(best.keys() & set(wanted)):
            best = names
        longer = {prefix + more for more in PREFIXES if any(n.startswith(more) for n in names)} - seen
        pending += sorted(longer)
        seen |= longer
    return best


def size_of(reading: Reading) -> tuple[int, int]:
    """(n_layers, emb_dim) by names and shapes; emb_dim is 0 where no embedding tells it."""
    token = reading.placements.get("tok_emb.weight")
    shape = reading.manifest.tensors[token.source].shape if token else ()
    return 1 + max(map(_block_of, reading.placements)), shape[1] if len(shape) == 2 else 0


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
    return {
        "vocab_size": token.shape[0],
        "context_length": position.shape[0],
        "emb_dim": token.shape[1],
        "n_layers": size_of(reading)[0],
        "qkv_bias": any(name.endswith(".W_query.bias") for name in placements),
        "bias": "final_norm.shift" in placements,
        "tied_head": token.address == head.address,
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
