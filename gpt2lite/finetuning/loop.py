"""The run: step after step, measured, kept, and taken up again where it was cut."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
from torch import nn

from gpt2lite.checkpoint import side_file
from gpt2lite.checkpoint.chunks import tensors_of
from gpt2lite.checkpoint.writing import read_side_fields, replacing, write_side_fields
from gpt2lite.errors import CheckpointError, UsageError, first_line
from gpt2lite.finetuning.data import IGNORED, Batch, Batches, check_batch, digest_of, tensor_parts
from gpt2lite.finetuning.lora import merge_lora, save_lora
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.training import Trainer, choose_trained, loss_sum, placed, prepared, rows_of

METRICS, FINAL, LABELS = "metrics.jsonl", "model.pth", "labels.json"
STATE_NAME = re.compile(r"step-(\d+)\.pth")
MAY_CHANGE = ("steps", "learning_rate")  # when a run is resumed; steps may only grow
OTHERS = {"base": "another model (give it as it was before the run)", "data": "other data"}


@dataclass(frozen=True)
class Task:
    """What is learned: batch number n for training, batches to validate with, and how to see it.

    `sample` writes a text with the model as it is; `labels` names a classifier's classes; `digest` stands
    for all the data, so that a run is not resumed with other data (a few batches are compared in any case).
    """

    train: Batches
    validation: Sequence[Batch]
    labels: tuple[str, ...] = ()
    sample: Callable[[Any], str] | None = None
    digest: str = ""


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
    """What the classes of a classifier are called, from beside it; () where nothing says it.

    Raises CheckpointError where labels.json is damaged or is another model's.
    """
    fields = read_side_fields(checkpoint)
    path = side_file(checkpoint, ".json").with_name(LABELS)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else fields.get("labels", [])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise CheckpointError(f"{path}: wanted a JSON list of the classes' labels, in the order of the head")
    if fields.get("labels", found) != found:
        raise CheckpointError(
            f"{path}: says {', '.join(found)}, {side_file(checkpoint, '.json').name} says "
            f"{', '.join(fields['labels'])}. Is it another model's?"
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


# ---- what is kept ------------------------------------------------------------------------------------------


def _identity(model: Any, task: Task, recipe: Recipe) -> dict[str, Any]:
    """What a run was made from, which it must be resumed with: digests of the whole model and of the data.

    All of a model's bytes are read (a second for each GB or two), since one that differs in a single row
    would end as another.
    """
    tensors = tensors_of(model.state_dict())
    base = [f"{model.config} " + "".join(f"{t.name} {t.dtype} {t.shape} {t.shares};" for t in tensors)]
    weights = (chunk for tensor in tensors if not tensor.shares for chunk in tensor.chunks())
    return {
        "base": digest_of([base[0].encode()], weights),
        "data": digest_of(
            [f"{task.digest} {task.labels}".encode()], tensor_parts(*task.train(0), *sum(task.validation, ()))
        ),
        "recipe": asdict(recipe),
    }


def _number(path: Path) -> int:
    """The step of a state's name, -1 where it is none."""
    found = STATE_NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _state_files(out: Path) -> list[Path]:
    return sorted((path for path in out.glob("step-*.pth") if _number(path) >= 0), key=_number)


def _last_batch(task: Task, recipe: Recipe, step: int) -> str:
    return digest_of(tensor_parts(*task.train(step * recipe.accumulate - 1)))


@dataclass(frozen=True)
class _Run:
    """A run as it goes: what it trains and from what, where to, how often it saves."""

    trainer: Trainer
    task: Task
    out: Path
    rhythm: Rhythm
    identity: dict[str, Any]


def _save_state(run: _Run, log: _Log, step: int) -> None:
    """Everything that the next step depends on, whole or not at all; the oldest are taken away."""
    path, trainer = run.out / f"step-{step:06}.pth", run.trainer
    content = {
        "model": {name: p.detach() for name, p in trainer.trained.items()},
        "optimizer": trainer.state(),
        "step": step,
        "made_from": run.identity,
        "last_batch": _last_batch(run.task, trainer.recipe, step),
        "log": log.known(),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
    _write_fields(path, trainer.model, run.task)
    older = [file for file in _state_files(run.out) if _number(file) <= step]
    for old in older[: -run.rhythm.keep]:
        old.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)


def _write_fields(path: Path, model: Any, task: Task) -> None:
    labels = {"labels": list(task.labels)} if task.labels else {}
    write_side_fields(path, model.config.as_dict() | labels)


def _read_state(path: Path) -> dict[str, Any]:
    """A saved state, mapped. Raises CheckpointError for one that is not whole, or not what its name says."""
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, _ = saved["step"], (saved["model"], saved["optimizer"])
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(f"{path}: not a whole saved state ({first_line(error)})") from None
    if "made_from" not in saved:
        raise CheckpointError(
            f"{path}: saved by an older gpt2lite, which did not keep what a run was made from; "
            "start the run again in another folder"
        )
    if step != _number(path):
        raise CheckpointError(f"{path}: holds the state of step {step}; has it been renamed?")
    return dict(saved)


def _newest_state(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole one, with a warning where a newer one is damaged; None where there are none at all."""
    damaged: CheckpointError | None = None
    for path in reversed(_state_files(out)):
        try:
            saved = _read_state(path)
        except CheckpointError as error:
            damaged = damaged or error
            continue
        if damaged:
            warnings.warn(f"{damaged}. Going on from {path.name}, the newest whole one", stacklevel=2)
        return path, saved
    if damaged:
        raise damaged
    return None


def saved_recipe(out: Path) -> dict[str, Any]:
    """The recipe, as a dict, of the run in a folder; {} where nothing is saved there."""
    found = _newest_state(out)
    return dict(found[1]["made_from"]["recipe"]) if found else {}


def _require_same(path: Path, saved: dict[str, Any], run: _Run) -> None:
    """Refuse to go on with another model, data or recipe than a state's; say what differs and may."""
    was, now = saved["made_from"], run.identity
    last_batch = _last_batch(run.task, run.trainer.recipe, saved["step"])
    others = {key for key in OTHERS if was[key] != now[key]}
    others |= {"data"} if last_batch != saved["last_batch"] else set()
    changed = {key: value for key, value in was["recipe"].items() if now["recipe"].get(key) != value}
    fewer = now["recipe"]["steps"] < was["recipe"]["steps"]
    said = [f"{key}={value!r}" for key, value in changed.items()]
    if others or fewer or set(changed) - set(MAY_CHANGE):
        said += [OTHERS[key] for key in sorted(others)]
        raise UsageError(f"{path}: was made with {', '.join(said)}; resume with the same")
    if said:
        new = ", ".join(f"{key}={now['recipe'][key]!r}" for key in changed)
        warnings.warn(
            f"{path}: was made with {', '.join(said)}; from step {saved['step']} on it is {new}, and the "
            "learning rate falls along the new curve",
            stacklevel=2,
        )


def _restore(run: _Run) -> tuple[int, tuple[int, str]]:
    """Go on from the newest state: (the next step, how much of the log it knew), zeros if there is none."""
    found = _newest_state(run.out)
    if found is None:
        return 0, (0, digest_of())
    path, saved = found
    _require_same(path, saved, run)
    shapes = {name: tensor.shape for name, tensor in saved["model"].items()}
    if shapes != {name: p.shape for name, p in run.trainer.trained.items()}:
        raise CheckpointError(f"{path}: holds other weights than this model trains; give the same model")
    with torch.no_grad():
        for name, parameter in run.trainer.trained.items():
            parameter.copy_(saved["model"][name])
    run.trainer.restore(saved["optimizer"])
    return int(saved["step"]), saved["log"]


def _require_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder")
    if resume and not (out / METRICS).is_file() and not _state_files(out):
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


class _Log:
    """metrics.jsonl, from what a state knew of it on: the lines of steps that are made again are cut off."""

    def __init__(self, file: BinaryIO, known: tuple[int, str]) -> None:
        nbytes, digest = known
        content = file.read()
        if content and digest != digest_of([content[:nbytes]]):
            raise CheckpointError(
                f"{file.name}: is not what this run had written until its last saved state; "
                "move it away to resume without it"
            )
        file.truncate(nbytes if content else 0)
        file.seek(0, os.SEEK_END)
        self.file, self.digest = file, hashlib.sha256(content[:nbytes])

    def write(self, metrics: Metrics) -> None:
        """Add a line."""
        line = json.dumps({k: v for k, v in asdict(metrics).items() if v is not None}) + "\n"
        self.file.write(line.encode())
        self.file.flush()
        self.digest.update(line.encode())

    def known(self) -> tuple[int, str]:
        """(bytes, digest) of what was written until now, on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell(), self.digest.hexdigest()


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
    identity = _identity(model, task, recipe)
    with prepared(model):
        choose_trained(model, recipe)
        trainer = Trainer(model, recipe)
        try:
            out.mkdir(parents=True, exist_ok=True)
            _go_on(_Run(trainer, task, out, rhythm, identity), report)
        finally:
            trainer.close()
        if recipe.lora_rank:
            save_lora(trainer.trained, recipe.lora_alpha, out / "adapters.pth")
            merge_lora(model)
    path: Path = model.save_checkpoint(out / FINAL)
    _write_fields(path, model, task)
    if task.labels:
        (out / LABELS).write_text(json.dumps(task.labels) + "\n", encoding="utf-8")
    return path


def _go_on(run: _Run, report: Callable[[Metrics], None] | None) -> None:
    """All steps from the newest state on."""
    steps, every = run.trainer.recipe.steps, run.rhythm.save_every
    start, known = _restore(run)
    (run.out / METRICS).touch()
    with _interruptible() as asked, (run.out / METRICS).open("r+b") as file:
        log = _Log(file, known)
        for number in range(start, steps):
            metrics, is_whole, is_last = _one(run, number), False, number + 1 == steps
            try:
                metrics, is_whole = replace(metrics, **_seen(run, number)), True
            finally:  # nothing that only looks at the model may cost its steps
                log.write(metrics)
                if not is_whole or asked.is_set() or is_last or (number + 1) % every == 0:
                    _save_state(run, log, number + 1)
            if report:
                report(metrics)
            if asked.is_set() and not is_last:
                raise KeyboardInterrupt


def _one(run: _Run, number: int) -> Metrics:
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


def _seen(run: _Run, number: int) -> dict[str, Any]:
    """What is to be seen after a step."""
    task, model, recipe = run.task, run.trainer.model, run.trainer.recipe
    is_due = (number + 1) % run.rhythm.validate_every == 0 or number + 1 == recipe.steps
    if not task.validation or not is_due:
        return {}
    loss, accuracy = validate(model, task.validation, recipe)
    sample = task.sample(model) if task.sample else None
    return {"validation_loss": loss, "accuracy": accuracy, "sample": sample}
