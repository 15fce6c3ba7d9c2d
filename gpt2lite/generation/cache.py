"""Keys and values of the tokens seen so far, allocated once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpt2lite.config import GPTConfig
from gpt2lite.errors import InsufficientMemoryError
from gpt2lite.memory import find_budget, human


class KVCache:
    """Keys and values of at most `capacity` tokens per row, in the dtype and on the device of `like`.

    `length` counts the tokens in it. Row b begins with `pads[b]` padding tokens: shorter prompts are padded
    on the left. Memory: (n_layers, 2, B, H, capacity, D), of gpt2 in fp32 72 KiB per token and row; raises
    InsufficientMemoryError, before it is allocated, if that is not available.
    """

    def __init__(
        self, config: GPTConfig, batch: int, capacity: int, like: Tensor, pads: Tensor | None = None
    ) -> None:
        shape = (config.n_layers, 2, batch, config.n_heads, capacity, config.head_dim)
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
        """Store (B, H, T, D) behind `length` and return all S = length + T; `length` itself stays."""
        end = self.length + k.shape[2]
        keys, values = self.memory[layer, :, :, :, :end]
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        return keys, values

    def positions(self, T: int) -> Tensor:
        """Of the next T tokens in their texts, (T,) or (B, T)."""
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
    first moves the `cursor`, (1,) int64, to the number of tokens before it.
    """

    def __init__(self, cache: KVCache) -> None:
        self.memory, self.pads, self.length = cache.memory, cache.pads, cache.length
        self.memory[:, :, :, :, self.length :] = 0  # a masked token weighs 0, and 0 × NaN would be NaN
        self.cursor = torch.tensor([cache.length], device=cache.memory.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, 1, D) at the cursor and return the whole capacity."""
        keys, values = self.memory[layer]
        return keys.index_copy_(2, self.cursor, k), values.index_copy_(2, self.cursor, v)

    def positions(self, T: int) -> Tensor:
        """Of the next token, (1,) or (B, 1)."""
        return self.cursor if self.pads is None else self.cursor - self.pads[:, None]

    def mask(self, T: int) -> Tensor:
        """Which tokens are text, at the cursor or before it: (B or 1, 1, 1, capacity)."""
        columns = torch.arange(self.memory.shape[4], device=self.memory.device)
        begin = torch.zeros_like(self.cursor) if self.pads is None else self.pads
        return (columns <= self.cursor) & (columns >= begin[:, None, None, None])

    def advance(self, T: int) -> None:
        """Do nothing: a replay would not count."""
