"""Blocks that stay in the file: the same numbers as with all of them in memory, and nothing left behind."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_threads, where_positions_decide

from gpt2lite import (
    Batch,
    CheckpointError,
    GPTConfig,
    GPTModel,
    InsufficientMemoryError,
    Task,
    UsageError,
    convert,
    evaluate,
    finetune,
    forecast,
    load_module,
    open_model,
)
from gpt2lite.cli import main
from gpt2lite.loading.choice import with_offload
from gpt2lite.memory import MIB, find_budget

CONFIG = GPTConfig(vocab_size=150, context_length=64, emb_dim=128, n_heads=4, n_layers=10, tied_head=True)
CAP = "4 MiB"  # of 8.3 in float32
FILES = ("book.pth", "huggingface.safetensors", "shards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    model = where_positions_decide(GPTModel(CONFIG))
    model.save_checkpoint(folder / "book.pth")
    convert(folder / "book.pth", folder / "huggingface.safetensors", to="huggingface")
    convert(folder / "book.pth", folder / "shards", to="huggingface", max_shard_size="1MB")
    return folder


def load(path: Path, **options: Any) -> GPTModel:
    return GPTModel.from_checkpoint(path, **{"offload": "disk", "max_host_memory": CAP, **options})


def texts(count: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FILES)
def test_logits_and_tokens_are_those_of_the_whole_model(folder: Path, name: str, dtype: torch.dtype | None):
    path = folder / name
    whole = GPTModel.from_checkpoint(path, dtype=dtype)
    model = load(path, dtype=dtype, max_host_memory=CAP if dtype is None else "2 MiB")
    assert len(model.trf_blocks.away) >= 3
    with torch.no_grad():
        for ids in (texts(), texts(1, 1), texts(2, 64)):
            assert torch.equal(model(ids), whole(ids))
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]  # of different lengths
    wanted = [row.tolist() for row in whole.generate(prompts, max_new_tokens=12, engine="torch")]
    assert [row.tolist() for row in model.generate(prompts, max_new_tokens=12)] == wanted
    assert evaluate(model, texts().flatten()).nats == evaluate(whole, texts().flatten()).nats


def test_no_more_stays_away_than_must(folder: Path):
    kept = []
    for cap in ("3500 KiB", "5 MiB", "7 MiB"):
        model = load(folder / "book.pth", max_host_memory=cap)
        kept.append(sum(1 for _ in model.trf_blocks.children()))
        assert f"(blocks {kept[-1]} to 9 on disk)" in repr(model)
    assert kept == sorted(set(kept))
    whole = load(folder / "book.pth", offload="auto", max_host_memory="64 MiB")
    assert type(whole.trf_blocks) is torch.nn.Sequential
    whole(texts()).sum().backward()


def test_where_not_even_two_blocks_fit_it_is_refused(folder: Path):
    with pytest.raises(InsufficientMemoryError, match="will not fit"):
        load(folder / "book.pth", max_host_memory="1 MiB", strategy="stream")
    mapped = load(folder / "book.pth", max_host_memory="1 MiB")  # which auto can do on the CPU
    assert type(mapped.trf_blocks) is torch.nn.Sequential


def test_a_refusal_names_it_with_its_speed(folder: Path):
    with pytest.raises(
        InsufficientMemoryError, match=r'offload="disk" \(about .* s a token at the .*B/s'
    ) as caught:
        GPTModel.from_checkpoint(folder / "book.pth", strategy="stream", max_host_memory=CAP)
    assert 'offload="disk"' in caught.value.fits


def batches(number: int) -> Batch:
    return Batch(texts()[:, :-1], texts()[:, 1:])


def test_a_refusal_does_not_name_it_where_another_strategy_holds_all(folder: Path):
    with pytest.raises(InsufficientMemoryError) as caught:
        GPTModel.from_checkpoint(folder / "book.pth", strategy="baseline", max_host_memory="12 MiB")
    assert caught.value.fits == ('strategy="stream"',)


REFUSED: dict[str, Callable[[GPTModel], object]] = {
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict({}),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.float64),
    "deepcopy": copy.deepcopy,
    "save": lambda model: model.save_checkpoint("model.pth"),
    "torch.save": lambda model: torch.save(model, "model.pth"),
    "a block": lambda model: model.trf_blocks[0],
    "gradients": lambda model: model.requires_grad_(True)(texts()),
    "finetune": lambda model: finetune(model, Task(batches, []), "run"),
    "a pass within one": lambda model: [next(iter(model.trf_blocks)) for _ in model.trf_blocks],
    "blocks that were kept": lambda model: [
        block(torch.zeros(1, 1, 128)) for block in list(model.trf_blocks)
    ],
    "trace": lambda model: torch.jit.trace(model, texts(), check_trace=False),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_need_all_blocks_is_refused(
    folder: Path, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model, whole = load(folder / "book.pth"), GPTModel.from_checkpoint(folder / "book.pth")
    with pytest.raises(UsageError, match="offload"):
        REFUSED[what](model)
    assert os.listdir(tmp_path) == (["model.pth"] if what == "torch.save" else [])  # torch opens it first
    with torch.no_grad():
        assert torch.equal(model(texts()), whole(texts()))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a place": ({"offload": "moon"}, "auto, disk, host or None"),
    "the host": ({"offload": "host"}, 'on the host already; use offload="disk"'),
    "int8": ({"quantize": "int8"}, "int8 weights, which are made at loading"),
    "a strategy": ({"strategy": "mmap"}, 'strategy="stream" or "auto", not \'mmap\''),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_cannot_do_is_refused(folder: Path, what: str):
    options, message = WRONG[what]
    with pytest.raises(UsageError, match=message):
        load(folder / "book.pth", **options)


@pytest.mark.parametrize("change", ["written to", "replaced", "truncated", "gone"])
def test_a_file_that_changes_is_an_error_at_the_next_pass(folder: Path, tmp_path: Path, change: str):
    path = tmp_path / "model.pth"
    path.write_bytes((folder / "book.pth").read_bytes())
    model = load(path)
    with torch.no_grad():
        model(texts())
    if change == "replaced":
        GPTModel(CONFIG).save_checkpoint(path)
    elif change == "gone":
        path.unlink()
    else:
        with open(path, "r+b") as opened:
            opened.truncate(5000) if change == "truncated" else opened.write(b"PK")
    with torch.no_grad(), pytest.raises(CheckpointError):
        model(texts())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc on this system")
def test_nothing_is_open_between_two_passes(folder: Path):
    model = load(folder / "book.pth")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    with torch.no_grad():
        for _ in range(3):
            model(texts())
        blocks = iter(model.trf_blocks)
        next(blocks)
        blocks.close()  # a pass that ends early, as an error ends it
        model(texts())
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@torch.no_grad()
def test_of_two_passes_at_once_one_is_right_and_one_an_error(folder: Path):
    model, whole = load(folder / "book.pth"), GPTModel.from_checkpoint(folder / "book.pth")
    wanted = whole(texts())
    found = list[torch.Tensor | UsageError]()

    @torch.no_grad()
    def work() -> None:
        for _ in range(20):
            try:
                found.append(model(texts()))
            except UsageError as error:
                found.append(error)

    in_threads(3, work)
    right = [logits for logits in found if isinstance(logits, torch.Tensor)]
    assert right
    assert all(torch.equal(logits, wanted) for logits in right)
    assert torch.equal(model(texts()), wanted)


@torch.no_grad()
def test_an_error_that_is_kept_hinders_no_later_pass(folder: Path):
    model, kept = load(folder / "book.pth"), list[Exception]()
    try:
        model(texts(), cache="no cache")
    except Exception as error:
        kept.append(error)
    for number, block in enumerate(model.trf_blocks):
        block.register_forward_pre_hook(lambda *_: 1 / 0) if number == 8 else None
    try:
        model(texts())
    except ZeroDivisionError as error:
        kept.append(error)
    blocks = iter(model.trf_blocks)
    assert len([next(blocks) for _ in range(9)]) == 9
    assert len(kept) == 2


def test_dropout_is_off_where_the_model_is_evaluated(tmp_path: Path):
    config = GPTConfig(150, 64, 128, 4, 10, tied_head=True, drop_rate=0.5)
    where_positions_decide(GPTModel(config)).save_checkpoint(tmp_path / "model.pth")
    model, whole = load(tmp_path / "model.pth"), GPTModel.from_checkpoint(tmp_path / "model.pth")
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(texts()), whole(texts()))
    prompt = torch.tensor([[3, 1, 4]])
    wanted = whole.generate(prompt, max_new_tokens=8, engine="torch")
    assert torch.equal(model.generate(prompt, max_new_tokens=8), wanted)


MEASURE = """
import json, sys, torch
from gpt2lite import GPTModel, track_memory
def work(path, **options):
    model = GPTModel.from_checkpoint(path, **options)
    with torch.no_grad():
        model(torch.arange(64)[None])
work(sys.argv[2])
with track_memory() as memory:
    work(sys.argv[1], offload="disk", max_host_memory=int(sys.argv[3]))
print(json.dumps(memory.peak_host_anonymous))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_a_model_four_times_the_cap_computes_within_it(folder: Path, tmp_path: Path):
    config = GPTConfig(500, 64, 512, 8, 24, tied_head=True)
    with torch.no_grad():
        GPTModel(config).save_checkpoint(tmp_path / "model.pth")
    cap = (tmp_path / "model.pth").stat().st_size // 4
    command = [sys.executable, "-c", MEASURE, tmp_path / "model.pth", folder / "book.pth", str(cap)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) <= cap + 24 * MIB
    plan = open_model(tmp_path / "model.pth").plan()
    fitted = with_offload(plan, "auto", "disk", find_budget(plan.device, cap))
    assert 0.5 * cap < fitted.model_bytes < cap  # what fits, stays


def test_plan_says_what_stays_away_and_what_a_token_takes(folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ["plan", str(folder / "book.pth"), "--offload", "disk", "--max-host-memory", "4MiB"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "on disk  blocks " in out
    assert "a token  " in out
    assert "/s measured" in out
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["auto"] == "stream"
    assert said["a token"] > 0


def test_a_forecast_is_of_what_stays(folder: Path):
    path = folder / "book.pth"
    whole, left = (forecast(path, max_host_memory=CAP, offload=place) for place in (None, "disk"))
    assert left.keys() == {"stream"}
    assert left["stream"].stays_host < 4 * MIB < whole["stream"].stays_host


def test_a_module_of_ones_own_takes_no_offload(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "own.pth")
    with pytest.raises(UsageError, match="offload knows the blocks of a GPTModel"):
        load_module(lambda: torch.nn.Linear(2, 2), tmp_path / "own.pth", offload="disk")
