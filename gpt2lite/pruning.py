"""A smaller model from a large one: whole blocks are left out, those that it misses least.

Only whole blocks: a config of the book or of transformers says one width for all attention heads (emb_dim /
n_heads) and four times emb_dim for all feed-forward layers, so a model without some heads or some units of
them could be written in neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from gpt2lite.converting import ConvertOptions, convert
from gpt2lite.devices import widest_float
from gpt2lite.dialects.reading import block_of
from gpt2lite.errors import UsageError
from gpt2lite.evaluation import evaluate, loss_of, windows
from gpt2lite.generation.engines import in_eval_mode
from gpt2lite.loading.options import Progress
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened
from gpt2lite.tokenizer import text_ids

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Pruning:
    """The blocks that stay, and what the choice cost.

    `kept` are their numbers in the whole model; `losses` in nats per token, of the whole model and then
    without one more block at a time.
    """

    kept: tuple[int, ...]
    losses: tuple[float, ...]


def keep_blocks(opened: Opened[Model], blocks: Sequence[int]) -> Opened[Model]:
    """The checkpoint as if it held these blocks alone, in their order. Nothing is read.

    `.load()` gives the smaller model, `convert` writes it. Raises UsageError unless `blocks` are numbers of
    its blocks, each once and ascending.
    """
    n_layers, kept = opened.reading.size[0], list(blocks)
    if not kept or any(type(at) is not int for at in kept) or kept != sorted({*kept} & {*range(n_layers)}):
        said = f"blocks must be ascending numbers from 0 to {n_layers - 1}, each once"
        raise UsageError(f"{opened.path}: {said}; got {kept}")

    def renamed(name: str) -> str | None:
        block = block_of(name)
        if block in kept:
            return name.replace(f".{block}.", f".{kept.index(block)}.", 1)
        return name if block < 0 else None

    read = opened.reading
    placements = {new: placed for name, placed in read.placements.items() if (new := renamed(name))}
    adapters = tuple(replace(each, weight=new) for each in read.adapters if (new := renamed(each.weight)))
    reading = replace(read, placements=placements, adapters=adapters)
    fields = {**opened.found.fields, "n_layers": len(kept)}
    return replace(opened, reading=reading, found=replace(opened.found, fields=fields))


def _losses_without(model: GPTModel, blocks: Sequence[nn.Module], ids: Tensor) -> Iterator[Tensor]:
    """For each window of a text: its summed loss without each block in turn, (blocks,).

    What stands before the block is computed once for all of them.
    """
    context, device = model.config.context_length, model.pos_emb.weight.device
    for begin, end, _ in windows(len(ids), context, context):
        read = ids[begin:end].to(device, torch.int64)
        x = model.tok_emb(read[None, :-1]) + model.pos_emb(torch.arange(end - begin - 1, device=device))
        losses = []
        for at, block in enumerate(blocks):
            without = x
            for later in blocks[at + 1 :]:
                without = later(without)
            losses.append(loss_of(model, model.final_norm(without)[0], read[1:]))
            x = block(x)
        yield torch.stack(losses)


@torch.inference_mode()
def choose_blocks(model: GPTModel, ids: Tensor, keep: int, progress: Progress | None = None) -> Pruning:
    """Which `keep` blocks to keep: the one that the text misses least is left out, again and again.

    `ids` are a held-out text, integers (T,). To leave out one of n blocks costs n² / 2 runs of a block over
    the text, as much as n / 2 evaluations; memory is that of one. `progress` is called with (windows done,
    windows in all). Raises UsageError as `evaluate`, and for a `keep` that is not in 1 … n_layers.
    """
    n_layers = len(model.trf_blocks)
    if type(keep) is not int or not 1 <= keep <= n_layers:
        raise UsageError(f"keep must be in 1 … {n_layers}, the blocks of this model; got {keep!r}")
    whole = evaluate(model, ids, stride=model.config.context_length)
    kept, losses, done = list(range(n_layers)), [whole.nats / whole.tokens], 0
    total = (n_layers - keep) * len([*windows(len(ids), *[model.config.context_length] * 2)])
    while len(kept) > keep:
        device = model.pos_emb.weight.device
        nats = torch.zeros(len(kept), dtype=widest_float(device), device=device)
        with in_eval_mode(model):
            for found in _losses_without(model, [model.trf_blocks[at] for at in kept], ids):
                nats, done = nats + found, done + 1
                if progress:
                    progress(done, total)
        least = int(nats.nan_to_num(torch.inf).argmin())
        losses.append(float(nats[least]) / whole.tokens)
        del kept[least]
    return Pruning(tuple(kept), tuple(losses))


def prune(
    source: str | os.PathLike[str] | Opened[GPTModel],
    destination: str | os.PathLike[str],
    *,
    blocks: Sequence[int] | None = None,
    keep: int | None = None,
    text: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[ConvertOptions],
) -> Path:
    """Write a checkpoint without some of its blocks, and return where.

    Either `blocks` are the ones to keep, which costs what `convert` costs, or `keep` is how many, and
    `choose_blocks` finds them by a held-out `text` with the model in memory (fp32, or mapped where the file
    is). The rest is `convert`, with its options, progress and errors; further UsageErrors are those of
    `keep_blocks` and `choose_blocks`.
    """
    opened = source if isinstance(source, Opened) else open_model(source, config=options.pop("config", None))
    if (blocks is None) is (keep is None) or (keep is None) is not (text is None):
        raise UsageError("prune wants either blocks=[…], or keep=… with a held-out text=…")
    if text is not None and keep is not None:
        ids = text_ids(opened.beside.tokenizer, text)
        blocks = choose_blocks(opened.load("cpu", dtype=torch.float32), ids, keep).kept
    return convert(keep_blocks(opened, blocks or ()), destination, progress=progress, **options)
