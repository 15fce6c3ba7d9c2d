"""From logits to the next token: small functions (B, V) → (B, V), applied in their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lite.errors import UsageError

NEVER = float("-inf")
SEEDS = range(2**64)
COLDEST = 1e-30  # colder is the same, and divides by what fp32 takes for 0


def _refuse(name: str, wanted: str, found: object) -> None:
    raise UsageError(f"{name} must be {wanted}, got {found!r}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn; as it stands, the likeliest is taken (greedy).

    Raises UsageError for invalid values, and for a filter beside a temperature of 0, which it cannot affect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            _refuse("temperature", "0 (greedy) or a positive number", self.temperature)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            _refuse("top_k", "an int of at least 1", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            _refuse("top_p", "above 0 and at most 1", self.top_p)
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            _refuse("min_p", "in 0 … 1", self.min_p)
        if not 0 < self.repetition_penalty < math.inf:
            _refuse("repetition_penalty", "a positive number, 1 for none", self.repetition_penalty)
        filters = {"top_k": self.top_k, "top_p": (self.top_p or 1) < 1, "min_p": self.min_p}
        if self.temperature == 0 and (idle := [name for name, value in filters.items() if value]):
            raise UsageError(f"{', '.join(idle)} would change nothing at temperature 0; pass one above 0")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Ids of which `seen` (B, V) is true become less likely for a penalty above 1; in fp32, as (B, V).

    Source: Keskar et al. 2019, CTRL.
    """
    logits = logits.float()  # 16 bits would round the penalised ones, and so choose another token
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of each row become -inf."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < threshold, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens that have p together, for 1 all: nucleus sampling, Holtzman et al. 2020."""
    if p == 1:
        return logits
    ordered, order = logits.sort(descending=True)
    shares = ordered.double().softmax(-1)  # fp32 sums of 50,000 shares pass p too early, or reach 1
    is_past = shares.cumsum(-1) - shares >= p  # what stands before it is enough
    return logits.masked_fill(is_past.scatter(-1, order, is_past), NEVER)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep what has at least p times the probability of the likeliest, for 0 all: Nguyen et al. 2024."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), NEVER)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) → what each token is drawn with, at a temperature above 0."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(
        sampling.temperature, COLDEST
    )  # ≤ 0: never overflows
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(-1)


def make_generators(seed: int | None, batch: int, device: torch.device) -> list[torch.Generator]:
    """One for each row, seeded with seed, seed + 1 …; none without a seed. Raises UsageError."""
    if seed is None:
        return []
    if type(seed) is not int or seed not in SEEDS:  # of what is no int, `in` asks every number
        _refuse("seed", "in 0 … 2**64 - 1", seed)
    seeds = [(seed + row) % 2**64 for row in range(batch)]
    # Of a seed torch's CPU generator reads 32 bits: the upper go into the lower, so that 2**40 is not 0.
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
