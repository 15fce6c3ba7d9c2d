"""Whose checkpoint is this? Its names, freed of prefixes and wrappers, as placements of our parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NamedTuple

from gpt2lite.checkpoint import Manifest, TensorSpan
from gpt2lite.dialects.tables import DIALECTS, Placement, Row, Transpose
from gpt2lite.errors import CheckpointError, UsageError, listed

# What wrappers put into every name (DataParallel, torch.compile, DeepSpeed, FSDP), and LoRA before a leaf.
NOISE = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
BEFORE_LEAF = ("linear", "base_layer")
# Heads other than the language model's: the first that is there is a classifier's, the rest are left out.
CLASSIFIERS = ("score.", "classifier.")
OTHER_HEADS = ("v_head.", "value_head.", "multiple_choice_head.", "qa_outputs.", "summary.", "mc_head.")
OTHERS = (*CLASSIFIERS, *OTHER_HEADS)
LEAVES = ("weight", "bias")
# Marker → the dialects that have it.
MARKERS = {
    dialect.marker: [key for key, other in DIALECTS.items() if other.marker == dialect.marker]
    for dialect in DIALECTS.values()
}


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

    @property
    def size(self) -> tuple[int, int]:
        """(n_layers, emb_dim) by names and shapes; emb_dim is 0 where no embedding tells it."""
        token = self.placements.get("tok_emb.weight")
        shape = self.manifest.tensors[token.source].shape if token else ()
        return 1 + max(map(block_of, self.placements)), shape[1] if len(shape) == 2 else 0


def above_of(prefix: str) -> str:
    """What a dotted prefix lies in: `a.` for `a.b.`, nothing for `a.`."""
    return prefix[: prefix.rstrip(".").rfind(".") + 1]


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules put into it."""
    return ".".join(part for part in name.split(".") if part not in NOISE)


def _plain(name: str) -> str:
    """The same, without what LoRA puts before its leaf."""
    *path, leaf = unwrapped(name).split(".")
    return ".".join([*(path[:-1] if len(path) > 1 and path[-1] in BEFORE_LEAF else path), leaf])


class _Model(NamedTuple):
    """Where the weights of one model lie: in `container`, behind `prefix`, with the marker of a dialect."""

    container: str
    prefix: str
    marker: str

    def own(self, name: str) -> str | None:
        """A stored name without container, prefix and wrappers; None for one that lies elsewhere."""
        plain = _plain(name.removeprefix(self.container))
        is_inside = name.startswith(self.container) and plain.startswith(self.prefix)
        return plain.removeprefix(self.prefix) if is_inside else None


def _models(manifest: Manifest) -> dict[_Model, str]:
    """Every model in a file, with the stored name of its marker; one that is stored twice counts once."""
    found: dict[_Model, str] = {}
    for name in manifest.tensors:
        container = manifest.container_of(name)
        plain = _plain(name.removeprefix(container))
        for marker in MARKERS:
            if f".{plain}".endswith(f".{marker}"):
                found[_Model(container, plain.removesuffix(marker), marker)] = name
    if len(found) < 2:
        return found
    distinct = {}
    for model in reversed(found):
        places = ((model.own(name), span.address) for name, span in manifest.tensors.items())
        distinct[frozenset(place for place in places if place[0] is not None)] = model
    return {model: found[model] for model in reversed(distinct.values())}


def _one_model(manifest: Manifest) -> tuple[_Model, str]:
    """The model that a file holds, and the dialect of its names. Raises CheckpointError unless it is one."""
    found = _models(manifest)
    if not found:
        raise _unknown(manifest)
    if len(kinds := {MARKERS[model.marker][0] for model in found}) > 1:
        names = " and ".join(sorted(kinds))
        raise CheckpointError(manifest.path, f"holds the names of {names} at once; save them separately")
    if len(found) > 1:
        places = " and ".join(repr((model.container + model.prefix).rstrip(".")) for model in found)
        save = "torch.save(torch.load(path, weights_only=True)['…'], 'model.pth')"
        raise CheckpointError(manifest.path, f"holds {len(found)} models, under {places}. Save one: {save}")
    ((model, name),) = found.items()
    keys = MARKERS[model.marker]
    return model, next((key for key in keys if _is_square(key, manifest.tensors[name])), keys[0])


def _unknown(manifest: Manifest) -> CheckpointError:
    """The error for a file without a marker: what it holds that is nearest to what is expected."""
    nearest = {name for marker in MARKERS for name in get_close_matches(marker, manifest.tensors, 3, 0.5)}
    sample = sorted(nearest)[:3] or list(manifest.tensors)[:4]
    what = f"{'its nearest names are' if nearest else 'it holds'} {', '.join(sample) or 'no tensors'}"
    return CheckpointError(
        manifest.path,
        f"not a GPT-2 with known names; {what}. Expected one of {', '.join(sorted(MARKERS))}, "
        "behind any prefix. For a module of your own, use gpt2lite.load_module",
    )


def _names_of(manifest: Manifest, model: _Model) -> tuple[dict[str, str], list[str]]:
    """Plain name → stored name, of the model behind its prefix and the heads beside it; all the rest."""
    inside, beside = dict[str, str](), list[str]()
    above = model._replace(prefix=above_of(model.prefix))
    for name in filter(lambda name: name.startswith(model.container), manifest.tensors):
        own, head = model.own(name), above.own(name) or ""
        if own is None and not head.startswith(("lm_head.", "out_head.", *OTHERS)):
            beside.append(name)
        elif inside.setdefault(own or head, name) != name:
            said = f"{inside[own or head]} and {name} are both {own or head}"
            raise CheckpointError(manifest.path, said, name=name)
    return inside, beside


def _require_readable(manifest: Manifest, model: _Model, wanted: Collection[str]) -> None:
    """Raise CheckpointError for a weight, LoRA factor or mask that is stored in a way we do not read."""
    wanted = {*wanted, "out_head.weight", "lm_head.weight"}
    ends = (".lora.A", ".lora.B", *(end for dialect in DIALECTS.values() for end in dialect.masks))
    above = model._replace(prefix=above_of(model.prefix))
    names = (
        name
        for name in manifest.unreadable
        if {model.own(name), above.own(name)} & wanted or name.endswith(ends)
    )
    if lines := {name: f"{name} {manifest.unreadable[name]}" for name in names}:
        said = f"{len(lines)} weight(s) cannot be read{listed([*lines.values()])}"
        raise CheckpointError(manifest.path, said, name=next(iter(lines)))


def _with_heads(names: Mapping[str, str], dialect: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names with the output head under its dialect's own, and the stored names of other heads."""
    found = dict(names)
    own = "out_head" if dialect.startswith("book") else "lm_head"
    if (decoder := found.pop("lm_head.decoder.weight", None)) is not None:  # DialoGPT's
        found.setdefault(f"{own}.weight", decoder)
    head = next((head for head in CLASSIFIERS if f"{head}weight" in found), None)
    if head and f"{own}.weight" not in found:
        found |= {f"{own}.{leaf}": found.pop(head + leaf) for leaf in LEAVES if head + leaf in found}
    left_out = tuple(stored for name, stored in found.items() if name.startswith(OTHERS))
    return {name: stored for name, stored in found.items() if not name.startswith(OTHERS)}, left_out


def _is_square(dialect: str, marker: TensorSpan) -> bool:
    """Whether a dialect's reading of the query weight gives (C, C): it tells (in, out) from (out, in)."""
    rows, theirs = DIALECTS[dialect].rows, DIALECTS[dialect].marker
    placement = next(placement for name, _, placement in rows if name.format(i=0) == theirs)
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
    n_layers = 1 + max(map(block_of, names))
    if n_layers > len(names):
        raise CheckpointError(manifest.path, f"names block {n_layers - 1}, but has only {len(names)} tensors")
    all_rows = list(expand_rows(DIALECTS[key].rows, n_layers))
    _require_readable(manifest, model, {theirs for theirs, _, _ in all_rows})
    rows = [row for row in all_rows if row[0] in names]
    placements = {ours: replace(placement, source=names[theirs]) for theirs, ours, placement in rows}
    for absent, present in (("out_head.weight", "tok_emb.weight"), ("tok_emb.weight", "out_head.weight")):
        if present in placements:
            placements.setdefault(absent, placements[present])
    adapters = tuple(_adapters(names, placements))
    used = {names[theirs] for theirs, _, _ in rows}
    used |= {factor.source for adapter in adapters for factor in (adapter.a, adapter.b)}
    rest = {name: stored for name, stored in names.items() if stored not in used}
    masks = tuple(stored for name, stored in rest.items() if name.endswith(DIALECTS[key].masks or "\0"))
    known = {*names.values(), *left_out, *beside}
    return Reading(
        manifest,
        key,
        placements,
        masks=masks,
        unexpected=(*(stored for stored in rest.values() if stored not in masks), *beside),
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
    path, layers = reading.manifest.path, sum(adapter.scale is None for adapter in reading.adapters)
    if alpha is None and layers:
        how = "pass the alpha that they were trained with: lora_alpha=… (--lora-alpha for commands)"
        raise CheckpointError(path, f"holds {layers} LoRA layers without their alpha; {how}")
    if alpha is not None and (type(alpha) not in (int, float) or not math.isfinite(alpha)):
        raise UsageError(f"lora_alpha must be a number, got {alpha!r}")
    if alpha is not None and not layers:
        raise CheckpointError(path, f"holds no LoRA layers without an alpha; leave out lora_alpha={alpha}")
    adapters = (a if a.scale is not None else replace(a, scale=alpha) for a in reading.adapters)
    return replace(reading, adapters=tuple(adapters))


def read_names(manifest: Manifest, wanted: Collection[str]) -> Reading:
    """Place every tensor for any module by its own name, behind a wrapper or prefix if there is one."""
    names = max(_namings(manifest, wanted), key=lambda found: len(found.keys() & set(wanted)))
    placements = {name: Placement(stored) for name, stored in names.items()}
    passengers = tuple(set(manifest.tensors) - set(names.values()))
    return Reading(manifest, "the module's own", placements, passengers=passengers)


def _namings(manifest: Manifest, wanted: Collection[str]) -> Iterator[Mapping[str, str]]:
    """Plain name → stored name: as stored, and behind every prefix that may be meant."""
    yield {name: name for name in manifest.tensors}
    leaf = min(wanted, default="")
    for plain_of in (str, unwrapped) if not set(wanted) <= set(manifest.tensors) else ():
        plain = {plain_of(name): name for name in manifest.tensors}
        prefixes = {short.removesuffix(leaf) for short in plain if f".{short}".endswith(f".{leaf}")}
        for prefix in sorted(prefixes):
            yield {short[len(prefix) :]: name for short, name in plain.items() if short.startswith(prefix)}
