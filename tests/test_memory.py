from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import gpt2lite
from gpt2lite import Forecast, GPTConfig, GPTModel, MemoryUse, UsageError, clean_up, track_memory
from gpt2lite.memory import cgroup_grants, find_budget, host_memory, human, parse_size, process_grants
from gpt2lite.opening import collector_paused

MIB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")


def in_fresh_process(body: str) -> dict[str, int]:
    """Run `body`, which prints one JSON object, in a process that has imported nothing yet."""
    script = f"import json, torch, time\nfrom gpt2lite import *\n{body}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found: dict[str, int] = json.loads(result.stdout)
    return found


REPORT = """
print(json.dumps({"anonymous": memory.peak_host_anonymous, "file": memory.peak_host_reclaimable,
                  "total": memory.peak_host_total, "points": len(memory.timeline)}))
"""


@needs_proc
def test_what_an_earlier_load_left_with_glibc_hides_no_later_one():
    body = """
peaks, above = [], []
for _ in range(4):  # glibc raises its threshold with the first: what comes later lies in its heap
    with track_memory() as memory:
        kept = [torch.ones(1 << 20) for _ in range(40)]
        above.append(torch.ones(1 << 18))  # so that the heap does not shrink by itself
        del kept
    peaks.append(memory.peak_host_anonymous)
print(json.dumps({"least": min(peaks)}))
"""
    assert in_fresh_process(body)["least"] >= 150 * MIB


@needs_proc
def test_a_peak_that_is_gone_again_is_seen():
    body = """
with track_memory() as memory:
    peak = torch.ones(100 << 18)
    del peak
    time.sleep(0.05)
    rest = torch.ones(10 << 18)
"""
    found = in_fresh_process(body + REPORT)
    assert 99 * MIB <= found["anonymous"] <= 112 * MIB
    assert found["file"] <= 16 * MIB


@needs_proc
def test_mapped_pages_count_as_reclaimable_and_not_as_anonymous(tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save(torch.ones(80 << 18), path)
    body = f"""
torch.load({str(path)!r}, mmap=True).sum()
with track_memory() as memory:
    mapped = torch.load({str(path)!r}, mmap=True)
    mapped.sum()
    time.sleep(0.05)
"""
    found = in_fresh_process(body + REPORT)
    assert 76 * MIB <= found["file"] <= 92 * MIB
    assert found["anonymous"] <= 8 * MIB


@needs_proc
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_kernels_own_peak_bears_the_samples_out():
    body = """
with track_memory() as memory:
    held = torch.ones(64 << 18)
"""
    found = in_fresh_process(body + REPORT)
    assert abs(found["total"] - found["anonymous"] - found["file"]) <= 12 * MIB


@needs_proc
def test_what_was_there_before_is_not_counted():
    body = """
before = torch.ones(100 << 18)
with track_memory() as memory:
    held = torch.ones(20 << 18)
"""
    found = in_fresh_process(body + REPORT)
    assert 19 * MIB <= found["anonymous"] <= 32 * MIB


def test_the_report_speaks_in_the_articles_gb():
    with track_memory("cpu") as memory:
        pass
    assert memory.report().startswith("Maximum CPU memory allocated: 0.00 GB (+ 0.0")
    assert memory.method


def test_an_error_inside_passes_through_and_leaves_no_helper():
    with pytest.raises(RuntimeError, match="inside"), track_memory():
        raise RuntimeError("inside")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if children.exists():
        assert children.read_text().split() == []


def test_clean_up_without_a_device_has_nothing_left():
    assert clean_up("cpu") == 0


def test_host_memory_is_within_the_machine():
    found = host_memory()
    assert 0 < found.available <= found.total
    assert found.limited_by


def test_a_device_that_is_not_there_is_a_usage_error():
    for call in (lambda: clean_up("cuda:99"), lambda: track_memory("cuda:99").__enter__()):
        with pytest.raises(UsageError, match="cuda:99 was asked for"):
            call()


@needs_proc
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_an_inner_block_does_not_hide_the_peak_of_the_outer():
    body = """
with track_memory() as memory:
    peak = torch.ones(80 << 18)
    del peak
    with track_memory() as inner:
        pass
"""
    found = in_fresh_process(body + REPORT)
    assert 79 * MIB <= found["total"] <= 96 * MIB


@needs_proc
def test_ctrl_c_inside_a_block_leaves_the_measuring_alone():
    body = """
import os, signal
with track_memory() as memory:
    held = torch.ones(20 << 18)
    try:
        os.killpg(os.getpgrp(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        pass
"""
    script = f"import json, torch, time\nfrom gpt2lite import *\n{body}{REPORT}"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["anonymous"] >= 19 * MIB


def make_cgroup() -> Path:
    """A memory cgroup (v1) below this process's own."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    path = next((path for _, controllers, path in own if controllers == "memory"), None)
    if path is None:
        pytest.skip("no cgroup v1 memory controller here")
    folder = Path("/sys/fs/cgroup/memory") / path.lstrip("/") / f"gpt2lite-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    return folder


@needs_proc
def test_a_containers_limit_is_what_is_available():
    folder = make_cgroup()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(600 * MIB))
        script = f"""
import os
from gpt2lite.memory import host_memory  # torch for CUDA takes more than the limit
open({str(folder / "cgroup.procs")!r}, "w").write(str(os.getpid()))
found = host_memory()
print(found.available, found.limited_by)
"""
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        available, limited_by = result.stdout.split(maxsplit=1)
        assert 100 * MIB < int(available) < 600 * MIB
        assert folder.name in limited_by
    finally:
        folder.rmdir()


@needs_proc
def test_the_tightest_of_nested_limits_counts():
    outer = make_cgroup()
    inner = outer / "inner"
    inner.mkdir()
    try:
        (outer / "memory.limit_in_bytes").write_text(str(300 * MIB))
        (inner / "memory.limit_in_bytes").write_text(str(200 * MIB))
        (outer / "memory.limit_in_bytes").write_text(str(250 * MIB))
        script = f"""
import os
from gpt2lite.memory import cgroup_grants  # torch for CUDA takes more than the limit
open({str(inner / "cgroup.procs")!r}, "w").write(str(os.getpid()))
for available, name in cgroup_grants():
    print(available, name)
"""
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        grants = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
        assert [name.rpartition("/")[2] for _, name in grants[:2]] == ["inner", outer.name]
        assert int(grants[0][0]) < 200 * MIB
        assert int(grants[1][0]) < 250 * MIB
    finally:
        inner.rmdir()
        outer.rmdir()


def test_version_2_limits_count_at_every_level_and_cache_is_free(tmp_path: Path):
    """As a system with cgroup v2 writes its files; this one may have none with a memory controller."""
    proc, mount = tmp_path / "proc", tmp_path / "mount"
    levels = {"": ("max", "max", 900), "app": ("1000", "max", 700), "app/part": ("max", "800", 600)}
    for folder, (limit, high, usage) in levels.items():
        at = mount / folder
        at.mkdir(parents=True, exist_ok=True)
        for name, text in (("memory.max", limit), ("memory.high", high), ("memory.current", str(usage))):
            (at / name).write_text(f"{text}\n")
        (at / "memory.stat").write_text("anon 400\ninactive_file 60\nactive_file 40\nshmem 5\n")
    proc.mkdir()
    (proc / "cgroup").write_text("0::/app/part\n")
    (proc / "mountinfo").write_text(f"30 23 0:26 / {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n")
    assert cgroup_grants(proc) == [
        (800 - 600 + 100, f"cgroup {mount / 'app/part'}"),
        (1000 - 700 + 100, f"cgroup {mount / 'app'}"),
    ]


@pytest.mark.parametrize(
    ("cgroup", "root", "folder"),
    [
        ("/docker/abc", "/docker/abc", ""),
        ("/docker/abc/part", "/docker/abc", "part"),
        ("/elsewhere", "/docker/abc", ""),
    ],
)
def test_a_mounts_own_root_is_taken_off(cgroup: str, root: str, folder: str, tmp_path: Path):
    at = tmp_path / "mount" / folder
    at.mkdir(parents=True)
    (at / "memory.max").write_text("1000")  # without the other files: no memory.high, no memory.stat
    (at / "memory.current").write_text("300")
    (tmp_path / "cgroup").write_text(f"0::{cgroup}\n")
    mount = f"30 23 0:26 {root} {tmp_path / 'mount'} rw shared:4 - cgroup2 cgroup2 rw\nan odd line\n"
    (tmp_path / "mountinfo").write_text(mount)
    assert cgroup_grants(tmp_path) == [(700, f"cgroup {at}")]


def limits(address_space: str, data: str) -> str:
    return f"""Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max data size             {data:20} unlimited            bytes
Max address space         {address_space:20} unlimited            bytes
"""


@pytest.mark.parametrize(
    ("soft", "grants"),
    [
        (("unlimited", "unlimited"), []),
        ((str(500 * MIB), "unlimited"), [(300 * MIB, "ulimit -v")]),
        ((str(100 * MIB), str(90 * MIB)), [(0, "ulimit -v"), (40 * MIB, "ulimit -d")]),
    ],
)
def test_what_a_process_may_still_map_is_its_limit_less_what_it_has(
    soft: tuple[str, str], grants: list[tuple[int, str]], tmp_path: Path
):
    (tmp_path / "limits").write_text(limits(*soft))
    (tmp_path / "status").write_text(f"Name:\tpython\nVmSize:\t{200 << 10} kB\nVmData:\t{50 << 10} kB\n")
    assert process_grants(tmp_path) == grants


LIMITED = """
import re, resource, sys, torch
from gpt2lite import GPTConfig, GPTModel, Tuning
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.reading import map_tensors
from gpt2lite.memory import find_budget, host_memory

def limit(kind, key, more):
    used = int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) << 10
    resource.setrlimit(kind, (used + (more << 20), resource.RLIM_INFINITY))
    return used
"""


def under_a_limit(body: str, path: Path) -> str:
    script = f"{LIMITED}\npath = {str(path)!r}\n{body}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.fixture(scope="module")
def forty_mib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPTConfig(20000, 512, 512, 8, 1, tied_head=True)
    path = tmp_path_factory.mktemp("limited") / "model.safetensors"
    return GPTModel(config).save_checkpoint(path)


@needs_proc
@pytest.mark.parametrize(("kind", "key", "said"), [("AS", "VmSize", "-v"), ("DATA", "VmData", "-d")])
def test_a_limit_of_the_process_counts_in_budgets_and_forecasts(
    kind: str, key: str, said: str, forty_mib: Path
):
    body = f"""
limit(resource.RLIMIT_{kind}, {key!r}, 60)
memory = host_memory()
print(memory.limited_by, memory.swap, 50 << 20 < memory.available <= 60 << 20)
for strategy in ("auto", "mmap", "stream"):
    try:
        GPTModel.from_checkpoint(path, strategy=strategy)
    except MemoryError as error:
        print(strategy, error)
limit(resource.RLIMIT_{kind}, {key!r}, 200)
print(GPTModel.from_checkpoint(path, tuning=Tuning(readers=1)).config.n_heads)
"""
    found = under_a_limit(body, forty_mib).splitlines()
    assert found[0] == f"ulimit {said} 0 True"
    for strategy in ("auto", "mmap", "stream"):
        first = next(line for line in found if line.startswith(strategy))
        assert first.endswith("nothing was allocated")
    assert any(re.fullmatch(r"  stream would take 5\d\.\d MiB of host memory", line) for line in found)
    assert any(re.fullmatch(r"  mmap would take 5\d\.\d MiB of virtual memory", line) for line in found)
    assert any(f"(ulimit {said}) less 24.0 MiB" in line for line in found)
    assert found[-1] == "8"


@needs_proc
def test_a_file_larger_than_the_address_space_is_not_mapped_though_its_weights_would_fit(
    forty_mib: Path, tmp_path: Path
):
    """A mapping is of the whole file, an optimizer's state too."""
    state = {"model": dict(torch.load(pth_of(forty_mib, tmp_path), weights_only=True))}
    torch.save(state | {"optimizer": torch.zeros(50 << 20)}, tmp_path / "both.pth")
    body = """
limit(resource.RLIMIT_AS, "VmSize", 120)
print(find_budget(torch.device("cpu")).virtual.nbytes >> 20)
try:
    GPTModel.from_checkpoint(path, strategy="mmap", config={"n_heads": 8})
except MemoryError as error:
    print(error)
print(type(GPTModel.from_checkpoint(path, config={"n_heads": 8}, tuning=Tuning(readers=1))).__name__)
"""
    found = under_a_limit(body, tmp_path / "both.pth")
    assert re.search(r"mmap would take 25\d\.\d MiB of virtual memory", found)
    assert found.endswith("GPTModel\n")


def pth_of(path: Path, folder: Path) -> Path:
    return GPTModel.from_checkpoint(path).save_checkpoint(folder / "model.pth")


@needs_proc
def test_a_mapping_that_fails_names_file_size_and_limit(forty_mib: Path):
    body = """
spans = open_checkpoint(path).tensors.values()
limit(resource.RLIMIT_AS, "VmSize", 10)
try:
    map_tensors(spans)
except MemoryError as error:
    print(type(error).__name__, error)
"""
    found = under_a_limit(body, forty_mib)
    assert found == (
        f"InsufficientMemoryError {forty_mib}: its {forty_mib.stat().st_size} bytes cannot be mapped (Cannot "
        'allocate memory); raise `ulimit -v`, or use strategy="stream"\n'
    )


def test_what_no_forecast_counts_is_left_alone():
    free = host_memory().available
    budget = find_budget(torch.device("cpu")).host.nbytes or 0
    assert budget <= free * 0.98 + (64 << 20)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("9" * 400, "is not a memory size; write 512MiB, 2.5GiB, 8GB or a number of bytes"),
        (10**5000, "so large a number is not a memory size"),
        (1 << 80, "so large a number is not a memory size"),
        ("much", "'much' is not a memory size"),
        ("8 iB", "'8 iB' is not a memory size"),
        ("-8G", "'-8G' is not a memory size"),
        (True, "True is not a memory size"),
        (1.5e9, "1500000000.0 is not a memory size"),
        (0, "0 is not a memory size"),
        ("0G", "'0G' is not a memory size"),
        ("0.0001KiB", "is not a memory size"),
        (8, "memory size 8 has no unit; write 8GiB, 8MiB or 8B"),
        ("512", "memory size 512 has no unit; write 512GiB"),
        (MIB - 1, "memory size 1048575 has no unit"),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str) or abs(value) < 1 << 80 else "huge",
)
def test_what_is_no_size_or_lacks_its_unit_is_refused(size: int | str, message: str):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_size(size)


def test_no_cgroups_at_all_grant_everything(tmp_path: Path):
    assert cgroup_grants(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (MIB, MIB),
        ("1048576", MIB),
        ("1 B", 1),
        ("512MiB", 512 << 20),
        ("2.5 GiB", 5 << 29),
        ("8gib", 8 << 30),
        ("8Gi", 8 << 30),
        ("8G", 8 << 30),
        ("512m", 512 << 20),
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("0.65 GB", 65 * 10**7),
        (" 1KB ", 1000),
        ("1t", 1 << 40),
    ],
)
def test_sizes(size: int | str, nbytes: int):
    assert parse_size(size) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (622 << 20, "622.0 MiB"), (3 << 30, "3.00 GiB")],
)
def test_sizes_for_people_come_back(nbytes: int, text: str):
    assert human(nbytes) == text
    assert not nbytes or parse_size(text) == nbytes


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_it_was_after_overlapping_pauses_in_two_threads(was_enabled: bool):
    found, first_left, second_in = [], threading.Event(), threading.Event()

    def second() -> None:
        with collector_paused():
            second_in.set()
            first_left.wait()
            found.append(gc.isenabled())

    before = gc.isenabled()
    (gc.enable if was_enabled else gc.disable)()
    try:
        with collector_paused():
            thread = threading.Thread(target=second)
            thread.start()
            second_in.wait()
        first_left.set()
        thread.join()
        assert (found, gc.isenabled()) == ([False], was_enabled)
    finally:
        (gc.enable if before else gc.disable)()


def test_without_proc_a_thread_samples_the_resident_set():
    body = """
from gpt2lite import tracking
tracking._status = dict  # as on a system without /proc
with track_memory() as memory:
    held = torch.ones(80 << 18)
    time.sleep(0.1)
    del held
assert memory.method.startswith("resident set"), memory.method
"""
    found = in_fresh_process(body + REPORT)
    assert 70 * MIB <= found["anonymous"] <= 100 * MIB
    assert found["total"] is None
    assert found["points"] >= 2


def test_a_cap_lowers_a_budget_and_never_raises_it():
    cpu = torch.device("cpu")
    free = find_budget(cpu)
    assert 0 < (free.host.nbytes or 0) < host_memory().total
    capped = find_budget(cpu, "1MiB", "2MiB")
    assert (capped.host.nbytes, capped.device.nbytes) == (MIB, 2 * MIB)
    above = find_budget(cpu, 1 << 59).host
    assert abs((above.nbytes or 0) - (free.host.nbytes or 0)) < 1 << 30
    assert not capped.host.admits(MIB + 1)
    assert free.device.admits(1 << 60)  # not known: a card that is not here


def test_figures_are_short_in_print_and_a_table_in_a_notebook():
    one = Forecast(0, 3 << 20, 0, 0, 2 << 20, 0)
    assert repr(one) == "Forecast(peak host anonymous 3.0 MiB, stays host 2.0 MiB)"
    assert "<td>stays host</td><td>2.0 MiB</td>" in one._repr_html_()
    assert repr(MemoryUse(torch.device("cpu"))) == "MemoryUse(nothing)"


def test_what_was_opened_says_which_file_and_what_is_known(pth: Path):
    shown = repr(gpt2lite.open_model(pth, config={"n_heads": 4}))
    assert shown.startswith(f"Opened({str(pth)!r}, ")
    assert "n_heads=4" in shown
