"""The whole device path on the simulated device, its late copies, and faults that must not pass.

Nothing here ran on a real GPU; `tests/test_cuda.py` and `scripts/check_device` do that where there is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SIMULATED = Path(__file__).with_name("simulated")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose accelerator is the simulated device."""
    paths = [str(SIMULATED), str(SIMULATED.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=SIMULATED)


@pytest.fixture(scope="session")
def simulated() -> None:
    """The device, compiled: a minute for the first time."""
    built = run("-c", "import device; device.build()")
    if built.returncode:
        pytest.skip(f"the simulated device cannot be built: {built.stderr.strip().splitlines()[-1]}")


def answer_of(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("simulated")
def test_everything_holds_on_a_device_whose_work_is_late():
    failed = answer_of(run("checks.py"))
    assert failed == {}


@pytest.mark.usefixtures("simulated")
def test_each_planted_fault_is_caught():
    caught = answer_of(run("faults.py"))
    assert len(caught) >= 12
    assert [fault for fault, checks in caught.items() if not checks] == []
