"""What needs a GPU. Skipped, with the reason, where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_forecast import run_benchmark
from test_loading import HEADS, KINDS, assert_equal_bits, expected_parameters, save_pth

from gpt2lite import (
    STRATEGIES,
    GPTConfig,
    GPTModel,
    InsufficientMemoryError,
    Tuning,
    clean_up,
    forecast,
    generate,
    track_memory,
)
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.loading import stream as stream_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

MIB = 1 << 20


def on_host(model: GPTModel) -> GPTModel:
    return model.to("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_strategy_gives_the_bits_of_plain_torch_on_cuda(
    kind: str, strategy: str, dtype: torch.dtype | None, tmp_path: Path
):
    make, save = KINDS[kind]
    if strategy == "per_tensor" and not kind.endswith("folder"):
        pytest.skip("per_tensor reads a folder")
    peer = make()
    path = save(peer.state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, "cuda", strategy, config=HEADS, dtype=dtype)
    assert all(p.is_cuda and p.is_contiguous() for p in loaded.parameters())
    assert_equal_bits(on_host(loaded), expected_parameters(peer.state_dict()), dtype)


@pytest.mark.parametrize("kind", ["ours-pth", "hf-hub-safetensors", "fast-pth", "ours-tied-pth"])
@pytest.mark.parametrize("ring_bytes", [64, 4096, 1 << 16])
def test_a_ring_that_is_reused_many_times_never_overwrites_what_is_being_copied(
    kind: str, ring_bytes: int, tmp_path: Path
):
    tuning = Tuning(chunk_bytes=max(ring_bytes, 4096), ring_bytes=ring_bytes)
    make, save = KINDS[kind]
    peer = make()
    path = save(peer.state_dict(), tmp_path)
    for dtype in (None, torch.float16):
        loaded = GPTModel.from_checkpoint(path, "cuda", "stream", config=HEADS, dtype=dtype, tuning=tuning)
        assert_equal_bits(on_host(loaded), expected_parameters(peer.state_dict()), dtype)


def test_a_slow_device_does_not_let_a_slot_be_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each delivery first keeps the device busy, so that copies are pending when their slots are wanted."""
    real = stream_engine.Ring.deliver

    def late(self: stream_engine.Ring, *args: object) -> None:
        torch.cuda._sleep(2_000_000)
        with self.lane.copying:
            torch.cuda._sleep(3_000_000)
        real(self, *args)

    monkeypatch.setattr(stream_engine.Ring, "deliver", late)
    tuning = Tuning(ring_bytes=1 << 16)
    make, save = KINDS["ours-pth"]
    peer = make()
    path = save(peer.state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, "cuda", "stream", config=HEADS, tuning=tuning)
    assert_equal_bits(on_host(loaded), peer.state_dict())


def test_page_locked_memory_that_is_refused_falls_back_to_ordinary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = torch.empty

    def refusing(*args: object, **kwargs: object) -> torch.Tensor:
        if kwargs.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refusing)
    make, save = KINDS["fast-pth"]
    peer = make()
    loaded = GPTModel.from_checkpoint(save(peer.state_dict(), tmp_path), "cuda", "stream", config=HEADS)
    assert_equal_bits(on_host(loaded), expected_parameters(peer.state_dict()))


@pytest.mark.parametrize(("strategy", "times", "extra"), [("stream", 1, 17), ("meta", 2, 60), ("mmap", 1, 4)])
def test_device_peaks_are_what_the_strategies_say(strategy: str, times: int, extra: int, tmp_path: Path):
    config = GPTConfig(50257, 1024, 256, 4, 12)
    write_random_checkpoint(config, tmp_path / "model.pth")
    GPTModel.from_checkpoint(tmp_path / "model.pth", "cuda", strategy, config=config)
    with track_memory("cuda") as memory:
        model = GPTModel.from_checkpoint(tmp_path / "model.pth", "cuda", strategy, config=config)
    model_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert times * model_bytes <= memory.peak_device <= times * model_bytes + extra * MIB


def test_clean_up_brings_the_device_back_to_nothing(tmp_path: Path):
    before = clean_up("cuda")
    make, save = KINDS["ours-pth"]
    model = GPTModel.from_checkpoint(save(make().state_dict(), tmp_path), "cuda", config=HEADS)
    assert clean_up("cuda") > before
    del model
    assert clean_up("cuda") == before


def test_greedy_text_is_the_same_on_both_devices(tmp_path: Path, ids: torch.Tensor):
    make, save = KINDS["ours-pth"]
    path = save(make().state_dict(), tmp_path)
    texts = [
        generate(GPTModel.from_checkpoint(path, device, config=HEADS), ids, 12).cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*texts)


def test_a_device_without_enough_memory_leaves_nothing_allocated(tmp_path: Path):
    script = f"""
import torch
from gpt2lite import GPTModel, InsufficientMemoryError
torch.cuda.set_per_process_memory_fraction(1e-4)
try:
    GPTModel.from_checkpoint({str(tmp_path / "model.pth")!r}, "cuda", config={{"n_heads": 4}})
except InsufficientMemoryError:
    print(torch.cuda.memory_allocated())
"""
    config = GPTConfig(20_000, 256, 512, 4, 2)
    save_pth(GPTModel(config).state_dict(), tmp_path)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "0\n", result.stderr


@pytest.mark.parametrize("dialect", ["book", "book-fast", "huggingface"])
def test_forecasts_are_exact_to_1_percent_on_the_device(dialect: str, tmp_path: Path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    arguments = ("forecast_accuracy.py", "--device", "cuda", "--dialects", dialect)
    assert run_benchmark(*arguments, tmp_path / "found.json")["cases"]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "per_tensor"])
def test_a_cap_on_the_device_is_what_the_forecast_says(strategy: str, tmp_path: Path):
    path = save_pth(KINDS["ours-pth"][0]().state_dict(), tmp_path)
    peak = forecast(path, "cuda", config=HEADS)[strategy].peak_reserved
    before = clean_up("cuda")
    with pytest.raises(InsufficientMemoryError, match="nothing was allocated"):
        GPTModel.from_checkpoint(path, "cuda", strategy, config=HEADS, max_device_memory=f"{peak - 1}B")
    assert torch.cuda.max_memory_allocated() <= before + 512  # asking whether the device is there
    with track_memory("cuda") as memory:
        GPTModel.from_checkpoint(path, "cuda", strategy, config=HEADS, max_device_memory=f"{peak}B")
    assert memory.peak_device <= peak


def test_a_host_cap_below_the_largest_tensor_is_held(tmp_path: Path):
    """24 MiB in the largest tensor, 4 MiB for the ring."""
    script = """
import sys
from gpt2lite import GPTModel, track_memory
options = {"device": "cuda", "strategy": "stream", "config": {"n_heads": 4}}
GPTModel.from_checkpoint(sys.argv[2], max_host_memory="4MiB", **options)
with track_memory("cuda") as memory:
    GPTModel.from_checkpoint(sys.argv[1], max_host_memory="4MiB", **options)
print(memory.peak_host_anonymous)
"""
    for name, config in (
        ("large.pth", GPTConfig(12288, 256, 512, 4, 4)),
        ("tiny.pth", GPTConfig(99, 9, 64, 4, 2)),
    ):
        write_random_checkpoint(config, tmp_path / name)
    command = [sys.executable, "-c", script, str(tmp_path / "large.pth"), str(tmp_path / "tiny.pth")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= (4 + 12) << 20


# ---- generation --------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(tmp_path: Path) -> GPTModel:
    """A model in which position decides, so that no greedy text runs into a short cycle."""
    generator = torch.Generator().manual_seed(0)
    model = GPTModel(GPTConfig(101, 256, 48, 4, 3))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 2.0 if name == "pos_emb.weight" else 0.3, generator=generator)
    return GPTModel.from_checkpoint(save_pth(model.state_dict(), tmp_path), "cuda", config={"n_heads": 4})


@pytest.mark.parametrize(
    "prompts", [[[1]], [[1, 2, 3]], [[1], [5, 6, 7, 8], [9] * 40]], ids=["1", "3", "ragged"]
)
def test_a_graph_gives_torchs_tokens(on_cuda: GPTModel, prompts: list[list[int]]):
    wanted = on_cuda.generate(prompts, 200, engine="torch")
    for wanted_row, row in zip(wanted, on_cuda.generate(prompts, 200, engine="cuda_graph"), strict=True):
        assert torch.equal(wanted_row, row)


@pytest.mark.parametrize("window", [1, 100])
def test_a_graph_gives_torchs_tokens_past_the_context(on_cuda: GPTModel, window: int):
    prompts = [[1], [5, 6, 7, 8]]
    wanted = on_cuda.generate(prompts, 400, engine="torch", window=window)
    found = on_cuda.generate(prompts, 400, engine="cuda_graph", window=window)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_auto_takes_the_graph_and_draws_by_the_seed(on_cuda: GPTModel):
    options = {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2}
    first = on_cuda.generate([[1, 2]], 60, seed=3, **options)
    assert torch.equal(first[0], on_cuda.generate([[1, 2]], 60, seed=3, engine="cuda_graph", **options)[0])
    assert not torch.equal(first[0], on_cuda.generate([[1, 2]], 60, seed=4, **options)[0])


def test_int8_on_cuda_is_int8_on_the_cpu(on_cuda: GPTModel, tmp_path: Path):
    path = save_pth(on_cuda.state_dict(), tmp_path)
    load = {"config": {"n_heads": 4}, "quantize": "int8"}
    there, here = (
        GPTModel.from_checkpoint(path, "cuda", **load),
        GPTModel.from_checkpoint(path, "cpu", **load),
    )
    ids = torch.arange(40)[None]
    torch.testing.assert_close(there(ids.cuda()).cpu(), here(ids), rtol=1e-3, atol=1e-3)
