"""What a run keeps in its folder, and how it is taken up again: saved states, and the log of its steps."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gpt2lite.checkpoint.writing import replacing, tensors_of
from gpt2lite.errors import CheckpointError, UsageError, first_line
from gpt2lite.finetuning.data import Batch, Batches, digest_of, tensor_parts
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.training import Trainer

STATE_NAME = re.compile(r"step-(\d+)\.pth")
MAY_CHANGE = ("steps", "learning_rate")  # when a run is resumed; steps may only grow
OTHERS = {"base": "another model (give it as it was before the run)", "data": "other data"}
UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)  # what torch.load raises


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


@dataclass(frozen=True)
class Run:
    """A run as it goes: what it trains and from what, where to, how often it saves."""

    trainer: Trainer
    task: Task
    out: Path
    rhythm: Rhythm
    identity: dict[str, Any]


def identity_of(model: Any, task: Task, recipe: Recipe) -> dict[str, Any]:
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
        "labels": list(task.labels),
    }


def _number(path: Path) -> int:
    """The step of a state's name, -1 where it is none."""
    found = STATE_NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def state_files(out: Path) -> list[Path]:
    """The saved states of a folder, in the order of their steps."""
    return sorted((path for path in out.glob("step-*.pth") if _number(path) >= 0), key=_number)


def _last_batch(task: Task, recipe: Recipe, step: int) -> str:
    return digest_of(tensor_parts(*task.train(step * recipe.accumulate - 1)))


def save_state(run: Run, log: Log, step: int) -> None:
    """Everything that the next step depends on, whole or not at all; the oldest are taken away."""
    path, trainer = run.out / f"step-{step:06}.pth", run.trainer
    content = {
        "model": {name: p.detach() for name, p in trainer.trained.items()},
        "optimizer": trainer.state(),
        "step": step,
        "config": trainer.model.config.as_dict(),
        "made_from": run.identity,
        "last_batch": _last_batch(run.task, trainer.recipe, step),
        "log": log.known(),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
    older = [file for file in state_files(run.out) if _number(file) <= step]
    for old in older[: -run.rhythm.keep]:
        old.unlink()


def _read_state(path: Path) -> dict[str, Any]:
    """A saved state, mapped. Raises CheckpointError for one that is not whole, or not what its name says."""
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, _ = saved["step"], (saved["model"], saved["optimizer"])
    except (*UNREADABLE, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"not a whole saved state ({first_line(error)})") from None
    if "made_from" not in saved:
        raise CheckpointError(
            path,
            "saved by an older gpt2lite, which did not keep what a run was made from; "
            "start the run again in another folder",
        )
    if step != _number(path):
        raise CheckpointError(path, f"holds the state of step {step}; has it been renamed?")
    return dict(saved)


def newest_state(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole one, with a warning where a newer one is damaged; None where there are none at all."""
    damaged: CheckpointError | None = None
    for path in reversed(state_files(out)):
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
    found = newest_state(out)
    return dict(found[1]["made_from"]["recipe"]) if found else {}


def _require_same(path: Path, saved: dict[str, Any], run: Run) -> None:
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


def restore(run: Run) -> tuple[int, tuple[int, str]]:
    """Go on from the newest state: (the next step, how much of the log it knew), zeros if there is none."""
    found = newest_state(run.out)
    if found is None:
        return 0, (0, digest_of())
    path, saved = found
    _require_same(path, saved, run)
    shapes = {name: tensor.shape for name, tensor in saved["model"].items()}
    if shapes != {name: p.shape for name, p in run.trainer.trained.items()}:
        raise CheckpointError(path, "holds other weights than this model trains; give the same model")
    with torch.no_grad():
        for name, parameter in run.trainer.trained.items():
            parameter.copy_(saved["model"][name])
    run.trainer.restore(saved["optimizer"])
    return int(saved["step"]), saved["log"]


class Log:
    """metrics.jsonl, from what a state knew of it on: the lines of steps that are made again are cut off."""

    def __init__(self, file: BinaryIO, known: tuple[int, str]) -> None:
        nbytes, digest = known
        content = file.read()
        if content and digest != digest_of([content[:nbytes]]):
            raise CheckpointError(
                file.name,
                "is not what this run had written until its last saved state; "
                "move it away to resume without it",
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
