"""Whether a checkpoint was loaded right: by two ways that share as little as can be, and compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.reading import read_tensors
from gpt2lite.config import GPTConfig
from gpt2lite.converting import convert
from gpt2lite.dialects import base_of, find_config, read_dialect, with_lora_alpha, with_peft
from gpt2lite.errors import UsageError
from gpt2lite.model import GPTModel

PROMPT = (15496, 11, 314, 716, 257, 3303, 2746)  # "Hello, I am a language model" in GPT-2's encoding
NEW_TOKENS = 32
# Of the largest logit, how much two orders of the same sums may differ by.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class Verification:
    """Two loads compared: logits of a prompt and what our model wrote after it, in absolute numbers."""

    reference: str
    config: GPTConfig
    difference: float
    tolerance: float
    ids: list[int]
    prompt_tokens: int
    agreed_tokens: int

    @property
    def new_tokens(self) -> int:
        """How many were written."""
        return len(self.ids) - self.prompt_tokens

    @property
    def passed(self) -> bool:
        """Whether all is equal to rounding."""
        return self.difference <= self.tolerance and self.agreed_tokens == self.new_tokens


def plain_model(
    path: str | os.PathLike[str],
    config: GPTConfig | Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    lora_alpha: float | None = None,
) -> GPTModel:
    """As plain torch loads it, on the CPU: read the file whole, `load_state_dict`. Costs twice the model.

    A `.pth` is read by `torch.load`; no strategy and none of the streaming is used.
    """
    reading = with_lora_alpha(
        with_peft(read_dialect(open_checkpoint(base_of(Path(path)) or path)), Path(path)), lora_alpha
    )
    found = find_config(reading, config)
    sources = {placement.source for placement in reading.placements.values()}
    factors = {factor.source for adapter in reading.adapters for factor in (adapter.a, adapter.b)}
    stored = read_tensors(reading.manifest, sources | factors, torch.device("cpu"))
    state = {name: placement.of(stored[placement.source]) for name, placement in reading.placements.items()}
    for adapter in reading.adapters:
        assert adapter.scale is not None
        a, b = (factor.of(stored[factor.source]).float() for factor in (adapter.a, adapter.b))
        added = adapter.scale * (b @ a)
        state[adapter.weight] = (state[adapter.weight] + added).to(state[adapter.weight].dtype)
    with torch.device("meta"):
        model = GPTModel(found)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    if found.tied_head:
        model.out_head.weight = model.tok_emb.weight
    return model.eval().to(dtype=dtype)


@dataclass(frozen=True, slots=True)
class Expected:
    """What is to be loaded the other way."""

    path: Path
    config: GPTConfig
    device: torch.device
    dtype: torch.dtype
    lora_alpha: float | None


Forward = Callable[[Tensor], Tensor]  # ids (1, T) → logits (1, T, V)


def _plain(expected: Expected, folder: str) -> Forward:
    model = plain_model(expected.path, expected.config, expected.dtype, expected.lora_alpha)
    return model.to(expected.device)


def _transformers(expected: Expected, folder: str) -> Forward:
    """transformers' own model: of the checkpoint itself where it is a folder for it, else of a conversion."""
    try:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(f"transformers cannot be imported ({error}): pip install transformers") from None
    path = expected.path
    if expected.config.n_classes:
        raise UsageError(f"{path}: a classifier is compared with plain torch only")
    readable = path.is_dir() and (path / "config.json").is_file()
    if not readable or read_dialect(open_checkpoint(path)).dialect != "huggingface":
        path = Path(folder) / "model"
        convert(expected.path, path, to="huggingface", config=expected.config, verify=False)
    logging.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(path, dtype=expected.dtype, local_files_only=True).eval()
    return lambda ids: model.to(expected.device)(ids).logits


REFERENCES: dict[str, tuple[str, Callable[[Expected, str], Forward]]] = {
    "torch": ("plain torch", _plain),
    "transformers": ("transformers", _transformers),
}


def _agreeing(logits: Tensor, written: Tensor, tolerance: float) -> int:
    """How many written ids (N,) are the likeliest by the logits (N, V) before them, to rounding."""
    own = logits.gather(1, written[:, None])[:, 0]
    return int((own >= logits.amax(1) - 2 * tolerance).sum())


@torch.inference_mode()
def verify(
    load: Callable[[], GPTModel],
    path: str | os.PathLike[str],
    *,
    against: str = "torch",
    lora_alpha: float | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Verification:
    """Compare logits and greedy tokens of the model that `load` makes of a checkpoint with another way's.

    `against` is "torch" (the file read whole, `load_state_dict`) or "transformers", whose forward pass is its
    own, too; what it cannot read is converted for it into `folder` (the system's temporary one), which takes
    disk of the model's size. The two are in memory one after the other: costs what `load` costs, then twice
    the model on the host. Greedy tokens of near equal logits count as agreeing.

    Raises what `load` raises, and UsageError for an unknown `against` or one that cannot run.
    """
    if against not in REFERENCES:
        raise UsageError(f"against must be {' or '.join(REFERENCES)}, got {against!r}")
    model = load()
    config, like = model.config, model.pos_emb.weight
    prompt = torch.tensor([PROMPT], device=like.device)[:, : config.context_length] % config.vocab_size
    start = prompt.shape[1]
    room = 0 if config.n_classes else min(NEW_TOKENS, config.context_length - start)
    ids = model.generate(prompt, room) if room else prompt
    ours = model(ids)[0].float().cpu()
    del model
    name, load_other = REFERENCES[against]
    with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=folder) as temporary:
        forward = load_other(Expected(Path(path), config, like.device, like.dtype, lora_alpha), temporary)
        theirs = forward(ids)[0].float().cpu()
    tolerance = TOLERANCES[like.dtype] * float(theirs.abs().max())
    return Verification(
        reference=name,
        config=config,
        difference=float((ours - theirs).abs().max()),
        tolerance=tolerance,
        ids=ids[0].tolist(),
        prompt_tokens=start,
        agreed_tokens=_agreeing(theirs[start - 1 : -1], ids[0, start:].cpu(), tolerance),
    )
