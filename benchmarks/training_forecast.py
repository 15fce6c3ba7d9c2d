"""`gpt2lite.forecast_training` beside what `finetune` takes, over random recipes, some with a teacher.

    python benchmarks/training_forecast.py --json benchmarks/results/training-forecast-cpu.json

Every recipe runs in a fresh process: a tiny model is trained the same way first, so that imports and kernels
are warm, then the model, which is built, trained for three steps with validation, samples and saved states,
and saved. Peaks are of anonymous memory above the imports. Exits with 1 where a forecast is off by more than
3 % and 24 MiB.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpt2lite import Batch, GPTConfig, GPTModel, Recipe, Task, finetune, forecast_training, track_memory
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import as_json, table

MIB = 1 << 20
SHARE, LEAST = 0.03, 24 * MIB  # a forecast may be off by the larger of the two
TINY = GPTConfig(100, 32, 16, 2, 2)


def random_case(seed: int) -> dict[str, Any]:
    """What `measure` needs: the fields of a config and of a recipe, a dtype, whether samples are written."""
    draw = random.Random(seed)
    head_dim, heads = draw.choice((32, 64)), draw.choice((4, 6, 8))
    n_classes = draw.choice((0, 0, 0, 3))
    tied = bool(draw.randrange(2)) and not n_classes
    context = draw.choice((128, 256, 512))
    config = {
        "vocab_size": draw.choice((2000, 8000, 20000, 50257)),
        "context_length": context,
        "emb_dim": head_dim * heads,
        "n_heads": heads,
        "n_layers": draw.randint(2, 6),
        "drop_rate": draw.choice((0.0, 0.0, 0.1)),
        "qkv_bias": bool(draw.randrange(2)),
        "tied_head": tied,
        "n_classes": n_classes,
        "head_bias": bool(n_classes),
    }
    trained = draw.choice(("all", "all", "lora", "lora", "blocks"))
    recipe = {
        "steps": 3,
        "validate_every": 1,
        "save_every": 1,
        "batch_size": draw.choice((1, 2, 4, 8)),
        "seq_len": draw.choice((context // 2, context)),
        "accumulate": draw.choice((1, 1, 2)),
        "autocast": bool(draw.randrange(2)),
        "recompute": bool(draw.randrange(2)),
        "chunked_loss": bool(draw.randrange(4)),
        "lora_rank": draw.choice((4, 8, 64)) if trained == "lora" else 0,
        "last_blocks": 1 if trained == "blocks" else None,
    }
    if draw.randrange(3) == 0:
        recipe |= {"step_in_backward": True, "clip": 0.0, "accumulate": 1}
    dtype = draw.choice(("float32", "float32", "bfloat16", "float16"))
    case = {"config": config, "recipe": recipe, "dtype": dtype, "sample": bool(draw.randrange(2))}
    if draw.randrange(3) == 0 and not n_classes:  # a teacher of twice the blocks
        recipe |= {"chunked_loss": True, "teacher_dtype": draw.choice(("float32", "bfloat16", "int8"))}
        case["teacher"] = {**config, "n_layers": 2 * config["n_layers"], "drop_rate": 0.0}
    return case


def with_its_teacher(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """The case with its teacher written into the folder, in fp32."""
    if "teacher" not in case:
        return case
    path = Path(folder) / "teacher.pth"
    GPTModel(GPTConfig(**case["teacher"])).save_checkpoint(path)
    return case | {"recipe": case["recipe"] | {"teacher": str(path)}}


# ---- in the fresh process ----------------------------------------------------------------------------------


def _batch(config: GPTConfig, recipe: Recipe, number: int) -> Batch:
    draw = torch.Generator().manual_seed(number)
    shape = (recipe.batch_size, recipe.seq_len or config.context_length)
    ids = torch.randint(config.vocab_size, shape, generator=draw)
    targets = ids.roll(-1, 1)
    if config.n_classes:
        targets = torch.full(shape, -100)
        targets[:, -1] = torch.randint(config.n_classes, shape[:1], generator=draw)
    return Batch(ids, targets)


def _run(config: GPTConfig, recipe: Recipe, dtype: torch.dtype, samples: bool, engine: str) -> None:
    def sample(model: GPTModel) -> str:
        return str(model.generate([[1, 2, 3]], 20, seed=0, engine=engine)[0].tolist())

    task = Task(
        lambda number: _batch(config, recipe, number),
        [_batch(config, recipe, -number) for number in (1, 2)],
        tuple("abc"[: config.n_classes]),
        sample if samples and not config.n_classes else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        finetune(GPTModel(config).to(dtype), task, folder, recipe)


def measure(case: dict[str, Any]) -> int:
    """Bytes that a case takes at its peak; this process must be fresh."""
    torch.manual_seed(0)
    config, recipe = GPTConfig(**case["config"]), Recipe(**case["recipe"])
    dtype, is_plain = getattr(torch, case["dtype"]), not recipe.lora_rank
    like = {"n_classes": config.n_classes, "head_bias": config.head_bias, "tied_head": config.tied_head}
    untaught = {"teacher": "", "teacher_dtype": "float32"}
    small = replace(recipe, batch_size=1, seq_len=16, **untaught)
    _run(replace(TINY, **like), small, dtype, case["sample"], "numba" if is_plain else "torch")
    with track_memory() as memory:
        _run(config, recipe, dtype, case["sample"], "auto")
    return memory.peak_host_anonymous


# ---- in the parent -----------------------------------------------------------------------------------------


def in_fresh_process(case: dict[str, Any]) -> int:
    """What `measure` found."""
    command = [sys.executable, __file__, "job", json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{case}: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout.splitlines()[-1])


def forecast_of(case: dict[str, Any]) -> dict[str, int]:
    """What `forecast_training` says of a case."""
    config, recipe = GPTConfig(**case["config"]), Recipe(**case["recipe"])
    return asdict(forecast_training(lambda: GPTModel(config), recipe, "cpu", getattr(torch, case["dtype"])))


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=50, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    found = []
    for seed in tqdm(range(args.seed, args.seed + args.cases), "training", leave=False, disable=None):
        case = random_case(seed)
        with tempfile.TemporaryDirectory(prefix="gpt2lite-") as folder:
            runs = with_its_teacher(case, folder)
            told, measured = forecast_of(runs), in_fresh_process(runs)
        off = told["peak"] - measured
        within = abs(off) <= max(SHARE * measured, LEAST)
        found.append({"seed": seed, **case, "forecast": told, "measured": measured, "within": within})
        if args.json:  # after every case: all of them take long
            args.json.write_text(as_json({"environment": environment(), "cases": found}) + "\n")
    rows = [
        (str(each["seed"]), f"{each['measured'] / MIB:.0f}", f"{each['forecast']['peak'] / MIB:.0f}",
         f"{(each['forecast']['peak'] - each['measured']) / MIB:+.0f}", "" if each["within"] else "NO")
        for each in found
    ]  # fmt: skip
    print(table(("seed", "measured MiB", "forecast MiB", "off MiB", ""), *rows))
    return 0 if all(each["within"] for each in found) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        print(measure(json.loads(sys.argv[2])))
        raise SystemExit(0)
    raise SystemExit(main())
