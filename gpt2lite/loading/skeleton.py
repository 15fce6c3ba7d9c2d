"""Modules without memory: building on meta, giving memory to one tensor at a time, proving the result."""

from __future__ import annotations

import gc
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from hashlib import sha256
from threading import Lock, get_ident
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gpt2lite.checkpoint.source import memory_of
from gpt2lite.errors import CheckpointError, UsageError, listed
from gpt2lite.parallel import is_divided, part_like, rest

# What initialisers that are not torch.nn.init's call. On meta they change nothing, and dispatching them there
# imports half of torch (0.6 to 1.9 s and 33 to 69 MiB).
DRAWS = "normal uniform fill zero erfinv bernoulli exponential geometric log_normal cauchy random"
INITIALISERS = frozenset(getattr(Tensor, f"{name}_") for name in DRAWS.split())

# Whose layers write what they allocate, or leave it to a checkpoint: torch's and GPTModel.
LAYERS = ("torch.nn.modules.", "gpt2lite.model")

# What gives memory that nobody wrote to.
UNWRITTEN = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}

LARGE = 1 << 20  # bytes of a buffer

REGISTRIES = {"_parameters", "_buffers", "_modules"}
ATOMS, CONTAINERS = {type(None), bool, int, float, str}, {dict, OrderedDict, set, list, tuple}
# What `fully_shard` keeps of parameters: it takes them anew, and refuses those on meta, at the first forward.
FSDPS = "torch.distributed.fsdp."

# The methods by which a module loads itself. Overrides and hooks of torch.nn's own do no more than read older
# files: where a file has today's names, they change nothing.
LOADING = ("_load_from_state_dict", "load_state_dict", "get_extra_state", "set_extra_state")
NOT_OVERRIDDEN = {getattr(nn.Module, name) for name in LOADING}


class _Sketching(TorchFunctionMode):
    """Builds a module of which parameters, and what torch's own layers allocate, are on meta.

    In-place initialisers do nothing there. What the caller's code allocates is real, since it may keep it for
    later modules, as masks and rotary tables are cached. A parameter among it is replaced on meta when it is
    registered, and what is done to it afterwards is done to what stands for it now. With `shift` an
    initialiser draws one random number, and memory that is never written to begins and ends with a one, not a
    zero, so that values that hang on either are others.
    """

    def __init__(self, shift: bool = False) -> None:
        super().__init__()
        self.shift, self.moved = int(shift), WeakTensorKeyDictionary()
        self.real = list[nn.Parameter]()  # that share memory, or are more than values
        self.buffers, self.latest = list[tuple[nn.Module, str]](), list[tuple[nn.Module, str]]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.empty and sys._getframe(1).f_globals["__name__"].startswith(LAYERS):
            return func(*args, **(kwargs or {}) | {"device": "meta"})
        kwargs = kwargs or {}
        if self.moved:
            args = tuple(map(self.current, args))
            kwargs = {name: self.current(value) for name, value in kwargs.items()}
        if func in INITIALISERS or getattr(func, "__module__", "") == nn.init.__name__:
            tensor = next(iter((*args, *kwargs.values())))
            if tensor.is_meta:
                torch.rand(self.shift, device="cpu")
                return tensor
        made = func(*args, **kwargs)
        if func in UNWRITTEN and made.numel():
            made.detach().as_strided((2,), (made.numel() - 1,)).fill_(self.shift)
        return made

    def current(self, value: Any) -> Any:
        """What stands for a parameter now; anything else as it is."""
        return self.moved.get(value, value) if isinstance(value, nn.Parameter) else value

    def parameter(self, given: nn.Parameter | None) -> nn.Parameter | None:
        """What is registered for a parameter: it on meta, unless something else needs its memory."""
        found: nn.Parameter | None = self.current(given)
        if found is None or found.is_meta:
            return found
        if _has_more(found) or _users(found) > 1:
            self.real.append(found)
            return found
        on_meta = nn.Parameter(found.detach().to("meta"), requires_grad=found.requires_grad)
        on_meta.__dict__ = vars(found)  # one dict, for what the constructor sets afterwards
        self.moved[found] = on_meta
        return on_meta

    def buffer(self, module: nn.Module, name: str) -> None:
        """Note a buffer that is registered; those of the module before are needed no longer."""
        if self.latest and self.latest[-1][0] is not module:
            for place in self.latest:
                _let_go(*place)
            self.latest.clear()
        self.latest.append((module, name))
        self.buffers.append((module, name))

    def build(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The module. Its buffers have memory, and parameters whose memory something else needs."""

        def build_inside() -> nn.Module:
            with self:
                return build()

        with _registrations_seen_by(self):
            return initialised(build_inside)

    def kept(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """The parameters whose first version is in use still."""
        ids = {id(parameter) for parameter in self.moved.values()}
        return {name for name, tensor in tensors.items() if id(tensor) in ids}

    def clear(self, module: nn.Module) -> None:
        """Put on meta what was registered and has memory still."""
        buffers = [module._buffers.get(name) for module, name in self.buffers]
        _to_meta(module, [*self.real, *(buffer for buffer in buffers if buffer is not None)])


_sketching: dict[int, _Sketching] = {}  # by thread: others build as ever
_lock = Lock()
_register: dict[str, Callable[..., None]] = {}  # torch's own methods, or what a caller put in their place


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    mode = _sketching.get(get_ident())
    _register["register_parameter"](self, name, mode.parameter(param) if mode else param)


def _register_buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
    _register["register_buffer"](self, name, tensor, persistent)
    if mode := _sketching.get(get_ident()):
        mode.buffer(self, name)


@contextmanager
def _registrations_seen_by(mode: _Sketching) -> Iterator[None]:
    """Torch's own hooks for this stand in one dict, which other threads may be reading."""
    thread, ours = get_ident(), {f.__name__[1:]: f for f in (_register_parameter, _register_buffer)}
    with _lock:
        outer = _sketching.get(thread)
        if not _sketching:
            _register.update((name, getattr(nn.Module, name)) for name in ours)
            for name, method in ours.items():
                setattr(nn.Module, name, method)
        _sketching[thread] = mode
    try:
        yield
    finally:
        with _lock:
            del _sketching[thread]
            if outer:
                _sketching[thread] = outer
            if not _sketching:
                for name, method in _register.items():
                    setattr(nn.Module, name, method)


class Skeleton(NamedTuple):
    """A module without memory, and the names of what only a build with real memory gives."""

    module: nn.Module
    lost: tuple[str, ...]


def sketch(build: Callable[[], nn.Module]) -> Skeleton:
    """The module that `build` makes, on meta: shapes and dtypes, no memory. Milliseconds.

    Tensors that `build` itself computes have memory for a moment: parameters until they are registered,
    buffers until it returns, large ones that a checkpoint holds until another module registers one. Where it
    computes values that no checkpoint holds, it runs twice; where it reads the value of a parameter, the
    module is built once with all of its memory. Raises UsageError where `build` is not a function that
    returns a module.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise UsageError(f"build must be a function that returns an nn.Module, got {type(build).__name__}")
    with suppress(Exception):  # a constructor that lacks a value can fail in any way
        return _sketched(build)
    module = initialised(build)
    _to_meta(module, [*module.parameters(), *module.buffers()])
    return Skeleton(module, ("what its constructor computes from parameters",))


def initialised(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with initial values, on the host, which are not drawn from the caller's generator."""
    is_there = torch.get_default_device().type == "cpu"  # then a mode would cost a third of the time
    with nullcontext() if is_there else torch.device("cpu"), torch.random.fork_rng(devices=[]):
        module = build()
    if not isinstance(module, nn.Module):
        raise UsageError(f"build() must return an nn.Module, got {type(module).__name__}")
    return module


def _sketched(build: Callable[[], nn.Module]) -> Skeleton:
    """The module on meta. Also lost are values that no checkpoint holds and that differ from build to build.

    They were drawn after initialisers, which draw nothing here, or never written.
    """
    module, lost, values = _sketched_once(build, shift=False)
    if values:
        module, also_lost, others = _sketched_once(build, shift=True)
        lost |= also_lost | {name for name, _ in values ^ others}
    return Skeleton(module, tuple(sorted(lost)))


def _sketched_once(
    build: Callable[[], nn.Module], *, shift: bool
) -> tuple[nn.Module, set[str], set[tuple[str, str]]]:
    """The module on meta, what is lost of it there, and digests of what no checkpoint holds."""
    mode = _Sketching(shift)
    module = mode.build(build)
    saved, unsaved = _named_tensors(module)
    kept = [*unsaved.items(), *_in_attributes(module, saved | unsaved)]
    values = {(name, digest(tensor)) for name, tensor in kept if tensor.numel() and not tensor.is_meta}
    lost = _lost(saved, kept) | mode.kept(saved)
    mode.clear(module)
    return module, lost, values


def digest(tensor: Tensor) -> str:
    """A tensor's bytes, hashed. Costs a copy on the host where it is not contiguous there."""
    return sha256(memory_of(tensor.detach().cpu().contiguous())).hexdigest()


def _users(tensor: Tensor) -> int:
    """How many tensors share a tensor's memory, itself among them."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) - 1


def _let_go(module: nn.Module, name: str) -> None:
    """Put a buffer on meta that a checkpoint fills, if it is large and only its module refers to it."""
    buffers = module._buffers
    if name in module._non_persistent_buffers_set or sys.getrefcount(buffers.get(name)) > 2:
        return
    found = [buffer for buffer in (buffers[name],) if buffer is not None and buffer.nbytes >= LARGE]
    if found and _users(found[0]) == 1:
        _to_meta(module, found)


def _to_meta(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Put these parameters and buffers of a module on meta; what shares memory does so there, too."""
    wanted, memories = {id(tensor) for tensor in tensors}, dict[int, torch.UntypedStorage]()
    saved, unsaved = _named_tensors(module) if wanted else ({}, {})
    named = {n: t for n, t in (saved | unsaved).items() if id(t) in wanted and not t.is_meta}
    for names, tensor in tied_names(named):
        real, empty = tensor.untyped_storage(), torch.empty(0, dtype=tensor.dtype, device="meta")
        memory = memories.setdefault(real._cdata, torch.UntypedStorage(real.nbytes(), device="meta"))
        view = empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
        replace_tensor(module, names, view)


def _named_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what a checkpoint holds, what none does): parameters, then buffers, under each of their names."""
    saved, unsaved = dict[str, Tensor](), dict[str, Tensor]()
    parts = [*_parts(module)]
    for registry in ("_parameters", "_buffers"):
        for path, part in parts:
            for name, tensor in vars(part)[registry].items():
                named = unsaved if name in part._non_persistent_buffers_set else saved
                if tensor is not None:
                    named[path + name] = tensor
    return saved, unsaved


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What precedes the names of each module's tensors, and the module; one in two places comes twice.

    A quarter of what `named_modules` takes, whose every step passes through a generator a level.
    """
    pending = [("", module)]
    while pending:
        prefix, part = pending.pop()
        yield prefix, part
        children = reversed(part._modules.items())
        pending += [(f"{prefix}{name}.", child) for name, child in children if child is not None]


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
    for prefix, part in _parts(module):
        methods = (getattr(part, name) for name in LOADING)
        changes = [method for method in methods if getattr(method, "__func__", None) not in NOT_OVERRIDDEN]
        changes += [*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values()]
        is_torchs = all(str(getattr(c, "__module__", "")).startswith("torch.nn.") for c in changes)
        if changes and (not is_torchs or any(name.startswith(prefix) for name in odd)):
            found += [f"{prefix}{getattr(c, '__name__', c)}" for c in changes]
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
        *path, leaf = name.split(".")
        owner = module
        for part in path:  # a tenth of what `get_submodule` takes, once a tensor
            owner = owner._modules[part]  # type: ignore[assignment]
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
    computed = _unsaved(_Sketching().build(build)) if on_meta else unsaved
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


def _in_attributes(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in plain attributes and hooks of a module and in attributes of its `tensors`, each once."""
    parts = [*_parts(module)]
    seen = {id(part) for _, part in parts}
    for prefix, part in parts:
        for key, value in vars(part).items():
            if key in REGISTRIES or type(value) in ATOMS or (type(value) in CONTAINERS and not value):
                continue
            yield from ((prefix + key, found) for found in _within(value, seen))
    for name, tensor in tensors.items():
        if attributes := vars(tensor):
            yield from ((name, found) for found in _within(attributes, seen))


def _has_more(tensor: Tensor) -> bool:
    """Whether a tensor has what another in its place would not have: hooks, methods of a subclass."""
    hooks = (getattr(tensor, f"_{kind}_hooks", None) for kind in ("backward", "post_accumulate_grad"))
    return any(hooks) or nn.Parameter in type(tensor).__mro__[1:]


def _lost(saved: Mapping[str, Tensor], kept: Iterable[tuple[str, Tensor]]) -> set[str]:
    """What is on meta, or on the memory of a tensor that is replaced (`saved`), and is itself `kept`."""
    groups = tied_names(saved)
    memories = Counter(tensor.untyped_storage()._cdata for _, tensor in groups)
    lost = {name for name, value in kept if value.is_meta or value.untyped_storage()._cdata in memories}
    shared = (names[0] for names, t in groups if _has_more(t) or memories[t.untyped_storage()._cdata] > 1)
    return lost.union(shared)


def prove_complete(module: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device) -> nn.Module:
    """Return the module in eval mode if every tensor of it is real, on `device` and of its dtype.

    Raises CheckpointError that lists what is not.
    """
    saved, unsaved = _named_tensors(module)
    wrong, tensors = [], saved | unsaved
    for name, tensor in tensors.items():
        wanted = dtypes.get(name, tensor.dtype)
        if (tensor.dtype, tensor.device) != (wanted, device):
            wrong.append(f"{name} is {tensor.dtype} on {tensor.device}, not {wanted} on {device}")
    lost = {name for name, found in _in_attributes(module, tensors) if found.is_meta}
    wrong += [f"{name} is on meta, where it has no value" for name in sorted(lost)]
    if wrong:
        raise CheckpointError(f"the loaded model is incomplete{listed(wrong)}")
    return module.eval()
