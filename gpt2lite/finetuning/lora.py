"""Low-rank adapters, under the book's names: `X.linear.weight` beside `X.lora.A` and `X.lora.B`.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the book, app. E.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpt2lite.errors import UsageError
from gpt2lite.finetuning.interrupts import held
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.loading.offload import require_whole


class LoRA(nn.Module):
    """alpha × (x A) B, which is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(linear.weight.new_zeros(linear.in_features, rank))
        self.B = nn.Parameter(linear.weight.new_zeros(rank, linear.out_features))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), in the dtype of x."""
        return self.alpha * (x @ self.A.to(x.dtype) @ self.B.to(x.dtype))


class LinearWithLoRA(nn.Module):
    """A frozen linear layer, whose weight it shows as its own, plus an adapter."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.lora = linear, LoRA(linear, rank, alpha)

    @property
    def weight(self) -> Tensor:
        """Of the layer below."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        return self.linear(x) + self.lora(x)


def lora_layers(model: nn.Module) -> dict[str, LinearWithLoRA]:
    """The adapted layers by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LinearWithLoRA)}


@torch.inference_mode(False)
def add_lora(model: nn.Module, recipe: Recipe) -> list[nn.Parameter]:
    """Freeze the model and put an adapter around each linear layer of its blocks that the recipe targets.

    Returns the adapters' parameters; what they start from depends on the seed alone. Costs rank × (in + out)
    numbers for each. Adapters that are there already and are as asked for stay, to be trained further. Raises
    UsageError where they are others.
    """
    require_whole(model)
    rank, alpha = recipe.lora_rank, recipe.lora_alpha
    ends = tuple(f".{name}" for name in recipe.lora_targets)
    wanted = {
        path: layer
        for path, layer in model.named_modules()
        if path.startswith("trf_blocks.") and path.endswith(ends)
        if isinstance(layer, nn.Linear | LinearWithLoRA)
    }
    found = lora_layers(model)
    others = {(layer.lora.A.shape[1], layer.lora.alpha) for layer in found.values()} - {(rank, alpha)}
    if found and (others or found.keys() != wanted.keys()):
        said = " and ".join(f"rank {rank} and alpha {alpha:g}" for rank, alpha in sorted(others))
        has = f"the model has LoRA adapters already, of {said or 'other layers'}"
        raise UsageError(f"{has}; describe them (lora_rank, …) or call gpt2lite.merge_lora first")
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(recipe.seed)
    for path, linear in wanted.items():
        if isinstance(linear, nn.Linear):
            layer = LinearWithLoRA(linear, rank, alpha)
            drawn = torch.empty(layer.lora.A.shape, dtype=linear.weight.dtype, device="cpu")
            layer.lora.A.data.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
            model.set_submodule(path, layer)
    adapters = [layer.lora.requires_grad_(True) for layer in lora_layers(model).values()]
    return [p for adapter in adapters for p in adapter.parameters()]


@held()
@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to the weight below, and take the adapter away. Costs one weight at a time.

    Ctrl-C waits until it is done.
    """
    for path, layer in lora_layers(model).items():
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        with torch.autocast(layer.weight.device.type, enabled=False):
            added = layer.lora.alpha * (layer.lora.A.to(dtype) @ layer.lora.B.to(dtype)).t()
        layer.linear.weight.copy_(layer.weight.to(dtype) + added)
        model.set_submodule(path, layer.linear)
