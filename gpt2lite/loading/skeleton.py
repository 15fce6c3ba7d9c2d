"""Modules without memory: building on meta, giving memory to one tensor at a time, proving the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt2lite.errors import CheckpointError, UsageError

# What initialisers call in the end. On meta they change nothing, and dispatching them there imports half of
# torch (0.6 to 1.9 s and 33 to 69 MiB).
INITIALISERS = frozenset(
    getattr(Tensor, name)
    for name in (
        *("normal_", "uniform_", "fill_", "zero_", "erfinv_", "bernoulli_", "exponential_", "geometric_"),
        *("log_normal_", "cauchy_", "random_"),
    )
)


class _NoInitialisers(TorchFunctionMode):
    """Makes in-place initialisers of meta tensors do nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in INITIALISERS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class _OnlyEmptyOnMeta(TorchFunctionMode):
    """Puts `torch.empty` on meta and leaves tensors with values (masks, positions) real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, on meta: shapes and dtypes, no memory. Milliseconds."""
    with torch.device("meta"), _NoInitialisers():
        module = build()
    if not isinstance(module, nn.Module):
        raise UsageError(f"build() must return an nn.Module, got {type(module).__name__}")
    return module


def replace_tensor(module: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Put one tensor in the place of a parameter or buffer, under all the names that share it."""
    names = tuple(names)
    owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    owner, leaf = owners[0]
    if leaf in owner._parameters:
        wants_grad = owner._parameters[leaf].requires_grad and tensor.is_floating_point()  # type: ignore[union-attr]
        tensor = nn.Parameter(tensor, requires_grad=wants_grad)
    for owner, leaf in owners:
        setattr(owner, leaf, tensor)


def restore_unsaved_buffers(module: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> None:
    """Compute again the buffers that no checkpoint holds (persistent=False); on meta they lost their values.

    Builds the module a second time, parameters still on meta; costs the buffers twice. GPTModel has none.
    """
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if not lost:
        return
    with _OnlyEmptyOnMeta(), _NoInitialisers():
        computed = dict(build().named_buffers())
    for name in lost:
        replace_tensor(module, [name], computed[name].to(device))


def prove_complete(module: nn.Module, expected: Mapping[str, tuple[torch.dtype, torch.device]]) -> nn.Module:
    """Return the module in eval mode if every tensor of it is real, where it was asked and of its dtype.

    Raises CheckpointError that lists what is not.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    wrong = [f"{name} has no memory" for name, tensor in named if tensor.is_meta]
    for name, tensor in named:
        dtype, device = expected.get(name, (tensor.dtype, tensor.device))
        if not tensor.is_meta and (tensor.dtype, tensor.device) != (dtype, device):
            wrong.append(f"{name} is {tensor.dtype} on {tensor.device}, not {dtype} on {device}")
    for path, part in module.named_modules():
        attributes = [key for key, value in vars(part).items() if isinstance(value, Tensor) and value.is_meta]
        wrong += [
            f"{path}.{key} is a tensor that is no buffer: its value was lost on meta" for key in attributes
        ]
    if wrong:
        raise CheckpointError("the loaded model is incomplete:\n  " + "\n  ".join(wrong))
    return module.eval()
