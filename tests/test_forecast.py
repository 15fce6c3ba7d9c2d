"""What a load is foretold to take, and the loads that are refused for it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import TINY
from torch import nn

from gpt2lite import (
    STRATEGIES,
    GPTConfig,
    GPTModel,
    InsufficientMemoryError,
    Recipe,
    Tuning,
    UsageError,
    forecast,
    forecast_training,
    load_module,
    open_model,
    save_per_tensor,
)
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, contiguous_stride
from gpt2lite.checkpoint.source import ByteSource, FileState, memory_of
from gpt2lite.cli import main
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.dialects.reading import read_dialect, read_names
from gpt2lite.loading import choice
from gpt2lite.loading.choice import choose, forecasts
from gpt2lite.loading.forecast import CachingPool
from gpt2lite.loading.plan import LoadPlan, make_plan
from gpt2lite.memory import Budget, Limit, host_memory

MIB = 1 << 20
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
ALL_FORMATS = ("pth", "pth with optimizer", "safetensors", "folder")
HEADS = {"n_heads": TINY.n_heads}
ONE_FILE = [name for name in STRATEGIES if name != "per_tensor"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")


def articles_manifest(config: GPTConfig, format: str) -> Manifest:
    """The article's checkpoint as its headers describe it, masks and all, with no file behind it."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in GPTModel(config).state_dict().items()}
    size = config.context_length
    shapes |= {f"trf_blocks.{i}.att.mask": (size, size) for i in range(config.n_layers)}
    spans, offset = {}, 0
    for name, shape in shapes.items():
        path = ByteSource(Path("model.pth" if format == "torch_zip" else f"{name}.pt"))
        spans[name] = TensorSpan(name, torch.float32, shape, contiguous_stride(shape), path, offset)
        offset += spans[name].nbytes
    sizes = defaultdict[ByteSource, list[int]](list)
    for span in spans.values():
        sizes[span.source].append(span.nbytes)
    files = {path: FileState(sum(each), 0, 0) for path, each in sizes.items()}
    return Manifest(
        Path("model.pth"), format, spans, {}, files, {path: tuple(n) for path, n in sizes.items()}
    )


def plan_of_xl(device: str, format: str = "torch_zip") -> LoadPlan:
    config = GPTConfig.of(GPTConfig.named("gpt2-xl").as_dict() | {"tied_head": False})
    reading = read_dialect(articles_manifest(config, format))
    return make_plan(reading, lambda: GPTModel(config), torch.device(device))


@pytest.mark.parametrize("strategy", ["baseline", "sequential", "meta", "mmap", "per_tensor", "stream"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_forecast_for_gpt2_xl_is_what_was_measured(strategy: str, device: str):
    """On an H100, and on two cores: figures that `gpt2lite bench` kept."""
    kept = {"cuda": "bench-cuda-h100-gpt2-xl.json", "cpu": "bench-cpu-gpt2-xl.json"}[device]
    results = json.loads((RESULTS / kept).read_text())["results"]
    measured = next(result for result in results if result["strategy"] == strategy)
    plan = plan_of_xl(device, "tensor_folder" if strategy == "per_tensor" else "torch_zip")
    found = forecasts(plan)[strategy]
    assert found.peak_device == pytest.approx(measured["peak_device"], rel=0.01)
    tolerance = max(24 * MIB, 0.03 * measured["peak_host_anonymous"])
    assert abs(found.peak_host_anonymous - measured["peak_host_anonymous"]) <= tolerance
    print(
        strategy,
        found.peak_device - measured["peak_device"],
        found.peak_host_anonymous - measured["peak_host_anonymous"],
    )


# ---- against measurement, each load in a process of its own ------------------------------------------------


def run_benchmark(*arguments: object) -> dict[str, Any]:
    """What a program of benchmarks/ keeps; it must find nothing wrong. Skips where it cannot run."""
    *words, output = map(str, arguments)
    command = [sys.executable, str(BENCHMARKS / words[0]), *words[1:], "--json", output]
    command += ["--folder", str(Path(output).parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 3:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    found: dict[str, Any] = json.loads(Path(output).read_text())
    return found


def lies_in_memory(path: Path) -> bool:
    """Whether a folder is on a tmpfs, whose mapped pages are no cache of anything."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    enclosing = [mount for mount in mounts if path.resolve().is_relative_to(mount[1])]
    return max(enclosing, key=lambda mount: len(mount[1]))[2] == "tmpfs"


@needs_proc
@pytest.mark.parametrize(
    ("dialect", "formats"),
    [
        ("book", ALL_FORMATS),
        ("huggingface", ALL_FORMATS),
        ("book-fast", ALL_FORMATS),
        ("nanogpt", ("pth with optimizer",)),  # the rest is as Hugging Face's
    ],
)
def test_forecasts_are_what_is_measured_for_every_strategy_format_and_cast(
    dialect: str, formats: tuple[str, ...], tmp_path: Path
):
    """Within 3 % or 24 MiB of 32 to 260 MiB is what was promised; above, two thirds
    of that: up to 9 MiB is found.

    Below, the sampler may miss a short peak on a busy machine; and where anonymous and mapped memory change
    together, what it misses counts to both.
    """
    if lies_in_memory(tmp_path):
        pytest.skip("temporary files lie in memory here")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    arguments = ("--dialects", dialect, "--formats", *formats)
    found = run_benchmark("forecast_accuracy.py", *arguments, tmp_path / "found.json")
    assert len(found["cases"]) == 4 * (5 * len(formats) + ("folder" in formats))  # variants × strategies
    for case in found["cases"]:
        above, most = case["measured_host"] - case["foretold_host"], 24 if case["strategy"] == "mmap" else 16
        assert -24 * MIB <= above <= most * MIB, case


@needs_proc
def test_forecasts_are_what_is_measured_at_124_million_parameters(tmp_path: Path):
    arguments = ("forecast_accuracy.py", "--size", "gpt2", "--dialects", "huggingface", "--formats", "pth")
    found = run_benchmark(*arguments, "--strategies", "baseline", "mmap", "stream", tmp_path / "found.json")
    assert len(found["cases"]) == 12


class WithBuffers(nn.Module):
    """A module of 8 MiB of weights and 40 MiB that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1024, 2048)
        self.register_buffer("table", torch.arange(10 << 20, dtype=torch.int32), persistent=False)


@needs_proc
@pytest.mark.parametrize("strategy", ONE_FILE)
def test_buffers_that_no_checkpoint_holds_are_foretold(strategy: str, tmp_path: Path):
    script = f"""
import json, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from gpt2lite import load_module, track_memory
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.dialects.reading import read_names
from gpt2lite.loading.choice import forecasts
from gpt2lite.loading.plan import make_plan
from test_forecast import WithBuffers
path = {str(tmp_path / "model.pth")!r}
torch.save({{"weight": torch.ones(2, 2)}}, path + ".tiny")
load_module(lambda: torch.nn.Linear(2, 2, bias=False), path + ".tiny", strategy={strategy!r})
reading = read_names(open_checkpoint(path), ["layer.weight", "layer.bias"])
foretold = forecasts(make_plan(reading, WithBuffers, torch.device("cpu")))[{strategy!r}]
with track_memory() as memory:
    module = load_module(WithBuffers, path, strategy={strategy!r})
print(json.dumps([foretold.peak_host_anonymous, memory.peak_host_anonymous]))
"""
    torch.save(nn.Linear(1024, 2048).state_dict(prefix="layer."), tmp_path / "model.pth")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    foretold, measured = json.loads(result.stdout)
    assert abs(foretold - measured) <= 12 * MIB


# ---- budgets -----------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any strategy that begins fails the test: what is refused must be refused before."""

    def began(plan: object) -> nn.Module:
        raise AssertionError("a load began")

    for name, strategy in STRATEGIES.items():
        monkeypatch.setitem(STRATEGIES, name, strategy._replace(load=began))


def source(pth: Path, strategy: str) -> Path:
    return save_per_tensor(pth, pth.parent / "folder") if strategy == "per_tensor" else pth


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cap_of_the_forecast_is_enough(strategy: str, pth: Path):
    path = source(pth, strategy)
    peak = forecast(path, config=HEADS)[strategy].peak_host_anonymous
    cap = f"{max(peak, 1)}B"
    model = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS, max_host_memory=cap)
    assert not model.training


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "mmap"])
def test_a_named_strategy_above_its_cap_is_refused_before_it_begins(strategy: str, pth: Path):
    path = source(pth, strategy)
    peak = forecast(path, config=HEADS)[strategy].peak_host_anonymous
    with pytest.raises(InsufficientMemoryError) as caught:
        GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS, max_host_memory=f"{peak - 1}B")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(
        f'will not fit in memory on cpu with strategy="{strategy}"; nothing was allocated'
    )
    assert lines[1].strip().startswith(f"{strategy} would take ")
    assert "max_host_memory=" in lines[2]
    assert '  would fit: strategy="mmap"' in lines or '  would fit: strategy="stream"' in lines


@pytest.mark.usefixtures("nothing_loads")
def test_auto_says_what_would_fit_where_nothing_does(pth: Path):
    wide = {"config": HEADS, "dtype": torch.float64}
    needed = forecast(pth, **wide)["mmap"].peak_host_anonymous
    with pytest.raises(InsufficientMemoryError) as caught:
        GPTModel.from_checkpoint(pth, **wide, max_host_memory=f"{needed // 2}B")
    text = str(caught.value)
    assert "stream would take" in text
    assert "mmap would take" in text
    assert "would fit: dtype=torch.bfloat16" in text


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


@needs_proc
def test_auto_copies_where_that_fits_and_maps_where_it_does_not(pth: Path):
    copied = GPTModel.from_checkpoint(pth, config=HEADS)
    assert str(pth) not in mapped_files()
    size = forecast(pth, config=HEADS)["stream"].peak_host_anonymous
    mapped = GPTModel.from_checkpoint(pth, config=HEADS, max_host_memory=f"{size - 1}B")
    assert str(pth) in mapped_files()
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), mapped.parameters(), strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The article's layout: 128 MiB of parameters, 8 MiB of masks."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    write_random_checkpoint(GPTConfig(8000, 512, 512, 8, 8), path)
    return path


@needs_proc
def test_a_cap_shrinks_the_ring_and_is_held(checkpoint: Path):
    """A cast goes through the ring: the default of 64 MiB would break this cap by 58."""
    script = """
import json, sys, torch
from gpt2lite import GPTModel, track_memory
options = {"strategy": "stream", "dtype": torch.bfloat16, "config": {"n_heads": 8}}
GPTModel.from_checkpoint(sys.argv[2], **options)
with track_memory() as memory:
    model = GPTModel.from_checkpoint(sys.argv[1], max_host_memory=int(sys.argv[3]), **options)
print(memory.peak_host_anonymous)
"""
    small = checkpoint.with_name("small.pth")
    write_random_checkpoint(GPTConfig(100, 32, 64, 8, 2), small)
    stays = forecast(checkpoint, config={"n_heads": 8}, dtype=torch.bfloat16)["stream"].stays_host
    cap = stays + 6 * MIB
    command = [sys.executable, "-c", script, str(checkpoint), str(small), str(cap)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert stays <= int(result.stdout) <= cap + 8 * MIB


def test_a_device_is_served_under_a_host_cap_far_below_the_largest_tensor():
    """Towards a GPU only the ring is on the host; planned here without one."""
    plan = plan_of_xl("cuda")
    name, fitted = choose(plan, "auto", Budget(Limit(3 * MIB, ""), Limit(None, "")))
    assert (name, fitted.tuning.ring_bytes) == ("stream", 2 * MIB)
    with pytest.raises(InsufficientMemoryError, match=r"2\.0 MiB of host memory"):
        choose(plan, "stream", Budget(Limit(MIB // 2, ""), Limit(None, "")))


def test_a_device_that_is_too_small_is_told_what_would_fit():
    plan = plan_of_xl("cuda")
    with pytest.raises(InsufficientMemoryError) as caught:
        choose(plan, "auto", Budget(Limit(32 << 30, ""), Limit(4 << 30, "a small card")))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "available device memory: a small card" in lines
    assert 'would fit: dtype=torch.bfloat16, strategy="stream"' in lines
    assert 'would fit: device="cpu", strategy="stream"' in lines


def test_a_named_strategy_may_count_on_swap_and_auto_does_not(pth: Path):
    plan = open_model(pth, config=HEADS).plan()
    peak = forecasts(plan)["stream"].peak_host_anonymous
    budget = Budget(Limit(peak // 2, ""), Limit(None, ""), swap=peak)
    assert choose(plan, "stream", budget)[0] == "stream"
    assert choose(plan, "auto", budget)[0] == "mmap"


@pytest.mark.parametrize("cap", ["lots", "-1", 0, -5, 1.5, True, "", "2 XB", "0GiB"])
def test_a_cap_that_is_no_size_is_a_usage_error(cap: object, pth: Path):
    with pytest.raises(UsageError, match="is not a memory size"):
        GPTModel.from_checkpoint(pth, config=HEADS, max_host_memory=cap)  # type: ignore[arg-type]


def test_load_module_takes_the_same_caps(pth: Path, config: GPTConfig):
    with pytest.raises(InsufficientMemoryError, match="baseline would take"):
        load_module(lambda: GPTModel(config), pth, strategy="baseline", max_host_memory="4KiB")


def test_only_stream_can_let_the_page_cache_go(pth: Path):
    with pytest.raises(UsageError, match="keep_cached=False goes with"):
        GPTModel.from_checkpoint(pth, strategy="baseline", config=HEADS, tuning=Tuning(keep_cached=False))


# ---- containers --------------------------------------------------------------------------------------------


def test_random_budgets_in_containers_end_in_a_load_or_a_refusal(tmp_path: Path):
    found = run_benchmark("containers.py", "budgets", "--runs", "7", tmp_path / "found.json")
    assert {run["outcome"] for run in found["runs"]} == {"loaded", "refused"}


def test_a_mapped_model_runs_in_a_container_smaller_than_itself(tmp_path: Path):
    found = run_benchmark(
        "containers.py", "mapped", "--size", "gpt2", "--limit", "256MiB", tmp_path / "found.json"
    )
    assert found["peak"] <= 256 * MIB < found["file_bytes"]


# ---- the command -------------------------------------------------------------------------------------------


def test_forecast_leaves_out_what_cannot_read_the_file(pth: Path):
    assert list(forecast(pth)) == ONE_FILE
    assert list(forecast(save_per_tensor(pth, pth.parent / "folder"))) == list(STRATEGIES)


def test_plan_prints_what_fits_and_what_auto_takes(pth: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(pth)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in STRATEGIES}
    assert list(rows) == list(STRATEGIES)
    assert rows["per_tensor"].endswith("not this file")
    assert all(rows[name].endswith("yes") for name in ONE_FILE)
    assert any(line.split() == ["auto", "stream"] for line in lines)
    assert all(len(line) <= 100 for line in lines[2:])


def test_plan_for_a_card_that_is_not_here(pth: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(pth), "--device", "cuda:7", "--max-device-memory", "1KiB"]) == 1
    text = capsys.readouterr().out
    assert "nothing fits" in text
    assert 'would fit  device="cpu", strategy="stream"' in text
    assert main(["plan", str(pth), "--device", "cuda:7", "--max-device-memory", "1GiB"]) == 0


def test_plan_as_json_is_the_forecast(pth: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(pth), "--json", "--dtype", "bfloat16", "--max-host-memory", "64MiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = forecast(pth, dtype=torch.bfloat16)
    assert found["budget"]["host"]["nbytes"] == 64 * MIB
    kept = {row["strategy"]: row["forecast"] for row in found["strategies"] if row["forecast"]}
    assert kept == {name: asdict(each) for name, each in expected.items()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-host-memory", "much"], "'much' is not a memory size"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--device", "meta"], "holds no weights"),
    ],
)
def test_plan_says_what_is_wrong_with_its_arguments(
    arguments: list[str], said: str, pth: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", str(pth), *arguments]) == 1
    assert said in capsys.readouterr().err


# ---- what a review found -----------------------------------------------------------------------------------


def test_the_largest_ring_that_fits_is_taken():
    plan = plan_of_xl("cuda")
    assert (
        choose(plan, "stream", Budget(Limit(20 * MIB, ""), Limit(None, "")))[1].tuning.ring_bytes == 16 * MIB
    )


def test_swap_does_not_lift_a_cap(pth: Path, monkeypatch: pytest.MonkeyPatch):
    swap = SimpleNamespace(free=8 << 30)
    monkeypatch.setattr("gpt2lite.memory.psutil.swap_memory", lambda: swap)
    with pytest.raises(InsufficientMemoryError, match="stream would take"):
        GPTModel.from_checkpoint(pth, strategy="stream", config=HEADS, max_host_memory="4KiB")


def test_both_caps_arrive(pth: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[object] = []
    real = choice.find_budget
    monkeypatch.setattr(choice, "find_budget", lambda *caps: seen.append(caps[1:]) or real(*caps))
    GPTModel.from_checkpoint(pth, config=HEADS, max_host_memory="1GiB", max_device_memory="2GiB")
    load_module(lambda: GPTModel(TINY), pth, max_host_memory="3GiB", max_device_memory="4GiB")
    assert seen == [("1GiB", "2GiB"), ("3GiB", "4GiB")]


def test_an_error_without_words_is_said_all_the_same(pth: Path, monkeypatch: pytest.MonkeyPatch):
    def exhausted(plan: object) -> nn.Module:
        raise MemoryError

    monkeypatch.setitem(STRATEGIES, "meta", STRATEGIES["meta"]._replace(load=exhausted))
    with pytest.raises(InsufficientMemoryError, match=r"\(MemoryError\)"):
        GPTModel.from_checkpoint(pth, strategy="meta", config=HEADS)


@needs_proc
@pytest.mark.parametrize(
    ("strategy", "slack"), [("baseline", 200), ("sequential", 200), ("meta", 200), ("stream", 60)]
)
def test_memory_that_runs_out_during_a_load_is_said_so_and_let_go(
    strategy: str, slack: int, checkpoint: Path
):
    """The address space ends below what the forecast, which knows nothing of such a limit, says."""
    script = """
import resource, sys
from pathlib import Path
from gpt2lite import GPTModel, InsufficientMemoryError
from gpt2lite.tracking import _status
options = {"strategy": sys.argv[3], "config": {"n_heads": 8}}
GPTModel.from_checkpoint(sys.argv[2], **options)
before = _status()
resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + (int(sys.argv[4]) << 20),) * 2)
try:
    GPTModel.from_checkpoint(sys.argv[1], **options)
except InsufficientMemoryError as error:
    print(_status()["RssAnon"] - before["RssAnon"])
"""
    small = checkpoint.with_name(f"small-{strategy}.pth")
    write_random_checkpoint(GPTConfig(100, 32, 64, 8, 2), small)
    command = [sys.executable, "-c", script, str(checkpoint), str(small), strategy, str(slack)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 24 * MIB


def test_a_file_larger_than_memory_and_swap_can_be_mapped(tmp_path: Path):
    rows = 2 * host_memory().total // 4096 + (psutil.swap_memory().total // 4096)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}})
    raw = header.encode() + b" " * (-len(header) % 8)
    path = tmp_path / "huge.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    try:
        os.truncate(path, 8 + len(raw) + rows * 4096)
    except OSError as error:
        pytest.skip(f"no sparse file of this size here: {error}")
    module = load_module(lambda: nn.Embedding(rows, 1024), path)
    assert float(module.weight[rows - 1].detach().sum()) == 0


class Wasteful(nn.Module):
    """A weight that its constructor draws with a function, and an odd buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24 << 20))
        self.register_buffer("positions", torch.arange(256), persistent=False)
        self.register_buffer("mask", torch.ones(1, 1, 1024).expand(1, 50_000, 1024), persistent=False)


def test_what_is_drawn_to_build_a_skeleton_is_let_go_and_shared_memory_counts_once(tmp_path: Path):
    torch.save({"weight": torch.zeros(24 << 20)}, tmp_path / "model.pth")
    reading = read_names(open_checkpoint(tmp_path / "model.pth"), ["weight"])
    found = forecasts(make_plan(reading, Wasteful, torch.device("cpu")))
    assert found["mmap"].peak_host_anonymous <= MIB
    module = load_module(Wasteful, tmp_path / "model.pth", strategy="mmap", max_host_memory="1MiB")
    assert module.positions.tolist() == list(range(256))
    assert module.mask.shape == (1, 50_000, 1024)
    assert not module.weight.is_meta


def test_views_of_one_storage_are_mapped_once(tmp_path: Path):
    q, k, v = torch.zeros(1024, 3 * 1024).split(1024, dim=1)
    torch.save({"q": q, "k": k, "v": v}, tmp_path / "model.pth")
    reading = read_names(open_checkpoint(tmp_path / "model.pth"), ["q", "k", "v"])
    build = lambda: nn.ParameterDict({name: torch.empty(1024, 1024) for name in "qkv"})  # noqa: E731
    plan = make_plan(reading, build, torch.device("cpu"), {"dtype": torch.bfloat16})
    assert forecasts(plan)["mmap"].peak_host_reclaimable <= 12 * MIB + 4096


def test_dropping_a_cast_is_offered(pth: Path):
    with pytest.raises(InsufficientMemoryError, match=r"would fit: dtype=None, strategy=\"mmap\""):
        GPTModel.from_checkpoint(pth, config=HEADS, dtype=torch.float64, max_host_memory="4KiB")


def test_advice_can_be_followed(pth: Path):
    capped = {"config": HEADS, "tuning": Tuning(keep_cached=False), "max_host_memory": "4KiB"}
    with pytest.raises(InsufficientMemoryError, match=r"would fit: strategy=\"mmap\", tuning=Tuning\(\)"):
        GPTModel.from_checkpoint(pth, strategy="stream", **capped)


def test_a_program_can_act_on_a_refusal_without_parsing_it(pth: Path):
    wide = {"config": HEADS, "dtype": torch.float64}
    with pytest.raises(InsufficientMemoryError) as caught:
        GPTModel.from_checkpoint(pth, **wide, max_host_memory="4KiB")
    error = caught.value
    assert error.available == {"host": 4096}
    assert error.needed.keys() == {"host"}
    assert 'dtype=None, strategy="mmap"' in error.fits
    granted = GPTModel.from_checkpoint(pth, **wide, max_host_memory=f"{error.needed['host']}B")
    assert granted.tok_emb.weight.dtype == torch.float64


@pytest.mark.usefixtures("nothing_loads")
def test_the_figures_of_a_refusal_are_those_of_the_strategy_that_is_nearest_to_fitting():
    plan = plan_of_xl("cuda")
    with pytest.raises(InsufficientMemoryError) as caught:
        choose(plan, "auto", Budget(Limit(32 << 30, ""), Limit(4 << 30, "")))
    least = min(forecasts(plan)[name].peak_device for name in ("stream", "mmap"))
    assert caught.value.needed["device"] <= least
    assert caught.value.available == {"device": 4 << 30}


def test_auto_takes_a_strategy_that_can_do_what_tuning_asks_for(pth: Path):
    budget = Budget(Limit(None, ""), Limit(None, ""))
    opened = open_model(pth, config=HEADS)
    for tuning, taken in ((Tuning(prefetch=True), "mmap"), (Tuning(keep_cached=False), "stream")):
        assert choose(opened.plan(tuning=tuning), "auto", budget)[0] == taken
    neither = opened.plan(tuning=Tuning(prefetch=True, keep_cached=False))
    with pytest.raises(
        UsageError, match=r"model.pth: prefetch=True goes with .*; keep_cached=False goes with"
    ):
        choose(neither, "auto", budget)


def test_freed_neighbours_on_a_device_become_one_block():
    pool = CachingPool()
    blocks = [pool.take(4 * MIB) for _ in range(5)]  # a segment of 20 MiB, all of it
    for at in (1, 3, 2):
        pool.give(blocks[at])
    assert pool.take(12 * MIB) == blocks[1]
    assert (pool.used, pool.peak) == (20 * MIB, 20 * MIB)
    pool.give(blocks[0])
    assert pool.take(5 * MIB) not in blocks  # what is free lies in two places


# ---- a name alone ------------------------------------------------------------------------------------------


def official_file(name: str, path: Path) -> Path:
    """The Hub's file of an official size, by transformers' own names and shapes, without its bytes."""
    transformers = pytest.importorskip("transformers")
    n_layers, emb_dim, n_heads = OFFICIAL_SIZES[name]
    with torch.device("meta"):
        model = transformers.GPT2Model(
            transformers.GPT2Config(n_layer=n_layers, n_embd=emb_dim, n_head=n_heads)
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shapes |= {f"h.{i}.attn.bias": (1, 1, 1024, 1024) for i in range(n_layers)}
    header, offset = {}, 0
    for key, shape in sorted(shapes.items()):
        end = offset + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with path.open("ab") as file:  # the first block's mask, which is looked at while opening
        file.write(bytes(header["h.0.attn.bias"]["data_offsets"][0]))
        file.write(memory_of(torch.ones(1024, 1024).tril()))
    os.truncate(path, 8 + len(encoded) + offset)
    return path


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"quantize": "int8"}], ids=str)
def test_a_size_by_its_name_costs_what_its_file_costs(
    name: str, device: str, options: Any, tmp_path: Path, offline: None
):
    of_the_file = forecast(official_file(name, tmp_path / "model.safetensors"), device, **options)
    assert forecast(name, device, **options) == of_the_file


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and nothing in the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: (_ for _ in ()).throw(OSError("network used")))


def test_the_command_plans_by_a_name_and_says_what_it_assumed(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    said = "gpt2: no file was looked at; float32 and a tied head, as on the Hub"
    for words in (["gpt2"], ["124M"], ["--size", "gpt2"], ["gpt2", "--train", "--batch-size", "1"]):
        assert main(["plan", *words]) == 0
        assert said in capsys.readouterr().out
    Path("config.json").write_text(json.dumps({"n_layer": 3}))  # of whatever lies here, not of gpt2
    assert main(["plan", "gpt2", "--json"]) == 0
    capsys.readouterr()
    torch.save(GPTModel(TINY).state_dict(), "gpt2")
    Path("config.json").unlink()
    assert main(["plan", "gpt2", "--n-heads", "4"]) == 0  # a path comes before a name
    out = capsys.readouterr().out
    assert "no file was looked at" not in out
    assert "KiB of parameters" in out


def test_training_by_a_name_is_what_its_config_trains(offline: None, capsys: pytest.CaptureFixture[str]):
    words = ["plan", "--size", "gpt2", "--train", "--batch-size", "1", "--seq-len", "64", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["forecast"]
    recipe = Recipe(batch_size=1, seq_len=64)
    assert found == asdict(forecast_training(lambda: GPTModel(GPTConfig.named("gpt2")), recipe))
