"""Modules without memory: building on meta, giving memory to one tensor at a time, proving the result."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
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

REGISTRIES = {"_parameters", "_buffers", "_modules"}

# The methods by which a module loads itself. Overrides and hooks of torch.nn's own do no more than read older
# files: where a file has today's names, they change nothing.
LOADING = ("_load_from_state_dict", "load_state_dict", "get_extra_state", "set_extra_state")
NOT_OVERRIDDEN = {getattr(nn.Module, name) for name in LOADING}


class _EmptyOnMeta(TorchFunctionMode):
    """Puts `torch.empty` on meta, where in-place initialisers do nothing; tensors with values stay real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in INITIALISERS and args[0].is_meta:
            return args[0]
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


class Skeleton(NamedTuple):
    """A module without memory, and the names of what only building it with its memory can give."""

    module: nn.Module
    lost: tuple[str, ...]


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, on meta: `sketch(build).module`."""
    return sketch(build).module


def sketch(build: Callable[[], nn.Module]) -> Skeleton:
    """The module that `build` makes, on meta: shapes and dtypes, no memory. Milliseconds.

    Where `build` reads a value, which meta has not (`linspace(…)[i].item()`), only `torch.empty` is on meta
    and what has values takes its memory, as it does for a moment where there are buffers that no checkpoint
    holds. Where it reads a parameter's value, the module is built once with all of its memory.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise UsageError(f"build must be a function that returns an nn.Module, got {type(build).__name__}")
    for attempt in (_on_meta, _with_values):
        with suppress(Exception):  # a constructor that lacks a value can fail in any way
            return attempt(build)
    module = _built(build)
    for names, tensor in tied_names(_named_tensors(module)):
        replace_tensor(module, names, tensor.detach().to("meta"))
    return Skeleton(module, ("what its constructor computes from parameters",))


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    module = build()
    if not isinstance(module, nn.Module):
        raise UsageError(f"build() must return an nn.Module, got {type(module).__name__}")
    return module


def _on_meta(build: Callable[[], nn.Module]) -> Skeleton:
    with torch.device("meta"), _EmptyOnMeta():
        module = _built(build)
    unsaved = _unsaved(module).keys()
    lost = {*_lost(module)} - unsaved
    if unsaved:
        lost |= {*_with_values(build).lost}
    return Skeleton(module, tuple(sorted(lost)))


def _with_values(build: Callable[[], nn.Module]) -> Skeleton:
    """Only `torch.empty` on meta; parameters with values, which a checkpoint holds anyway, follow."""
    memories: dict[StorageWeakRef, str] = {}

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        memories[StorageWeakRef(parameter.untyped_storage())] = name
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with _EmptyOnMeta():
            module = _built(build)
    finally:
        hook.remove()
    # Memory that outlives the build is used elsewhere, too, and would keep its initial values there.
    aliased = [name for memory, name in memories.items() if not memory.expired()]
    return Skeleton(module, (*aliased, *_lost(module)))


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _unsaved(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that no checkpoint holds, under each of their names."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
        if (buffer := part._buffers[name]) is not None
    }


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint holds, themselves, under each of their names."""
    unsaved = _unsaved(module)
    return {name: tensor for name, tensor in _named_tensors(module).items() if name not in unsaved}


def own_loading(module: nn.Module, stored: Collection[str]) -> tuple[str, ...]:
    """What of the module decides by itself what is loaded into it from a file with the names `stored`."""
    state = module.state_dict().keys()
    found = [f"state_dict() with {name}" for name in sorted(saved_tensors(module).keys() ^ state)]
    odd = state ^ set(stored)
    for path, part in module.named_modules():
        methods = (getattr(part, name) for name in LOADING)
        changes = [method for method in methods if getattr(method, "__func__", None) not in NOT_OVERRIDDEN]
        changes += part._load_state_dict_pre_hooks.values()
        changes += part._load_state_dict_post_hooks.values()
        if any(name.startswith(f"{path}." if path else "") for name in odd) or not all(
            map(_is_torchs, changes)
        ):
            found += [f"{path}.{getattr(c, '__name__', c)}".lstrip(".") for c in changes]
    return tuple(found)


def _is_torchs(code: object) -> bool:
    return str(getattr(code, "__module__", "")).startswith("torch.nn.")


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
    """
    unsaved = _unsaved(module)
    on_meta = any(buffer.is_meta for buffer in unsaved.values())
    computed = _unsaved(_with_values(build).module) if on_meta else unsaved
    for names, _ in tied_names(unsaved):
        replace_tensor(module, names, computed[names[0]].to(device))


def _within(value: object, seen: set[int]) -> Iterator[Tensor | torch.device]:
    """Every tensor and device in a value, however deep: in what the garbage collector finds, and closures."""
    pending = [value]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor | torch.device):
            yield value
        elif isinstance(value, FunctionType):  # its globals are the whole program
            pending += (value.__closure__, value.__defaults__, value.__kwdefaults__)
        elif gc.is_tracked(value) and not isinstance(value, type | ModuleType):
            pending += gc.get_referents(value)


def _in_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor | torch.device]]:
    """The tensors and devices in plain attributes and hooks of a module, each once."""
    seen = {id(part) for part in module.modules()}
    for path, part in module.named_modules():
        for key in vars(part).keys() - REGISTRIES:
            for found in _within(vars(part)[key], seen):
                yield f"{path}.{key}" if path else key, found


def _is_meta(value: Tensor | torch.device) -> bool:
    return (value.device if isinstance(value, Tensor) else value).type == "meta"


def _memory(value: Tensor | torch.device) -> int:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else 0


def _lost(module: nn.Module) -> tuple[str, ...]:
    """What is on meta, or on the memory of a tensor that is replaced, and is itself not replaced."""
    saved = tied_names(saved_tensors(module))
    memories = Counter(_memory(tensor) for _, tensor in saved)
    kept = (*_in_attributes(module), *_unsaved(module).items())
    lost = {name for name, value in kept if _is_meta(value) or _memory(value) in memories}
    return tuple(sorted(lost | {names[0] for names, tensor in saved if memories[_memory(tensor)] > 1}))


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
    lost = sorted({name for name, found in _in_attributes(module) if _is_meta(found)})
    wrong += [f"{name} is on meta, where it has no value" for name in lost]
    if wrong:
        raise CheckpointError("the loaded model is incomplete:\n  " + "\n  ".join(wrong))
    return module.eval()
