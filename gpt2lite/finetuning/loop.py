"""The run: step after step, measured, saved, and resumed where it was cut."""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from gpt2lite import parallel
from gpt2lite.checkpoint.json_text import json_object
from gpt2lite.checkpoint.source import ByteSource, read_all
from gpt2lite.checkpoint.writing import remove_parts, replacing
from gpt2lite.devices import peak_allocated
from gpt2lite.dialects.configs import LABELS
from gpt2lite.errors import TrainingDivergedError, UsageError, listed
from gpt2lite.finetuning import states, training
from gpt2lite.finetuning.data import IGNORED, Batch, digest_of, own_copy, tensor_parts
from gpt2lite.finetuning.distilling import load_teacher
from gpt2lite.finetuning.interrupts import held
from gpt2lite.finetuning.lora import LinearWithLoRA, merge_lora
from gpt2lite.finetuning.losses import rows_of
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import METRICS, Run, Task
from gpt2lite.loading.offload import require_whole
from gpt2lite.model import GPTModel

TRAINED = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
MAX_LOG_BYTES = 1 << 30  # some million steps
COMPUTES, SAID = ("forward", "hidden"), ("approximate", "n_heads")  # methods; what an instance says of itself


@dataclass(frozen=True)
class Metrics:
    """One step: loss in nats a target, norm of the gradient (0 where it is not known), bytes in use.

    memory: the process's on the CPU, elsewhere the most that torch has allocated on the device.
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


@torch.no_grad()
def validate(model: GPTModel, batches: Sequence[Batch], recipe: Recipe) -> tuple[float, float | None]:
    """(loss in nats a target, share of right classes or None) over all batches."""
    summed, right, count, mesh = 0.0, 0.0, 0.0, parallel.mesh_of(model)
    for batch in batches:
        ids, places, targets = training.placed(batch, model)
        summed += float(training.loss_sum(model, ids, places, targets, recipe))
        count += len(targets)
        if model.config.n_classes:
            right += int((model.out_head(rows_of(model, ids, places)).argmax(-1) == targets).sum())
    parallel.rest(model)
    summed, right, count = (parallel.total(mesh, each) for each in (summed, right, count))
    return summed / count, right / count if model.config.n_classes else None


def _require_folder(out: Path, resume: bool, save_every: int) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; choose a folder")
    log = out / METRICS
    is_begun = log.exists() and _log(log).count(b"\n") <= save_every  # and nothing saved yet
    if resume and not states.state_files(out) and (not is_begun or (out / "model.pth").exists()):
        found = [name for name in (METRICS, "model.pth") if (out / name).exists()]
        lacks = f"{' and '.join(found)}, but no saved state (step-….pth)" if found else "no run"
        raise UsageError(f"{out}: {lacks} to resume there. Check its name, or start anew in another folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: is not empty; choose a new folder, or continue with resume (--resume)")


@contextmanager
def _locked(out: Path, resume: bool, save_every: int) -> Iterator[None]:
    """One run at a time in a folder, which the system unlocks however a process ends."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{out}: another run writes there; wait, or choose another folder") from None
        _require_folder(out, resume, save_every)
        remove_parts(out)
        yield
    finally:
        os.close(folder)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """What was written to a run's folder, a dict a step; a last line that is being written is left out."""
    path = out / METRICS
    lines = _log(path).split(b"\n")[:-1]
    return [json_object(f"{path}, line {number}", line) for number, line in enumerate(lines, 1)]


def _log(path: Path) -> bytes:
    """What was written to a log; nothing where there is none, or nothing in it yet."""
    is_there = os.path.lexists(path) and ByteSource(path).state().size
    return read_all(ByteSource(path), MAX_LOG_BYTES) if is_there else b""


def _computes_as(part: Any, like: nn.Module) -> bool:
    """Whether a part of a model is what its file will open as; dropouts do nothing there."""
    if isinstance(like, nn.Dropout) or isinstance(part, LinearWithLoRA):
        return True
    if isinstance(like, nn.Linear) and type(part) is nn.Linear:  # ours widens what the CPU emulates, no more
        return True
    same = (getattr(type(part), name, None) is getattr(type(like), name, None) for name in COMPUTES)
    return all(same) and all(getattr(part, name, None) == getattr(like, name, None) for name in SAID)


def _require_plain(model: GPTModel) -> None:
    """Raise UsageError for a model whose file would not open, or would compute something else then."""
    with torch.device("meta"):
        plain = GPTModel(model.config)
    parts, wanted = dict(model.named_modules()), {n: tuple(t.shape) for n, t in plain.state_dict().items()}
    state = {name.replace(".linear.", "."): each for name, each in model.state_dict().items()}
    found = {name: tuple(getattr(each, "shape", ())) for name, each in state.items() if ".lora." not in name}
    lines = [
        f"{name} is {found.get(name, 'missing')}, wanted {wanted.get(name, 'no such part')}"
        for name in dict.fromkeys((*found, *wanted))
        if found.get(name) != wanted.get(name)
    ]
    lines += [
        f"{path or 'the model'} computes something else than GPTModel's {type(like).__name__}"
        for path, like in plain.named_modules()
        if path in parts and not _computes_as(parts[path], like)
    ]
    if (model.out_head.weight is model.tok_emb.weight) != model.config.tied_head:
        lines.append(f"the head is tied or not, unlike config.tied_head={model.config.tied_head}")
    if lines:
        raise UsageError(f"the model is not its config's GPTModel, as its file would open{listed(lines)}")
    if hooked := [name for name, part in parts.items() if part._forward_hooks or part._forward_pre_hooks]:
        said = f"{hooked[0] or 'the model'} has forward hooks; what they change will not be in model.pth"
        warnings.warn(said, stacklevel=4)


def _require_trainable(model: GPTModel) -> None:
    if not isinstance(model, GPTModel):
        what = "unwrap it (model.module), or load it with GPTModel.from_checkpoint"
        raise UsageError(f"finetune trains a GPTModel, got {type(model).__name__}; {what}")
    require_whole(model)
    dtypes = {p.dtype for p in model.parameters()}
    if torch.int8 in dtypes:
        raise UsageError("an int8 model does not train; load it without quantize")
    masters = {training.master_dtype(dtype) for dtype in dtypes if dtype in TRAINED}
    if dtypes - TRAINED or len(masters) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise UsageError(f"a model of {found} does not train; load it with dtype=torch.float32")


def _require_task(model: GPTModel, task: Task, recipe: Recipe) -> None:
    n_classes = model.config.n_classes
    if n_classes != len(task.labels):
        todo = "text needs a model with a language head" if n_classes else "gpt2lite.as_classifier makes one"
        raise UsageError(f"the model's head has {n_classes} classes, the task {len(task.labels)}; {todo}")
    if any(p.is_inference() for p in model.parameters()):
        raise UsageError("a model made under torch.inference_mode does not train; load it outside")
    if parallel.mesh_of(model) is None:  # of ranks, heads are divided, and classes are FSDP's
        _require_plain(model)
    training.require_divisible(model, recipe)
    recipe.row_length(model.config.context_length)
    first = task.train(0)
    training.placed(first, model)
    if digest_of(tensor_parts(*first)) != digest_of(tensor_parts(*task.train(0))):
        wanted = "number n must always be the same batch"
        raise UsageError(f"train(0) gave another batch the second time; {wanted}")
    counts = [len(training.placed(batch, model)[2]) for batch in task.validation]
    if counts and not parallel.total(parallel.mesh_of(model), sum(counts)):
        raise UsageError(f"every target of the validation is {IGNORED}, so none counts")


@torch.inference_mode(False)
def finetune(
    model: GPTModel,
    task: Task,
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    report: Callable[[Metrics], None] | None = None,
) -> Path:
    """Train a loaded model, and return where it is now: `out`/model.pth, which `from_checkpoint` opens.

    The model is changed in place, adapters merged at the end. A 16-bit model trains in fp32, and is saved in
    the dtype that it came in (`prepared`); frozen weights stay frozen. `out` also gets metrics.jsonl (a line
    a step), adapters.pth (what LoRA trained, with its alpha), a classifier's labels.json, and step-….pth, of
    which `resume` takes the newest whole one, and writes metrics.jsonl as it was then: a run that was cut at
    any step and resumed, with the same model, task and recipe, ends with the same bits on the CPU. Resuming
    with another model, other data or another recipe is refused; `steps` may grow and the learning rate may
    change, with a warning. Ctrl-C or SIGTERM finishes the step, saves, and raises KeyboardInterrupt, twice
    also during `task` or `report`, which is called after each step. Whatever they raise, the steps are saved
    before. A second one goes to a handler of the caller's own at once.

    A model of several ranks trains as it would in one process, each rank on its rows of every batch. The
    first rank alone writes and reports, and any number of ranks resumes; what it saves takes its size on disk
    again for a moment, in a file system that all ranks must see. An error on one rank saves nothing.

    Costs what `gpt2lite.forecast_training` says. Gradients are recorded also under `torch.no_grad`. Raises
    UsageError for what cannot work before anything is written, CheckpointError where what was saved is
    damaged, TrainingDivergedError where a loss is not finite; the last saved state stays.
    """
    if not isinstance(recipe, Recipe | None):
        found = type(recipe).__name__
        raise UsageError(f"recipe must be a Recipe, got a {found}; Recipe(**fields) makes one")
    out, recipe = Path(out), recipe or Recipe()
    with parallel.together(mesh := parallel.mesh_of(model)):
        _require_trainable(model)
        _require_task(model, task, recipe)
        if parallel.is_first(mesh):
            _require_folder(out, resume, recipe.save_every)
        teacher = load_teacher(model, recipe, model.pos_emb.weight.device)
        identity = states.made_from(task, recipe, teacher)
        learning = [name for name, p in model.named_parameters() if p.requires_grad]
        parallel.require_same(mesh, "recipe, data or folder", (identity, f"{out}", resume, learning))
    identity["base"] = states.weights_of(model) | {"": f"{model.config}"}
    parallel.require_same(mesh, "weights", identity["base"])
    if bad := training.not_finite(model):
        raise UsageError(f"the model's {bad[0]} holds infinities or NaN; give one with finite weights")
    with held() as ctrl_c, ExitStack() as until_saved:
        with training.prepared(model):
            training.choose_trained(model, recipe)
            with closing(training.Trainer(model, recipe, teacher)) as trainer:
                with parallel.together(mesh):
                    if parallel.is_first(mesh):
                        until_saved.enter_context(_locked(out, resume, recipe.save_every))
                run = Run(trainer, task, out, identity, ctrl_c)
                _go_on(run, report)
            if recipe.lora_rank:
                states.save_lora(run, out / "adapters.pth")
                merge_lora(model)
        if bad := training.not_finite(model):
            raise training.diverged(f"{bad[0]} is too large for {model.pos_emb.weight.dtype}", recipe)
        if task.labels and parallel.is_first(mesh):
            with parallel.telling(mesh), replacing(out / LABELS) as temporary:
                temporary.write_text(json.dumps(task.labels) + "\n", encoding="utf-8")
        model.purpose = task.purpose
        return model.save_checkpoint(out / "model.pth", progress=ctrl_c.check)


def _go_on(run: Run, report: Callable[[Metrics], None] | None) -> None:
    """All steps from the newest state on. Whatever ends them, those that were done are saved before."""
    mesh = run.trainer.mesh
    with parallel.together(mesh):
        states.restore(run)
        states.write_log(run)
    try:
        while run.step < run.trainer.recipe.steps:
            _check(run)
            metrics = _one(run)
            if report and parallel.is_first(mesh):
                with parallel.telling(mesh), run.ctrl_c.looking():
                    report(metrics)
        _check(run)
    except TrainingDivergedError:
        raise
    except BaseException as error:
        is_everywhere = mesh is None or isinstance(error, KeyboardInterrupt)
        if is_everywhere and run.trainer.is_whole and run.step > run.saved:
            try:
                _save(run)
            except Exception as failed:
                raise error from failed
        raise


def _check(run: Run) -> None:
    """Raise KeyboardInterrupt on all ranks where one was asked to end."""
    run.ctrl_c.presses = max(parallel.gathered(run.trainer.mesh, run.ctrl_c.presses))
    run.ctrl_c.check()


def _one(run: Run) -> Metrics:
    """One step: trained, looked at, written down, and saved where that is due."""
    recipe, device, began = run.trainer.recipe, run.trainer.device, time.perf_counter()
    with parallel.telling(mesh := run.trainer.mesh), run.ctrl_c.looking():
        first = run.step * recipe.accumulate
        batches = [own_copy(run.task.train(first + part)) for part in range(recipe.accumulate)]
    if mesh is not None:
        parallel.require_same(
            mesh, f"batches for step {run.step}", digest_of(tensor_parts(*sum(batches, ())))
        )
    loss, norm = run.trainer.step(run.step, batches)
    speed = sum(batch.ids.numel() for batch in batches) / (time.perf_counter() - began)
    memory = psutil.Process().memory_info().rss if device.type == "cpu" else peak_allocated(device)
    metrics = Metrics(run.step, loss, recipe.learning_rate_at(run.step), norm, speed, memory)
    run.step, run.last = run.step + 1, batches[-1]
    try:
        with run.ctrl_c.looking():
            metrics = _validated(run, metrics)
    finally:  # what only looks at the model must not cost its steps
        states.log(run, {key: value for key, value in asdict(metrics).items() if value is not None})
    if run.step == recipe.steps or run.step % recipe.save_every == 0:
        _save(run)
    return metrics


def _save(run: Run) -> None:
    """A state from which training can go on: with finite weights, and a finite loss on its last batch."""
    model, recipe, run.saved = run.trainer.model, run.trainer.recipe, run.step
    if bad := training.not_finite(model):
        raise training.diverged(f"step {run.step - 1}: after it {bad[0]} is not finite", recipe)
    model.eval()  # which a step that was cut left in training
    ids, places, targets = training.placed(run.last, model)
    with torch.no_grad():
        loss = parallel.total(run.trainer.mesh, float(training.loss_sum(model, ids, places, targets, recipe)))
    training.require_finite(loss, f"step {run.step - 1}: after it the loss", recipe)
    states.save_state(run)


def _validated(run: Run, metrics: Metrics) -> Metrics:
    """With validation loss, accuracy and sample, after the steps where they are due."""
    task, model, recipe = run.task, run.trainer.model, run.trainer.recipe
    if not task.validation or (run.step % recipe.validate_every and run.step != recipe.steps):
        return metrics
    loss, accuracy = validate(model, task.validation, recipe)
    training.require_finite(loss, f"step {metrics.step}: after it the loss", recipe)
    metrics = replace(metrics, validation_loss=loss, accuracy=accuracy)
    sample = task.sample(model) if task.sample else None
    if not isinstance(sample, str | None):
        raise UsageError(f"Task.sample returned a {type(sample).__name__}, wanted a str")
    return replace(metrics, sample=sample)
