"""Tokens a second: our engines beside CTranslate2 and transformers, and beside the bandwidth of the memory.

    python benchmarks/compare_decoding.py --batches 4 16 --json benchmarks/results/decoding-cpu-gpt2-xeon.json

Every contender is a process of its own that holds the same random weights; they take turns, one run each,
and medians are compared. A run is a whole call: so many tokens greedily after so many. What one token costs
is the long run less one of two tokens, over the tokens between: both read the prompt, and both record or
compile what later tokens replay. The roofline is the bytes of
the weights that a token multiplies, over the rate at which a loop that only adds up reads memory.
Peers come with `pip install -e '.[test,peers]'` and are left out, with the reason, where they cannot run.
Exits with 1 where a ratio is not what is wanted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from gpt2lite import GPTConfig, GPTModel, convert
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import as_json, steps_bar, table
from gpt2lite.config import OFFICIAL_SIZES

GENERATOR_SEED = 0
READ_BYTES = 512 << 20
Run = Callable[[int, int, int], Any]  # batch, prompt tokens, new tokens: generates, returns when it has


class Task(NamedTuple):
    """How many rows, of how many tokens, get how many new ones."""

    batch: int
    prompt: int
    new: int


PROMPT = Task(1, 32, 1)
BEGUN = Task(1, 32, 2)
DECODE = Task(1, 32, 64)
PREFILL = Task(1, 512, 1)
LONG_BEGUN, LONG = Task(1, 960, 2), Task(1, 960, 34)


def prompts(task: Task, vocabulary: int) -> torch.Tensor:
    """The same random ids for everybody."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    return torch.randint(min(vocabulary, 50257), (task.batch, task.prompt), generator=generator)


# ---- the contenders: folder and device → what runs a task --------------------------------------------------


def ours(
    folder: Path, device: str, *, dtype: torch.dtype | None = None, engine: str = "numba", int8: bool = False
) -> Callable[[Task], Any]:
    """Our own engines."""
    quantize = "int8" if int8 else None
    model = GPTModel.from_checkpoint(folder / "model.pth", device, dtype=dtype, quantize=quantize)

    def run(task: Task) -> Any:
        ids = prompts(task, model.config.vocab_size).to(device)
        return model.generate(ids, task.new, engine=engine).cpu()

    return run


def ctranslate2(folder: Path, device: str, *, compute_type: str) -> Callable[[Task], Any]:
    """Its Generator, as its documentation runs GPT-2."""
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ctranslate2"), device, compute_type=compute_type, intra_threads=torch.get_num_threads()
    )

    def run(task: Task) -> Any:
        tokens = [[f"t{number}" for number in row] for row in prompts(task, 50257).tolist()]
        length = {"max_length": task.new, "min_length": task.new}
        return generator.generate_batch(tokens, **length, sampling_topk=1, include_prompt_in_result=False)

    return run


def transformers(
    folder: Path, device: str, *, dtype: torch.dtype = torch.float32, static: bool = False
) -> Callable[[Task], Any]:
    """`generate` with its defaults, greedy; `static`: with a static cache, for which it compiles."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "hub", dtype=dtype).to(device).eval()
    model.generation_config.pad_token_id = 0
    if static:
        model.generation_config.cache_implementation = "static"

    @torch.inference_mode()
    def run(task: Task) -> Any:
        ids = prompts(task, model.config.vocab_size).to(device)
        length = {"max_new_tokens": task.new, "min_new_tokens": task.new}
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length).cpu()

    return run


def memory(folder: Path, device: str) -> Callable[[Task], Any]:
    """What reads READ_BYTES once: the machine's limit, no contender."""
    if device != "cpu":
        there = torch.ones(READ_BYTES // 4, device=device)
        return lambda task: there.sum().item()
    import numba
    import numpy as np

    @numba.njit(parallel=True, fastmath=True)
    def add_up(numbers: Any, sums: Any) -> None:
        for row in numba.prange(len(sums)):
            own, total = numbers[row], np.float32(0)
            for i in range(own.size):
                total += own[i]
            sums[row] = total

    numbers = np.ones((READ_BYTES // 4096, 1024), np.float32)
    return lambda task: add_up(numbers, np.empty(len(numbers), np.float32))


CPU: dict[str, Callable[[Path, str], Callable[[Task], Any]]] = {
    "ours, float32": ours,
    "ours, bfloat16": partial(ours, dtype=torch.bfloat16),
    "ours, int8": partial(ours, int8=True),
    "ours, float32, torch": partial(ours, engine="torch"),
    "CTranslate2, float32": partial(ctranslate2, compute_type="float32"),
    "CTranslate2, int8": partial(ctranslate2, compute_type="int8_float32"),
    "transformers, float32": transformers,
    "memory": memory,
}
CUDA: dict[str, Callable[[Path, str], Callable[[Task], Any]]] = {
    "ours, bfloat16": partial(ours, dtype=torch.bfloat16, engine="cuda_graph"),
    "ours, bfloat16, torch": partial(ours, dtype=torch.bfloat16, engine="torch"),
    "CTranslate2, bfloat16": partial(ctranslate2, compute_type="bfloat16"),
    "transformers, bfloat16": partial(transformers, dtype=torch.bfloat16),
    "transformers, bfloat16, static": partial(transformers, dtype=torch.bfloat16, static=True),
    "memory": memory,
}
CONTENDERS = {"cpu": CPU, "cuda": CUDA}
BYTES_A_WEIGHT = {"float32": 4, "bfloat16": 2, "int8": 1}


# ---- the processes -----------------------------------------------------------------------------------------


def work(name: str, folder: Path, device: str, connection: Connection) -> None:
    """In a process of its own: build the contender, then run what is asked and say what it took."""
    try:
        run = CONTENDERS[device][name](folder, device)
        run(PROMPT), run(BEGUN), run(DECODE)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    connection.send("")
    while task := connection.recv():
        began = time.perf_counter()
        run(task)
        connection.send(time.perf_counter() - began)


def measure(
    args: argparse.Namespace, folder: Path
) -> tuple[dict[str, dict[Task, list[float]]], dict[str, str]]:
    """Seconds of every run of every task; and who was left out, and why."""
    tasks = (PROMPT, BEGUN, DECODE, PREFILL, LONG_BEGUN, LONG)
    tasks += tuple(Task(batch, 32, new) for batch in args.batches for new in (2, 64))
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    reasons, workers = {}, []
    for name in CONTENDERS[args.device]:
        if name in args.without:
            continue
        pipes[name], theirs = context.Pipe()
        worker = context.Process(target=work, args=(name, folder, args.device, theirs), daemon=True)
        worker.start()
        workers.append(worker)
        if reason := pipes[name].recv():
            reasons[name] = reason
            del pipes[name]
    seconds: dict[str, dict[Task, list[float]]] = {name: {task: [] for task in tasks} for name in pipes}
    order, names = random.Random(GENERATOR_SEED), list(pipes)
    with steps_bar([""] * (args.runs * len(tasks) * len(names)), "measuring") as bar:
        for _ in range(args.runs):
            for task in tasks:
                order.shuffle(names)
                for name in names:
                    bar.set_postfix_str(name)
                    pipes[name].send(task)
                    seconds[name][task].append(pipes[name].recv())
                    bar.update()
    for name in names:
        pipes[name].send(None)
    for worker in workers:
        worker.join()
    return seconds, reasons


def write(config: GPTConfig, folder: Path, device: str) -> None:
    """The same random weights for everybody: model.pth, a folder for transformers, one for CTranslate2."""
    write_random_checkpoint(config, folder / "model.pth")
    hub = convert(folder / "model.pth", folder / "hub", to="huggingface", config=config, verify=False)
    vocabulary = {f"t{number}": number for number in range(config.vocab_size - 1)}
    (hub / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": config.vocab_size - 1}))
    (hub / "merges.txt").write_text("#version: 0.2\n")
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        return
    TransformersConverter(str(hub)).convert(str(folder / "ctranslate2"))


# ---- what comes out ----------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """Medians of one contender."""

    prompt: float  # seconds to read 32 tokens, and to give the first
    decode: float  # and 64 tokens
    prefill: float  # seconds to read 512
    token: float  # seconds for each further token
    late: float  # the same behind 960 tokens
    roofline: float | None  # of the memory's bandwidth, how much a token reaches


def figures(
    seconds: dict[str, dict[Task, list[float]]], n_weights: int, bandwidth: float
) -> dict[str, Figures]:
    """Medians, and what follows from them."""
    found = {}
    for name, by_task in seconds.items():
        if name == "memory":
            continue
        kinds = (PROMPT, BEGUN, DECODE, PREFILL, LONG_BEGUN, LONG)
        prompt, begun, decode, prefill, long_begun, long = (median(by_task[task]) for task in kinds)
        token = (decode - begun) / (DECODE.new - BEGUN.new)
        late = (long - long_begun) / (LONG.new - LONG_BEGUN.new)
        nbytes = n_weights * BYTES_A_WEIGHT[name.split(", ")[1]]
        found[name] = Figures(prompt, decode, prefill, token, late, nbytes / bandwidth / token)
    return found


def wanted(found: dict[str, Figures], device: str) -> Iterator[tuple[str, float, float]]:
    """(what, the ratio that was found, at least)."""
    if device == "cuda":
        yield "XL's target: roofline, bfloat16", found["ours, bfloat16"].roofline or 0, 0.7
        if "transformers, bfloat16" in found:
            ratio = found["transformers, bfloat16"].decode / found["ours, bfloat16"].decode
            yield "124M's target: transformers' seconds / ours, bfloat16", ratio, 5.0
        return
    rates = {"float32": 0.95, "bfloat16": 0.9, "int8": 0.85}
    for dtype, least in rates.items():
        yield f"roofline, {dtype}", found[f"ours, {dtype}"].roofline or 0, least
    peers = {name: each for name, each in found.items() if not name.startswith("ours")}
    if not peers:
        return
    for dtype in rates:
        ours = found[f"ours, {dtype}"]
        rivals = {"float32": "float32", "bfloat16": "float32"}.get(dtype, "")
        theirs = [each for name, each in peers.items() if rivals in name]
        more = 1.2 if dtype == "bfloat16" else 1.05
        yield f"best peer's token / ours, {dtype}", min(each.token for each in theirs) / ours.token, 1.05
        yield f"the same behind 960 tokens, {dtype}", min(each.late for each in theirs) / ours.late, 1.05
        yield (
            f"best peer's 32 tokens / ours, {dtype}",
            min(each.prompt for each in theirs) / ours.prompt,
            more,
        )
        prefill = min(each.prefill for each in theirs) / ours.prefill
        yield f"best peer's 512 tokens / ours, {dtype}", prefill, more


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=OFFICIAL_SIZES, default="gpt2")
    parser.add_argument("--device", choices=CONTENDERS, default="cpu")
    parser.add_argument("--runs", type=int, default=9, help="of each task (default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[], metavar="B", help="so many prompts at once, too"
    )
    known = sorted({name for contenders in CONTENDERS.values() for name in contenders})
    parser.add_argument(
        "--without", nargs="+", default=[], choices=known, metavar="NAME", help=f"of {'; '.join(known)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    config = GPTConfig.named(args.size)
    folder = Path(tempfile.mkdtemp(prefix="gpt2lite-", dir=args.folder))
    try:
        write(config, folder, args.device)
        seconds, reasons = measure(args, folder)
    finally:
        shutil.rmtree(folder)
    with torch.device("meta"):
        model = GPTModel(config)
    n_weights = sum(p.numel() for p in model.parameters()) - model.pos_emb.weight.numel()
    reads = [each for runs in seconds["memory"].values() for each in runs]
    bandwidth = READ_BYTES / median(reads)
    found = figures(seconds, n_weights, bandwidth)
    lines = [("", "32 + 64 s", "tokens/s", "ms a token", "late ms", "roofline", "prefill 32", "512 s")]
    lines += [
        (
            name,
            f"{each.decode:.3f}",
            f"{DECODE.new / each.decode:.1f}",
            f"{1000 * each.token:.2f}",
            f"{1000 * each.late:.2f}",
            f"{each.roofline:.2f}",
            f"{each.prompt:.3f}",
            f"{each.prefill:.3f}",
        )
        for name, each in found.items()
    ]
    print(table(*lines))
    rate = f"{bandwidth / 1e9:.1f} GB/s (at best {READ_BYTES / min(reads) / 1e9:.1f})"
    print(f"\n{args.size} on {args.device}, {args.runs} runs; memory read at {rate}")
    for batch in args.batches:
        for name in found:
            begun, decode = (median(seconds[name][Task(batch, 32, new)]) for new in (2, 64))
            print(f"batch {batch:3}  {name:24}  {62 * batch / (decode - begun):9.1f} tokens/s in decoding")
    for name, reason in reasons.items():
        print(f"{name} was left out: {reason}")
    verdicts = [
        {"what": what, "found": ratio, "at least": least} for what, ratio, least in wanted(found, args.device)
    ]
    print()
    for verdict in verdicts:
        said = "yes" if verdict["found"] >= verdict["at least"] else "NO"
        print(f"{verdict['what']}: {verdict['found']:.2f}, wanted {verdict['at least']:.2f}: {said}")
    if args.json:
        runs = {
            name: [{**task._asdict(), "seconds": times} for task, times in by_task.items()]
            for name, by_task in seconds.items()
        }
        kept = {
            "environment": environment(),
            "size": args.size,
            "bandwidth": bandwidth,
            "figures": {name: each._asdict() for name, each in found.items()},
            "ratios": verdicts,
            "left out": reasons,
            "runs": runs,
        }
        args.json.write_text(as_json(kept) + "\n")
    return 0 if all(verdict["found"] >= verdict["at least"] for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
