"""Our strategies beside every other way to load the same weights, and beside what the machine can do.

    python benchmarks/compare_loaders.py --size gpt2-xl --json benchmarks/results/loaders-cpu-gpt2-xl.json

Every run is a fresh process: it imports, loads something tiny the same way, has the file cached or dropped
from the cache, touches memory (`machine.py` says why), then loads once. Runs of different loaders take
turns; medians are compared, and peaks are those of one more run. Peers come with `pip install -e '.[peers]'`
and are left out, with the reason, where they cannot run. Exits with 1 where a ratio is not what is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from machine import LIMITS, read, warm_memory

from gpt2lite import GPTConfig, GPTModel, Tuning, convert, track_memory
from gpt2lite.benchmarking import TINY, write_random_checkpoint
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import bytes_bar, steps_bar, table
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.loading.strategies import STRATEGIES
from gpt2lite.verification import PROMPT

MIB = 1 << 20
SKIPPED = 3


@dataclass(frozen=True, slots=True)
class Files:
    """One model in every layout that a loader wants."""

    pth: str  # as the article saves it, masks and all
    hub: str  # a folder for transformers, its data beginning where the official file's do: unaligned
    config: dict[str, Any]


# ---- the loaders: files and device → what they return ------------------------------------------------------


def ours(strategy: str, **tuning: Any) -> Callable[[Files, str], Any]:
    """One of our strategies."""

    def load(files: Files, device: str) -> Any:
        options = {"config": files.config, "tuning": Tuning(**tuning)}
        return GPTModel.from_checkpoint(files.pth, device, strategy, **options)

    return load


def ours_from_hub_layout(files: Files, device: str) -> Any:
    """Zero-copy from data that are not aligned."""
    return GPTModel.from_checkpoint(f"{files.hub}/model.safetensors", device, "mmap")


def torch_load(files: Files, device: str) -> Any:
    """A bare `torch.load`: no model is built."""
    return torch.load(files.pth, map_location=device, weights_only=True)


def torch_load_mmap(files: Files, device: str) -> Any:
    """A bare `torch.load` that maps; elsewhere every tensor is moved."""
    state = torch.load(files.pth, mmap=True, weights_only=True)
    return state if device == "cpu" else {name: tensor.to(device) for name, tensor in state.items()}


def articles_baseline(files: Files, device: str) -> Any:
    """As a user writes it, random initial values and all."""
    from llms_from_scratch.ch04 import GPTModel as BooksModel

    model = BooksModel({**files.config, "qkv_bias": True}).to(device)
    model.load_state_dict(torch.load(files.pth, map_location=device, weights_only=True))
    return model.eval()


def safetensors_mapped(files: Files, device: str) -> Any:
    """The library's own call: on the CPU nothing is read yet."""
    from safetensors.torch import load_file

    return load_file(f"{files.hub}/model.safetensors", device)


def safetensors_copied(files: Files, device: str) -> Any:
    """The same, with memory of their own."""
    return {name: tensor.clone() for name, tensor in safetensors_mapped(files, device).items()}


def from_pretrained(files: Files, device: str) -> Any:
    """What its users write."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(files.hub).to(device).eval()


def accelerate(files: Files, device: str) -> Any:
    """What its users write."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import GPT2Config, GPT2LMHeadModel

    with init_empty_weights():
        model = GPT2LMHeadModel(GPT2Config.from_pretrained(files.hub))
    return load_checkpoint_and_dispatch(model, f"{files.hub}/model.safetensors", {"": device}).eval()


def fastsafetensors(files: Files, device: str) -> Any:
    """Its simple interface."""
    from fastsafetensors import fastsafe_open

    opened = fastsafe_open(f"{files.hub}/model.safetensors", device=device, nogds=True)
    with opened as file:
        return {name: file.get_tensor(name).clone().detach() for name in file.keys()}  # noqa: SIM118


def run_ai(files: Files, device: str) -> Any:
    """Its defaults; the tensors are the caller's."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(f"{files.hub}/model.safetensors", device=device)
        return dict(streamer.get_tensors())


class Loader(NamedTuple):
    """A way to load, and the file that it reads."""

    load: Callable[[Files, str], Any]
    reads: str


LOADERS = {
    "stream": Loader(ours("stream"), "pth"),
    "stream, not cached": Loader(ours("stream", keep_cached=False), "pth"),
    "mmap": Loader(ours("mmap"), "pth"),
    "mmap, prefetch": Loader(ours("mmap", prefetch=True), "pth"),
    "mmap, Hub layout": Loader(ours_from_hub_layout, "hub"),
    "torch.load": Loader(torch_load, "pth"),
    "torch.load(mmap=True)": Loader(torch_load_mmap, "pth"),
    "article's baseline": Loader(articles_baseline, "pth"),
    "safetensors load_file": Loader(safetensors_mapped, "hub"),
    "safetensors, copied": Loader(safetensors_copied, "hub"),
    "transformers": Loader(from_pretrained, "hub"),
    "accelerate": Loader(accelerate, "hub"),
    "fastsafetensors": Loader(fastsafetensors, "hub"),
    "Run:ai streamer": Loader(run_ai, "hub"),
}

# (what, against what, cold?, which figure, at most): ratios of medians within the run.
WANTED = (
    ("stream", "torch.load", False, "load", 1 / 2),
    ("stream", "Run:ai streamer", False, "load", 1 / 1.5),
    ("stream", "read into fresh memory", False, "load", 1 / 0.8),
    ("stream", "read into fresh huge pages", False, "load", 1 / 0.8),
    ("mmap", "transformers", False, "load", 0.5),
    ("mmap, Hub layout", "transformers", False, "load", 0.5),  # the very file that the peer maps
    ("mmap", "transformers", False, "logits", 1.0),
    ("mmap, Hub layout", "torch.load(mmap=True)", False, "load", 2.0),
    ("stream", "read, 1 thread", True, "load", 1 / 0.9),
    ("stream, not cached", "read, 1 thread", True, "load", 1 / 0.9),
    ("stream", "read past the cache, 1 thread", True, "load", 1 / 0.9),
    ("stream, not cached", "read past the cache, 1 thread", True, "load", 1 / 0.9),
)


# ---- in the fresh process ----------------------------------------------------------------------------------


@torch.inference_mode()
def first_logits(loaded: Any) -> None:
    """One forward pass of what can make one."""
    if isinstance(loaded, torch.nn.Module):
        weight = next(loaded.parameters())
        vocabulary = max(weight.shape[0], 64)
        loaded(torch.tensor([PROMPT], device=weight.device)[:, :8] % vocabulary)


def settle(files: Files, reads: str, cold: bool) -> None:
    """Have the page cache hold the file that will be read, or no file at all."""
    paths = {"pth": Path(files.pth), "hub": Path(files.hub) / "model.safetensors"}
    for path in paths.values():
        ByteSource(path).forget()
    if not cold:
        read(paths[reads], "cpu", Tuning(), threads=1)


def measure(name: str, files: Files, tiny: Files, device: str, cold: bool, track: bool) -> dict[str, Any]:
    """Load once. Exits with SKIPPED, the reason on standard error, where the peer cannot."""
    load, reads = LOADERS[name]
    try:
        first_logits(load(tiny, device))
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(SKIPPED)
    settle(files, reads, cold)
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    if track:
        with track_memory(device) as memory:
            loaded = load(files, device)
        return {
            "host": memory.peak_host_anonymous,
            "file": memory.peak_host_reclaimable,
            "device": memory.peak_device,
        }
    warm_memory(Path(files.pth).stat().st_size)
    began = time.perf_counter()
    loaded = load(files, device)
    synchronize()
    ready = time.perf_counter() - began
    first_logits(loaded)
    synchronize()
    answered = time.perf_counter() - began
    return {"load": ready, "logits": answered if isinstance(loaded, torch.nn.Module) else None}


def measure_limit(name: str, files: Files, device: str, cold: bool) -> dict[str, Any]:
    """What the machine itself takes for the same bytes."""
    path = Path(files.pth)
    settle(files, "pth", cold)
    warm_memory(path.stat().st_size)
    seconds = LIMITS[name](path, device, Tuning())
    if seconds is None:
        print("not on this machine", file=sys.stderr)
        sys.exit(SKIPPED)
    return {"load": seconds, "logits": None}


def job(request: str) -> None:
    """Run one measurement and print it."""
    asked = json.loads(request)
    files, tiny = Files(**asked.pop("files")), Files(**asked.pop("tiny"))
    if asked["name"] in LIMITS:
        found = measure_limit(asked["name"], files, asked["device"], asked["cold"])
    else:
        found = measure(files=files, tiny=tiny, **asked)
    print(json.dumps(found))


# ---- in the parent -----------------------------------------------------------------------------------------


def run(**asked: Any) -> dict[str, Any] | str:
    """What a measurement found, or why there is none."""
    command = [sys.executable, __file__, "job", json.dumps(asked)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        return (result.stderr.strip().splitlines() or [f"ended with {result.returncode}"])[-1]
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def misalign(path: Path) -> None:
    """Have a safetensors file's data begin at an odd byte, as those of the official gpt2 do (14,291)."""
    shifted = path.with_suffix(".shifted")
    with path.open("rb") as file, shifted.open("wb") as out:
        header = file.read(int.from_bytes(file.read(8), "little")) + b" " * 3
        out.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(file, out, 16 * MIB)
    shifted.replace(path)


def write(config: GPTConfig, folder: Path) -> Files:
    """The same random weights in each layout."""
    folder.mkdir()
    with bytes_bar(f"writing {folder.name}") as progress:
        write_random_checkpoint(config, folder / "model.pth", progress)
    shape = config.as_dict()
    hub = convert(folder / "model.pth", folder / "hub", to="huggingface", config=shape, verify=False)
    misalign(hub / "model.safetensors")
    for path in (folder / "model.pth", hub / "model.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return Files(str(folder / "model.pth"), str(hub), shape)


@dataclass(frozen=True)
class Outcome:
    """Everything that was found of one loader or limit."""

    name: str
    times: dict[str, list[float]]  # "load" and "logits", "cold load" and "cold logits"
    peaks: dict[str, int]
    reason: str = ""

    def seconds(self, figure: str) -> float | None:
        """The median, None where there is none."""
        return median(self.times[figure]) if self.times.get(figure) else None


def compare(args: argparse.Namespace, files: Files, tiny: Files) -> Iterator[Outcome]:
    """Take turns, `runs` times warm and cold; then each loader's peaks."""
    names = [name for name in (*LOADERS, *LIMITS) if name not in args.without]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    reasons: dict[str, str] = {}
    common = {"files": asdict(files), "tiny": asdict(tiny), "device": args.device}
    turns = [(cold, turn) for cold in (False, True) for turn in range(args.runs if not cold else args.cold)]
    order = random.Random(0)
    with steps_bar([""] * ((len(turns)) * len(names)), "measuring") as bar:
        for cold, _ in turns:
            order.shuffle(names)
            for name in names:
                bar.set_postfix_str(name)
                found = reasons.get(name) or run(name=name, cold=cold, **extra(name, track=False), **common)
                bar.update()
                if isinstance(found, str):
                    reasons[name] = found
                    continue
                for figure, seconds in found.items():
                    if seconds is not None:
                        times[name].setdefault("cold " * cold + figure, []).append(seconds)
    for name in (each for each in (*LOADERS, *LIMITS) if each in times):
        peaks = {} if name in LIMITS or name in reasons else run(name=name, cold=False, track=True, **common)
        yield Outcome(name, times[name], peaks if isinstance(peaks, dict) else {}, reasons.get(name, ""))


def extra(name: str, **options: bool) -> dict[str, bool]:
    """What a loader is asked and a limit is not."""
    return {} if name in LIMITS else options


def rows(outcomes: list[Outcome], nbytes: int) -> Iterator[tuple[str, ...]]:
    """The table."""
    yield ("", "load s", "GB/s", "first logits s", "cold s", "cold GB/s", "host anon", "host file", "device")
    for outcome in outcomes:
        if outcome.reason:
            continue
        load, cold, logits = (outcome.seconds(each) for each in ("load", "cold load", "logits"))
        peaks = (outcome.peaks.get(each) for each in ("host", "file", "device"))
        yield (
            outcome.name,
            f"{load:.3f}" if load else "–",
            f"{nbytes / load / 1e9:.1f}" if load else "–",
            f"{logits:.3f}" if logits else "–",
            f"{cold:.2f}" if cold else "–",
            f"{nbytes / cold / 1e9:.2f}" if cold else "–",
            *("–" if peak is None else f"{peak / MIB:.0f}" for peak in peaks),
        )


def verdicts(outcomes: list[Outcome]) -> Iterator[tuple[str, bool]]:
    """One line for every ratio that is wanted, and whether it is had."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    for what, against, cold, figure, at_most in WANTED:
        key = "cold " * cold + figure
        ours, theirs = (by_name[each].seconds(key) if each in by_name else None for each in (what, against))
        if ours and theirs:
            ratio = ours / theirs
            label = f"{what} / {against}, {'cold' if cold else 'warm'}, {figure}"
            yield f"{label}: {ratio:.2f}, wanted at most {at_most:.2f}", ratio <= at_most


def maps(outcome: Outcome, nbytes: int) -> bool:
    """Whether it returns before the weights were read: they come with their first use."""
    return bool(outcome.peaks) and max(outcome.peaks["host"], outcome.peaks["device"]) < nbytes / 2


def heading(outcomes: list[Outcome], size: str, nbytes: int, device: str) -> str:
    """What the picture shows, in one line."""
    by_name = {outcome.name: outcome.seconds("load") for outcome in outcomes}
    ours, theirs = by_name.get("stream"), by_name.get("torch.load")
    finding = f": stream takes {ours / theirs:.2f} of torch.load's time" if ours and theirs else ""
    return f"{size}, {nbytes / 2**30:.2f} GiB, to {device}{finding}"


def draw(outcomes: list[Outcome], nbytes: int, path: Path, title: str) -> None:
    """Seconds until each returns and until its first logits, cached and not; what maps stands apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [outcome for outcome in outcomes if outcome.times and not outcome.reason]
    groups = {
        "the weights are in memory": [o for o in shown if o.name not in LIMITS and not maps(o, nbytes)],
        "mapped: read at first use": [o for o in shown if o.name not in LIMITS and maps(o, nbytes)],
        "what the machine can do": [o for o in shown if o.name in LIMITS],
    }
    groups = {name: members for name, members in groups.items() if members}
    heights = [len(members) + 0.5 for members in groups.values()]
    figure = Figure(figsize=(10, 0.27 * sum(heights) + 2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 2, sharex=True, sharey="row", squeeze=False, height_ratios=heights)
    for row, (group, members) in zip(panels, groups.items(), strict=True):
        for axes, prefix in zip(row, ("", "cold "), strict=True):
            for at, outcome in enumerate(members):
                ready, logits = outcome.seconds(prefix + "load"), outcome.seconds(prefix + "logits")
                color = "black" if is_ours(outcome.name) else "#999999"
                axes.plot(
                    [t for t in (ready, logits) if t], [at] * bool(ready) + [at] * bool(logits), color=color
                )
                axes.plot(ready or [], [at] * bool(ready), "o", color=color, label="the call returns")
                axes.plot(
                    logits or [], [at] * bool(logits), "D", color=color, mfc="white", label="first logits"
                )
            axes.set(xscale="log", ylim=(len(members) - 0.5, -0.5))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_yticks(range(len(members)), [outcome.name for outcome in members])
        row[0].set_title(f"{group}; file cached", loc="left", fontsize="medium")
        row[1].set_title("file on disk", loc="left", fontsize="medium")
    for axes in panels[-1]:
        axes.set_xlabel("seconds; black: gpt2lite")
    found = dict(zip(*panels[0, 0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(found.values(), found, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=120)


def is_ours(name: str) -> bool:
    """Whether it is one of our strategies."""
    return name.split(",")[0] in STRATEGIES


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=OFFICIAL_SIZES, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5, help="with the file cached (default: %(default)s)")
    parser.add_argument("--cold", type=int, default=3, help="with it dropped (default: %(default)s)")
    known = [*LOADERS, *LIMITS]
    parser.add_argument(
        "--without", nargs="+", default=[], choices=known, metavar="NAME", help=f"of {', '.join(known)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpt2lite-", dir=args.folder))
    config = GPTConfig.of(GPTConfig.named(args.size).as_dict() | {"tied_head": False})
    small = GPTConfig.of(TINY.as_dict() | {"tied_head": False})
    try:
        files, tiny = write(config, folder / args.size), write(small, folder / "tiny")
        nbytes = sum(p.numel() * 4 for p in GPTModel.from_checkpoint(files.pth, strategy="mmap").parameters())
        outcomes = list(compare(args, files, tiny))
    finally:
        shutil.rmtree(folder)
    print(table(*rows(outcomes, nbytes)))
    print(
        f"\n{args.size}, {nbytes / 1e9:.2f} GB of parameters, to {args.device}. Peaks: MiB above the imports."
    )
    for outcome in outcomes:
        if outcome.reason:
            print(f"{outcome.name} was left out: {outcome.reason}")
    said = list(verdicts(outcomes))
    print("\n" + "\n".join(f"{'  ' if good else 'NO'} {line}" for line, good in said))
    if args.json:
        record = {
            "size": args.size,
            "device": args.device,
            "parameter_bytes": nbytes,
            "environment": environment(),
            "outcomes": [
                {"name": o.name, "times": o.times, "peaks": o.peaks, "left_out": o.reason} for o in outcomes
            ],
            "verdicts": [{"said": line, "good": good} for line, good in said],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(outcomes, nbytes, args.plot, heading(outcomes, args.size, nbytes, args.device))
    return 0 if all(good for _, good in said) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        job(sys.argv[2])
    else:
        sys.exit(main())
