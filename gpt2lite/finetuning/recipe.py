"""How to train: `Recipe`, its numbers checked where it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from gpt2lite.errors import UsageError, require_allowed

T = TypeVar("T")
LORA_TARGETS = ("W_query", "W_key", "W_value", "out_proj", "layers.0", "layers.2")
TEACHER_DTYPES = ("float32", "bfloat16", "int8")
MOST = sys.float_info.max
TAUGHT = ("alpha", "temperature", "hidden_weight", "teacher_dtype")  # say how, if there is a teacher


def _told(default: T, help: str) -> T:
    """A field's default, and what the command line says of it."""
    return field(default=default, metadata={"help": help})


def _int(least: int) -> tuple[Callable[[Any], object], str]:
    return (lambda value: type(value) is int and value >= least), f"an int of at least {least}"


# What a field may be, by its name or else by its type; its default it may be in any case.
RULES: dict[object, tuple[Callable[[Any], object], str]] = {
    **dict.fromkeys(("warmup_steps", "seed", "lora_rank"), _int(0)),
    **dict.fromkeys(("int", "int | None"), _int(1)),
    "float": (lambda value: type(value) in (int, float) and 0 <= value <= MOST, "a finite number, 0 or more"),
    "bool": (lambda value: type(value) is bool, "True or False"),
    "teacher_dtype": (lambda value: value in TEACHER_DTYPES, f"one of {', '.join(TEACHER_DTYPES)}"),
    "str": (lambda value: isinstance(value, str), "a path or a name"),
    "tuple[str, ...]": (lambda value: True, "what is checked below"),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One optimisation run: the optimizer, the levers on memory, and how often to look and to save.

    A step reads `accumulate` × `batch_size` rows of `seq_len` tokens (None: the whole context), as if they
    were one batch. The learning rate rises over `warmup_steps` (None: 10, or half of fewer steps) and falls
    along a cosine to a tenth. Gradients are clipped to the norm `clip` (0: no clipping), matrices decay by
    `weight_decay`.

    autocast: bf16 in matrix products, fp16 with a scaled loss where the device has no bf16; weights stay.
    recompute: keeps only a block's input and runs the block again in backward (activation checkpointing).
    chunked_loss: logits exist for a few rows at a time, never in backward.
    step_in_backward: each weight is stepped and its gradient freed as soon as it is computed; needs clip=0
    and accumulate=1.
    lora_rank: trains A (in, rank) and B (rank, out) beside `lora_targets`, which are frozen; lora_alpha
    multiplies their product, as in the book. last_blocks: trains only that many blocks and the last norm. A
    classifier's head is always trained. eight_bit: Adam's moments in 8 bits (the extra [quant]).
    teacher: a checkpoint or a name on the Hub, of any size and the same vocabulary, whose predictions are
    learned beside the text: alpha × temperature² × KL(teacher ‖ student) + (1 - alpha) × the loss. A teacher
    of equal width may add hidden_weight × the mean squared distance of the last hidden states. It is held in
    teacher_dtype (float32, bfloat16, int8); on the CPU, where that is the file's own, its file is mapped.
    validate_every, save_every: in steps; `keep` saved states are kept. These three may change on resuming.

    Raises UsageError for values that cannot work.
    """

    steps: int = _told(200, "optimisation steps")
    batch_size: int = _told(4, "rows in memory at once")
    seq_len: int | None = _told(None, "tokens per row (default: context)")
    accumulate: int = _told(1, "batches a step")
    learning_rate: float = _told(3e-4, "its peak; it rises to it, then falls along a cosine")
    warmup_steps: int | None = _told(None, "steps until the peak (default: 10, or half of fewer steps)")
    weight_decay: float = _told(0.1, "AdamW's, of matrices alone")
    clip: float = _told(1.0, "largest norm of the gradient, 0 for no clipping")
    seed: int = _told(0, "for data order, adapters and dropout")
    autocast: bool = _told(False, "bf16 (or fp16) in matrix products; weights stay as they are")
    recompute: bool = _told(False, "keep only blocks' inputs, run blocks again in backward")
    chunked_loss: bool = _told(True, "logits for a few rows at a time")
    step_in_backward: bool = _told(False, "step each weight as soon as its gradient is there (with clip 0)")
    lora_rank: int = _told(0, "train only adapters of this rank, 0 for none")
    lora_alpha: float = _told(16.0, "scale of the adapters' output")
    lora_targets: tuple[str, ...] = _told(
        ("W_query", "W_value"), f"adapted layers: {', '.join(LORA_TARGETS)}"
    )
    last_blocks: int | None = _told(None, "train only this many last blocks and the last norm")
    eight_bit: bool = _told(False, "Adam's moments in 8 bits, by torchao")
    compile: bool = _told(False, "torch.compile the step")
    teacher: str = _told("", "a checkpoint or Hub name, to learn its predictions beside the text")
    alpha: float = _told(0.5, "the teacher's share of the loss")
    temperature: float = _told(2.0, "softens what teacher and student predict")
    hidden_weight: float = _told(
        0.0, "weight in the loss of the distance from the teacher's last hidden states"
    )
    teacher_dtype: str = _told("float32", f"the teacher's weights: {', '.join(TEACHER_DTYPES)}")
    validate_every: int = _told(50, "steps between validations")
    save_every: int = _told(100, "steps between saved states")
    keep: int = _told(2, "saved states to keep")

    def __post_init__(self) -> None:
        known = {field.name: field for field in fields(self)}
        given = {name: value for name in known if (value := getattr(self, name)) is not known[name].default}
        require_allowed(given, {name: RULES.get(name) or RULES[known[name].type] for name in given})
        if (warmup := self.warmup) > self.steps:
            raise UsageError(f"warmup_steps={warmup} is more than steps={self.steps}: no step has the peak")
        if not self.learning_rate:
            raise UsageError("learning_rate must be more than 0")
        if self.lora_rank and not self.lora_alpha:
            raise UsageError("lora_alpha must be more than 0: it multiplies what LoRA learns")
        if self.seed >= 2**32:
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        asked: object = self.lora_targets
        targets = (asked,) if isinstance(asked, str) else tuple(asked) if isinstance(asked, Iterable) else ()
        if not targets or any(target not in LORA_TARGETS for target in targets):
            raise UsageError(f"unknown lora_targets {asked!r}; choose from {', '.join(LORA_TARGETS)}")
        object.__setattr__(self, "lora_targets", targets)  # a saved recipe's list is the same recipe
        if self.lora_rank and self.last_blocks:
            raise UsageError("lora_rank and last_blocks exclude each other: both say what is trained")
        if self.alpha > 1 or not self.temperature:
            said = f"alpha={self.alpha} and temperature={self.temperature}"
            raise UsageError(f"{said}: alpha is a share, 0 … 1, and the temperature is more than 0")
        idle = [name for name in TAUGHT if getattr(self, name) != known[name].default]
        if idle and not self.teacher:
            raise UsageError(f"{', '.join(idle)}: without effect, since teacher names none; name one")
        if self.teacher and (self.compile or not self.chunked_loss):
            raise UsageError("a teacher needs chunked_loss=True, compile=False: its logits are never whole")
        if self.step_in_backward and (self.clip or self.accumulate > 1):
            raise UsageError("step_in_backward frees each gradient: it needs clip=0 and accumulate=1")

    @property
    def warmup(self) -> int:
        """Steps until the learning rate peaks."""
        return min(10, self.steps // 2) if self.warmup_steps is None else self.warmup_steps

    def row_length(self, context_length: int) -> int:
        """Tokens a row for a model of this context. Raises UsageError where seq_len is more than it."""
        if (self.seq_len or 1) > context_length:
            raise UsageError(f"seq_len={self.seq_len} is more than the context of {context_length}")
        return self.seq_len or context_length

    def learning_rate_at(self, step: int) -> float:
        """Of step 0, 1, …"""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))
