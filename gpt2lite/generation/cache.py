"""Keys and values of the tokens seen so far, allocated once, and what they cost before they are."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2lite.config import GPTConfig
from gpt2lite.errors import InsufficientMemoryError
from gpt2lite.memory import find_budget, human


def cache_bytes(config: GPTConfig, batch: int, capacity: int, dtype: torch.dtype) -> int:
    """What a `KVCache` takes: 2 × n_layers × batch × capacity × emb_dim elements (gpt2: 72 KiB a token)."""
    return 2 * config.n_layers * batch * capacity * config.emb_dim * dtype.itemsize


def require_room(config: GPTConfig, batch: int, capacity: int, like: Tensor) -> None:
    """Raise InsufficientMemoryError where a `KVCache` would not fit into what this process can have."""
    needed = cache_bytes(config, batch, capacity, like.dtype)
    budget = find_budget(like.device)
    limit = budget.host if like.device.type == "cpu" else budget.device
    if not limit.admits(needed):
        raise InsufficientMemoryError(
            f"keys and values of {batch} × {capacity} tokens take {human(needed)} on {like.device}; "
            f"memory that can be had: {limit.said}. Nothing was allocated; ask for fewer tokens or prompts"
        )


class KVCache:
    """Keys and values of at most `capacity` tokens of each row, in the dtype and on the device of `like`.

    `length` counts the tokens that it holds. Row b begins with `pads[b]` that are none: shorter prompts are
    padded on the left. Memory: `cache_bytes`, (n_layers, 2, B, H, capacity, D).
    """

    def __init__(
        self, config: GPTConfig, batch: int, capacity: int, like: Tensor, pads: Tensor | None = None
    ) -> None:
        shape = (config.n_layers, 2, batch, config.n_heads, capacity, config.head_dim)
        self.memory = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length, self.pads = 0, pads

    @property
    def capacity(self) -> int:
        """Tokens that it can hold."""
        return self.memory.shape[4]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) behind `length` and return all S = length + T; `length` itself stays."""
        end = self.length + k.shape[2]
        keys, values = self.memory[layer, 0], self.memory[layer, 1]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def positions(self, T: int) -> Tensor:
        """Of the next T tokens in their texts, (T,) or (B, T)."""
        columns = torch.arange(self.length, self.length + T, device=self.memory.device)
        return columns if self.pads is None else (columns - self.pads[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor | None:
        """Which of S = length + T tokens the next T may see, (T, S) or (B, 1, T, S); None: all before each.

        What stands for nothing sees itself, since a softmax over nothing is NaN and would spread.
        """
        S = self.length + T
        if self.pads is None and (T == 1 or not self.length):
            return None
        columns = torch.arange(S, device=self.memory.device)
        causal = columns <= columns[self.length :, None]
        if self.pads is None:
            return causal
        is_text = columns >= self.pads[:, None, None, None]
        return (causal & is_text) | (columns == columns[self.length :, None])

    def advance(self, T: int) -> None:
        """T more tokens are there in every layer."""
        self.length += T

    def restart(self, pads: Tensor | None) -> None:
        """Forget every token."""
        self.length, self.pads = 0, pads


class CursorCache(KVCache):
    """The memory of a `KVCache`, its length kept on the device: every step of one token is the same work.

    That is what a CUDA graph needs; attention reads the whole capacity each time.
    """

    def __init__(self, cache: KVCache) -> None:
        self.memory, self.pads, self.length = cache.memory, cache.pads, cache.length
        self.memory[:, :, :, :, self.length :] = 0  # a masked token weighs 0, and 0 × NaN would be NaN
        self.cursor = torch.tensor([cache.length], device=cache.memory.device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, 1, D) at the cursor and return the whole capacity."""
        keys, values = self.memory[layer, 0], self.memory[layer, 1]
        keys.index_copy_(2, self.cursor, k)
        values.index_copy_(2, self.cursor, v)
        return keys, values

    def positions(self, T: int) -> Tensor:
        """Of the next token, (1,) or (B, 1)."""
        return self.cursor if self.pads is None else self.cursor - self.pads[:, None]

    def mask(self, T: int) -> Tensor:
        """What stands before the cursor, or at it, and is text: (B or 1, 1, 1, capacity)."""
        columns = torch.arange(self.capacity, device=self.memory.device)
        begin = torch.zeros_like(self.cursor) if self.pads is None else self.pads
        return (columns <= self.cursor) & (columns >= begin[:, None, None, None])

    def advance(self, T: int) -> None:
        """Move the cursor, on the device."""
        self.cursor += T
