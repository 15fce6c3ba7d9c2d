"""A pickle read without importing or calling anything that it names.

The few names that describe tensors are looked up in a table here. Every other name becomes an `Inert`: a
description that remembers what it was called and the attributes and items it was given, and does nothing.
`described` gives by name what lies in the pickle: tensors, plain values, the classes of modules. A module's
tensors have the names that its `state_dict()` would give, in its order; the attributes of modules and of
other objects are values under their dotted paths.

Format: the opcodes of Lib/pickletools.py, and torch/_utils.py for what rebuilds tensors.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from types import NoneType
from typing import Any, ClassVar

import torch

from gpt2lite.checkpoint import manifest
from gpt2lite.checkpoint.manifest import Unread, are_sizes, contents_of, dotted, is_countable
from gpt2lite.checkpoint.source import may_take
from gpt2lite.errors import CheckpointError

# Opcodes that look objects up in this process: a registry of extensions, and buffers handed to the unpickler.
NOT_DATA = (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)

STORAGE_DTYPES = {name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()}
STORAGE_DTYPES["UntypedStorage"] = torch.uint8
QUANTIZED = tuple(dtype for name, dtype in STORAGE_DTYPES.items() if name.startswith("Q"))
# How protocols 0 to 2 say "an object of the class that is my first argument".
RECONSTRUCTOR = re.compile(r"copy_?reg\.(_reconstructor|__newobj__)")
TENSOR_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
FEW = 64  # arguments or names that are looked at
MAX_ITEMS = 1000  # of a list, or a container within an object: what is longer is a vocabulary or data
MAX_NAMED = 10_000  # of a dict: the same
ROOM, PER_TENSOR, PER_VALUE = 16 << 20, 600, 50  # bytes for what has a name, beside the names
# Bytes that an opcode takes at most, beside those of the pickle itself.
COSTS = [40] * 256
for _cost, _codes in {
    72: (pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
    112: (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINPERSID, pickle.MARK),
    320: (pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST, pickle.OBJ, pickle.REDUCE, pickle.NEWOBJ,
          pickle.NEWOBJ_EX, pickle.EMPTY_SET, pickle.FROZENSET),
}.items():  # fmt: skip
    COSTS = [_cost if bytes([code]) in _codes else cost for code, cost in enumerate(COSTS)]
FUNCTIONS = ("act", "gelu")  # attributes of modules that may be functions in place of modules
CHANGES = ("_forward_hooks", "_forward_pre_hooks", "forward")  # what makes one module compute otherwise
PLAIN = (str, int, float, NoneType, torch.dtype)
Facts = Iterable[tuple[object, object]]  # names, and what they stand for
REGISTRIES = ("_parameters", "_buffers", "_modules")  # what makes an object a module


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as the pickle names it: `nbytes` kept under `key`, in a zip the entry `data/<key>`."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as the pickle describes it; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A tensor that is not read, and why."""

    reason: str


@dataclass(slots=True, eq=False, repr=False)
class Inert:
    """Something that a pickle names and we do not know.

    It is never taken for its arguments: of these it keeps only whether there was a tensor among them. `items`
    are what the pickle appended to it, by index, or set in it, by key; `members` those of a set.
    """

    name: str
    wraps_tensor: bool = False
    state: object = None
    items: dict[Any, Any] = field(default_factory=dict)
    members: list[object] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.name[:200]}>"

    def __call__(self, *args: object) -> Inert | Unreadable:
        """Describe what a call would return; looks at few arguments, since a pickle can repeat many."""
        if RECONSTRUCTOR.fullmatch(self.name) and args and isinstance(args[0], Inert):
            return Inert(args[0].name)
        if self.name.startswith("torch.") and "._rebuild_" in self.name:
            return Unreadable(f"is made by {self}, an unsupported kind of tensor")
        parts = (part for arg in args[:FEW] for part in (arg[:FEW] if isinstance(arg, tuple) else (arg,)))
        return Inert(self.name, any(isinstance(part, TENSORS) for part in parts))

    def append(self, value: object) -> None:
        """Keep one more value by index; none is hashed."""
        self.items[len(self.items)] = value

    def add(self, value: object) -> None:
        """Keep one more member of a set, without a name."""
        self.members.append(value)

    def _named_states(self) -> list[dict[Any, Any]]:
        """Its `__dict__` and its slots, where the pickle gives them by name and not by position."""
        states = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        named = [state for state in states if isinstance(state, dict)]
        return named if len(named) + states.count(None) == len(states) else []

    def attributes(self) -> Iterator[tuple[object, object]]:
        """What it was given by name."""
        return chain.from_iterable(state.items() for state in self._named_states())

    def attribute(self, name: str) -> Any:
        """One of them, or None."""
        return next((state[name] for state in self._named_states() if name in state), None)

    @property
    def holds_tensor(self) -> bool:
        """Whether it was made of a tensor, or has one among its first attributes."""
        attributes = islice(self.attributes(), FEW)
        return self.wraps_tensor or any(isinstance(value, TENSORS) for _, value in attributes)

    @property
    def has_names(self) -> bool:
        """Whether anything public is among what it first holds by name."""
        facts = islice(chain(self.attributes(), self.items.items()), FEW)
        return any(not str(key).startswith("_") for key, _ in facts)

    @property
    def is_module(self) -> bool:
        """Whether it has the registries of a `torch.nn.Module`."""
        return all(isinstance(self.attribute(registry), dict) for registry in REGISTRIES)

    def registered(self) -> Iterator[tuple[object, object]]:
        """What `state_dict` would list of a module, by key; () for what it would leave out."""
        unsaved = self.attribute("_non_persistent_buffers_set")
        left_out = unsaved.members[:FEW] if isinstance(unsaved, Inert) else ()
        for key, tensor in chain(self.attribute("_parameters").items(), self.attribute("_buffers").items()):
            yield key, () if key in left_out else as_tensor(tensor)
        for key, module in self.attribute("_modules").items():
            yield key, module if isinstance(module, Inert) and module.is_module else ()

    def unsaved(self) -> Iterator[tuple[object, TensorRecord]]:
        """Tensors that `state_dict` leaves out of a module, among the first: buffers and plain attributes."""
        facts = chain(islice(self.attribute("_buffers").items(), FEW), islice(self.attributes(), FEW))
        saved = {key for key, tensor in self.registered() if tensor}
        return ((key, fact) for key, fact in facts if isinstance(fact, TensorRecord) and key not in saved)


TENSORS = (TensorRecord, Unreadable, Storage)


def as_tensor(node: object) -> object:
    """What is registered as a tensor: a record, or why there is none; () for None."""
    if isinstance(node, (TensorRecord, Unreadable)):
        return node
    return () if node is None else Unreadable(f"is made by {shown(node)}, which was not run")


def _is_plain(value: object) -> bool:
    if isinstance(value, int):
        return value.bit_length() <= 64
    return isinstance(value, (str, float, NoneType, torch.dtype))


def shown(value: object) -> str:
    """A short repr; of a nest, whose own might not end, the type alone."""
    parts = value[:FEW] if isinstance(value, (tuple, list)) else (value,)
    is_short = isinstance(value, Inert) or (len(parts) < FEW and all(map(_is_plain, parts)))
    value = value[:200] if isinstance(value, str) else value
    return repr(value)[:200] if is_short else f"<{type(value).__name__}>"


# ---- what stands for the few names that are known ----------------------------------------------------------


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: object, dtype: Any = None
) -> TensorRecord | Unreadable:
    """`rest` is requires_grad, hooks and, where a tensor is lazily conjugated or negated, what says so."""
    if not isinstance(storage, Storage):
        return Unreadable(f"is built on {shown(storage)}, not on a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype in QUANTIZED:
        return Unreadable(f"has dtype {shown(dtype)}, which is not read")
    if any(rest[2:]):
        return Unreadable(f"carries {shown(rest[2])} (conjugated or negated lazily), which is not read")
    are_sound = are_sizes(shape) and are_sizes(stride) and are_sizes((offset,)) and len(shape) == len(stride)
    if not are_sound or not is_countable(shape, dtype):
        said = f"shape {shown(shape)}, strides {shown(stride)}, offset {shown(offset)}"
        raise CheckpointError(f"a tensor has {said}, which no tensor can have")
    return TensorRecord(storage, dtype, offset, shape, stride)


def _from_type(build: object, kind: object, args: Iterable[object], state: object = None) -> object:
    """A tensor with attributes, or of a subclass, which may mean anything by its numbers."""
    if callable(build) and isinstance(kind, Inert) and kind.name in TENSOR_TYPES:
        return as_tensor(build(*args))
    return Unreadable(f"is a {shown(kind)}, an unsupported kind of tensor")


def _device(kind: object, index: object = None) -> str:
    return shown(kind).strip("'") + (f":{shown(index)}" if index is not None else "")


def _named(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The pairs whose keys are names: plain keys and flat tuples of them.

    No other key is hashed: to hash a nest of tuples can take for ever, or end the process.
    """
    return [
        (key, value) for key, value in pairs if all(map(_is_plain, key if isinstance(key, tuple) else (key,)))
    ]


class _State(dict[Any, Any]):
    """An OrderedDict, whose attributes (a state dict's `_metadata`) are forgotten."""


def _set(values: object = ()) -> Inert:
    """A set by the order in which it was written: nothing is hashed."""
    return Inert("builtins.set", members=list(values) if isinstance(values, (list, tuple)) else [])


SETS = {(module, name): _set for module in ("builtins", "__builtin__") for name in ("set", "frozenset")}
# Everything that a pickle can call: these describe, and so does an Inert.
KNOWN: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): lambda pairs=(): _State(_named(pairs)),
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    # the same, with the dtype in the seventh place
    ("torch._utils", "_rebuild_tensor_v3"): lambda *args: _tensor(*args[:6], *args[7:], dtype=args[6]),
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: as_tensor(data),
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *rest: as_tensor(data),
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    **{(at, name): dtype for at in ("torch", "torch.storage") for name, dtype in STORAGE_DTYPES.items()},
}


def stored(pid: object) -> Storage:
    """('storage', class, key, location, number of elements) → Storage."""
    match pid:
        case ("storage", torch.dtype() as dtype, str(key), _, int(numel)):
            if are_sizes((numel,)) and is_countable((numel,), dtype):
                return Storage(key, dtype, numel * dtype.itemsize)
    raise CheckpointError(f"its pickle refers to {shown(pid)}, which is not a storage")


class DescribingUnpickler(pickle._Unpickler):
    """An unpickler that can build nothing but containers, plain values and the descriptions of this module.

    Python's own, since the one in C takes memory by the largest memo index that a pickle names. What its
    opcodes call is what `find_class` gives, so nothing but the functions of this module. `storages` are those
    that the pickle names, by key. `is_plain` says whether `torch.load(weights_only=True)` reads the same: no
    inert name, protocol 2. `nbytes` are those of all that is read, which limit the memory that it may take.
    """

    stack: list[Any]
    metastack: list[Any]
    proto: int
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    is_plain = True
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in b"".join(NOT_DATA)
    }

    def __init__(self, file: Any, nbytes: int) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.nbytes, self._file = nbytes, file

    def load(self) -> Any:
        """The next object. As its base's, but for what is counted."""
        self._unframer = frames = pickle._Unframer(self._file.read, self._file.readline)  # type: ignore[attr-defined]
        self.read, self.readinto, self.readline = frames.read, frames.readinto, frames.readline
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        read, dispatch, left = self.read, self.dispatch, may_take(self.nbytes)
        try:
            while code := read(1):
                left -= COSTS[code[0]]
                if left < 0:
                    said = f"its pickle of {self.nbytes} bytes would take more than {may_take(self.nbytes)}"
                    raise CheckpointError(f"{said} bytes of memory; not weights")
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise EOFError("it has no end")

    def load_build(self) -> None:
        """Keep the state of what is inert, forget a state dict's; alter nothing else."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, _State):
            raise CheckpointError(f"its pickle tries to modify {shown(target)}: refused")

    def load_setitem(self) -> None:
        """One key and value into a dict."""
        self._set_items([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        """Keys and values into a dict."""
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        """A dict of what lies above the mark."""
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_items(self, items: list[object]) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], Inert) else self.stack[-1]
        if not isinstance(target, dict):
            raise CheckpointError(f"its pickle tries to modify {shown(target)}: refused")
        named = _named(zip(items[::2], items[1::2], strict=True))
        self.is_plain &= 2 * len(named) == len(items)
        target.update(named)

    def load_set(self) -> None:
        """An empty set."""
        self.is_plain = False
        self.append(_set())

    def load_frozenset(self) -> None:
        """A set of what lies above the mark."""
        values = self.pop_mark()
        self.load_set()
        self.stack[-1].members = values

    def load_newobj_ex(self) -> None:
        """Describe an object that is made with keywords."""
        named, args, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(kind(*args, *islice(named.values(), FEW)))

    def _instantiate(self, kind: Callable[..., object], args: list[object]) -> None:
        """What protocols 0 and 1 call an instance."""
        self.append(kind(*args))

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.EMPTY_SET[0]: load_set,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.NEWOBJ[0]: dispatch[pickle.REDUCE[0]],
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        # The one that it has allocates as many bytes as the pickle says.
        pickle.BYTEARRAY8[0]: dispatch[pickle.BINBYTES8[0]],
    }

    def find_class(self, module: str, name: str) -> object:
        """What stands for a global; nothing is imported."""
        known = KNOWN.get((module, name))
        self.is_plain &= known is not None
        return known or SETS.get((module, name)) or Inert(f"{module}.{name}")

    def persistent_load(self, pid: object) -> object:
        """The storage that a persistent id names; empty ones may change their dtype."""
        storage = stored(pid)
        known = self.storages.setdefault(storage.key, storage)
        if known != storage and (known.nbytes or storage.nbytes):
            raise CheckpointError(f"its pickle describes storage {storage.key} in two ways")
        return storage


def describe(source: object, unpickler: DescribingUnpickler) -> object:
    """The next object of a pickle; reads no further than its end. Raises only CheckpointError."""
    try:
        return unpickler.load()
    except CheckpointError as error:
        raise CheckpointError(source, error) from None
    except Exception as error:  # a damaged pickle can raise anything; none of it is ours
        raise CheckpointError(source, f"its pickle is damaged ({type(error).__name__}: {error})") from None


# ---- what it gives by name ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """A pickle's contents by dotted name; `is_plain` as in `Manifest`."""

    is_plain: bool
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    unsaved: dict[str, TensorRecord] = field(default_factory=dict)
    dicts: set[str] = field(default_factory=set)

    def containers(self) -> dict[str, str]:
        """For each tensor the dict that holds it, or the module at the top of those around it."""
        tops = {
            name for name in self.modules if not any(above in self.modules for above in names_above(name))
        }
        holders = tops | self.dicts
        held = {name: next((a for a in names_above(name) if a in holders), "") for name in self.tensors}
        return {name: holder for name, holder in held.items() if holder}


def names_above(name: str) -> Iterator[str]:
    """Every dotted name that `name` lies in, the nearest first."""
    while name:
        yield (name := name.rpartition(".")[0])


def _contents(node: object) -> Facts | None:
    """What counts as data: a container's contents, and what is registered in a module.

    Of a long one only its tensors do: it is a vocabulary, or a log.
    """
    if isinstance(node, Inert):
        return node.registered() if node.is_module else node.items.items()
    facts = contents_of(node)
    if facts is None or len(node) <= (MAX_NAMED if isinstance(node, dict) else MAX_ITEMS):  # type: ignore[arg-type]
        return facts
    return (fact for fact in facts if isinstance(fact[1], TENSORS))


def unread(node: object) -> Unread:
    """What stands for a value that is not plain."""
    return Unread(node.name if isinstance(node, Inert) else type(node).__name__)


def _values(
    facts: Facts, name: str, depth: int, visited: Iterator[int], seen: set[int]
) -> Iterator[tuple[str, object]]:
    """The public values among attributes and within them; stops silently after MAX_ENTRIES in total.

    Each object is looked into once, and no module. What has nothing to look at is Unread.
    """
    for key, fact in facts:
        if depth > manifest.MAX_DEPTH or next(visited) > manifest.MAX_ENTRIES:
            return
        path = dotted(name, key)
        if str(key).startswith("_") or key == "training" or len(path) > manifest.MAX_NAME:
            continue
        if isinstance(fact, PLAIN):
            yield path, fact
            continue
        within = contents_of(fact)
        if isinstance(fact, Inert) and (fact.is_module or id(fact) in seen):
            continue
        if isinstance(fact, Inert) and fact.has_names:
            seen.add(id(fact))
            within = chain(fact.attributes(), fact.items.items())
        if within is None:
            yield path, unread(fact)
            continue
        yield from _values(islice(within, MAX_ITEMS), path, depth + 1, visited, seen)


def _private(module: Inert, name: str) -> Iterator[tuple[str, object]]:
    """The numbers and flags among a module's private attributes: its own program's, as public ones are."""
    for key, fact in module.attributes():
        if str(key).startswith("_") and type(fact) in (bool, int, float) and len(name) < manifest.MAX_NAME:
            yield dotted(name, str(key)[:FEW]), fact


def _keep(target: dict[str, Any], name: str, node: object) -> None:
    if name in target:
        raise CheckpointError(f"the name {name!r} occurs twice")
    target[name] = node


def _sort(tree: object, found: Described) -> None:
    visited, root, seen = count(), None, set[int]()  # of facts: too many do not matter, they end
    room = ROOM
    for name, node in manifest.walk(tree, count(), _contents):
        room -= len(name) + (PER_TENSOR if type(node) in TENSORS else PER_VALUE)
        if room < 0:
            raise CheckpointError(f"names of tensors and values take over {ROOM >> 20} MiB; not weights")
        if isinstance(node, TensorRecord):
            _keep(found.tensors, name, node)
        elif isinstance(node, Unreadable):
            _keep(found.unreadable, name, node.reason)
        elif isinstance(node, PLAIN):
            _keep(found.values, name, node)
        elif isinstance(node, dict):
            found.dicts.add(name)
        elif isinstance(node, Inert):
            if root is None or not f"{name}.".startswith(root):  # one config may serve two models
                root, seen = f"{name}." if name else "", set()
            seen.add(id(node))
            if node.is_module:
                found.modules.setdefault(name, node.name)  # a function of that name hides the module
                functions = {dotted(name, key): node.attribute(key) for key in FUNCTIONS}
                found.modules.update({at: f.name for at, f in functions.items() if isinstance(f, Inert)})
                found.values.update((dotted(name, key), key) for key in CHANGES if node.attribute(key))
                found.values.update(_private(node, name))
                found.unsaved.update((dotted(name, key), tensor) for key, tensor in node.unsaved())
            elif node.holds_tensor:
                found.unreadable[name] = f"is made by {node}, which was not run"
            elif not node.has_names:
                found.values[name] = unread(node)
            found.values.update(_values(node.attributes(), name, 1, visited, seen))
        elif contents_of(node) is None:
            found.values[name] = unread(node)


def described(source: object, unpickler: DescribingUnpickler) -> Described:
    """The next object of a pickle of `source`, by its names.

    Raises CheckpointError for a name that occurs twice, and for trees too deep or too large to be data.
    """
    tree = describe(source, unpickler)
    found = Described(unpickler.is_plain and unpickler.proto == 2)
    try:
        _sort(tree, found)
    except CheckpointError as error:
        raise CheckpointError(source, error) from None
    return found
