"""Which view of which stored tensor each parameter of ours is, one table for each family of checkpoints.

A row is (their name, our name, placement); `{i}` stands for the block. Nothing else in the program knows a
foreign name, so another dialect is another table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gpt2lite.checkpoint import TensorSpan
from gpt2lite.checkpoint.reading import read_span


@dataclass(frozen=True, slots=True)
class Narrow:
    """`start` to `stop` of an axis: of its elements, or of as many equal parts of it as `parts` says."""

    axis: int
    start: int
    stop: int
    parts: int = 0

    def of(self, rows: range) -> range:
        """What it leaves of an axis. Raises ValueError where that has not so many or cannot be so divided."""
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
    views: tuple[Narrow | Transpose | Drop, ...] = ()

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
        """The part of each axis of the stored tensor, by the latter's shape, that the parameter is."""
        return self._placed(stored)[0]

    def shape_of(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, from the stored tensor's; the latter itself where the views do not fit."""
        try:
            box, axes = self._placed(stored)
        except (IndexError, ValueError):
            return stored
        return tuple(len(box[axis]) for axis in axes)

    def of(self, stored: Tensor) -> Tensor:
        """The parameter as a view of the stored tensor: no bytes move."""
        box = self.box(stored.shape)
        return self.turn(stored[tuple(slice(rows.start, rows.stop) for rows in box)])

    def read(self, span: TensorSpan) -> Tensor:
        """The parameter in fresh host memory; no other row of the stored tensor is read."""
        return self.turn(read_span(span.part(self.box(span.shape))))

    def turn(self, part: Tensor) -> Tensor:
        """What stands like a part of the stored tensor, turned to stand like the parameter, as a view."""
        for view in self.views:
            if isinstance(view, Transpose):
                part = part.t()
            elif isinstance(view, Drop):
                part = part.squeeze(view.axis)
        return part

    def unplace(self, parameter: Tensor) -> Tensor:
        """The parameter, turned to stand like its part of the stored tensor, as a view."""
        for view in reversed(self.views):
            if isinstance(view, Transpose):
                parameter = parameter.t()
            elif isinstance(view, Drop):
                parameter = parameter.unsqueeze(view.axis)
        return parameter

    @property
    def narrows(self) -> tuple[Narrow, ...]:
        """Those of its views that leave something out; none where it is the whole tensor."""
        return tuple(view for view in self.views if isinstance(view, Narrow))

    @property
    def rows_axis(self) -> int:
        """The stored axis that the parameter's first one is: its thirds are joined along it."""
        return -1 if Transpose() in self.views else 0

    @property
    def is_contiguous(self) -> bool:
        """Whether the view of a contiguous tensor is contiguous, too."""
        return Transpose() not in self.views and all(view.axis == 0 for view in self.narrows)


Row = tuple[str, str, Placement]
BLOCK = "trf_blocks.{i}"
EMBEDDINGS = ("tok_emb", "pos_emb")
QKV = (f"{BLOCK}.att.W_query", f"{BLOCK}.att.W_key", f"{BLOCK}.att.W_value")
LAYERS = (f"{BLOCK}.att.out_proj", f"{BLOCK}.ff.layers.0", f"{BLOCK}.ff.layers.2")
NORMS = (f"{BLOCK}.norm1", f"{BLOCK}.norm2", "final_norm")
BOOK = {ours: ours for ours in (*EMBEDDINGS, *NORMS, *LAYERS[1:], "out_head", *QKV, LAYERS[0])}
FAST = BOOK | dict.fromkeys(QKV, f"{BLOCK}.att.qkv") | {LAYERS[0]: f"{BLOCK}.att.proj"}


def _peers(embeddings: Sequence[str], block: str, final_norm: str, dot: str = ".") -> dict[str, str]:
    """The names that OpenAI gave GPT-2 and that others took over; query, key and value are one layer."""
    layers = ("ln_1", *["attn.c_attn"] * 3, "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    theirs = [f"{block}.{layer}".replace(".", dot) for layer in layers]
    ours = (*EMBEDDINGS, NORMS[0], *QKV, LAYERS[0], NORMS[1], *LAYERS[1:], NORMS[2])
    return dict(zip(ours, (*embeddings, *theirs, final_norm), strict=True))


HUB = _peers(("wte", "wpe"), "h.{i}", "ln_f") | {"out_head": "lm_head"}
OPENAI = _peers(("model/wte", "model/wpe"), "model/h{i}", "model/ln_f", "/")
# How the names of norms, layers and embeddings end.
BOOKS = ((".scale", ".shift"), (".weight", ".bias"), (".weight",))
TORCH = ((".weight", ".bias"), (".weight", ".bias"), (".weight",))


def _rows(
    modules: Mapping[str, str], ends: Sequence[Sequence[str]], turned: Sequence[Transpose | Drop] = ()
) -> list[Row]:
    """The rows of our modules by the names of theirs; what several of ours share is theirs in equal parts.

    `turned` makes weights of a block (out, in).
    """
    norm, layer, embedding = ends
    rows = []
    for ours, theirs in modules.items():
        own = (".scale", ".shift") if ours in NORMS else (".weight", ".bias")
        theirs_end = norm if ours in NORMS else embedding if ours in EMBEDDINGS else layer
        sharing = [other for other, name in modules.items() if name == theirs]
        part = sharing.index(ours)
        third = (Narrow(0, part, part + 1, len(sharing)),) if len(sharing) > 1 else ()
        for end, leaf in zip(theirs_end, own, strict=False):  # an embedding has no bias
            views = turned if ours in (*QKV, *LAYERS) and leaf == ".weight" else ()
            rows.append((theirs + end, ours + leaf, Placement(theirs + end, (*views, *third))))
    return rows


@dataclass(frozen=True, slots=True)
class Dialect:
    """A family of checkpoints: `marker` is a name that only it has, `masks` end names of no weights."""

    rows: list[Row]
    marker: str
    masks: tuple[str, ...] = ()


HUB_MASKS = (".attn.bias", ".attn.masked_bias")
DIALECTS = {
    "book": Dialect(_rows(BOOK, BOOKS), "trf_blocks.0.att.W_query.weight", (".att.mask",)),
    "book-fast": Dialect(_rows(FAST, TORCH), "trf_blocks.0.att.qkv.weight"),
    "huggingface": Dialect(_rows(HUB, TORCH, (Transpose(),)), "h.0.attn.c_attn.weight", HUB_MASKS),
    "nanogpt": Dialect(_rows(HUB, TORCH), "h.0.attn.c_attn.weight", HUB_MASKS),
    "openai": Dialect(
        _rows(OPENAI, (("/g", "/b"), ("/w", "/b"), ("",)), (Drop(0), Transpose())),
        marker="model/h0/attn/c_attn/w",
    ),
}
