"""Which view of which stored tensor each parameter of ours is, one table for each family of checkpoints.

A row is (their name, our name, placement); `{i}` stands for the block. Nothing else in the program knows a
foreign name, so another dialect is another table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor


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
        *_pairs("lm_head", "out_head", PLAIN),
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
