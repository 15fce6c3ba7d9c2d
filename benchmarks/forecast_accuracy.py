"""Forecast against measurement: strategy × format × dialect × stored dtype × cast, a fresh process each.

    python benchmarks/forecast_accuracy.py --size gpt2 --json benchmarks/results/forecast-cpu-gpt2.json

The weights are zeros in the layouts that the dialects' own writers leave (a forecast reads no values). For
each case a process that has only imported is forked (before torch has started threads, which a fork loses);
it loads something tiny first, then measures.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2lite import GPTConfig, GPTModel, clean_up, forecast, track_memory
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import steps_bar, table
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.dialects.reading import DIALECTS
from gpt2lite.loading.strategies import STRATEGIES

MIB = 1 << 20
SIZES = {"tiny": GPTConfig(64, 16, 16, 2, 2), "small": GPTConfig(8000, 512, 512, 8, 4)} | {
    name: GPTConfig.named(name) for name in OFFICIAL_SIZES
}
WRITTEN = [key for key in DIALECTS if key != "openai"]  # TensorFlow's names are no names of files
FORMATS = ("pth", "pth with optimizer", "safetensors", "folder")
VARIANTS = (
    ("float32", None),
    ("float32", "bfloat16"),
    ("float16", None),
    ("float16", "float32"),
)  # stored, cast


def layout(dialect: str, config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dialect's state dict, masks included; its head is left out where it is tied."""
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in GPTModel(config).state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for theirs, mine, placement in DIALECTS[dialect].rows:
        for i in range(config.n_layers) if "{i}" in mine else (0,):
            shape = ours.get(mine.format(i=i))
            if shape and (mine != "out_head.weight" or not config.tied_head):
                stored = list(placement.unplace(torch.empty(shape, device="meta")).shape)
                stored[placement.rows_axis] *= 3 if placement.narrows else 1
                shapes[theirs.format(i=i)] = tuple(stored)
    for suffix in DIALECTS[dialect].masks[:1]:
        query = next(theirs for theirs, mine, _ in DIALECTS[dialect].rows if mine.endswith("W_query.weight"))
        block = query.rsplit(".", 3)[0]
        for i in range(config.n_layers):
            shapes[f"{block.format(i=i)}{suffix}"] = (config.context_length, config.context_length)
    return shapes


def write(dialect: str, format: str, dtype: torch.dtype, config: GPTConfig, folder: Path) -> str:
    """The path of a checkpoint of zeros, but for its masks, in `folder`."""
    folder.mkdir(exist_ok=True)
    state = {name: torch.zeros(shape, dtype=dtype) for name, shape in layout(dialect, config).items()}
    for name in state:
        if name.endswith(".att.mask"):
            state[name] = torch.ones_like(state[name]).triu(1)
        elif name.endswith(".attn.bias"):
            state[name] = torch.ones_like(state[name]).tril()
    path = folder / f"{dialect}.pth"
    if format == "pth":
        torch.save(state, path)
    elif format == "pth with optimizer":
        moments = {i: {"exp_avg": torch.zeros_like(tensor)} for i, tensor in enumerate(state.values())}
        torch.save({"model_state_dict": state, "optimizer_state_dict": {"state": moments}}, path)
    elif format == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path := path.with_suffix(".safetensors"))
    else:
        (path := folder / dialect).mkdir()
        for name, tensor in state.items():
            torch.save(tensor, path / f"{name}.pt")
    return str(path)


@dataclass(frozen=True, slots=True)
class Case:
    """One load: what was foretold and what was measured, in bytes."""

    dialect: str
    format: str
    stored: str
    cast: str | None
    strategy: str
    foretold_host: int
    measured_host: int
    foretold_file: int
    measured_file: int
    foretold_device: int
    measured_device: int
    stays_host: int
    stays_device: int

    @property
    def host_error(self) -> int:
        """Foretold less measured anonymous host memory."""
        return self.foretold_host - self.measured_host

    @property
    def is_within(self) -> bool:
        """3 % or 24 MiB of host memory, anonymous and mapped, 1 % of device memory."""
        host = abs(self.host_error) <= max(24 * MIB, 0.03 * self.measured_host)
        file = abs(self.foretold_file - self.measured_file) <= max(24 * MIB, 0.03 * self.measured_file)
        device = abs(self.foretold_device - self.measured_device) <= 0.01 * self.measured_device
        return host and file and device


def measure(
    path: str, tiny: str, device: str, strategy: str, cast: str | None, config: GPTConfig
) -> dict[str, int]:
    """In the forked process: warm up with something tiny of the same kind, foretell, load, compare."""
    dtype = getattr(torch, cast) if cast else None
    GPTModel.from_checkpoint(tiny, device, strategy, config=SIZES["tiny"], dtype=dtype)
    foretold = forecast(path, device, config=config, dtype=dtype)[strategy]
    clean_up(device)
    with track_memory(device) as memory:
        model = GPTModel.from_checkpoint(path, device, strategy, config=config, dtype=dtype)
    del model
    return {
        "foretold_host": foretold.peak_host_anonymous,
        "measured_host": memory.peak_host_anonymous,
        "foretold_file": foretold.peak_host_reclaimable,
        "measured_file": memory.peak_host_reclaimable,
        "foretold_device": foretold.peak_device,
        "measured_device": memory.peak_device,
        "stays_host": foretold.stays_host,
        "stays_device": foretold.stays_device,
    }


def in_fork(function: Callable[..., Any], *arguments: object) -> Any:
    """What `function` returns in a process of its own; its error, if it has one, as ours."""
    read, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = json.dumps({"result": function(*arguments)})
        except BaseException:
            answer = json.dumps({"error": traceback.format_exc()})
        os.write(write_end, answer.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    found = json.loads(answer or '{"error": "killed"}')
    if "error" in found:
        raise RuntimeError(f"{arguments}: {found['error']}")
    return found["result"]


def cases(args: argparse.Namespace, config: GPTConfig) -> Iterator[Case]:
    """Measure every combination; a strategy that cannot read a format is left out."""
    for dialect, format, stored in itertools.product(args.dialects, args.formats, dict(VARIANTS)):
        with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=args.folder) as name:
            dtype = getattr(torch, stored)
            path = in_fork(write, dialect, format, dtype, config, Path(name))
            tiny = in_fork(write, dialect, format, dtype, SIZES["tiny"], Path(name) / "tiny")
            casts = (cast for each, cast in VARIANTS if each == stored)
            for cast, strategy in itertools.product(casts, args.strategies):
                if strategy != "per_tensor" or format == "folder":
                    for _ in range(3):  # again what is off: a busy machine's sampler may miss a peak
                        found = in_fork(measure, path, tiny, args.device, strategy, cast, config)
                        case = Case(dialect, format, stored, cast, strategy, **found)
                        if case.is_within:
                            break
                    yield case


def main() -> int:
    """Measure, print the worst of each strategy, keep all; 1 if one forecast is off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    for name, known in (("strategies", STRATEGIES), ("dialects", WRITTEN), ("formats", FORMATS)):
        parser.add_argument(f"--{name}", nargs="+", default=list(known), choices=list(known), metavar="NAME")
    parser.add_argument("--untied", action="store_true", help="a head of its own, as the article's model has")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    gc.freeze()  # so that a collection in a fork does not copy what it inherited
    config = GPTConfig.of(SIZES[args.size].as_dict() | {"tied_head": not args.untied})
    found = []
    with steps_bar([], "measuring") as bar:
        for case in cases(args, config):
            found.append(case)
            bar.update()
    rows = [("strategy", "cases", "worst host error", "worst device error", "within")]
    for strategy in args.strategies:
        of_it = [case for case in found if case.strategy == strategy]
        host = max((case.host_error for case in of_it), key=abs, default=0)
        device = max((c.foretold_device - c.measured_device for c in of_it), key=abs, default=0)
        good = sum(case.is_within for case in of_it)
        rows.append(
            (strategy, str(len(of_it)), f"{host / MIB:+.1f} MiB", f"{device / MIB:+.1f} MiB", str(good))
        )
    print(table(*rows))
    for case in found:
        if not case.is_within:
            print("off:", case)
    if args.json:
        record = {"size": args.size, "device": args.device, "environment": environment()}
        content = record | {"cases": [asdict(case) for case in found]}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if found and all(case.is_within for case in found) else 1


if __name__ == "__main__":
    sys.exit(main())
