"""gpt2lite: a minimal GPT-2 whose constructors know memory.

A public name is imported when it is first used (PEP 562): `import gpt2lite` does not import torch. The stub
`__init__.pyi` is the only list of public names and their homes; type checkers and editors read it, too.
"""

import ast
import importlib
import pkgutil

_STUB = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
_HOMES = {
    alias.name: str(node.module)
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "__version__":
        importlib.import_module("gpt2lite._torch")  # the first to import torch, without its warning
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
