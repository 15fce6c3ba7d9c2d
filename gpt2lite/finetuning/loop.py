"""The run: step after step, measured, kept, and taken up again where it was cut."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from gpt2lite.devices import peak_allocated
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.finetuning.data import IGNORED, Batch, check_batch
from gpt2lite.finetuning.lora import merge_lora, save_lora
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import (
    Log,
    Metrics,
    Rhythm,
    Run,
    Task,
    identity_of,
    newest_state,
    restore,
    save_state,
    state_files,
)
from gpt2lite.finetuning.training import Trainer, choose_trained, loss_sum, placed, prepared, rows_of

METRICS, FINAL, LABELS = "metrics.jsonl", "model.pth", "labels.json"


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
def relabel(model: Any, known: Sequence[str], labels: Sequence[str], seed: int = 0) -> list[str]:
    """Give a classifier of the classes `known` a new head for `labels`; returns the labels it knew already.

    Their rows are the old head's, the others are drawn as `as_classifier` draws them.
    """
    old, kept = model.out_head, [label for label in labels if label in known]
    as_classifier(model, len(labels), seed)
    for label in kept:
        new_row, row = labels.index(label), known.index(label)
        model.out_head.weight[new_row] = old.weight[row]
        model.out_head.bias[new_row] = 0.0 if old.bias is None else old.bias[row]
    return kept


def read_labels(checkpoint: Path) -> tuple[str, ...]:
    """What the classes of a finetuned classifier are called, from labels.json or the states beside it.

    () where nothing says it. Raises CheckpointError where labels.json is damaged or is another run's.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path, state = folder / LABELS, newest_state(folder)
    known = state[1]["made_from"]["labels"] if state else []
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else known
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise CheckpointError(path, "wanted a JSON list of the classes' labels, in the order of the head")
    if state and found != known:
        raise CheckpointError(
            path, f"says {', '.join(found)}, {state[0].name} says {', '.join(known)}. Is it another run's?"
        )
    return tuple(found)


@torch.no_grad()
def validate(model: Any, batches: Sequence[Batch], recipe: Recipe) -> tuple[float, float | None]:
    """(loss in nats a target, share of right classes or None) over all batches."""
    total, right, count = 0.0, 0, 0
    for batch in batches:
        ids, places, targets = placed(batch, model)
        total += float(loss_sum(model, ids, places, targets, recipe))
        count += len(targets)
        if model.config.n_classes:
            right += int((model.out_head(rows_of(model, ids, places)).argmax(-1) == targets).sum())
    return total / count, right / count if model.config.n_classes else None


def _require_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder")
    if resume and not (out / METRICS).is_file() and not state_files(out):
        raise UsageError(
            f"{out}: no run to resume there. Check its name, or start one without resume (--resume)"
        )
    if not resume and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: is not empty; name another folder, or go on there with resume (--resume)")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """What was written to a run's folder, a dict a step; a last line that is being written is left out."""
    path = out / METRICS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


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
    if device.type != "cpu":
        return peak_allocated(device)
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
    for batch in (task.train(0), *task.validation):
        check_batch(batch, model.config)
    if task.validation and all(bool((batch.targets == IGNORED).all()) for batch in task.validation):
        raise UsageError(f"every target of the validation is {IGNORED}, so none counts")


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

    The model is changed in place, adapters merged at the end. It trains in fp32 where it is of 16 bits, and
    is saved in the dtype that it came in (`prepared`); what was frozen stays so. `out` also gets
    metrics.jsonl (a line a step), adapters.pth (what LoRA trained, with its alpha), a classifier's
    labels.json, and step-….pth, of which `resume` takes the newest whole one: a run that was cut at any step
    and resumed, with the same model, task and recipe, ends with the same bits on the CPU. Resuming with
    another model, other data or another recipe is refused; `steps` may grow and the learning rate may be
    another, with a warning. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. `report` is called
    after each step; an error of `task.sample` is raised after the step is saved.

    Costs what `gpt2lite.forecast_training` says. Raises UsageError for what cannot work before anything is
    written, CheckpointError where what was saved is damaged, TrainingDivergedError where a loss is not a
    number; the last saved state stays.
    """
    out, recipe, rhythm = Path(out), recipe or Recipe(), rhythm or Rhythm()
    _require_task(model, task, recipe)
    _require_folder(out, resume)
    identity = identity_of(model, task, recipe)
    with prepared(model):
        choose_trained(model, recipe)
        trainer = Trainer(model, recipe)
        try:
            out.mkdir(parents=True, exist_ok=True)
            _go_on(Run(trainer, task, out, rhythm, identity), report)
        finally:
            trainer.close()
        if recipe.lora_rank:
            save_lora(trainer.trained, recipe.lora_alpha, out / "adapters.pth")
            merge_lora(model)
    path: Path = model.save_checkpoint(out / FINAL)
    if task.labels:
        (out / LABELS).write_text(json.dumps(task.labels) + "\n", encoding="utf-8")
    return path


def _go_on(run: Run, report: Callable[[Metrics], None] | None) -> None:
    """All steps from the newest state on."""
    steps, every = run.trainer.recipe.steps, run.rhythm.save_every
    start, known = restore(run)
    (run.out / METRICS).touch()
    with _interruptible() as asked, (run.out / METRICS).open("r+b") as file:
        log = Log(file, known)
        for number in range(start, steps):
            metrics, is_whole, is_last = _one(run, number), False, number + 1 == steps
            try:
                metrics, is_whole = replace(metrics, **_seen(run, number)), True
            finally:  # nothing that only looks at the model may cost its steps
                log.write(metrics)
                if not is_whole or asked.is_set() or is_last or (number + 1) % every == 0:
                    save_state(run, log, number + 1)
            if report:
                report(metrics)
            if asked.is_set() and not is_last:
                raise KeyboardInterrupt


def _one(run: Run, number: int) -> Metrics:
    """One step."""
    recipe, began = run.trainer.recipe, time.perf_counter()
    batches = [run.task.train(number * recipe.accumulate + part) for part in range(recipe.accumulate)]
    loss, norm = run.trainer.step(number, batches)
    return Metrics(
        step=number,
        loss=loss,
        learning_rate=recipe.learning_rate_at(number),
        gradient_norm=norm,
        tokens_per_second=sum(batch.ids.numel() for batch in batches) / (time.perf_counter() - began),
        memory=_memory(run.trainer.device),
    )


def _seen(run: Run, number: int) -> dict[str, Any]:
    """What is to be seen after a step."""
    task, model, recipe = run.task, run.trainer.model, run.trainer.recipe
    is_due = (number + 1) % run.rhythm.validate_every == 0 or number + 1 == recipe.steps
    if not task.validation or not is_due:
        return {}
    loss, accuracy = validate(model, task.validation, recipe)
    sample = task.sample(model) if task.sample else None
    return {"validation_loss": loss, "accuracy": accuracy, "sample": sample}
