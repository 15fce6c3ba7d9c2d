"""A teacher: a checkpoint opened like any other, whose predictions another model learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt2lite.config import GPTConfig
from gpt2lite.errors import UsageError
from gpt2lite.finetuning.losses import Teaching, rows_of
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.loading.forecast import Forecast
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model that does not learn, and how much it counts."""

    model: GPTModel
    recipe: Recipe

    @torch.no_grad()
    def says(self, ids: Tensor, places: Tensor | None) -> Teaching:
        """Of ids (B, T) at N places. Keeps (N, C) numbers; the loss makes logits of some at a time."""
        hidden = rows_of(self.model, ids, places)
        return Teaching(self.model.out_head, hidden, self.recipe.alpha, self.recipe.temperature)


def _how(recipe: Recipe, device: torch.device) -> tuple[str, dict[str, Any]]:
    """The strategy and the options that a teacher is loaded with: mapped, where nothing speaks against it."""
    if recipe.teacher_dtype == "int8":
        return "auto", {"quantize": "int8"}
    return "mmap" if device.type == "cpu" else "auto", {"dtype": getattr(torch, recipe.teacher_dtype)}


def open_teacher(ours: GPTConfig, recipe: Recipe) -> Opened[GPTModel]:
    """The recipe's teacher, not loaded. Raises as `open_model`; UsageError where it cannot teach `ours`."""
    opened = open_model(recipe.teacher)
    theirs, seq_len = opened.sizes, recipe.row_length(ours.context_length)
    if ours.n_classes or theirs.n_classes:
        raise UsageError(
            f"teacher={recipe.teacher}: only language models teach and are taught, no classifiers"
        )
    if theirs.vocab_size != ours.vocab_size:
        said = f"has a vocabulary of {theirs.vocab_size}, the student {ours.vocab_size}"
        raise UsageError(f"teacher={recipe.teacher}: {said}; both must use the same tokenizer")
    if theirs.context_length < seq_len:
        said = f"has a context of {theirs.context_length}; use seq_len={theirs.context_length} or less"
        raise UsageError(f"teacher={recipe.teacher}: {said}, now {seq_len}")
    return opened


def load_teacher(student: GPTModel, recipe: Recipe, device: torch.device) -> Teacher | None:
    """The recipe's teacher on a device; None where it names none."""
    if not recipe.teacher:
        return None
    strategy, options = _how(recipe, device)
    return Teacher(open_teacher(student.config, recipe).load(device, strategy, **options), recipe)


def forecast_teacher(opened: Opened[GPTModel], recipe: Recipe, device: torch.device) -> Forecast:
    """What `load_teacher` costs."""
    strategy, options = _how(recipe, device)
    found = opened.forecast(device, **options)
    return found[strategy] if strategy in found else max(found.values(), key=lambda each: each.stays_host)
