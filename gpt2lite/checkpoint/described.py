"""What the objects of a pickle give by name: tensors, plain values, the classes of modules.

A module's tensors have the names that its `state_dict()` would give, in its order; the attributes of modules
and of other objects are values under their dotted paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch

from gpt2lite.checkpoint.inert_pickle import DescribingUnpickler, Inert, TensorRecord, Unreadable, describe
from gpt2lite.checkpoint.manifest import MAX_DEPTH, MAX_ENTRIES, MAX_NAME, contents_of, dotted, walk
from gpt2lite.errors import CheckpointError

MAX_ITEMS = 1000  # of a container within an object: what is longer is a vocabulary or data
CHANGES = ("_forward_hooks", "_forward_pre_hooks", "forward")  # what makes one module compute otherwise
PLAIN = (str, int, float, NoneType, torch.dtype)
Facts = Iterable[tuple[object, object]]  # names, and what they stand for


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


def _above(name: str) -> Iterator[str]:
    """Every dotted name that `name` lies in, the nearest first."""
    while name:
        yield (name := name.rpartition(".")[0])


def _contents(node: object) -> Facts | None:
    """What counts as data: a container's contents, and what is registered in a module."""
    if isinstance(node, Inert):
        return node.registered() if node.is_module else node.items.items()
    return contents_of(node)


def _values(
    facts: Facts, name: str, depth: int, visited: Iterator[int], seen: set[int]
) -> Iterator[tuple[str, object]]:
    """The public plain values among attributes and within them; ends without a word past MAX_ENTRIES of all.

    Each object is looked into once, and no module.
    """
    for key, fact in facts:
        if depth > MAX_DEPTH or next(visited) > MAX_ENTRIES:
            return
        path = dotted(name, key)
        if str(key).startswith("_") or key == "training" or len(path) > MAX_NAME:
            continue
        if isinstance(fact, PLAIN):
            yield path, fact
        within = contents_of(fact) or ()
        if isinstance(fact, Inert) and not fact.is_module and id(fact) not in seen:
            seen.add(id(fact))
            within = itertools.chain(fact.attributes(), fact.items.items())
        yield from _values(itertools.islice(within, MAX_ITEMS), path, depth + 1, visited, seen)


def _keep(target: dict[str, Any], name: str, node: object) -> None:
    if name in target:
        raise CheckpointError(f"the name {name!r} occurs twice")
    target[name] = node


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
            seen.add(id(node))
            if node.is_module:
                found.modules[name] = node.name
                found.values.update((dotted(name, key), key) for key in CHANGES if node.attribute(key))
            elif node.holds_tensor:
                found.unreadable[name] = f"is made by {node}, which was not run"
            found.values.update(_values(node.attributes(), name, 1, visited, seen))


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
