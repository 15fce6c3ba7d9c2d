"""Everything about the accelerator of this machine, in one command and under nine minutes.

    scripts/check_device                       # on the first accelerator that torch has
    scripts/check_device --device cuda:1 --size gpt2-xl
    scripts/check_device --simulated           # a rehearsal, on a device that is not real

First what must hold: bits of every strategy and dtype, forecasts beside the allocator's own statistics,
budgets under a limit on the device, generation and finetuning beside the CPU's, two models at once, memory
that runs out in the middle. Then, on a real device, what it takes: compare_loaders.py and
compare_decoding.py beside their peers. Each part is a process of its own with a part of the time; what does
not get its turn is said. Keeps benchmarks/results/device-NAME.json and .png. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2lite import (
    STRATEGIES,
    GPTConfig,
    GPTModel,
    InsufficientMemoryError,
    Recipe,
    finetune,
    forecast,
    save_per_tensor,
    text_task,
)
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import as_json, table
from gpt2lite.config import EMBEDDED
from gpt2lite.devices import (
    accelerators,
    allocated,
    empty_cache,
    has_graphs,
    name_of,
    peak_allocated,
    peak_reserved,
    reserved,
    restart_peak,
    synchronize,
    total_memory,
)
from gpt2lite.memory import LEFT_ALONE

HERE = Path(__file__).resolve().parent
SECONDS = 520
SIZES = {"small": GPTConfig(7001, 64, 384, 4, 2)} | {
    name: GPTConfig.named(name) for name in ("gpt2", "gpt2-xl")
}
DTYPES = (None, torch.bfloat16, torch.float16)
MIB = 1 << 20
Facts = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is checked: a device, and a checkpoint in both layouts, made of random weights."""

    device: torch.device
    path: Path
    folder: Path
    config: GPTConfig
    simulated: Any = None

    def source(self, strategy: str) -> Path:
        """What a strategy reads."""
        return self.folder if strategy == "per_tensor" else self.path

    def load(self, strategy: str = "auto", device: Any = None, **options: Any) -> GPTModel:
        """The model on the device."""
        where = self.device if device is None else device
        return GPTModel.from_checkpoint(self.source(strategy), where, strategy, config=self.config, **options)

    @contextmanager
    def limited(self, nbytes: int) -> Iterator[None]:
        """This process gets no more than that of the device."""
        gc.collect()
        empty_cache(self.device)
        total = total_memory(self.device)
        if self.simulated:
            self.simulated.limit(self.device.index, nbytes)
        else:
            torch.cuda.set_per_process_memory_fraction(nbytes / total, self.device)
        try:
            yield
        finally:
            if self.simulated:
                self.simulated.limit(self.device.index, total)
            else:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)


# ---- what must hold: subject → facts; an AssertionError says what does not --------------------------------


def bits(subject: Subject) -> Facts:
    """Every strategy and dtype gives what the CPU's load gives, to the bit."""
    loads = 0
    for dtype in DTYPES:
        right = subject.load("stream", "cpu", dtype=dtype).state_dict()
        for strategy in STRATEGIES:
            found = subject.load(strategy, dtype=dtype).state_dict()
            wrong = [name for name in right if not torch.equal(right[name], found[name].cpu())]
            assert not wrong, (strategy, dtype, wrong)
            loads += 1
    ids = torch.arange(8)[None]
    there, here = (subject.load("stream", device, quantize="int8") for device in (subject.device, "cpu"))
    torch.testing.assert_close(there(ids.to(subject.device)).cpu(), here(ids), rtol=1e-2, atol=1e-2)
    return {"loads": loads + 1}


def forecasts(subject: Subject) -> Facts:
    """Forecasts are within 1 % of what the allocator counts: allocated, and reserved."""
    found = {}
    for strategy in STRATEGIES:
        subject.load(strategy)
        gc.collect()
        restart_peak(subject.device)
        before = allocated(subject.device), reserved(subject.device)
        predicted = forecast(subject.source(strategy), subject.device, config=subject.config)[strategy]
        model = subject.load(strategy)
        peaks = peak_allocated(subject.device) - before[0], peak_reserved(subject.device) - before[1]
        del model
        found[strategy] = {"forecast": asdict(predicted), "allocated": peaks[0], "reserved": peaks[1]}
        for said, was in zip((predicted.peak_device, predicted.peak_reserved), peaks, strict=True):
            assert abs(said - was) <= max(0.01 * was, 2 * MIB), (strategy, predicted, peaks)
    return found


def budgets(subject: Subject) -> Facts:
    """Under a limit on the device each strategy loads in what it forecast, and is refused in half of it."""
    found = {}
    for strategy in STRATEGIES:
        held = reserved(subject.device)
        source = subject.source(strategy)
        needed = forecast(source, subject.device, config=subject.config)[strategy].peak_reserved
        least, share = LEFT_ALONE["device"]
        limit = int((needed + held + least) * (1 + 2 * share))
        with subject.limited(limit):
            subject.load(strategy)
            gc.collect()
        with subject.limited(needed // 2 + held):
            restart_peak(subject.device)
            before = allocated(subject.device)
            try:
                subject.load(strategy)
            except InsufficientMemoryError as error:
                assert "nothing was allocated" in str(error), error  # noqa: PT017
            else:
                raise AssertionError(f"{strategy} was not refused")
            assert peak_allocated(subject.device) - before <= 512, strategy  # asking whether it is there
        found[strategy] = limit
    return found


def generation(subject: Subject) -> Facts:
    """Greedy text in fp32 is the CPU's, by every engine; what a token costs is kept."""
    found, engines = {}, ["torch", *(["cuda_graph"] if has_graphs(subject.device) else [])]
    tf32 = getattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert not tf32, "TF32 is on, which rounds"
    for prompts, options in (([[1, 2, 3]], {}), ([[1], [5, 6, 7, 8]], {"window": 8})):
        n = 40 if not options else subject.config.context_length + 8
        n = min(n, 80)
        wanted = GPTModel.from_checkpoint(EMBEDDED).generate(prompts, n, engine="torch", **options)
        model = GPTModel.from_checkpoint(EMBEDDED, subject.device)
        for engine in engines:
            written = model.generate(prompts, n, engine=engine, **options)
            same = [torch.equal(a, b.cpu()) for a, b in zip(wanted, written, strict=True)]
            assert all(same), (engine, options)
    model = subject.load()
    for engine in engines:
        model.generate([[1]], 20, engine=engine)
        synchronize(subject.device)
        seconds = []
        for n in (2, 40):  # both record
            began = time.perf_counter()
            model.generate([[1]], n, engine=engine)
            synchronize(subject.device)
            seconds.append(time.perf_counter() - began)
        found[engine] = {"seconds_a_token": (seconds[1] - seconds[0]) / 38, "seconds_until_two": seconds[0]}
    return found


def finetuning(subject: Subject) -> Facts:
    """Four steps: the losses are the CPU's, in fp32 closely, in 16 bits about."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        text = Path(name, "text.txt")
        text.write_text("Once upon a time a small girl lived near a river, and the river sang. " * 80)
        for autocast, tolerance in ((False, 1e-3), (True, 5e-2)):
            losses = {}
            for device in ("cpu", subject.device):
                model = GPTModel.from_checkpoint(EMBEDDED, device)
                recipe = Recipe(steps=4, batch_size=2, seq_len=64, learning_rate=1e-3, autocast=autocast)
                out = Path(name, f"{device}-{autocast}".replace(":", "-"))
                finetune(model, text_task(text, model, recipe), out, recipe)
                lines = (out / "metrics.jsonl").read_text().splitlines()
                losses[str(device)] = [json.loads(line)["loss"] for line in lines]
            here, there = losses["cpu"], losses[str(subject.device)]
            assert all(abs(a - b) <= tolerance for a, b in zip(here, there, strict=True)), losses
            found["autocast" if autocast else "float32"] = losses
    return found


def two_models(subject: Subject) -> Facts:
    """Two threads load and generate at once, on two devices where there are two; both write what one does."""
    wanted = GPTModel.from_checkpoint(EMBEDDED).generate([[1, 2]], 40, engine="torch")[0].tolist()
    places = [subject.device, accelerators()[-1]]

    def work(device: torch.device) -> tuple[bool, list[int]]:
        subject.load("stream", device)
        model = GPTModel.from_checkpoint(EMBEDDED, device)
        return True, model.generate([[1, 2]], 40)[0].tolist()

    with ThreadPoolExecutor(2) as pool:
        found = [each.result()[1] for each in [pool.submit(work, place) for place in places]]
    assert found == [wanted, wanted], found
    return {"devices": [*map(str, places)]}


def out_of_memory(subject: Subject) -> Facts:
    """Somebody takes all memory in the middle of a load: our error, everything freed, and on it goes."""
    gc.collect()
    empty_cache(subject.device)
    before, taken = allocated(subject.device), list[torch.Tensor]()
    needed = forecast(subject.path, subject.device, config=subject.config)["mmap"].peak_reserved
    limit = reserved(subject.device) + needed + 64 * MIB + needed // 20

    def take_all(done: int, total: int) -> None:
        if done and not taken:
            while True:
                try:
                    taken.append(torch.empty(MIB + 512, dtype=torch.uint8, device=subject.device))
                except torch.OutOfMemoryError:
                    return

    with subject.limited(limit):
        try:
            subject.load("mmap", progress=take_all)
        except InsufficientMemoryError as error:
            said = str(error)
            taken.clear()
            gc.collect()
            assert allocated(subject.device) == before, allocated(subject.device) - before
        else:
            raise AssertionError("memory did not run out")
        subject.load("mmap")
    return {"said": said}


PARTS: dict[str, Callable[[Subject], Facts]] = {
    "bits": bits,
    "forecasts": forecasts,
    "budgets": budgets,
    "generation": generation,
    "finetuning": finetuning,
    "two models": two_models,
    "out of memory": out_of_memory,
}
# What it takes, beside peers: the program, its arguments, seconds. A simulated device has no speed.
TIMED = {
    "loaders": (["compare_loaders.py", "--runs", "3"], 150),
    "decoding": (["compare_decoding.py", "--runs", "3"], 150),
}


# ---- the processes -----------------------------------------------------------------------------------------


def simulate() -> Any:
    """Make the tests' simulated device this process's accelerator."""
    sys.path.insert(0, str(HERE.parent / "tests" / "simulated"))
    import device

    warnings.filterwarnings("ignore", message=".*(fallback|not currently supported).*")
    return device.register()


def subject_of(args: argparse.Namespace) -> Subject:
    """The device, and the files in the folder."""
    simulated = simulate() if args.simulated else None
    here = accelerators()
    if not here:
        raise SystemExit("torch has no accelerator here; --simulated rehearses without one")
    asked = torch.device(args.device) if args.device else here[0]
    device = torch.device(asked.type, asked.index or 0)
    return Subject(device, args.folder / "model.pth", args.folder / "parts", SIZES[args.size], simulated)


def run_part(args: argparse.Namespace) -> int:
    """One part, in this process; its answer is the last line."""
    try:
        answer = {"facts": PARTS[args.part](subject_of(args))}
    except Exception:
        answer = {"failed": traceback.format_exc()}
    print(json.dumps(answer))
    return 0


def answer_of(command: list[str], seconds: float) -> Facts:
    """What a process says in its last line, or why it says nothing."""
    if seconds < 5:
        return {"skipped": "no time was left"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    try:
        answer: Facts = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"failed": done.stderr or f"exit status {done.returncode}"}
    return answer


def timed(name: str, args: argparse.Namespace, seconds: float) -> Facts:
    """A comparison with peers, if the device is real and there is time."""
    if args.simulated:
        return {"skipped": "a simulated device has no speed"}
    (program, *words), most = TIMED[name]
    kind = (args.device or str(accelerators()[0])).partition(":")[0]
    kept = args.folder / f"{name}.json"
    options = ["--size", "gpt2" if args.size == "small" else args.size, "--device", kind, "--json", str(kept)]
    command = [sys.executable, str(HERE / program), *words, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(most, max(seconds, 5)))
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done after {min(most, seconds):.0f} s"}
    if not kept.exists():
        return {"failed": done.stderr or done.stdout}
    return {"facts": json.loads(kept.read_text()), "printed": done.stdout}


def draw(found: dict[str, Facts], title: str, path: Path) -> bool:
    """The device's peaks beside their forecasts, a pair of bars a strategy; False without matplotlib."""
    facts = found.get("forecasts", {}).get("facts")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not facts:
        return False
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, places = figure.subplots(), range(len(facts))
    for shift, what, forecasted in ((-0.2, "allocated", "peak_device"), (0.2, "reserved", "peak_reserved")):
        axes.bar([x + shift for x in places], [f[what] / MIB for f in facts.values()], 0.38, label=what)
        marks = [f["forecast"][forecasted] / MIB for f in facts.values()]
        label = "forecast" if shift < 0 else None
        axes.plot([x + shift for x in places], marks, "_", color="black", ms=18, mew=2, label=label)
    axes.set_xticks(places, list(facts))
    axes.set_ylabel("MiB on the device, at the peak")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True


def main() -> int:
    """Run all parts, print a line for each, keep what they found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cuda, cuda:1, xpu … (default: the first accelerator)")
    parser.add_argument("--size", choices=SIZES, help="of the model (default: gpt2; simulated: small)")
    parser.add_argument("--simulated", action="store_true", help="rehearse on a device that is not real")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or ("small" if args.simulated else "gpt2")
    if args.part:
        return run_part(args)
    began, found = time.monotonic(), dict[str, Facts]()
    if not args.simulated and not accelerators():
        raise SystemExit("torch has no accelerator here; --simulated rehearses without one")
    hardware = "simulated" if args.simulated else name_of(accelerators()[0])
    with tempfile.TemporaryDirectory(prefix="gpt2lite-") as name:
        args.folder = Path(name)
        write_random_checkpoint(SIZES[args.size], args.folder / "model.pth")
        save_per_tensor(args.folder / "model.pth", args.folder / "parts")
        common = ["--size", args.size, "--folder", name]
        common += ["--simulated"] * args.simulated + (["--device", args.device] if args.device else [])
        for part in (*PARTS, *TIMED):
            started = time.monotonic()
            left = SECONDS - (started - began)
            if part in TIMED:
                found[part] = timed(part, args, left)
            else:
                command = [sys.executable, str(Path(__file__).resolve()), "--part", part, *common]
                found[part] = answer_of(command, left)
            found[part]["seconds"] = round(time.monotonic() - started, 1)
            state = next((word for word in ("failed", "skipped") if word in found[part]), "ok")
            why = str(found[part].get(state, "")).strip().splitlines()[-1:]
            print(f"{state:8} {part:15} {found[part]['seconds']:6.1f} s  {' '.join(why)}", flush=True)
    real = not args.simulated
    title = f"{args.size} on {hardware}" if real else f"{args.size} on a simulated device: NO REAL DEVICE RAN"
    kept = {"device": hardware, "is_real": real, "size": args.size, "environment": environment()}
    stem = args.out / f"device-{re.sub(r'[^a-z0-9]+', '-', hardware.lower()).strip('-')}"
    stem.with_suffix(".json").write_text(as_json(kept | {"parts": found}) + "\n", encoding="utf-8")
    drawn = draw(found, title, stem.with_suffix(".png"))
    if facts := found["forecasts"].get("facts"):
        rows = [("strategy", "allocated", "forecast", "reserved", "forecast")]
        for strategy, f in facts.items():
            pairs = (
                f["allocated"],
                f["forecast"]["peak_device"],
                f["reserved"],
                f["forecast"]["peak_reserved"],
            )
            rows.append((strategy, *(f"{nbytes / MIB:.1f} MiB" for nbytes in pairs)))
        print(f"\n{table(*rows)}")
    print(f"\n{title}; {time.monotonic() - began:.0f} s; kept in {stem}.json{' and .png' if drawn else ''}")
    return 1 if any("failed" in each for each in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
