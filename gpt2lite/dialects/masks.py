"""Attention masks that a file stores: compared with the causal one, since ours is never read from a file."""

from __future__ import annotations

from dataclasses import replace

import torch

from gpt2lite.checkpoint import TensorSpan
from gpt2lite.checkpoint.reading import read_span
from gpt2lite.dialects.reading import Reading
from gpt2lite.errors import CheckpointError

ROWS = 64  # read at a time: 256 KiB of GPT-2's


def check_masks(reading: Reading) -> None:
    """Raise CheckpointError for a mask that is not causal: a window, or none at all, is another computation.

    Reads the first block's mask whole, and of the others, where they are not the same bytes, the first, the
    middle and the last row: a window hides something in the last, a mask that hides nothing shows in the
    first.
    """
    tensors = reading.manifest.tensors
    spans = {tensors[name].address: tensors[name] for name in reading.masks if tensors[name].numel > 1}
    for number, span in enumerate(spans.values()):
        size = span.shape[-1]
        rows = range(0, size, ROWS) if number == 0 else (0, size // 2, size - 1)
        is_square = span.shape[-2:] == (size, size) and span.numel == size * size and span.is_contiguous
        if not is_square or not all(_is_causal(span, row, ROWS if number == 0 else 1) for row in rows):
            raise CheckpointError(
                span.source,
                f"{span.name} is not GPT-2's causal mask: in its model a token does not see "
                "exactly those before it, which gpt2lite does not compute. Use the program that wrote it.",
            )


def _is_causal(span: TensorSpan, row: int, count: int) -> bool:
    """Whether rows of a mask (size, size) hide what follows each token: 1 for hidden (book) or seen (Hub)."""
    size = span.shape[-1]
    count = min(count, size - row)
    begin = span.offset + row * size * span.dtype.itemsize
    part = replace(span, shape=(count, size), stride=(size, 1), offset=begin)
    stored = read_span(part) != 0
    follows = torch.arange(size, device="cpu") > torch.arange(row, row + count, device="cpu")[:, None]
    return torch.equal(stored, follows if span.name.endswith(".mask") else ~follows)
