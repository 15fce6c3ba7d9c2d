"""The notebook's code, run from top to bottom in a fresh process on a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "memory_efficient_loading.ipynb"


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path):
    pytest.importorskip("matplotlib")
    code = "\n\n".join("".join(cell["source"]) for cell in cells())
    small = "GPTConfig(50257, 64, 64, 2, 2, tied_head=True, qkv_bias=True)"
    (tmp_path / "notebook.py").write_text(code.replace("GPTConfig.named(CHOOSE_MODEL)", small))
    assert small in (tmp_path / "notebook.py").read_text()
    environment = os.environ | {"MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "notebook.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Once upon a time" in result.stdout
    assert not [*tmp_path.glob("gpt2lite-notebook-*")]


def test_the_notebook_is_kept_with_its_output_and_no_error():
    for cell in cells():
        assert cell["execution_count"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
