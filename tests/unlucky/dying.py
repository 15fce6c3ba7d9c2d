"""Writers that are killed, fill a disk, or write to one place at once, each in processes of its own.

    python dying.py FOLDER --kills 200 --fulls 200 --races 20

Prints a line of JSON: how many of each were tried and survived, and what was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import gpt2lite.converting
import gpt2lite.model
from gpt2lite import (
    Batch,
    DiskFullError,
    GPTConfig,
    GPTModel,
    UsageError,
    convert,
    open_model,
    save_per_tensor,
)
from gpt2lite.checkpoint import writing
from gpt2lite.finetuning import states
from gpt2lite.finetuning.loop import finetune
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import Task

CONFIG = GPTConfig(vocab_size=211, context_length=32, emb_dim=128, n_heads=4, n_layers=4)  # 3 MB
CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE, MS_REC = 0x20000, 0x10000000, 1 << 18, 1 << 14


def make(seed: int) -> GPTModel:
    """A model like no other's."""
    generator, model = torch.Generator().manual_seed(seed), GPTModel(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


made = cache(make)


def is_same(path: Path, seed: int) -> bool:
    """Whether a checkpoint is whole and holds this model."""
    wanted, found = made(seed).state_dict(), open_model(path, config=CONFIG).load(strategy="stream")
    return all(torch.equal(wanted[name], value) for name, value in found.state_dict().items())


# ---- what writes: model 1 where nothing was or model 0 -----------------------------------------------------


def save(folder: Path, seed: int) -> None:
    """`save_checkpoint` over what is there."""
    made(seed).save_checkpoint(folder / "out.pth")


def convert_file(folder: Path, seed: int) -> None:
    """`convert` over what is there."""
    convert(folder / f"in{seed}.pth", folder / "out.safetensors", to="huggingface")


def convert_parts(folder: Path, seed: int) -> None:
    """`convert` to torch's distributed checkpoint, whose writer is torch's."""
    convert(folder / f"in{seed}.pth", folder / "out", format="dcp")


def per_tensor(folder: Path, seed: int) -> None:
    """A folder of a file per tensor."""
    save_per_tensor(folder / f"in{seed}.pth", folder / "out")


def train(folder: Path, seed: int) -> None:
    """A run, or the rest of it; with a state after every step, of which two are kept."""
    rows = torch.arange(9).expand(2, 9).contiguous()
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    recipe, out = Recipe(steps=3, batch_size=2, last_blocks=1, save_every=1, keep=2), folder / "out"
    try:
        finetune(make(seed), Task(lambda number: batch, []), out, recipe, resume=out.exists())
    except UsageError as error:
        if "no run to resume" not in str(error):
            raise
        shutil.rmtree(out)  # killed before anything was written down
        train(folder, seed)


WRITERS: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "save": (save, "out.pth"),
    "convert": (convert_file, "out.safetensors"),
    "convert to dcp": (convert_parts, "out"),
    "per tensor": (per_tensor, "out"),
    "finetune": (train, "out"),
}
RUN = {"metrics.jsonl", "model.pth", "step-000002.pth", "step-000003.pth"}


def faults_after(name: str, folder: Path, before: int | None) -> list[str]:
    """What is wrong where a writer of model 1 was stopped; `before` is the model that was there."""
    out = folder / WRITERS[name][1]
    if name == "finetune":
        found = [*states.state_files(out).values()] if out.exists() else []
        return [f"{path.name}: {error!r}" for path in found for error in [_error_of(path)] if error]
    if not out.exists():
        return [] if before is None else ["the old file is gone"]
    try:
        return [] if is_same(out, 1) or (before is not None and is_same(out, before)) else ["another model"]
    except Exception as error:
        return [f"{error!r}"]


def _error_of(path: Path) -> Exception | None:
    try:
        states._read(path, states.STATE, "a whole saved state")
    except Exception as error:
        return error
    return None


def faults_at_end(name: str, folder: Path) -> list[str]:
    """What is wrong after a writer ran through: leftovers, or another model."""
    out = folder / WRITERS[name][1]
    left = {file.name for file in folder.iterdir()} - {"in0.pth", "in1.pth", "filler", out.name, "mine.part"}
    if name == "finetune":
        left |= {file.name for file in out.iterdir()} ^ RUN
        return [f"left: {sorted(left)}"] if left else []
    return ([f"left: {sorted(left)}"] if left else []) + ([] if is_same(out, 1) else ["another model"])


def prepare(name: str, folder: Path, number: int) -> int | None:
    """A folder to write in; half of the files are written over another."""
    folder.mkdir()
    (folder / "mine.part").mkdir()  # somebody else's
    for seed in () if name in ("save", "finetune") else (0, 1):
        made(seed).save_checkpoint(folder / f"in{seed}.pth")
    if number % 2 or WRITERS[name][1] == "out":
        return None
    WRITERS[name][0](folder, 0)
    return 0


def counted(cases: Iterable[tuple[list[str], bool]]) -> dict[str, Any]:
    """How many there were, how many met what was to be met, and what was wrong."""
    found = list(cases)
    faults = [fault for some, _ in found for fault in some]
    return {"tried": len(found), "met": sum(met for _, met in found), "faults": faults}


def forked(work: Callable[[], object]) -> int:
    """A process that does something and ends with 0, with 1 for a UsageError."""
    if child := os.fork():
        return child
    code = 2
    try:
        work()
        code = 0
    except UsageError:
        code = 1
    except BaseException as error:
        print(f"{error!r}", file=sys.stderr)
    os._exit(code)


# ---- kills -------------------------------------------------------------------------------------------------


def kill(name: str, folder: Path, number: int, seconds: float) -> tuple[list[str], bool]:
    """Kill a writer at a random moment; then write again. What is wrong, and whether it left something."""
    write, before = WRITERS[name][0], prepare(name, folder, number)
    child = forked(lambda: write(folder, 1))
    time.sleep(random.Random(f"{name} {number}").uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut = any(writing.PART.fullmatch(path.name) for path in folder.rglob("*"))
    faults = faults_after(name, folder, before)
    if name in ("convert to dcp", "per tensor") and (folder / "out").exists():
        shutil.rmtree(folder / "out")
    _, status = os.waitpid(forked(lambda: write(folder, 1)), 0)
    faults += [f"the next one ended with {status}"] if status else faults_at_end(name, folder)
    shutil.rmtree(folder)
    return faults, cut


def duration(name: str, folder: Path) -> float:
    """Seconds that a whole write takes, and a little."""
    prepare(name, folder, 1)
    WRITERS[name][0](folder, 1)  # imports
    shutil.rmtree(folder)
    prepare(name, folder, 1)
    began = time.perf_counter()
    os.waitpid(forked(lambda: WRITERS[name][0](folder, 1)), 0)
    shutil.rmtree(folder)
    return 1.1 * (time.perf_counter() - began)


# ---- full disks --------------------------------------------------------------------------------------------


def with_disk(mount: Path, nbytes: int) -> bool:
    """Give this process a small disk at a folder, of which no other process knows; False where it may not."""
    libc, user = ctypes.CDLL(None, use_errno=True), 0 if os.geteuid() == 0 else CLONE_NEWUSER
    if libc.unshare(CLONE_NEWNS | user) or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None):
        return False
    return not libc.mount(b"none", bytes(mount), b"tmpfs", 0, f"size={nbytes}".encode())


def fill(name: str, folder: Path, number: int, free: int) -> tuple[list[str], bool]:
    """Write where so many bytes are left, which nobody knew when it began; then with room.

    What is wrong, and whether the disk was full.
    """
    before, filler = prepare(name, folder, number), folder / "filler"
    listed = sorted(os.listdir(folder))
    with open(filler, "wb") as file:
        left = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - free
        os.posix_fallocate(file.fileno(), 0, max(left, 1))
    faults, is_full = [], False
    try:
        WRITERS[name][0](folder, 1)
    except DiskFullError as error:
        is_full = True
        if name != "finetune":
            faults += [] if error.missing > 0 else [f"does not say what is missing: {error}"]
            faults += [] if sorted(os.listdir(folder)) == sorted([*listed, "filler"]) else ["litter"]
        elif (folder / "out").exists():
            parts = [file.name for file in (folder / "out").iterdir() if file.name.endswith(".part")]
            faults += [f"litter: {parts}"] if parts else []
    except BaseException as error:
        faults.append(f"{error!r}"[:300])
    filler.unlink()
    faults += faults_after(name, folder, before)
    if name in ("convert to dcp", "per tensor") and (folder / "out").exists():
        shutil.rmtree(folder / "out")
    WRITERS[name][0](folder, 1)
    faults += faults_at_end(name, folder)
    shutil.rmtree(folder)
    return faults, is_full


def fill_all(name: str, folder: Path, count: int) -> dict[str, Any] | None:
    """Fill disks at random bytes; None where this process may not have one."""
    read, write = os.pipe()
    if not os.fork():
        found: dict[str, Any] | None = None
        try:
            if with_disk(folder, 64 << 20):
                for module in (writing, gpt2lite.model, states):  # another process takes the room after it
                    module.require_space = lambda *args: None  # type: ignore[attr-defined]
                tempfile.tempdir = str(folder)
                draw = random.Random(name)
                size = 12 << 20 if name == "finetune" else 4 << 20
                frees = [draw.randrange(size) for _ in range(count)]
                found = counted(fill(name, folder / str(n), n, free) for n, free in enumerate(frees))
        except BaseException as error:
            found = {"tried": count, "faults": [f"{error!r}"]}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.wait()
    return json.loads(content)  # type: ignore[no-any-return]


# ---- races -------------------------------------------------------------------------------------------------


def race(name: str, folder: Path, number: int) -> tuple[list[str], bool]:
    """Three processes write one destination: some end whole, all others say why."""
    prepare(name, folder, number)
    children = [forked(lambda: WRITERS[name][0](folder, 1)) for _ in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    faults = [] if 0 in codes and set(codes) <= {0, 1} else [f"ended with {codes}"]
    faults += faults_at_end(name, folder)
    shutil.rmtree(folder)
    return faults, 1 in codes


def run(folder: Path, writers: Iterable[str], *, kills: int, fulls: int, races: int) -> dict[str, Any]:
    """What came of each kind of misfortune, by the writer that had it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that a damaged state was passed over
    found: dict[str, dict[str, Any]] = {"killed": {}, "disk full": {}, "at once": {}}
    (folder / "disk").mkdir()
    for name in writers:
        seconds = duration(name, folder / "timed")
        found["killed"][name] = counted(kill(name, folder / "killed", n, seconds) for n in range(kills))
        found["disk full"][name] = fill_all(name, folder / "disk", fulls)
        found["at once"][name] = counted(race(name, folder / "race", n) for n in range(races))
        print(
            name, json.dumps({kind: each[name] for kind, each in found.items()}), file=sys.stderr, flush=True
        )
    return found


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for what, count in {"kills": 4, "fulls": 3, "races": 1}.items():
        parser.add_argument(f"--{what}", type=int, default=count)
    args = parser.parse_args()
    writers = [name for name in WRITERS if name != "convert to dcp"]  # whose writer is torch's, and slow
    counts = {"kills": args.kills, "fulls": args.fulls, "races": args.races}
    print(json.dumps(run(args.folder, writers, **counts)))


if __name__ == "__main__":
    main()
