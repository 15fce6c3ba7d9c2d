"""What shape a GPT-2 has: `GPTConfig` and the four official sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gpt2lite.errors import UsageError, did_you_mean

# name → (n_layers, emb_dim, n_heads); vocabulary 50257 and context 1024 throughout.
# Source: https://github.com/openai/gpt-2 (hparams.json of 124M, 355M, 774M, 1558M)
OFFICIAL_SIZES = {
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
# Other names of them: OpenAI's own, and what people say.
ALSO_CALLED = {"gpt2-small": "gpt2", "124m": "gpt2", "355m": "gpt2-medium", "774m": "gpt2-large"}
ALSO_CALLED |= dict.fromkeys(("1558m", "1.5b"), "gpt2-xl")
NEW_TOKENS = 240  # that are written where nobody says how many, if they fit
EMBEDDED = Path(__file__).resolve().parent / "data" / "embedded.pth"  # the model that ships with the package
SLOTS = re.compile("{(instruction|input)}")
TEMPLATES = ("prompt", "prompt_input")  # Alpaca's names of its two
PURPOSE = "trained_for"  # the word of a config under which a `Purpose` stands
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
        """The config of an official size: gpt2, gpt2-medium, gpt2-large or gpt2-xl, with its tied head.

        124M, 355M, 774M, 1558M and 1.5B name them, too.
        """
        if (known := official_name(name)) not in OFFICIAL_SIZES:
            raise UsageError(f"unknown GPT-2 size {name!r}{did_you_mean(name, OFFICIAL_SIZES)}")
        n_layers, emb_dim, n_heads = OFFICIAL_SIZES[known]
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

    def as_dict(self, purpose: Purpose | None = None) -> dict[str, Any]:
        """The fields as a plain dict, as files hold them; with a purpose, labels as transformers' id2label.

        Raises UsageError where they do not name each row of the head once.
        """
        found, purpose = asdict(self), purpose or Purpose()
        if purpose.labels:
            if wrong := wrong_labels(purpose.labels, self.n_classes):
                raise UsageError(f"labels: {wrong}")
            found["id2label"] = {str(row): label for row, label in enumerate(purpose.labels)}
        own: dict[str, Any] = dict(zip(TEMPLATES, purpose.template, strict=False))
        own |= {"seq_len": purpose.seq_len} if purpose.seq_len else {}
        return found | ({PURPOSE: own} if own else {})


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a model was trained for, which weights cannot say; its file keeps it with the config.

    `labels` name a classifier's classes, in the order of the head's rows. `seq_len`: how many tokens it read
    of a text (None: the context). `template`: how an instruction was written, without and with an input, two
    texts with {instruction} and {input} in them; () where there was none. Raises UsageError for others.
    """

    labels: tuple[str, ...] = ()
    seq_len: int | None = None
    template: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len is not None and (type(self.seq_len) is not int or self.seq_len < 1):
            raise UsageError(f"seq_len must be a positive int or None, got {self.seq_len!r:.50}")
        slots = [sorted(SLOTS.findall(text)) if type(text) is str else None for text in self.template]
        if slots not in ([], [["instruction"], ["input", "instruction"]]):
            said = "two texts, with {instruction}, and with {instruction} and {input}"
            raise UsageError(f"template must be {said}; got {self.template!r:.60}")


def official_name(name: str) -> str:
    """The name of an official size that is called otherwise; any other name as it is."""
    return ALSO_CALLED.get(name.lower(), name)


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
