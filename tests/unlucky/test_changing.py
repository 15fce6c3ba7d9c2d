"""A file that changes while it is read ends in an error or a right result, in no signal, never silently."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("changing.py")
# What reads the old file to its end, or again, when another one was renamed over it.
UNHARMED = {"saving_mapped", "saving_per_tensor", "training", "resuming", "adapting"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("changing")
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["truncated", "overwritten"])
def test_a_file_that_changes_while_it_is_read_is_an_error_that_names_it(found: dict[str, str], how: str):
    cases = {name: said for name, said in found.items() if name.endswith(how)}
    assert len(cases) == 13
    assert [name for name, said in cases.items() if not said.startswith("error: /")] == []


def test_a_file_that_is_replaced_by_rename_does_no_harm(found: dict[str, str]):
    cases = {name.split(",")[0]: said for name, said in found.items() if name.endswith("replaced")}
    assert {name for name, said in cases.items() if said == "right"} == UNHARMED
    assert [name for name in cases.keys() - UNHARMED if not cases[name].startswith("error: /")] == []
