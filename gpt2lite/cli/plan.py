"""`gpt2lite plan`: what a load will cost, before it begins."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from gpt2lite.checkpoint.source import lies
from gpt2lite.cli.arguments import recipe_of
from gpt2lite.cli.loading import config_of, dtype_of
from gpt2lite.cli.terminal import as_json, facts, line_width, table
from gpt2lite.devices import CPU, name_device
from gpt2lite.dialects.reading import block_of
from gpt2lite.errors import InsufficientMemoryError
from gpt2lite.finetuning.forecast import TrainingForecast, find_levers, forecast_training
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.loading.choice import Verdict, choose, judge, with_offload
from gpt2lite.loading.offload import bytes_a_pass, takes
from gpt2lite.loading.options import OpenOptions
from gpt2lite.loading.plan import LoadPlan
from gpt2lite.loading.strategies import STRATEGIES
from gpt2lite.memory import find_budget, human, parse_size
from gpt2lite.model import GPTModel
from gpt2lite.opening import Opened, assumed, open_to_plan
from gpt2lite.parallel import FSDP, forecast_gathered, started

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

HEADER = ("strategy", "device", "host anon", "host file", "stays", "mapped", "fits")
LEGEND = """\
Bytes that loading adds. device, host anon, host file: at the peak; anon cannot
be reclaimed, file is what is read through a mapping. stays: after loading.
mapped: pages of the file that the model then uses and the system can reclaim.
fits: in available memory, and under the caps; a device in whole segments."""
OF_RANKS = """
reads, gathers: bytes that stream reads for this rank; what FSDP needs to run."""


def _size(nbytes: int) -> str:
    return human(nbytes) if nbytes else "–"


def _row(name: str, verdict: Verdict | str) -> list[str]:
    if isinstance(verdict, str):
        whys = {"quantize": "not int8", "a model over": "not ranks", "offload": "not offload"}
        why = next((said for start, said in whys.items() if verdict.startswith(start)), "not this file")
        return [name, *["–"] * (len(HEADER) - 2), why]
    forecast = verdict.forecast
    peaks = (forecast.peak_device, forecast.peak_host_anonymous, forecast.peak_host_reclaimable)
    stays = forecast.stays_device or forecast.stays_host
    fits = f"no: {' and '.join(verdict.lacking)}" if verdict.lacking else "yes"
    return [name, *map(_size, (*peaks, stays, forecast.stays_mapped)), fits]


def _as_dict(name: str, verdict: Verdict | str) -> dict[str, Any]:
    if isinstance(verdict, str):
        return {"strategy": name, "forecast": None, "fits": False, "why": verdict}
    forecast, lacking = asdict(verdict.forecast), verdict.lacking
    return {"strategy": name, "forecast": forecast, "fits": not lacking, "lacking": lacking}


def _opened(args: argparse.Namespace) -> Opened[GPTModel]:
    """The checkpoint; an official size, if one is asked for by name alone, as its file is."""
    options: OpenOptions = {"revision": args.revision, "config": config_of(args)}
    return assumed(GPTModel, args.size) if args.size else open_to_plan(GPTModel, args.path, options)


def _assumption(opened: Opened[GPTModel]) -> str:
    said = "no file was looked at; float32 and a tied head, as on the Hub"
    return "" if lies(opened.path) else f"\n{opened.path}: {said}\n"


def _plan_training(args: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    """Print what training takes; with --fit what brings it there: 1 if nothing does."""
    opened = _opened(args)
    config = opened.sizes
    if args.classes:
        config = replace(config, n_classes=args.classes, head_bias=True, tied_head=False)
    device, dtype, recipe = name_device(args.device), dtype_of(args) or torch.float32, recipe_of(args)

    def predict(recipe: Recipe) -> TrainingForecast:
        return forecast_training(lambda: GPTModel(config), recipe, device, dtype, mesh)

    limit = parse_size(args.fit) if args.fit else None
    levers, found = find_levers(recipe, limit, predict) if limit else ([], predict(recipe))
    fits = not limit or found.peak <= limit
    if args.json:
        said = [{"lever": lever, "costs": cost} for lever, cost in levers]
        content = {"path": str(opened.path), "device": str(device), "forecast": asdict(found)}
        print(as_json(content | {"levers": said, "fits": fits}))
    else:
        print(f"training {opened.path} on {device}\n")
        print(facts([(name, _size(nbytes)) for name, nbytes in asdict(found).items()]))
        if limit:
            met = "does not fit as asked; it would with" if levers else "fits as asked"
            how = met if fits else "does not fit in any way; the least takes"
            print(f"\n{human(limit)}: {how}")
            for lever, cost in levers:
                line = f"  {lever}: {cost}"
                print(textwrap.fill(line, line_width(), subsequent_indent="    ", break_on_hyphens=False))
        print(_assumption(opened), end="")
    return 0 if fits else 1


def run_plan(args: argparse.Namespace) -> int:
    """Print forecasts, available memory, and what fits; 1 if nothing does."""
    run = _plan_training if args.train else _plan
    if args.ranks is None:
        return run(args, None)
    with started(args.parallel or FSDP, CPU, args.ranks) as mesh:
        return run(args, mesh)


def _away(plan: LoadPlan) -> dict[str, str | int]:
    """Which blocks stay away, what each pass moves, and how long that takes if the file can be read."""
    layers = sorted({block_of(target.names[0]) for target in plan.away})
    found: dict[str, str | int] = {f"on {plan.offload}": f"blocks {layers[0]} to {layers[-1]}"}
    found["a token"] = bytes_a_pass(plan)
    if plan.offload == "disk" and plan.manifest.path.exists():
        found["takes"] = takes(plan)
    return found


def _plan(args: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    device = name_device(args.device)
    budget = find_budget(device, args.max_host_memory, args.max_device_memory)
    opened = _opened(args)
    plan = opened.plan(device, dtype=dtype_of(args), quantize=args.quantize, mesh=mesh)
    if args.offload:
        plan = with_offload(plan, "auto", args.offload, budget)
    verdicts = {name: row.refuses(plan) or judge(plan, name, budget) for name, row in STRATEGIES.items()}
    auto, fits, ranks = "", list[str](), dict[str, int]()
    try:
        auto = choose(plan, "auto", budget)[0]
    except InsufficientMemoryError as error:
        fits += error.fits
    if plan.is_divided:  # what stream reads for this rank, and what FSDP then takes in order to compute
        ranks["reads"] = sum(chunk.nbytes for chunk in plan.schedule.chunks)
        ranks["gathers"] = forecast_gathered(plan.skeleton, plan.targets[0].dtype.itemsize)
    away = _away(plan) if plan.away else {}
    if args.json:
        rows = [_as_dict(name, verdict) for name, verdict in verdicts.items()]
        content = {"path": str(plan.manifest.path), "device": str(device), "budget": asdict(budget)}
        print(as_json(content | ranks | away | {"strategies": rows, "auto": auto or None}))
        return 0 if auto else 1
    print(f"{plan.manifest.path}: {human(plan.model_bytes)} of parameters to {device}\n")
    print(table(HEADER, *(_row(name, verdict) for name, verdict in verdicts.items())))
    print(f"\n{LEGEND}{OF_RANKS * plan.is_divided}\n")
    print(facts([
        ("host", budget.host.said),
        *([("swap", f"{human(budget.swap)}, not counted")] if budget.swap else []),
        *([("device", budget.device.said)] if device.type != "cpu" else []),
        ("auto", auto or "nothing fits"),
        *(("would fit", change) for change in fits),
        *((name, human(nbytes)) for name, nbytes in ranks.items()),
        *((name, human(value) if isinstance(value, int) else value) for name, value in away.items()),
    ]))  # fmt: skip
    print(_assumption(opened), end="")
    return 0 if auto else 1
