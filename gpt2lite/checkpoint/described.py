"""What the objects of a pickle give by name: tensors, plain values, the classes of modules.

A module's tensors have the names that its `state_dict()` would give, in its order; the attributes of modules
and of other objects are values under their dotted paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TypeVar

import torch

from gpt2lite.checkpoint.inert_pickle import (
    TENSORS,
    DescribingUnpickler,
    Inert,
    TensorRecord,
    Unreadable,
    describe,
)
from gpt2lite.checkpoint.manifest import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_NAME,
    Manifest,
    TensorSpan,
    contents_of,
    dotted,
    walk,
)
from gpt2lite.checkpoint.source import ByteSource, FileState
from gpt2lite.errors import CheckpointError

MAX_ITEMS = 1000  # of a container within an object: what is longer is a vocabulary or data
CHANGES = ("_forward_hooks", "_forward_pre_hooks", "forward")  # what makes one module compute otherwise
T = TypeVar("T")
PLAIN = (str, int, float, NoneType, torch.dtype)


@dataclass(frozen=True)
class Described:
    """A pickle's contents by dotted name; `is_plain` as in `Manifest`."""

    is_plain: bool
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    dicts: set[str] = field(default_factory=set)

    def containers(self) -> dict[str, str]:
        """For each tensor the dict that holds it, or the module at the top of those around it."""
        tops = {name for name in self.modules if not any(above in self.modules for above in _above(name))}
        holders = tops | self.dicts
        held = {name: next((a for a in _above(name) if a in holders), "") for name in self.tensors}
        return {name: holder for name, holder in held.items() if holder}

    def manifest(
        self,
        path: Path,
        spans: Mapping[str, TensorSpan],
        files: Mapping[ByteSource, FileState],
        storages: Mapping[ByteSource, tuple[int, ...]],
    ) -> Manifest:
        """The manifest of a file of torch.save."""
        is_plain = self.is_plain and not self.unreadable
        rest = (self.modules, self.unreadable, is_plain, self.containers())
        return Manifest(path, "torch_zip", spans, self.values, files, storages, *rest)


def _above(name: str) -> Iterator[str]:
    """Every dotted name that `name` lies in, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _contents(node: object) -> Iterable[tuple[object, object]] | None:
    """What counts as data: a container's contents, and what is registered in a module."""
    if isinstance(node, Inert):
        return node.registered() if node.is_module else node.items.items()
    return contents_of(node)


def _counted(items: Iterable[tuple[object, object]], visited: Iterator[int]) -> Iterator[tuple[str, object]]:
    """Public names and what they stand for, until there are too many of all."""
    for key, fact in items:
        if next(visited) > MAX_ENTRIES:
            return
        if not str(key).startswith("_") and key != "training":
            yield str(key), fact


def _facts(node: object) -> Iterable[tuple[object, object]]:
    """What may hold plain values: an object's attributes and items, a container's contents."""
    if isinstance(node, Inert):
        return itertools.chain(node.attributes(), node.items.items())
    return contents_of(node) or ()


def _values(
    node: object, name: str, depth: int, visited: Iterator[int], seen: set[int]
) -> Iterator[tuple[str, object]]:
    """The plain values within an attribute; each object is looked into once, and no module."""
    if isinstance(node, PLAIN):
        yield name, node
    if depth > MAX_DEPTH or len(name) > MAX_NAME:
        return
    if isinstance(node, Inert):
        if node.is_module or id(node) in seen:
            return
        seen.add(id(node))
    for key, fact in _counted(itertools.islice(_facts(node), MAX_ITEMS), visited):
        yield from _values(fact, dotted(name, key), depth + 1, visited, seen)


def _keep(target: dict[str, T], name: str, node: T) -> None:
    if name in target:
        raise CheckpointError(f"the name {name!r} occurs twice")
    target[name] = node


def _keep_object(found: Described, name: str, node: Inert, visited: Iterator[int], seen: set[int]) -> None:
    """A module's class, why what wraps a tensor is not read, and the attributes of both."""
    if node.is_module:
        found.modules[name] = node.name
        found.values.update((dotted(name, key), str(key)) for key in CHANGES if node.attribute(key))
    elif node.wraps_tensor:
        found.unreadable[name] = f"is made by {node}, which was not run"
    seen.add(id(node))
    for key, fact in _counted(node.attributes(), visited):
        if isinstance(fact, TENSORS) and not node.is_module:
            found.unreadable[name] = f"is made by {node}, which was not run"
        found.values.update(_values(fact, dotted(name, key), 1, visited, seen))


def _sort(tree: object, found: Described) -> None:
    visited, root, seen = itertools.count(), None, set[int]()  # of facts: too many do not matter, they end
    for name, node in walk(tree, itertools.count(), _contents):
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
            _keep_object(found, name, node, visited, seen)


def described(path: Path, unpickler: DescribingUnpickler) -> Described:
    """The next object of a pickle of `path`, by its names.

    Raises CheckpointError for a name that occurs twice, and for trees too deep or too large to be data.
    """
    tree = describe(path, unpickler)
    found = Described(unpickler.is_plain and unpickler.proto == 2)
    try:
        _sort(tree, found)
    except CheckpointError as error:
        raise CheckpointError(path, f"{error}") from None
    return found
