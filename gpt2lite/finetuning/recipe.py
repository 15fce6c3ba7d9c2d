"""How to train: `Recipe`, its numbers checked where it is made."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from gpt2lite.errors import UsageError

LORA_TARGETS = ("W_query", "W_key", "W_value", "out_proj", "layers.0", "layers.2")
AT_LEAST_1 = ("steps", "batch_size", "seq_len", "accumulate", "last_blocks", "validate_every", "save_every")
LEAST = dict.fromkeys((*AT_LEAST_1, "keep"), 1) | {"warmup_steps": 0, "seed": 0, "lora_rank": 0}
NUMBERS = ("learning_rate", "weight_decay", "clip", "lora_alpha", "alpha", "temperature")
TAUGHT = ("alpha", "temperature", "teacher_dtype")  # say how, if there is a teacher
TEACHER_DTYPES = ("float32", "bfloat16", "int8")

FLAGS = ("autocast", "recompute", "chunked_loss", "step_in_backward", "eight_bit", "compile")


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
    learned beside the text: alpha × temperature² × KL(teacher ‖ student) + (1 - alpha) × the loss. It is held
    in teacher_dtype (float32, bfloat16, int8); on the CPU, where that is the file's own, its file is mapped.
    validate_every, save_every: in steps; `keep` saved states are kept. These three may change on resuming.

    Raises UsageError for values that cannot work.
    """

    steps: int = 200
    batch_size: int = 4
    seq_len: int | None = None
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup_steps: int | None = None
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
    teacher: str = ""
    alpha: float = 0.5
    temperature: float = 2.0
    teacher_dtype: str = "float32"
    validate_every: int = 50
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            is_unset = value is None and name in ("seq_len", "last_blocks", "warmup_steps")
            if not is_unset and (type(value) is not int or value < least):
                raise UsageError(f"{name} must be an int of at least {least}, got {value!r}")
        for name in NUMBERS:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
                raise UsageError(f"{name} must be a finite number, 0 or more, got {value!r}")
        for name in FLAGS:
            if type(value := getattr(self, name)) is not bool:
                raise UsageError(f"{name} must be True or False, got {value!r}")
        if self.warmup > self.steps:
            raise UsageError(
                f"warmup_steps={self.warmup} is more than steps={self.steps}: no step has the peak"
            )
        if not self.learning_rate:
            raise UsageError("learning_rate must be more than 0")
        if self.lora_rank and not self.lora_alpha:
            raise UsageError("lora_alpha must be more than 0: it multiplies what LoRA learns")
        if self.seed >= 2**32:
            raise UsageError(f"seed must be below 2**32, got {self.seed}")
        given: object = self.lora_targets
        targets = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else ()
        if not targets or any(target not in LORA_TARGETS for target in targets):
            raise UsageError(f"unknown lora_targets {given!r}; choose from {', '.join(LORA_TARGETS)}")
        object.__setattr__(self, "lora_targets", targets)  # a saved recipe's list is the same recipe
        if self.lora_rank and self.last_blocks:
            raise UsageError("lora_rank and last_blocks exclude each other: both say what is trained")
        if self.alpha > 1 or not self.temperature:
            said = f"alpha={self.alpha} and temperature={self.temperature}"
            raise UsageError(f"{said}: alpha is a share, 0 … 1, and the temperature is more than 0")
        if not isinstance(self.teacher, str) or self.teacher_dtype not in TEACHER_DTYPES:
            said = f"teacher={self.teacher!r}, teacher_dtype={self.teacher_dtype!r}"
            raise UsageError(f"{said}: wanted a path or a name, and one of {', '.join(TEACHER_DTYPES)}")
        known = type(self).__dataclass_fields__
        idle = [name for name in TAUGHT if getattr(self, name) != known[name].default]
        if idle and not self.teacher:
            raise UsageError(f"{', '.join(idle)} say how a teacher is heard, but teacher names none")
        if self.teacher and (self.compile or not self.chunked_loss):
            raise UsageError(
                "a teacher needs chunked_loss=True and compile=False: its logits are never whole"
            )
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
