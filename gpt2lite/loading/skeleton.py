"""Modules without memory: building on meta, giving memory to one tensor at a time, proving the result."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from gpt2lite.checkpoint.source import memory_of
from gpt2lite.errors import CheckpointError, UsageError, listed
from gpt2lite.parallel import is_divided, part_like, rest

# What initialisers that are not torch.nn.init's call. On meta they change nothing, and dispatching them there
# imports half of torch (0.6 to 1.9 s and 33 to 69 MiB).
DRAWS = "normal uniform fill zero erfinv bernoulli exponential geometric log_normal cauchy random"
INITIALISERS = frozenset(getattr(Tensor, f"{name}_") for name in DRAWS.split())

REGISTRIES = {"_parameters", "_buffers", "_modules"}
# What `fully_shard` keeps of parameters: it takes them anew, and refuses those on meta, at the first forward.
FSDPS = "torch.distributed.fsdp."

# The methods by which a module loads itself. Overrides and hooks of torch.nn's own do no more than read older
# files: where a file has today's names, they change nothing.
LOADING = ("_load_from_state_dict", "load_state_dict", "get_extra_state", "set_extra_state")
NOT_OVERRIDDEN = {getattr(nn.Module, name) for name in LOADING}


class _EmptyOnMeta(TorchFunctionMode):
    """Puts `torch.empty` on meta, where in-place initialisers do nothing; tensors with values stay real.

    With `shift` an initialiser draws one random number, so that whatever is drawn after it is another.
    """

    def __init__(self, shift: bool = False) -> None:
        super().__init__()
        self.shift = shift

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in INITIALISERS or getattr(func, "__module__", "") == nn.init.__name__:
            tensor = next(iter((*args, *kwargs.values())))
            if tensor.is_meta:
                torch.rand(int(self.shift), device="cpu")
                return tensor
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


class Skeleton(NamedTuple):
    """A module without memory, and the names of what only a build with real memory gives."""

    module: nn.Module
    lost: tuple[str, ...]


def sketch(build: Callable[[], nn.Module]) -> Skeleton:
    """The module that `build` makes, on meta: shapes and dtypes, no memory. Milliseconds.

    Where `build` reads a value (`linspace(…)[i].item()`), only `torch.empty` is on meta, and tensors with
    values take memory; so do, for a moment, buffers that no checkpoint holds. Where `build` reads the value
    of a parameter, the module is built once with all of its memory. Raises UsageError where `build` is not a
    function that returns a module.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise UsageError(f"build must be a function that returns an nn.Module, got {type(build).__name__}")
    for attempt in (_on_meta, _with_values):
        with suppress(Exception):  # a constructor that lacks a value can fail in any way
            return attempt(build)
    module = initialised(build)
    saved, unsaved = _named_tensors(module)
    for names, tensor in tied_names(saved | unsaved):
        replace_tensor(module, names, tensor.detach().to("meta"))
    return Skeleton(module, ("what its constructor computes from parameters",))


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    module = build()
    if not isinstance(module, nn.Module):
        raise UsageError(f"build() must return an nn.Module, got {type(module).__name__}")
    return module


def initialised(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with initial values, on the host, which are not drawn from the caller's generator."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        return _built(build)


def _on_meta(build: Callable[[], nn.Module]) -> Skeleton:
    with torch.device("meta"), _EmptyOnMeta():
        module = _built(build)
    unsaved = _unsaved(module).keys()
    lost = {*_lost(module)} - unsaved | (_lost_values(build) if unsaved else set())
    return Skeleton(module, tuple(sorted(lost)))


def _with_values(build: Callable[[], nn.Module]) -> Skeleton:
    lost = _lost_values(build)
    return Skeleton(_built_with_values(build)[0], tuple(sorted(lost)))


def _built_with_values(build: Callable[[], nn.Module], shift: bool = False) -> tuple[nn.Module, list[str]]:
    """Only `torch.empty` on meta; a parameter with values goes there once it is registered.

    Also the names of those whose memory outlives the build: it is used elsewhere, too, and would keep its
    initial values there.
    """
    memories: dict[StorageWeakRef, str] = {}

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        if _has_more(parameter):
            return parameter
        memories[StorageWeakRef(parameter.untyped_storage())] = name
        on_meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        on_meta.__dict__ = vars(parameter)  # one dict, for what the constructor sets afterwards
        return on_meta

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with _EmptyOnMeta(shift):
            module = initialised(build)
    finally:
        hook.remove()
    return module, [name for memory, name in memories.items() if not memory.expired()]


def _lost_values(build: Callable[[], nn.Module]) -> set[str]:
    """What only a build with all memory gives, also unsaved buffers that are drawn after initialisers.

    Those draw nothing here, so such a buffer is another where they draw one number. Builds twice, one after
    the other.
    """
    lost, buffers = set[str](), set[tuple[str, bytes]]()
    for shift in (False, True):
        module, aliased = _built_with_values(build, shift)
        lost |= {*aliased, *_lost(module)}
        values = {name: buffer for name, buffer in _unsaved(module).items() if not buffer.is_meta}
        buffers ^= {(name, sha256(memory_of(b.contiguous())).digest()) for name, b in values.items()}
        del module, values
    return lost | {name for name, _ in buffers}


def _named_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a checkpoint holds, what none does): parameters, then buffers, under each of their names."""
    saved, unsaved = dict[str, Tensor](), dict[str, Tensor]()
    parts = [*module.named_modules(remove_duplicate=False)]
    for registry in ("_parameters", "_buffers"):
        for path, part in parts:
            for name, tensor in getattr(part, registry).items():
                named = unsaved if name in part._non_persistent_buffers_set else saved
                if tensor is not None:
                    named[f"{path}.{name}".lstrip(".")] = tensor
    return saved, unsaved


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint holds, themselves, under each of their names."""
    return _named_tensors(module)[0]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """`state_dict()`; of a module that is divided over ranks the tensors themselves, which show ties."""
    rest(module)
    tensors = saved_tensors(module)
    return tensors if any(map(is_divided, tensors.values())) else module.state_dict()


def _unsaved(module: nn.Module) -> dict[str, Tensor]:
    return _named_tensors(module)[1]


def own_loading(module: nn.Module, stored: Collection[str]) -> tuple[str, ...]:
    """The methods and hooks by which a module changes what it loads from a file with the names `stored`."""
    state = module.state_dict().keys()
    found = [f"state_dict() with {name}" for name in sorted(saved_tensors(module).keys() ^ state)]
    odd = state ^ set(stored)
    for path, part in module.named_modules():
        methods = (getattr(part, name) for name in LOADING)
        changes = [method for method in methods if getattr(method, "__func__", None) not in NOT_OVERRIDDEN]
        changes += [*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values()]
        is_torchs = all(str(getattr(c, "__module__", "")).startswith("torch.nn.") for c in changes)
        if not is_torchs or any(name.startswith(f"{path}." if path else "") for name in odd):
            found += [f"{path}.{getattr(c, '__name__', c)}".lstrip(".") for c in changes]
    return tuple(found)


def tied_names(tensors: Mapping[str, Tensor]) -> list[tuple[tuple[str, ...], Tensor]]:
    """The tensors, each once, with all the names under which the same memory is seen the same way."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage()._cdata
        groups.setdefault((memory, tensor.storage_offset(), tensor.shape, tensor.stride()), []).append(name)
    return [(tuple(names), tensors[names[0]]) for names in groups.values()]


def replace_tensor(module: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Put one tensor in the place of a parameter or buffer, under all the names that share it.

    A parameter stays one, frozen or not as it was, and what was set on it stays; where it is divided over
    ranks, the tensor is this rank's part.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(leaf)
        tensor = part_like(old, tensor)
        if old is not None and not isinstance(tensor, nn.Parameter):
            can_learn = tensor.is_floating_point() or tensor.is_complex()
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad and can_learn)
        registry: dict[str, Any] = owner._buffers if old is None else owner._parameters
        vars(tensor).update(vars(registry[leaf]))
        registry[leaf] = tensor


def unsaved_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that no checkpoint holds, each once."""
    return [buffer for _, buffer in tied_names(_unsaved(module))]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under some tensors, each once; on meta, what they would take."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def restore_unsaved_buffers(module: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> None:
    """Compute again, and move to `device`, the buffers that no checkpoint holds (persistent=False).

    Builds the module a second time, its parameters going to meta one by one; costs all its buffers on the
    host, and what its constructor takes beside them. GPTModel has none.
    """
    unsaved = _unsaved(module)
    on_meta = any(buffer.is_meta for buffer in unsaved.values())
    computed = _unsaved(_built_with_values(build)[0]) if on_meta else unsaved
    for names, _ in tied_names(unsaved):
        replace_tensor(module, names, computed[names[0]].to(device))


def _within(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in a value, however deep: in what the garbage collector finds, and closures.

    The device meta counts as a tensor there: what is computed from it would be without values.
    """
    pending = [value]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.device):
            yield torch.empty(0, device="meta" if value.type == "meta" else "cpu")
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, FunctionType):  # its globals are the whole program
            pending += (value.__closure__, value.__defaults__, value.__kwdefaults__)
        elif gc.is_tracked(value) and not (isinstance(value, type | ModuleType) or _is_fsdps(value)):
            pending += gc.get_referents(value)


def _is_fsdps(value: object) -> bool:
    return type(value).__module__.startswith(FSDPS)


def _in_attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors in plain attributes and hooks of a module and in attributes of its tensors, each once."""
    seen = {id(part) for part in module.modules()}
    for path, part in module.named_modules():
        for key in vars(part).keys() - REGISTRIES:
            for found in _within(vars(part)[key], seen):
                yield f"{path}.{key}".lstrip("."), found
    saved, unsaved = _named_tensors(module)
    for name, tensor in (saved | unsaved).items():
        yield from ((name, found) for found in _within(vars(tensor), seen))


def _has_more(tensor: Tensor) -> bool:
    """Whether a tensor has what another in its place would not have: hooks, methods of a subclass."""
    hooks = (getattr(tensor, f"_{kind}_hooks", None) for kind in ("backward", "post_accumulate_grad"))
    return any(hooks) or nn.Parameter in type(tensor).__mro__[1:]


def _lost(module: nn.Module) -> tuple[str, ...]:
    """What is on meta, or on the memory of a tensor that is replaced, and is itself not replaced."""
    named, unsaved = _named_tensors(module)
    groups = tied_names(named)
    saved = [(tensor.untyped_storage()._cdata, names[0]) for names, tensor in groups]
    memories = Counter(memory for memory, _ in saved)
    kept = (*_in_attributes(module), *unsaved.items())
    lost = {name for name, value in kept if value.is_meta or value.untyped_storage()._cdata in memories}
    lost |= {names[0] for names, tensor in groups if _has_more(tensor)}
    return tuple(sorted(lost | {name for memory, name in saved if memories[memory] > 1}))


def prove_complete(module: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device) -> nn.Module:
    """Return the module in eval mode if every tensor of it is real, on `device` and of its dtype.

    Raises CheckpointError that lists what is not.
    """
    saved, unsaved = _named_tensors(module)
    wrong = []
    for name, tensor in (saved | unsaved).items():
        wanted = dtypes.get(name, tensor.dtype)
        if (tensor.dtype, tensor.device) != (wanted, device):
            wrong.append(f"{name} is {tensor.dtype} on {tensor.device}, not {wanted} on {device}")
    lost = {name for name, found in _in_attributes(module) if found.is_meta}
    wrong += [f"{name} is on meta, where it has no value" for name in sorted(lost)]
    if wrong:
        raise CheckpointError(f"the loaded model is incomplete{listed(wrong)}")
    return module.eval()
