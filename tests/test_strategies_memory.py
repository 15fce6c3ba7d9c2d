"""What the strategies say about memory, measured in fresh processes on a model large enough to tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2lite import GPTConfig, GPTModel, save_per_tensor
from gpt2lite.benchmarking import Failure, Measurement, compare_strategies, write_random_checkpoint

MIB = 1 << 20
CONFIG = GPTConfig(8000, 512, 512, 8, 8)  # 128 MiB of parameters, 8 MiB of masks
SLACK = 24 * MIB

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    write_random_checkpoint(CONFIG, path)
    return path


@pytest.fixture(scope="module")
def measured(checkpoint: Path) -> dict[str, Measurement]:
    names = ["baseline", "sequential", "meta", "mmap", "per_tensor", "stream"]
    config = {"n_heads": CONFIG.n_heads}
    results = list(compare_strategies(checkpoint, "cpu", names, folder=checkpoint.parent, config=config))
    assert not [result for result in results if isinstance(result, Failure)]
    return {result.strategy: result for result in results if isinstance(result, Measurement)}


def file_bytes(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize("strategy", ["baseline", "sequential", "meta", "mmap", "per_tensor", "stream"])
def test_bench_finds_every_strategy_exact(measured: dict[str, Measurement], strategy: str):
    assert measured[strategy].bitwise_equal
    assert measured[strategy].logits_equal


@pytest.mark.parametrize("strategy", ["baseline", "sequential", "meta"])
def test_the_articles_first_three_take_the_model_and_the_file(
    measured: dict[str, Measurement], checkpoint: Path, strategy: str
):
    both = measured[strategy].model_bytes + file_bytes(checkpoint)
    assert abs(measured[strategy].peak_host_anonymous - both) <= SLACK


def test_mmap_takes_no_anonymous_memory_and_maps_what_is_used(measured: dict[str, Measurement]):
    assert measured["mmap"].peak_host_anonymous <= SLACK
    assert measured["mmap"].peak_host_reclaimable >= 0.7 * measured["mmap"].model_bytes


def test_per_tensor_takes_the_model_and_its_largest_tensor(measured: dict[str, Measurement]):
    largest = 4 * CONFIG.vocab_size * CONFIG.emb_dim
    wanted = measured["per_tensor"].model_bytes + largest
    assert abs(measured["per_tensor"].peak_host_anonymous - wanted) <= SLACK


def test_stream_takes_the_model_once(measured: dict[str, Measurement]):
    assert abs(measured["stream"].peak_host_anonymous - measured["stream"].model_bytes) <= SLACK
    assert measured["stream"].peak_host_reclaimable <= SLACK


def test_bench_leaves_nothing_behind(measured: dict[str, Measurement], checkpoint: Path):
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model.pth"]


def test_a_streamed_cast_holds_the_ring_and_no_second_model(checkpoint: Path, tmp_path: Path):
    script = """
import json, sys, torch
from gpt2lite import GPTModel, track_memory
def load(path):
    return GPTModel.from_checkpoint(path, strategy="stream", dtype=torch.bfloat16, config={"n_heads": 8})
load(sys.argv[1])
with track_memory() as memory:
    model = load(sys.argv[1])
print(json.dumps([memory.peak_host_anonymous, sum(p.numel() * 2 for p in model.parameters())]))
"""
    small = tmp_path / "small.pth"
    write_random_checkpoint(GPTConfig(100, 32, 64, 8, 2), small)
    result = subprocess.run([sys.executable, "-c", script, str(checkpoint)], capture_output=True, text=True)
    peak, model_bytes = json.loads(result.stdout)
    assert peak <= model_bytes + 64 * MIB + 12 * MIB


def test_writing_a_checkpoint_holds_a_chunk_and_not_the_model(tmp_path: Path):
    script = """
import sys
from pathlib import Path
from gpt2lite import GPTConfig, track_memory
from gpt2lite.benchmarking import write_random_checkpoint
write_random_checkpoint(GPTConfig(100, 32, 64, 8, 2), Path(sys.argv[1]))
with track_memory() as memory:
    write_random_checkpoint(GPTConfig(8000, 512, 512, 8, 8), Path(sys.argv[1]))
print(memory.peak_host_anonymous)
"""
    path = tmp_path / "model.pth"
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert int(result.stdout) <= 48 * MIB


def test_the_random_checkpoint_has_the_articles_layout(checkpoint: Path):
    state = torch.load(checkpoint, weights_only=True)
    masks = [name for name in state if name.endswith(".att.mask")]
    assert len(masks) == CONFIG.n_layers
    assert torch.equal(state[masks[0]], torch.ones(512, 512).triu(1))
    with torch.device("meta"):
        wanted = GPTModel(CONFIG).state_dict()
    assert {name: t.shape for name, t in state.items() if name not in masks} == {
        n: t.shape for n, t in wanted.items()
    }
    assert state["out_head.weight"].data_ptr() != state["tok_emb.weight"].data_ptr()


def test_exploding_a_checkpoint_holds_one_tensor(checkpoint: Path, tmp_path: Path):
    folder = save_per_tensor(checkpoint, tmp_path / "exploded")
    assert len(list(folder.iterdir())) == len(torch.load(checkpoint, weights_only=True))
