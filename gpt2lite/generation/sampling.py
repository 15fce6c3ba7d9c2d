"""From logits to the next token: small functions (B, V) → (B, V), applied in their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lite.errors import UsageError

NEVER = float("-inf")
COLDEST = 1e-30  # a lower temperature gives the same, and would divide by what fp32 takes for 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn; by default the most likely one is taken (greedy).

    Raises UsageError for invalid values, and for a filter beside a temperature of 0, which it cannot affect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        k, top_p, min_p = self.top_k, self.top_p, self.min_p
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            "top_k": (k is None or (type(k) is int and k >= 1), "an int of at least 1"),
            "top_p": (top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
            "min_p": (min_p is None or 0 <= min_p <= 1, "in 0 … 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a positive number, 1 for none"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UsageError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        filters = {"top_k": k, "top_p": (top_p or 1) < 1, "min_p": min_p}
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
    shares = ordered.double().softmax(-1)  # fp32 sums of 50,000 shares pass p too early, or reach 1
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
    """One per row, seeded with seed, seed + 1 …; none without a seed. Raises UsageError."""
    if seed is None:
        return []
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise UsageError(f"seed must be in 0 … 2**64 - 1, got {seed!r}")
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
