"""What a run keeps in its folder: saved states, from which it is resumed, and the adapters it trained."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gpt2lite import parallel
from gpt2lite.checkpoint.inert_pickle import shown
from gpt2lite.checkpoint.manifest import Manifest, flatten
from gpt2lite.checkpoint.source import ByteSource, in_memory, note_mapping
from gpt2lite.checkpoint.torch_zip import NO_CRC, open_torch_zip
from gpt2lite.checkpoint.writing import CHUNK_BYTES, full_disk_named, replacing, require_space, tensors_of
from gpt2lite.config import Purpose, wrong_labels
from gpt2lite.dialects.reading import is_number
from gpt2lite.errors import CheckpointError, UsageError, first_line, is_out_of_memory, require_allowed
from gpt2lite.finetuning.data import Batch, Batches, digest_of, tensor_parts
from gpt2lite.finetuning.interrupts import CtrlC
from gpt2lite.finetuning.lora import LinearWithLoRA
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.training import Trainer, own_part
from gpt2lite.loading.skeleton import state_of
from gpt2lite.model import GPTModel
from gpt2lite.quantization import Int8Linear

METRICS = "metrics.jsonl"
STATE_NAME = re.compile(r"step-(\d+)\.pth")
MAX_WRONG = 5  # fields in a message
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter, beside its step
UNSAID = {"validate_every", "save_every", "keep"}  # of a recipe: may change when a run is resumed
MAY_CHANGE = UNSAID | {"steps", "learning_rate"}  # with a warning; steps may only grow
OTHERS = {
    "base": "another model (give it as it was before the run, pruned by the same --keep-blocks)",
    "data": "other data",
    "teacher": "another teacher",
}
# What an adapter is not put around, and what to do.
NOT_ADAPTED: dict[type, str] = {
    Int8Linear: "int8; load the model without quantize",
    LinearWithLoRA: "a layer with an adapter already; call gpt2lite.merge_lora first",
}


# What a task may hold, and in words.
TASK_RULES: dict[str, tuple[Callable[[Any], object], str]] = {
    "train": (callable, "a function of a batch's number"),
    "validation": (lambda v: isinstance(v, Sequence) and not isinstance(v, Batch), "a list of Batch"),
    "sample": (lambda v: v is None or callable(v), "a function of the model, or None"),
    "digest": (lambda v: isinstance(v, str), "a str"),
}


@dataclass(frozen=True)
class Task:
    """What is learned: batch number n for training, batches to validate with, and how to see it.

    `sample` writes a text with the model as it is; `labels` names a classifier's classes; `digest` stands
    for all the data, so that a run is not resumed with other data (a few batches are compared in any case).
    `seq_len` and `template` go with the model: see `Purpose`.
    Raises UsageError for other kinds of values, such as a generator, which would be empty the second time.
    """

    train: Batches
    validation: Sequence[Batch]
    labels: tuple[str, ...] = ()
    sample: Callable[[GPTModel], str] | None = None
    digest: str = ""
    seq_len: int | None = None
    template: tuple[str, ...] = ()

    @property
    def purpose(self) -> Purpose:
        """What a model is trained for by it."""
        return Purpose(self.labels, self.seq_len, self.template)

    def __post_init__(self) -> None:
        require_allowed({name: getattr(self, name) for name in TASK_RULES}, TASK_RULES)
        if wrong := wrong_labels(self.labels, len(self.labels)):
            raise UsageError(f"Task.labels: {wrong}")
        object.__setattr__(self, "labels", tuple(self.labels))  # a list is the same data
        _ = self.purpose  # raises UsageError for a seq_len or a template that is none


@dataclass
class Run:
    """A run in progress: what it trains and from what, and its folder; how far it is, and is saved.

    `last` is the newest step's last batch, `lines` are those of metrics.jsonl.
    """

    trainer: Trainer
    task: Task
    out: Path
    identity: dict[str, Any]
    ctrl_c: CtrlC
    step: int = 0
    saved: int = 0
    last: Batch = field(init=False)
    lines: list[str] = field(default_factory=list)


def weights_of(model: nn.Module) -> dict[str, str]:
    """A digest of each tensor that a model saves, by name. Reads all bytes, a GB or two a second."""
    return {
        t.name: digest_of([f"{t.dtype} {t.shape} {t.shares}".encode()], () if t.shares else t.chunks())
        for t in tensors_of(state_of(model))
    }


def made_from(task: Task, recipe: Recipe, teacher: GPTModel | None = None) -> dict[str, Any]:
    """What a run was made from, beside its model, and must be resumed with: digests of the data.

    One that differs in a single row would end as another.
    """
    batches = tensor_parts(*task.train(0), *sum(task.validation, ()))
    return {
        "data": digest_of([f"{task.digest} {task.labels}".encode()], batches),
        "recipe": asdict(recipe),
        "labels": list(task.labels),
        "teacher": weights_of(teacher) if teacher else {},
    }


# ---- what files hold ---------------------------------------------------------------------------------------

Rules = Mapping[str, Callable[[Any], object]]  # by field; or by "", for all fields of a dict


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**63


def _is_dict(rules: Rules) -> Callable[[Any], object]:
    """Whether something is a dict whose fields are what rules say, named by texts."""

    def follows(value: Any) -> bool:
        return isinstance(value, dict) and not _wrong(value, rules)

    return follows


def _wrong(saved: dict[Any, Any], rules: Rules) -> list[str]:
    """The fields of a dict that are missing or not as ruled, with what they are."""
    each = dict.fromkeys(saved, rules[""]) if "" in rules else rules
    return [
        f"its {shown(key)} is {shown(saved[key]) if key in saved else 'missing'}"
        for key, is_right in each.items()
        if not isinstance(key, str) or key not in saved or not is_right(saved[key])
    ]


def _is_weight(value: object) -> bool:
    """Whether this is a tensor whose numbers are all there: one that is expanded is larger than its file."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _is_recipe(value: object) -> bool:
    with suppress(TypeError, UsageError):
        return isinstance(value, dict) and bool(Recipe(**value))
    return False


WEIGHTS, TEXTS = {"": _is_weight}, {"": _is_text}


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


IDENTITY: Rules = {
    "base": _is_dict(TEXTS),
    "data": _is_text,
    "recipe": _is_recipe,
    "labels": _is_list_of_texts,
    "teacher": _is_dict(TEXTS),
}
STATE: Rules = {
    "step": _is_size,
    "model": _is_dict(WEIGHTS),
    "optimizer": _is_dict({"": _is_dict({"": lambda value: isinstance(value, Tensor)})}),
    "scaler": _is_dict({"": is_number}),
    "made_from": _is_dict(IDENTITY),
    "last_batch": _is_text,
    "metrics": _is_text,
}
ADAPTERS: Rules = {
    "lora_alpha": is_number,
    "labels": _is_list_of_texts,
    "lora": _is_dict(WEIGHTS),
    "base": _is_dict(TEXTS),
}


def _note_mapped(saved: object, opened: Manifest) -> None:
    """Have `in_memory` know what torch.load has mapped, which reads no values."""
    ((source, state),) = opened.files.items()
    for tensor in flatten(saved, Tensor).values():
        if type(tensor) is Tensor and tensor.numel():
            storage = tensor.untyped_storage()
            note_mapping(tensor, storage.data_ptr(), storage.nbytes(), source, state)


def _read(path: Path, rules: Rules, what: str) -> dict[str, Any]:
    """A file's content, mapped; read once for its checksums, which torch.load passes over.

    Opened first as any checkpoint is, which limits what it may take. Raises CheckpointError for one that is
    damaged, or where a field is not as ruled.
    """
    try:
        opened = open_torch_zip(ByteSource(path))
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _note_mapped(saved, opened)
        with zipfile.ZipFile(path) as archive:
            for entry in (found for found in archive.infolist() if found.CRC != NO_CRC):
                with archive.open(entry) as content:
                    while content.read(CHUNK_BYTES):
                        pass
        wrong = _wrong(saved, rules) if isinstance(saved, dict) else [f"holds {shown(saved)}"]
    except Exception as error:  # torch's own is none of ours, and a damaged pickle can make it any
        if is_out_of_memory(error):
            raise
        wrong = [first_line(error).removeprefix(f"{path}: ")]
    if wrong:
        raise CheckpointError(path, f"not {what} of this version ({', '.join(wrong[:MAX_WRONG])})")
    return cast("dict[str, Any]", saved)


# ---- states ------------------------------------------------------------------------------------------------


def state_files(out: Path) -> dict[int, Path]:
    """The saved states of a folder by their steps, ascending."""
    named = ((STATE_NAME.fullmatch(path.name), path) for path in out.glob("step-*.pth"))
    return dict(sorted((int(found[1]), path) for found, path in named if found))


def log(run: Run, said: dict[str, Any]) -> None:
    """Write a step down."""
    run.lines.append(json.dumps(said) + "\n")
    if parallel.is_first(mesh := run.trainer.mesh):
        said_so = (run.out / METRICS).open("a", encoding="utf-8", newline="")
        with parallel.telling(mesh), full_disk_named(run.out), said_so as file:
            file.write(run.lines[-1])


def write_log(run: Run) -> None:
    """Where metrics.jsonl is not what was written down, write it anew."""
    path, content = run.out / METRICS, "".join(run.lines).encode()
    is_first = parallel.is_first(run.trainer.mesh)
    if is_first and (not path.is_file() or path.read_bytes() != content):
        with replacing(path, len(content)) as temporary:
            temporary.write_bytes(content)


def _save_tree(content: dict[str, Any], path: Path) -> None:
    """torch.save to an open file: opening it itself, it hides what the system says of a full disk."""
    with open(path, "xb") as file:
        torch.save(content, file)


def save_state(run: Run) -> None:
    """Everything that the next step depends on, and the log so far; the oldest states are deleted.

    The log takes about 200 bytes a step.
    """
    trainer, mesh, state = run.trainer, run.trainer.mesh, run.trainer.state()
    parallel.rest(trainer.model)
    keyed: dict[str, Tensor] = {f"model {name}": p for name, p in trainer.trained.items()}
    keyed |= {f"{key} {name}": value for name, own in state.items() for key, value in own.items()}
    with parallel.whole(keyed, mesh, run.out / METRICS) as found, parallel.together(mesh):
        if not parallel.is_first(mesh):
            return
        content = {
            "model": {name: found[f"model {name}"].detach() for name in state},
            "optimizer": {name: {key: found[f"{key} {name}"] for key in own} for name, own in state.items()},
            "scaler": trainer.scaler.state_dict(),
            "step": run.step,
            "config": trainer.model.config.as_dict(run.task.purpose),
            "made_from": run.identity,
            "last_batch": digest_of(tensor_parts(*run.last)),
            "metrics": "".join(run.lines),
        }
        nbytes = sum(tensor.nbytes for tensor in found.values())
        require_space(run.out, nbytes)
        with replacing(run.out / f"step-{run.step:06}.pth", nbytes) as temporary:
            _save_tree(content, temporary)
        write_log(run)
        drop_older(run)


def drop_older(run: Run) -> None:
    """Delete all but the newest states."""
    older = [path for number, path in state_files(run.out).items() if number <= run.step]
    for path in older[: -run.trainer.recipe.keep] if parallel.is_first(run.trainer.mesh) else ():
        path.unlink()


def newest_state(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole one, with a warning where a newer one is damaged; None where there are none at all."""
    damaged: CheckpointError | None = None
    for step, path in reversed(state_files(out).items()):
        try:
            saved = _read(path, STATE, "a whole saved state")
            if saved["step"] != step:
                raise CheckpointError(path, f"holds the state of step {saved['step']}; has it been renamed?")
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
    was, now, step = saved["made_from"], run.identity, saved["step"]
    last = run.task.train(step * run.trainer.recipe.accumulate - 1)
    same_batch = saved["last_batch"] == digest_of(tensor_parts(*last))
    others = {key for key in OTHERS if was[key] != now[key]} | (set() if same_batch else {"data"})
    before, after = was["recipe"], now["recipe"]
    changed = [key for key in before if after.get(key) != before[key] and key not in UNSAID]
    said = ", ".join([f"{key}={before[key]!r}" for key in changed] + [OTHERS[key] for key in sorted(others)])
    if others or after["steps"] < before["steps"] or set(changed) - MAY_CHANGE:
        raise UsageError(f"{path}: was made with {said}; resume with the same")
    if said:
        new = ", ".join(f"{key}={after[key]!r}" for key in changed)
        changes = f"from step {step} on it is {new}, and the learning rate follows the new curve"
        warnings.warn(f"{path}: was made with {said}; {changes}", stacklevel=2)


def _fits(moments: dict[str, Tensor], p: Tensor) -> bool:
    """Whether this is AdamW's state of a parameter; torch's fused step writes past a smaller one's end."""
    shapes = {key: tuple(each.shape) for key, each in moments.items()}
    dtypes = {each.dtype for key, each in moments.items() if key != "step"}
    return dtypes == {p.dtype} and shapes == {"step": (), **dict.fromkeys(MOMENTS, tuple(p.shape))}


def restore(run: Run) -> None:
    """Go back to the newest state, if there is one."""
    if not (found := newest_state(run.out)):
        return
    path, saved = found
    _require_same(path, saved, run)
    shapes, trained = {name: tensor.shape for name, tensor in saved["model"].items()}, run.trainer.trained
    if shapes != {name: p.shape for name, p in trained.items()}:
        raise CheckpointError(path, "holds other weights than this model trains; give the same model")
    if wrong := [name for name, p in trained.items() if not _fits(saved["optimizer"].get(name, {}), p)]:
        raise CheckpointError(path, f"its moments do not fit {wrong[0]}; delete the file", name=wrong[0])
    with torch.no_grad():
        for name, parameter in run.trainer.trained.items():
            values = in_memory(saved["model"][name])
            parallel.local_of(parameter).copy_(parallel.local_of(own_part(parameter, values)))
    run.trainer.restore(saved["optimizer"], saved["scaler"])
    run.step = run.saved = saved["step"]
    run.lines = saved["metrics"].splitlines(keepends=True)
    drop_older(run)  # one that was killed may have written a state and deleted none


# ---- adapters ----------------------------------------------------------------------------------------------


def save_lora(run: Run, path: Path) -> None:
    """Write what was trained, by name: adapters, a classifier's head; alpha, labels, digests of the base."""
    trained = {name: p.detach() for name, p in run.trainer.trained.items()}
    base = {name: digest for name, digest in run.identity["base"].items() if name and name not in trained}
    if not parallel.is_first(mesh := run.trainer.mesh):
        return
    said = {"lora_alpha": run.trainer.recipe.lora_alpha, "labels": list(run.task.labels)}
    nbytes = sum(tensor.nbytes for tensor in trained.values())
    with parallel.telling(mesh), replacing(path, nbytes) as temporary:
        _save_tree({**said, "lora": trained, "base": base}, temporary)


@torch.inference_mode(False)
@torch.no_grad()
def load_lora(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Put the adapters of a file around a model's layers; `merge_lora` makes it plain again.

    The head of a classifier, which was trained with them, replaces the model's, and so do its labels, which
    are returned; () where there is none. Warns where the model's other weights are not those that they were
    trained on, which reads them all. Raises CheckpointError, before anything is changed, for a damaged file,
    or one whose layers are not the model's.
    """
    saved = _read(path, ADAPTERS, "a file of LoRA adapters")
    tensors, modules, own = saved["lora"], dict(model.named_modules()), dict(model.named_parameters())
    adapted = dict[str, LinearWithLoRA]()
    for name in sorted({name.rpartition(".lora.")[0] for name in tensors if ".lora." in name}):
        layer, a = modules.get(name), tensors.get(f"{name}.lora.A")
        if not isinstance(layer, nn.Linear) or a is None or f"{name}.lora.B" not in tensors:
            found = NOT_ADAPTED.get(type(layer), "no linear layer")
            raise CheckpointError(path, f"has an adapter for {name}, which in the model is {found}")
        if a.dim() != 2:
            what = f"{name}.lora.A is {tuple(a.shape)}, wanted ({layer.in_features}, rank)"
            raise CheckpointError(path, what, name=f"{name}.lora.A")
        adapted[name] = LinearWithLoRA(layer, a.shape[-1], float(saved["lora_alpha"]))
        adapted[name].lora.to(torch.promote_types(layer.weight.dtype, a.dtype))  # fp32 on a base of 16 bits
        own |= {f"{name}.lora.{part}": p for part, p in adapted[name].lora.named_parameters()}
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            found = f"one of {tuple(own[name].shape)}" if name in own else "no such weight"
            what = f"{name} is {tuple(tensor.shape)}, the model has {found}"
            raise CheckpointError(path, f"{what} (a classifier's head? call as_classifier first)", name=name)
    head, labels = tensors.get("out_head.weight"), saved["labels"]
    if labels and (wrong := wrong_labels(labels, len(head) if head is not None else 0)):
        raise CheckpointError(path, f"its labels: {wrong}")
    now = weights_of(model)
    if others := [name for name, digest in saved["base"].items() if now.get(name, digest) != digest]:
        said = f"these adapters were trained on another model, or in another dtype: {others[0]} … differs"
        warnings.warn(f"{path}: {said}", stacklevel=2)
    for name, tensor in tensors.items():
        own[name].copy_(in_memory(tensor))
    for name, added in adapted.items():
        model.set_submodule(name, added)
    if isinstance(model, GPTModel) and head is not None:
        model.purpose = replace(model.purpose, labels=tuple(labels))
    return tuple(labels)
