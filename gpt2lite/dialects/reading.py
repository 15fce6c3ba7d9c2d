"""Whose checkpoint is this? Its names, freed of prefixes and wrappers, as placements of our parameters.

A dialect is a table of rows (their name, our name, placement), `{i}` for the block; a placement says which
view of which stored tensor a parameter is. Nothing else in the program knows a foreign name, so another
dialect is another table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import filterfalse, islice
from typing import NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from gpt2lite.checkpoint import Manifest, TensorSpan
from gpt2lite.checkpoint.foreign import shortened
from gpt2lite.checkpoint.reading import read_span
from gpt2lite.errors import CheckpointError, UsageError, listed

# ---- placements --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Narrow:
    """`start` to `stop` along an axis: in elements, or in equal parts where `parts` counts them."""

    axis: int
    start: int
    stop: int
    parts: int = 0

    def of(self, rows: range) -> range:
        """What it keeps of an axis. Raises ValueError where the axis is too short or not divisible."""
        size, rest = divmod(len(rows), self.parts) if self.parts else (1, 0)
        start, stop = self.start * size, self.stop * size
        if rest or not 0 <= start <= stop <= len(rows):
            raise ValueError(f"{self} of {len(rows)} elements")
        return rows[start:stop]


@dataclass(frozen=True, slots=True)
class Transpose:
    """The axes of a matrix, exchanged."""


@dataclass(frozen=True, slots=True)
class Drop:
    """An axis of size 1, left out."""

    axis: int


View: TypeAlias = Narrow | Transpose | Drop


def inside(box: Sequence[range], outer: Sequence[range]) -> tuple[slice, ...]:
    """The index that takes `box` out of a tensor that is `outer`. Raises ValueError if it is not in it."""
    pairs = list(zip(box, outer, strict=True))
    if any(r.start < o.start or r.stop > o.stop for r, o in pairs):
        raise ValueError(f"{box} reaches beyond {outer}")
    return tuple(slice(r.start - o.start, r.stop - o.start) for r, o in pairs)


@dataclass(frozen=True, slots=True)
class Placement:
    """One parameter as a view of one stored tensor; each of `views` is taken of what the last one gave."""

    source: str
    views: tuple[View, ...] = ()

    def _placed(self, stored: Sequence[int]) -> tuple[list[range], list[int]]:
        """The part of each stored axis, and which of these are the parameter's axes, in its order.

        Raises ValueError or IndexError for a shape that the views do not fit.
        """
        box, axes = list(map(range, stored)), list(range(len(stored)))
        for view in self.views:
            if isinstance(view, Transpose):
                axes.reverse()
            elif isinstance(view, Narrow):
                box[axes[view.axis]] = view.of(box[axes[view.axis]])
            elif len(box[axes.pop(view.axis)]) != 1:
                raise ValueError(f"{view} of {tuple(stored)}")
        return box, axes

    def box(self, stored: Sequence[int]) -> list[range]:
        """The range of each stored axis that the parameter takes; `stored` is a shape."""
        return self._placed(stored)[0]

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, from the stored one; `stored` itself where the views do not fit."""
        try:
            box, axes = self._placed(stored)
        except (IndexError, ValueError):
            return stored
        return tuple(len(box[axis]) for axis in axes)

    def of(self, stored: Tensor) -> Tensor:
        """The parameter as a view of the stored tensor: no bytes move."""
        box = self.box(stored.shape) if self.narrows else ()
        return self.turn(stored[tuple(slice(rows.start, rows.stop) for rows in box)])

    def read(self, span: TensorSpan) -> Tensor:
        """The parameter in fresh host memory; no other row of the stored tensor is read."""
        return self.turn(read_span(span.part(self.box(span.shape))))

    def turn(self, part: Tensor) -> Tensor:
        """A part of the stored tensor, turned to the parameter's orientation, as a view."""
        return _turned(part, self.views, torch.squeeze)

    def unplace(self, parameter: Tensor) -> Tensor:
        """The parameter, turned back to the stored orientation, as a view."""
        return _turned(parameter, self.views[::-1], torch.unsqueeze)

    @property
    def narrows(self) -> tuple[Narrow, ...]:
        """Those of its views that leave something out; none where it is the whole tensor."""
        return tuple(view for view in self.views if isinstance(view, Narrow))

    @property
    def rows_axis(self) -> int:
        """The stored axis of the parameter's rows, along which fused q, k and v are joined."""
        return -1 if Transpose() in self.views else 0

    @property
    def is_contiguous(self) -> bool:
        """Whether the view of a contiguous tensor is contiguous, too."""
        return Transpose() not in self.views and all(view.axis == 0 for view in self.narrows)


def _turned(tensor: Tensor, views: Iterable[View], drop: Callable[[Tensor, int], Tensor]) -> Tensor:
    for view in views:
        if isinstance(view, Transpose):
            tensor = tensor.t()
        elif isinstance(view, Drop):
            tensor = drop(tensor, view.axis)
    return tensor


# ---- tables ------------------------------------------------------------------------------------------------

Row: TypeAlias = tuple[str, str, Placement]
Ends: TypeAlias = tuple[str, ...]  # of a module's weight and bias
BLOCK = "trf_blocks.{i}"
EMBEDDINGS = ("tok_emb", "pos_emb")
QKV = (f"{BLOCK}.att.W_query", f"{BLOCK}.att.W_key", f"{BLOCK}.att.W_value")
LAYERS = (f"{BLOCK}.att.out_proj", f"{BLOCK}.ff.layers.0", f"{BLOCK}.ff.layers.2")
NORMS = (f"{BLOCK}.norm1", f"{BLOCK}.norm2", "final_norm")
BOOK = {ours: ours for ours in (*EMBEDDINGS, *NORMS, *LAYERS[1:], "out_head", *QKV, LAYERS[0])}
FAST = BOOK | dict.fromkeys(QKV, f"{BLOCK}.att.qkv") | {LAYERS[0]: f"{BLOCK}.att.proj"}
OPENAI_LAYERS = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj"
LLAMA_CPP_LAYERS = "attn_norm attn_qkv attn_output ffn_norm ffn_up ffn_down"


def _peers(
    embeddings: Sequence[str], block: str, final_norm: str, dot: str = ".", layers: str = OPENAI_LAYERS
) -> dict[str, str]:
    """The names that OpenAI gave GPT-2 and that others took over; query, key and value are one layer."""
    norm, qkv, *rest = layers.split()
    theirs = [f"{block}.{layer}".replace(".", dot) for layer in (norm, qkv, qkv, qkv, *rest)]
    ours = (*EMBEDDINGS, NORMS[0], *QKV, LAYERS[0], NORMS[1], *LAYERS[1:], NORMS[2])
    return dict(zip(ours, (*embeddings, *theirs, final_norm), strict=True))


HUB = _peers(("wte", "wpe"), "h.{i}", "ln_f") | {"out_head": "lm_head"}
LLAMA_CPP = _peers(("token_embd", "position_embd"), "blk.{i}", "output_norm", layers=LLAMA_CPP_LAYERS)
LLAMA_CPP["out_head"] = "output"
OPENAI = _peers(("model/wte", "model/wpe"), "model/h{i}", "model/ln_f", "/")
# How the names of norms, layers and embeddings end.
BOOKS = ((".scale", ".shift"), (".weight", ".bias"), (".weight",))
TORCH = ((".weight", ".bias"), (".weight", ".bias"), (".weight",))


def _rows(modules: Mapping[str, str], ends: Sequence[Ends], turned: Sequence[View] = ()) -> list[Row]:
    """Rows from our module names to theirs; one of theirs that is query, key and value is split evenly.

    `turned` makes weights of a block (out, in).
    """
    norm, layer, embedding = ends
    rows = []
    for ours, theirs in modules.items():
        own = (".scale", ".shift") if ours in NORMS else (".weight", ".bias")
        theirs_end = norm if ours in NORMS else embedding if ours in EMBEDDINGS else layer
        is_fused = [*modules.values()].count(theirs) > 1
        third = (Narrow(0, QKV.index(ours), QKV.index(ours) + 1, len(QKV)),) if is_fused else ()
        for end, leaf in zip(theirs_end, own, strict=False):  # an embedding has no bias
            views = turned if ours in (*QKV, *LAYERS) and leaf == ".weight" else ()
            rows.append((theirs + end, ours + leaf, Placement(theirs + end, (*views, *third))))
    return rows


@dataclass(frozen=True, slots=True)
class Dialect:
    """A checkpoint family; `masks`: suffixes of mask buffers."""

    rows: list[Row]
    masks: tuple[str, ...] = ()

    def places(self, n_layers: int) -> dict[str, list[tuple[str, Placement]]]:
        """Their name → our parameters that are stored there, of every block."""
        places: dict[str, list[tuple[str, Placement]]] = {}
        for theirs, ours, placement in self.rows:
            for i in range(n_layers) if "{i}" in theirs else (0,):
                places.setdefault(theirs.format(i=i), []).append((ours.format(i=i), placement))
        return places


HUB_MASKS = (".attn.bias", ".attn.masked_bias")
OPENAIS = (("/g", "/b"), ("/w", "/b"), ("",))
DIALECTS = {
    "book": Dialect(_rows(BOOK, BOOKS), (".att.mask",)),
    "book-fast": Dialect(_rows(FAST, TORCH)),
    "huggingface": Dialect(_rows(HUB, TORCH, (Transpose(),)), HUB_MASKS),
    "nanogpt": Dialect(_rows(HUB, TORCH), HUB_MASKS),
    "openai": Dialect(_rows(OPENAI, OPENAIS, (Drop(0), Transpose()))),
}
WRITTEN = DIALECTS | {"gguf": Dialect(_rows(LLAMA_CPP, TORCH))}
# The name of the first query weight → the dialects that have it, each with its placement.
MARKERS: dict[str, dict[str, Placement]] = {}
for _key, _dialect in DIALECTS.items():
    _theirs, _, _query = next(row for row in _dialect.rows if row[1] == f"{QKV[0]}.weight")
    MARKERS.setdefault(_theirs.format(i=0), {})[_key] = _query


# ---- readings ----------------------------------------------------------------------------------------------

# What wrappers put into every name (DataParallel, torch.compile, DeepSpeed, FSDP), and LoRA before a leaf.
NOISE = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
BEFORE_LEAF = re.compile(r"\.(linear|base_layer)(?=\.[^.]*$)")
IN_BLOCK = re.compile(r"(?:^|[./])(?:trf_blocks\.|h\.|h)(\d+)[./]")
# Heads other than the language model's: the first that is there is a classifier's, the rest are left out.
CLASSIFIERS = ("score.", "classifier.")
DIALOGPT = "lm_head.decoder."
AUXILIARY = ("v_head.", "value_head.", "multiple_choice_head.", "qa_outputs.", "summary.", "mc_head.")
OTHERS = (DIALOGPT, *CLASSIFIERS, *AUXILIARY)
HEADS = ("lm_head.", "out_head.", *OTHERS)
SAVE_ONE = "Save the one that you want in a file of its own"
TIED = ("tok_emb.weight", "out_head.weight")
MAX_MODELS, MAX_COMPARED = 8, 200  # models in a file; names that are compared with those that are known
# What an optimizer keeps, gradients, differences of weights: as large, and under their names or numbers.
_NO_WEIGHTS = "opt(?:im(?:izers?)?)?|exp_avg|momentum|grad(?:s|ients?)?|fisher|deltas?|diffs?"
MOMENTS = re.compile(rf"(?:^|[._])(?:{_NO_WEIGHTS})(?:[._]|$)|(?:^|\.)state\.\d+\.")


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

    def places(self) -> dict[str, list[tuple[str, Placement]]]:
        """Their name → our parameters stored there, with the rows' views."""
        places = DIALECTS[self.dialect].places(self.size[0])
        return {theirs: rows for theirs, rows in places.items() if rows[0][0] in self.placements}

    @property
    def mask_spans(self) -> list[TensorSpan]:
        """Its attention masks, those of pickled modules too that a state dict leaves out."""
        ends, root, unsaved = DIALECTS[self.dialect].masks, unwrapped(self.root), self.manifest.unsaved
        hidden = [name for name in unsaved if unwrapped(name).startswith(root) and name.endswith(ends)]
        return [*map(self.manifest.tensors.__getitem__, self.masks), *map(unsaved.__getitem__, hidden)]

    @property
    def is_tied(self) -> bool:
        """Whether head and token embedding, as far as they are there, are the same bytes."""
        ends = (self.placements[end].source for end in TIED if end in self.placements)
        return len({self.manifest.tensors[end].address for end in ends}) == 1


def above_of(prefix: str) -> str:
    """What a dotted prefix lies in: `a.` for `a.b.`, nothing for `a.`."""
    return prefix[: prefix.rstrip(".").rfind(".") + 1]


def unwrapped(name: str) -> str:
    """A name without what wrappers of modules put into it."""
    parts = name.split(".")
    return name if NOISE.isdisjoint(parts) else ".".join(part for part in parts if part not in NOISE)


def _plain(name: str) -> str:
    """The same, without what LoRA puts before its leaf."""
    return BEFORE_LEAF.sub("", unwrapped(name))


class _Model(NamedTuple):
    """Where the weights of one model lie: in `container`, behind `prefix`, by the names of a dialect."""

    container: str
    prefix: str
    dialect: str

    @property
    def root(self) -> str:
        """The dotted name of the model, with a dot at its end."""
        return self.container + self.prefix

    def behind(self, prefix: str, name: str) -> str | None:
        """A stored name of the container without prefix and wrappers; None for one that lies elsewhere."""
        if not name.startswith(self.container):
            return None
        plain = _plain(name.removeprefix(self.container))
        return plain.removeprefix(prefix) if plain.startswith(prefix) else None

    def own(self, name: str) -> str | None:
        """`behind` with the model's own prefix, or for a head beside the model or beside its container."""
        if inside := self.behind(self.prefix, name):
            return inside
        is_inside = name.startswith(self.container)
        beside = self if is_inside else _Model(above_of(self.container), "", self.dialect)
        head = beside.behind(above_of(beside.prefix), name) or ""
        return head if head.startswith(HEADS) else None


def _models(manifest: Manifest) -> list[_Model]:
    """Every model in a file; one that is stored twice counts once."""
    distinct, looked = dict[object, _Model](), 0
    for name in filterfalse(MOMENTS.search, manifest.tensors):
        container, shape = manifest.container_of(name), manifest.tensors[name].shape
        plain = _plain(name.removeprefix(container))
        for marker, queries in MARKERS.items():
            if f".{plain}".endswith(f".{marker}"):
                model = _Model(container, plain.removesuffix(marker), _oriented(queries, shape))
                own = ((model.behind(model.prefix, n), span.address) for n, span in manifest.tensors.items())
                distinct.setdefault(frozenset(place for place in own if place[0] is not None), model)
                if len(distinct) > MAX_MODELS or (looked := looked + 1) > MAX_MODELS**2:
                    raise CheckpointError(manifest.path, f"holds more than {MAX_MODELS} models. {SAVE_ONE}")
    return [*distinct.values()]


def _oriented(queries: Mapping[str, Placement], stored: tuple[int, ...]) -> str:
    """The first dialect in which a stored weight gives a square query, as only the right orientation does."""
    shapes = {dialect: query.shape_of(stored) for dialect, query in queries.items()}
    return next((dialect for dialect, shape in shapes.items() if shape == shape[:1] * 2), next(iter(queries)))


def _one_model(manifest: Manifest) -> _Model:
    """The model that a file holds. Raises CheckpointError unless it is one."""
    found = _models(manifest)
    if not found:
        some = [name for name in islice(manifest.tensors, MAX_COMPARED) if len(name) < MAX_COMPARED]
        nearest = {name for marker in MARKERS for name in get_close_matches(marker, some, 3, 0.5)}
        what = "its nearest names are" if nearest else "it holds"
        said = f"not a GPT-2 with known names; {what} {shortened(nearest or manifest.tensors)}"
        wanted = f"Expected one of {', '.join(sorted(MARKERS))}, behind any prefix"
        do = "For a module of your own, use gpt2lite.load_module"
        raise CheckpointError(manifest.path, f"{said}. {wanted}. {do}")
    if len(found) > 1:
        places = " and ".join(f"{model.root.rstrip('.')!r} ({model.dialect})" for model in found)
        raise CheckpointError(manifest.path, f"holds {len(found)} models, under {places}. {SAVE_ONE}")
    return found[0]


def _names_of(manifest: Manifest, model: _Model) -> tuple[dict[str, str], list[str]]:
    """Plain name → stored name, of the model and its heads; and the names beside them in its container."""
    inside, beside = dict[str, str](), list[str]()
    for name in manifest.tensors:
        if (own := model.own(name)) is None:
            beside += [name] if name.startswith(model.container) else []
        elif inside.setdefault(own, name) != name:
            raise CheckpointError(manifest.path, f"{inside[own]} and {name} are both {own}", name=name)
    return inside, beside


def _require_readable(manifest: Manifest, model: _Model, wanted: Collection[str]) -> None:
    """Raise CheckpointError for a weight, LoRA factor or mask that is stored in a way we do not read."""
    ends = (".lora.A", ".lora.B", *(end for dialect in DIALECTS.values() for end in dialect.masks))
    unreadable = {name: f"{name} {reason}" for name, reason in manifest.unreadable.items()}
    lines = {n: line for n, line in unreadable.items() if model.own(n) in wanted or n.endswith(ends)}
    if lines:
        said = f"{len(lines)} weight(s) cannot be read{listed([*lines.values()])}"
        raise CheckpointError(manifest.path, said, name=next(iter(lines)))


def _with_heads(names: Mapping[str, str], dialect: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names with the output head under its dialect's own, and the stored names of other heads."""
    found = dict(names)
    own = "out_head" if dialect.startswith("book") else "lm_head"
    for head in (DIALOGPT, *CLASSIFIERS):
        if f"{own}.weight" not in found and f"{head}weight" in found:
            leaves = [leaf for leaf in ("weight", "bias") if head + leaf in found]
            found |= {f"{own}.{leaf}": found.pop(head + leaf) for leaf in leaves}
    left_out = tuple(found.pop(name) for name in names if name in found and name.startswith(OTHERS))
    return found, left_out


def block_of(name: str) -> int:
    """The number of the block that a name belongs to, -1 for none."""
    found = IN_BLOCK.search(name)
    return int(found.group(1)) if found else -1


def read_dialect(manifest: Manifest) -> Reading:
    """Find the dialect of a GPT-2 checkpoint by its names and place every parameter that it holds.

    Prefixes before the names are stripped. A checkpoint without a head is tied: its head is its token
    embedding. Raises CheckpointError, also for a file that holds two models.
    """
    model = _one_model(manifest)
    inside, beside = _names_of(manifest, model)
    names, left_out = _with_heads(inside, model.dialect)
    n_layers = 1 + max(map(block_of, names))
    if n_layers > len(names):
        raise CheckpointError(manifest.path, f"names block {n_layers - 1}, but has only {len(names)} tensors")
    dialect = DIALECTS[model.dialect]
    places = dialect.places(n_layers)
    _require_readable(manifest, model, {*places, *TIED, "lm_head.weight"})
    rows = ((names[theirs], *row) for theirs in places if theirs in names for row in places[theirs])
    placements = {ours: Placement(stored, placement.views) for stored, ours, placement in rows}
    passengers = tuple(manifest.tensors.keys() - {*inside.values(), *beside})
    strays = tuple(_strays(manifest, placements, passengers))
    if strays and not placements.keys() >= set(TIED):
        head = f"has no output head of its own, but {shortened(strays)} beside it may be one"
        said = f"the model under {model.root.rstrip('.')!r} {head}. Save them in one dict, or the model alone"
        raise CheckpointError(manifest.path, said)
    for absent, present in (TIED, TIED[::-1]):
        if present in placements:
            placements.setdefault(absent, placements[present])
    adapters = tuple(_adapters(manifest, names, placements))
    factors = (factor for adapter in adapters for factor in (adapter.a, adapter.b))
    used = {placement.source for placement in (*placements.values(), *factors)}
    rest = {name: stored for name, stored in names.items() if stored not in used}
    masks = tuple(stored for name, stored in rest.items() if name.endswith(dialect.masks))
    unexpected = (*(stored for stored in rest.values() if stored not in masks), *beside)
    found = Reading(manifest, model.dialect, placements, masks, unexpected, passengers, adapters)
    return replace(found, left_out=(*left_out, *strays), container=model.container, root=model.root)


def _strays(manifest: Manifest, placed: Mapping[str, Placement], others: Iterable[str]) -> Iterator[str]:
    """Matrices elsewhere in the file that could be a head, unless they are named as the model's own are."""
    used = {manifest.tensors[placement.source].address for placement in placed.values()}
    widths = {manifest.tensors[placed[end].source].shape[-1] for end in TIED if end in placed}
    own = {place.source.removeprefix(manifest.container_of(place.source)) for place in placed.values()}
    for name in sorted(filterfalse(MOMENTS.search, others)):
        span, is_twin = manifest.tensors[name], name.removeprefix(manifest.container_of(name)) in own
        if len(span.shape) > 1 and widths & {*span.shape} and span.address not in used and not is_twin:
            yield name


def _adapters(manifest: Manifest, names: Mapping[str, str], placed: Container[str]) -> Iterator[Adapter]:
    """The book's LoRA layers: `X.lora.A` and `X.lora.B` beside `X.linear.weight`.

    A pickled layer says its alpha; one that keeps its rank too, as the book's do of late, divides by it.
    """
    for name, a in names.items():
        layer = name.removesuffix(".lora.A")
        weight, b = f"{layer}.weight", names.get(f"{layer}.lora.B")
        if layer != name and b is not None and weight in placed:
            alpha, rank = manifest.values.get(f"{a[:-1]}alpha"), manifest.values.get(f"{a[:-1]}rank", 1)
            scale = alpha / rank if is_number(alpha) and is_number(rank) and rank else None
            yield Adapter(weight, Placement(a, (Transpose(),)), Placement(b, (Transpose(),)), scale)


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a finite number, and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def with_lora_alpha(reading: Reading, alpha: float | None) -> Reading:
    """The reading with `alpha` for the LoRA layers that do not say theirs.

    Raises CheckpointError if one lacks the other, or if a layer says another alpha.
    """
    own = {adapter.scale for adapter in reading.adapters}
    if alpha is not None and not is_number(alpha):
        raise UsageError(f"lora_alpha must be a number, got {alpha!r}")
    if alpha is None and None in own:
        do = "pass the one they trained with: lora_alpha=… (--lora-alpha)"
        raise CheckpointError(reading.manifest.path, f"holds LoRA layers without their alpha; {do}")
    if alpha is not None and (not own or own - {None, alpha}):
        has = f"LoRA layers of scale {', '.join(map(str, own - {None}))}" if own else "no LoRA layers"
        said = f"holds {has}, but lora_alpha={alpha} was passed; leave it out"
        raise CheckpointError(reading.manifest.path, said)
    adapters = (replace(a, scale=alpha if a.scale is None else a.scale) for a in reading.adapters)
    return replace(reading, adapters=tuple(adapters))


def read_names(manifest: Manifest, wanted: Collection[str]) -> Reading:
    """Place every tensor for any module by its own name, behind a wrapper or prefix if there is one.

    Raises CheckpointError where two sets of tensors fit equally well.
    """
    fits: dict[frozenset[object], Mapping[str, str]] = {}
    for found in _namings(manifest, wanted):
        addresses = ((name, manifest.tensors[found[name]].address) for name in found.keys() & set(wanted))
        fits.setdefault(frozenset(addresses), found)
    best = [found for place, found in fits.items() if len(place) == max(map(len, fits))]
    names = best[0]
    if len(best) > 1:
        leaf = min(names.keys() & set(wanted))
        places = " and ".join(
            repr(found[leaf].removesuffix(leaf).rstrip(".")) for found in best if leaf in found
        )
        raise CheckpointError(
            manifest.path, f"holds {len(best)} modules that fit, under {places}. {SAVE_ONE}"
        )
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
        for prefix in filterfalse(MOMENTS.search, sorted(prefixes)):
            yield {short[len(prefix) :]: name for short, name in plain.items() if short.startswith(prefix)}
