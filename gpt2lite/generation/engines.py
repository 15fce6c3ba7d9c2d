"""What runs tokens through the model: torch itself, numba's loops on the CPU, a CUDA graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt2lite.errors import UsageError, first_line
from gpt2lite.generation.cache import CursorCache, KVCache
from gpt2lite.quantization import Int8Linear

if TYPE_CHECKING:
    from gpt2lite.generation.kernels import Matrix

Step = Callable[[Tensor], Tensor]  # ids (B, T) → logits (B, V) of the last; the cache grows by T tokens
MOST_ROWS = 128  # of texts times tokens for numba; above it torch's products of whole blocks win
# What is worth the start of an engine: tokens for a CUDA graph; for numba's half a second the weights read,
# over all tokens (20 of gpt2).
FEWEST_FOR_GRAPH, FEWEST_FOR_NUMBA = 16, 25 * 10**8
ONE_AT_A_TIME = threading.Lock()  # not all of numba's thread pools can be entered twice
NUMBA_FAILED: list[str] = []  # why numba is not tried again in this process
OUT_OF_MODE = threading.RLock()  # held while a model that trains computes without dropout


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """No module of the model is in training mode; afterwards, also after an error, each is as it was.

    Only one thread at a time has a model out of its mode: another would take it for one in eval mode, and get
    dropout back on the way. The flags alone are set, since some modules override `train` and do more.
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


def last_logits(model: Any, ids: Tensor, cache: KVCache) -> Tensor:
    """Ids (B, T) → logits (B, V) of the last of them, without dropout; the head sees no other."""
    with in_eval_mode(model):
        return model.out_head(model.hidden(ids, cache)[:, -1])


# ---- torch -------------------------------------------------------------------------------------------------


def _torch_step(model: Any, cache: KVCache) -> Step:
    return lambda ids: last_logits(model, ids, cache)


# ---- numba -------------------------------------------------------------------------------------------------


def _is_plain(linear: Any) -> bool:
    """Whether a layer computes what the loops do: no LoRA around it, no other dtype or order."""
    if isinstance(linear, Int8Linear):
        return True
    if type(linear).forward is not nn.Linear.forward:
        return False
    weight = linear.weight
    return weight.dtype in (torch.float32, torch.bfloat16) and 1 in weight.stride()


def _lacks_for_numba(model: Any, batch: int) -> str:
    """Why the loops cannot run this model; empty where they can."""
    linears = [
        linear
        for block in model.trf_blocks
        for linear in (
            *(block.att.W_query, block.att.W_key, block.att.W_value, block.att.out_proj),
            *(block.ff.layers[0], block.ff.layers[2]),
        )
    ]
    dtypes = {linear.weight.dtype for linear in (*linears, model.out_head)}
    if model.pos_emb.weight.device.type != "cpu":
        return "the model is not on the CPU"
    if batch > MOST_ROWS:
        return f"a batch of {batch} is more than {MOST_ROWS}"
    if len(dtypes) > 1 or not all(map(_is_plain, (*linears, model.out_head))):
        return "its layers are not all plain, in float32, bfloat16 or int8"
    if model.pos_emb.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in {model.pos_emb.weight.dtype}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "it has forward hooks"
    try:
        import gpt2lite.generation.kernels  # noqa: F401  # here, since numba takes half a second
    except ImportError as error:
        return f"numba cannot be imported ({error}): pip install 'gpt2lite[cpu]'"
    except Exception as error:  # nowhere to keep what it compiles is a RuntimeError
        _give_up_numba(error)
    return "".join(NUMBA_FAILED)


def _give_up_numba(error: Exception) -> None:
    """Warn, once, that torch takes over."""
    if not NUMBA_FAILED:
        NUMBA_FAILED.append(f"numba does not work here ({type(error).__name__}: {first_line(error)})")
        advice = 'Set NUMBA_CACHE_DIR to an empty folder that can be written, or pass engine="torch".'
        warnings.warn(f"{NUMBA_FAILED[0]}; torch generates instead. {advice}", UserWarning, stacklevel=2)


def _flat(weight: Tensor) -> tuple[Any, int, bool]:
    """A weight's own memory as one row of numbers, its step, whether it stands column by column."""
    weight = weight.detach()
    (n_out, n_in), (by_row, by_column) = weight.shape, weight.stride()
    transposed = by_column != 1
    step = by_column if transposed else by_row
    extent = (n_in - 1) * step + n_out if transposed else (n_out - 1) * step + n_in
    flat = weight.as_strided((extent,), (1,))
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    return flat.numpy(), step, transposed


def _vector(tensor: Tensor | None, size: int, default: float) -> Any:
    made = torch.full((size,), default, dtype=torch.float32, device="cpu")
    return (made if tensor is None else made.copy_(tensor.detach())).numpy()


def _matrix(linear: Any) -> Matrix:
    from gpt2lite.generation.kernels import Matrix

    size = linear.weight.shape[0]
    scale = _vector(getattr(linear, "scale", None), size, 1.0)
    return Matrix(*_flat(linear.weight), scale, _vector(linear.bias, size, 0.0))


def _numba_step(model: Any, cache: KVCache) -> Step:
    from gpt2lite.generation import kernels

    def norm(layer: Any) -> tuple[Any, Any]:
        return _vector(layer.scale, len(layer.scale), 1.0), _vector(layer.shift, len(layer.scale), 0.0)

    blocks = [
        kernels.Block(  # type: ignore[call-arg]  # a map has no length
            *norm(block.norm1),
            *map(_matrix, (block.att.W_query, block.att.W_key, block.att.W_value, block.att.out_proj)),
            *norm(block.norm2),
            *map(_matrix, (block.ff.layers[0], block.ff.layers[2])),
        )
        for block in model.trf_blocks
    ]
    final, head = norm(model.final_norm), _matrix(model.out_head)
    activation = {"gelu_tanh": kernels.GELU_TANH, "gelu": kernels.GELU_EXACT}[model.config.activation]
    memory = cache.memory.view(torch.uint16) if cache.memory.dtype == torch.bfloat16 else cache.memory
    layers = list(memory.numpy())
    batch = cache.memory.shape[2]
    no_pads = torch.zeros(batch, dtype=torch.int64, device="cpu")

    def loops(ids: Tensor) -> Tensor:
        T = ids.shape[1]
        pads = no_pads if cache.pads is None else cache.pads
        x = (model.tok_emb(ids) + model.pos_emb(cache.positions(T))).float().flatten(0, 1).contiguous()
        logits = torch.empty(batch, model.out_head.weight.shape[0], dtype=torch.float32, device="cpu")
        with ONE_AT_A_TIME, kernels.threads_of_torch() as parts:
            for block, memory in zip(blocks, layers, strict=True):
                kernels.run_block(block, x.numpy(), memory, cache.length, pads.numpy(), activation, parts)
            last = x[T - 1 :: T].contiguous()
            kernels.run_head(*final, head, last.numpy(), logits.numpy(), parts)
        cache.advance(T)
        return logits

    def step(ids: Tensor) -> Tensor:
        if ids.numel() <= MOST_ROWS and not NUMBA_FAILED:
            try:
                return loops(ids)
            except Exception as error:  # its cache is damaged, its threads cannot start, …
                _give_up_numba(error)
        return last_logits(model, ids, cache)

    return step


# ---- CUDA graphs -------------------------------------------------------------------------------------------


def _lacks_for_graph(model: Any, batch: int) -> str:
    return "" if model.pos_emb.weight.is_cuda else "the model is not on a CUDA device"


def _record(model: Any, ids: Tensor, moving: CursorCache) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """One token, ids (B, 1), as a graph, and the logits that it fills when it is replayed."""
    side = torch.cuda.Stream(ids.device)
    side.wait_stream(torch.cuda.current_stream(ids.device))
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries allocate their workspaces outside of the graph
            moving.cursor.fill_(moving.length)
            last_logits(model, ids, moving)
    torch.cuda.current_stream(ids.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = last_logits(model, ids, moving)
    return graph, logits


def _graph_step(model: Any, cache: KVCache) -> Step:
    """A token is replayed without Python, or launches between its kernels; a longer prompt is torch's."""
    recorded: tuple[CursorCache, Tensor, torch.cuda.CUDAGraph, Tensor] | None = None

    def step(ids: Tensor) -> Tensor:
        nonlocal recorded
        if ids.shape[1] > 1:
            recorded = None  # the pads may be others
            return last_logits(model, ids, cache)
        if recorded is None or recorded[0].pads is not cache.pads:  # others after a window of one token
            moving, own = CursorCache(cache), ids.clone()
            recorded = moving, own, *_record(model, own, moving)
        moving, own, graph, logits = recorded
        own.copy_(ids)
        moving.cursor.fill_(cache.length)
        graph.replay()
        cache.advance(1)
        return logits

    return step


# ---- the choice --------------------------------------------------------------------------------------------

ENGINES: dict[str, tuple[Callable[[Any, int], str], Callable[[Any, KVCache], Step]]] = {
    "numba": (_lacks_for_numba, _numba_step),
    "cuda_graph": (_lacks_for_graph, _graph_step),
    "torch": (lambda model, batch: "", _torch_step),
}


def choose_engine(model: Any, batch: int, tokens: int, engine: str) -> str:
    """The name of the one to take: "auto" is the first that can run this model and is worth it.

    Raises UsageError for an unknown one, or one that cannot.
    """
    if engine not in ("auto", *ENGINES):
        raise UsageError(f"no engine is called {engine!r}; there are auto, {', '.join(ENGINES)}")
    if engine != "auto":
        lacks = ENGINES[engine][0](model, batch)
        if lacks:
            raise UsageError(f'engine="{engine}" cannot run this model: {lacks}')
        return engine
    read = tokens * sum(tensor.numel() for tensor in model.state_dict().values())
    worth = {"numba": read >= FEWEST_FOR_NUMBA, "cuda_graph": tokens >= FEWEST_FOR_GRAPH, "torch": True}
    return next(name for name in ENGINES if worth[name] and not ENGINES[name][0](model, batch))


def make_step(model: Any, cache: KVCache, engine: str) -> Step:
    """What reads a prompt into the cache, or further tokens. Its logits hold until it is called again."""
    return ENGINES[engine][1](model, cache)
