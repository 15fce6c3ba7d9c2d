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

from gpt2lite import CheckpointError, GPTConfig, GPTModel, UsageError, convert, forecast, open_model
from gpt2lite.dialects.peft import INERT, READ
from gpt2lite.verification import plain_model

pytest.importorskip("peft", reason="peft is not installed")
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

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
    "saved modules and biases": {**CONV1D, "modules_to_save": ["mlp", "ln_1", "wte"], "bias": "all"},
    "embeddings": {"target_modules": ["wte", "wpe", "c_attn"]},
    "head": {"target_modules": ["lm_head", "c_fc"]},
    "embedding and head": {"target_modules": ["wte", "lm_head"]},
    "all but some": {**CONV1D, "target_modules": ["c_proj", "c_attn"], "exclude_modules": ["mlp.c_proj"]},
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


@pytest.mark.parametrize("lacking", [".h.0.", ".c_attn.", "lora_A"])
def test_an_adapter_that_lacks_a_layer_that_its_config_names_is_refused(lacking: str, tmp_path: Path):
    theirs = tuned(base(tmp_path), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    weights = saved(theirs, tmp_path / "adapter") / ADAPTER[1]
    save_file({name: t for name, t in load_file(weights).items() if lacking not in name}, weights)
    with pytest.raises(CheckpointError, match=r"has no LoRA, though|lora_B.weight: not in"):
        open_model(tmp_path / "adapter")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_adapters_logits_are_pefts(name: str, tied: bool, tmp_path: Path, ids: Tensor):
    both = base(tmp_path / "both", tie_word_embeddings=tied)
    theirs = tuned(both, **CONFIGURATIONS[name])
    adapter = saved(theirs, tmp_path / "adapter")
    with (
        torch.no_grad(),
        quiet(),
    ):  # the test's own: they differ from the base's, and peft loads what it saved
        expected = theirs(ids).logits
        assert (GPTModel.from_checkpoint(both)(ids) - expected).abs().max() > 0.1
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits, expected)
    assert_equal(GPTModel.from_checkpoint(adapter), theirs, ids)
    for file in ADAPTER:
        shutil.copy(adapter / file, both)
    assert_equal(GPTModel.from_checkpoint(both), theirs, ids)
    assert_equal(GPTModel.from_checkpoint(adapter / ADAPTER[1]), theirs, ids)
    assert_equal(plain_model(open_model(both), None), theirs, ids)


def edited(folder: Path, **fields: Any) -> Path:
    """The folder, its adapter's config changed."""
    path = folder / ADAPTER[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base(tmp_path / "base")


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    return saved(tuned(folder, **CONV1D), tmp_path / "adapter")


@pytest.mark.parametrize("adapter_format", ["safetensors", "bin"])
@pytest.mark.parametrize("base_format", ["safetensors", "bin"])
@pytest.mark.parametrize("strategy", ONE_FILE)
@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_every_strategy_reads_base_and_adapter_each_in_its_format(
    strategy: str, base_format: str, adapter_format: str, folder: Path, ids: Tensor
):
    theirs = tuned(folder, target_modules=["c_attn", "wte"], modules_to_save=["ln_1", "c_fc"], bias="all")
    if base_format == "bin":
        torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    saved(theirs, folder, safe_serialization=adapter_format == "safetensors")
    assert_equal(GPTModel.from_checkpoint(folder, strategy=strategy), theirs, ids)
    assert_equal(plain_model(open_model(folder), None), theirs, ids)


@pytest.mark.parametrize("strategy", ["stream", "mmap"])
def test_what_is_merged_is_saved_and_the_files_are_as_they_were(strategy: str, folder: Path, ids: Tensor):
    theirs = tuned(folder, **CONV1D)
    saved(theirs, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    path = GPTModel.from_checkpoint(folder, strategy=strategy).save_checkpoint(folder.parent / "merged.pth")
    assert_equal(GPTModel.from_checkpoint(path), theirs, ids)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_bf16_base_with_an_fp32_adapter_is_summed_in_fp32(folder: Path):
    model = tuned(folder, **CONV1D)
    with quiet():
        GPT2LMHeadModel.from_pretrained(folder).bfloat16().save_pretrained(folder)
    saved(model, folder)
    loaded = GPTModel.from_checkpoint(folder)
    key = "base_model.model.transformer.h.0.attn.c_attn."
    layer = model.state_dict()
    delta = layer[f"{key}lora_B.default.weight"] @ layer[f"{key}lora_A.default.weight"] * (6 / 4)
    weight = layer[f"{key}base_layer.weight"].bfloat16().float().t() + delta
    assert torch.equal(loaded.trf_blocks[0].att.W_value.weight, weight[-TINY.emb_dim :].bfloat16())


def test_a_base_is_found_from_here_from_the_folder_and_on_the_hub(
    adapter: Path, folder: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    expected = GPTModel.from_checkpoint(adapter)(ids)
    monkeypatch.chdir(folder.parent)
    assert torch.equal(
        GPTModel.from_checkpoint(edited(adapter, base_model_name_or_path="base"))(ids), expected
    )
    monkeypatch.chdir("/")
    edited(adapter, base_model_name_or_path="../base")
    assert torch.equal(GPTModel.from_checkpoint(adapter)(ids), expected)
    asked = []

    def fetch(name: str, *, revision: str | None) -> Path:
        asked.append((name, revision))
        return folder

    monkeypatch.setattr("gpt2lite.hub.fetch", fetch)
    edited(adapter, base_model_name_or_path="somebody/model", revision="v2")
    assert torch.equal(GPTModel.from_checkpoint(adapter)(ids), expected)
    assert set(asked) == {("somebody/model", "v2")}


def test_what_trainer_leaves_beside_an_adapter_does_not_matter(adapter: Path, ids: Tensor):
    expected = GPTModel.from_checkpoint(adapter)(ids)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": {}}, adapter / name)
    assert torch.equal(GPTModel.from_checkpoint(adapter)(ids), expected)


@pytest.mark.parametrize("name", ["elsewhere/base.bin", None, "", "/no/such/folder", 7, "a\0b"])
def test_a_base_that_is_not_there_is_named(name: object, adapter: Path):
    edited(adapter, base_model_name_or_path=name)
    torch.save({}, adapter / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"without its base: base_model_name_or_path=.* in adapter_conf"
    ):
        GPTModel.from_checkpoint(adapter)


def test_a_base_that_holds_the_same_adapter_has_it_once_and_another_is_refused(
    adapter: Path, folder: Path, ids: Tensor
):
    expected = GPTModel.from_checkpoint(adapter)(ids)
    for file in ADAPTER:
        shutil.copy(adapter / file, folder)
    assert torch.equal(GPTModel.from_checkpoint(adapter)(ids), expected)
    edited(folder, lora_alpha=1)
    with pytest.raises(CheckpointError, match=r"whose base, .* holds another adapter"):
        GPTModel.from_checkpoint(adapter)


def test_the_bases_own_file_is_the_base_and_says_so(folder: Path, ids: Tensor):
    expected = GPTModel.from_checkpoint(folder)(ids)
    saved(tuned(folder, **CONV1D), folder)
    with pytest.warns(UserWarning, match="loaded without the PEFT adapter beside it"):
        loaded = GPTModel.from_checkpoint(folder / "model.safetensors")
    assert torch.equal(loaded(ids), expected)


@pytest.mark.parametrize("absent", ADAPTER)
def test_half_an_adapter_beside_a_base_is_refused(absent: str, folder: Path):
    saved(tuned(folder, **CONV1D), folder)
    (folder / absent).unlink()
    with pytest.raises(CheckpointError, match=f"a PEFT adapter without its {absent}"):
        GPTModel.from_checkpoint(folder)


def test_what_an_adapter_does_not_go_with_is_an_error(adapter: Path, tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"holds LoRA layers of scale .*, but lora_alpha=2\.0 was passed"
    ):
        GPTModel.from_checkpoint(adapter, lora_alpha=2.0)
    with pytest.raises(UsageError, match="LoRA layers do not merge into int8 weights"):
        GPTModel.from_checkpoint(adapter, quantize="int8")
    with pytest.raises(UsageError, match="holds LoRA layers; merge them first"):
        convert(adapter, tmp_path / "out.pth")
    untied = GPTModel.from_checkpoint(
        saved(tuned(tmp_path / "base", target_modules=["wte"]), tmp_path / "wte")
    )
    assert not untied.config.tied_head
    with pytest.raises(CheckpointError, match=r"change only tok_emb\.weight, which the model ties"):
        GPTModel.from_checkpoint(
            tmp_path / "wte", config=GPTConfig.of(untied.config.as_dict() | {"tied_head": True})
        )


# ---- what is refused by name -------------------------------------------------------------------------------

OTHER_METHODS: dict[str, Callable[[], Any]] = {
    "peft_type='IA3'": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]
    ),
    "peft_type='LOHA'": lambda: LoHaConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]),
    "peft_type='PREFIX_TUNING'": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "use_dora=True": lambda: LoraConfig(task_type="CAUSAL_LM", use_dora=True, **CONV1D),
    "lora_bias=True": lambda: LoraConfig(task_type="CAUSAL_LM", lora_bias=True, **CONV1D),
    "trainable_token_indices=": lambda: LoraConfig(
        task_type="CAUSAL_LM", trainable_token_indices=[1, 2], **CONV1D
    ),
    "init_lora_weights='pissa'": lambda: LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights="pissa", **CONV1D
    ),
    "init_lora_weights='olora'": lambda: LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights="olora", **CONV1D
    ),
    "ensure_weight_tying=True": lambda: LoraConfig(
        task_type="CAUSAL_LM", ensure_weight_tying=True, modules_to_save=["wte"], **CONV1D
    ),
}


@pytest.mark.parametrize("said", OTHER_METHODS)
def test_another_method_is_refused_by_name(said: str, folder: Path):
    saved(tuned(folder, OTHER_METHODS[said]()), folder)
    with pytest.raises(
        CheckpointError, match=f"adapter_config.json: gpt2lite does not read an? [aL].* with .*{said}"
    ):
        GPTModel.from_checkpoint(folder)


def test_prompts_are_not_told_to_be_merged(folder: Path):
    saved(tuned(folder, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), folder)
    with pytest.raises(CheckpointError, match=r"an adapter with .*nothing can be merged; use it with peft"):
        GPTModel.from_checkpoint(folder)


# Fields that are for another computation, and a value that asks for it.
REFUSED: dict[str, Any] = {
    "peft_type": "ADALORA", "task_type": "SEQ_CLS", "r": 0, "lora_alpha": "8", "use_rslora": "yes",
    "rank_pattern": {"(c_attn+)+": 4}, "alpha_pattern": {"c_attn": None}, "bias": "some",
    "layers_to_transform": "1",
    "modules_to_save": "lm_head", "init_lora_weights": "corda", "megatron_config": {"a": 1},
    "trainable_token_indices": [1], "use_dora": True, "velora_config": {"scale": 1.0},
    "alora_invocation_tokens": [1], "use_qalora": True, "monteclora_config": {"num_samples": 8},
    "layer_replication": [[0, 2], [1, 3]], "lora_bias": True, "target_parameters": ["wte.weight"],
    "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 3}, "kasa_config": {"beta": 0.1},
    "ensure_weight_tying": True, "a_field_of_tomorrow": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_asks_for_another_computation_is_refused_by_name(field: str, adapter: Path):
    with pytest.raises(CheckpointError, match=f"gpt2lite does not read an? [aL].* with {field}="):
        GPTModel.from_checkpoint(edited(adapter, **{field: REFUSED[field]}))


def test_every_field_of_the_installed_peft_is_read_inert_or_refused():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - READ.keys() - INERT - REFUSED.keys() == set()
    assert INERT.isdisjoint(READ.keys() | REFUSED.keys())


# Fields that say how it was trained, or what its names say too, at values that are not their defaults.
NOT_COMPUTED: dict[str, Any] = {
    "inference_mode": False, "lora_dropout": 0.5, "fan_in_fan_out": False, "peft_version": "0.5.0",
    "auto_mapping": {"base_model_class": "GPT2LMHeadModel"}, "megatron_core": "megatron.other",
    "qalora_group_size": 8, "init_lora_weights": "gaussian", "loftq_config": {"loftq_bits": 4},
}  # fmt: skip


@pytest.mark.parametrize("field", NOT_COMPUTED)
def test_a_field_that_computes_nothing_changes_nothing_for_peft_either(
    field: str, adapter: Path, ids: Tensor
):
    expected = GPTModel.from_checkpoint(adapter)(ids)
    edited(adapter, **{field: NOT_COMPUTED[field]})
    assert torch.equal(GPTModel.from_checkpoint(adapter)(ids), expected)
    with quiet():
        assert_equal(
            GPTModel.from_checkpoint(adapter), AutoPeftModelForCausalLM.from_pretrained(adapter), ids
        )


@pytest.mark.parametrize(("field", "value"), [("target_modules", ["c_fc"]), ("layers_to_transform", 1)])
def test_layers_that_the_config_does_not_target_are_refused(field: str, value: object, adapter: Path):
    with pytest.raises(
        CheckpointError, match=r"h\.0\.attn\.c_attn\.lora_A\.weight: .*not targeted by adapter_config"
    ):
        GPTModel.from_checkpoint(edited(adapter, **{field: value}))


@pytest.mark.parametrize("names", [["lm_head"], ["transformer.wte"], ["transformer.wte", "lm_head"]])
def test_a_tied_head_that_is_no_saved_module_is_the_embedding_too(
    names: list[str], adapter: Path, ids: Tensor
):
    state = load_file(adapter / ADAPTER[1])
    generator = torch.Generator().manual_seed(3)
    for name in names:
        weight = torch.randn(TINY.vocab_size, TINY.emb_dim, generator=generator)
        state[f"base_model.model.{name}.weight"] = weight
    save_file(state, adapter / ADAPTER[1])
    loaded = GPTModel.from_checkpoint(adapter)
    assert loaded.config.tied_head
    with quiet():
        assert_equal(loaded, AutoPeftModelForCausalLM.from_pretrained(adapter), ids)


KEY = "base_model.model.transformer.h.0.attn.c_attn"
DAMAGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    f"{KEY}.lora_A.weight: not in the base": lambda state: state.pop(f"{KEY}.lora_B.weight"),
    f"{KEY}.lora_B.weight: not in the base": lambda state: state.pop(f"{KEY}.lora_A.weight"),
    "h.7.attn.c_attn.lora_A.weight: not in the base": lambda state: state.update(
        {name.replace("h.0", "h.7"): state[name].clone() for name in list(state) if "h.0" in name}
    ),
    "score.weight: not in the base": lambda state: state.update(
        {"base_model.model.score.weight": torch.ones(2)}
    ),
    "0 LoRA layers fit": lambda state: state.clear(),
    r"lora_A.weight has shape \(5, 48\), .* gives it rank 4": lambda state: state.update(
        {f"{KEY}.lora_A.weight": torch.ones(5, 48)}
    ),
    r"do not fit trf_blocks.0.att.W_query.weight, which is \(48, 48\)": lambda state: state.update(
        {f"{KEY}.lora_B.weight": torch.ones(141, 4)}
    ),
    r"wte.weight is \(109, 48\), in the base .* Was it resized": lambda state: state.update(
        {"base_model.model.transformer.wte.weight": torch.ones(109, 48)}
    ),
    "ln_f.bias has shape": lambda state: state.update(
        {"base_model.model.transformer.ln_f.bias": torch.ones(7)}
    ),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_an_adapter_that_does_not_fit_its_base_is_refused(said: str, adapter: Path):
    state = load_file(adapter / ADAPTER[1])
    DAMAGES[said](state)
    save_file(state, adapter / ADAPTER[1])
    with pytest.raises(CheckpointError, match=said):
        GPTModel.from_checkpoint(adapter)


def test_a_saved_module_that_the_file_lacks_is_refused(adapter: Path):
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing, though modules_to_save names it"):
        GPTModel.from_checkpoint(edited(adapter, modules_to_save=["lm_head"]))


def test_planning_knows_the_adapter(adapter: Path, folder: Path):
    more = forecast(adapter)["stream"].peak_host_anonymous - forecast(folder)["stream"].peak_host_anonymous
    assert more > 0


def test_an_adapters_tensor_of_a_dtype_that_torch_lacks_is_refused(tmp_path: Path):
    folder = saved(tuned(base(tmp_path / "base"), **CONV1D), tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"F32"', b'"F33"', 1)
    path.write_bytes(raw[:8] + header + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"cannot read these tensors:\n.*lora_A"):
        GPTModel.from_pretrained(folder)
