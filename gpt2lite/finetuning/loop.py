"""The run: step after step, measured, kept, and taken up again where it was cut."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from gpt2lite.checkpoint.writing import replacing
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.finetuning.data import Batch, Batches
from gpt2lite.finetuning.lora import lora_layers, merge_lora, save_lora
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.training import Trainer, choose_trained, loss_sum, placed, rows_of

METRICS, FINAL = "metrics.jsonl", "model.pth"


@dataclass(frozen=True)
class Task:
    """What is learned: batch number n for training, batches to validate with, and how to see it.

    `sample` writes a text with the model as it is; `labels` names a classifier's classes.
    """

    train: Batches
    validation: Sequence[Batch]
    labels: tuple[str, ...] = ()
    sample: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Metrics:
    """One step: loss in nats a target, norm of the gradient (0 where it is not known), bytes in use.

    memory: of the process on the CPU, on CUDA the most that torch has allocated there.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    memory: int
    validation_loss: float | None = None
    accuracy: float | None = None
    sample: str | None = None


@dataclass(frozen=True)
class Rhythm:
    """Every how many steps to validate and to save, and how many saved states to keep."""

    validate_every: int = 50
    save_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} must be an int of at least 1, got {value!r}")


def as_classifier(model: Any, n_classes: int, seed: int = 0) -> None:
    """Put a new head of n_classes rows, with a bias, in the place of the vocabulary's (the book, ch. 6)."""
    C, like = model.config.emb_dim, model.pos_emb.weight
    generator = torch.Generator().manual_seed(seed)
    model.config = replace(model.config, n_classes=n_classes, head_bias=True, tied_head=False)
    head = nn.Linear(C, n_classes, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.empty(n_classes, C).normal_(0.0, 0.02, generator=generator))
        head.bias.zero_()
    model.out_head = head


@torch.no_grad()
def validate(model: Any, batches: Sequence[Batch], recipe: Recipe) -> tuple[float, float | None]:
    """(loss in nats a target, share of right classes or None) over all batches."""
    total, right, count = 0.0, 0, 0
    for batch in batches:
        ids, places, targets = placed(batch, model.pos_emb.weight.device)
        total += float(loss_sum(model, ids, places, targets, recipe))
        count += len(targets)
        if model.config.n_classes:
            right += int((model.out_head(rows_of(model, ids, places)).argmax(-1) == targets).sum())
    return total / count, right / count if model.config.n_classes else None


# ---- what is kept ------------------------------------------------------------------------------------------


def _state_files(out: Path) -> list[Path]:
    return sorted(out.glob("step-*.pth"))


def _save_state(trainer: Trainer, out: Path, step: int, keep: int) -> None:
    """Everything that the next step depends on, whole or not at all; the oldest are taken away."""
    path = out / f"step-{step:06}.pth"
    content = {
        "model": {name: p.detach() for name, p in trainer.trained.items()},
        "optimizer": trainer.state(),
        "step": step,
        "config": trainer.model.config.as_dict(),
        "recipe": asdict(trainer.recipe),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
    for old in _state_files(out)[:-keep]:
        old.unlink()


def _restore(trainer: Trainer, out: Path) -> int:
    """Go on from the latest state; returns the number of the next step, 0 where there is none yet."""
    files = _state_files(out)
    if not files:
        return 0
    saved: Any = torch.load(files[-1], map_location="cpu", weights_only=True)
    recipe = asdict(trainer.recipe)
    changed = [
        f"{key}={saved['recipe'].get(key)!r}" for key in recipe if saved["recipe"].get(key) != recipe[key]
    ]
    if changed:
        raise UsageError(f"{files[-1]}: was made with {', '.join(changed)}; resume with the same")
    if saved["model"].keys() != trainer.trained.keys():
        raise CheckpointError(f"{files[-1]}: holds other weights than this model trains; give the same model")
    with torch.no_grad():
        for name, parameter in trainer.trained.items():
            parameter.copy_(saved["model"][name])
    trainer.restore(saved["optimizer"])
    return int(saved["step"])


def _open_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise UsageError(f"{out}: is not empty; name another folder, or go on there with resume (--resume)")
    out.mkdir(parents=True, exist_ok=True)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """What was written to a run's folder, a dict a step."""
    path = out / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _cut_metrics(out: Path, step: int) -> None:
    """Forget the steps that will be made again."""
    kept = [json.dumps(each) + "\n" for each in read_metrics(out) if each["step"] < step]
    with replacing(out / METRICS) as temporary:
        temporary.write_text("".join(kept))


def _save_final(model: Any, out: Path) -> Path:
    """The model as `from_checkpoint` opens it; adapters alone beside it, then merged into it."""
    if any(True for _ in lora_layers(model)):
        save_lora(model, out / "adapters.pth")
        merge_lora(model)
    path: Path = model.save_checkpoint(out / FINAL)
    return path


# ---- the loop ----------------------------------------------------------------------------------------------


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never cut in its middle; only the main thread can."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _require_task(model: Any, task: Task, recipe: Recipe) -> None:
    n_classes = model.config.n_classes
    if n_classes != len(task.labels):
        raise UsageError(
            f"the model's head has {n_classes} classes, the task {len(task.labels)}; "
            + ("text needs a model with a language head" if n_classes else "gpt2lite.as_classifier makes one")
        )
    if any(p.dtype == torch.int8 for p in model.parameters()):
        raise UsageError("an int8 model does not train; load it without quantize")
    if recipe.seq_len is not None and recipe.seq_len > model.config.context_length:
        raise UsageError(
            f"seq_len={recipe.seq_len} is more than the context of {model.config.context_length}"
        )


def finetune(
    model: Any,
    task: Task,
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    rhythm: Rhythm | None = None,
    resume: bool = False,
    report: Callable[[Metrics], None] | None = None,
) -> Path:
    """Train a loaded model, and return where it is now: `out`/model.pth, which `from_checkpoint` opens.

    The model is changed in place, adapters merged at the end. `out` also gets metrics.jsonl (a line a step),
    adapters.pth (LoRA alone, with its alpha), and step-….pth, of which `resume` takes the latest: a run that
    was cut at any step and resumed, with the same model, task and recipe, ends with the same bits on the
    CPU. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. `report` is called after each step.

    Costs what `gpt2lite.forecast_training` says. Raises UsageError for what cannot work before anything is
    written, TrainingDivergedError where a loss is not a number; the last saved state stays.
    """
    out, recipe, rhythm = Path(out), recipe or Recipe(), rhythm or Rhythm()
    _require_task(model, task, recipe)
    if not resume or not _state_files(out):
        _open_folder(out, resume)
    choose_trained(model, recipe)
    trainer = Trainer(model, recipe)
    try:
        start = _restore(trainer, out)
        _cut_metrics(out, start)
        with _interruptible() as asked, (out / METRICS).open("a") as file:
            for number in range(start, recipe.steps):
                metrics = _one(trainer, task, number, rhythm)
                file.write(json.dumps({k: v for k, v in asdict(metrics).items() if v is not None}) + "\n")
                file.flush()
                if report:
                    report(metrics)
                is_last = number + 1 == recipe.steps
                if asked.is_set() or is_last or (number + 1) % rhythm.save_every == 0:
                    _save_state(trainer, out, number + 1, rhythm.keep)
                if asked.is_set() and not is_last:
                    raise KeyboardInterrupt
    finally:
        trainer.close()
    return _save_final(model, out)


def _one(trainer: Trainer, task: Task, number: int, rhythm: Rhythm) -> Metrics:
    """One step, and what is to be seen after it."""
    recipe, model = trainer.recipe, trainer.model
    began = time.perf_counter()
    batches = [task.train(number * recipe.accumulate + part) for part in range(recipe.accumulate)]
    loss, norm = trainer.step(number, batches)
    seconds = time.perf_counter() - began
    tokens = sum(batch.ids.numel() for batch in batches)
    seen: dict[str, Any] = {}
    if task.validation and ((number + 1) % rhythm.validate_every == 0 or number + 1 == recipe.steps):
        seen["validation_loss"], seen["accuracy"] = validate(model, task.validation, recipe)
        seen["sample"] = task.sample(model) if task.sample else None
    return Metrics(
        step=number,
        loss=loss,
        learning_rate=recipe.learning_rate_at(number),
        gradient_norm=norm,
        tokens_per_second=tokens / seconds,
        memory=_memory(trainer.device),
        **seen,
    )
