"""What a training step will take: the step itself, run on tensors without memory, while memory is counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2lite.devices import CPU, is_here
from gpt2lite.finetuning.distilling import forecast_teacher, open_teacher
from gpt2lite.finetuning.losses import ROWS, ROWS_TAUGHT
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.training import choose_trained, loss_sum, master_dtype, recomputed, require_divisible
from gpt2lite.memory import ShownAsTable
from gpt2lite.model import GPTModel
from gpt2lite.parallel import DDP, divide, forecast_filled_up, local_of, share_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What a process that trains on the CPU has beside tensors: packed operands of matrix products, small blocks.
# Measured on an AMD EPYC (Zen 4) with one thread, MKL and oneDNN.
WORKSPACE = 9 << 20


@dataclass(frozen=True, slots=True, repr=False)
class TrainingForecast(ShownAsTable):
    """Bytes on the device while a model trains.

    weights, gradients (at their most) and optimizer live through steps; logits are what the loss holds of
    rows by vocabulary; activations are the rest of what is there at the peak. teacher and teacher_mapped are
    its weights: those in memory, and those mapped, which the system can reclaim and the peak leaves out.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int
    teacher_mapped: int
    peak: int


class _Counter(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until nothing refers to it.

    `casts`: also the copies that an operation makes of operands of another dtype, as the CPU's do.
    """

    def __init__(self, seen: set[int], casts: bool) -> None:
        super().__init__()
        self.casts = casts
        self.used = self.peak = 0
        self.sizes = dict.fromkeys(seen, 0)  # storages that are counted, by identity; those counted already

    def take(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until it goes."""
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = 0
            weakref.finalize(storage, self._give, id(storage))
            self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count what a storage has now."""
        nbytes = -(-storage.nbytes() // 64) * 64
        self.used += nbytes - self.sizes[id(storage)]
        self.sizes[id(storage)] = nbytes
        self.peak = max(self.peak, self.used)

    def _give(self, key: int) -> None:
        self.used -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and _is_summed_in_place(*args):
            func = torch.ops.aten.add_.Tensor
        found = func(*args, **(kwargs or {}))
        made = [local_of(tensor) for tensor in tree_leaves(found) if isinstance(tensor, Tensor)]
        for tensor in made:
            self.take(tensor.untyped_storage())
        hidden = _hidden_casts(func, args, made) if self.casts else 0
        self.peak = max(self.peak, self.used + hidden)
        return found


def _is_summed_in_place(gradient: Tensor, *rest: object) -> bool:
    """Whether autograd adds to this gradient in place, which it does not do with tensors without memory.

    It does where nothing else holds it. Source: `can_accumulate_inplace` of torch's input_buffer.cpp. A
    storage with one owner counts two: the tensor, and this call.
    """
    holders: int = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    return not torch.is_grad_enabled() and holders == 2


def _hidden_casts(func: Any, args: Any, made: list[Tensor]) -> int:
    """Bytes of the copies that an elementwise operation on the CPU makes of operands of another dtype.

    Source: `promote_inputs_to_common_dtype` of ATen's TensorIterator, which casts on the fly on CUDA alone.
    """
    read = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor) and tensor.dim()]
    if torch.Tag.pointwise not in func.tags or len(read) < 2:
        return 0
    common = reduce(torch.promote_types, (tensor.dtype for tensor in read))
    return sum(t.numel() * common.itemsize for t in (*read, *made) if t.dtype not in (common, torch.bool))


@contextmanager
def _resizing(counter: _Counter) -> Iterator[None]:
    """FSDP empties and refills storages by a call that no dispatch sees."""
    resize = torch.UntypedStorage.resize_

    def counted(storage: torch.UntypedStorage, nbytes: int) -> Any:
        found = resize(storage, nbytes)
        if id(storage) in counter.sizes:
            counter.resized(storage)
        return found

    torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _run_step(model: Any, seq_len: int, recipe: Recipe, casts: bool, teacher: GPTModel | None) -> _Counter:
    """One step after the first, from weights that are there."""
    zeros, batch_size = partial(torch.zeros, dtype=torch.int64), recipe.batch_size
    ids, places = zeros((batch_size, seq_len)), zeros(batch_size) if model.config.n_classes else None
    targets = zeros(ids.numel() if places is None else batch_size)
    weights = (*model.parameters(), *(teacher.parameters() if teacher is not None else ()))
    counter = _Counter({id(local_of(p).untyped_storage()) for p in weights}, casts)
    with counter, _resizing(counter), recomputed(model.trf_blocks if recipe.recompute else (), False):
        for _ in range(min(recipe.accumulate, 2)):
            loss = loss_sum(model, ids, places, targets, recipe, teacher)
            loss.backward()
    return counter


@torch.inference_mode(False)
def forecast_training(
    build: Callable[[], Any],
    recipe: Recipe,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
) -> TrainingForecast:
    """What `finetune` will have on the device at its most, for the model that `build()` makes.

    A model of 16 bits trains in fp32, and costs what one of fp32 does. With a `mesh`, on this rank of it.
    Runs a step of the real code with torch's fake tensors, which have no memory; for an absent device, the
    CPU's operations. Counts the copies that mixed dtypes cost on the CPU and WORKSPACE beside tensors;
    validation and samples are included as far as they take no more than a step, which holds where their
    batches are not larger. Not counted: imports on first use (numba's), mapped pages of token files. Takes
    seconds for the largest models. What the caller switched on (no_grad, inference_mode, autocast, anomaly
    detection) changes nothing. Raises as `finetune`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: it takes a second to import

    device = torch.device(device)
    with torch.device("meta"):
        opened = open_teacher(build().config, recipe) if recipe.teacher else None
    taught = forecast_teacher(opened, recipe, device) if opened else None
    place = device if is_here(device) else CPU  # autograd asks a device for its streams
    with (
        FakeTensorMode(),
        torch.device(place),
        torch.autocast(place.type, enabled=False),
        torch.autograd.set_detect_anomaly(False),
    ):
        teacher = GPTModel(opened.sizes).eval() if opened else None
        model = build()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(master_dtype(dtype))
        choose_trained(model, recipe)
        model.train()
        if mesh is not None:
            model.device_mesh = mesh
            divide(model, mesh)
            require_divisible(model, recipe)
            recipe = replace(recipe, batch_size=-(-recipe.batch_size // share_of(mesh)[1]))
        seq_len = recipe.seq_len or model.config.context_length
        weights = sum(local_of(p).nbytes for p in model.parameters())
        learning = [p for p in model.parameters() if p.requires_grad]
        trained = [local_of(p) for p in learning]
        in_buckets = mesh is not None and mesh.mesh_dim_names == (DDP,)  # DDP has them for all gradients
        for parameter in learning if recipe.step_in_backward or in_buckets else ():
            parameter.register_post_accumulate_grad_hook(_free)
        counter = _run_step(model, seq_len, recipe, device.type == "cpu", teacher)
        more = forecast_filled_up(model, 4)
    gradients = 0 if recipe.step_in_backward else sum(p.nbytes for p in trained)
    moments = 2 * sum(p.numel() if recipe.eight_bit else p.nbytes for p in trained)
    logits = _logits_bytes(model.config, recipe, seq_len)
    most = counter.peak + more + gradients * in_buckets + (WORKSPACE if device.type == "cpu" else 0)
    held = (taught.stays_host if device.type == "cpu" else taught.stays_device) if taught else 0
    return TrainingForecast(
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        activations=max(most - gradients - logits, 0),
        logits=logits,
        peak=weights + moments + most + held,
        teacher=held,
        teacher_mapped=taught.stays_mapped if taught else 0,
    )


def _logits_bytes(config: Any, recipe: Recipe, seq_len: int) -> int:
    width = config.n_classes or config.vocab_size
    rows = recipe.batch_size * (1 if config.n_classes else seq_len)
    taught = 6 * min(rows, ROWS_TAUGHT) if recipe.teacher else 2 * min(rows, ROWS)
    return 4 * width * (taught if recipe.chunked_loss else 3 * rows)


# The levers from the cheapest to the dearest, and what each costs.
LEVERS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"chunked_loss": True}, "nothing"),
    ({"autocast": True}, "16 bits in products; faster where the hardware has bf16"),
    ({"step_in_backward": True, "clip": 0.0, "accumulate": 1}, "no clipping, no accumulation"),
    ({"recompute": True}, "up to a third more time"),
    ({"batch_size": 1}, "a step learns from fewer rows, so it is noisier"),
    ({"lora_rank": 8}, "adapters are trained in place of weights, which learn less"),
)


def find_levers(
    recipe: Recipe, limit: int, predict: Callable[[Recipe], TrainingForecast]
) -> tuple[list[tuple[str, str]], TrainingForecast]:
    """The cheapest levers, each with what it costs, that bring a recipe's peak to a limit, and the forecast.

    Of two choices, the one without the dearest lever not in both is the cheaper, so no lever is taken
    without need. Where none fits, those with the lowest peak. Predicts up to 64 times, seconds each for
    the largest models.
    """
    chosen_already = recipe.lora_rank or recipe.last_blocks  # what is trained was asked for
    levers = [each for each in LEVERS if not (chosen_already and "lora_rank" in each[0])]
    left = [each for each in levers if replace(recipe, **each[0]) != recipe]
    tried = []
    for mask in range(1 << len(left)):  # cheapest first: a dearer lever costs more than all cheaper ones
        taken = [lever for place, lever in enumerate(left) if mask >> place & 1]
        found = predict(replace(recipe, **{key: new for lever, _ in taken for key, new in lever.items()}))
        tried.append((found, taken))
        if found.peak <= limit:
            break
    found, taken = min(tried, key=lambda each: each[0].peak)
    return [(_change(recipe, lever), cost) for lever, cost in taken], found


def _change(recipe: Recipe, lever: dict[str, Any]) -> str:
    """What a lever changes of a recipe, and what a number was."""
    old = {key: getattr(recipe, key) for key, new in lever.items() if getattr(recipe, key) != new}
    was = {key: "" if type(lever[key]) is bool else f" (was {value})" for key, value in old.items()}
    return ", ".join(f"{key}={lever[key]}{was[key]}" for key in old)
