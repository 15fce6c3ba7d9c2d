"""Low-rank adapters, under the book's names: `X.linear.weight` beside `X.lora.A` and `X.lora.B`.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the book, app. E.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
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


def _targets(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The linear layers of the blocks whose names end in one of these, adapted or not, by path."""
    ends = tuple(f".{name}" for name in names)
    return {
        path: layer
        for path, layer in model.named_modules()
        if path.startswith("trf_blocks.") and path.endswith(ends)
        if isinstance(layer, nn.Linear | LinearWithLoRA)
    }


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> list[nn.Parameter]:
    """Freeze the model and put an adapter around each linear layer of its blocks whose name ends in a target.

    Returns the adapters' parameters. Costs rank × (in + out) numbers for each. Adapters that are there and
    are as asked for stay, to be trained further. Raises UsageError where they are others.
    """
    wanted, found = _targets(model, targets), dict(lora_layers(model))
    others = {(layer.lora.A.shape[1], layer.lora.alpha) for layer in found.values()} - {(rank, alpha)}
    if found and (others or found.keys() != wanted.keys()):
        said = " and ".join(f"rank {rank} and alpha {alpha:g}" for rank, alpha in sorted(others))
        raise UsageError(
            f"the model has LoRA adapters already, {f'of {said}' if said else 'of other layers'}; give their "
            "lora_rank, lora_alpha and lora_targets, or merge them first (gpt2lite.merge_lora)"
        )
    model.requires_grad_(False)
    for path, layer in {} if found else wanted.items():
        _replace(model, path, LinearWithLoRA(layer, rank, alpha))
    adapters = [p for _, layer in lora_layers(model) for p in layer.lora.parameters()]
    for parameter in adapters:
        parameter.requires_grad_(True)
    return adapters


def drop_lora(model: nn.Module, kept: Collection[str]) -> None:
    """Take the adapters away, unmerged, but for those of the paths in `kept`."""
    for path, layer in lora_layers(model):
        if path not in kept:
            _replace(model, path, layer.linear)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to the weight below, and take the adapter away. Costs one weight at a time."""
    for path, layer in lora_layers(model):
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        added = layer.lora.alpha * (layer.lora.A.to(dtype) @ layer.lora.B.to(dtype)).t()
        layer.linear.weight.copy_(layer.weight.to(dtype) + added)
        _replace(model, path, layer.linear)


def save_lora(trained: Mapping[str, Tensor], alpha: float, path: Path) -> None:
    """Write what was trained, by its names: adapters with the alpha that no weight holds, and a head.

    The file appears whole or not at all.
    """
    tensors = {name: tensor.detach() for name, tensor in trained.items()}
    with replacing(path) as temporary:
        torch.save({"lora_alpha": alpha, "lora": tensors}, temporary)


def _require_place(model: nn.Module, path: Path, name: str, tensor: Tensor) -> None:
    """For what is no adapter: a parameter of the same name and shape."""
    own = dict(model.named_parameters()).get(name)
    if own is None or own.shape != tensor.shape:
        found = "no such weight" if own is None else f"one of {tuple(own.shape)}"
        raise CheckpointError(
            path,
            f"{name} is {tuple(tensor.shape)}, the model has {found}. "
            "If it is a classifier's head, call gpt2lite.as_classifier first",
        )


@torch.no_grad()
def load_lora(model: nn.Module, path: Path) -> None:
    """Put the adapters of a file around a model's layers; `merge_lora` makes it plain again.

    The head of a classifier, which was trained with them, takes the place of the model's. Raises
    CheckpointError, before anything is changed, for a file that is none, or whose layers are not the model's.
    """
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
        alpha, tensors = float(saved["lora_alpha"]), dict(saved["lora"])
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(path, f"not a file of LoRA adapters ({error})") from None
    whole = {name: tensor for name, tensor in tensors.items() if ".lora." not in name}
    for name, tensor in whole.items():
        _require_place(model, path, name, tensor)
    modules, adapted = dict(model.named_modules()), {}
    for name in sorted({name.rsplit(".lora.", 1)[0] for name in tensors.keys() - whole.keys()}):
        layer, a, b = modules.get(name), tensors.get(f"{name}.lora.A"), tensors.get(f"{name}.lora.B")
        if not isinstance(layer, nn.Linear) or a is None or b is None:
            raise CheckpointError(path, f"holds an adapter for {name}, which is no linear layer of the model")
        if (a.shape[0], b.shape[1]) != (layer.in_features, layer.out_features) or a.shape[1:] != b.shape[:1]:
            raise CheckpointError(
                path,
                f"the adapter of {name} is {tuple(a.shape)} × {tuple(b.shape)}, "
                f"the layer {layer.in_features} → {layer.out_features}",
            )
        adapted[name] = LinearWithLoRA(layer, a.shape[1], alpha)
        adapted[name].lora.A.copy_(a)
        adapted[name].lora.B.copy_(b)
    for name, new in adapted.items():
        _replace(model, name, new)
    for name, tensor in whole.items():
        model.get_parameter(name).copy_(tensor)
