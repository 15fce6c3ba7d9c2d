"""Token after token: prefill the cache with the prompts, then draw one token of each row at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from gpt2lite.config import NEW_TOKENS, GPTConfig
from gpt2lite.devices import empty_cache, widest_float
from gpt2lite.errors import (
    InsufficientMemoryError,
    UsageError,
    first_line,
    is_out_of_memory,
    require_allowed,
)
from gpt2lite.generation.engines import ENGINES, KVCache, LanguageModel, choose_engine, require_threads
from gpt2lite.generation.prompts import (
    Batch,
    Ids,
    Rows,
    Stops,
    Text,
    as_batch,
    as_stops,
    ids_of_text,
    is_text,
    stream_text,
    tokenizer_of,
    usable_vocabulary,
)
from gpt2lite.loading.options import check_names
from gpt2lite.memory import find_budget, human
from gpt2lite.parallel import computing_over, no_gradients, require_same, rest, together
from gpt2lite.reading_text import HALVES
from gpt2lite.tokenizer import Encoding, Tokenizer, as_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

NOT_FINITE = "the model's {}: its weights are not finite, or {} is too narrow; try dtype=torch.float32"
NEVER = float("-inf")
COLDEST = 1e-30  # a lower temperature gives the same, and would divide by what fp32 takes for 0


# ---- from logits to a token: small functions (B, V) → (B, V), in their order -------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn; by default the most likely one is taken (greedy). `rules` says what each may be.

    Raises UsageError for a filter beside a temperature of 0, which it cannot affect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        filters = {"top_k": self.top_k, "top_p": (self.top_p or 1) < 1, "min_p": self.min_p}
        if self.temperature == 0 and (idle := [name for name, value in filters.items() if value]):
            raise UsageError(f"{', '.join(idle)} has no effect at temperature 0; pass a temperature above 0")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """A penalty above 1 makes the ids where `seen` (B, V) is true less likely; fp32 (B, V).

    Source: Keskar et al. 2019, CTRL.
    """
    logits = logits.float()  # rounding the penalised logits to 16 bits would choose another token
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of each row become -inf."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < threshold, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens whose probabilities add up to p, for 1 all: Holtzman et al. 2020."""
    if p == 1:
        return logits
    ordered, order = logits.sort(descending=True)
    # fp32 sums of 50,000 shares pass p too early, or reach 1
    shares = ordered.to(widest_float(ordered.device)).softmax(-1)
    is_past = shares.cumsum(-1) - shares >= p  # those before it are enough
    return logits.masked_fill(is_past.scatter(-1, order, is_past), NEVER)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens with at least p × the top probability, for 0 all: Nguyen et al. 2024."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), NEVER)


FILTERS = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) → the probability of drawing each token, at a temperature above 0."""
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # ≤ 0: dividing never overflows
    logits = logits / max(sampling.temperature, COLDEST)
    for name, keep in FILTERS.items():
        if (value := getattr(sampling, name)) is not None:
            logits = keep(logits, value)
    return logits.softmax(-1)


def make_generators(seed: int | None, batch: int, device: torch.device) -> list[torch.Generator]:
    """One per row, seeded with seed, seed + 1 …; none without a seed."""
    if seed is None:
        return []
    seeds = [(seed + row) % 2**64 for row in range(batch)]
    # torch's CPU generator reads only the lower 32 bits of a seed: fold in the upper, or 2**40 would be 0.
    return [torch.Generator(device).manual_seed((n + (n >> 32) * 0x9E3779B1) % 2**64) for n in seeds]


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator] = ()) -> Tensor:
    """Logits (B, V) → token ids (B, 1); each row from its own generator, if there are any."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    shares = probabilities(logits, sampling)
    if not generators:
        return torch.multinomial(shares, 1)
    rows = zip(shares, generators, strict=True)
    return torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


# ---- token after token -------------------------------------------------------------------------------------


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


def _is_int(value: object, least: int, end: float = math.inf) -> bool:
    return type(value) is int and least <= value < end


def _is_stop(value: object) -> bool:
    return isinstance(value, str) and bool(value) and not HALVES.search(value)


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def rules(config: GPTConfig) -> dict[str, tuple[Callable[[Any], object], str]]:
    """What each argument of `generate` may be for a model of this config, and in words."""
    context, V = config.context_length, config.vocab_size
    engines, tiny, huge = ("auto", *ENGINES), math.ulp(0), sys.float_info.max
    return {
        "max_new_tokens": (lambda n: _is_int(n, 1), "an int of at least 1"),
        "temperature": (lambda t: _is_number(t, 0, huge), "0 (greedy) or a positive number"),
        "top_k": (lambda k: k is None or _is_int(k, 1), "an int of at least 1"),
        "top_p": (lambda p: p is None or _is_number(p, tiny, 1), "a number above 0 and at most 1"),
        "min_p": (lambda p: p is None or _is_number(p, 0, 1), "a number in 0 … 1"),
        "repetition_penalty": (lambda r: _is_number(r, 1e-9, 1e9), "a number in 1e-9 … 1e9, 1 for none"),
        "seed": (lambda seed: seed is None or _is_int(seed, 0, 2**64), "an int in 0 … 2**64 - 1"),
        "window": (lambda n: n is None or _is_int(n, 1, context), f"an int in 1 … {context - 1}"),
        "engine": (lambda name: name in engines, f"one of {', '.join(engines)}"),
        "encoding": (lambda e: e is None or hasattr(e, "encode_ordinary"), "tiktoken's or gpt2lite's"),
        "stop": (
            lambda stop: all(_is_stop(s) or _is_int(s, 0, V) for s in as_stops(stop)),
            f"token ids in 0 … {V - 1} and non-empty strings",
        ),
    }


def require_language_model(model: LanguageModel) -> None:
    """Raise UsageError for a classifier, and for a model whose weights are on meta."""
    if model.config.n_classes:
        found = f"this model is a classifier of {model.config.n_classes} classes"
        raise UsageError(f"{found} and writes no text; it can classify one")
    if model.pos_emb.weight.is_meta:
        raise UsageError("the model's weights are on meta, without memory; load or initialise them first")
    heads: object = getattr(model, "local_heads", 0) or model.config.n_heads
    if others := {vars(part).get("n_heads", heads) for part in model.modules()} - {heads}:
        raise UsageError(f"the model's attention has n_heads={others.pop()}, its config says {heads}")


def room_for(T: int, max_new_tokens: int | None, window: int | None, config: GPTConfig) -> int:
    """How many tokens to write after T: as many as are asked for, else NEW_TOKENS, or what fits.

    Raises UsageError if they do not fit the context and no window slides.
    """
    context = config.context_length
    if max_new_tokens is None:
        max_new_tokens = NEW_TOKENS if window is not None else min(NEW_TOKENS, max(context - T, 1))
    require_allowed({"max_new_tokens": max_new_tokens, "window": window}, rules(config))
    if window is None and T + max_new_tokens > context:
        fewer = f", ask for {context - T} at most" if context > T else ""
        slide = f"let a window slide: window={max(context // 2, 1)} keeps that many when it is full"
        found = f"a prompt of {T} tokens and {max_new_tokens} new ones exceed the context of {context}"
        raise UsageError(f"{found}; shorten the prompt{fewer}, or {slide}")
    return max_new_tokens


class _Texts(NamedTuple):
    """Prompts that are text: what stands before each answer, ids, tokenizer, strings that end an answer."""

    before: list[str]
    ids: list[list[int]]
    encoding: Tokenizer
    stops: list[str]

    def after(self, tokens: Iterable[Any]) -> Iterator[str]:
        """Pieces of an answer, as its tokens come."""
        return stream_text(map(int, tokens), self.encoding, self.stops)


def _read(model: LanguageModel, prompt: Text | Sequence[Text], options: GenerateOptions) -> _Texts:
    require_language_model(model)
    encoding = tokenizer_of(model, options.get("encoding"))
    prompts = [prompt] if isinstance(prompt, Text) else prompt
    before, ids = zip(*(ids_of_text(model, encoding, each) for each in prompts), strict=True)
    strings = [each for each in as_stops(options.get("stop", ())) if isinstance(each, str)]
    return _Texts([*before], [*ids], encoding, strings)


def _with_end(options: GenerateOptions, texts: _Texts) -> GenerateOptions:
    """A text ends at its tokenizer's token for that, too."""
    end = () if texts.encoding.eot_token is None else (texts.encoding.eot_token,)
    return {**options, "encoding": texts.encoding, "stop": (*as_stops(options.get("stop", ())), *end)}


def room_after(
    model: LanguageModel, prompts: Sequence[Text], max_new_tokens: int | None, options: GenerateOptions
) -> int:
    """How many tokens `generate` would write after each of these texts. Raises as it does."""
    longest = max(map(len, _read(model, prompts, options).ids))
    return room_for(longest, max_new_tokens, options.get("window"), model.config)


def _decode(
    model: LanguageModel, ids: Ids, max_new_tokens: int | None, options: GenerateOptions
) -> tuple[Batch, Stops, Iterator[Tensor]]:
    """Check everything, on all ranks that compute together, then (prompts, stops, tokens as they come)."""
    with together(computing_over(model)):
        return _begin(model, ids, max_new_tokens, options)


def _begin(
    model: LanguageModel, ids: Ids, max_new_tokens: int | None, options: GenerateOptions
) -> tuple[Batch, Stops, Iterator[Tensor]]:
    check_names(options, GenerateOptions)
    require_language_model(model)
    config, like = model.config, model.pos_emb.weight
    require_allowed(options, rules(config))
    sampling = Sampling(**{name: options[name] for name in Sampling.__slots__ if name in options})  # type: ignore
    mesh = computing_over(model)
    if sampling.temperature and options.get("seed") is None and mesh is not None:
        raise UsageError("ranks that share a model must draw the same tokens; pass a seed")
    given, window = options.get("encoding"), options.get("window")
    encoding = None if given is None else as_tokenizer(given)
    prompts = as_batch(ids, config, like.device)
    T = prompts.ids.shape[1]
    max_new_tokens = room_for(T, max_new_tokens, window, config)
    start = prompts if window is None or config.context_length > T else prompts.last(window)
    n_rows, T = start.ids.shape
    generators = make_generators(options.get("seed"), n_rows, like.device)
    stops = Stops(as_stops(options.get("stop", ())), encoding, prompts, config.vocab_size)
    require_threads()
    engine = choose_engine(model, n_rows, max_new_tokens, options.get("engine", "auto"))
    capacity = min(T + max_new_tokens, config.context_length)
    cache = KVCache(config, n_rows, capacity, like, start.pads, getattr(model, "local_heads", 0))
    vocabulary = usable_vocabulary(config, encoding)
    if mesh is not None:
        texts = prompts.ids.tolist(), None if prompts.pads is None else prompts.pads.tolist()
        plain = sorted((name, value) for name, value in options.items() if name not in ("encoding", "stop"))
        stopping = sorted(map(repr, as_stops(options.get("stop", ()))))
        require_same(mesh, "prompts or options", (texts, max_new_tokens, plain, stopping, vocabulary))

    def tokens(batch: Batch) -> Iterator[Tensor]:
        seen = torch.zeros(n_rows, config.vocab_size, dtype=torch.bool, device=like.device)
        seen.scatter_(1, batch.ids, True)
        step, ids = ENGINES[engine][1](model, cache), batch.ids
        for _ in range(max_new_tokens):
            logits = step(ids)[:, :vocabulary]
            if not bool((logits.amax(-1).isfinite() | ~stops.running).all()):
                raise UsageError(NOT_FINITE.format("logits are NaN or infinite", logits.dtype))
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
    found = (token.clone() for token in no_gradients(model)(tokens)(start))
    return prompts, stops, _with_numbers(found, like.device, cache.memory.nbytes)


def _with_numbers(tokens: Iterator[Tensor], device: torch.device, held: int) -> Iterator[Tensor]:
    """The same tokens; where memory runs out, InsufficientMemoryError, and nothing is held any more."""
    try:
        yield from tokens
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, InsufficientMemoryError) or not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        return
    # Raised out here, where the first error's frames are gone, and with them the cache.
    del tokens
    empty_cache(device)
    place = "host" if device.type == "cpu" else "device"
    limit = find_budget(device).of(place)
    said = f"memory ran out on {device} while generating ({reason}); keys and values took {human(held)}"
    do = "Generate for fewer prompts at once, or fewer tokens"
    available = {place: limit.nbytes or 0}
    raise InsufficientMemoryError(f"{said}, now available: {limit.said}. {do}", available=available)


@overload
def generate_tokens(
    model: LanguageModel, prompt: Text, max_new_tokens: int | None = None, **options: Unpack[GenerateOptions]
) -> Iterator[str]: ...


@overload
def generate_tokens(
    model: LanguageModel, prompt: Ids, max_new_tokens: int | None = None, **options: Unpack[GenerateOptions]
) -> Iterator[Tensor]: ...


def generate_tokens(
    model: LanguageModel,
    prompt: Text | Ids,
    max_new_tokens: int | None = None,
    **options: Unpack[GenerateOptions],
) -> Iterator[str] | Iterator[Tensor]:
    """Yield what `generate` appends, as it comes; see there: of ids the tokens (B, 1) int64, of one text its
    pieces, one for each token, in whole characters, and what may be left after the last.

    Arguments are checked at once, before the first token is asked for. Between tokens the model is in
    its own mode, so that the iterator may be dropped at any token.
    """
    if not is_text(prompt):
        return _decode(model, prompt, max_new_tokens, options)[2]
    if not isinstance(prompt, Text):
        raise UsageError("generate_tokens gives the pieces of one text; for a list of them, use generate")
    texts = _read(model, prompt, options)
    return texts.after(_decode(model, texts.ids, max_new_tokens, _with_end(options, texts))[2])


@overload
def generate(  # type: ignore[overload-overlap]  # a str is one text, not several
    model: LanguageModel, prompt: Text, max_new_tokens: int | None = None, **options: Unpack[GenerateOptions]
) -> str: ...


@overload
def generate(
    model: LanguageModel,
    prompt: Sequence[Text],
    max_new_tokens: int | None = None,
    **options: Unpack[GenerateOptions],
) -> list[str]: ...


@overload
def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int | None = None,
    **options: Unpack[GenerateOptions],
) -> Tensor: ...


@overload
def generate(
    model: LanguageModel, prompt: Rows, max_new_tokens: int | None = None, **options: Unpack[GenerateOptions]
) -> list[Tensor]: ...


def generate(
    model: LanguageModel,
    prompt: Text | Sequence[Text] | Ids,
    max_new_tokens: int | None = None,
    **options: Unpack[GenerateOptions],
) -> str | list[str] | Tensor | list[Tensor]:
    """Prompts and their continuations, by default greedy; `GenerateOptions` says what the keywords mean.

    A text gives a text, a list of texts a list of them: each is the prompt, as it was read, and what follows,
    up to the token that ends a text, or before a stop string. An `Instruction` gives the answer alone. The
    tokenizer is that of the model's checkpoint, or `encoding`. Special tokens in a prompt are read as such,
    line ends as \\n. Where max_new_tokens is not said, it is 240, or what fits in the context.

    Ids (B, T) give a tensor (B, T + new), int64, in which rows that stopped earlier are filled up with
    what they stopped at; a list of B rows of any lengths gives a list of B tensors, each ending where it
    stopped. Dropout is off in any mode. Allocates one KVCache, 2 × n_layers × emb_dim elements per token and
    row.

    Every row is what it would be alone, but for rounding: a batch adds up in another order than a row, which
    moves logits by a millionth in float32, and by a hundredth in bfloat16 and float16. Two tokens that are
    closer than that can change places, and the rest of the text with them: in float32 hardly ever, in 16
    bits within some dozens of tokens. Where rows must not depend on their neighbours, use float32.

    Raises UsageError for invalid arguments, and instead of the first token that would come from NaN or
    infinite logits; InsufficientMemoryError, before anything is allocated, if the cache does not fit; for
    texts also as opening a checkpoint does, where its tokenizer cannot be read.
    """
    if is_text(prompt):
        texts = _read(model, prompt, options)
        rows = generate(model, texts.ids, max_new_tokens, **_with_end(options, texts))
        parts = zip(texts.before, texts.ids, rows, strict=True)
        found = [text + "".join(texts.after(row[len(ids) :])) for text, ids, row in parts]
        return found[0] if isinstance(prompt, Text) else found
    ids = prompt
    prompts, stops, tokens = _decode(model, ids, max_new_tokens, options)
    new = torch.cat(list(tokens), 1)
    rest(model)
    if isinstance(ids, Tensor):
        return torch.cat([prompts.ids, new], 1)
    pads = torch.zeros_like(stops.lengths) if prompts.pads is None else prompts.pads
    each = zip(prompts.ids, pads.tolist(), new, stops.lengths.tolist(), strict=True)
    return [torch.cat([row[pad:], more[:length]]) for row, pad, more, length in each]
