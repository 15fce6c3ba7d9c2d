"""What a training step will take: the step itself, run on tensors without memory, while memory is counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.training import choose_trained, loss_sum, master_dtype, recomputed


@dataclass(frozen=True, slots=True)
class TrainingForecast:
    """Bytes on the device while a model trains.

    weights, gradients (at their most) and optimizer live through steps; logits are what the loss holds of
    rows by vocabulary; activations are the rest of what is there at the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    peak: int


class _Counter(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until nothing refers to it."""

    def __init__(self, seen: set[int]) -> None:
        super().__init__()
        self.used = self.peak = 0
        self.seen = seen  # storages that are counted already, by identity

    def take(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until it goes."""
        if id(storage) in self.seen:
            return
        key, nbytes = id(storage), -(-storage.nbytes() // 64) * 64
        self.seen.add(key)
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._give, key, nbytes)

    def _give(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.used -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.take(tensor.untyped_storage())
        return found


@contextmanager
def _freeing(parameters: list[nn.Parameter], wanted: bool) -> Iterator[None]:
    """Gradients go as soon as they are there, as the optimizer's hook lets them."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(free) for p in parameters if wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_step(model: Any, batch_size: int, seq_len: int, recipe: Recipe, device: torch.device) -> _Counter:
    """One step after the first, from weights that are there already."""
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros((batch_size, seq_len), dtype=torch.int64, device=device)
    places = torch.zeros(batch_size, dtype=torch.int64, device=device) if model.config.n_classes else None
    targets = torch.zeros(batch_size if places is not None else ids.numel(), dtype=torch.int64, device=device)
    counter = _Counter({id(p.untyped_storage()) for p in model.parameters()})
    blocks = model.trf_blocks if recipe.recompute else ()
    with counter, recomputed(blocks, False), _freeing(trained, recipe.step_in_backward):
        for _ in range(min(recipe.accumulate, 2)):
            loss = loss_sum(model, ids, places, targets, recipe)
            loss.backward()
    return counter


def forecast_training(
    build: Callable[[], Any],
    recipe: Recipe,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TrainingForecast:
    """What `finetune` will have on the device at its most, for the model that `build()` makes.

    A model of 16 bits trains in fp32, and costs what one of fp32 does.
    Runs a step of the real code with torch's fake tensors, which have no memory; the device need not be
    there. Without what kernels use for themselves, and mapped pages of token files; seen to be within 10 %
    of the process's peak. Takes seconds for the largest models. Raises as `finetune`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: it takes a second to import

    device = torch.device(device)
    with FakeTensorMode(), torch.device(device):
        model = build()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(master_dtype(dtype))
        choose_trained(model, recipe)
        model.train()
        seq_len = recipe.seq_len or model.config.context_length
        counter = _run_step(model, recipe.batch_size, seq_len, recipe, device)
        weights = sum(p.nbytes for p in model.parameters())
        trained = [p for p in model.parameters() if p.requires_grad]
    gradients = 0 if recipe.step_in_backward else sum(p.nbytes for p in trained)
    moments = 2 * sum(p.numel() if recipe.eight_bit else p.nbytes for p in trained)
    logits = _logits_bytes(model.config, recipe, seq_len)
    return TrainingForecast(
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        activations=max(counter.peak - gradients - logits, 0),
        logits=logits,
        peak=weights + moments + counter.peak,
    )


def _logits_bytes(config: Any, recipe: Recipe, seq_len: int) -> int:
    from gpt2lite.finetuning.losses import ROWS

    width = config.n_classes or config.vocab_size
    rows = recipe.batch_size * (1 if config.n_classes else seq_len)
    return 4 * width * (2 * min(rows, ROWS) if recipe.chunked_loss else 3 * rows)


# The levers from the cheapest to the dearest, and what each costs.
LEVERS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"chunked_loss": True}, "nothing"),
    ({"autocast": True}, "16 bits in products; faster where the hardware has bf16"),
    ({"step_in_backward": True, "clip": 0.0, "accumulate": 1}, "no clipping, no accumulation"),
    ({"recompute": True}, "up to a third more time"),
    ({"batch_size": 1}, "noisier steps"),
    ({"lora_rank": 8}, "adapters alone are trained"),
)


def _with(recipe: Recipe, levers: Iterable[dict[str, Any]]) -> Recipe:
    return replace(recipe, **{key: value for lever in levers for key, value in lever.items()})


def find_levers(
    recipe: Recipe, limit: int, foretell: Callable[[Recipe], TrainingForecast]
) -> tuple[list[tuple[str, str]], TrainingForecast]:
    """The levers, each with what it costs, that bring a recipe's peak to a limit, and the forecast with them.

    They are added from the cheapest on until it fits, then those not needed are left out, the dearest
    first. All of them where nothing fits.
    """
    chosen_already = recipe.lora_rank or recipe.last_blocks  # what is trained was asked for
    levers = [each for each in LEVERS if not (chosen_already and "lora_rank" in each[0])]
    left = [each for each in levers if _with(recipe, [each[0]]) != recipe]
    chosen: list[tuple[dict[str, Any], str]] = []
    while (found := foretell(_with(recipe, (lever for lever, _ in chosen)))).peak > limit and left:
        chosen.append(left.pop(0))
    for each in reversed(chosen) if found.peak <= limit else ():
        fewer = [other for other in chosen if other is not each]
        without = foretell(_with(recipe, (lever for lever, _ in fewer)))
        if without.peak <= limit:
            chosen, found = fewer, without
    said = [(", ".join(f"{key}={value}" for key, value in lever.items()), cost) for lever, cost in chosen]
    return said, found
