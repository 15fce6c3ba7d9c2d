"""Weights as int8 with a scale a row, multiplied with fp32 activations: a quarter of the memory of fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127
CHUNK_ELEMENTS = {"cpu": 1 << 19}  # dequantised at a time: what stays in a core's cache
OTHERS_CHUNK_ELEMENTS = 1 << 24


@torch.no_grad()
def quantize_rows(values: Tensor, weight: Tensor, scale: Tensor) -> None:
    """values (n, in) → weight (n, in) int8 and scale (n,) fp32, in place: values ≈ scale × weight.

    Symmetric, to the nearest. Costs two copies of `values` in fp32.
    """
    values = values.float()
    largest = values.abs().amax(1)
    scale.copy_(largest / LARGEST)
    weight.copy_((values / torch.where(largest > 0, scale, 1.0)[:, None]).round_())


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 (out, in), with `scale` (out,) in fp32."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out); dequantises some rows at a time."""
        n_in = self.weight.shape[1]
        rows = max(CHUNK_ELEMENTS.get(x.device.type, OTHERS_CHUNK_ELEMENTS) // n_in, 1)
        parts = [F.linear(x, part.to(x.dtype)) for part in self.weight.split(rows)]
        y = torch.cat(parts, -1) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """An embedding whose weight is int8 (V, C), with `scale` (V,)."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.scale, self.dtype = weight, scale, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) → (..., C) in the dtype of the model."""
        return (self.weight[ids] * self.scale[ids][..., None]).to(self.dtype)
