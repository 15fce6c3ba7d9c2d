"""PEFT's adapters, beside their base or apart from it: peft's own logits, or the method refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, randomise
from test_loading import ONE_FILE
from torch import Tensor, nn

from gpt2lite import CheckpointError, GPTModel, UsageError, convert, forecast, track_memory
from gpt2lite.dialects.peft import INERT, READ
from gpt2lite.verification import plain_model

pytest.importorskip("peft", reason="peft is not installed")
from peft import (  # noqa: E402
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    get_peft_model,
)
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CONV1D = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "attention": CONV1D,
    "every layer": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["c_attn", "c_proj"], "use_rslora": True, "lora_alpha": 7},
    "patterns": {
        "target_modules": r".*\.(c_attn|c_proj|c_fc)",
        "rank_pattern": {r"h.0.attn.c_attn": 2, r"^transformer\.h\.\d+\.mlp\.c_proj": 3},
        "alpha_pattern": {"^transformer.h.1.attn.c_proj": 1.5, "attn.c_proj": 3, "c_fc": 32},
        "use_rslora": True,
    },
    "one layer": {**CONV1D, "layers_to_transform": [1], "layers_pattern": "h"},
    "biases": {**CONV1D, "bias": "all"},
    "its own biases": {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"},
    "saved head": {**CONV1D, "modules_to_save": ["lm_head"]},
    "saved embedding": {**CONV1D, "modules_to_save": ["wte"]},
    "saved modules": {**CONV1D, "modules_to_save": ["wte", "lm_head", "mlp", "ln_1", "ln_f"]},
    "embeddings": {"target_modules": ["wte", "wpe", "c_attn"]},
    "head": {"target_modules": ["lm_head", "c_fc"]},
    "embedding and head": {"target_modules": ["wte", "lm_head"]},
    "saved head, embedding": {"target_modules": ["wte"], "modules_to_save": ["lm_head"]},
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base(folder: Path, **options: Any) -> Path:
    config = GPT2Config(
        vocab_size=TINY.vocab_size, n_positions=TINY.context_length, n_embd=TINY.emb_dim,
        n_head=TINY.n_heads, n_layer=TINY.n_layers, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    randomise(GPT2LMHeadModel(config)).save_pretrained(folder)
    return folder


def tuned(folder: Path, config: Any = None, **options: Any) -> nn.Module:
    """peft's model over the base in a folder, with everything that it trains moved."""
    config = config or LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, **{"r": 4, "lora_alpha": 6, **options}
    )
    torch.manual_seed(0)
    with quiet():
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
    return model


def saved(theirs: nn.Module, folder: Path, **options: Any) -> Path:
    with quiet():
        theirs.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def assert_equal(model: nn.Module, theirs: nn.Module, ids: Tensor) -> None:
    expected = theirs(ids).logits
    assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_adapters_logits_are_pefts(name: str, tied: bool, tmp_path: Path, ids: Tensor):
    both = base(tmp_path / "both", tie_word_embeddings=tied)
    theirs = tuned(both, **CONFIGURATIONS[name])
    adapter = saved(theirs, tmp_path / "adapter")
    with torch.no_grad(), quiet():  # the test's own: they differ from the base's, and peft loads what it saved
        expected = theirs(ids).logits
        assert (GPTModel.from_checkpoint(both)(ids) - expected).abs().max() > 0.1
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits, expected)
    assert_equal(GPTModel.from_checkpoint(adapter), theirs, ids)
    for file in ADAPTER:
        shutil.copy(adapter / file, both)
    assert_equal(GPTModel.from_checkpoint(both), theirs, ids)
    assert_equal(GPTModel.from_checkpoint(adapter / ADAPTER[1]), theirs, ids)
    assert_equal(plain_model(both, None, None), theirs, ids)
