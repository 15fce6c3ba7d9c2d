"""A teacher: a checkpoint opened like any other, whose predictions another model learns."""

from __future__ import annotations

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


@torch.no_grad()
def says(teacher: GPTModel, ids: Tensor, places: Tensor | None, recipe: Recipe) -> Teaching:
    """Of ids (B, T) at N places. Keeps (N, C) numbers; the loss makes logits of some at a time."""
    hidden, weights = rows_of(teacher, ids, places), (recipe.alpha, recipe.temperature, recipe.hidden_weight)
    return Teaching(teacher.out_head, hidden, *weights)


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
        wrong = "only language models teach and are taught, no classifiers"
    elif theirs.vocab_size != ours.vocab_size:
        sizes = f"{theirs.vocab_size}, the student {ours.vocab_size}"
        wrong = f"has a vocabulary of {sizes}; both must use the same tokenizer"
    elif (most := theirs.context_length) < seq_len:
        wrong = f"has a context of {most}; use seq_len={most} or less, now {seq_len}"
    elif recipe.hidden_weight and theirs.emb_dim != ours.emb_dim:
        wrong = f"hidden_weight compares widths of {theirs.emb_dim} and {ours.emb_dim}; they must be equal"
    else:
        return opened
    raise UsageError(f"teacher={recipe.teacher}: {wrong}")


def load_teacher(student: GPTModel, recipe: Recipe, device: torch.device) -> GPTModel | None:
    """The recipe's teacher on a device; None where it names none."""
    if not recipe.teacher:
        return None
    strategy, options = _how(recipe, device)
    return open_teacher(student.config, recipe).load(device, strategy, **options)


def forecast_teacher(opened: Opened[GPTModel], recipe: Recipe, device: torch.device) -> Forecast:
    """What `load_teacher` costs."""
    strategy, options = _how(recipe, device)
    found = opened.forecast(device, **options)
    return found[strategy] if strategy in found else max(found.values(), key=lambda each: each.stays_host)
