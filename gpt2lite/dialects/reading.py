"""Whose checkpoint is this? Its names, freed of prefixes and wrappers, as placements of our parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from gpt2lite.checkpoint import Manifest, TensorSpan
from gpt2lite.dialects.tables import DIALECTS, Placement, Row
from gpt2lite.errors import CheckpointError, UsageError

# What a training script, a wrapper or a compiler puts before every name; any order, any number.
WRAPPERS = ("model_state_dict.", "state_dict.", "model.")
PREFIXES = (*WRAPPERS, "module.", "_orig_mod.", "transformer.")


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
    while name.startswith(PREFIXES):
        name = name[len(next(filter(name.startswith, PREFIXES))) :]
    return re.sub(r"\.linear\.(weight|bias)$", r".\1", name) if ".linear." in name else name


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

    A checkpoint without a head is tied: its head is its token embedding. Raises CheckpointError.
    """
    names = _model_names(manifest)
    key = _dialect_of(manifest, names)
    dialect = DIALECTS[key]
    n_layers = 1 + max(map(block_of, names))
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
    """Place every tensor for any module by its own name, behind a wrapper or prefix if there is one."""
    if set(wanted) <= set(manifest.tensors):
        names: Mapping[str, str] = {name: name for name in manifest.tensors}
    else:
        names = _best_names(manifest, wanted)
    placements = {name: Placement(stored) for name, stored in names.items()}
    passengers = tuple(set(manifest.tensors) - set(names.values()))
    return Reading(manifest, "the module's own", placements, passengers=passengers)


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
