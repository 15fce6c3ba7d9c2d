"""The house's own rules: which way imports point, what is public, what never stands in the code."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

import gpt2lite
from gpt2lite import GPTModel, convert

PACKAGE = Path(gpt2lite.__file__).parent

# Every room, and the rooms that it may import from: those on floors below. A package's own modules may import
# each other.
ARCHITECTURE = Path(__file__).resolve().parent.parent / "docs" / "ARCHITECTURE.md"
ROW = re.compile(r"^\| \d+ \| ([^|]+) \|", re.MULTILINE)
FLOORS = [
    set(re.findall(r"`(\w+)`", rooms)) for rooms in ROW.findall(ARCHITECTURE.read_text(encoding="utf-8"))
]


def test_the_plan_of_the_house_names_every_room_once():
    named = [room for rooms in FLOORS for room in rooms]
    assert sorted(named) == sorted({room_of(path) for path in PACKAGE.rglob("*.py")})


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [
                f"{node.module}.{alias.name}" if node.module == "gpt2lite" else str(node.module)
                for alias in node.names
            ]
        rooms |= {name.split(".")[1] for name in names if name.startswith("gpt2lite.")}
    return rooms


def wrong_imports(room: str, source: str) -> set[str]:
    return {other for other in imported_rooms(source) if other != room and floor_of(other) >= floor_of(room)}


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    assert wrong_imports(room_of(path), path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from gpt2lite.model import GPTModel",
        "import gpt2lite.cli.bench",
        "def f():\n    from gpt2lite import model",
    ],
)
def test_a_wrong_import_is_found(source: str):
    assert wrong_imports("loading", source)


def test_the_public_names_exist_and_are_exported_to_a_type_checker():
    assert {"GPTModel", "__version__"} < set(gpt2lite.__all__) <= set(dir(gpt2lite))
    assert all(hasattr(gpt2lite, name) for name in gpt2lite.__all__)
    lines = [line for line in (PACKAGE / "__init__.pyi").read_text().splitlines() if "import" in line]
    assert len(lines) == len(gpt2lite.__all__)
    assert all(re.fullmatch(r"from gpt2lite\S+ import (\w+) as \1", line) for line in lines)


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'gpt2lite' has no attribute 'GPTMode'"):
        _ = gpt2lite.GPTMode


def test_the_table_of_public_names_has_every_one():
    table = (ARCHITECTURE.parent / "API.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.MULTILINE)
    assert {name for name, now in listed if now != "–"} == set(gpt2lite.__all__)


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_load_is_never_called_without_weights_only(path: Path):
    loads = [call for call in calls(path) if ast.unparse(call.func) == "torch.load"]
    assert all("weights_only=True" in ast.unparse(call) for call in loads)


def test_only_the_command_line_prints():
    printing = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for call in calls(path)
        if ast.unparse(call.func) == "print"
    }
    assert {name for name in printing if not name.startswith("cli/")} == {
        "__main__.py",
        "benchmarking.py",
        "sampler.py",
    }


def test_there_is_no_room_for_everything_else():
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "misc"}


def files_entered(call: Callable[[], object]) -> set[str]:
    """The package's files of which a function runs during a call."""
    found = set()
    sys.setprofile(lambda frame, event, arg: found.add(frame.f_code.co_filename))
    try:
        call()
    finally:
        sys.setprofile(None)
    return {name for name in found if Path(name).is_relative_to(PACKAGE)}


def test_the_walks_through_the_house_grow_no_longer(pth: Path, tmp_path: Path):
    config = {"n_heads": TINY.n_heads}
    walks: dict[str, Callable[[int], object]] = {
        "stream": lambda i: GPTModel.from_checkpoint(pth, strategy="stream", config=config),
        "convert": lambda i: convert(pth, tmp_path / f"out-{i}", to="huggingface", config=config),
    }
    entered = {}
    for name, walk in walks.items():
        walk(0)  # imports
        entered[name] = files_entered(lambda walk=walk: walk(1))
    assert len(entered["stream"]) <= 23, sorted(entered["stream"])
    assert len(entered["convert"]) <= 22, sorted(entered["convert"])
