"""Low-rank adapters, under the book's names: `X.linear.weight` beside `X.lora.A` and `X.lora.B`.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the book, app. E.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.writing import replacing
from gpt2lite.errors import CheckpointError, UsageError


class LoRA(nn.Module):
    """alpha × (x A) B, which is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(linear.weight.new_empty(linear.in_features, rank))
        self.B = nn.Parameter(linear.weight.new_zeros(rank, linear.out_features))
        self.alpha = alpha
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return self.alpha * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    """A frozen linear layer and its addition."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.lora = linear, LoRA(linear, rank, alpha)

    @property
    def weight(self) -> Tensor:
        """Of the layer below."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the layer below."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return self.linear(x) + self.lora(x)


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LinearWithLoRA]]:
    """(path, layer) of each."""
    found = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LinearWithLoRA)]
    yield from found


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze the model and put an adapter around each linear layer of its blocks whose name ends in a target.

    Costs rank × (in + out) numbers for each. Raises UsageError where there are adapters already.
    """
    if any(True for _ in lora_layers(model)):
        raise UsageError("the model has LoRA adapters already; merge them first (gpt2lite.merge_lora)")
    model.requires_grad_(False)
    for path, layer in list(model.named_modules()):
        is_target = path.startswith("trf_blocks.") and path.endswith(tuple(f".{name}" for name in targets))
        if is_target and isinstance(layer, nn.Linear):
            _replace(model, path, LinearWithLoRA(layer, rank, alpha))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to the weight below, and take the adapter away. Costs one weight at a time."""
    for path, layer in lora_layers(model):
        added = layer.lora.alpha * (layer.lora.A.float() @ layer.lora.B.float()).t()
        layer.linear.weight.copy_(layer.linear.weight.float() + added)
        _replace(model, path, layer.linear)


def save_lora(model: nn.Module, path: Path) -> None:
    """Write the adapters alone, with the alpha that no weight holds, whole or not at all."""
    layers = dict(lora_layers(model))
    alphas = {layer.lora.alpha for layer in layers.values()}
    tensors = {
        f"{name}.lora.{part}": getattr(layer.lora, part).detach()
        for name, layer in layers.items()
        for part in "AB"
    }
    with replacing(path) as temporary:
        torch.save({"lora_alpha": alphas.pop() if alphas else 0.0, "lora": tensors}, temporary)


def load_lora(model: nn.Module, path: Path) -> None:
    """Put the adapters of a file around a model's layers; `merge_lora` makes it plain again.

    Raises CheckpointError for a file that is none, or whose layers are not the model's.
    """
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
        alpha, tensors = float(saved["lora_alpha"]), dict(saved["lora"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a file of LoRA adapters ({error})") from None
    modules = dict(model.named_modules())
    for name in sorted({name.rsplit(".lora.", 1)[0] for name in tensors}):
        layer, a, b = modules.get(name), tensors.get(f"{name}.lora.A"), tensors.get(f"{name}.lora.B")
        if not isinstance(layer, nn.Linear) or a is None or b is None:
            raise CheckpointError(
                f"{path}: holds an adapter for {name}, which is no linear layer of the model"
            )
        if (a.shape[0], b.shape[1]) != (layer.in_features, layer.out_features) or a.shape[1:] != b.shape[:1]:
            raise CheckpointError(
                f"{path}: the adapter of {name} is {tuple(a.shape)} × {tuple(b.shape)}, "
                f"the layer {layer.in_features} → {layer.out_features}"
            )
        adapted = LinearWithLoRA(layer, a.shape[1], alpha)
        with torch.no_grad():
            adapted.lora.A.copy_(a)
            adapted.lora.B.copy_(b)
        _replace(model, name, adapted)
