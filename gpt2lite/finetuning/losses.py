"""Losses without all logits: the largest tensor of small-model training exists some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lite.devices import widest_float

ROWS = 256  # of logits in memory at a time: 51 MB of GPT-2's
ROWS_TAUGHT = 64  # with a teacher's beside them, and the distributions of both
WORDS = 4096  # of the head whose gradient is cast at a time: `fp32 += bf16` makes an fp32 copy on the CPU


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a teacher says of N rows: its head, what that reads (N, C'), and how much it counts.

    The loss is (1 - alpha) × cross-entropy + alpha × temperature² × KL(teacher ‖ student), both softened by
    the temperature. Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    To it comes hidden_weight × the mean squared distance of what both heads read, which needs C' = C.
    """

    head: Callable[[Tensor], Tensor]
    hidden: Tensor
    alpha: float
    temperature: float
    hidden_weight: float = 0.0

    def soft(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """(alpha × temperature² × KL, summed over rows from `start`; its gradient by the logits)."""
        theirs = self.head(self.hidden[start : start + len(logits)]).to(logits.dtype)
        wanted, found = ((each / self.temperature).log_softmax(1) for each in (theirs, logits))
        loss = F.kl_div(found, wanted, reduction="sum", log_target=True)
        errors = found.exp_().sub_(wanted.exp_())
        return self.alpha * self.temperature**2 * loss, errors.mul_(self.alpha * self.temperature)

    def near(self, rows: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """(hidden_weight × the distance, summed over rows from `start`; its gradient by the rows)."""
        away = rows - self.hidden[start : start + len(rows)].to(rows.dtype)
        weight = self.hidden_weight / rows.shape[1]
        return weight * away.square().sum(), away.mul_(2 * weight)


def rows_of(model: Any, ids: Tensor, places: Tensor | None) -> Tensor:
    """What the head reads, (N, C): of all tokens, or of those at `places` of the flattened batch."""
    hidden: Tensor = model.hidden(ids).flatten(0, 1)
    return hidden if places is None else hidden[places]


def _hard(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, summed; its gradient by the logits, in their place)."""
    own = logits.gather(1, ids)[:, 0]
    largest = logits.amax(1, keepdim=True)
    shares = logits.sub_(largest).exp_()
    sums = shares.sum(1, keepdim=True)
    loss = (largest[:, 0] + sums[:, 0].log() - own).sum()
    errors = shares.div_(sums)
    return loss, errors.scatter_add_(1, ids, torch.full_like(sums, -1.0))


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made beside the loss, from the same logits, and only scaled in backward.

    `scale` is what they are multiplied with before they are of 16 bits: fp16 has no number below 6e-8.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        teaching: Teaching | None,
        scale: float,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        used, size = weight.to(dtype), ROWS_TAUGHT if teaching else ROWS
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=widest_float(hidden.device), device=hidden.device)
        for start in range(0, len(hidden), size):
            rows, ids = hidden[start : start + size].to(dtype), targets[start : start + size, None]
            logits = F.linear(rows, used, None if bias is None else bias.to(dtype))
            logits = logits.to(torch.promote_types(dtype, torch.float32))
            soft = teaching.soft(logits, start) if teaching else None
            loss, errors = _hard(logits, ids)
            if teaching and soft:
                loss = loss * (1 - teaching.alpha) + soft[0]
                errors = errors.mul_(1 - teaching.alpha).add_(soft[1])
            near = teaching.near(rows, start) if teaching and teaching.hidden_weight else None
            total += loss + near[0] if near else loss
            if not any(ctx.needs_input_grad):
                continue
            errors = (errors if scale == 1 else errors.mul_(scale)).to(dtype)
            near = (near[0], near[1].mul_(scale)) if near and scale != 1 else near
            if grad_hidden is not None:
                grad_hidden[start : start + size] = errors @ used + near[1] if near else errors @ used
            if grad_weight is not None and grad_weight.dtype == dtype:
                grad_weight.addmm_(errors.t(), rows)
            elif grad_weight is not None:
                for own_rows, some in zip(grad_weight.split(WORDS), errors.split(WORDS, 1), strict=True):
                    own_rows += some.t() @ rows
            if grad_bias is not None:
                grad_bias += errors.sum(0)
        ctx.grads, ctx.scale = (grad_hidden, grad_weight, grad_bias), scale
        return total.to(torch.promote_types(dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = tuple(None if own is None else own.mul_(grads[0] / ctx.scale) for own in ctx.grads)
        ctx.grads = None
        return *found, None, None, None, None


def summed_loss(
    head: Any,
    hidden: Tensor,
    targets: Tensor,
    *,
    chunked: bool,
    teaching: Teaching | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Summed over rows, in nats: hidden (N, C) through a linear head, targets (N,) → ().

    The cross-entropy, or what `Teaching` says. Chunked, it costs ROWS × V fp32 numbers, twice (with a teacher
    ROWS_TAUGHT × V, six times), and the gradient of the head from forward on; gradients are those of the
    whole to rounding, and can be asked for once; `scale` is what backward will be called with, if that is
    known. Else the logits cost N × V, three times.
    """
    if not chunked:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    with torch.autocast(device, enabled=False):
        return _ChunkedLoss.apply(hidden, head.weight, head.bias, targets, dtype, teaching, scale)
