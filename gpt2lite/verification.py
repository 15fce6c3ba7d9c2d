"""Whether a checkpoint was loaded right: compared with a second load that shares as little as possible."""

from __future__ import annotations

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
from gpt2lite.dialects.configs import folder_configs, folder_of
from gpt2lite.dialects.peft import ADAPTER_CONFIG
from gpt2lite.errors import UsageError
from gpt2lite.model import GPTModel
from gpt2lite.opening import Opened, Source

PROMPT = (15496, 11, 314, 716, 257, 3303, 2746)  # "Hello, I am a language model" in GPT-2's encoding
NEW_TOKENS = 32
# How much sums in two orders may differ, as a share of the largest logit.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class Verification:
    """Two loads compared: logits of a prompt, and the tokens that our model generated after it.

    `difference` and `tolerance` are absolute. `unchecked` says what both loads share, so that a mistake in it
    would not show.
    """

    reference: str
    unchecked: str
    config: GPTConfig
    difference: float
    tolerance: float
    ids: list[int]
    prompt_tokens: int
    new_tokens: int
    agreed_tokens: int

    @property
    def passed(self) -> bool:
        """Whether all is equal but for rounding."""
        return self.difference <= self.tolerance and self.agreed_tokens == self.new_tokens


def plain_model(opened: Opened[GPTModel], dtype: torch.dtype | None) -> GPTModel:
    """As plain torch loads it, on the CPU: read the file whole, `load_state_dict`. Costs twice the model.

    A `.pth` is read by `torch.load`; no strategy and no streaming is used.
    """
    reading, config = opened.reading, opened.config
    sources = {placement.source for placement in reading.placements.values()}
    factors = {factor.source for adapter in reading.adapters for factor in (adapter.a, adapter.b)}
    stored = read_tensors(reading.manifest, sources | factors, torch.device("cpu"))
    reading.manifest.check_unchanged()
    state = {name: placement.of(stored[placement.source]) for name, placement in reading.placements.items()}
    for adapter in reading.adapters:
        assert adapter.scale is not None
        a, b = (factor.of(stored[factor.source]).float() for factor in (adapter.a, adapter.b))
        added = adapter.scale * (b @ a)
        state[adapter.weight] = (state[adapter.weight] + added).to(state[adapter.weight].dtype)
    with torch.device("meta"):
        model = GPTModel(config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    if config.tied_head:
        model.out_head.weight = model.tok_emb.weight
    return model.eval().to(dtype=dtype)


CLASSIFIERS = ("GPT2ForSequenceClassification", "GPT2ForTokenClassification")  # transformers' classes
Forward = Callable[[Tensor], Tensor]  # ids (1, T) → logits (1, T, V), or (1, V) of the last token
SAME_CONFIG = "the config and the forward pass: both loads take gpt2lite's (try --against transformers)"
CONVERTED = "transformers cannot read this file, so gpt2lite converted it"


def _transformers(opened: Opened[GPTModel], dtype: torch.dtype, folder: Path) -> tuple[Forward, str]:
    """transformers' own model, of its own class, as the folder's config.json says; else of a conversion."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(f"transformers cannot be imported ({error}): pip install transformers") from None
    logging.disable_progress_bar()
    if not isinstance(opened.path, Path):
        raise UsageError(f"{opened.path}: transformers reads no remote files; use torch, or download it")
    path, kind, shared = Path(folder_of(opened.path)), "AutoModelForCausalLM", ""
    said, config = folder_configs(opened.path).get("config.json", {}), opened.config
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    is_theirs = opened.reading.dialect == "huggingface" and opened.path.name in FOLDER_FILES
    if "model_type" not in said or not is_theirs:
        shared = f"the config and the names: {CONVERTED}"
        if config.n_classes:
            kind = CLASSIFIERS[0]
        elif "model_type" in said:
            options["config"] = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            shared = f"the names: {CONVERTED}; the config is the folder's"
        path = convert(opened, folder / "model", to="huggingface", verify=False)
    elif opened.reading.adapters and not (path / ADAPTER_CONFIG).is_file():
        advice = "copy its two files here, or compare with plain torch"
        raise UsageError(f"{path}: transformers would leave out the adapter; {advice}")
    elif config.n_classes:
        kind = (said.get("architectures") or ["none"])[0]
        if kind not in CLASSIFIERS:
            known = f"the classifiers compared are {', '.join(CLASSIFIERS)}"
            raise UsageError(f"{path}/config.json names {kind}; {known}")
    model = getattr(transformers, kind).from_pretrained(path, **options).eval()
    model.config.pad_token_id = None  # what is classified is the last token, whatever its number
    return lambda ids: model(ids).logits, shared


# What loads a checkpoint into a dtype, with a folder for its files: the model, and what it shares with ours.
REFERENCES: dict[str, tuple[str, Callable[[Opened[GPTModel], torch.dtype, Path], tuple[Forward, str]]]] = {
    "torch": ("plain torch", lambda opened, dtype, folder: (plain_model(opened, dtype), SAME_CONFIG)),
    "transformers": ("transformers", _transformers),
}


@torch.inference_mode()
def verify(
    load: Callable[[], GPTModel],
    opened: Opened[GPTModel],
    *,
    against: str = "torch",
    folder: Source | None = None,
) -> Verification:
    """Compare logits and greedy tokens of the model that `load` makes of a checkpoint with another load's.

    `against` is "torch" (the file read whole, `load_state_dict`, with the config that gpt2lite found) or
    "transformers", with its own config and forward pass: it builds what the folder's config.json says. A file
    it cannot read is converted for it into `folder` (the system's temporary one), which takes disk space of
    the model's size. `Verification.unchecked` says what both loads share, which no comparison can check. The
    two models are in memory one after the other: costs what `load` costs, then twice the model on the host.
    Greedy tokens with nearly equal logits count as agreeing.

    Raises what `load` raises, and UsageError for an unknown `against` or one that cannot run.
    """
    if against not in REFERENCES:
        raise UsageError(f"against must be {' or '.join(REFERENCES)}, got {against!r}")
    for source in opened.reading.manifest.files:
        source.check_sha256()
    model = load()
    config, like = model.config, model.pos_emb.weight
    prompt = torch.tensor([PROMPT], device=like.device)[:, : config.context_length] % config.vocab_size
    start = prompt.shape[1]
    is_finite = bool(model(prompt).isfinite().all())  # else `generate` would raise, and the logits show it
    room = min(NEW_TOKENS, config.context_length - start) if is_finite and not config.n_classes else 0
    ids = (model.generate(prompt, room) if room else prompt).cpu()
    ours, dtype = model(ids.to(like.device))[0].float().cpu(), like.dtype
    del model, like
    reference, load_other = REFERENCES[against]
    with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=folder) as temporary:
        forward, unchecked = load_other(opened, dtype, Path(temporary))
        theirs = forward(ids).reshape(-1, ours.shape[-1]).float()
    ours = ours[-len(theirs) :]
    tolerance = TOLERANCES[dtype] * float(theirs.abs().max())
    difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    before, new = theirs[start - 1 : -1], ids[0, start:]
    agreed = int((before.gather(1, new[:, None])[:, 0] >= before.amax(1) - 2 * tolerance).sum())
    compared = reference, unchecked, config, difference, tolerance
    return Verification(*compared, ids[0].tolist(), start, len(new), agreed)
