"""`load_module` with modules that keep, compute or load things in their own ways: plain torch's result, or a refusal."""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gpt2lite import CheckpointError, UsageError, load_module
from gpt2lite.loading import STRATEGIES

ONE_FILE = [name for name in STRATEGIES if name != "per_tensor"]
BUILT = ("sequential", "baseline")
ALL = ("auto", *ONE_FILE)


@dataclass
class Holder:
    """A plain object with a tensor."""

    pos: Tensor


class Slotted:
    """A plain object without a dict."""

    __slots__ = ("pos",)

    def __init__(self, pos: Tensor) -> None:
        self.pos = pos


class Keeps(nn.Module):
    """Keeps a tensor in a plain attribute, and adds it to what its layer gives."""

    def __init__(self, keep: Callable[[Tensor], Any], find: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.kept, self.find = nn.Linear(3, 3), keep(torch.arange(3.0)), find

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.find(self.kept)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class WithNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(3, 3), torch.linspace(0, 1, 3).numpy()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.from_numpy(self.steps)


class Branches(nn.Module):
    """Reads the value of a tensor, and asks a parameter for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3) if torch.ones(1) > 0 else nn.Identity()
        self.device = self.layer.weight.device

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.arange(3, device=self.device)


class ReadsItsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.ones_(self.layer.weight)
        self.scale = self.layer.weight.sum().item()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


class Aliases(nn.Module):
    """Keeps a view of a parameter that it made with values, after reading a value."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.linspace(0, 1, 3)[1].item()
        weight = nn.Parameter(torch.ones(3))
        self.first = [weight[:1]]
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.first[0] * self.rate


class UnsavedAlias(nn.Module):
    """An unsaved buffer that is a parameter's memory."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(3))
        self.register_buffer("alias", weight.data, persistent=False)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.alias


class UnsavedOfAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.ones_(self.layer.weight)
        self.register_buffer("total", self.layer.weight.detach().sum(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.total


class HiddenLayers(nn.Module):
    """Layers in a plain list: no part of the state dict, and all the same computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.more = nn.Linear(3, 3), [nn.LayerNorm(3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.more[0](self.layer(x))


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.saved = nn.Buffer(torch.ones(3))
        self.unsaved = nn.Buffer(torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.saved + self.unsaved


class Hooked(nn.Module):
    """Adds a tensor in a forward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.layer.register_forward_hook(partial(self.add, torch.arange(3.0)))

    @staticmethod
    def add(what: Tensor, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + what

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def in_a_closure(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor * 1


KEPT: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "attribute": (lambda t: t, lambda kept: kept),
    "list": (lambda t: [t], lambda kept: kept[0]),
    "dict of tuples": (lambda t: {"a": (t,)}, lambda kept: kept["a"][0]),
    "set": (lambda t: {t}, lambda kept: next(iter(kept))),
    "deque": (lambda t: deque([t]), lambda kept: kept[0]),
    "SimpleNamespace": (lambda t: types.SimpleNamespace(pos=t), lambda kept: kept.pos),
    "partial": (lambda t: partial(torch.add, t), lambda kept: kept(0)),
    "partial by keyword": (lambda t: partial(torch.add, other=t), lambda kept: kept(torch.zeros(3))),
    "dataclass": (Holder, lambda kept: kept.pos),
    "slots": (Slotted, lambda kept: kept.pos),
    "closure": (in_a_closure, lambda kept: kept()),
}
BUILDS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(Keeps, *functions) for name, functions in KEPT.items()},
    "LSTM": partial(Recurrent, nn.LSTM),
    "GRU": partial(Recurrent, nn.GRU),
    "bare LSTM": lambda: Sequence0(nn.LSTM(3, 3)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "orthogonal by cayley": lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
    "attention": lambda: Attention(),
    **{
        kind.__name__: kind
        for kind in (WithNumpy, Branches, ReadsItsParameter, Aliases, UnsavedAlias, UnsavedOfAParameter)
    },
    **{kind.__name__: kind for kind in (HiddenLayers, WithBuffer, Hooked)},
}


class Sequence0(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(3, 1, batch_first=True)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.att(x, x, x)[0][0])


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand(parameter.shape))
    return module
