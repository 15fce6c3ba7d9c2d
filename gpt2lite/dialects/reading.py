"""Whose checkpoint is this? Its names, freed of prefixes and wrappers, as placements of our parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from gpt2lite.checkpoint import Manifest, TensorSpan
from gpt2lite.dialects.tables import DIALECTS, Placement, Row, Transpose
from gpt2lite.errors import CheckpointError, UsageError, listed

# What wrappers put into every name (DataParallel, torch.compile, DeepSpeed, FSDP), and LoRA before a leaf.
NOISE = frozenset(
    ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
BEFORE_LEAF = frozenset(("linear", "base_layer"))
# Heads other than the language model's: the first that is there is a classifier's, the rest are left out.
CLASSIFIERS = ("score", "classifier")
OTHER_HEADS = ("v_head", "value_head", "multiple_choice_head", "qa_outputs", "summary", "mc_head")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank addition to one weight of ours: weight += scale × (b @ a), placed a (r, in) and b (out, r).

    `scale` is None where no file says it: the book's alpha.
    """

    weight: str
    a: Placement
    b: Placement
    scale: float | None = None


@dataclass(frozen=True)
class Reading:
    """A checkpoint understood: every parameter of ours that it holds, as a placement.

    `container` is the dotted name of the dict or module that holds the weights, `root` that of the model in
    it, both with a dot at the end. `left_out` are heads that are no part of the language model.
    """

    manifest: Manifest
    dialect: str
    placements: Mapping[str, Placement]
    masks: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    passengers: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    left_out: tuple[str, ...] = ()
    container: str = ""
    root: str = ""


def _unwrapped(name: str) -> str:
    """A name without what wrappers of modules put into it."""
    return ".".join(part for part in name.split(".") if part not in NOISE)


def _plain(name: str) -> str:
    """The same, without what LoRA puts before its leaf."""
    *path, leaf = _unwrapped(name).split(".")
    return ".".join([*(path[:-1] if len(path) > 1 and path[-1] in BEFORE_LEAF else path), leaf])


def _by_marker() -> dict[str, list[str]]:
    """Marker → the dialects that have it."""
    found: dict[str, list[str]] = {}
    for key, dialect in DIALECTS.items():
        found.setdefault(dialect.marker, []).append(key)
    return found


@dataclass(frozen=True, slots=True)
class _Model:
    """Where the weights of one model lie: in `container`, behind `prefix`, with the marker of a dialect."""

    container: str
    prefix: str
    marker: str


def _models(manifest: Manifest) -> dict[_Model, str]:
    """Every model in a file, with the stored name of its marker; one that is stored twice counts once."""
    found: dict[_Model, str] = {}
    for name in manifest.tensors:
        container = manifest.container_of(name)
        plain = _plain(name.removeprefix(container))
        for marker in _by_marker():
            if f".{plain}".endswith(f".{marker}"):
                found[_Model(container, plain.removesuffix(marker), marker)] = name
    if len(found) < 2:
        return found
    distinct = {frozenset(_stored_in(manifest, model)): model for model in reversed(found)}
    return {model: found[model] for model in reversed(distinct.values())}


def _stored_in(manifest: Manifest, model: _Model) -> Iterator[tuple[str, object]]:
    """(plain name, address) of all tensors of one model: equal for two that are the same one."""
    for name, span in manifest.tensors.items():
        plain = _plain(name.removeprefix(model.container))
        if name.startswith(model.container) and plain.startswith(model.prefix):
            yield plain.removeprefix(model.prefix), span.address


def _one_model(manifest: Manifest) -> tuple[_Model, str]:
    """The model that a file holds, and the dialect of its names. Raises CheckpointError unless it is one."""
    found = _models(manifest)
    if not found:
        raise CheckpointError(_unknown(manifest))
    if len(found) > 1:
        (first, _), (second, _), *_ = found.items()
        if first.marker != second.marker:
            both = " and ".join(_by_marker()[model.marker][0] for model in (first, second))
            raise CheckpointError(manifest.path, f"holds the names of {both} at once; save them apart")
        places = " and ".join(repr((model.container + model.prefix).rstrip(".")) for model in found)
        raise CheckpointError(
            manifest.path,
            f"holds {len(found)} models, under {places}. Save the one that you want alone: "
            "torch.save(torch.load(path, weights_only=True)['…'], 'model.pth')",
        )
    ((model, name),) = found.items()
    keys = _by_marker()[model.marker]
    return model, next((key for key in keys if _is_square(key, manifest.tensors[name])), keys[0])


def _unknown(manifest: Manifest) -> str:
    """What is said of a file without a marker: what it holds, nearest to what is wanted."""
    markers = sorted(_by_marker())
    nearest = {name for marker in markers for name in get_close_matches(marker, manifest.tensors, 3, 0.5)}
    sample = sorted(nearest)[:3] or list(manifest.tensors)[:4]
    what = f"{'its nearest names are' if nearest else 'it holds'} {', '.join(sample) or 'no tensors'}"
    return (
        f"{manifest.path}: not a GPT-2 that is known here; {what}. Wanted one of {', '.join(markers)}, "
        "behind any prefix. For a module of your own, use gpt2lite.load_module."
    )


def _names_of(manifest: Manifest, model: _Model) -> tuple[dict[str, str], dict[str, str]]:
    """Plain name → stored name: of the model behind its prefix and the heads beside it; of all the rest."""
    inside, beside = dict[str, str](), dict[str, str]()
    above = model.prefix.rstrip(".").rpartition(".")[0]
    above = f"{above}." if above else ""
    heads = ("lm_head.", "out_head.", *(f"{head}." for head in (*CLASSIFIERS, *OTHER_HEADS)))
    for name in manifest.tensors:
        plain = _plain(name.removeprefix(model.container))
        if not name.startswith(model.container):
            continue
        own = plain.removeprefix(model.prefix)
        if not plain.startswith(model.prefix):
            own = plain.removeprefix(above)
            if not (plain.startswith(above) and own.startswith(heads)):
                beside[name] = name
                continue
        if own in inside:
            raise CheckpointError(manifest.path, f"{inside[own]} and {name} are both {own}")
        inside[own] = name
    return inside, beside


def _require_readable(manifest: Manifest, model: _Model, wanted: Collection[str]) -> None:
    """Raise CheckpointError for a weight that is stored in a way that is not read; it is not just absent."""
    inside = {name: _plain(name.removeprefix(model.container)) for name in manifest.unreadable}
    lines = [
        f"{name} {manifest.unreadable[name]}"
        for name, plain in inside.items()
        if plain.removeprefix(model.prefix) in wanted or plain.endswith(("out_head.weight", "lm_head.weight"))
    ]
    if lines:
        raise CheckpointError(manifest.path, f"{len(lines)} weight(s) cannot be read{listed(lines)}")


def _with_heads(names: Mapping[str, str], dialect: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names with the output head under its dialect's own, and the stored names of other heads."""
    found = dict(names)
    own = "out_head" if dialect.startswith("book") else "lm_head"
    if (decoder := found.pop("lm_head.decoder.weight", None)) is not None:  # DialoGPT's
        found.setdefault(f"{own}.weight", decoder)
    for head in CLASSIFIERS:
        if f"{head}.weight" in found and f"{own}.weight" not in found:
            for leaf in ("weight", "bias"):
                if (stored := found.pop(f"{head}.{leaf}", None)) is not None:
                    found[f"{own}.{leaf}"] = stored
    others = tuple(f"{head}." for head in (*CLASSIFIERS, *OTHER_HEADS))
    left_out = tuple(stored for name, stored in found.items() if name.startswith(others))
    return {name: stored for name, stored in found.items() if not name.startswith(others)}, left_out


def _is_square(dialect: str, marker: TensorSpan) -> bool:
    """Whether a dialect's reading of the query weight gives (C, C): it tells (in, out) from (out, in)."""
    placement = next(
        row[2] for row in DIALECTS[dialect].rows if row[0].format(i=0) == DIALECTS[dialect].marker
    )
    shape = placement.shape_of(marker.shape)
    return len(shape) == 2 and shape[0] == shape[1]


def block_of(name: str) -> int:
    """The number of the block that a name belongs to, -1 for none."""
    found = re.search(r"(?:^|[./])(?:trf_blocks\.|h\.|h)(\d+)[./]", name)
    return int(found.group(1)) if found else -1


def expand_rows(rows: Iterable[Row], n_layers: int) -> Iterable[Row]:
    """Rows with every `{i}` replaced by every block's number."""
    for theirs, ours, placement in rows:
        for i in range(n_layers) if "{i}" in theirs else (0,):
            yield theirs.format(i=i), ours.format(i=i), placement


def read_dialect(manifest: Manifest) -> Reading:
    """Find the dialect of a GPT-2 checkpoint by its names and place every parameter that it holds.

    Whatever stands before the names is taken off. A checkpoint without a head is tied: its head is its token
    embedding. Raises CheckpointError, also for a file that holds two models.
    """
    model, key = _one_model(manifest)
    inside, beside = _names_of(manifest, model)
    names, left_out = _with_heads(inside, key)
    dialect = DIALECTS[key]
    n_layers = 1 + max(map(block_of, names))
    if n_layers > len(names):
        raise CheckpointError(manifest.path, f"names block {n_layers - 1}, but has only {len(names)} tensors")
    all_rows = list(expand_rows(dialect.rows, n_layers))
    _require_readable(manifest, model, {theirs for theirs, _, _ in all_rows})
    rows = [row for row in all_rows if row[0] in names]
    placements = {ours: replace(placement, source=names[theirs]) for theirs, ours, placement in rows}
    for absent, present in (("out_head.weight", "tok_emb.weight"), ("tok_emb.weight", "out_head.weight")):
        if present in placements:
            placements.setdefault(absent, placements[present])
    rest = names.keys() - {theirs for theirs, _, _ in rows}
    adapters = tuple(_adapters(names, placements))
    factors = {factor.source for adapter in adapters for factor in (adapter.a, adapter.b)}
    rest -= {name for name in rest if names[name] in factors}
    masks = {name for name in rest if name.endswith(dialect.masks or "\0")}
    known = {*names.values(), *left_out, *beside}
    return Reading(
        manifest,
        key,
        placements,
        masks=tuple(names[name] for name in names if name in masks),
        unexpected=(*(names[name] for name in names if name in rest - masks), *beside),
        passengers=tuple(name for name in manifest.tensors if name not in known),
        adapters=adapters,
        left_out=left_out,
        container=model.container,
        root=model.container + model.prefix,
    )


def _adapters(names: Mapping[str, str], placements: Mapping[str, Placement]) -> Iterator[Adapter]:
    """The book's LoRA layers: `X.lora.A` and `X.lora.B` beside `X.linear.weight`."""
    for name, a in names.items():
        layer = name.removesuffix(".lora.A")
        b = names.get(f"{layer}.lora.B")
        if layer != name and b is not None and f"{layer}.weight" in placements:
            turned = (Transpose(),)
            yield Adapter(f"{layer}.weight", Placement(a, turned), Placement(b, turned))


def with_lora_alpha(reading: Reading, alpha: float | None) -> Reading:
    """The reading with `alpha` for the book's LoRA layers. Raises CheckpointError if one lacks the other."""
    layers = sum(adapter.scale is None for adapter in reading.adapters)
    if layers and alpha is None:
        raise CheckpointError(
            reading.manifest.path,
            f"holds {layers} LoRA layers, whose alpha no file says; pass the one "
            "that they were made with: lora_alpha=… (--lora-alpha for commands)",
        )
    if alpha is not None and (type(alpha) not in (int, float) or not math.isfinite(alpha)):
        raise UsageError(f"lora_alpha must be a number, got {alpha!r}")
    if alpha is not None and not layers:
        raise CheckpointError(
            reading.manifest.path, f"holds no LoRA layers that lack it, but lora_alpha={alpha} was given"
        )
    adapters = (a if a.scale is not None else replace(a, scale=alpha) for a in reading.adapters)
    return replace(reading, adapters=tuple(adapters))


def read_names(manifest: Manifest, wanted: Collection[str]) -> Reading:
    """Place every tensor for any module by its own name, behind a wrapper or prefix if there is one."""
    if set(wanted) <= set(manifest.tensors):
        names: Mapping[str, str] = {name: name for name in manifest.tensors}
    else:
        names = _best_names(manifest, wanted)
    placements = {name: Placement(stored) for name, stored in names.items()}
    passengers = tuple(set(manifest.tensors) - set(names.values()))
    return Reading(manifest, "the module's own", placements, passengers=passengers)


def _best_names(manifest: Manifest, wanted: Collection[str]) -> Mapping[str, str]:
    """Plain name → stored name, behind the prefix that yields most of the wanted ones."""
    best = {name: name for name in manifest.tensors}
    leaf = min(wanted, default="")
    for plain_of in (str, _unwrapped):
        plain = {plain_of(name): name for name in manifest.tensors}
        prefixes = {short.removesuffix(leaf) for short in plain if f".{short}".endswith(f".{leaf}")}
        for prefix in sorted(prefixes):
            names = {short[len(prefix) :]: name for short, name in plain.items() if short.startswith(prefix)}
            best = max(best, names, key=lambda found: len(found.keys() & set(wanted)))
    return best
