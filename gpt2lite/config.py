"""What shape a GPT-2 has: `GPTConfig` and the four official sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from gpt2lite.errors import UsageError

# name → (n_layers, emb_dim, n_heads); vocabulary 50257 and context 1024 throughout.
# Source: https://github.com/openai/gpt-2 (hparams.json of 124M, 355M, 774M, 1558M)
OFFICIAL_SIZES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
ACTIVATIONS = {"gelu_tanh": "tanh", "gelu": "none"}  # our name → torch's `approximate`
# What a field may be, by its name or else by its type.
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n_classes": (lambda value: type(value) is int and value >= 0, "0 or a positive int"),
    "int": (lambda value: type(value) is int and 0 < value < 2**31, "a positive int of 31 bits"),
    "bool": (lambda value: type(value) is bool, "True or False"),
    "float": (lambda value: isinstance(value, (int, float)) and 0 <= value < 1, "in [0, 1)"),
    "str": (lambda value: value in tuple(ACTIVATIONS), " or ".join(ACTIVATIONS)),
}


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The shape of a GPT-2, with the field names of the book and the article.

    `qkv_bias` is the bias of the three attention inputs; `bias` is every other one (attention output,
    feed-forward and norms). With `tied_head` the output head is the token embedding itself: that is how
    OpenAI trained GPT-2, and it saves vocab_size × emb_dim numbers. The article's dict says nothing about
    it and means an untied head. `n_classes` above 0 is a classifier: a head of so many rows in place of the
    vocabulary's, with a bias if `head_bias`. `activation` is "gelu_tanh", as OpenAI, the book and Hugging
    Face have it, or "gelu", exact, as nanoGPT has it. Raises UsageError for values that cannot work.
    """

    vocab_size: int
    context_length: int
    emb_dim: int
    n_heads: int
    n_layers: int
    drop_rate: float = 0.0
    qkv_bias: bool = True
    bias: bool = True
    tied_head: bool = False
    n_classes: int = 0
    head_bias: bool = False
    activation: str = "gelu_tanh"

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            if wrong := misfit(name, value):
                raise UsageError(f"GPTConfig.{wrong}")
        if self.n_classes and self.tied_head:
            raise UsageError(f"GPTConfig: a classifier (n_classes={self.n_classes}) needs tied_head=False")
        if self.emb_dim % self.n_heads:
            raise UsageError(f"GPTConfig: emb_dim={self.emb_dim} does not divide by n_heads={self.n_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head: 64 in every official size."""
        return self.emb_dim // self.n_heads

    @classmethod
    def named(cls, name: str) -> GPTConfig:
        """The config of an official size: gpt2, gpt2-medium, gpt2-large or gpt2-xl, with its tied head."""
        if name not in OFFICIAL_SIZES:
            raise UsageError(f"unknown GPT-2 size {name!r}; choose from {', '.join(OFFICIAL_SIZES)}")
        n_layers, emb_dim, n_heads = OFFICIAL_SIZES[name]
        return cls(50257, 1024, emb_dim, n_heads, n_layers, tied_head=True)

    @classmethod
    def of(cls, config: GPTConfig | Mapping[str, Any]) -> GPTConfig:
        """`config` itself, or one made from a dict like the article's. Raises UsageError on unknown keys."""
        if isinstance(config, GPTConfig):
            return config
        cls.check_names(config)
        if lacking := [f.name for f in fields(cls) if f.default is MISSING and f.name not in config]:
            raise UsageError(f"config lacks {', '.join(lacking)}")
        return cls(**config)

    @classmethod
    def check_names(cls, config: Mapping[str, Any]) -> None:
        """Raise UsageError for a key that is no field."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(config) - set(known)):
            raise UsageError(f"config has no field {', '.join(unknown)}; it has {', '.join(known)}")

    def as_dict(self, labels: Sequence[str] = ()) -> dict[str, Any]:
        """The fields as a plain dict, as files hold them; `labels` of a classifier as transformers' id2label.

        Raises UsageError where they do not name each row of the head once.
        """
        if not labels:
            return asdict(self)
        if wrong := wrong_labels(labels, self.n_classes):
            raise UsageError(f"labels: {wrong}")
        return asdict(self) | {"id2label": {str(row): label for row, label in enumerate(labels)}}


def wrong_labels(labels: object, n_classes: int) -> str | None:
    """`wanted …, found …` for what does not name each class of a head once; None for what does."""
    names = [*labels] if isinstance(labels, (list, tuple)) else [None]
    if all(type(name) is str for name in names) and len(set(names)) == len(names) == n_classes:
        return None
    return f"wanted {n_classes} names of classes, in the order of the head's rows, found {labels!r:.60}"


def misfit(name: str, value: object) -> str | None:
    """`name must be …, got …` for a value that a field of GPTConfig cannot have; None for others."""
    is_valid, wanted = VALID.get(name) or VALID[str(GPTConfig.__dataclass_fields__[name].type)]
    return None if is_valid(value) else f"{name} must be {wanted}, got {value!r:.50}"
