"""Files written by the real writers, small enough that every test makes its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpt2lite import GPTConfig, GPTModel

TINY = GPTConfig(vocab_size=101, context_length=32, emb_dim=48, n_heads=4, n_layers=3)


def pytest_configure() -> None:
    """What the shell set: a run in the background ignores Ctrl-C, and so would every process it starts."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter different from every other and from any initial value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.1, 0.3, generator=generator)
    return module.eval()


def where_positions_decide(model: GPTModel) -> GPTModel:
    """Weights with which greedy text does not run into a short cycle, nor hide a wrong position."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 2.0 if name == "pos_emb.weight" else 0.3, generator=generator)
    return model.eval()


def in_threads(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `count` threads return that do the same at once; an error in one of them is raised."""
    with ThreadPoolExecutor(count) as pool:
        return [each.result() for each in [pool.submit(work) for _ in range(count)]]


@pytest.fixture(params=["torch", "numba"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "numba":
        pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    return request.param


@pytest.fixture
def config() -> GPTConfig:
    return TINY


@pytest.fixture
def model(config: GPTConfig) -> GPTModel:
    return randomise(GPTModel(config))


@pytest.fixture
def tied_model(config: GPTConfig) -> GPTModel:
    return randomise(GPTModel(GPTConfig.of(config.as_dict() | {"tied_head": True})))


@pytest.fixture
def pth(model: GPTModel, tmp_path: Path) -> Path:
    """What the article writes: torch.save(model.state_dict(), "model.pth")."""
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def ids(config: GPTConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def unwritten_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that what a strategy forgets to fill shows in every comparison."""

    def allocate_nan(nbytes: int) -> torch.UntypedStorage:
        return torch.full((max(nbytes, 1),), 0xFF, dtype=torch.uint8).untyped_storage()

    monkeypatch.setattr("gpt2lite.loading.stream.allocate_pages", allocate_nan)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
