"""The stream engine under trouble, and the memory that it fills."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loading import HEADS, KINDS, assert_equal_bits, expected_parameters

from gpt2lite import STRATEGIES, GPTConfig, GPTModel, Tuning, UsageError, forecast, load_module
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.source import FileReader
from gpt2lite.dialects.reading import Drop, Narrow, Placement, Transpose, read_names
from gpt2lite.loading import schedule
from gpt2lite.loading import stream as stream_engine
from gpt2lite.loading.choice import forecasts
from gpt2lite.loading.plan import LoadPlan, make_plan
from gpt2lite.loading.schedule import Schedule
from gpt2lite.opening import collector_paused

MIB = 1 << 20
SMALL = Tuning(readers=4, chunk_bytes=4096, ring_bytes=1 << 15)
CASTS = [None, torch.bfloat16]  # read in place, and through the ring


@pytest.fixture(params=["ours-pth", "hf-hub-safetensors", "fast-folder"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    make, save = KINDS[request.param]
    state = make().state_dict()
    return save(state, tmp_path), expected_parameters(state)


def troubled(chance: random.Random) -> Any:
    """Reads that come late, now and then, and are as short as a system's may be."""
    real = FileReader.read_once

    def read_once(file: FileReader, memories: list[memoryview], offset: int) -> int:
        if chance.random() < 0.05:
            time.sleep(chance.random() / 200)
        some = memories[: chance.randint(1, len(memories))]
        return real(file, [*some[:-1], some[-1][: chance.randint(1, len(some[-1]))]], offset)

    return read_once


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("has_preadv", [True, False])
@pytest.mark.parametrize("dtype", CASTS)
def test_late_and_short_reads_change_no_bit(
    case: tuple[Path, dict[str, torch.Tensor]],
    dtype: torch.dtype | None,
    has_preadv: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    path, expected = case
    plain = GPTModel.from_checkpoint(path, config=HEADS, dtype=dtype)
    if not has_preadv:
        for name in ("preadv", "RWF_NOWAIT"):
            monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(FileReader, "read_once", troubled(random.Random(7)))
    loaded = GPTModel.from_checkpoint(path, strategy="stream", config=HEADS, dtype=dtype, tuning=SMALL)
    assert_equal_bits(loaded, expected, dtype)
    assert_equal_bits(loaded, plain.state_dict())


@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_one_read_fills_neighbours_and_leaves_what_lies_between_them(pth: Path):
    """The chunk is as large as the file, so only what is too far apart takes a read of its own."""
    tuning, calls = Tuning(readers=1), []
    real = FileReader.read_once

    def counting(file: FileReader, memories: list[memoryview], offset: int) -> int:
        calls.append(len(memories))
        return real(file, memories, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileReader, "read_once", counting)
        loaded = GPTModel.from_checkpoint(pth, strategy="stream", config=HEADS, tuning=tuning)
    assert_equal_bits(loaded, torch.load(pth, weights_only=True))
    assert len(calls) < sum(calls) / 4


@pytest.fixture
def interrupted() -> Iterator[list[int]]:
    """A signal every half a millisecond."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system has no interval timer")
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield seen
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("dtype", CASTS)
def test_signals_change_no_bit(
    case: tuple[Path, dict[str, torch.Tensor]], dtype: torch.dtype | None, interrupted: list[int]
):
    path, expected = case
    loaded = GPTModel.from_checkpoint(path, strategy="stream", config=HEADS, dtype=dtype, tuning=SMALL)
    assert_equal_bits(loaded, expected, dtype)
    assert interrupted


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("readers", [1, 8])
@pytest.mark.parametrize("dtype", CASTS)
def test_a_ring_of_one_slot_fills_every_bit(
    case: tuple[Path, dict[str, torch.Tensor]],
    dtype: torch.dtype | None,
    readers: int,
    monkeypatch: pytest.MonkeyPatch,
):
    path, expected = case
    monkeypatch.setattr(schedule, "FEWEST_SLOTS", 1)
    monkeypatch.setattr(schedule, "SLOTS_A_READER", 0)
    real, counts = stream_engine.Ring.__init__, []

    def counting(self: stream_engine.Ring, plan: schedule.Schedule, *args: Any) -> None:
        counts.append(plan.slots)
        real(self, plan, *args)

    monkeypatch.setattr(stream_engine.Ring, "__init__", counting)
    tuning = Tuning(readers=readers, chunk_bytes=4096, ring_bytes=4096)
    loaded = GPTModel.from_checkpoint(path, strategy="stream", config=HEADS, dtype=dtype, tuning=tuning)
    assert_equal_bits(loaded, expected, dtype)
    assert set(counts) <= {0, 1}
    assert 1 in counts or dtype is None


def readers_left() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("gpt2lite-reader")]


@pytest.mark.parametrize("count", [1, 3, 4, 64])
def test_shares_are_runs_in_order_of_about_as_many_bytes(count: int):
    chunks = [schedule.Chunk(Path(), i, nbytes, (), True) for i, nbytes in enumerate([7, 1, 9, 3] * 5)]
    found = schedule.shares(chunks, count)
    assert [chunk for share in found for chunk in share] == chunks
    assert len(found) <= count
    assert max(sum(chunk.nbytes for chunk in share) for share in found) <= 100 / count + 9


@pytest.mark.parametrize("where", ["a reader in place", "a reader", "a copy", "a progress"])
@pytest.mark.parametrize("ring_bytes", [1 << 15, 64])
def test_an_error_leaves_no_thread_and_no_open_file(
    where: str, ring_bytes: int, case: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
):
    path, _ = case

    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError(f"{where} broke")

    if where == "a copy":
        monkeypatch.setattr(stream_engine, "landings", failing)
    elif where != "a progress":
        monkeypatch.setattr(FileReader, "read_into", failing)
    folder = Path("/proc/self/fd")
    before = len(list(folder.iterdir())) if folder.exists() else 0
    with pytest.raises(ZeroDivisionError, match=f"{where} broke"):
        GPTModel.from_checkpoint(
            path,
            strategy="stream",
            config=HEADS,
            dtype=None if where == "a reader in place" else torch.bfloat16,
            tuning=Tuning(ring_bytes=ring_bytes),
            progress=failing if where == "a progress" else None,
        )
    assert readers_left() == []
    assert not folder.exists() or len(list(folder.iterdir())) == before


@pytest.mark.parametrize("dtype", CASTS)
def test_an_error_of_the_callers_progress_stops_the_readers(
    dtype: torch.dtype | None, case: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
):
    real, calls = FileReader.read_into, []
    whole = 0

    def slow(file: FileReader, memories: Any, offset: int) -> None:
        calls.append(offset)
        time.sleep(0.02 if whole else 0)
        real(file, memories, offset)

    monkeypatch.setattr(FileReader, "read_into", slow)

    def failing(done: int, total: int) -> None:
        raise ZeroDivisionError("enough")

    options = {"dtype": dtype, "tuning": SMALL, "config": HEADS}
    GPTModel.from_checkpoint(case[0], strategy="stream", **options)
    whole = len(calls)
    calls.clear()
    with pytest.raises(ZeroDivisionError, match="enough"):
        GPTModel.from_checkpoint(case[0], strategy="stream", **options, progress=failing)
    assert len(calls) < whole
    assert readers_left() == []


def test_an_error_that_is_kept_does_not_hold_the_model_once_it_is_gone(
    case: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
):
    """Without the garbage collector's help."""
    held = []

    def failing(file: FileReader, memories: Iterator[memoryview], *_: object) -> None:
        held.extend(weakref.ref(memory.obj) for memory in memories if not isinstance(memory.obj, bytearray))
        raise ZeroDivisionError("broke")

    monkeypatch.setattr(FileReader, "read_into", failing)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError, match="broke"):
            GPTModel.from_checkpoint(case[0], strategy="stream", config=HEADS)
        assert held
        assert [each for each in held if each() is not None] == []
    finally:
        gc.enable()


def test_overlapping_loads_leave_the_collector_as_it_was():
    first, second = collector_paused(), collector_paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


class Empty(torch.nn.Module):
    """Nothing, of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))
        self.register_buffer("values", torch.empty(0, 3))


def test_empty_tensors_of_two_dtypes_can_be_saved_again(tmp_path: Path):
    torch.save(Empty().state_dict(), tmp_path / "model.pth")
    loaded = load_module(Empty, tmp_path / "model.pth", strategy="stream")
    torch.save(loaded.state_dict(), tmp_path / "again.pth")
    assert torch.load(tmp_path / "again.pth", weights_only=True)["values"].shape == (0, 3)


def test_a_limit_of_the_address_space_is_one_clear_error(tmp_path: Path):
    resource = pytest.importorskip("resource", reason="this system has no resource limits")
    script = f"""
import resource, sys
from gpt2lite import GPTModel, InsufficientMemoryError
used = int(open("/proc/self/statm").read().split()[0]) * {resource.getpagesize()}
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
try:
    GPTModel.from_checkpoint(sys.argv[1], strategy="stream", config={{"n_heads": 8}})
except InsufficientMemoryError as error:
    print(error)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc on this system")
    path = tmp_path / "model.pth"
    write_random_checkpoint(GPTConfig(8000, 512, 512, 8, 8), path)
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert "ulimit -v" in result.stdout, result.stderr


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("granted", [0, 1])
@pytest.mark.parametrize("dtype", CASTS)
def test_fewer_threads_than_wanted_fill_every_bit(
    case: tuple[Path, dict[str, torch.Tensor]],
    dtype: torch.dtype | None,
    granted: int,
    monkeypatch: pytest.MonkeyPatch,
):
    real, started = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("gpt2lite-reader"):
            if len(started) == granted:
                raise RuntimeError("can't start new thread")
            started.append(thread.name)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    path, expected = case
    loaded = GPTModel.from_checkpoint(path, strategy="stream", config=HEADS, dtype=dtype, tuning=SMALL)
    assert_equal_bits(loaded, expected, dtype)
    assert len(started) == granted


# ---- only what is wanted -----------------------------------------------------------------------------------

ROWS, COLUMNS = 300, 2500  # 3 MB
STORED = torch.arange(ROWS * COLUMNS, dtype=torch.float32)
TENTH = Narrow(0, 10, 40)
VIEWS: dict[str, tuple[torch.Tensor, tuple[Any, ...], torch.Tensor]] = {
    "rows": (STORED.view(ROWS, COLUMNS), (TENTH,), STORED.view(ROWS, COLUMNS)[10:40]),
    "rows of rows": (
        STORED.view(ROWS, COLUMNS),
        (Narrow(0, 100, 200), Narrow(0, 0, 3, 10)),
        STORED.view(ROWS, COLUMNS)[100:130],
    ),
    "rows of the second third": (
        STORED.view(3 * 100, COLUMNS),
        (Narrow(0, 1, 2, 3), Narrow(0, 70, 100)),
        STORED.view(3 * 100, COLUMNS)[170:200],
    ),
    "columns that are rows on disk": (
        STORED.view(ROWS, COLUMNS),
        (Transpose(), Narrow(1, 5, 35)),
        STORED.view(ROWS, COLUMNS).t()[:, 5:35],
    ),
    "of a tensor that was saved transposed": (
        STORED.view(ROWS, COLUMNS).t(),
        (Transpose(), TENTH),
        STORED.view(ROWS, COLUMNS)[10:40],
    ),
    "without its first axis": (
        STORED.view(1, ROWS, COLUMNS),
        (Drop(0), TENTH),
        STORED.view(ROWS, COLUMNS)[10:40],
    ),
}


def plan_of_a_part(stored: torch.Tensor, views: tuple[Any, ...], folder: Path, **options: Any) -> LoadPlan:
    """A module whose one parameter is a view of what lies in a file."""
    torch.save({"weight": stored}, folder / "model.pth")
    placed = Placement("weight", views)
    shape = placed.shape_of(tuple(stored.shape))
    reading = read_names(open_checkpoint(folder / "model.pth"), ["weight"])
    return make_plan(
        replace(reading, placements={"weight": placed}),
        lambda: torch.nn.ParameterDict({"weight": torch.empty(shape)}),
        torch.device("cpu"),
        options,
    )


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "per_tensor"])
@pytest.mark.parametrize("dtype", CASTS)
def test_views_compose_for_every_strategy(
    views: str, strategy: str, dtype: torch.dtype | None, tmp_path: Path
):
    stored, taken, expected = VIEWS[views]
    plan = plan_of_a_part(stored, taken, tmp_path, dtype=dtype, tuning=Tuning(ring_bytes=1 << 15))
    loaded = STRATEGIES[strategy].load(plan).weight
    assert torch.equal(loaded, expected.to(dtype or torch.float32))
    span = plan.targets[0].span
    assert torch.equal(Placement("weight", taken).read(span), expected)


def rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="needs /proc/self/io to count bytes read")
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("dtype", CASTS)
def test_a_tenth_of_the_rows_reads_a_tenth_of_the_bytes(
    views: str, dtype: torch.dtype | None, tmp_path: Path
):
    stored, taken, _ = VIEWS[views]
    plan = plan_of_a_part(stored, taken, tmp_path, dtype=dtype)
    for read in (
        lambda: STRATEGIES["stream"].load(plan),
        lambda: plan.targets[0].placement.read(plan.targets[0].span),
    ):
        before = rchar()
        read()
        assert stored.nbytes / 10 <= rchar() - before <= stored.nbytes / 10 + 4096


def test_forecast_and_run_follow_one_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of_a_part(*VIEWS["rows"][:2], tmp_path, dtype=torch.bfloat16)
    foretold = forecasts(plan)["stream"]
    planned, real, followed = plan.schedule, stream_engine.Ring.__init__, []

    def noting(self: stream_engine.Ring, schedule: Schedule, *args: Any) -> None:
        followed.append(schedule)
        real(self, schedule, *args)

    monkeypatch.setattr(stream_engine.Ring, "__init__", noting)
    STRATEGIES["stream"].load(plan)
    assert [each is planned for each in followed] == [True]
    ring = planned.slots * planned.slot_bytes
    assert foretold.peak_host_anonymous == plan.model_bytes + ring


def test_int8_of_tensorflows_weights_is_the_weights_to_half_a_step():
    bundle = Path(__file__).parent / "data" / "openai_tf_tiny"
    whole, int8 = (GPTModel.from_checkpoint(bundle, quantize=quantize) for quantize in (None, "int8"))
    for block, quantized in zip(whole.trf_blocks, int8.trf_blocks, strict=True):
        weight, found = block.att.W_key.weight, quantized.att.W_key
        assert ((weight - found.weight * found.scale[:, None]).abs() <= found.scale[:, None] * 0.51).all()


# ---- the memory that is filled -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CASTS)
def test_query_key_and_value_are_neighbours_in_memory(
    case: tuple[Path, dict[str, torch.Tensor]], dtype: torch.dtype | None
):
    loaded = GPTModel.from_checkpoint(case[0], strategy="stream", config=HEADS, dtype=dtype)
    for block in loaded.trf_blocks:
        query, key, value = block.att.W_query.weight, block.att.W_key.weight, block.att.W_value.weight
        nbytes = query.numel() * query.element_size()
        assert key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == nbytes


def test_parameters_are_aligned_and_do_not_overlap(case: tuple[Path, dict[str, torch.Tensor]]):
    loaded = GPTModel.from_checkpoint(case[0], strategy="stream", config=HEADS)
    found = sorted((p.data_ptr(), p.numel() * p.element_size()) for p in loaded.parameters())
    assert all(begin % 64 == 0 for begin, _ in found)
    assert all(begin + size <= following for (begin, size), (following, _) in itertools.pairwise(found))


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_prefetching_changes_no_bit(kind: str, dtype: torch.dtype | None, tmp_path: Path):
    make, save = KINDS[kind]
    state = make().state_dict()
    tuning = Tuning(prefetch=True, chunk_bytes=4096)
    loaded = GPTModel.from_checkpoint(
        save(state, tmp_path), strategy="mmap", config=HEADS, dtype=dtype, tuning=tuning
    )
    assert_equal_bits(loaded, expected_parameters(state), dtype)


# ---- arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"readers": 0}, "readers must be a whole number in 1 … 64, got 0"),
        ({"readers": 1.5}, "readers must be a whole number"),
        ({"readers": True}, "readers must be a whole number"),
        ({"chunk_bytes": 64}, "chunk_bytes must be a whole number in 4096"),
        ({"ring_bytes": "64MiB"}, "ring_bytes must be a whole number"),
        ({"prefetch": "no"}, "prefetch must be True or False, got 'no'"),
        ({"keep_cached": 0}, "keep_cached must be True or False, got 0"),
    ],
)
def test_numbers_that_cannot_work_are_refused(arguments: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        Tuning(**arguments)


def test_what_is_no_tuning_is_refused(case: tuple[Path, dict[str, torch.Tensor]]):
    with pytest.raises(UsageError, match=r"tuning must be a gpt2lite.Tuning, got dict"):
        GPTModel.from_checkpoint(case[0], config=HEADS, tuning={"readers": 2})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"tuning must be a gpt2lite.Tuning, got dict"):
        forecast(case[0], config=HEADS, tuning={"readers": 2})  # type: ignore[arg-type]


def test_prefetch_goes_with_mmap_alone(case: tuple[Path, dict[str, torch.Tensor]]):
    with pytest.raises(UsageError, match='prefetch=True goes with strategy="mmap" or "auto"'):
        GPTModel.from_checkpoint(case[0], strategy="stream", config=HEADS, tuning=Tuning(prefetch=True))
