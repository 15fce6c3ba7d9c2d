"""How to train: `Recipe`, its numbers checked where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gpt2lite.errors import UsageError

LORA_TARGETS = ("W_query", "W_key", "W_value", "out_proj", "layers.0", "layers.2")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One optimisation run. Every argument from `autocast` on is a lever on memory.

    A step reads `accumulate` × `batch_size` rows of `seq_len` tokens (None: the whole context), as if they
    were one batch. The learning rate rises over `warmup_steps` and falls along a cosine to a tenth. Gradients
    are clipped to the norm `clip` (0: not), matrices decay by `weight_decay`.

    autocast: bf16 in matrix products, fp16 with a scaled loss where the device has no bf16; weights stay.
    recompute: keeps a block's input alone and runs the block again in backward (activation checkpointing).
    chunked_loss: logits exist for a few rows at a time, never in backward.
    step_in_backward: each weight is stepped and its gradient freed as soon as it is there; no `clip`, no
    `accumulate`.
    lora_rank: trains A (in, rank) and B (rank, out) beside `lora_targets`, frozen; lora_alpha multiplies
    their product, as in the book. last_blocks: trains so many blocks and the last norm. A new classifier's
    head is always trained. eight_bit: Adam's moments in 8 bits (the extra [quant]).

    Raises UsageError for what cannot work.
    """

    steps: int = 200
    batch_size: int = 4
    seq_len: int | None = None
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup_steps: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    autocast: bool = False
    recompute: bool = False
    chunked_loss: bool = True
    step_in_backward: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("W_query", "W_value")
    last_blocks: int | None = None
    eight_bit: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 1), ("warmup_steps", 0)):
            _require_int(name, getattr(self, name), least)
        _require_int("lora_rank", self.lora_rank, 0)
        _require_int("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        for name in ("seq_len", "last_blocks"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1)
        for name in ("learning_rate", "weight_decay", "clip", "lora_alpha"):
            value = getattr(self, name)
            is_number = type(value) in (int, float) and math.isfinite(value)
            if not is_number or value < 0 or (name == "learning_rate" and not value):
                raise UsageError(f"{name} must be a positive number, got {value!r}")
        unknown = set(self.lora_targets) - set(LORA_TARGETS)
        if unknown or not self.lora_targets:
            raise UsageError(
                f"lora_targets are of {', '.join(LORA_TARGETS)}, got {', '.join(sorted(unknown)) or 'none'}"
            )
        if self.lora_rank and self.last_blocks:
            raise UsageError("lora_rank and last_blocks exclude each other: both say what is trained")
        if self.step_in_backward and (self.clip or self.accumulate > 1):
            raise UsageError(
                "step_in_backward frees each gradient at once, so there is none to clip or accumulate: "
                "it needs clip=0 and accumulate=1"
            )

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, …"""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def _require_int(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise UsageError(f"{name} must be an int of at least {least}, got {value!r}")
