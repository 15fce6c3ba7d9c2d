"""A model that does not fit: its last blocks stay in the file, or in host memory, and come in as it computes.

Two places on the device, each of a block's size, take them by turns: while one block computes, the next one
is read into the other. One pass costs one read of what is away, be it for one token or for many.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.source import memory_of
from gpt2lite.devices import CPU, copies_async, pinned_bytes, synchronize
from gpt2lite.dialects.reading import block_of
from gpt2lite.errors import UsageError
from gpt2lite.loading import stream
from gpt2lite.loading.forecast import Ledger
from gpt2lite.loading.plan import LoadPlan, Target
from gpt2lite.memory import MIB, human
from gpt2lite.quantization import scale_of

BLOCKS = "trf_blocks"
SLOTS = 2  # one computes while the other is filled
FEWEST_AWAY = SLOTS + 1  # of fewer the places would take as much as the blocks
CHUNK_BYTES = 4 * MIB  # so that one block keeps all readers busy
TRIAL_BYTES = 64 * MIB  # that are read to find out how fast a file comes
TOKENS = 256  # whose keys and values, of one text, are left room for
INTERRUPTED = "a model with offload began another pass before this one had ended; use one thread at a time"

Fill = Callable[[Mapping[str, Tensor]], None]  # of one block's tensors, by their names in the model


class Offloaded(nn.Sequential):
    """The blocks of a model, of which only the first are its own: the others are here while they compute.

    Iterating is a pass, and gives all of them in order; each is what it is until the next one is asked for.
    Nothing is open, and no thread runs, between two passes. A second pass, also in another thread, ends one
    that is not at its end: that one then raises UsageError.
    """

    def __init__(
        self, own: Sequence[nn.Module], slots: Sequence[nn.Module], fills: Sequence[Fill], place: str
    ) -> None:
        super().__init__(*own)
        self.place, self.away = place, tuple(fills)
        self.slots: tuple[Any, ...] = tuple(slots)  # no children: they are no part of the model's state
        self.check_unchanged: Callable[[], None] = lambda: None
        self._beginning, self._pool, self._latest = Lock(), ThreadPoolExecutor(1), [*slots]
        self._pool.shutdown()
        for slot in slots:
            slot.register_forward_pre_hook(self._require_computable)

    def extra_repr(self) -> str:
        """What is not in the model's own memory."""
        return f"(blocks {len(self._modules)} to {len(self) - 1} on {self.place})"

    def __len__(self) -> int:
        return len(self._modules) + len(self.away)

    def __iter__(self) -> Iterator[nn.Module]:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            self.refuse()
        self.check_unchanged()
        with self._beginning:
            earlier, self._pool = self._pool, (pool := ThreadPoolExecutor(1, "gpt2lite-offload"))
            earlier.shutdown(cancel_futures=True)  # nobody else fills a slot
            coming = deque(pool.submit(self._bring, number) for number in range(SLOTS))
        try:
            for block in self._blocks(pool, coming):
                self._latest = [block]
                yield block
                if self._pool is not pool:
                    raise UsageError(INTERRUPTED)
        except (RuntimeError, CancelledError):  # it was ended between the check and its next fill
            if self._pool is pool:
                raise
            raise UsageError(INTERRUPTED) from None
        finally:
            pool.shutdown(cancel_futures=True)
        self.check_unchanged()

    def _blocks(self, pool: ThreadPoolExecutor, coming: deque[Future[nn.Module]]) -> Iterator[nn.Module]:
        yield from self.children()
        for number in range(len(self.away)):
            yield coming.popleft().result().train(self.training)
            if number + SLOTS < len(self.away):
                coming.append(pool.submit(self._bring, number + SLOTS))

    @torch.no_grad()
    def _bring(self, number: int) -> nn.Module:
        """The slot that holds the `number`-th of the blocks that are away."""
        slot, layer = self.slots[number % SLOTS], len(self._modules) + number
        found = [*slot.named_parameters(), *slot.named_buffers()]
        synchronize(found[0][1].device)  # whatever reads the slot's last content is done
        self.away[number]({f"{BLOCKS}.{layer}.{name}": tensor for name, tensor in found})
        slot.att.layer = layer
        return slot

    def _require_computable(self, slot: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if [slot] != self._latest:
            raise UsageError("a block of a model with offload was kept, and is another one by now")
        if torch.is_grad_enabled() and inputs[0].requires_grad:
            self.refuse()

    def refuse(self, *_: object, **__: object) -> NoReturn:
        """Raise UsageError: what was tried needs all blocks at once."""
        raise UsageError(
            f"the model has {len(self.away)} blocks on {self.place}: it computes and generates, and is "
            "neither saved, copied, moved, recorded nor trained. Load it without offload"
        )

    __deepcopy__ = __reduce_ex__ = __getitem__ = refuse


def require_whole(model: object) -> None:
    """Raise UsageError for a model that has blocks elsewhere."""
    if isinstance(blocks := getattr(model, BLOCKS, None), Offloaded):
        blocks.refuse()


# ---- planning ----------------------------------------------------------------------------------------------


def require_able(plan: LoadPlan, place: object) -> None:
    """Raise UsageError where a plan cannot leave blocks at a place."""
    path, wanted = plan.manifest.path, ("auto", *PLACES)
    if place not in wanted:
        raise UsageError(f"offload must be {', '.join(wanted)} or None, got {place!r}")
    if type(plan.skeleton).__module__ != "gpt2lite.model":
        raise UsageError(f"{path}: offload knows the blocks of a GPTModel; load another module without it")
    if place == "host" and plan.device == CPU:
        raise UsageError(f'{path}: the model is on the host already; use offload="disk"')
    lacks = {
        "LoRA layers, which are merged at loading": plan.reading.adapters,
        "int8 weights, which are made at loading": plan.is_quantized and place == "disk",
        "a model over several ranks": plan.is_divided or plan.is_repeated,
        "a file that lies elsewhere": not all(source.is_local for source in plan.manifest.files),
    }
    if found := [name for name, is_there in lacks.items() if is_there]:
        raise UsageError(
            f'{path}: offload="{place}" does not go with {found[0]}; load it without one of them'
        )


def left_away(plan: LoadPlan, place: str, count: int) -> LoadPlan:
    """The plan with its last `count` blocks left away."""
    first = len(_blocks_of(plan.skeleton)) - count
    away = tuple(target for target in plan.targets if block_of(target.names[0]) >= first)
    own = tuple(target for target in plan.targets if block_of(target.names[0]) < first)
    return replace(plan, targets=own, away=away, offload=place)


def smallest(plan: LoadPlan, place: str, fits: Callable[[LoadPlan], bool]) -> LoadPlan | None:
    """The plan with as few blocks away as fit, or none of them; None where nothing fits."""
    if fits(plan):
        return plan
    counts = range(FEWEST_AWAY, len(_blocks_of(plan.skeleton)) + 1)
    found = bisect_left(counts, True, key=lambda count: fits(left_away(plan, place, count)))
    return left_away(plan, place, counts[found]) if found < len(counts) else None


def room(plan: LoadPlan) -> int:
    """Bytes that computing takes: logits, and keys and values of one text of TOKENS tokens."""
    like = next(target for target in plan.targets if target.names[0] == "pos_emb.weight")
    head = next(target for target in plan.targets if "out_head.weight" in target.names)
    tokens = min(TOKENS, like.shape[0])
    layers = 1 + max(block_of(target.names[0]) for target in (*plan.targets, *plan.away))
    return 4 * head.shape[0] + 2 * layers * tokens * like.shape[1] * like.dtype.itemsize


def _blocks_away(plan: LoadPlan) -> list[LoadPlan]:
    """For each block that is away, a plan of it alone."""
    blocks: dict[int, list[Target]] = {}
    for target in plan.away:
        blocks.setdefault(block_of(target.names[0]), []).append(target)
    tuning = replace(plan.tuning, chunk_bytes=min(plan.tuning.chunk_bytes, CHUNK_BYTES))
    alone = replace(plan, away=(), tuning=tuning, progress=lambda done, total: None)
    return [replace(alone, targets=tuple(blocks[number])) for number in sorted(blocks)]


def bytes_a_pass(plan: LoadPlan) -> int:
    """Bytes that move onto the device whenever the model computes."""
    return sum(PLACES[plan.offload].moved(block) for block in _blocks_away(plan))


def takes(plan: LoadPlan) -> str:
    """What a token takes, at the rate at which one thread reads what is away, measured now."""
    source = plan.away[0].span.source
    begin = min(target.span.offset for target in plan.away)
    nbytes = min(TRIAL_BYTES, source.state().size - begin)
    memory = memory_of(torch.empty(nbytes, dtype=torch.uint8))
    with source.reader(past_cache=source.is_best_past_cache()) as reader:
        began = time.perf_counter()
        reader.read_into([memory], begin)
        rate = nbytes / (time.perf_counter() - began)
    return f"about {bytes_a_pass(plan) / rate:.2g} s a token at the {human(int(rate))}/s measured"


def forecast(plan: LoadPlan, ledger: Ledger) -> None:
    """What blocks that are away add: their slots, and what their place takes of the host."""
    blocks = _blocks_away(plan)
    for _ in range(SLOTS):
        stream.forecast_allocated(blocks[0], ledger)
    PLACES[plan.offload].enter(blocks, ledger)


def _enter_disk(blocks: Sequence[LoadPlan], ledger: Ledger) -> None:
    """What reading a block takes for as long as that goes on."""
    first, reading = blocks[0], Ledger(blocks[0].device)
    stream.forecast(first, reading)
    ledger.host.touch(reading.host.peak - (first.model_bytes if ledger.on_cpu else 0))
    ledger.device.touch(first.schedule.lane_buffers * first.schedule.slot_bytes)


def _enter_host(blocks: Sequence[LoadPlan], ledger: Ledger) -> None:
    for target in (target for block in blocks for target in block.targets):
        for nbytes in (target.nbytes, target.scale_bytes):
            ledger.host.take(pinned_bytes(nbytes) if copies_async(blocks[0].device) else nbytes)


# ---- the load ----------------------------------------------------------------------------------------------


def attach(plan: LoadPlan, model: nn.Module) -> nn.Module:
    """The model, whose blocks that are away come in as it computes; the others have been loaded."""
    blocks, every = _blocks_away(plan), _blocks_of(model)
    fills = [PLACES[plan.offload].keep(block) for block in blocks]
    own, slots = every[: -len(blocks)], every[-len(blocks) :][:SLOTS]
    for block in blocks[:SLOTS]:
        stream.allocate(block)
    found = Offloaded(own, slots, fills, plan.offload)
    if plan.offload == "disk":
        found.check_unchanged = plan.manifest.check_unchanged
    setattr(model, BLOCKS, found.eval())
    for part in (model, *slots):
        part.requires_grad_(False)
    model.register_state_dict_pre_hook(found.refuse)
    model.register_load_state_dict_pre_hook(found.refuse)
    vars(model)["_apply"] = found.refuse  # of `to`, `half` and the like, before they have changed anything
    return model


def _blocks_of(model: nn.Module) -> list[nn.Module]:
    return [*model.get_submodule(BLOCKS).children()]


def _in_file(block: LoadPlan) -> Fill:
    return partial(stream.fill, block.schedule, block.tuning, block.device)


def _on_host(block: LoadPlan) -> Fill:
    """Read a block into host memory, page-locked where the device copies from that."""
    empty = partial(torch.empty, device=CPU, pin_memory=copies_async(block.device))
    held = {target.names[0]: empty(target.shape, dtype=target.dtype) for target in block.targets}
    for target in block.targets:
        if target.is_quantized:
            held[scale_of(target.names[0])] = empty(target.shape[0], dtype=torch.float32)
    stream.fill(replace(block, device=CPU).schedule, block.tuning, CPU, held)

    def fill(tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in held.items():
            tensors[name].copy_(tensor, non_blocking=True)
        synchronize(block.device)

    return fill


class Place(NamedTuple):
    """Where blocks stay: what keeps one and fills a slot with it, what of it moves, what enters the cost."""

    keep: Callable[[LoadPlan], Fill]
    moved: Callable[[LoadPlan], int]
    enter: Callable[[Sequence[LoadPlan], Ledger], None]


PLACES = {
    "disk": Place(_in_file, lambda block: sum(chunk.nbytes for chunk in block.schedule.chunks), _enter_disk),
    "host": Place(_on_host, lambda block: block.model_bytes, _enter_host),
}
