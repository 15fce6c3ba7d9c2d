"""What pruning, distilling and int8 make of a model: its size, its loss, its speed, in a table and a picture.

    python benchmarks/smaller_models.py --json benchmarks/results/smaller-embedded.json --plot smaller.png

Prunes the embedded model to half of its blocks in three ways (chosen by a held-out text, the first ones,
every second), finetunes each, and the chosen one also with the whole model as its teacher; every run has the
same steps, data and seeds, but "finetuned as long" has as many steps as fit in the seconds that distilling
takes. Losses are of stories that no run has read, in nats per token, medians over the seeds. A row is one
story, from its beginning, as the embedded model learned them. Exits with 1 unless the chosen blocks end at
or below the others and the distilled model 5 % below the finetuned one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

import gpt2lite
from gpt2lite import GPTModel, Recipe
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import as_json, steps_bar, table
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning.data import Batch, Example, example_batches, example_windows
from gpt2lite.finetuning.loop import validate
from gpt2lite.finetuning.states import Task
from gpt2lite.tokenizer import tokenizer_for

STORIES = Path(__file__).resolve().parent.parent / "scripts"
KEPT = {"chosen": None, "first blocks": [0, 1], "every second": [0, 2]}


@dataclass(frozen=True)
class Row:
    """One model: seconds are those of its training."""

    name: str
    parameters: int
    nbytes: int
    losses: tuple[float, ...]
    tokens_per_second: float
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """In the middle of the seeds."""
        return median(self.losses)


def stories(seed: int, count: int) -> list[Example]:
    """So many stories, a row each, up to the whole context."""
    program = f"import json, stories; print(json.dumps([*stories.stories({seed}, {count})]))"
    command = [sys.executable, "-c", program]
    texts = subprocess.run(command, capture_output=True, text=True, check=True, cwd=STORIES).stdout
    encoding = tokenizer_for(EMBEDDED, 1024)
    end = encoding.eot_token
    rows = ([end, *encoding.encode(text), end][:257] for text in json.loads(texts))
    return [Example(row[:-1], row[1:]) for row in rows]


def described(name: str, models: Sequence[GPTModel], held_out: Sequence[Batch], seconds: float = 0.0) -> Row:
    """A row of one model, or of the same with several seeds."""
    distinct = {id(tensor): tensor for tensor in models[0].state_dict(keep_vars=True).values()}.values()
    numbers = sum(tensor.numel() for tensor in models[0].parameters())
    began = time.perf_counter()
    losses = tuple(validate(model, held_out, Recipe(chunked_loss=False))[0] for model in models)
    count = len(models) * sum(batch.ids.numel() for batch in held_out)
    speed = count / (time.perf_counter() - began)
    return Row(name, numbers, sum(tensor.nbytes for tensor in distinct), losses, speed, seconds)


def trained(path: Path, folder: Path, rows: Sequence[Example], recipe: Recipe) -> tuple[Path, float]:
    """Where a checkpoint is after training, and the seconds it took."""
    model = GPTModel.from_checkpoint(path, dtype=torch.float32)
    batches = example_batches(rows, recipe.batch_size, recipe.seed)
    began = time.perf_counter()
    found = gpt2lite.finetune(model, Task(batches, []), folder, recipe)
    return found, time.perf_counter() - began


def rows_of(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Every row of the table."""
    held_out = example_windows(stories(2, args.held_out), 8)
    chosen_by = torch.tensor([token for row in stories(3, 10) for token in row.ids])
    tokens = stories(1, args.stories)
    whole = GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32)
    rows = [described("whole", [whole], held_out)]
    recipe = Recipe(steps=args.steps, batch_size=8, learning_rate=1e-3, save_every=args.steps)
    kept = KEPT | {"chosen": list(gpt2lite.choose_blocks(whole, chosen_by, 2).kept)}
    for name, blocks in kept.items():
        pruned = GPTModel.from_checkpoint(
            gpt2lite.prune(EMBEDDED, folder / f"{name}.pth", blocks=blocks), dtype=torch.float32
        )
        rows.append(described(f"pruned: {name} {blocks}", [pruned], held_out))
    distilling = replace(recipe, teacher=str(EMBEDDED), alpha=args.alpha, temperature=args.temperature)
    work = [(name, "finetuned", recipe) for name in kept] + [("chosen", "distilled", distilling)]
    with steps_bar([""] * (len(work) + 1) * len(args.seeds), "training") as bar:

        def over_seeds(name: str, what: str, recipe: Recipe) -> list[Path]:
            """Trains with every seed, adds the row; where the models are."""
            runs = []
            for seed in args.seeds:
                out = folder / f"{name}, {what} {seed}"
                runs.append(trained(folder / f"{name}.pth", out, tokens, replace(recipe, seed=seed)))
                bar.update()
            ends, seconds = zip(*runs, strict=True)
            models = [GPTModel.from_checkpoint(end, dtype=torch.float32) for end in ends]
            rows.append(described(f"{name}, {what}", models, held_out, median(seconds)))
            return list(ends)

        distilled = [over_seeds(*run) for run in work][-1]
        seconds = {row.name: row.seconds for row in rows}
        ratio = seconds["chosen, distilled"] / seconds["chosen, finetuned"]
        as_long = replace(recipe, steps=round(recipe.steps * ratio))
        over_seeds("chosen", f"finetuned as long ({as_long.steps} steps)", as_long)
    small = [GPTModel.from_checkpoint(end, quantize="int8") for end in distilled]
    return [*rows, described("chosen, distilled, int8", small, held_out)]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Loss over bytes."""
    from gpt2lite.cli.bench import _axes

    labels = {"xlabel": "MiB of weights", "ylabel": "nats per token of a text that was not read"}
    with _axes(path, title="Smaller embedded models", **labels) as axes:
        for at, row in enumerate(rows):  # smaller dots last: some lie on each other
            axes.plot(row.nbytes / 2**20, row.loss, "o", markersize=14 - at, label=row.name)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


def main() -> int:
    """Train, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--stories", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpt2lite-") as folder:
        rows = rows_of(args, Path(folder))
    lines = [("model", "parameters", "MiB", "loss", "least", "most", "tokens/s", "trained s")]
    for row in rows:
        ends = f"{min(row.losses):.3f}", f"{max(row.losses):.3f}"
        sizes = f"{row.parameters:,}", f"{row.nbytes / 2**20:.2f}"
        lines.append(
            (row.name, *sizes, f"{row.loss:.3f}", *ends, f"{row.tokens_per_second:.0f}", f"{row.seconds:.0f}")
        )
    print(table(*lines))
    if args.json:
        record = {"environment": environment(), "arguments": {k: str(v) for k, v in vars(args).items()}}
        args.json.write_text(as_json(record | {"rows": [asdict(row) for row in rows]}) + "\n")
    if args.plot:
        plot(rows, args.plot)
    by_name = {row.name: row.loss for row in rows}
    plain = by_name["chosen, finetuned"]
    fails = [name for name in KEPT if by_name[f"{name}, finetuned"] < plain]
    distilled = by_name["chosen, distilled"] / plain
    print(json.dumps({"distilled / finetuned": round(distilled, 3), "better than chosen": fails}))
    return 1 if fails or distilled > 0.95 else 0


if __name__ == "__main__":
    sys.exit(main())
