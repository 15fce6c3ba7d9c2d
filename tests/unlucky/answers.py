"""What a program of this folder found, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def answer(program: str, folder: Path, threads: int) -> dict[str, Any]:
    """The JSON that a program prints which works in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": f"{threads}"}
    command = [sys.executable, Path(__file__).with_name(program), folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
