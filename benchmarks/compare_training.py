"""Optimisation steps: our levers beside a transformers loop, their memory beside what was foretold.

    python benchmarks/compare_training.py --json benchmarks/results/training-cpu-gpt2.json

Every run is a fresh process: it trains something tiny the same way, then the model for a few steps; peaks are
above the imports, of everything from building the model on; seconds are the median of the steps but the
first. Runs of different contenders take turns, medians are compared. Exits with 1 where something is not as
wanted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpt2lite import GPTConfig, GPTModel, track_memory
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import as_json, steps_bar, table
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.finetuning.data import Batch
from gpt2lite.finetuning.forecast import forecast_training
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.training import Trainer, choose_trained

MIB = 1 << 20
STEPS = 4
TINY = GPTConfig(100, 32, 16, 2, 2, tied_head=True)
LEAN = {"recompute": True, "step_in_backward": True, "clip": 0.0}
# name → (levers, rows, tokens a row); the last two are the head alone: one block trained, one long row
OURS: dict[str, tuple[dict[str, Any], int, int]] = {
    "plain": ({}, 4, 256),
    "chunked_loss off": ({"chunked_loss": False}, 4, 256),
    "recompute": ({"recompute": True}, 4, 256),
    "step_in_backward": ({"step_in_backward": True, "clip": 0.0}, 4, 256),
    "both": (LEAN, 4, 256),
    "accumulate 2": ({"accumulate": 2}, 2, 256),
    "autocast": ({"autocast": True}, 4, 256),
    "lora": ({"lora_rank": 8}, 4, 256),
    "lora, recompute": ({"lora_rank": 8, "recompute": True}, 4, 256),
    "last block": ({"last_blocks": 1}, 1, 1024),
    "last block, chunked_loss off": ({"last_blocks": 1, "chunked_loss": False}, 1, 1024),
}
PEER = "transformers"


# ---- in the fresh process ----------------------------------------------------------------------------------


def recipe_of(name: str) -> Recipe:
    """The recipe of one of OURS."""
    levers, batch_size, seq_len = OURS[name]
    return Recipe(batch_size=batch_size, seq_len=seq_len, **levers)


def ours(name: str, config: GPTConfig, steps: int) -> list[float]:
    """Seconds of each step of our trainer on random tokens."""
    recipe, shrunk = recipe_of(name), config == TINY
    model = GPTModel(config)
    choose_trained(model, recipe)
    trainer, seconds = Trainer(model, recipe), []
    ids = torch.randint(config.vocab_size, (recipe.batch_size, 17 if shrunk else (recipe.seq_len or 0) + 1))
    for step in range(steps):
        began = time.perf_counter()
        trainer.step(step, [Batch(ids[:, :-1], ids[:, 1:])] * recipe.accumulate)
        seconds.append(time.perf_counter() - began)
    return seconds


def peer(config: GPTConfig, steps: int) -> list[float]:
    """The same with transformers' model, its own loss, and torch's fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": config.emb_dim, "n_head": config.n_heads, "n_layer": config.n_layers}
    shape |= {"vocab_size": config.vocab_size, "n_positions": config.context_length}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, bos_token_id=0, eos_token_id=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids, seconds = torch.randint(config.vocab_size, (4, 16 if config == TINY else 256)), []
    for _ in range(steps):
        began = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(name: str, size: str) -> dict[str, Any]:
    """Train in this process, which must be fresh."""
    config = GPTConfig.named(size)
    run = peer if name == PEER else lambda config, steps: ours(name, config, steps)
    run(TINY, 2)
    with track_memory() as memory:
        seconds = run(config, STEPS)
    return {"seconds": median(seconds[1:]), "peak": memory.peak_host_anonymous}


# ---- in the parent -----------------------------------------------------------------------------------------


def in_fresh_process(name: str, size: str) -> dict[str, Any]:
    """What `measure` found."""
    command = [sys.executable, __file__, "job", name, size]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name}: {result.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def verdicts(
    found: dict[str, dict[str, float]], foretold: dict[str, int]
) -> Iterator[tuple[str, float, float, bool]]:
    """(what, found, wanted, whether it is had)."""
    plain, them = found["plain"], found[PEER]
    speed = them["seconds"] / plain["seconds"]
    yield "tokens/s / transformers', plain", speed, 1.0, speed >= 1.0
    for name, most in (("plain", 0.72), ("both", 0.55)):
        ratio = found[name]["peak"] / them["peak"]
        yield f"peak / transformers', {name}", ratio, most, ratio <= most
    whole, chunked = found["last block, chunked_loss off"], found["last block"]
    slower = chunked["seconds"] / whole["seconds"]
    yield "seconds of the chunked loss / the whole", slower, 1.2, slower <= 1.2
    rest = foretold["last block, rest"]
    share = (whole["peak"] - rest) / max(chunked["peak"] - rest, 1)
    yield "the logits' share of the peak, whole / chunked", share, 4.0, share >= 4.0
    for name, nbytes in foretold.items():
        if name in OURS:
            off = nbytes / found[name]["peak"] - 1
            yield f"forecast / measured - 1, {name}", off, 0.1, abs(off) <= 0.1


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=OFFICIAL_SIZES, default="gpt2")
    parser.add_argument("--runs", type=int, default=3, help="of each (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*OURS, PEER], default=[*OURS, PEER], metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    config = GPTConfig.named(args.size)
    forecasts = {name: forecast_training(lambda: GPTModel(config), recipe_of(name)) for name in OURS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    with steps_bar([""] * (args.runs * len(runs)), "training") as bar:
        for _ in range(args.runs):
            for name in runs:
                bar.set_postfix_str(name)
                runs[name].append(in_fresh_process(name, args.size))
                bar.update()
    found = {
        name: {key: median(each[key] for each in some) for key in ("seconds", "peak")}
        for name, some in runs.items()
    }
    lines = [("", "s a step", "tokens/s", "peak MiB", "forecast MiB")]
    for name, each in found.items():
        levers, batch, seq_len = OURS.get(name, ({}, 4, 256))
        tokens = batch * seq_len * levers.get("accumulate", 1)
        told = f"{forecasts[name].peak / MIB:.0f}" if name in forecasts else "–"
        lines.append(
            (
                name,
                f"{each['seconds']:.2f}",
                f"{tokens / each['seconds']:.0f}",
                f"{each['peak'] / MIB:.0f}",
                told,
            )
        )
    print(table(*lines))
    print(f"\n{args.size} on the CPU, {args.runs} runs of {STEPS} steps; peaks above the imports.")
    kept = []
    if set(args.only) == {*OURS, PEER}:
        foretold = {name: each.peak for name, each in forecasts.items()}
        last = forecasts["last block"]
        foretold["last block, rest"] = last.peak - last.logits
        for what, value, wanted, had in verdicts(found, foretold):
            print(f"{what}: {value:.2f}, wanted {wanted:.2f}: {'yes' if had else 'NO'}")
            kept.append({"what": what, "found": value, "wanted": wanted, "had": had})
    if args.json:
        content = {"environment": environment(), "size": args.size, "runs": runs, "verdicts": kept}
        args.json.write_text(as_json(content) + "\n")
    return 0 if all(each["had"] for each in kept) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        print(json.dumps(measure(*sys.argv[2:])))
        raise SystemExit(0)
    raise SystemExit(main())
