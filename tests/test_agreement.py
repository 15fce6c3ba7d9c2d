"""What a checkpoint says must agree: no file loads as something that its own program does not compute."""

from __future__ import annotations

import json
import re
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from conftest import TINY, randomise
from test_dialects import MODEL_ARGS, peer, turned
from test_loading import HEADS, huggingface, save_pth
from torch import nn

from gpt2lite import CheckpointError, GPTConfig, GPTModel, UsageError, convert, load_module, open_model
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.dialects.configs import COMPUTED, DOES_NOT_MATTER, OURS
from gpt2lite.loading.strategies import STRATEGIES
from gpt2lite.tokenizer import tokenizer_for
from gpt2lite.verification import verify

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
IDS = torch.randint(101, (2, 16), generator=torch.Generator().manual_seed(1))


def hub_model(**changes: Any) -> nn.Module:
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | changes)))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def difference(ours: nn.Module, theirs: nn.Module) -> float:
    expected = theirs(IDS)
    return float((ours(IDS) - getattr(expected, "logits", expected)).abs().max())


# ---- heads and sizes, from known keys alone ----------------------------------------------------------------


@pytest.mark.parametrize(
    "beside",
    [
        {"config": {"n_head": 12, "n_layer": 12, "n_embd": 768}},
        {"pooler": {"n_heads": 8}},
        {"args": {"activation": "relu"}},
        {"extra": {"model": {"n_head": 2}}},
    ],
)
def test_a_nanogpt_files_heads_are_those_of_model_args(
    beside: dict[str, Any], tmp_path: Path, ids: torch.Tensor
):
    theirs = peer("gelu")
    path = save_pth({"model": turned(theirs), "model_args": MODEL_ARGS, **beside}, tmp_path)
    loaded = GPTModel.from_checkpoint(path)
    assert loaded.config.n_heads == TINY.n_heads
    with torch.no_grad():
        assert (loaded(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("key", "beside"),
    [
        ("config", {"model_config": {"n_head": 6}}),
        ("config", {"hyper_parameters": {"n_head": 6}}),
        ("hyper_parameters", {"args": Namespace(n_heads=6)}),
        ("hyper_parameters", {"cfg": {"model": {"num_attention_heads": 6}}}),
        ("config", {"gpt": {"activation_function": "gelu"}}),
        ("config", {"gpt": {"layer_norm_epsilon": 1e-3}}),
        ("config", {"args": {"scale_attn_weights": False}}),
    ],
)
def test_another_config_in_the_file_must_agree(key: str, beside: Any, model: GPTModel, tmp_path: Path):
    said = {key: {"n_head": TINY.n_heads}, **beside}
    path = save_pth({"model": model.state_dict(), **said}, tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(beside))):
        open_model(path)


def test_heads_of_an_unknown_key_are_not_believed(model: GPTModel, tmp_path: Path):
    path = save_pth({"model": model.state_dict(), "encoder": {"n_heads": 8}}, tmp_path)
    with pytest.raises(CheckpointError, match="number of heads cannot be read off weights"):
        GPTModel.from_checkpoint(path)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (
            {"config": {"n_head": 4}, "n_heads": 8},
            "n_heads is 8 in .*model.pth, beside.*4 in .*model.pth, config",
        ),
        (
            {"config": {"n_head": 4, "n_layer": 12}},
            "n_layers is 3 in .*weights, but 12 in .*model.pth, config",
        ),
        ({"model_args": {"n_head": 4, "block_size": 64}}, "context_length is 32 in .*64 in .*model_args"),
        ({"hyper_parameters": {"n_head": "4"}}, "n_heads must be a positive int of 31 bits, got '4'"),
        ({"config": {"n_head": True}}, "n_heads must be a positive int of 31 bits, got True"),
        ({"config": {"n_head": 4, "activation": "relu"}}, "activation='relu', wanted 'gelu_new'"),
    ],
)
def test_what_a_file_says_of_itself_must_agree(beside: Any, said: str, model: GPTModel, tmp_path: Path):
    path = save_pth({"model": model.state_dict(), **beside}, tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s)model.pth.*{said}"):
        GPTModel.from_checkpoint(path)


@pytest.mark.parametrize("name", ["model.json", "config.json", "hparams.json"])
def test_a_side_file_that_contradicts_the_file_is_named_with_it(name: str, model: GPTModel, tmp_path: Path):
    path = save_pth({"model": model.state_dict(), "config": {"n_head": 4}}, tmp_path)
    (tmp_path / name).write_text(json.dumps({"n_head": 12}))
    with pytest.raises(CheckpointError, match=rf"n_heads is 4 in .*model.pth, config, but 12 in .*{name}"):
        GPTModel.from_checkpoint(path)
    (tmp_path / name).write_text(json.dumps({"n_head": 4, "n_layer": 99}))
    with pytest.raises(CheckpointError, match=rf"n_layers is 3 in .*its weights, but 99 in .*{name}"):
        GPTModel.from_checkpoint(path, config=TINY)


def test_a_config_json_is_not_about_other_weights_of_its_folder(model: GPTModel, tmp_path: Path):
    saved(hub_model(), tmp_path)
    path = save_pth(model.state_dict(), tmp_path)
    assert GPTModel.from_checkpoint(path, config=HEADS | {"n_heads": 8}).config.n_heads == 8


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("field", "value"), [("n_heads", 8), ("activation", "gelu")])
def test_the_caller_must_agree_with_the_file(whole: bool, field: str, value: Any, tmp_path: Path):
    folder = saved(hub_model(), tmp_path)
    config: Any = {field: value}
    if whole:
        config = replace(GPTConfig(101, 32, 48, 4, 2, tied_head=True), **config)
    with pytest.raises(CheckpointError, match=rf"{field}={value!r} was passed, but .*config.json says"):
        GPTModel.from_checkpoint(folder, config=config)


def test_a_whole_config_does_not_hide_what_the_file_computes(tmp_path: Path):
    folder = saved(hub_model(layer_norm_epsilon=1e-2), tmp_path)
    with pytest.raises(CheckpointError, match=r"layer_norm_epsilon=0\.01"):
        GPTModel.from_checkpoint(folder, config=GPTConfig(101, 32, 48, 4, 2, tied_head=True))


def test_a_whole_config_with_the_books_gelu_is_no_nanogpt(tmp_path: Path):
    path = save_pth({"model": turned(peer("gelu")), "model_args": MODEL_ARGS}, tmp_path)
    with pytest.raises(CheckpointError, match="activation='gelu_tanh' was passed"):
        GPTModel.from_checkpoint(path, config=replace(TINY, tied_head=True))


# ---- stale side files --------------------------------------------------------------------------------------


def test_two_files_of_one_stem_keep_their_own_heads(tmp_path: Path):
    for suffix, heads in (("pth", 4), ("safetensors", 8)):
        GPTModel(replace(TINY, n_heads=heads)).save_checkpoint(tmp_path / f"two.{suffix}")
    assert GPTModel.from_checkpoint(tmp_path / "two.pth").config.n_heads == 4
    assert GPTModel.from_checkpoint(tmp_path / "two.safetensors").config.n_heads == 8


def test_a_saved_file_does_not_take_an_older_side_file(tmp_path: Path):
    (tmp_path / "model.json").write_text(json.dumps(replace(TINY, n_heads=12).as_dict()))
    GPTModel(TINY).save_checkpoint(tmp_path / "model.pth")
    with pytest.warns(
        UserWarning, match=r"model.json: differs from the config in .*model.pth, which is used"
    ):
        assert GPTModel.from_checkpoint(tmp_path / "model.pth").config.n_heads == 4


def test_transformers_weights_written_over_ours_are_read_by_their_own_config(tmp_path: Path):
    GPTModel(GPTConfig(101, 32, 48, 8, 2, tied_head=True)).save_checkpoint(tmp_path / "model.safetensors")
    theirs = hub_model()
    assert difference(GPTModel.from_checkpoint(saved(theirs, tmp_path)), theirs) < 1e-4


@pytest.mark.filterwarnings("ignore:nanogpt computes gelu, this model")
@pytest.mark.parametrize("to", ["book", "huggingface", "nanogpt"])
@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out"])
def test_every_written_file_carries_its_config(to: str, name: str, tmp_path: Path):
    source = GPTModel(replace(TINY, n_heads=8, tied_head=True)).save_checkpoint(tmp_path / "model.pth")
    made = convert(source, tmp_path / name, to=to)
    assert GPTModel.from_checkpoint(made).config.n_heads == 8
    if made.is_file():
        assert {path.name for path in tmp_path.iterdir()} == {"model.pth", name}


# ---- every field of config.json ----------------------------------------------------------------------------

OTHER_VALUES = {
    "activation_function": [
        "gelu", "gelu_fast", "gelu_python", "gelu_accurate", "gelu_10", "relu", "silu", "tanh",
    ],
    "n_inner": [100], "vocab_size": [120], "n_positions": [48], "n_embd": [96], "n_layer": [1], "n_head": [6],
    "tie_word_embeddings": [False], "add_cross_attention": [True], "resid_pdrop": [0.3], "is_causal": [False],
    "id2label": [{"0": "a"}], "label2id": [{"a": 0}], "dtype": ["float32"], "model_type": ["gpt_bigcode"],
    "architectures": [["GPT2Model"]], "summary_activation": ["tanh"], "problem_type": ["regression"],
    "pad_token_id": [3], "bos_token_id": [3], "eos_token_id": [3], "chunk_size_feed_forward": [2],
    "is_encoder_decoder": [True], "layer_norm_epsilon": [1e-6, 1e-2], "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True], "pruned_heads": [{"0": [1]}],
    "quantization_config": [{"bits": 4}],
    "auto_map": [{"AutoModel": "x.y"}], "reorder_and_upcast_attn": [True],
}  # fmt: skip
FILE_ONLY = {
    "model_type", "quantization_config", "auto_map", "pruned_heads", "dtype", "architectures", "return_dict",
    "output_attentions",
}  # fmt: skip
FIELDS = sorted((transformers.GPT2Config().to_dict().keys() | OTHER_VALUES.keys()) - {"transformers_version"})


def other_values(field: str) -> list[Any]:
    """What a config may say that is not the default."""
    if field in OTHER_VALUES:
        return OTHER_VALUES[field]
    default = transformers.GPT2Config().to_dict()[field]
    return [
        not default
        if isinstance(default, bool)
        else default + 0.25
        if isinstance(default, float)
        else "other"
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in FIELDS for value in other_values(field)]
)
def test_a_field_is_computed_as_transformers_does_or_refused_by_name(field: str, value: Any, tmp_path: Path):
    is_file_only = field in FILE_ONLY
    theirs = hub_model(**({} if is_file_only else {field: value}))
    folder = saved(theirs, tmp_path)
    if is_file_only or field not in json.loads((folder / "config.json").read_text()):
        edit(folder / "config.json", **{field: value})
    loaded, refusal = None, ""
    try:
        loaded = GPTModel.from_checkpoint(folder)
    except CheckpointError as error:
        refusal = str(error)
    if loaded is not None:
        assert difference(loaded, theirs) < 1e-4
    else:
        assert field in refusal
        assert str(value) in refusal


def test_every_field_of_the_installed_transformers_is_known():
    known = {"n_inner", "vocab_size", *OURS, *COMPUTED, *DOES_NOT_MATTER}
    assert transformers.GPT2Config().to_dict().keys() <= known


def test_an_unknown_field_is_a_warning_that_names_it(tmp_path: Path):
    folder = saved(hub_model(), tmp_path)
    edit(folder / "config.json", attention_sinks=4, nothing=None)
    with pytest.warns(
        UserWarning, match=r"config.json: ignored attention_sinks, which gpt2lite does not know"
    ):
        GPTModel.from_checkpoint(folder)


OTHERS: dict[str, Callable[[], Any]] = {
    "gpt_bigcode": lambda: transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(**SIZES, multi_query=False)
    ),
    "gpt_bigcode multi-query": lambda: transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(**SIZES)
    ),
    "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=101, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    ),
    "imagegpt": lambda: transformers.ImageGPTForCausalImageModeling(
        transformers.ImageGPTConfig(vocab_size=101, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    ),
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=101, max_position_embeddings=32, hidden_size=48, num_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
        )
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**SIZES, rotary_dim=4)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
        )
    ),
    "codegen": lambda: transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**SIZES, rotary_dim=4)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
            max_position_embeddings=32, word_embed_proj_dim=48, pad_token_id=1,
        )
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=101, hidden_size=48, n_layer=2, n_head=4)
    ),
    "biogpt": lambda: transformers.BioGptForCausalLM(
        transformers.BioGptConfig(
            vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        )
    ),
    "decision_transformer": lambda: transformers.DecisionTransformerModel(
        transformers.DecisionTransformerConfig(state_dim=3, act_dim=2, hidden_size=48, n_layer=2, n_head=4)
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("with_config", [True, False])
def test_another_kind_of_model_is_never_taken_for_gpt2(kind: str, with_config: bool, tmp_path: Path):
    folder = saved(OTHERS[kind](), tmp_path)
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=kind.split()[0] if with_config else "model.safetensors"):
        GPTModel.from_checkpoint(folder)


def test_a_head_that_the_config_wants_and_the_file_lacks_is_not_the_embedding(tmp_path: Path):
    folder = saved(hub_model(), tmp_path)
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(
        CheckpointError, match=r"tied_head is True in .*its weights, but False in .*config.json"
    ):
        GPTModel.from_checkpoint(folder)


def test_a_config_that_gives_a_key_twice_is_refused(tmp_path: Path):
    folder = saved(hub_model(), tmp_path / "hub")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"n_head": 4', '"n_head": 2, "n_head": 4'))
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON .a key occurs twice"):
        GPTModel.from_checkpoint(folder)


# ---- masks -------------------------------------------------------------------------------------------------

T = TINY.context_length
CAUSAL = torch.ones(T, T).triu(1)
WRONG_MASKS = {
    "none": torch.zeros(T, T),
    "a window": CAUSAL + torch.ones(T, T).tril(-8),
    "a prefix": CAUSAL * (torch.arange(T) >= 5),
    "turned": CAUSAL.t().contiguous(),
    "also itself": torch.ones(T, T).triu(0),
    "one token less": CAUSAL.clone().index_put_((torch.tensor(9), torch.tensor(3)), torch.tensor(1.0)),
    "halved": CAUSAL / 2,
    "none of it": torch.zeros(0, 0),
    "one number": torch.tensor(1.0),
}


def with_masks(masks: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = randomise(GPTModel(TINY)).state_dict()
    return {**state, **{f"trf_blocks.{i}.att.mask": mask for i, mask in masks.items()}}


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_a_stored_mask_that_is_not_causal_is_refused(kind: str, block: int, tmp_path: Path):
    masks = {i: CAUSAL.clone() for i in range(3)} | {block: WRONG_MASKS[kind]}
    with pytest.raises(CheckpointError, match=rf"trf_blocks.{block}.att.mask is not GPT-2's causal mask"):
        GPTModel.from_checkpoint(save_pth(with_masks(masks), tmp_path), config=HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.uint8])
def test_a_causal_mask_of_any_dtype_is_fine(dtype: torch.dtype, tmp_path: Path):
    masks = {i: CAUSAL.to(dtype) for i in range(3)}
    GPTModel.from_checkpoint(save_pth(with_masks(masks), tmp_path), config=HEADS)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda mask: mask.t().contiguous().t(),
    "of a larger one": lambda mask: torch.nn.functional.pad(mask, (0, 9, 0, 9))[:T, :T],
    "of every second": lambda mask: mask.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_mask_that_is_a_view_is_known_by_its_values(view: str, tmp_path: Path):
    GPTModel.from_checkpoint(
        save_pth(with_masks({i: VIEWS[view](CAUSAL) for i in range(3)}), tmp_path), config=HEADS
    )
    for kind in ("turned", "a window", "one token less"):
        masks = {i: VIEWS[view](WRONG_MASKS[kind] if i == 2 else CAUSAL) for i in range(3)}
        with pytest.raises(CheckpointError, match=r"trf_blocks.2.att.mask is not GPT-2's causal mask"):
            GPTModel.from_checkpoint(save_pth(with_masks(masks), tmp_path), config=HEADS)


def test_a_mask_that_shows_few_bytes_many_times_is_refused_unread(tmp_path: Path):
    for mask in (
        torch.ones(1).expand(10**6, 10**6),
        torch.ones(2 * 10**6).as_strided((10**6, 10**6), (1, 1)),
    ):
        with pytest.raises(CheckpointError, match=r"trf_blocks.0.att.mask is not GPT-2's causal mask"):
            open_model(save_pth(with_masks({0: mask}), tmp_path), config=HEADS)


def test_a_window_in_the_hubs_masks_is_refused(tmp_path: Path):
    state = dict(huggingface().state_dict())
    window = torch.ones(T, T).tril() - torch.ones(T, T).tril(-8)
    state |= {f"transformer.h.{i}.attn.bias": window.bool().view(1, 1, T, T) for i in range(3)}
    with pytest.raises(CheckpointError, match=r"h.0.attn.bias is not GPT-2's causal mask"):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)


def test_opening_reads_the_first_blocks_mask_and_loading_and_converting_all(tmp_path: Path):
    masks = {i: CAUSAL.clone() for i in range(2)} | {2: WRONG_MASKS["one token less"]}
    path = save_pth(with_masks(masks), tmp_path)
    opened = open_model(path, config=HEADS)
    for use in (opened.load, lambda: convert(path, tmp_path / "other.pth", config=HEADS)):
        with pytest.raises(CheckpointError, match=r"trf_blocks.2.att.mask is not GPT-2's causal mask"):
            use()
    with pytest.raises(CheckpointError, match=r"trf_blocks.0.att.mask is not GPT-2's causal mask"):
        open_model(save_pth(with_masks(masks | {0: masks[2]}), tmp_path), config=HEADS)


@pytest.mark.parametrize("kind", ["none", "a window", "a prefix", "turned", "also itself", "halved"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_mask_that_was_overwritten_under_its_old_checksum_is_refused(kind: str, block: int, tmp_path: Path):
    path = save_pth(with_masks({i: CAUSAL.clone() for i in range(3)}), tmp_path)
    span = open_checkpoint(path).tensors[f"trf_blocks.{block}.att.mask"]
    with path.open("r+b") as file:
        file.seek(span.offset)
        file.write(WRONG_MASKS[kind].contiguous().numpy().tobytes())
    with pytest.raises(CheckpointError, match=rf"trf_blocks.{block}.att.mask is not GPT-2's causal mask"):
        GPTModel.from_checkpoint(path, config=HEADS)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e4, -8e3, float("nan"), (-1e4, -1e4)])
def test_a_masked_bias_that_hides_nothing_is_refused_by_its_value(value: Any, tmp_path: Path):
    state = dict(huggingface().state_dict())
    state |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    state["transformer.h.2.attn.masked_bias"] = torch.tensor(value)
    said = r"\(2,\)" if isinstance(value, tuple) else re.escape(str(value))
    with pytest.raises(CheckpointError, match=rf"h.2.attn.masked_bias is {said}, which hides no token"):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)


@pytest.mark.parametrize("value", [-1e4, -1e9, float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_masked_bias_that_hides_is_fine_in_any_dtype(value: float, dtype: torch.dtype, tmp_path: Path):
    state = dict(huggingface().state_dict())
    bias = torch.tensor(value).to(dtype)
    state |= {f"transformer.h.{i}.attn.masked_bias": bias.clone() for i in range(3)}
    GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)


# ---- names, heads, two models ------------------------------------------------------------------------------

PREFIXES = {
    "Lightning": lambda s: {"state_dict": {f"gpt2.{k}": v for k, v in s.items()}, "epoch": 3},
    "wrapper": lambda s: {"model_state": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "PEFT's names": lambda s: {f"base_model.model.{k}": v for k, v in s.items()},
    "compiled inside": lambda s: {k.replace("h.", "_orig_mod.h.", 1): v for k, v in s.items()},
    "DeepSpeed": lambda s: {"module": {f"_forward_module.{k}": v for k, v in s.items()}, "ds_version": "0.1"},
    "FSDP": lambda s: {k.replace("h.1.", "h.1._fsdp_wrapped_module."): v for k, v in s.items()},
    "four deep": lambda s: {"a": {"b": {f"policy.llm.{k}": v for k, v in s.items()}}},
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_whatever_stands_before_the_names_is_taken_off(kind: str, tmp_path: Path, ids: torch.Tensor):
    theirs = huggingface()
    path = save_pth(PREFIXES[kind](dict(theirs.state_dict())), tmp_path)
    with torch.no_grad():
        loaded = GPTModel.from_checkpoint(path, config=HEADS)
        assert (loaded(ids) - theirs(ids).logits).abs().max() < 1e-4
        again = load_module(huggingface, path)
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_a_gpt2_that_is_part_of_a_larger_model_is_refused(tmp_path: Path):
    state = {f"gpt2.{k}": v for k, v in huggingface().state_dict().items()}
    path = save_pth({**state, "vision.weight": torch.ones(3)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"vision.weight: unexpected, not in the model"):
        GPTModel.from_checkpoint(path, config=HEADS)


def test_names_that_fit_nowhere_are_shown_beside_the_nearest(tmp_path: Path):
    state = {k.replace("c_attn", "c_atn"): v for k, v in huggingface().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"nearest names are .*h.0.attn.c_atn.weight.*Expected one of"):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)


@pytest.mark.parametrize(
    "second", [lambda s: {"ema": s}, lambda s: {"state_dict": s}, lambda s: {"model": {"teacher": s}}]
)
def test_two_models_in_one_file_are_an_error_that_names_both(second: Any, tmp_path: Path):
    first, other = huggingface().state_dict(), randomise(huggingface(), seed=5).state_dict()
    path = save_pth({"raw": first, **second(other)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds 2 models, under 'raw.*' \(huggingface\) and '"):
        GPTModel.from_checkpoint(path, config=HEADS)


def test_one_model_that_is_stored_under_two_names_is_one(tmp_path: Path):
    state = huggingface().state_dict()
    path = save_pth({"model": state, "ema": state}, tmp_path)
    assert GPTModel.from_checkpoint(path, config=HEADS).config.n_layers == 3


def test_a_model_and_its_own_body_beside_it_are_one(tmp_path: Path):
    theirs = huggingface()
    both = {"model": theirs.state_dict(), "transformer": theirs.transformer.state_dict()}
    assert GPTModel.from_checkpoint(save_pth(both, tmp_path), config=HEADS).config.n_layers == 3


@pytest.mark.filterwarnings("ignore:.*ignored scale")
def test_a_configs_word_scale_is_not_the_attentions(model: GPTModel, tmp_path: Path):
    path = save_pth({"model": model.state_dict(), "config": {"n_heads": 4, "scale": 3.0}}, tmp_path)
    assert GPTModel.from_checkpoint(path).config.n_heads == 4


def test_heads_beside_the_language_model_are_left_out_with_a_warning(tmp_path: Path, ids: torch.Tensor):
    theirs = huggingface()
    state = dict(theirs.state_dict())
    state |= {"v_head.summary.weight": torch.zeros(1, 48), "v_head.summary.bias": torch.zeros(1)}
    path = save_pth(state, tmp_path)
    with pytest.warns(UserWarning, match=r"without v_head.summary.bias, v_head.summary.weight"):
        loaded = GPTModel.from_checkpoint(path, config=HEADS)
    with torch.no_grad():
        assert (loaded(ids) - theirs(ids).logits).abs().max() < 1e-4


BESIDE = {
    "a dict": lambda body, head: {"transformer": body, "lm_head": {"weight": head}},
    "beside a nested model": lambda body, head: {
        "net": {"model": {f"gpt2.{k}": v for k, v in body.items()}, "lm_head": {"weight": head}},
        "optimizer": {"state": {0: {"exp_avg": head}}},
    },
    "classifier": lambda body, head: {"backbone": body, "classifier": {"weight": head}},
    "another name": lambda body, head: {"backbone": body, "head": {"weight": head}},
    "a tensor": lambda body, head: {"transformer": body, "lm_head": head},
    "a list": lambda body, head: [body, {"lm_head.weight": head}],
    "inside another model": lambda body, head: {"body": body, "model": {"h": body, "lm_head.weight": head}},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_head_beside_the_dict_of_its_body_is_loaded_or_refused(kind: str, tmp_path: Path):
    body, head = huggingface().transformer.state_dict(), torch.rand(101, 48)
    path = save_pth(BESIDE[kind](body, head), tmp_path)
    if kind in list(BESIDE)[3:]:
        with pytest.raises(
            CheckpointError, match=r"under '\w+' has no output head of its own, but .*head.* bes"
        ):
            GPTModel.from_checkpoint(path, config=HEADS)
        return
    loaded = GPTModel.from_checkpoint(path, config=HEADS)
    assert torch.equal(loaded.out_head.weight, head)
    assert torch.equal(loaded.tok_emb.weight, body["wte.weight"])


def test_the_books_head_beside_its_body_is_loaded(model: GPTModel, tmp_path: Path):
    body, head = model.state_dict(), torch.rand_like(model.out_head.weight)
    del body["out_head.weight"]
    path = save_pth({"model": body, "out_head": {"weight": head}}, tmp_path)
    assert torch.equal(GPTModel.from_checkpoint(path, config=HEADS).out_head.weight, head)


@pytest.mark.parametrize("key", ["grads", "last_gradients", "fisher", "delta", "weight_diff"])
def test_what_is_as_large_as_the_weights_and_is_none_is_no_model(key: str, model: GPTModel, tmp_path: Path):
    other = {name: tensor * 0 for name, tensor in model.state_dict().items()}
    path = save_pth({key: other, "model": model.state_dict()}, tmp_path)
    with pytest.warns(UserWarning, match=rf"also holds {key}.* other weights; they are not loaded"):
        found = GPTModel.from_checkpoint(path, config=HEADS)
    assert torch.equal(found.pos_emb.weight, model.pos_emb.weight)
    with pytest.raises(CheckpointError, match="not a GPT-2 with known names"):
        open_model(save_pth({key: other}, tmp_path), config=HEADS)


@pytest.mark.parametrize(("kind", "is_known"), [("GPT2WithRelativeBias", False), ("TFGPT2LMHeadModel", True)])
def test_a_config_that_names_another_class_is_a_warning(kind: str, is_known: bool, tmp_path: Path):
    folder = saved(hub_model(), tmp_path)
    edit(folder / "config.json", architectures=[kind])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        GPTModel.from_checkpoint(folder)
    assert [f"names the class '{kind}'" in str(warning.message) for warning in said] == [True] * (
        not is_known
    )


@pytest.mark.parametrize("name", ["optimizer", "opt", "optimizer_states", "trainer"])
def test_an_optimizers_state_is_no_head_and_no_model(name: str, tmp_path: Path):
    body = huggingface().transformer.state_dict()
    moments = {"exp_avg": body, "state": {0: {"exp_avg": torch.ones(101, 48)}}}
    path = save_pth({"model": body, name: moments}, tmp_path)
    assert GPTModel.from_checkpoint(path, config=HEADS).config.tied_head


def test_a_matrix_beside_a_model_that_has_its_head_is_left_out_with_a_warning(tmp_path: Path):
    path = save_pth({"model": huggingface().state_dict(), "prompt": torch.ones(5, 48)}, tmp_path)
    with pytest.warns(UserWarning, match="opens the language model without prompt"):
        GPTModel.from_checkpoint(path, config=HEADS)


def test_dialogpts_head_is_the_output_head(tmp_path: Path, ids: torch.Tensor):
    theirs = huggingface()
    state = {k.replace("lm_head", "lm_head.decoder"): v.half() for k, v in theirs.state_dict().items()}
    loaded = GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)
    assert torch.equal(loaded.out_head.weight, theirs.lm_head.weight.half())


@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "GPT2ForTokenClassification"])
def test_transformers_classifiers_open_as_classifiers(kind: str, tmp_path: Path):
    config = transformers.GPT2Config(**SIZES, num_labels=3, pad_token_id=0)
    theirs = randomise(getattr(transformers, kind)(config))
    loaded = GPTModel.from_checkpoint(saved(theirs, tmp_path))
    assert loaded.config.n_classes == 3
    ids = IDS.clamp(min=1)
    with torch.no_grad():
        expected, found = theirs(ids).logits, loaded(ids)
    assert (found if expected.dim() == 3 else found[:, -1]).sub(expected).abs().max() < 1e-4


def test_the_language_model_of_double_heads_opens(tmp_path: Path):
    theirs = randomise(transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**SIZES, num_labels=1)))
    with pytest.warns(UserWarning, match="without multiple_choice_head.summary"):
        loaded = GPTModel.from_checkpoint(saved(theirs, tmp_path))
    with torch.no_grad():
        assert (loaded(IDS) - theirs(IDS).logits).abs().max() < 1e-4


# ---- opened once, options ----------------------------------------------------------------------------------


def test_a_model_can_be_looked_at_before_it_is_loaded(pth: Path, model: GPTModel):
    opened = open_model(pth, config=HEADS)
    assert opened.config == model.config
    assert opened.forecast("cuda").keys() == STRATEGIES.keys() - {"per_tensor"}
    assert torch.equal(opened.load("cpu", "stream").tok_emb.weight, model.tok_emb.weight)


@pytest.mark.parametrize("call", [GPTModel.from_checkpoint, open_model, GPTModel.from_pretrained])
def test_a_mistyped_option_names_the_nearest(call: Callable[..., Any], pth: Path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'confg'; did you mean config"):
        call(pth, confg=HEADS)


def test_a_field_of_the_config_that_is_passed_alone_is_told_where_it_belongs(pth: Path):
    with pytest.raises(TypeError, match=r"'n_heads'; it belongs in config=\{'n_heads': …\}"):
        GPTModel.from_checkpoint(pth, n_heads=4)


def test_the_options_of_a_load_are_checked(pth: Path):
    with pytest.raises(UsageError, match="quantize must be None or int8, got 'int3'"):
        open_model(pth, config=HEADS).load(quantize="int3")


# ---- verify ------------------------------------------------------------------------------------------------


def believing(folder: Path, **forced: Any) -> Callable[[], GPTModel]:
    """The load of before: a config forced upon the weights, whatever the folder says."""

    def load() -> GPTModel:
        model = GPTModel(GPTConfig(101, 32, 48, 4, 2, tied_head=True, **forced))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        kept = {"safe": theirs.state_dict()}
        path = save_pth({k: v for k, v in kept["safe"].items() if ".attn.bias" not in k}, folder.parent)
        source = GPTModel.from_checkpoint(path, config={"n_heads": 4, "activation": "gelu_tanh"})
        model.load_state_dict(source.state_dict())
        return model.eval()

    return load


PLANTED = {
    "attention is not scaled": {"scale_attn_weights": False},
    "attention is scaled by the block": {"scale_attn_by_inverse_layer_idx": True},
    "another epsilon": {"layer_norm_epsilon": 1e-2},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "clipped gelu": {"activation_function": "quick_gelu"},
    "exact gelu": {"activation_function": "gelu"},
    "two heads": {"n_head": 2},
    "twelve heads": {"n_head": 12},
    "sixteen heads": {"n_head": 16},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PLANTED)
def test_verify_finds_a_config_that_was_believed(kind: str, tmp_path: Path):
    """The weights get a config forced upon them, as before; transformers builds from the folder's own."""
    theirs = hub_model(**PLANTED[kind])
    with torch.no_grad():
        for block in theirs.transformer.h:
            block.attn.c_attn.weight.mul_(3)  # so that attention and activation decide
    folder = saved(theirs, tmp_path / "hub")
    right = saved(hub_model(), tmp_path / "right")
    opened = replace(open_model(right), reading=open_model(right).reading)
    manifest = replace(opened.reading.manifest, path=folder / "model.safetensors")
    opened = replace(opened, reading=replace(opened.reading, manifest=manifest))
    found = verify(believing(folder), opened, against="transformers")
    assert not found.passed
    assert not found.unchecked


def test_verify_passes_the_same_when_nothing_is_planted_and_says_what_torch_cannot_tell(tmp_path: Path):
    folder = saved(hub_model(), tmp_path / "hub")
    opened = open_model(folder)
    assert verify(opened.load, opened, against="transformers").passed
    against_torch = verify(opened.load, opened)
    assert against_torch.passed
    assert "the config and the forward pass" in against_torch.unchecked


def test_nothing_is_said_where_nothing_is_odd(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPTModel.from_checkpoint(saved(hub_model(), tmp_path))


# ---- whole pickled models ----------------------------------------------------------------------------------


class Gated(nn.Module):
    """An attention that is not GPT-2's, whatever its tensors are called."""


def whole_models(**changes: Any) -> dict[str, nn.Module]:
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch is not installed")
    shape = {"vocab_size": 101, "context_length": 32, "emb_dim": 48, "n_heads": 4, "n_layers": 2}
    book = ch04.GPTModel(shape | {"drop_rate": 0.1, "qkv_bias": True})
    ours = GPTModel(GPTConfig(**shape, activation="gelu"))
    return {"book": randomise(book), "ours": randomise(ours), "transformers": hub_model(**changes)}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["book", "ours", "transformers"])
@pytest.mark.parametrize("strategy", ["baseline", "mmap", "stream"])
def test_a_whole_pickled_model_says_its_heads_and_activation(
    inside: bool, kind: str, strategy: str, tmp_path: Path
):
    theirs = whole_models()[kind]
    torch.save({"model": theirs, "epoch": 3} if inside else theirs, tmp_path / "model.pth")
    loaded = GPTModel.from_checkpoint(tmp_path / "model.pth", strategy=strategy)
    assert loaded.config.n_heads == 4
    assert difference(loaded, theirs) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", list(PLANTED.values())[:6], ids=list(PLANTED)[:6])
def test_a_whole_pickled_variant_is_refused_by_its_own_config(changes: dict[str, Any], tmp_path: Path):
    torch.save(hub_model(**changes), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


def test_a_whole_books_model_with_another_epsilon_is_refused(tmp_path: Path):
    theirs = whole_models()["book"]
    theirs.trf_blocks[1].norm2.eps = 1e-3
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"trf_blocks.1.norm2.eps: layer_norm_epsilon=0.001"):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


def unsaved(model: Any, *, is_attribute: bool, window: int) -> nn.Module:
    """The book's model, whose attention keeps its mask where no state dict shows it."""
    for block in model.trf_blocks:
        mask = block.att._buffers.pop("mask") + torch.ones(T, T).tril(-window)
        if is_attribute:
            block.att.mask = mask
        else:
            block.att.register_buffer("mask", mask, persistent=False)
    return model


@pytest.mark.parametrize("is_attribute", [False, True])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_whole_pickled_models_masks_are_read_where_no_state_dict_has_them(
    is_attribute: bool, is_wrapped: bool, tmp_path: Path
):
    for window in (T, 8):
        whole = unsaved(whole_models()["book"], is_attribute=is_attribute, window=window)
        torch.save(nn.DataParallel(whole) if is_wrapped else whole, tmp_path / f"{window}.pth")
    assert GPTModel.from_checkpoint(tmp_path / f"{T}.pth").config.n_heads == 4
    with pytest.raises(CheckpointError, match=r"trf_blocks.0.att.mask is not GPT-2's causal mask"):
        open_model(tmp_path / "8.pth")


def test_dropouts_that_differ_in_a_whole_pickled_model_are_said(tmp_path: Path):
    theirs = whole_models()["book"]
    theirs.trf_blocks[1].drop_resid.p = 0.5
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.warns(UserWarning, match=r"dropouts 0\.1 and 0\.5; training uses 0\.1 for all"):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


def test_weights_that_cannot_be_read_say_why(model: GPTModel, tmp_path: Path):
    state = dict(model.state_dict())
    state["out_head.weight"] = state["out_head.weight"].to_sparse()
    with pytest.raises(CheckpointError, match=r"(?s)out_head.weight.*sparse"):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)


def test_a_variant_of_a_folders_weights_is_read_by_the_folders_config(tmp_path: Path):
    theirs = hub_model(activation_function="gelu")
    saved(theirs, tmp_path)
    theirs.save_pretrained(tmp_path, variant="fp16")
    loaded = GPTModel.from_checkpoint(tmp_path / "model.fp16.safetensors")
    assert (loaded.config.n_heads, loaded.config.activation) == (4, "gelu")


def test_a_classifier_with_as_many_classes_as_tokens_is_a_classifier(tmp_path: Path):
    config = transformers.GPT2Config(**SIZES, num_labels=101, pad_token_id=0)
    saved(randomise(transformers.GPT2ForSequenceClassification(config)), tmp_path)
    assert GPTModel.from_checkpoint(tmp_path).config.n_classes == 101


@pytest.mark.parametrize(
    "beside",
    [
        {"model_config": {"n_head": 6}},
        {"config": {"model": {"n_head": 6}}},
        {"cfg": transformers.GPT2Config(n_head=6)},
        {"args": {"activation_function": "relu"}},
    ],
)
def test_what_is_taken_for_granted_is_not_where_the_file_says_otherwise(beside: Any, tmp_path: Path):
    sizes = {"vocab_size": 11, "n_positions": 4, "n_layer": 12, "n_embd": 768}
    with torch.device("meta"):
        weights = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | sizes)).state_dict()
    one = torch.zeros(1)
    path = save_pth({"model": {k: one.expand(v.shape) for k, v in weights.items()}} | beside, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"(n_head says 6|activation_function says 'relu'), but gpt2lite would assume"
    ):
        open_model(path)
    assert open_model(path, config={"n_heads": 6, "activation": "gelu"}).config.n_heads == 6


CHANGED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "layers.1: activation='ReLU'": (
        "book",
        lambda model: model.trf_blocks[1].ff.layers.__setitem__(1, nn.ReLU()),
    ),
    "mlp.act: activation='SiLU'": (
        "transformers",
        lambda model: setattr(model.transformer.h[1].mlp, "act", nn.SiLU()),
    ),
    "final_norm.eps: layer_norm_epsilon=0.1": (
        "book",
        lambda model: setattr(model.final_norm, "eps", 0.1),
    ),
    "ln_f.eps: layer_norm_epsilon=0.1": (
        "transformers",
        lambda model: setattr(model.transformer.ln_f, "eps", 0.1),
    ),
    "attn.scale_attn_weights: scale_attn_weights=False": (
        "transformers",
        lambda model: setattr(model.transformer.h[1].attn, "scale_attn_weights", False),
    ),
    "att.sliding_window_size: sliding_window_size=2": (
        "book",
        lambda model: setattr(model.trf_blocks[1].att, "sliding_window_size", 2),
    ),
    "att.window: window=3, wanted 32": (
        "book",
        lambda model: setattr(model.trf_blocks[1].att, "window", 3),
    ),
    "att.head_dim: head_dim=6, wanted 12": (
        "book",
        lambda model: setattr(model.trf_blocks[1].att, "head_dim", 6),
    ),
    "trf_blocks.0.att.head_dim: head_dim=12, wanted 24": (  # half of the width is attended to
        "book",
        lambda model: [setattr(block.att, "num_heads", 2) for block in model.trf_blocks],
    ),
    "attn.head_dim: head_dim=24, wanted 12": (
        "transformers",
        lambda model: setattr(model.transformer.h[1].attn, "head_dim", 24),
    ),
    "but 2 in": ("book", lambda model: setattr(model.trf_blocks[1].att, "num_heads", 2)),
    "but 24 in": ("book", lambda model: setattr(model.trf_blocks[1].att, "d_out", 24)),
    "but 96 in": ("transformers", lambda model: setattr(model.transformer.h[1].attn, "split_size", 96)),
    "but 'gelu' in": ("transformers", lambda model: setattr(model.transformer.h[1].mlp, "act", nn.GELU())),
    "its scale=0.5, wanted 0.28": (
        "transformers",
        lambda model: setattr(model.transformer.h[1].attn, "scaling", 0.5),
    ),
    "attn.is_cross_attention: is_cross_attention=True": (
        "transformers",
        lambda model: setattr(model.transformer.h[1].attn, "is_cross_attention", True),
    ),
}


@pytest.mark.parametrize("said", CHANGED)
def test_a_part_that_was_changed_in_a_whole_pickled_model_is_refused(said: str, tmp_path: Path):
    kind, change = CHANGED[said]
    theirs = whole_models()[kind]
    change(theirs)
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=re.escape(said)):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("kind", ["book", "transformers"])
def test_an_attention_of_another_class_is_refused_by_its_name(kind: str, tmp_path: Path):
    theirs = whole_models()[kind]
    attention = theirs.trf_blocks[1].att if kind == "book" else theirs.transformer.h[1].attn
    attention.__class__ = Gated
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError, match=r"1\.attn?: its class='test_agreement.Gated', wanted .*save model"
    ):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


class SquaredMLP(nn.Module):
    """Of the Hub's feed-forward only its names."""


class SoftcapModel(transformers.GPT2LMHeadModel):
    """Computes something else with GPT-2's own parts."""


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up."""


class ScaledLinear(nn.Linear):
    """Multiplies what it projects."""


class SimpleRMSLayerNorm(nn.Module):
    """Not a layer norm, whatever it is called."""


class Doubled(nn.Module):
    """Around a module, under the name that torch's wrappers use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def of_class(path: str, kind: type) -> Callable[[nn.Module], object]:
    return lambda model: setattr(model.get_submodule(path), "__class__", kind)


def replaced(path: str, module: nn.Module) -> Callable[[nn.Module], object]:
    return lambda model: model.set_submodule(path, module)


def with_function(function: object) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        for block in model.transformer.h:
            del block.mlp.act
            block.mlp.__dict__["act"] = function

    return change


# place and what is said of it → whose model, and how it was changed
OTHER_PARTS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "the model: its class='test_agreement.SoftcapModel'": ("transformers", of_class("", SoftcapModel)),
    "h.1.mlp: its class='test_agreement.SquaredMLP'": (
        "transformers",
        of_class("transformer.h.1.mlp", SquaredMLP),
    ),
    "transformer.wte: its class=": ("transformers", of_class("transformer.wte", ScaledEmbedding)),
    "transformer.wpe: its class=": ("transformers", of_class("transformer.wpe", ScaledEmbedding)),
    "wte.max_norm: max_norm=0.5": (
        "transformers",
        lambda model: setattr(model.transformer.wte, "max_norm", 0.5),
    ),
    "lm_head: its class='test_agreement.ScaledLinear'": ("transformers", of_class("lm_head", ScaledLinear)),
    "lm_head: its class='test_agreement.Doubled'": (
        "transformers",
        lambda model: setattr(model, "lm_head", Doubled(model.lm_head)),
    ),
    "lm_head: its class='torch.nn.modules.linear.Identity'": (
        "transformers",
        replaced("lm_head", nn.Identity()),
    ),
    "h.0.attn.c_attn: its class=": ("transformers", of_class("transformer.h.0.attn.c_attn", ScaledLinear)),
    "transformer.drop: its class=": ("transformers", replaced("transformer.drop", nn.Tanh())),
    "h.1.attn.resid_dropout: its class=": (
        "transformers",
        replaced("transformer.h.1.attn.resid_dropout", nn.Tanh()),
    ),
    "h.1.mlp.act: activation='silu'": ("transformers", with_function(nn.functional.silu)),
    "h.1.mlp.act: activation='__builtin__.getattr'": ("transformers", with_function(torch.relu)),
    "h.1.mlp: activation='missing'": (
        "transformers",
        lambda model: delattr(model.transformer.h[1].mlp, "act"),
    ),
    "trf_blocks.1.ff: its class=": ("book", of_class("trf_blocks.1.ff", SquaredMLP)),
    "trf_blocks.1.att.W_query: its class=": ("book", of_class("trf_blocks.1.att.W_query", ScaledLinear)),
    "drop_emb: its class=": ("book", replaced("drop_emb", nn.Tanh())),
    "out_head: its class=": ("book", replaced("out_head", nn.Identity())),
    "norm2: its class='test_agreement.SimpleRMSLayerNorm'": (
        "book",
        of_class("trf_blocks.0.norm2", SimpleRMSLayerNorm),
    ),
    "but 'gelu' in": ("book", replaced("trf_blocks.1.ff.layers.1", nn.GELU())),
}


@pytest.mark.parametrize("said", OTHER_PARTS)
def test_a_part_of_a_class_that_is_not_known_to_compute_as_gpt2_is_refused(said: str, tmp_path: Path):
    kind, change = OTHER_PARTS[said]
    theirs = whole_models()[kind]
    change(theirs)
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=re.escape(said)):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


class Lit(nn.Module):
    """A training program's module around a model, with a loss of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.CrossEntropyLoss()


def fast() -> nn.Module:
    from llms_from_scratch import ch04

    shape = {"vocab_size": 101, "context_length": 32, "emb_dim": 48, "n_heads": 4, "n_layers": 2}
    return randomise(ch04.GPTModelFast(shape | {"drop_rate": 0.1, "qkv_bias": True}))


# What programs save whole, and how its logits are had.
KNOWN_PARTS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "in a trainer's module": lambda: (Lit(model := hub_model()), model),
    "DataParallel in a trainer's module": lambda: (Lit(nn.DataParallel(model := hub_model())), model),
    "compiled block": lambda: (wrapped_block(model := hub_model()), model),
    "exact GELU": lambda: (model := hub_model(activation_function="gelu"), model),
    "a function of old transformers": lambda: (old(model := hub_model(activation_function="gelu")), model),
    "a dropout at the end of feed-forward": lambda: (dropped(model := whole_models()["book"]), model),
    "GPTModelFast": lambda: (model := fast(), model),
}


def wrapped_block(model: Any) -> nn.Module:
    model.transformer.h[1] = nn.DataParallel(model.transformer.h[1])
    return model


def old(model: Any) -> nn.Module:
    with_function(nn.functional.gelu)(model)
    return model


def dropped(model: Any) -> nn.Module:
    for block in model.trf_blocks:
        block.ff.layers.append(nn.Dropout(0.1))
    return model.eval()


@pytest.mark.parametrize("kind", KNOWN_PARTS)
def test_a_whole_model_of_known_parts_opens(kind: str, tmp_path: Path):
    pytest.importorskip("llms_from_scratch", reason="llms-from-scratch is not installed")
    whole, theirs = KNOWN_PARTS[kind]()
    torch.save(whole, tmp_path / "model.pth")
    assert difference(GPTModel.from_checkpoint(tmp_path / "model.pth"), theirs) < 1e-4


@pytest.mark.parametrize("head", ["DoubleHeadsModel", "ForTokenClassification", "ForQuestionAnswering"])
@pytest.mark.filterwarnings("ignore:.*opens the language model without")
def test_the_hubs_other_heads_open_whole(head: str, tmp_path: Path):
    config = transformers.GPT2Config(**SIZES, num_labels=3, pad_token_id=0)
    torch.save(randomise(getattr(transformers, f"GPT2{head}")(config)), tmp_path / "model.pth")
    assert GPTModel.from_checkpoint(tmp_path / "model.pth").config.n_heads == 4


@pytest.mark.parametrize(
    ("scale", "is_right"), [(1.0, False), (12**-0.5, True), (12**0.5, True), (0.3, False)]
)
@pytest.mark.parametrize("attribute", ["scaling", "scale"])
def test_an_attention_with_another_scale_is_refused(
    attribute: str, scale: float, is_right: bool, tmp_path: Path
):
    theirs = whole_models()["book"]
    setattr(theirs.trf_blocks[1].att, attribute, scale)
    torch.save(theirs, tmp_path / "model.pth")
    if is_right:
        assert difference(GPTModel.from_checkpoint(tmp_path / "model.pth"), theirs) < 1e-4
        return
    with pytest.raises(CheckpointError, match=rf"1.att.{attribute}: its scale={scale}, wanted 0.2886"):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


def test_a_whole_model_in_a_wrapper_is_read_by_its_own_config(tmp_path: Path):
    theirs = hub_model(layer_norm_epsilon=1e-2)
    torch.save(nn.DataParallel(theirs), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"layer_norm_epsilon=0\.01"):
        GPTModel.from_checkpoint(tmp_path / "model.pth")
    torch.save(nn.DataParallel(hub_model()), tmp_path / "model.pth")
    assert GPTModel.from_checkpoint(tmp_path / "model.pth").config.n_heads == 4


CONFIGS_BESIDE = ["model_args", "config", "hyper_parameters"]


@pytest.mark.parametrize("place", CONFIGS_BESIDE)
@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("scale_attn_weights", False),
        ("activation_function", "relu"),
        ("sliding_window", 8),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_a_config_beside_the_weights_is_believed_as_config_json_is(
    place: str, word: str, value: Any, model: GPTModel, tmp_path: Path
):
    path = save_pth({"model": model.state_dict(), place: {"n_heads": 4, word: value}}, tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"model.pth, {place}: {word}={re.escape(repr(value))}, wanted"
    ):
        open_model(path)


@pytest.mark.parametrize("place", CONFIGS_BESIDE)
def test_an_unknown_word_of_a_config_beside_the_weights_is_a_warning(
    place: str, model: GPTModel, tmp_path: Path
):
    said = {"n_heads": 4, "attention_sinks": 4, "rotary": {"base": 10000}, "learning_rate": 1e-3}
    path = save_pth({"state_dict": model.state_dict(), place: said}, tmp_path)
    with pytest.warns(
        UserWarning, match=rf"{place}: ignored attention_sinks, rotary, which gpt2lite does not"
    ):
        GPTModel.from_checkpoint(path)


@pytest.mark.parametrize("word", ["layer_norm_eps", "norm_eps", "sliding_window_size"])
def test_other_programs_words_for_another_computation_are_refused(word: str, model: GPTModel, tmp_path: Path):
    path = save_pth({"model": model.state_dict(), "config": {"n_heads": 4, word: 0.01}}, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{word}=0.01, wanted"):
        open_model(path)


def twice(module: nn.Module, *given: Any) -> torch.Tensor:
    return 2 * given[-1]


@pytest.mark.parametrize("kind", ["book", "transformers"])
def test_a_hook_in_a_whole_pickled_model_is_refused(kind: str, tmp_path: Path):
    theirs = whole_models()[kind]
    (theirs.out_head if kind == "book" else theirs.lm_head).register_forward_hook(twice)
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"head._forward_hooks of a pickled module changes"):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


# ---- models that share some of their weights ---------------------------------------------------------------


@pytest.mark.parametrize("first", ["ema", "model"])
def test_an_average_that_shares_its_frozen_block_is_a_second_model(first: str, tmp_path: Path):
    raw = dict(huggingface().state_dict())
    average = {name: t if ".h.0." in name else t.clone() + 1 for name, t in raw.items()}
    both = {"ema": average, "model": raw} if first == "ema" else {"model": raw, "ema": average}
    with pytest.raises(CheckpointError, match="holds 2 models, under '"):
        GPTModel.from_checkpoint(save_pth(both, tmp_path), config=HEADS)


def test_trained_weights_beside_their_base_are_said_not_to_be_loaded(tmp_path: Path):
    base = dict(huggingface().state_dict())
    trained = {name: t + 1 for name, t in base.items() if ".h.0." not in name}
    path = save_pth({"model": base, "trained": trained}, tmp_path)
    with pytest.warns(UserWarning, match=r"also holds trained\.transformer.* they are not loaded"):
        GPTModel.from_checkpoint(path, config=HEADS)


def test_old_nanogpts_weights_without_model_args_are_not_taken_for_mingpts(tmp_path: Path):
    state = turned(peer("gelu"))
    state |= {f"transformer.h.{i}.attn.bias": torch.ones(T, T).tril().view(1, 1, T, T) for i in range(3)}
    with pytest.raises(CheckpointError, match="may be from nanoGPT"):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)


def test_what_merely_lies_beside_the_weights_does_not_hide_other_heads(tmp_path: Path):
    state = GPTModel(GPTConfig(8, 8, 768, 6, 12)).state_dict()  # an official size, with other heads
    path = save_pth({"model": state, "epoch": 3, "cfg": {"n_head": 6}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"cfg.n_head says 6, but gpt2lite would assume n_heads=12"):
        open_model(path)
    path = save_pth({"model": state, "config": {"vocab_size": 8}, "cfg": {"n_head": 6}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"cfg.n_head says 6"):
        open_model(path)


# ---- values that cannot be read, words that disagree ------------------------------------------------------


class Kind(Enum):
    SIX, RELU = 6, "relu"


class Shape(NamedTuple):
    n_head: int = 6


def of_an_official_size(beside: dict[str, Any], folder: Path) -> Path:
    """Twelve layers of 768, whose heads would be taken for twelve."""
    with torch.device("meta"):
        weights = GPTModel(GPTConfig(8, 8, 768, 6, 12)).state_dict()
    return save_pth(
        {"model": {k: torch.zeros(1).expand(v.shape) for k, v in weights.items()}} | beside, folder
    )


UNREADABLE: dict[str, Any] = {
    "numpy": {"config": {"n_head": numpy.int64(6)}},
    "a tensor": {"config": {"n_head": torch.tensor(6)}},
    "an enum": {"hyper_parameters": {"n_head": Kind.SIX}},
    "bytes": {"n_head": b"6"},
    "a named tuple": {"config": Shape()},
    "JSON that is none": {"config": "{'n_head': 6}"},
    "somewhere": {"args": Namespace(n_head=numpy.int64(6))},
    "an enum's activation": {"config": {"n_head": 12, "activation": Kind.RELU}},
    "a class": {"config": {"n_head": 12, "activation": nn.ReLU}},
    "a module": {"config": {"n_head": 12, "activation": nn.ReLU()}},
    "a function": {"config": Namespace(n_head=12, activation=torch.relu)},
    "numpy's text": {"config": {"n_head": 12, "activation_function": numpy.str_("relu")}},
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_asked_for(kind: str, tmp_path: Path):
    path = of_an_official_size(UNREADABLE[kind], tmp_path)
    with pytest.raises(CheckpointError, match=r"<.*, which cannot be read|got <|says <"):
        open_model(path)
    heads = 6 if kind in list(UNREADABLE)[:7] else 12
    assert open_model(path, config={"n_heads": heads, "activation": "gelu"}).config.n_heads == heads


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("layer_norm_eps", numpy.float32(1e-3)),
        ("scale_attn_weights", numpy.bool_(False)),
        ("sliding_window", torch.tensor(8)),
    ],
)
def test_a_computation_that_cannot_be_read_is_refused(word: str, value: Any, tmp_path: Path):
    path = of_an_official_size({"config": {"n_head": 12, word: value}}, tmp_path)
    with pytest.raises(CheckpointError, match=rf"config: {word}=<.*, which cannot be read>, wanted"):
        open_model(path, config={"n_heads": 12, "activation": "gelu_tanh"})


def test_what_cannot_be_read_and_does_not_matter_opens(tmp_path: Path):
    beside = {"config": {"n_head": 12, "vocab_size": numpy.int64(8), "lr": numpy.float32(1)}, "rng": b"1"}
    path = of_an_official_size(beside | {"best": numpy.float64(1), "loss": torch.tensor(2.0)}, tmp_path)
    assert open_model(path).config.n_heads == 12


def test_a_config_in_json_text_is_read(tmp_path: Path):
    path = of_an_official_size({"config": json.dumps({"n_head": 6, "betas": [0.9, 0.95]})}, tmp_path)
    assert open_model(path).config.n_heads == 6


@pytest.mark.parametrize("place", ["model_args", "config", "hyper_parameters", "config.json"])
def test_two_words_for_one_field_must_agree(place: str, tmp_path: Path):
    said = {"num_attention_heads": 6, "n_head": 4}
    path = of_an_official_size({} if place == "config.json" else {place: said}, tmp_path)
    if place == "config.json":
        (tmp_path / place).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=rf"{place}: num_attention_heads=6 and n_head=4 disagree"):
        open_model(path)


def test_model_args_without_heads_do_not_hide_those_of_another_place(tmp_path: Path):
    path = of_an_official_size({"model_args": {"block_size": 8}, "config": {"n_head": 6}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"config.n_head says 6, but gpt2lite would assume n_heads=12"):
        open_model(path)


def test_the_caller_must_agree_with_what_is_nested_in_hyper_parameters(tmp_path: Path):
    path = of_an_official_size({"hyper_parameters": {"config": {"n_head": 4}}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"hyper_parameters.config.n_head says 4, .* n_heads=6"):
        open_model(path, config={"n_heads": 6})


@pytest.mark.parametrize("word", ["causal", "pre_norm", "use_pos_emb", "attn_scale"])
def test_an_unknown_word_is_a_warning_also_where_it_says_no(word: str, model: GPTModel, tmp_path: Path):
    said = {"n_heads": 4, word: 0.0 if word == "attn_scale" else False}
    path = save_pth({"model": model.state_dict(), "model_args": said}, tmp_path)
    with pytest.warns(UserWarning, match=f"model_args: ignored {word}, which gpt2lite does not know"):
        GPTModel.from_checkpoint(path, config={"activation": "gelu_tanh"})


@pytest.mark.parametrize("log", ['[{"loss": 1}]', '{"loss": 1}\n{"loss": 2}\n', '{"dropout": 2}'])
def test_another_programs_log_beside_a_file_is_not_its_config(log: str, model: GPTModel, tmp_path: Path):
    path = save_pth({"model": model.state_dict(), "config": {"n_heads": 4}}, tmp_path)
    path.with_suffix(".json").write_text(log)
    assert GPTModel.from_checkpoint(path).config.n_heads == 4


@pytest.mark.parametrize(("rows", "tokens"), [(101, 110), (110, 101)])
def test_a_language_head_of_another_vocabulary_is_not_a_classifier(rows: int, tokens: int, tmp_path: Path):
    state = {**huggingface().state_dict(), "lm_head.weight": torch.zeros(rows, 48)}
    state["transformer.wte.weight"] = torch.zeros(tokens, 48)
    with pytest.raises(
        CheckpointError, match=f"lm_head.weight has {rows} rows, the token embedding {tokens}"
    ):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)


# ---- what lies elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_accelerates_other_models_in_a_folder_are_said_not_to_be_loaded(name: str, tmp_path: Path):
    path = saved(hub_model(), tmp_path) / "model.safetensors"
    if name == "pytorch_model.bin":
        torch.save(hub_model().state_dict(), tmp_path / name)
        path.unlink()
    stem, _, suffix = name.partition(".")
    (tmp_path / f"{stem}_1.{suffix}").write_bytes(b"another")
    with pytest.warns(
        UserWarning, match=rf"other weights lie beside it and are not loaded: {stem}_1.{suffix}"
    ):
        GPTModel.from_checkpoint(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_said_not_to_be_loaded(tmp_path: Path):
    hub_model().save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model-00009-of-00009.safetensors").write_bytes(b"another")
    with pytest.warns(UserWarning, match="are not loaded: model-00009-of-00009.safetensors"):
        GPTModel.from_checkpoint(tmp_path)


@pytest.mark.parametrize("log", ['[{"n_head": 6}]', '{"loss": 1}\n{"loss": 2}\n'])
def test_a_side_file_that_is_no_config_says_how_to_go_on(log: str, tmp_path: Path):
    path = of_an_official_size({}, tmp_path)
    path.with_suffix(".json").write_text(log)
    with pytest.raises(CheckpointError, match=r"model.json: .*If it is no config, pass config={'n_heads'"):
        open_model(path)
    assert open_model(path, config={"n_heads": 6}).config.n_heads == 6


TEXTS: dict[str, Any] = {
    "YAML": "n_layer: 12\nn_head: 6\n",
    "a printed object": "GPTConfig(n_layer=12, n_head=6)",
    "pairs": [("n_head", 6)],
    "words of a command": ["train.py", "--num_heads", "6"],
}


@pytest.mark.parametrize("kind", TEXTS)
def test_heads_that_are_named_in_a_text_are_asked_for(kind: str, tmp_path: Path):
    path = of_an_official_size({"hparams": TEXTS[kind]}, tmp_path)
    with pytest.raises(CheckpointError, match=r"hparams.* names heads in text, .* would assume n_heads=12"):
        open_model(path)
    assert open_model(path, config={"n_heads": 6}).config.n_heads == 6


@pytest.mark.parametrize("name", ["hparams.yaml", "config.yml", "args.json", "model_config.json", "run.toml"])
def test_heads_that_a_file_beside_it_names_are_asked_for(name: str, tmp_path: Path):
    path = of_an_official_size({}, tmp_path)
    (tmp_path / name).write_text('{"n_head": 6}' if name.endswith("json") else "n_head: 6")
    if name == "run.toml":
        assert open_model(path).config.n_heads == 12
        return
    with pytest.raises(CheckpointError, match=rf"{name}: names heads in text, .* assume n_heads=12"):
        open_model(path)
    assert open_model(path, config={"n_heads": 6}).config.n_heads == 6


@pytest.mark.parametrize("word", ["nhead", "num_head", "heads"])
def test_other_words_for_heads_are_read(word: str, tmp_path: Path):
    assert open_model(of_an_official_size({"config": {word: 6}}, tmp_path)).config.n_heads == 6


@pytest.mark.parametrize(
    ("word", "value", "right"),
    [
        ("head_dim", 128, 64),
        ("d_head", 128, 64),
        ("ln_eps", 1e-2, 1e-5),
        ("layernorm_epsilon", 1e-6, 1e-5),
        ("hidden_act", "relu", "gelu_new"),
        ("activation_fn", "silu", "gelu_new"),
        ("position_embedding_type", "rope", "absolute"),
    ],
)
@pytest.mark.parametrize("place", ["config", "config.json"])
def test_more_words_of_other_programs_are_computed_or_refused(
    word: str, value: Any, right: Any, place: str, tmp_path: Path
):
    for said in (value, right):
        words = {"n_head": 12, word: said}
        path = of_an_official_size({} if place == "config.json" else {place: words}, tmp_path)
        if place == "config.json":
            (tmp_path / place).write_text(json.dumps(words))
        if said == right:
            assert open_model(path).config.n_heads == 12
            continue
        with pytest.raises(CheckpointError, match=rf"{place}: {word}={value!r}, wanted {right!r}"):
            open_model(path)


def test_an_average_in_a_list_is_said_not_to_be_loaded(model: GPTModel, tmp_path: Path):
    shadow = [parameter.detach() + 1 for parameter in model.parameters()]
    path = save_pth({"model": model.state_dict(), "ema": {"shadow_params": shadow}}, tmp_path)
    with pytest.warns(UserWarning, match=r"without ema.shadow_params.* and \d+ more$"):
        GPTModel.from_checkpoint(path, config=HEADS)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("trf_blocks.1.att.slopes", torch.ones(4)),
        ("trf_blocks.1.att.rotary", [1, 2]),
        ("trf_blocks.1.att.prefix", 3),  # a config's harmless word means something else here
        ("trf_blocks.1.att._first", 3),
        ("trf_blocks.1.att.W_query.gain", 2.0),
        ("trf_blocks.1.ff.gate", True),
        ("trf_blocks.1.ff.layers.1.beta", 2.0),
        ("final_norm.power", 3),
        ("tok_emb.scale", 3.0),
        ("out_head.order", "reversed"),
        ("temperature", 0.5),
        ("n_layers_used", 1),
    ],
)
def test_an_unknown_attribute_of_a_pickled_part_is_a_warning_that_names_it(
    place: str, value: Any, tmp_path: Path
):
    theirs = whole_models()["book"]
    part, _, name = place.rpartition(".")
    setattr(theirs.get_submodule(part), name, value)
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.warns(UserWarning, match=rf"{place}: ignored attribute {name}, which gpt2lite does not"):
        GPTModel.from_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("trf_blocks.1.att.temperature", 0.5),
        ("trf_blocks.1.att.softmax_scale", 1.0),
        ("trf_blocks.1.att.logit_scale", 2.0),
        ("trf_blocks.1.att.softcap", 30.0),
        ("trf_blocks.1.residual_scale", 0.5),
        ("trf_blocks.1.att.options", {"window": 3}),
        ("tok_emb.embed_scale", 7.0),
        ("logit_scale", 2.0),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_an_attribute_that_is_known_to_change_what_is_computed_is_refused(
    place: str, value: Any, tmp_path: Path
):
    theirs = whole_models()["book"]
    part, _, name = place.rpartition(".")
    setattr(theirs.get_submodule(part), name, value)
    torch.save(theirs, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=rf"{place}: .*=.*, wanted"):
        GPTModel.from_checkpoint(tmp_path / "model.pth")
    if not isinstance(value, dict):
        setattr(theirs.get_submodule(part), name, None)
        torch.save(theirs, tmp_path / "model.pth")
        assert difference(GPTModel.from_checkpoint(tmp_path / "model.pth"), theirs.eval()) < 1e-4


def test_what_known_programs_keep_in_their_modules_is_no_warning(tmp_path: Path):
    theirs = hub_model()
    theirs.lm_head.LLMC_SKIP_INIT = theirs.transformer.h[0].mlp.c_proj.NANOGPT_SCALE_INIT = 1
    for name, model in {
        "hub": nn.DataParallel(theirs),
        "book": whole_models()["book"],
        "fast": fast(),
    }.items():
        torch.save(model, tmp_path / f"{name}.pth")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GPTModel.from_checkpoint(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("said", [{"num_labels": 5}, {"id2label": {str(n): f"LABEL_{n}" for n in range(5)}}])
def test_a_classifier_has_as_many_rows_as_its_config_has_labels(said: dict[str, Any], tmp_path: Path):
    config = transformers.GPT2Config(**SIZES, num_labels=3, pad_token_id=0)
    folder = saved(randomise(transformers.GPT2ForSequenceClassification(config)), tmp_path)
    GPTModel.from_checkpoint(folder)
    config_json = json.loads((folder / "config.json").read_text())
    for word in ("id2label", "label2id"):
        config_json.pop(word, None)
    (folder / "config.json").write_text(json.dumps(config_json | said))
    with pytest.raises(CheckpointError, match=r"n_classes is 3 in .*its weights, but 5 in .*config.json"):
        open_model(folder)


@pytest.mark.parametrize("key", ["args", "hparams", "cfg", "student"])
def test_heads_that_were_passed_against_an_unknown_place_are_said(key: str, model: GPTModel, tmp_path: Path):
    path = save_pth({"model": model.state_dict(), key: {"n_head": 6}}, tmp_path)
    with pytest.warns(UserWarning, match=rf"{key}.n_head says 6, but n_heads=4 was passed, which is used"):
        GPTModel.from_checkpoint(path, config=HEADS)


def test_a_side_file_may_begin_with_a_mark(model: GPTModel, tmp_path: Path):
    path = save_pth(model.state_dict(), tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(HEADS), encoding="utf-8-sig")
    assert GPTModel.from_checkpoint(path).config.n_heads == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_link_to_nowhere_is_not_taken_for_a_file_that_is_not_there(name: str, tmp_path: Path):
    folder = saved(hub_model(), tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("blobs/gone")
    with pytest.raises(CheckpointError, match=rf"{name}: is a link to what is not there"):
        tokenizer_for(folder, open_model(folder, config=HEADS).config.vocab_size)
