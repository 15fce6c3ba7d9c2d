"""Modules without memory: building on meta, giving memory to one tensor at a time, proving the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
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

OF_EVERY_MODULE = vars(nn.Module()).keys()  # registries, hooks, flags


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
    """The module that `build` makes, on meta: shapes and dtypes, no memory. Milliseconds.

    Where `build` reads a value, which meta has not (`linspace(…)[i].item()`), only `torch.empty` is on meta
    and what has values takes its memory.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise UsageError(f"build must be a function that returns an nn.Module, got {type(build).__name__}")
    try:
        with torch.device("meta"), _NoInitialisers():
            module = build()
    except (RuntimeError, NotImplementedError):
        module = _build_with_values(build)
    if not isinstance(module, nn.Module):
        raise UsageError(f"build() must return an nn.Module, got {type(module).__name__}")
    return module


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """What a module registers instead of a parameter with values, which its checkpoint holds anyway."""
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def _build_with_values(build: Callable[[], nn.Module]) -> nn.Module:
    hook = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
    try:
        with _OnlyEmptyOnMeta(), _NoInitialisers():
            return build()
    finally:
        hook.remove()


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    parameters: dict[str, Tensor | None] = {}
    buffers: dict[str, Tensor | None] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        parameters |= {prefix + name: tensor for name, tensor in part._parameters.items()}
        buffers |= {prefix + name: tensor for name, tensor in part._buffers.items()}
    return {name: tensor for name, tensor in (parameters | buffers).items() if tensor is not None}


def _unsaved(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that no checkpoint holds, under each of their names."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
        if (buffer := part._buffers[name]) is not None
    }


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint holds, themselves, under each of their names.

    Raises UsageError for a module whose `state_dict` says otherwise: what it adds could not be loaded.
    """
    unsaved = _unsaved(module)
    found = {name: tensor for name, tensor in _named_tensors(module).items() if name not in unsaved}
    odd = sorted(found.keys() ^ module.state_dict().keys())
    if odd:
        raise UsageError(
            f"{type(module).__name__}.state_dict() and its parameters and buffers differ in "
            f"{', '.join(odd[:5])}; a module that renames or adds to its state dict must be loaded with its "
            "own load_state_dict"
        )
    return found


def tied_names(tensors: Mapping[str, Tensor]) -> list[tuple[tuple[str, ...], Tensor]]:
    """The tensors, each once, with all the names under which the same memory is seen the same way."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage()._cdata
        groups.setdefault((memory, tensor.storage_offset(), tensor.shape, tensor.stride()), []).append(name)
    return [(tuple(names), tensors[names[0]]) for names in groups.values()]


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part of a module that owns a tensor, and the tensor's name there."""
    *path, leaf = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    return module, leaf


def replace_tensor(module: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Put one tensor in the place of a parameter or buffer, under all the names that share it.

    A parameter stays one, frozen or not as it was; a subclass of nn.Parameter becomes a plain one.
    """
    places = [_place(module, name) for name in names]
    parameters = [owner._parameters[leaf] for owner, leaf in places if leaf in owner._parameters]
    if parameters and parameters[0] is not None:
        can_learn = tensor.is_floating_point() or tensor.is_complex()
        tensor = nn.Parameter(tensor, requires_grad=parameters[0].requires_grad and can_learn)
    for owner, leaf in places:
        registry: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        registry[leaf] = tensor


def unsaved_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that no checkpoint holds, each once."""
    return [buffer for _, buffer in tied_names(_unsaved(module))]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that some tensors stand on, each piece of it once; on meta, that they would."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def restore_unsaved_buffers(module: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> None:
    """Compute again, and move to `device`, the buffers that no checkpoint holds (persistent=False).

    Builds the module a second time, its parameters going to meta one by one; costs all its buffers on the
    host, and what its constructor takes beside them. GPTModel has none.
    Raises UsageError for a buffer that is computed from parameters or from memory that is filled later.
    """
    unsaved = _unsaved(module)
    lost = any(buffer.is_meta for buffer in unsaved.values())
    computed = _named_tensors(_build_with_values(build)) if lost else unsaved
    for names, buffer in tied_names(unsaved):
        value = computed[names[0]] if buffer.is_meta else buffer
        if value.is_meta:
            raise UsageError(
                f"the buffer {names[0]} is in no checkpoint and is computed from memory that is not there on "
                'meta; load this module with strategy="sequential" or "baseline"'
            )
        replace_tensor(module, names, value.to(device))


def _is_lost(value: object) -> bool:
    """Whether a plain attribute is a tensor on meta, or a container of one."""
    match value:
        case Tensor():
            return value.is_meta
        case dict():
            return any(map(_is_lost, value.values()))
        case list() | tuple():
            return any(map(_is_lost, value))
    return False


def prove_complete(module: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device) -> nn.Module:
    """Return the module in eval mode if every tensor of it is real, on `device` and of its dtype.

    Raises CheckpointError that lists what is not.
    """
    wrong = []
    for name, tensor in _named_tensors(module).items():
        if tensor.is_meta:
            wrong.append(f"{name} has no memory")
        elif (tensor.dtype, tensor.device) != (wanted := dtypes.get(name, tensor.dtype), device):
            wrong.append(f"{name} is {tensor.dtype} on {tensor.device}, not {wanted} on {device}")
    for path, part in module.named_modules():
        lost = sorted(key for key in vars(part).keys() - OF_EVERY_MODULE if _is_lost(vars(part)[key]))
        wrong += [f"{path}.{key} is a tensor that is no buffer: its value was lost on meta" for key in lost]
    if wrong:
        raise CheckpointError("the loaded model is incomplete:\n  " + "\n  ".join(wrong))
    return module.eval()
