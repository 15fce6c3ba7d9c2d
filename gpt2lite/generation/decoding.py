"""Token after token: prefill the cache with the prompts, then decode, one token of each row at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, TypedDict, overload

import torch
from torch import Tensor

from gpt2lite.config import GPTConfig
from gpt2lite.errors import UsageError
from gpt2lite.generation.cache import KVCache, require_room
from gpt2lite.generation.engines import ENGINES, LanguageModel, choose_engine
from gpt2lite.generation.prompts import Batch, Ids, Rows, Stops, as_batch, usable_vocabulary
from gpt2lite.generation.sampling import Sampling, draw, make_generators, penalise
from gpt2lite.loading.options import check_names
from gpt2lite.tokenizer import Encoding

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GenerateOptions(TypedDict, total=False):
    """How to generate. By default greedy, without stops, within the context.

    temperature: above 0 draws, after repetition_penalty (above 1 makes ids less likely that the row already
    has), among the top_k most likely tokens, the most likely ones whose probabilities add up to top_p, and
    those with at least min_p × the top probability. seed: row b is drawn as it would be alone with seed + b.

    stop: token ids and strings; a row ends after one of them, which it keeps. Strings need the encoding, and
    no id beyond its vocabulary is drawn; without one, rows that only pad GPT-2's vocabulary to a multiple of
    64 are never drawn.

    window: go on past the context: whenever it is full, the last `window` tokens are read again and the rest
    is forgotten; in a batch for all rows at once, when the longest is full.

    engine: what runs tokens through the model: "numba", loops at the speed of memory (the extra [cpu];
    float32, bfloat16 and int8 models on the CPU, up to 128 rows), "cuda_graph", or "torch"; "auto" is the
    first that can and is worth starting.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: Collection[int | str]
    encoding: Encoding | None
    seed: int | None
    window: int | None
    engine: str


def require_language_head(config: GPTConfig) -> None:
    """Raise UsageError for a classifier."""
    if config.n_classes:
        raise UsageError(f"this model is a classifier of {config.n_classes} classes and writes no text")


def require_fit(T: int, max_new_tokens: int, window: int | None, config: GPTConfig) -> None:
    """Raise UsageError if T tokens and the new ones do not fit the context and no window slides."""
    context = config.context_length
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if window is not None and (type(window) is not int or not 0 < window < context):
        raise UsageError(f"window must be an int in 1 … {context - 1}, got {window!r}")
    if window is not None or T + max_new_tokens <= context:
        return
    slide = f"let a window slide: window={max(context // 2, 1)} keeps that many whenever the context is full"
    if context <= T:
        raise UsageError(f"the prompt has {T} tokens, the context {context}; shorten it, or {slide}")
    raise UsageError(
        f"a prompt of {T} tokens and {max_new_tokens} new ones exceed the context of {context}; "
        f"shorten the prompt, ask for {context - T} at most, or {slide}"
    )


def _require_finite(logits: Tensor, running: Tensor) -> None:
    """Raise UsageError if a row (B, V) that still runs has no largest logit."""
    if not bool((logits.amax(-1).isfinite() | ~running).all()):
        why = f"its weights are, or {logits.dtype} is too narrow; try dtype=torch.float32"
        raise UsageError(f"the model's logits are NaN or infinite: {why}")


def _decode(
    model: LanguageModel, ids: Ids, max_new_tokens: int, options: GenerateOptions
) -> tuple[Batch, Stops, Iterator[Tensor]]:
    """Check everything, then (prompts, stops, tokens as they come)."""
    check_names(options, GenerateOptions)
    sampling = Sampling(**{name: options[name] for name in Sampling.__slots__ if name in options})  # type: ignore
    encoding, window = options.get("encoding"), options.get("window")
    config, like = model.config, model.pos_emb.weight
    require_language_head(config)
    prompts = as_batch(ids, config, like.device)
    T = prompts.ids.shape[1]
    require_fit(T, max_new_tokens, window, config)
    start = prompts if window is None or config.context_length > T else prompts.last(window)
    n_rows, T = start.ids.shape
    generators = make_generators(options.get("seed"), n_rows, like.device)
    stops = Stops(options.get("stop", ()), encoding, prompts, config.vocab_size)
    engine = choose_engine(model, n_rows, max_new_tokens, options.get("engine", "auto"))
    capacity = min(T + max_new_tokens, config.context_length)
    require_room(config, n_rows, capacity, like)
    vocabulary = usable_vocabulary(config, encoding)

    def tokens(batch: Batch) -> Iterator[Tensor]:
        cache = KVCache(config, n_rows, capacity, like, batch.pads)
        seen = torch.zeros(n_rows, config.vocab_size, dtype=torch.bool, device=like.device)
        seen.scatter_(1, batch.ids, True)
        step, ids = ENGINES[engine][1](model, cache), batch.ids
        for _ in range(max_new_tokens):
            logits = step(ids)[:, :vocabulary]
            _require_finite(logits, stops.running)
            if sampling.repetition_penalty != 1:
                logits = penalise(logits, seen[:, :vocabulary], sampling.repetition_penalty)
            ids = stops.take(draw(logits, sampling, generators))
            yield ids
            if stops.all_stopped:
                return
            seen.scatter_(1, ids, True)
            if window is not None:
                batch = Batch(torch.cat([batch.ids, ids], 1), batch.pads)
                if cache.length == capacity:
                    batch = batch.last(window)
                    cache.length, cache.pads, ids = 0, batch.pads, batch.ids

    # Outside of inference mode, a clone is an ordinary tensor, which can be trained on.
    return prompts, stops, (token.clone() for token in torch.inference_mode()(tokens)(start))


def generate_tokens(
    model: LanguageModel, ids: Ids, max_new_tokens: int, **options: Unpack[GenerateOptions]
) -> Iterator[Tensor]:
    """Yield the tokens that `generate` appends, ids (B, 1) int64, as they come; see there.

    Arguments are checked at once, before the first token is asked for. Between tokens the model is in
    its own mode, so that the iterator may be dropped at any token.
    """
    return _decode(model, ids, max_new_tokens, options)[2]


@overload
def generate(
    model: LanguageModel, ids: Tensor, max_new_tokens: int, **options: Unpack[GenerateOptions]
) -> Tensor: ...


@overload
def generate(
    model: LanguageModel, ids: Rows, max_new_tokens: int, **options: Unpack[GenerateOptions]
) -> list[Tensor]: ...


def generate(
    model: LanguageModel, ids: Ids, max_new_tokens: int, **options: Unpack[GenerateOptions]
) -> Tensor | list[Tensor]:
    """Prompts and their continuations, by default greedy; `GenerateOptions` says what the keywords mean.

    `ids` (B, T) gives a tensor (B, T + new), int64, in which rows that stopped earlier are filled up with
    what they stopped at; a list of B rows of any lengths gives a list of B tensors, each ending where it
    stopped. Dropout is off in any mode. Allocates one KVCache, 2 × n_layers × emb_dim elements per token and
    row.

    Every row is what it would be alone, but for rounding: a batch adds up in another order than a row, which
    moves logits by a millionth in float32, and by a hundredth in bfloat16 and float16. Two tokens that are
    closer than that can change places, and the rest of the text with them: in float32 hardly ever, in 16
    bits within some dozens of tokens. Where rows must not depend on their neighbours, use float32.

    Raises UsageError for invalid arguments, and instead of the first token that would come from NaN or
    infinite logits; InsufficientMemoryError, before anything is allocated, if the cache does not fit.
    """
    prompts, stops, tokens = _decode(model, ids, max_new_tokens, options)
    produced, lengths = [], torch.zeros_like(stops.running, dtype=torch.int64)
    running = stops.running
    for token in tokens:
        produced.append(token)
        lengths += running
        running = stops.running
    new = torch.cat(produced, 1)
    if isinstance(ids, Tensor):
        return torch.cat([prompts.ids, new], 1)
    pads = torch.zeros_like(lengths) if prompts.pads is None else prompts.pads
    rows = zip(prompts.ids, pads.tolist(), new, lengths.tolist(), strict=True)
    return [torch.cat([prompt[pad:], more[:length]]) for prompt, pad, more, length in rows]
