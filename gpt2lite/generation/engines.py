"""Tokens through a model and its cache: by torch itself, numba's loops on the CPU, or a recorded graph."""

from __future__ import annotations

import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt2lite.config import GPTConfig
from gpt2lite.devices import CPU, MULTIPLIES, WORKSPACE_BYTES, emulates, has_graphs, record
from gpt2lite.errors import InsufficientMemoryError, UsageError, first_line, is_out_of_memory
from gpt2lite.loading.offload import Offloaded
from gpt2lite.memory import MIB, find_budget, human
from gpt2lite.parallel import is_divided
from gpt2lite.quantization import Int8Embedding, Int8Linear

Step = Callable[[Tensor], Tensor]  # ids (B, T) → logits (B, V) of the last; the cache grows by T tokens
FLOATS = (torch.float32, torch.bfloat16)  # in which numba's loops compute
# Texts × tokens of a step for numba, and of int8 where the processor multiplies it; for more torch's matrix
# products are faster.
MOST_ROWS, MOST_ROWS_IN_INTEGERS = 64, 256
# Worth starting from this many tokens (graph), or weights × tokens (numba, which takes
# half a second to start: 20 tokens of gpt2).
FEWEST_FOR_GRAPH, FEWEST_FOR_NUMBA = 16, 25 * 10**8
# The classes that numba's loops compute: `model`'s, by its name, since it imports this module.
OURS, FIRST_BLOCK = "gpt2lite.model", re.compile(r"^trf_blocks\.\d+")
SAME = {"Linear": (nn.Linear, Int8Linear), "Embedding": (nn.Embedding, Int8Embedding)}
ONE_AT_A_TIME = threading.Lock()  # not all of numba's thread pools can be entered twice
NUMBA_FAILED: list[str] = []  # why numba is not tried again in this process
GENERATED = set[int]()  # the processes that generated: this one, and those that it was forked from
OUT_OF_MODE = threading.RLock()  # held while a model in training mode computes without dropout


# ---- keys and values of the tokens seen so far -------------------------------------------------------------


class KVCache:
    """Keys and values of at most `capacity` tokens per row, in the dtype and on the device of `like`.

    `length` counts the tokens in it. Row b begins with `pads[b]` padding tokens: shorter prompts are padded
    on the left; `n_heads` are fewer where ranks share them. Memory: (n_layers, 2, B, H, capacity, D), of gpt2
    in fp32 72 KiB per token and row; raises
    InsufficientMemoryError, before it is allocated, if that is not available.
    """

    def __init__(
        self, config: GPTConfig, batch: int, capacity: int, like: Tensor, pads: Any = None, n_heads: int = 0
    ) -> None:
        shape = (config.n_layers, 2, batch, n_heads or config.n_heads, capacity, config.head_dim)
        needed = math.prod(shape) * like.dtype.itemsize
        place = "host" if like.device.type == "cpu" else "device"
        limit = find_budget(like.device).of(place)
        if not limit.admits(needed):
            raise InsufficientMemoryError(
                f"keys and values of {batch} × {capacity} tokens take {human(needed)} on {like.device}; "
                f"available: {limit.said}. Nothing was allocated; ask for fewer tokens or prompts",
                needed={place: needed},
                available={place: limit.nbytes or 0},
            )
        self.memory = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length, self.pads = 0, pads

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) behind `length` and return all S = length + T; `length` is unchanged."""
        end = self.length + k.shape[2]
        keys, values = self.memory[layer, :, :, :, :end]
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        return keys, values

    def positions(self, T: int) -> Tensor:
        """Text positions of the next T tokens, (T,) or (B, T)."""
        columns = torch.arange(self.length, self.length + T, device=self.memory.device)
        return columns if self.pads is None else (columns - self.pads[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor | None:
        """Which of S = length + T tokens the next T may see, (T, S) or (B, 1, T, S); None: all before each.

        Padding attends only to itself, since a softmax over nothing is NaN and would spread.
        """
        if self.pads is None and (T == 1 or not self.length):
            return None
        columns = torch.arange(self.length + T, device=self.memory.device)
        causal = columns <= columns[self.length :, None]
        if self.pads is None:
            return causal
        is_text = columns >= self.pads[:, None, None, None]
        return (causal & is_text) | (columns == columns[self.length :, None])

    def advance(self, T: int) -> None:
        """Count T more tokens, which every layer has appended."""
        self.length += T


class CursorCache(KVCache):
    """The memory of a `KVCache`, its length kept on the device: every step of one token is the same work.

    That is what a recorded graph needs; attention reads the whole capacity each time. Whoever runs a step
    first has it `follow` the cache. `cursor`, (1,) int64, is the number of tokens before the step.
    """

    def __init__(self, cache: KVCache) -> None:
        self.memory, self.length = cache.memory, cache.length
        self.memory[:, :, :, :, self.length :] = 0  # a masked token weighs 0, and 0 × NaN would be NaN
        zeros = partial(torch.zeros, dtype=torch.int64, device=cache.memory.device)
        self.cursor, self.pads = zeros(1), zeros(cache.memory.shape[2])
        self.followed: Tensor | None = None  # the cache's own pads, of which `pads` are a copy
        self.follow(cache)

    def follow(self, cache: KVCache) -> None:
        """Stand where the cache stands, in the same memory."""
        self.cursor.fill_(cache.length)
        if cache.pads is not self.followed:  # a window slid
            self.pads.copy_(torch.zeros_like(self.pads) if cache.pads is None else cache.pads)
            self.followed = cache.pads

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, 1, D) at the cursor and return the whole capacity."""
        keys, values = self.memory[layer]
        return keys.index_copy_(2, self.cursor, k), values.index_copy_(2, self.cursor, v)

    def positions(self, T: int) -> Tensor:
        """The next position, (B, 1)."""
        return self.cursor - self.pads[:, None]

    def mask(self, T: int) -> Tensor:
        """Which tokens are text, at the cursor or before it: (B, 1, 1, capacity)."""
        columns = torch.arange(self.memory.shape[4], device=self.memory.device)
        return (columns <= self.cursor) & (columns >= self.pads[:, None, None, None])

    def advance(self, T: int) -> None:
        """Do nothing: replays run no Python."""


# ---- torch -------------------------------------------------------------------------------------------------


class LanguageModel(Protocol):
    """What can generate and be evaluated: a GPTModel, or an `nn.Module` with these parts of one."""

    config: GPTConfig

    @property
    def pos_emb(self) -> nn.Embedding:
        """Its weight gives the device and the dtype of the cache."""

    @property
    def out_head(self) -> nn.Linear:
        """Hidden states (..., C) → logits (..., V)."""

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) → (B, T, C); a cache is extended by T tokens."""

    def modules(self) -> Iterator[nn.Module]:
        """Of `nn.Module`, as `parameters`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them, tied ones once."""


@contextmanager
def in_eval_mode(model: LanguageModel) -> Iterator[None]:
    """No module of the model is in training mode; afterwards, also after an error, each is as it was.

    Only one thread at a time changes a model's mode: another would find it in eval mode, and get dropout
    back midway. Only the flags are set, since some modules override `train` and do more.
    """
    with OUT_OF_MODE:
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            if training:
                yield
        finally:
            for module in training:
                module.training = True
    if not training:
        yield


def last_logits(model: LanguageModel, ids: Tensor, cache: KVCache) -> Tensor:
    """Ids (B, T) → logits (B, V) of the last one, without dropout; only it reaches the head."""
    with in_eval_mode(model):
        return model.out_head(model.hidden(ids, cache)[:, -1])


# ---- numba -------------------------------------------------------------------------------------------------


def _linears(block: Any) -> list[Any]:
    """A block's linear layers, in the order in which `kernels.run_block` unpacks them."""
    att, layers = block.att, block.ff.layers
    return [att.W_query, att.W_key, att.W_value, att.out_proj, layers[0], layers[2]]


def _is_plain(linear: Any) -> bool:
    """Whether the loops can read a layer's weight."""
    return isinstance(linear, Int8Linear) or (linear.weight.dtype in FLOATS and 1 in linear.weight.stride())


def _changed(model: Any) -> str:
    """The first part of a model that may compute something else than the loops do, or ""."""
    if type(model).__module__ != OURS:
        return type(model).__name__
    with torch.device("meta"):  # a few milliseconds, no memory
        like = dict(type(model)(replace(model.config, n_layers=1)).named_modules())
    if len(model.trf_blocks) != model.config.n_layers:
        return "trf_blocks"
    for name, module in model.named_modules():
        twin = like.get(FIRST_BLOCK.sub("trf_blocks.0", name))
        is_same = type(module) in (type(twin), *SAME.get(type(twin).__name__, ()))
        is_same = is_same and not (isinstance(module, nn.GELU) and repr(module) != repr(twin))
        is_same = is_same and getattr(module, "n_heads", 0) == getattr(twin, "n_heads", 0)
        own = {*vars(module)} & {"forward", "hidden"} or module._forward_hooks or module._forward_pre_hooks
        if own or not is_same:
            return name or type(model).__name__
    return ""


def require_threads() -> None:
    """Raise UsageError in a process forked from one that generated: OpenMP would wait for its threads."""
    if _is_forked() and torch.get_num_threads() > 1:
        lacks = "this process was forked from one that generated, and has none of its threads"
        raise UsageError(f"{lacks}; start it by spawn, or call torch.set_num_threads(1) in it first")
    GENERATED.add(os.getpid())


def _is_forked() -> bool:
    return bool(GENERATED - {os.getpid()})


def _lacks_for_numba(model: Any, batch: int) -> str:
    if _is_forked():
        return "this process was forked from one that generated, and has none of its threads"
    if changed := _changed(model):
        return f"{changed} is not as in GPTModel"
    like = model.pos_emb.weight
    linears = [model.out_head, *(linear for block in model.trf_blocks for linear in _linears(block))]
    if like.device.type != "cpu":
        return "the model is not on the CPU"
    if batch > MOST_ROWS:
        return f"a batch of {batch} is more than {MOST_ROWS}"
    if len({linear.weight.dtype for linear in linears}) > 1 or not all(map(_is_plain, linears)):
        return "its layers are not all plain, in float32, bfloat16 or int8"
    if like.dtype not in FLOATS:
        return f"it computes in {like.dtype}"
    try:
        import gpt2lite.generation.kernels  # noqa: F401  # here, since numba takes half a second
    except ImportError as error:
        return f"numba cannot be imported ({error}): pip install 'gpt2lite[cpu]'"
    except Exception as error:  # a RuntimeError where numba finds no writable cache folder
        _give_up_numba(error)
    return "".join(NUMBA_FAILED)


def products() -> str:
    """How this processor multiplies weights with activations, and why so."""
    try:
        from gpt2lite.generation.kernels import HAS_INTEGERS, LANES
    except Exception as error:
        loops = f"torch, since numba does not work here ({first_line(error)})"
    else:
        ints = "int8 as it is, by VNNI" if HAS_INTEGERS else "int8 widened, without VNNI"
        loops = f"numba, {LANES} numbers a register, {ints}"
    emulated = [f"{dtype}".removeprefix("torch.") for dtype in MULTIPLIES if emulates(CPU, dtype)]
    widened = f"; {' and '.join(emulated)} widened to float32, since the processor lacks them"
    return loops + widened * bool(emulated)


def _give_up_numba(error: Exception) -> None:
    """Warn, once, that torch takes over."""
    if not NUMBA_FAILED:
        NUMBA_FAILED.append(f"numba does not work here ({type(error).__name__}: {first_line(error)})")
        advice = 'Set NUMBA_CACHE_DIR to an empty writable folder, or pass engine="torch".'
        warnings.warn(f"{NUMBA_FAILED[0]}; torch generates instead. {advice}", UserWarning, stacklevel=2)


def _numba_step(model: Any, cache: KVCache) -> Step:
    from gpt2lite.generation import kernels

    blocks = [
        (*map(kernels.norm_of, (block.norm1, block.norm2)), *map(kernels.matrix_of, _linears(block)))
        for block in model.trf_blocks
    ]
    final, head = kernels.norm_of(model.final_norm), kernels.matrix_of(model.out_head)
    activation = {"gelu_tanh": kernels.GELU_TANH, "gelu": kernels.GELU_EXACT}[model.config.activation]
    memory = cache.memory.view(torch.uint16) if cache.memory.dtype == torch.bfloat16 else cache.memory
    layers, batch = list(memory.numpy()), memory.shape[2]
    is_integers = kernels.HAS_INTEGERS and isinstance(model.out_head, Int8Linear)
    most_rows = MOST_ROWS_IN_INTEGERS if is_integers else MOST_ROWS
    no_pads = torch.zeros(batch, dtype=torch.int64, device="cpu")

    def loops(ids: Tensor) -> Tensor:
        T = ids.shape[1]
        pads = no_pads if cache.pads is None else cache.pads
        x = (model.tok_emb(ids) + model.pos_emb(cache.positions(T))).float().flatten(0, 1).contiguous()
        logits = torch.empty(batch, len(model.out_head.weight), dtype=torch.float32, device="cpu")
        with ONE_AT_A_TIME, kernels.threads_of_torch() as parts:
            for block, memory in zip(blocks, layers, strict=True):
                kernels.run_block(block, x.numpy(), memory, cache.length, pads.numpy(), activation, parts)
            last = x[T - 1 :: T].contiguous()
            kernels.run_head(final, head, last.numpy(), logits.numpy(), parts)
        cache.advance(T)
        return logits

    def step(ids: Tensor) -> Tensor:
        if ids.numel() <= most_rows and not NUMBA_FAILED:
            try:
                return loops(ids)
            except Exception as error:  # its cache is damaged, its threads cannot start, …
                _give_up_numba(error)
        return last_logits(model, ids, cache)

    return step


# ---- graphs ------------------------------------------------------------------------------------------------


def graph_bytes(model: LanguageModel, batch: int) -> int:
    """What recording a step takes beside the cache, at most: its own memory, and a workspace.

    Its pool has a segment for small tensors and one for large ones; logits, and what is made of them, may be
    larger than that.
    """
    logits = 3 * 4 * batch * len(model.out_head.weight)
    return WORKSPACE_BYTES + 22 * MIB + logits


def _graph_step(model: LanguageModel, cache: KVCache) -> Step:
    """Single tokens replay a recorded graph, without Python or launches; longer inputs go to torch.

    It is recorded once: ids, cursor and pads lie where it reads them. Where its memory is not there, which it
    says in a warning, torch goes on.
    """
    recorded: tuple[CursorCache, Tensor, Callable[[], None], Tensor] | None = None
    is_refused = False

    def step(ids: Tensor) -> Tensor:
        nonlocal recorded, is_refused
        if ids.shape[1] > 1 or is_refused:
            return last_logits(model, ids, cache)
        if recorded is None:
            moving, own = CursorCache(cache), ids.clone()
            try:
                recorded = moving, own, *record(ids.device, lambda: last_logits(model, own, moving))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                is_refused = True
                said = f"no memory to record a graph ({first_line(error)}); torch generates instead"
                warnings.warn(said, UserWarning, stacklevel=2)
                return last_logits(model, ids, cache)
        moving, own, replay, logits = recorded
        own.copy_(ids)
        moving.follow(cache)
        replay()
        cache.advance(1)
        return logits

    return step


# ---- the choice --------------------------------------------------------------------------------------------


def _lacks_for_graph(model: LanguageModel, batch: int) -> str:
    if any(map(is_divided, model.parameters())):
        return "the model is divided over ranks"
    if isinstance(getattr(model, "trf_blocks", None), Offloaded):
        return "some of its blocks come from elsewhere"
    device = model.pos_emb.weight.device
    if not has_graphs(device):
        return "the model is not on a GPU"
    needed, limit = graph_bytes(model, batch), find_budget(device).device
    if not limit.admits(needed):
        return f"recording takes {human(needed)} on {device}; available: {limit.said}"
    return ""


# Per engine: why it cannot run this model and batch ("" if it can), and what makes a step.
ENGINES: dict[str, tuple[Callable[[LanguageModel, int], str], Callable[[LanguageModel, KVCache], Step]]] = {
    "numba": (_lacks_for_numba, _numba_step),
    "cuda_graph": (_lacks_for_graph, _graph_step),
    "torch": (lambda model, batch: "", lambda model, cache: partial(last_logits, model, cache=cache)),
}


def choose_engine(model: LanguageModel, batch: int, tokens: int, engine: str) -> str:
    """The name of the engine: "auto" is the first that can run this model and is worth starting.

    Raises UsageError for one that cannot run the model.
    """
    if engine != "auto":
        if lacks := ENGINES[engine][0](model, batch):
            raise UsageError(f'engine="{engine}" cannot run this model: {lacks}')
        return engine
    read = tokens * sum(parameter.numel() for parameter in model.parameters())
    worth = {"numba": read >= FEWEST_FOR_NUMBA, "cuda_graph": tokens >= FEWEST_FOR_GRAPH, "torch": True}
    return next(name for name in ENGINES if worth[name] and not ENGINES[name][0](model, batch))
