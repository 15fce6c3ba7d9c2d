"""What shape a GPT-2 has: `GPTConfig` and the four official sizes."""

from __future__ import annotations

from collections.abc import Mapping
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
OFFICIAL_HEADS = {(n_layers, emb_dim): n_heads for n_layers, emb_dim, n_heads in OFFICIAL_SIZES.values()}


ACTIVATIONS = {"gelu_tanh": "tanh", "gelu": "none"}  # our name → torch's `approximate`


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The shape of a GPT-2, with the field names of the book and the article.

    `qkv_bias` is the bias of the three attention inputs; `bias` is every other one (attention output,
    feed-forward and norms). With `tied_head` the output head is the token embedding itself: that is how
    OpenAI trained GPT-2, and it saves vocab_size × emb_dim numbers. The article's dict says nothing about
    it and means an untied head. `n_classes` above 0 is a classifier: a head of so many rows in place of the
    vocabulary's, with a bias if `head_bias`. `activation` is "gelu_tanh", as OpenAI, the book and Hugging
    Face have it, or "gelu", exact, as nanoGPT has it. Raises UsageError for what cannot be.
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
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"GPTConfig.{name} must be a positive int, got {value!r}")
        for name in ("qkv_bias", "bias", "tied_head", "head_bias"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"GPTConfig.{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.drop_rate, (int, float)) or not 0 <= self.drop_rate < 1:
            raise UsageError(f"GPTConfig.drop_rate must be in [0, 1), got {self.drop_rate!r}")
        if type(self.n_classes) is not int or self.n_classes < 0 or (self.n_classes and self.tied_head):
            raise UsageError(
                f"GPTConfig.n_classes must be 0, or more with an untied head, got {self.n_classes!r}"
            )
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"GPTConfig.activation must be of {' '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
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
            raise UsageError(f"no GPT-2 is called {name!r}; the names are {', '.join(OFFICIAL_SIZES)}")
        n_layers, emb_dim, n_heads = OFFICIAL_SIZES[name]
        return cls(50257, 1024, emb_dim, n_heads, n_layers, tied_head=True)

    @classmethod
    def of(cls, config: GPTConfig | Mapping[str, Any]) -> GPTConfig:
        """`config` itself, or one made from a dict like the article's. Raises UsageError on unknown keys."""
        if isinstance(config, GPTConfig):
            return config
        cls.check_names(config)
        missing = sorted(
            field.name for field in fields(cls) if field.default is MISSING and field.name not in config
        )
        if missing:
            raise UsageError(f"config lacks {', '.join(missing)}")
        return cls(**config)

    @classmethod
    def check_names(cls, config: Mapping[str, Any]) -> None:
        """Raise UsageError for a key that is no field."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise UsageError(f"config has no field {', '.join(unknown)}; it has {', '.join(known)}")

    def as_dict(self) -> dict[str, Any]:
        """The fields as a plain dict: what a side file `<stem>.json` holds."""
        return asdict(self)
