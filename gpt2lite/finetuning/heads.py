"""A classifier's head, and what its classes are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gpt2lite.errors import CheckpointError
from gpt2lite.finetuning.states import LABELS, newest_state
from gpt2lite.model import GPTModel


@torch.inference_mode(False)
def as_classifier(model: GPTModel, n_classes: int, seed: int = 0) -> None:
    """Replace the vocabulary's head by a new one of n_classes rows, with a bias (the book, ch. 6)."""
    C, like = model.config.emb_dim, model.pos_emb.weight
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


def read_labels(checkpoint: Path) -> tuple[str, ...]:
    """What the classes of a finetuned classifier are called, from labels.json or the states beside it.

    () where nothing says it. Raises CheckpointError where labels.json is damaged or is another run's.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path, state = folder / LABELS, newest_state(folder)
    known = state[1]["made_from"]["labels"] if state else []
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else known
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise CheckpointError(path, "wanted a JSON list of the classes' labels, in the order of the head")
    if state and found != known:
        raise CheckpointError(
            path, f"says {', '.join(found)}, {state[0].name} says {', '.join(known)}. Is it another run's?"
        )
    return tuple(found)
