"""A classifier's head, and its rows by the labels of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from gpt2lite.config import Purpose
from gpt2lite.errors import UsageError
from gpt2lite.model import GPTModel


@torch.inference_mode(False)
def as_classifier(model: GPTModel, n_classes: int, seed: int = 0) -> None:
    """Replace the vocabulary's head by a new one of n_classes rows, with a bias (the book, ch. 6).

    Raises UsageError for fewer than one class, or a seed that is not in 0 … 2**64 - 1.
    """
    for name, value, least, end in (("n_classes", n_classes, 1, 2**31), ("seed", seed, 0, 2**64)):
        if type(value) is not int or not least <= value < end:
            raise UsageError(f"{name} must be an int of at least {least} and below {end}, got {value!r}")
    C, like = model.config.emb_dim, model.pos_emb.weight
    model.purpose = Purpose()  # whatever the old head was trained for
    model.config = replace(model.config, n_classes=n_classes, head_bias=True, tied_head=False)
    drawn = torch.empty(n_classes, C, dtype=torch.float32, device="cpu")
    drawn.normal_(0.0, 0.02, generator=torch.Generator("cpu").manual_seed(seed))
    head = nn.utils.skip_init(nn.Linear, C, n_classes, device=like.device, dtype=like.dtype)
    head.weight.data.copy_(drawn)
    head.bias.data.zero_()
    model.out_head = head


@torch.no_grad()
def relabel(model: GPTModel, known: Sequence[str], labels: Sequence[str], seed: int = 0) -> list[str]:
    """Give a classifier of the classes `known` a new head for `labels`; returns the labels it knew already.

    Their rows are the old head's, the others are drawn as `as_classifier` draws them.
    """
    old, kept = model.out_head, [label for label in labels if label in known]
    as_classifier(model, len(labels), seed)
    for label in kept:
        new_row, row = labels.index(label), known.index(label)
        model.out_head.weight[new_row] = old.weight[row]
        model.out_head.bias[new_row] = 0.0 if old.bias is None else old.bias[row]
    return kept
