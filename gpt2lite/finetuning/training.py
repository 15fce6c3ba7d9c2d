"""One optimisation step, with the recipe's levers: `Trainer` holds what lives from step to step."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2lite import parallel
from gpt2lite.checkpoint.source import in_memory
from gpt2lite.devices import has_bfloat16, seeded
from gpt2lite.dialects.reading import Placement
from gpt2lite.errors import TrainingDivergedError, UsageError
from gpt2lite.finetuning.data import IGNORED, Batch, check_batch
from gpt2lite.finetuning.distilling import says
from gpt2lite.finetuning.lora import add_lora, lora_layers
from gpt2lite.finetuning.losses import rows_of, summed_loss
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.model import GPTModel
from gpt2lite.parallel import mesh_of

BETAS = (0.9, 0.95)
NOTHING_CHANGED = "; that step changed nothing"
M_MMAP_THRESHOLD, OWN_MAPPING, GLIBCS_MOST = -3, 128 << 10, 32 << 20


def _adamw8bit(groups: Any, **options: Any) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(f"eight_bit needs torchao ({error}): pip install 'gpt2lite[quant]'") from None
    return AdamW8bit(groups, **options)


def map_from(nbytes: int) -> None:
    """Have glibc give every block of so many bytes pages of its own, which go back when it is freed.

    Otherwise what activations leave behind is kept in pieces that fit nothing else: one recipe took 335 MiB
    instead of 210, another 58 instead of 48, and no forecast could say how much. Elsewhere than on glibc this
    does nothing.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, nbytes)


def require_divisible(model: GPTModel, recipe: Recipe) -> None:
    """Raise UsageError for what a recipe cannot do with a model on several ranks."""
    if (mesh := mesh_of(model)) is None:
        return
    names = parallel.names_of(mesh)
    alone = ["step_in_backward", "compile", "eight_bit", *(["lora_rank"] if names != (parallel.DDP,) else [])]
    if unable := [name for name in alone if getattr(recipe, name)]:
        raise UsageError(f"a model on several ranks ({names}) does not train with {', '.join(unable)}")
    whole = [name for name, p in model.named_parameters() if not parallel.is_divided(p)]
    if whole and parallel.FSDP in names:
        said = "came into the model after it was divided, and would differ from rank to rank"
        raise UsageError(f"{', '.join(whole[:3])} {said}; use a mesh with the dimension 'ddp'")
    if any(parallel.is_divided(p) and p.dtype.itemsize < 4 for p in model.parameters()):
        raise UsageError("a divided model trains in fp32; load it with dtype=torch.float32 (--dtype float32)")


def choose_trained(model: GPTModel, recipe: Recipe) -> None:
    """Say by `requires_grad` what is trained, and add the adapters that the recipe asks for.

    What the caller froze stays frozen. Raises UsageError where nothing is left to train, or where the model
    has adapters that the recipe does not describe.
    """
    learning = {p for p in model.parameters() if p.requires_grad}
    parts: list[nn.Module] = [model.out_head] if model.config.n_classes else []
    adapters = add_lora(model, recipe) if recipe.lora_rank or lora_layers(model) else []
    if recipe.last_blocks:
        if recipe.last_blocks > len(model.trf_blocks):
            raise UsageError(f"last_blocks={recipe.last_blocks}: the model has {len(model.trf_blocks)}")
        parts += [*list(model.trf_blocks)[-recipe.last_blocks :], model.final_norm]
    elif not recipe.lora_rank:
        parts = [model]
    trained = {p for part in parts for p in part.parameters()} & learning | set(adapters)
    if not trained:
        raise UsageError("nothing to train: every weight that the recipe trains has requires_grad=False")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


@contextmanager
def prepared(model: GPTModel) -> Iterator[None]:
    """A model for the time of a run; afterwards, also after an error, it is as it was, but for its values.

    Inside, parameters of 16 bits are fp32, at 4 bytes each instead of 2: in fp16 Adam's second moments
    underflow, in bf16 small steps round away. It begins and ends without gradients; dtypes, `requires_grad`
    and every module's mode are put back, adapters that were not merged are taken away. A caller's autocast
    does not count inside: it would make backward one of 16 bits.
    """
    modes = [(module, module.training) for module in model.modules()]
    found = [(p, p.dtype, p.requires_grad) for p in model.parameters()]
    own = lora_layers(model).keys()
    try:
        for parameter, dtype, _ in found:
            parameter.grad = None
            if dtype != master_dtype(dtype):
                parameter.data = parameter.data.to(master_dtype(dtype))
        with torch.autocast(model.pos_emb.weight.device.type, enabled=False):
            yield
    finally:
        for path, layer in lora_layers(model).items():
            if path not in own:
                model.set_submodule(path, layer.linear)
        for parameter, dtype, learns in found:
            parameter.grad = None
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(learns)
        for module, mode in modes:
            module.training = mode


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights of a dtype are trained in."""
    return dtype if dtype.itemsize >= 4 else torch.float32


@contextmanager
def recomputed(blocks: Sequence[nn.Module], dropout: bool) -> Iterator[None]:
    """Blocks keep their input alone and run again in backward."""
    own = [vars(block).get("forward") for block in blocks]  # what a caller put there
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=dropout)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def precision_of(device: torch.device) -> torch.dtype:
    """What autocast multiplies in: bf16 where the device has it, else fp16."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def _drops(part: Any) -> bool:
    """Whether a part of a model draws in training mode, whatever the config says."""
    return bool(getattr(part, "drop_rate", 0) or (isinstance(part, nn.Dropout) and part.p))


def loss_sum(
    model: GPTModel,
    ids: Tensor,
    places: Tensor | None,
    targets: Tensor,
    recipe: Recipe,
    teacher: GPTModel | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The loss of ids (B, T) at N places, in nats, summed: (). Backward is meant to begin with `scale`."""
    device, teaching = ids.device, says(teacher, ids, places, recipe) if teacher is not None else None
    # Without its cache of casts, which is emptied only where no autocast is left, such as a caller's: weights
    # of an earlier step would be used for ever.
    precision = precision_of(device)
    with torch.autocast(device.type, precision, enabled=recipe.autocast, cache_enabled=False):
        rows = rows_of(model, ids, places)
        how: Any = {"chunked": recipe.chunked_loss, "teaching": teaching, "scale": scale}
        return summed_loss(model.out_head, rows, targets, **how)


def own_rows(batch: Batch, model: GPTModel) -> Batch:
    """The rows that this rank computes: of fewer rows than ranks, the first one for nothing."""
    place, count = parallel.share_of(mesh_of(model))
    rows = slice(len(batch.ids) * place // count, len(batch.ids) * (place + 1) // count)
    if rows.start == rows.stop:
        return Batch(batch.ids[:1], torch.full_like(batch.targets[:1], IGNORED))
    return Batch(batch.ids[rows], batch.targets[rows])


def placed(batch: Batch, model: GPTModel) -> tuple[Tensor, Tensor | None, Tensor]:
    """(ids, places, targets (N,)) of this rank's rows, on the model's device; no places: every token has one.

    Raises UsageError for a batch that the model cannot learn from (`check_batch`).
    """
    check_batch(batch, model.config)
    device, batch = model.pos_emb.weight.device, own_rows(batch, model)
    ids = batch.ids.clone() if batch.ids.is_inference() else batch.ids  # backward cannot keep those
    flat = batch.targets.flatten()
    kept = flat != IGNORED
    places = None if bool(kept.all()) else kept.nonzero()[:, 0].to(device, non_blocking=True)
    return ids.to(device, non_blocking=True), places, flat[kept].to(device, non_blocking=True)


def _with_ddp(model: GPTModel) -> Callable[..., Tensor]:
    """`loss_sum` as the forward of a DDP module, the one call that DDP sees; all ranks read one file."""
    from torch.nn.parallel import DistributedDataParallel

    class LossSum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.forward = model, loss_sum

    return DistributedDataParallel(LossSum(), init_sync=False, gradient_as_bucket_view=True)


def own_part(parameter: Tensor, value: Tensor) -> Tensor:
    """Of a whole tensor, what a divided parameter of its shape has of it, and divided like it."""
    if not parallel.is_divided(parameter) or value.shape != parameter.shape:
        return value
    return parallel.part_like(parameter, Placement("", parallel.views_of(parameter)).of(value))


class Trainer:
    """Optimizers over what a model trains, by the parameters' names.

    AdamW's two moments cost twice the trained weights, from the first step on. Vectors do not decay.
    """

    def __init__(self, model: GPTModel, recipe: Recipe, teacher: GPTModel | None = None) -> None:
        self.model, self.recipe, self.teacher = model, recipe, teacher
        self.device = model.pos_emb.weight.device
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = self._make_optimizers()
        self.is_whole = True  # not where a step was cut after it changed the first weight
        if self.device.type == "cpu":
            map_from(OWN_MAPPING)
        scales = recipe.autocast and precision_of(self.device) == torch.float16
        if scales and recipe.step_in_backward:
            raise UsageError("step_in_backward needs bf16: fp16's scaled gradients are unscaled all at once")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)
        self.mesh = mesh_of(model)
        self.place, self.ranks = parallel.share_of(self.mesh)
        self.loss_sum: Callable[..., Tensor] = torch.compile(loss_sum) if recipe.compile else loss_sum
        if self.mesh is not None and parallel.DDP in parallel.names_of(self.mesh):
            self.loss_sum = _with_ddp(model)
        stepped = self.trained.values() if recipe.step_in_backward else ()
        self.handles = [p.register_post_accumulate_grad_hook(self._step_one) for p in stepped]

    def _make_optimizers(self) -> dict[Tensor, torch.optim.Optimizer]:
        make: Any = _adamw8bit if self.recipe.eight_bit else partial(torch.optim.AdamW, fused=True)
        options, decay = {"lr": self.recipe.learning_rate, "betas": BETAS}, self.recipe.weight_decay
        kinds = {p: (0.0 if p.dim() < 2 else decay, mesh_of(p)) for p in self.trained.values()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in kinds if kinds[p] == kind], "weight_decay": kind[0]}
            for kind in dict.fromkeys(kinds.values())  # a fused step takes one mesh
        ]
        if not self.recipe.step_in_backward:
            return dict.fromkeys(kinds, make(groups, **options))
        return {p: make([group | {"params": [p]}], **options) for group in groups for p in group["params"]}

    def _step_one(self, parameter: Tensor) -> None:
        self.optimizers[parameter].step()
        parameter.grad = None

    def step(self, number: int, batches: Sequence[Batch]) -> tuple[float, float]:
        """Train on batches as if they were one; returns (loss in nats a target, norm of the gradient or 0).

        Raises TrainingDivergedError before anything is changed where the loss is not finite; with
        `step_in_backward`, where it was not finite before that step.
        """
        unique = set(self.optimizers.values())
        for optimizer in unique:
            for group in optimizer.param_groups:
                _set_rate(group, self.recipe.learning_rate_at(number))
        there = [placed(batch, self.model) for batch in batches]
        count = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        if not count:
            raise UsageError(f"step {number}: every target of its batches is {IGNORED}, so none counts")
        summed, dropout = 0.0, any(map(_drops, self.model.modules()))
        blocks = list(self.model.trf_blocks) if self.recipe.recompute else ()
        self.model.train()
        # what dropout draws depends on seed and step alone, and on whose rows it is for
        drawn = (self.recipe.seed << 32) + number * self.ranks + self.place
        draws = seeded(self.device, drawn) if dropout else nullcontext()
        scale = self.scaler.get_scale() * self.ranks / count if self.scaler.is_enabled() else 1.0
        given = self.recipe, self.teacher, scale
        with recomputed(blocks, dropout), draws:
            for ids, places, targets in there:
                loss = self.loss_sum(self.model, ids, places, targets, *given) / count
                summed += parallel.total(self.mesh, float(loss.detach()))
                require_finite(summed, f"step {number}: the loss", self.recipe, NOTHING_CHANGED)
                self.is_whole = not self.recipe.step_in_backward
                self.scaler.scale(loss * self.ranks).backward()  # of which torch takes the ranks' mean
        self.model.eval()
        norm = 0.0 if self.recipe.step_in_backward else self._step_all(number, unique)
        self.is_whole = True
        return summed, norm

    def _step_all(self, number: int, optimizers: set[torch.optim.Optimizer]) -> float:
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = parallel.clip_gradients(self.trained.values(), self.recipe.clip or math.inf)
        if not self.scaler.is_enabled():
            require_finite(norm, f"step {number}: the gradient's norm", self.recipe, NOTHING_CHANGED)
        self.is_whole = False
        for optimizer in optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Each trained parameter's moments and step, by its name."""
        return {name: dict(self.optimizers[p].state[p]) for name, p in self.trained.items()}

    def restore(self, state: dict[str, dict[str, Tensor]], scaler: dict[str, Any]) -> None:
        """What `state` returned, onto the parameters' devices, and the scale of fp16's loss."""
        if scaler:
            self.scaler.load_state_dict(scaler)
        for name, parameter in self.trained.items():
            moments = state[name].items()
            own = {key: own_part(parameter, in_memory(value)) for key, value in moments}
            there = {key: value.to(parameter.device, copy=True) for key, value in own.items()}
            self.optimizers[parameter].state[parameter] = there

    def close(self) -> None:
        """Let go of the model."""
        if self.device.type == "cpu":
            # glibc cannot be asked what it was: the user's, or where it ends once such a block has been freed
            said = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
            map_from(int(said) if said.isdecimal() else GLIBCS_MOST)
        for handle in self.handles:
            handle.remove()


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """torchao's rate is a tensor, which its compiled step reads in place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def require_finite(value: float, what: str, recipe: Recipe, then: str = "") -> None:
    """Raise TrainingDivergedError where something is infinite or NaN; `then` is what follows from it."""
    if not math.isfinite(value):
        raise diverged(f"{what} is {value}{then}", recipe)


def diverged(what: str, recipe: Recipe) -> TrainingDivergedError:
    """What happened, and what to try."""
    rate, warmup = f"a learning rate below {recipe.learning_rate:g}", recipe.warmup
    return TrainingDivergedError(f"{what}. Try {rate}, more warmup_steps than {warmup}, or clip=1")


def not_finite(model: nn.Module) -> list[str]:
    """The names of parameters that hold infinities or NaN, on any rank. Reads all, allocates nothing."""
    parallel.rest(model)
    parts = ((name, parallel.local_of(p.detach())) for name, p in model.named_parameters())
    ends = ((name, part.aminmax()) for name, part in parts if part.numel())
    found = [name for name, both in ends if not all(map(math.isfinite, both))]
    return [name for names in parallel.gathered(mesh_of(model), found) for name in names]
