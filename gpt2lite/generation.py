"""Text out of a model: prefill the cache with the prompt, then decode one token at a time.

Sampling is a chain of small functions: logits (B, V) → logits → token ids (B, 1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from gpt2lite.config import GPTConfig
from gpt2lite.errors import UsageError
from gpt2lite.model import GPTModel, KVCache

INTEGERS = (torch.int64, torch.int32)
SEEDS = range(2**64)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of each row become -inf."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Logits (B, V) → token ids (B, 1); temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # ≤ 0, so that no temperature overflows
    kept = scaled if top_k is None else keep_top_k(scaled, top_k)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator)


def require_language_head(config: GPTConfig) -> None:
    """Raise UsageError for a classifier, which has no words to give."""
    if config.n_classes:
        raise UsageError(f"this model is a classifier of {config.n_classes} classes and writes no text")


def _check(
    model: GPTModel, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, seed: int | None
) -> None:
    config = model.config
    require_language_head(config)
    found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
    if found == type(ids).__name__ or ids.dim() != 2 or not ids.numel() or ids.dtype not in INTEGERS:
        raise UsageError(f"ids must be a tensor of integers of shape (batch, tokens ≥ 1), got {found}")
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise UsageError(
            f"ids must be in 0 … {config.vocab_size - 1}, got {int(ids.min())} … {int(ids.max())}"
        )
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if ids.shape[1] + max_new_tokens > config.context_length:
        raise UsageError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones are more than the context of "
            f"{config.context_length}; shorten the prompt or ask for "
            f"{max(config.context_length - ids.shape[1], 0)} at most"
        )
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k must be at least 1, got {top_k}")
    if seed is not None and seed not in SEEDS:
        raise UsageError(f"seed must be in 0 … 2**64 - 1, got {seed}")


def generate_tokens(
    model: GPTModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[Tensor]:
    """Yield token ids (B, 1) as they come, `max_new_tokens` times, after the prompt `ids` (B, T).

    Greedy by default. `vocabulary` bars ids from there on: rows that only pad the embedding. Allocates one
    KVCache of T + max_new_tokens. Arguments are checked before the first token; raises UsageError.
    """
    _check(model, ids, max_new_tokens, temperature, top_k, seed)
    return _decode(
        model, ids.to(model.tok_emb.weight.device), max_new_tokens, temperature, top_k, seed, vocabulary
    )


@torch.inference_mode()
def _decode(
    model: GPTModel,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    vocabulary: int | None,
) -> Iterator[Tensor]:
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    cache = KVCache(model.config, ids.shape[0], ids.shape[1] + max_new_tokens, like=model.tok_emb.weight)
    for _ in range(max_new_tokens):
        logits = model.out_head(model.hidden(ids, cache)[:, -1])  # prompt first, then a token at a time
        ids = sample(logits[:, :vocabulary], temperature, top_k, generator)
        yield ids


def generate(
    model: GPTModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Collection[int] = (),
) -> Tensor:
    """Prompt and continuation, (B, T + new), int64; greedy by default.

    Ends early once every row has produced one of the `stop` ids. Costs the KV cache of T + max_new_tokens
    (2 × n_layers × emb_dim elements a token and row). Raises UsageError for arguments that cannot work.
    """
    tokens = generate_tokens(model, ids, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    produced = [ids.to(model.tok_emb.weight.device)]
    stopped = torch.zeros_like(produced[0][:, :1], dtype=torch.bool)
    stop_ids = torch.tensor(sorted(stop), device=stopped.device)
    for token in tokens:
        produced.append(token)
        stopped |= torch.isin(token, stop_ids)
        if bool(stopped.all()):
            break
    return torch.cat(produced, dim=1)
