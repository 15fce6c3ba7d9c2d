"""Cross-entropy without all logits: the largest tensor of small-model training exists some rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # of logits in memory at a time: 51 MB of GPT-2's
WORDS = 4096  # of the head whose gradient is cast at a time: `fp32 += bf16` makes an fp32 copy on the CPU


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made beside the loss, from the same logits, and only scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        used = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), ROWS):
            rows, ids = hidden[start : start + ROWS].to(dtype), targets[start : start + ROWS, None]
            logits = F.linear(rows, used, None if bias is None else bias.to(dtype))
            logits = logits.to(torch.promote_types(dtype, torch.float32))
            own = logits.gather(1, ids)[:, 0]
            largest = logits.amax(1, keepdim=True)
            shares = logits.sub_(largest).exp_()
            sums = shares.sum(1, keepdim=True)
            total += (largest[:, 0] + sums[:, 0].log() - own).sum()
            if not any(ctx.needs_input_grad):
                continue
            errors = shares.div_(sums)
            errors.scatter_add_(1, ids, torch.full_like(sums, -1.0))
            errors = errors.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + ROWS] = errors @ used
            if grad_weight is not None and grad_weight.dtype == dtype:
                grad_weight.addmm_(errors.t(), rows)
            elif grad_weight is not None:
                for own_rows, some in zip(grad_weight.split(WORDS), errors.split(WORDS, 1), strict=True):
                    own_rows += some.t() @ rows
            if grad_bias is not None:
                grad_bias += errors.sum(0)
        ctx.grads = grad_hidden, grad_weight, grad_bias
        return total.to(torch.promote_types(dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = tuple(None if own is None else own.mul_(grads[0]) for own in ctx.grads)
        ctx.grads = None
        return *found, None, None


def cross_entropy(head: Any, hidden: Tensor, targets: Tensor, *, chunked: bool) -> Tensor:
    """Summed over rows, in nats: hidden (N, C) through a linear head, targets (N,) → ().

    Chunked, it costs ROWS × V fp32 numbers, twice, and the gradient of the head from forward on; gradients
    are those of the whole to rounding, and can be asked for once. Else the logits cost N × V, three times.
    """
    if not chunked:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, targets, dtype)
