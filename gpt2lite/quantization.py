"""Weights as int8 with one scale per row, a quarter of fp32's memory; activations keep their dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lite.devices import emulates

LARGEST = 127
BLOCK_ELEMENTS = 1 << 19  # worked on at a time, on the CPU: what stays in a core's cache
OTHERS_BLOCK_ELEMENTS = 1 << 24
MANY_ROWS, LARGER_BLOCK_ELEMENTS = 256, 1 << 21  # for a product of so many rows, which wants wide blocks
WORKING_BYTES = 16 * BLOCK_ELEMENTS  # of `quantize_into`


@torch.no_grad()
def quantize_into(weight: Tensor, scale: Tensor, values: Tensor) -> None:
    """Fill an int8 weight and its fp32 scale so that values ≈ weight × scale, rounded to the nearest.

    All have one shape, in any order of the dimensions; `scale` has stride 0 along the dimension that a row of
    the layer runs through, which must be complete. Costs WORKING_BYTES.
    """
    along = scale.stride().index(0)
    across = 1 - along
    step = max(BLOCK_ELEMENTS // values.shape[along], 1)
    for start in range(0, values.shape[across], step):
        rows = min(step, values.shape[across] - start)
        block = values.narrow(across, start, rows).float()
        found = block.abs().amax(along, keepdim=True) / LARGEST
        scale.narrow(across, start, rows).narrow(along, 0, 1).copy_(found)
        weight.narrow(across, start, rows).copy_((block / torch.where(found > 0, found, 1.0)).round_())


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times a narrower or emulated weight (out, in) → (..., out), in fp32 or the dtype of x.

    Some rows of the weight are widened at a time: on the CPU that costs 8 MiB at most, elsewhere 64.
    """
    x = x.float() if emulates(x.device, x.dtype) else x
    elements = BLOCK_ELEMENTS if x.numel() < MANY_ROWS * x.shape[-1] else LARGER_BLOCK_ELEMENTS
    elements = elements if x.device.type == "cpu" else OTHERS_BLOCK_ELEMENTS
    n_out, n_in = weight.shape
    step = min(max(elements // n_in, 1), n_out)
    block, y = x.new_empty(step, n_in), x.new_empty(*x.shape[:-1], n_out)
    for start in range(0, n_out, step):
        part = weight[start : start + step]
        y[..., start : start + step] = F.linear(x, block[: len(part)].copy_(part))
    return y


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 (out, in), with `scale` (out,) in fp32."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), some rows of the weight at a time."""
        y = multiply(x, self.weight)
        y = (y * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """An embedding whose weight is int8 (V, C), with `scale` (V,) in fp32; gives vectors in fp32."""

    def __init__(self, weight: nn.Parameter, scale: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) → (..., C)."""
        return self.weight[ids] * self.scale[ids][..., None]


def _on_meta(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def quantize_skeleton(skeleton: nn.Module, is_wanted: Callable[[str], bool]) -> set[str]:
    """Replace the linear layers and embeddings whose names are wanted by int8 layers on meta.

    Returns the names of the weights that are int8 now, tied ones under each of their names.
    """
    found, made = set(), dict[int, tuple[nn.Parameter, nn.Parameter]]()
    for path, layer in list(skeleton.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Embedding) or not is_wanted(path):
            continue
        shape = layer.weight.shape
        pair = _on_meta(shape, torch.int8), _on_meta(shape[:1], torch.float32)
        int8 = made.setdefault(id(layer.weight), pair)
        new = Int8Linear(*int8, layer.bias) if isinstance(layer, nn.Linear) else Int8Embedding(*int8)
        skeleton.set_submodule(path, new)
        found.add(f"{path}.weight")
    return found


def scale_of(weight: str) -> str:
    """The name of a weight's scale."""
    return weight.removesuffix("weight") + "scale"
