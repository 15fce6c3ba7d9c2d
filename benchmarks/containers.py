"""Loads inside memory cgroups that are hardly large enough, or too small: none may be killed.

    python benchmarks/containers.py budgets --size gpt2 --runs 100 --json budgets.json
    python benchmarks/containers.py mapped --size gpt2-xl --limit 1GiB --json mapped.json
    python benchmarks/containers.py offload --size gpt2-large --json offload.json

`budgets`: each run has a cgroup of its own whose limit is what the process holds there after its imports and
a tiny load, plus a random cap between 0.1 and 3 × the model. It must load, or raise InsufficientMemoryError.
`mapped`: strategy="mmap" and a forward pass inside a limit far below the model, logits compared with those of
a copying load outside.
`offload`: greedy tokens of a model that is four times what may be added, by blocks on disk, by a mapping, and
by accelerate's blocks on disk, beside how fast one thread reads what a token moves.
Needs root and cgroup v1's memory controller; exit code 3 where they are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forecast_accuracy import SIZES

from gpt2lite import GPTConfig, GPTModel, InsufficientMemoryError, convert, forecast, save_per_tensor
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import steps_bar
from gpt2lite.generation import KVCache
from gpt2lite.loading.strategies import STRATEGIES
from gpt2lite.memory import human, parse_size

LIMIT, USAGE, PEAK = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes"
NO_CGROUP = 3
PROMPT, TOKENS = [15496, 11, 314, 716], 4
READ = 16 << 20
IO = Path("/proc/self/io")


@contextmanager
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup (v1) below this process's own. Raises OSError where none can be made."""
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    own = next((path for _, controllers, path in lines if controllers == "memory"), None)
    if own is None:
        raise OSError("no cgroup v1 memory controller here")
    folder = Path("/sys/fs/cgroup/memory") / own.lstrip("/") / f"gpt2lite-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        for _ in range(50):  # the kernel lets go of the last process a moment after its end
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.02)


def enter(folder: str) -> Path:
    """Move this process into a cgroup; what it holds already stays charged to the old one."""
    (Path(folder) / "cgroup.procs").write_text(str(os.getpid()))
    return Path(folder)


def held(folder: Path) -> int:
    """Bytes charged to a cgroup that cannot be reclaimed."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return (
        int((folder / USAGE).read_text()) - int(stat["total_inactive_file"]) - int(stat["total_active_file"])
    )


def forget(path: Path) -> None:
    """Drop a checkpoint from the page cache, so that whoever reads it is charged for it."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        ByteSource(file).forget()


def load_within(
    folder: str, cap: int, path: str, tiny: str, strategy: str, cast: str | None, config: dict[str, Any]
) -> dict[str, Any]:
    """Load inside what this process holds after a tiny load, plus `cap`."""
    dtype, cgroup = getattr(torch, cast) if cast else None, enter(folder)
    GPTModel.from_checkpoint(tiny, "cpu", strategy, config=SIZES["tiny"], dtype=dtype)
    (cgroup / LIMIT).write_text(str(held(cgroup) + cap))
    try:
        GPTModel.from_checkpoint(path, "cpu", strategy, config=config, dtype=dtype)
    except InsufficientMemoryError as error:
        first, *more = str(error).splitlines()
        outcome = "refused" if "nothing was allocated" in first else "ran out"
        return {"outcome": outcome, "said": "; ".join(line.strip() for line in more[:1])}
    peak, limit = (int((cgroup / name).read_text()) for name in (PEAK, LIMIT))
    return {"outcome": "loaded", "peak": peak, "limit": limit}


def fresh(job: str, **arguments: Any) -> Any:
    """What one of JOBS returns in a process that nothing was forked into, or how that process ended."""
    command = [sys.executable, __file__, "job", json.dumps({"job": job, **arguments})]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        killed = result.returncode == -signal.SIGKILL
        return {"outcome": "killed" if killed else "error", "said": result.stderr[-2000:]}
    return json.loads(result.stdout)


def contained(job: str, **arguments: Any) -> dict[str, Any]:
    """`fresh` with a memory cgroup of its own, which it enters itself."""
    with memory_cgroup() as folder:
        found: dict[str, Any] = fresh(job, folder=str(folder), **arguments)
    return found


def write(path: str, config: dict[str, Any]) -> None:
    """A random checkpoint in the article's layout."""
    write_random_checkpoint(GPTConfig.of(config), Path(path))


def _model_of(size: str) -> GPTConfig:
    """The article's model of this size: its head is not tied."""
    return GPTConfig.of(SIZES[size].as_dict() | {"tied_head": False})


def budgets(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Random caps, strategies and casts."""
    config = _model_of(args.size).as_dict()
    path, tiny = folder / "model.pth", folder / "tiny.pth"
    write(str(path), config)
    write(str(tiny), SIZES["tiny"].as_dict() | {"tied_head": False})
    for file in (path, tiny):
        save_per_tensor(file, folder / file.stem)
    model_bytes = forecast(path, config=config)["stream"].stays_host
    draw, runs = random.Random(args.seed), []
    with steps_bar([""] * args.runs, "loading") as bar:
        for number in range(args.runs):
            strategy = ("auto", *STRATEGIES)[number % (len(STRATEGIES) + 1)]
            cast, times = draw.choice((None, "bfloat16")), draw.uniform(0.1, 3.0)
            source = folder / "model" if strategy == "per_tensor" else path
            small = folder / "tiny" if strategy == "per_tensor" else tiny
            forget(source)
            asked = {"strategy": strategy, "cast": cast, "cap": int(times * model_bytes)}
            found = contained("load", path=str(source), tiny=str(small), config=config, **asked)
            runs.append(asked | {"times_model": round(times, 3)} | found)
            bar.update()
    outcomes = Counter(run["outcome"] for run in runs)
    print(f"{args.size}, {human(model_bytes)}, {args.runs} runs: {dict(outcomes)}")
    good = outcomes["loaded"] + outcomes["refused"] == args.runs and outcomes["loaded"] > 0
    return {"size": args.size, "seed": args.seed, "model_bytes": model_bytes, "runs": runs, "good": good}


def first_logits(path: str, strategy: str, config: dict[str, Any]) -> list[float]:
    """Some logits of a forward pass."""
    model = GPTModel.from_checkpoint(path, "cpu", strategy, config=config)
    with torch.inference_mode():
        ids = torch.tensor([[15496, 11, 314, 716]]) % model.config.vocab_size
        found: list[float] = model(ids)[0, -1, :64].tolist()
    return found


def mapped_within(folder: str, limit: int, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Map a checkpoint and run it inside a limit."""
    cgroup = enter(folder)
    (cgroup / LIMIT).write_text(str(limit))
    began = time.perf_counter()
    logits = first_logits(path, "mmap", config)
    seconds = time.perf_counter() - began
    return {"outcome": "done", "seconds": seconds, "peak": int((cgroup / PEAK).read_text()), "logits": logits}


def mapped(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A forward pass of a mapped model inside a limit."""
    config, path, limit = _model_of(args.size).as_dict(), folder / "model.pth", parse_size(args.limit)
    write(str(path), config)
    expected = fresh("logits", path=str(path), strategy="stream", config=config)
    forget(path)
    found = contained("mapped", limit=limit, path=str(path), config=config)
    good = found.pop("logits", []) == expected
    print(f"{args.size} mapped inside {human(limit)}: {found}, logits equal to a copying load: {good}")
    return {"size": args.size, "limit": limit, "file_bytes": path.stat().st_size, **found, "good": good}


def limited(folder: str, tiny: str, added: int) -> Path:
    """Enter a cgroup in which this process may add so much to what it holds after a tiny load."""
    cgroup = enter(folder)
    GPTModel.from_checkpoint(tiny, config=SIZES["tiny"])
    (cgroup / LIMIT).write_text(str(held(cgroup) + added))
    return cgroup


def timed(step: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Greedy tokens and the seconds that each took; the first is the prompt's."""
    ids, tokens, seconds = torch.tensor([PROMPT]), list[int](), list[float]()
    with torch.inference_mode():
        for _ in range(TOKENS):
            began = time.perf_counter()
            ids = step(ids)[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - began)
            tokens.append(int(ids))
    return {"tokens": tokens, "seconds": seconds}


def generate_within(folder: str, tiny: str, added: int, path: str, **options: Any) -> dict[str, Any]:
    """Tokens of our own model, and how many bytes each moves."""
    cgroup = limited(folder, tiny, added)
    model = GPTModel.from_checkpoint(path, **options)
    cache = KVCache(model.config, 1, len(PROMPT) + TOKENS, model.pos_emb.weight)
    read = int(IO.read_text().split("rchar: ")[1].split()[0])
    found = timed(lambda ids: model(ids, cache))
    moved = (int(IO.read_text().split("rchar: ")[1].split()[0]) - read) // TOKENS
    return found | {"moved": moved, "peak": int((cgroup / PEAK).read_text())}


def accelerate_within(folder: str, tiny: str, added: int, path: str) -> dict[str, Any]:
    """Tokens of transformers' model whose blocks accelerate keeps in the file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cgroup, n_layers = limited(folder, tiny, added), AutoConfig.from_pretrained(path).n_layer
    places: dict[str, str] = {f"transformer.h.{i}": "disk" for i in range(n_layers)}
    places |= dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        path, device_map=places, offload_folder=f"{path}-away", dtype=torch.float32
    )
    seen: dict[str, Any] = {}

    def step(ids: torch.Tensor) -> torch.Tensor:
        result = model(ids, past_key_values=seen.get("cache"), use_cache=True)
        seen["cache"] = result.past_key_values
        return torch.as_tensor(result.logits)

    return timed(step) | {"peak": int((cgroup / PEAK).read_text())}


def read_within(folder: str, tiny: str, added: int, path: str) -> dict[str, Any]:
    """Bytes a second at which one thread reads a file past the page cache."""
    limited(folder, tiny, added)
    memory, source = memoryview(bytearray(READ)), ByteSource(Path(path))
    with source.reader(past_cache=True) as reader:
        began = time.perf_counter()
        for at in range(0, source.state().size - READ, READ):
            reader.read_into([memory], at)
    return {"rate": at / (time.perf_counter() - began)}


def offload(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same tokens from a model four times as large as what may be added."""
    path, hub, tiny = folder / "model.pth", folder / "hub", folder / "tiny.pth"
    write(str(path), SIZES[args.size].as_dict())
    write(str(tiny), SIZES["tiny"].as_dict())
    convert(path, hub, to="huggingface")
    size = path.stat().st_size
    ways = {
        "offload": ("generate", {"path": str(path), "offload": "disk"}),
        "mmap": ("generate", {"path": str(path), "strategy": "mmap"}),
        "accelerate": ("accelerate", {"path": str(hub)}),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*ways, "read")}
    for _ in range(args.runs):
        for name, (job, arguments) in {**ways, "read": ("read", {"path": str(path)})}.items():
            for file in (path, hub):
                forget(file)
            found = contained(job, tiny=str(tiny), added=size // 4, **arguments)
            runs[name].append(found)
            print(f"{name}: {found}")
    tokens = {tuple(run.get("tokens", ())) for name in ways for run in runs[name]}
    a_token = {name: median(median(run["seconds"][1:]) for run in runs[name]) for name in ways}
    rate, moved = median(run["rate"] for run in runs["read"]), runs["offload"][0]["moved"]
    ratio = moved / rate / a_token["offload"]
    print(f"{args.size}, {human(size)} within {human(size // 4)}: {a_token} s a token; {human(moved)} move")
    print(f"{ratio:.2f} of the {human(int(rate))}/s of one thread; same tokens: {len(tokens) == 1}")
    found = {"size": args.size, "file_bytes": size, "added": size // 4, "seconds_a_token": a_token}
    return found | {"moved": moved, "rate": rate, "ratio": ratio, "runs": runs, "good": len(tokens) == 1}


JOBS: dict[str, Callable[..., Any]] = {"load": load_within, "mapped": mapped_within, "logits": first_logits}
JOBS |= {"generate": generate_within, "accelerate": accelerate_within, "read": read_within}


WAYS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]]
WAYS = {"budgets": budgets, "mapped": mapped, "offload": offload}


def main() -> int:
    """Run one of them; 1 if a process was killed, or raised or gave something else."""
    if sys.argv[1:2] == ["job"]:
        arguments = json.loads(sys.argv[2])
        print(json.dumps(JOBS[arguments.pop("job")](**arguments)))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", default="1GiB")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    try:
        with memory_cgroup():
            pass
    except OSError as error:
        print(f"no memory cgroup can be made here: {error}", file=sys.stderr)
        return NO_CGROUP
    with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=args.folder) as folder:
        found = WAYS[args.what](args, Path(folder))
    if args.json:
        args.json.write_text(
            json.dumps(found | {"environment": environment()}, indent=1) + "\n", encoding="utf-8"
        )
    return 0 if found["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
