"""Token after token: prefill the cache with the prompts, then decode, one token of each row at a time.

Nothing here knows GPTModel: a model is what has `config`, `hidden(ids, cache)`, `out_head` and embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from gpt2lite.config import GPTConfig
from gpt2lite.encoding import Encoding
from gpt2lite.errors import UsageError
from gpt2lite.generation.cache import KVCache, require_room
from gpt2lite.generation.engines import choose_engine, make_step
from gpt2lite.generation.prompts import Batch, Stops, as_batch, usable_vocabulary
from gpt2lite.generation.sampling import Sampling, draw, make_generators, penalise

Ids = Tensor | Sequence[Tensor | Sequence[int]]


def require_language_head(config: GPTConfig) -> None:
    """Raise UsageError for a classifier, which has no words to give."""
    if config.n_classes:
        raise UsageError(f"this model is a classifier of {config.n_classes} classes and writes no text")


def _fitted(batch: Batch, max_new_tokens: int, window: int | None, config: GPTConfig) -> Batch:
    """The prompts, cut to the window where there is one. Raises UsageError where they do not fit."""
    context, T = config.context_length, batch.ids.shape[1]
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if window is not None and (type(window) is not int or not 0 < window < context):
        raise UsageError(f"window must be an int in 1 … {context - 1}, got {window!r}")
    if T + max_new_tokens <= context:
        return batch
    if window is None:
        raise UsageError(
            f"a prompt of {T} tokens and {max_new_tokens} new ones are more than the context of {context}; "
            f"shorten the prompt, ask for {max(context - T, 0)} at most, or let a window slide: "
            f"window={max(context // 2, 1)} keeps that many tokens whenever the context is full"
        )
    return batch.last(window) if context <= T else batch


def _decode(
    model: Any,
    ids: Ids,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Collection[int | str],
    encoding: Encoding | None,
    seed: int | None,
    window: int | None,
    engine: str,
) -> tuple[Batch, Stops, Iterator[Tensor]]:
    """Check everything, then (prompts, stops, tokens as they come)."""
    config, like = model.config, model.pos_emb.weight
    require_language_head(config)
    prompts = as_batch(ids, config, like.device)
    batch = _fitted(prompts, max_new_tokens, window, config)
    n_rows, T = batch.ids.shape
    generators = make_generators(seed, n_rows, like.device)
    stops = Stops(stop, encoding, n_rows, config.vocab_size, like.device)
    engine = choose_engine(model, n_rows, max_new_tokens, engine)
    capacity = min(T + max_new_tokens, config.context_length)
    require_room(config, n_rows, capacity, like)
    vocabulary = usable_vocabulary(config, encoding)

    @torch.inference_mode()
    def tokens(batch: Batch) -> Iterator[Tensor]:
        cache = KVCache(config, n_rows, capacity, like, batch.pads)
        seen = batch.seen(config.vocab_size) if sampling.repetition_penalty != 1 else None
        step = make_step(model, cache, engine)
        logits = step(batch.ids)
        for number in range(1, max_new_tokens + 1):
            logits = logits[:, :vocabulary]
            if seen is not None:
                logits = penalise(logits, seen[:, :vocabulary], sampling.repetition_penalty)
            token = stops.take(draw(logits, sampling, generators))
            yield token
            if stops.all_stopped or number == max_new_tokens:
                return
            if seen is not None:
                seen.scatter_(1, token, True)
            if window is not None:
                batch = batch.followed_by(token)
            if cache.length < capacity:
                logits = step(token)
            else:
                assert window is not None
                batch = batch.last(window)
                cache.restart(batch.pads)
                logits = step(batch.ids)

    return prompts, stops, tokens(batch)


def generate_tokens(
    model: Any,
    ids: Ids,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Collection[int | str] = (),
    encoding: Encoding | None = None,
    seed: int | None = None,
    window: int | None = None,
    engine: str = "auto",
) -> Iterator[Tensor]:
    """Yield what `generate` appends, token ids (B, 1) int64, as they come; its arguments, costs and errors.

    Arguments are checked at once, before the first token is asked for.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return _decode(model, ids, max_new_tokens, sampling, stop, encoding, seed, window, engine)[2]


@overload
def generate(model: Any, ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor: ...


@overload
def generate(
    model: Any, ids: Sequence[Tensor | Sequence[int]], max_new_tokens: int, **options: Any
) -> list[Tensor]: ...


def generate(  # type: ignore[misc]  # the overloads leave the options to it
    model: Any,
    ids: Ids,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Collection[int | str] = (),
    encoding: Encoding | None = None,
    seed: int | None = None,
    window: int | None = None,
    engine: str = "auto",
) -> Tensor | list[Tensor]:
    """Prompts and their continuations, by default greedy.

    `ids` (B, T) gives a tensor (B, T + new), int64, in which rows that stopped earlier are filled up with
    what they stopped at; a list of B rows of any lengths gives a list of B tensors, each ending where it
    stopped. Every row is what it would be alone; with a `seed`, row b is drawn as alone with `seed + b`.

    `temperature` above 0 draws, after `repetition_penalty` (above 1: what was there becomes less likely),
    among the `top_k` likeliest, the likeliest that have `top_p` of the probability together, and what has
    `min_p` times the likeliest's. `stop` holds token ids and strings, at which a row ends and which it still
    has; strings need the `encoding`, past whose vocabulary nothing is drawn. Without one, rows that only pad
    GPT-2's vocabulary to a multiple of 64 are never drawn.

    The prompt and what is asked for must fit the context, unless there is a `window`: whenever the context is
    full, the last `window` tokens are read again and the rest is forgotten; of a batch all rows at once, when
    its longest is full.

    `engine` runs tokens through the model: "numba", loops at the speed of memory (the extra [cpu]; float32,
    bfloat16 and int8 models on the CPU, up to 128 rows), "cuda_graph", or "torch"; "auto" takes the first
    that can and is worth its start. Allocates one KVCache, 2 × n_layers × emb_dim elements a token and row.

    Raises UsageError for arguments that cannot work, InsufficientMemoryError, before anything is allocated,
    where the cache does not fit.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts, stops, tokens = _decode(
        model, ids, max_new_tokens, sampling, stop, encoding, seed, window, engine
    )
    produced, lengths = [], torch.zeros_like(stops.running, dtype=torch.int64)
    running = stops.running
    for token in tokens:
        produced.append(token)
        lengths += running
        running = stops.running
    new = torch.cat(produced, 1)
    if not prompts.is_ragged:
        return torch.cat([prompts.ids, new], 1)
    pads = torch.zeros_like(lengths) if prompts.pads is None else prompts.pads
    rows = zip(prompts.ids, pads.tolist(), new, lengths.tolist(), strict=True)
    return [torch.cat([prompt[pad:], more[:length]]) for prompt, pad, more, length in rows]
