"""What is left of loads: open, mapped, running or lying in a folder, after many of them and after Ctrl-C.

    python lasting.py FOLDER --loads 60 --presses 10

Prints a line of JSON: how many of each were tried, and what was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from gpt2lite import GPTConfig, GPTModel, convert, open_model, save_per_tensor
from gpt2lite.checkpoint import source
from gpt2lite.errors import GPT2LiteError
from gpt2lite.loading.strategies import STRATEGIES

CONFIG = GPTConfig(vocab_size=211, context_length=32, emb_dim=128, n_heads=4, n_layers=4)  # 3 MB
SECONDS = 120  # after which a process counts as one that hangs
SLACK = 32 << 20  # bytes that an allocator may keep
Wanted = dict[torch.dtype | None, dict[str, bytes]]


def make() -> GPTModel:
    """The model of every file."""
    generator, model = torch.Generator().manual_seed(0), GPTModel(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def write(folder: Path) -> dict[str, Path]:
    """The same model in several kinds of files."""
    path = make().save_checkpoint(folder / "model.pth")
    save_per_tensor(path, folder / "parts")
    named = {"pth": path, "parts": folder / "parts"}
    named["safetensors"] = convert(path, folder / "model.safetensors")
    named["shards"] = convert(path, folder / "hub", to="huggingface", max_shard_size="1MiB")
    return named


def held(folder: Path) -> dict[str, Any]:
    """What this process has of files in a folder, threads, descriptors, temporary files."""
    gc.collect()
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # that of the listing itself
            continue
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": sorted(descriptors),
        "maps": maps,
        "known mappings": len(source._mappings),
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
        "files": sorted(str(path) for path in folder.rglob("*")),
        "collector": gc.isenabled(),
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is there that was not."""
    return [f"{key}: {before[key]} → {after[key]}" for key in before if before[key] != after[key]]


def load(path: Path, strategy: str, dtype: torch.dtype | None = None) -> GPTModel:
    """A load, in any strategy."""
    return open_model(path, config=CONFIG).load(strategy=strategy, dtype=dtype)


def contents(model: GPTModel) -> dict[str, bytes]:
    """The bytes of all that a model has, without torch's threads, which a forked process lacks."""
    return {
        name: tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def all_contents() -> Wanted:
    """What the files hold, by dtype."""
    return {None: contents(make()), torch.bfloat16: contents(make().to(torch.bfloat16))}


def is_right(model: GPTModel, wanted: Wanted, dtype: torch.dtype | None = None) -> bool:
    """Whether a model has the values of the file."""
    return contents(model) == wanted[dtype]


def ways(files: dict[str, Path]) -> list[tuple[str, Path, torch.dtype | None]]:
    """Every strategy with every file that it reads, as it is and cast."""
    return [
        (strategy, path, dtype)
        for strategy in STRATEGIES
        for kind, path in files.items()
        for dtype in ((None, torch.bfloat16) if strategy in ("stream", "mmap") else (None,))
        if (kind == "parts") == (strategy == "per_tensor")
    ]


def lasting(work: Callable[[int], object], count: int, folder: Path, warm: int) -> dict[str, Any]:
    """What is left after doing something often that was not left after doing it a few times."""
    for number in range(warm):
        work(number)
    before, memory = held(folder), psutil.Process().memory_info().rss
    for number in range(count):
        work(number)
    grown = psutil.Process().memory_info().rss - memory
    faults = compare(before, held(folder))
    faults += [f"grew by {grown} bytes"] if grown > SLACK else []
    return {"tried": count, "grown": grown, "faults": faults}


def loads(files: dict[str, Path], folder: Path, count: int) -> dict[str, Any]:
    """Loads of every strategy by turns."""
    cases, wanted = ways(files), all_contents()

    def one(number: int) -> None:
        strategy, path, dtype = cases[number % len(cases)]
        if not is_right(load(path, strategy, dtype), wanted, dtype):
            raise AssertionError(f"{strategy} of {path} as {dtype} is wrong")

    return lasting(one, count, folder, len(cases))


def generations(files: dict[str, Path], folder: Path, count: int) -> dict[str, Any]:
    """Texts by a mapped model, with each engine that there is."""
    model = load(files["pth"], "mmap")
    ids = torch.arange(5)[None]
    return lasting(lambda number: model.generate(ids, 8, seed=number, temperature=1.0), count, folder, 4)


def failures(files: dict[str, Path], folder: Path, count: int) -> dict[str, Any]:
    """Loads that fail: of a cut file, with another config, in the middle, and for want of memory."""
    cut, whole = folder / "cut.pth", files["pth"].read_bytes()
    cut.write_bytes(whole)

    def in_the_middle(done: int, total: int) -> None:
        raise ValueError("in the middle")

    def truncated(done: int, total: int) -> None:
        os.truncate(cut, 100)

    def one(number: int) -> None:
        strategy = [*STRATEGIES][number % len(STRATEGIES)]
        path = files["parts"] if strategy == "per_tensor" else files["pth"]
        attempts: list[Callable[[], object]] = [
            lambda: open_model(path, config=CONFIG).load(strategy=strategy, progress=in_the_middle),
            lambda: open_model(path, config=CONFIG).load(strategy=strategy, max_host_memory=1),
            lambda: open_model(path, config={"emb_dim": 64}).load(),
            lambda: open_model(cut, config=CONFIG).load(strategy="stream", progress=truncated),
            lambda: open_model(cut, config=CONFIG).load(
                strategy="mmap", dtype=torch.half, progress=truncated
            ),
        ]
        cut.write_bytes(whole)
        try:
            attempts[number % len(attempts)]()
        except (GPT2LiteError, ValueError):
            return
        raise AssertionError(f"attempt {number} did not fail")

    return lasting(one, count, folder, 30)


def in_threads(files: dict[str, Path], folder: Path, count: int) -> dict[str, Any]:
    """Eight threads that load at once."""
    cases, wanted, before = ways(files), all_contents(), held(folder)

    def one(number: int) -> list[str]:
        strategy, path, dtype = cases[number % len(cases)]
        is_good = is_right(load(path, strategy, dtype), wanted, dtype)
        return [] if is_good else [f"{strategy} of {path.name} as {dtype} is wrong"]

    with ThreadPoolExecutor(8) as pool:
        faults = [fault for found in pool.map(one, range(count)) for fault in found]
    return {"tried": count, "faults": faults + compare(before, held(folder))}


# ---- other processes ---------------------------------------------------------------------------------------


def child(work: Callable[[int], Iterable[str]]) -> tuple[int, int]:
    """A process that reports faults through a pipe, and says so when it begins; its number, and the pipe."""
    read, write = os.pipe()
    if number := os.fork():
        os.close(write)
        return number, read
    os.close(read)
    try:
        said = json.dumps([*work(write)])
    except BaseException as error:
        said = json.dumps([f"{error!r}"])
    os.write(write, said.encode()[:60000])
    os._exit(0)


def result(number: int, pipe: int) -> list[str]:
    """What a process reported; that it hangs, where it does."""
    ends, content = time.monotonic() + SECONDS, b""
    os.set_blocking(pipe, False)
    while time.monotonic() < ends:
        try:
            part = os.read(pipe, 65536)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        content += part
        if not part:
            break
    else:
        os.kill(number, signal.SIGKILL)
        content = b'["hangs"]'
    os.close(pipe)
    os.waitpid(number, 0)
    return json.loads(content.removeprefix(b".") or b'["died"]')  # type: ignore[no-any-return]


def after_fork(files: dict[str, Path], count: int) -> dict[str, Any]:
    """Loads in the child of a process that has loaded, and of one that is loading in other threads."""
    wanted, stop, faults = all_contents(), threading.Event(), list[str]()

    def one(write: int) -> list[str]:
        cases = [case for case in ways(files) if case[0] in ("stream", "mmap") and case[1].is_file()]
        return [
            f"{strategy} of {path.name} is wrong after fork"
            for strategy, path, dtype in cases
            if not is_right(load(path, strategy, dtype), wanted, dtype)
        ]

    def busy() -> None:
        while not stop.is_set():
            load(files["pth"], "stream")

    for number in range(count):
        threads = [threading.Thread(target=busy) for _ in range(2 * (number % 2))]
        for thread in threads:
            thread.start()
        time.sleep(random.Random(number).uniform(0, 0.05))
        faults += result(*child(one))
        stop.set()
        for thread in threads:
            thread.join()
        stop.clear()
    return {"tried": count, "faults": faults}


def interrupted(files: dict[str, Path], folder: Path, count: int) -> dict[str, Any]:
    """Ctrl-C at random moments of a load; the process must be as before, and load again."""
    wanted, faults = all_contents(), list[str]()
    cases = ways(files)
    took = {}
    for strategy, path, dtype in cases[:count]:
        began = time.perf_counter()
        load(path, strategy, dtype)
        took[strategy, path, dtype] = time.perf_counter() - began

    def one(case: tuple[str, Path, torch.dtype | None]) -> Callable[[int], list[str]]:
        strategy, path, dtype = case

        def work(write: int) -> list[str]:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before = held(folder)
            try:
                os.write(write, b".")
                model = load(path, strategy, dtype)
                del model
                time.sleep(SECONDS)
            except KeyboardInterrupt:
                pass
            found = compare(before, held(folder))
            if not is_right(load(path, strategy, dtype), wanted, dtype):
                found.append("the next load is wrong")
            return [f"{strategy} of {path.name}: {fault}" for fault in found]

        return work

    for number in range(count):
        case = cases[number % len(cases)]
        process, pipe = child(one(case))
        os.read(pipe, 1)
        time.sleep(random.Random(number).uniform(0, took[case]))
        os.kill(process, signal.SIGINT)
        faults += result(process, pipe)
    return {"tried": count, "faults": faults}


def pressed_twice(files: dict[str, Path]) -> dict[str, Any]:
    """Two presses while a disk does not answer: the process ends, though a reader waits."""
    from gpt2lite.checkpoint.source import FileReader

    def work(write: int) -> list[str]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        FileReader.read_once = lambda *args: time.sleep(5 * SECONDS) or 0  # type: ignore[assignment,func-returns-value]
        os.write(write, b".")
        load(files["pth"], "stream")
        return []

    process, pipe = child(work)
    os.read(pipe, 1)
    for _ in range(2):
        time.sleep(1)
        os.kill(process, signal.SIGINT)
    found = result(process, pipe)
    return {"tried": 1, "faults": [] if found == ["KeyboardInterrupt()"] else [str(found)]}


def run(folder: Path, *, loads: int, generations: int, failures: int, presses: int) -> dict[str, Any]:
    """All of it, by name."""
    work = globals()
    warnings.simplefilter("ignore")
    (folder / "temporary").mkdir()
    tempfile.tempdir = str(folder / "temporary")
    files = write(folder)
    return {
        "loads": work["loads"](files, folder, loads),
        "generations": work["generations"](files, folder, generations),
        "failed loads": work["failures"](files, folder, failures),
        "eight threads": in_threads(files, folder, loads),
        "after fork": after_fork(files, max(presses // 5, 2)),
        "Ctrl-C": interrupted(files, folder, presses),
        "Ctrl-C twice": pressed_twice(files),
    }


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for what, count in {"loads": 24, "generations": 6, "failures": 10, "presses": 8}.items():
        parser.add_argument(f"--{what}", type=int, default=count)
    args = vars(parser.parse_args())
    print(json.dumps(run(args.pop("folder"), **args)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
