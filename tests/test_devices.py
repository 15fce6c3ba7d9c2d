"""The whole device path on the simulated device, its late copies, and faults that must not pass.

Nothing here ran on a real GPU; `tests/test_cuda.py` and `scripts/check_device` do that where there is one.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2lite import GPTModel, InsufficientMemoryError, devices, memory, open_model
from gpt2lite.finetuning.losses import Teaching, summed_loss
from gpt2lite.loading.choice import choose, forecasts
from gpt2lite.loading.forecast import CachingPool
from gpt2lite.memory import Budget, Limit, find_budget

MIB = 1 << 20
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


@pytest.mark.usefixtures("simulated")
def test_forecasts_are_exact_for_files_of_every_kind():
    """A twelfth of them; docs/devices.md has all 48."""
    answer = answer_of(run("forecasts.py", "12"))
    assert (answer["files"], answer["off"]) == (4, [])
    assert answer["loads"] >= 40


# ---- the allocator's model, block by block -----------------------------------------------------------------


def test_segments_that_are_free_go_back_before_a_limit_is_passed():
    roomy, tight = CachingPool(), CachingPool(50 * MIB)
    for pool in (roomy, tight):
        pool.touch(30 * MIB)
        pool.take(40 * MIB)
    assert (roomy.peak_reserved, tight.peak_reserved) == (70 * MIB, 40 * MIB)


def test_small_blocks_come_from_segments_of_their_own():
    pool = CachingPool()
    for _ in range(3):
        pool.take(MIB)
    pool.take(MIB + 1)
    assert (pool.used, pool.reserved) == (4 * MIB + 512, 2 * 2 * MIB + 20 * MIB)


def test_growing_segments_round_no_block_up():
    pool = CachingPool(grows=True)
    first = pool.take(19 * MIB + 512 * 1024)
    pool.take(3 * MIB)
    assert (pool.used, pool.reserved) == (22 * MIB + 512 * 1024, 40 * MIB)
    pool.give(first)
    pool.take(15 * MIB)
    assert pool.reserved == 40 * MIB


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_growing_segments_are_known_by_torchs_own_setting(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "max_split_size_mb:64, expandable_segments: True")
    assert devices.grows_segments()


def test_a_device_is_admitted_by_what_is_reserved(pth: Path):
    plan = open_model(pth, config={"n_heads": 4}).plan("cuda")
    found = forecasts(plan)["mmap"]
    assert found.peak_device < found.peak_reserved == 2 * MIB
    with pytest.raises(InsufficientMemoryError):
        choose(plan, "mmap", Budget(Limit(None, ""), Limit(found.peak_reserved - 1, "")))
    assert choose(plan, "mmap", Budget(Limit(None, ""), Limit(found.peak_reserved, "")))[0] == "mmap"


# ---- one memory for host and device ------------------------------------------------------------------------


def test_one_memory_is_counted_once(pth: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "shares_memory", lambda device: True)
    budget = find_budget(torch.device("cuda"))
    assert budget.is_shared
    assert budget.device.nbytes <= memory.host_memory().available
    plan = open_model(pth, config={"n_heads": 4}).plan("cuda")
    found = forecasts(plan)["baseline"]
    both = found.peak_host_anonymous + found.peak_reserved
    for nbytes, fits in ((both, True), (both - 1, False)):
        limits = Budget(Limit(nbytes, ""), Limit(found.peak_reserved, ""), is_shared=True)
        if fits:
            assert choose(plan, "baseline", limits)[0] == "baseline"
        else:
            with pytest.raises(InsufficientMemoryError) as caught:
                choose(plan, "baseline", limits)
            assert caught.value.needed == {"host": both}


# ---- what a kind of device lacks ---------------------------------------------------------------------------


def test_a_model_is_saved_where_an_accelerator_has_no_streams(
    model: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on Apple's machines, whose torch.mps has no `is_initialized` either."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("mps"))
    assert devices.caller_stream() is None
    assert model.save_checkpoint(tmp_path / "model.pth").stat().st_size


class NoDoubles(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert torch.float64 not in {
            each.dtype for each in tree_leaves(found) if isinstance(each, torch.Tensor)
        }
        return found


@pytest.mark.parametrize("taught", [True, False])
def test_losses_need_no_doubles_where_a_device_has_none(taught: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(devices.LACKS, "cpu", {*devices.LACKS["cpu"], *devices.LACKS["mps"]})
    head, hidden = torch.nn.Linear(8, 20), torch.randn(6, 8, requires_grad=True)
    teaching = Teaching(torch.nn.Linear(8, 20), torch.randn(6, 8), 0.5, 2.0) if taught else None
    with NoDoubles():
        summed_loss(head, hidden, torch.arange(6), chunked=True, teaching=teaching).backward()
    assert hidden.grad is not None


def test_words_that_are_hardly_likely_have_a_gradient_in_fp16():
    """5e-9 is nothing in fp16, and is something once it is scaled as the whole loss will be."""
    torch.manual_seed(0)
    head, hidden, scale = torch.nn.Linear(4, 5000, bias=False), torch.randn(64, 4), 2.0**14
    hidden[:, 0] = 1
    head.weight.data[:, 0] = torch.where(torch.arange(5000) < 8, 17.0, 0.0)
    ids = torch.arange(64) % 8
    summed_loss(head, hidden, ids, chunked=True).backward()
    wanted, head.weight.grad = head.weight.grad, None
    rare = wanted[8:].abs()
    for given in (1.0, scale):
        with torch.autocast("cpu", torch.float16):
            loss = summed_loss(head, hidden, ids, chunked=True, scale=given)
        (loss * scale).backward()
        found, head.weight.grad = head.weight.grad / scale, None
        share = float(((found[8:].abs() > 0.5 * rare) & (found[8:].abs() < 2 * rare)).float().mean())
        assert share > 0.99 if given == scale else share < 0.01


def test_a_plan_for_training_touches_no_absent_device():
    command = [sys.executable, "-m", "gpt2lite", "plan", "--size", "gpt2", "--train", "--device", "cuda:7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.startswith("training gpt2 on cuda:7")) == (0, True), done.stderr


def test_cards_that_emulate_bfloat16_train_in_fp16(monkeypatch: pytest.MonkeyPatch):
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        assert devices.has_bfloat16(torch.device("cuda")) is has


def test_what_a_token_costs_leaves_out_what_is_recorded_once():
    path = SIMULATED.parent.parent / "benchmarks" / "compare_decoding.py"
    program = runpy.run_path(str(path))
    seconds = {"PROMPT": 1.0, "BEGUN": 6.0, "DECODE": 6.0 + 62 * 0.5, "PREFILL": 2.0}
    seconds |= {"LONG_BEGUN": 8.0, "LONG": 8.0 + 32 * 0.75}
    runs = {program[name]: [spent] for name, spent in seconds.items()}
    found = program["figures"]({"ours, bfloat16": runs}, 10, 40.0)["ours, bfloat16"]
    assert (found.token, found.late, found.roofline) == (0.5, 0.75, 1.0)
