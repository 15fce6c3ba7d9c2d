"""Loads leave nothing open, mapped or running, also those that fail or are interrupted."""

from __future__ import annotations

from typing import Any

import pytest
from answers import answer


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answer("lasting.py", tmp_path_factory.mktemp("lasting"), threads=2)


WHAT = ["loads", "generations", "failed loads", "eight threads", "after fork", "Ctrl-C", "Ctrl-C twice"]


@pytest.mark.parametrize("what", WHAT)
def test_nothing_is_left_of(found: dict[str, Any], what: str):
    assert found[what]["tried"]
    assert found[what]["faults"] == []
