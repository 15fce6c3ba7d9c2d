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


def require_fit(T: int, max_new_tokens: int, window: int | None, config: GPTConfig) -> None:
    """Raise UsageError where a prompt of T tokens and what is asked for neither fit the context nor slide."""
    context = config.context_length
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if window is not None and (type(window) is not int or not 0 < window < context):
        raise UsageError(f"window must be an int in 1 … {context - 1}, got {window!r}")
    slide = f"let a window slide: window={max(context // 2, 1)} keeps that many whenever the context is full"
    if window is None and context <= T:
        raise UsageError(f"the prompt has {T} tokens, the context {context}; shorten it, or {slide}")
    if window is None and T + max_new_tokens > context:
        raise UsageError(
            f"a prompt of {T} tokens and {max_new_tokens} new ones are more than the context of {context}; "
            f"shorten the prompt, ask for {context - T} at most, or {slide}"
        )


def _require_finite(logits: Tensor, running: Tensor) -> None:
    """Raise UsageError where a row (B, V) that still runs has no largest logit."""
    if not bool((logits.amax(-1).isfinite() | ~running).all()):
        raise UsageError(
            f"the model's logits are NaN or infinite: its weights hold such values, or {logits.dtype} is too "
            "narrow for them. Check the checkpoint, or load it with dtype=torch.float32"
        )


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
    T = prompts.ids.shape[1]
    require_fit(T, max_new_tokens, window, config)
    batch = prompts if window is None or config.context_length > T else prompts.last(window)
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
            _require_finite(logits, stops.running)
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

    # Cloned out here they are no inference tensors, which could not be trained on.
    return prompts, stops, (token.clone() for token in tokens(batch))


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

    Arguments are checked at once, before the first token is asked for. Between tokens the model is in
    its own mode, so that the iterator may be dropped at any token.
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
    stopped. With a `seed`, row b is drawn as alone with `seed + b`. Dropout is off in any mode.

    Every row is what it would be alone, but for rounding: a batch adds up in another order than a row, which
    moves logits by a millionth in float32, and by a hundredth in bfloat16 and float16. Two tokens that are
    closer than that can change places, and the rest of the text with them: in float32 hardly ever, in 16
    bits within some dozens of tokens. Where rows must not depend on their neighbours, use float32.

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

    Raises UsageError for arguments that cannot work, and in place of the first token that would come of NaN
    or infinite logits; InsufficientMemoryError, before anything is allocated, where the cache does not fit.
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
