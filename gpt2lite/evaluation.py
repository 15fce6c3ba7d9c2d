"""How well a model predicts a text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lite.devices import widest_float
from gpt2lite.errors import UsageError
from gpt2lite.generation import LanguageModel
from gpt2lite.generation.decoding import NOT_FINITE, require_language_model
from gpt2lite.generation.engines import in_eval_mode
from gpt2lite.generation.prompts import INTEGERS, require_ids
from gpt2lite.loading.options import Progress
from gpt2lite.loading.skeleton import digest
from gpt2lite.parallel import computing_over, no_gradients, require_same, rest, together

POSITIONS_AT_ONCE = 128  # whose logits are in memory together: 25 MiB of GPT-2's


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss of a text in nats (natural logarithms), summed over the `tokens` that were predicted."""

    tokens: int
    nats: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """e to the mean loss; infinite where a float cannot hold it."""
        loss = self.nats / self.tokens
        return math.exp(loss) if loss < 709 else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens over `seconds`."""
        return self.tokens / self.seconds


def loss_of(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed: hidden states (N, C) and the ids that follow them (N,) → ().

    Has POSITIONS_AT_ONCE rows of fp32 logits in memory at a time.
    """
    parts = zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    losses = [F.cross_entropy(model.out_head(some).float(), ids, reduction="sum") for some, ids in parts]
    return torch.stack(losses).to(widest_float(hidden.device)).sum()


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first to predict): each token but the first is predicted once, in the earliest window.

    A window begins every `stride` tokens; reading `context` of them predicts up to the one behind.
    """
    for begin in range(0, max(length - 1 - context, 0) + stride, stride):
        first = begin + context + 1 - stride if begin else 1  # where the window before this one ended
        yield begin, min(begin + context + 1, length), first


def evaluate(
    model: LanguageModel,
    ids: Tensor,
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The loss of predicting each token of a text but the first, integers (T,), from those before it.

    The text is read in windows of `context` tokens (the model's whole context), one every `stride` (half of
    it): a token is predicted in the first window that can, so from more than context - stride tokens
    wherever the text has them. stride = context is the fastest, stride = 1 the most exact. Costs the
    activations of one window and POSITIONS_AT_ONCE rows of logits. `progress` is called with (tokens
    predicted, tokens in all). Dropout is off; the model keeps its mode.

    Source of the protocol: Hugging Face, "Perplexity of fixed-length models".
    Raises UsageError for a classifier, a text of fewer than two tokens, invalid windows, or a loss that is
    NaN or infinite.
    """
    most, like = model.config.context_length, model.pos_emb.weight
    context = most if context is None else context
    with together(mesh := computing_over(model)):
        require_language_model(model)
        stride = max(context // 2, 1) if stride is None else stride
        for name, value, highest in (("context", context, most), ("stride", stride, context)):
            if type(value) is not int or not 1 <= value <= highest:
                raise UsageError(f"{name} must be in 1 … {highest}, got {value}")
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype not in INTEGERS:
            found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise UsageError(f"ids must be a tensor of integers of shape (tokens,), one text, got {found}")
        if len(ids) < 2:
            raise UsageError(f"a text of {len(ids)} tokens has nothing to predict; at least 2 are needed")
        require_ids(ids, model.config.vocab_size)
        if mesh is not None:
            require_same(mesh, "ids, context or stride", (digest(ids), context, stride))
    began, nats = time.perf_counter(), 0.0
    for begin, end, first in windows(len(ids), context, stride):
        read = ids[begin:end].to(like.device, torch.int64)
        with no_gradients(model), in_eval_mode(model):
            hidden = model.hidden(read[None, :-1])[0, first - 1 - begin :]
            nats += float(loss_of(model, hidden, read[first - begin :]))
        if not math.isfinite(nats):
            raise UsageError(NOT_FINITE.format(f"loss is {nats}", like.dtype))
        if progress:
            progress(end - 1, len(ids) - 1)
    rest(model)
    return Evaluation(len(ids) - 1, nats, time.perf_counter() - began)
