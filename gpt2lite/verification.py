"""Whether a checkpoint was loaded right: by two ways that share as little as can be, and compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lite.checkpoint import FOLDER_FILES
from gpt2lite.checkpoint.reading import read_tensors
from gpt2lite.config import GPTConfig
from gpt2lite.converting import convert
from gpt2lite.dialects.configs import is_for_transformers, is_of_folder
from gpt2lite.errors import UsageError
from gpt2lite.model import GPTModel
from gpt2lite.opening import Opened

PROMPT = (15496, 11, 314, 716, 257, 3303, 2746)  # "Hello, I am a language model" in GPT-2's encoding
NEW_TOKENS = 32
# Of the largest logit, how much two orders of the same sums may differ by.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class Verification:
    """Two loads compared: logits of a prompt and what our model wrote after it, in absolute numbers.

    `unchecked` says what both loads share, so that a mistake in it would not show.
    """

    reference: str
    unchecked: str
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


def plain_model(opened: Opened[GPTModel], dtype: torch.dtype | None) -> GPTModel:
    """As plain torch loads it, on the CPU: read the file whole, `load_state_dict`. Costs twice the model.

    A `.pth` is read by `torch.load`; no strategy and none of the streaming is used.
    """
    reading, found = opened.reading, opened.config
    sources = {placement.source for placement in reading.placements.values()}
    factors = {name for adapter in reading.adapters for name in (adapter.a, adapter.b)}
    stored = read_tensors(reading.manifest, sources | factors, torch.device("cpu"))
    state = {name: placement.of(stored[placement.source]) for name, placement in reading.placements.items()}
    for adapter in reading.adapters:
        assert adapter.alpha is not None
        added = adapter.alpha * (stored[adapter.a].float() @ stored[adapter.b].float()).t()
        state[adapter.weight] = (state[adapter.weight] + added).to(state[adapter.weight].dtype)
    with torch.device("meta"):
        model = GPTModel(found)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    if found.tied_head:
        model.out_head.weight = model.tok_emb.weight
    return model.eval().to(dtype=dtype)


Forward = Callable[[Tensor], Tensor]  # ids (1, T) → logits (1, T, V)
Load = Callable[[Opened[GPTModel], torch.dtype, str], tuple[Forward, str]]  # …, and what it shares with ours

SAME_CONFIG = "the config and the forward pass: both loads take gpt2lite's (try --against transformers)"
SAME_TABLES = "the config and the names: transformers cannot read this file, so gpt2lite converted it first"
SAME_NAMES = (
    "the names: transformers cannot read this file, so gpt2lite converted it; the config is the folder's"
)


def _plain(opened: Opened[GPTModel], dtype: torch.dtype, folder: str) -> tuple[Forward, str]:
    return plain_model(opened, dtype), SAME_CONFIG


def _transformers(opened: Opened[GPTModel], dtype: torch.dtype, folder: str) -> tuple[Forward, str]:
    """transformers' own model, of its own class, as the folder's config.json says; else of a conversion."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(f"transformers cannot be imported ({error}): pip install transformers") from None
    logging.disable_progress_bar()
    path, shared = opened.path if opened.path.is_dir() else opened.path.absolute().parent, ""
    has_config = is_of_folder(opened.path) and is_for_transformers(path / "config.json")
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if not has_config or opened.reading.dialect != "huggingface" or opened.path.name not in FOLDER_FILES:
        if has_config:
            options["config"] = AutoConfig.from_pretrained(path, local_files_only=True)
        path, shared = Path(folder) / "model", SAME_NAMES if has_config else SAME_TABLES
        if opened.config.n_classes:
            raise UsageError(f"{opened.path}: a classifier is compared with plain torch only")
        convert(opened.path, path, to="huggingface", config=opened.config.as_dict(), verify=False)
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    return lambda ids: model(ids).logits, shared


REFERENCES: dict[str, tuple[str, Load]] = {
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
    opened: Opened[GPTModel],
    *,
    against: str = "torch",
    folder: str | os.PathLike[str] | None = None,
) -> Verification:
    """Compare logits and greedy tokens of the model that `load` makes of a checkpoint with another way's.

    `against` is "torch" (the file read whole, `load_state_dict`, with the config that we found) or
    "transformers", whose config and forward pass are its own, too: it builds what the folder's config.json
    says. What it cannot read is converted for it into `folder` (the system's temporary one), which takes disk
    of the model's size. `Verification.unchecked` says what both share, which no comparison can tell. The two
    are in memory one after the other: costs what `load` costs, then twice the model on the host. Greedy
    tokens of near equal logits count as agreeing.

    Raises what `load` raises, and UsageError for an unknown `against` or one that cannot run.
    """
    if against not in REFERENCES:
        raise UsageError(f"against must be {' or '.join(REFERENCES)}, got {against!r}")
    model = load()
    config, like = model.config, model.pos_emb.weight
    prompt = torch.tensor([PROMPT], device=like.device)[:, : config.context_length] % config.vocab_size
    start = prompt.shape[1]
    room = 0 if config.n_classes else min(NEW_TOKENS, config.context_length - start)
    ids = (model.generate(prompt, room) if room else prompt).cpu()
    ours, dtype = model(ids.to(like.device))[0].float().cpu(), like.dtype
    del model, like
    name, load_other = REFERENCES[against]
    with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=folder) as temporary:
        forward, unchecked = load_other(opened, dtype, temporary)
        theirs = forward(ids)[0].float()
    tolerance = TOLERANCES[dtype] * float(theirs.abs().max())
    return Verification(
        reference=name,
        unchecked=unchecked,
        config=config,
        difference=float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf"),
        tolerance=tolerance,
        ids=ids[0].tolist(),
        prompt_tokens=start,
        agreed_tokens=_agreeing(theirs[start - 1 : -1], ids[0, start:], tolerance),
    )
