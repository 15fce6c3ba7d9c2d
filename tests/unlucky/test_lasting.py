"""Loads leave nothing open, mapped or running, also those that fail or are interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("lasting.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, environment = tmp_path_factory.mktemp("lasting"), os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, SCRIPT, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WHAT = ["loads", "generations", "failed loads", "eight threads", "after fork", "Ctrl-C", "Ctrl-C twice"]


@pytest.mark.parametrize("what", WHAT)
def test_nothing_is_left_of(found: dict[str, Any], what: str):
    assert found[what]["tried"]
    assert found[what]["faults"] == []
