"""verify passes what is right, fails what is wrong, and says by how much."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise, where_positions_decide
from test_loading import HEADS, huggingface, save_hub, save_pth

from gpt2lite import GPTConfig, GPTModel, UsageError, open_model
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.cli import main
from gpt2lite.verification import REFERENCES, verify


@pytest.fixture(params=REFERENCES)
def against(request: pytest.FixtureRequest) -> str:
    if request.param == "transformers":
        pytest.importorskip("transformers", reason="transformers is not installed")
    return request.param


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    """A model in which every position and every weight decides what is written."""
    return save_pth(where_positions_decide(GPTModel(TINY)).state_dict(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_right_passes(against: str, pth: Path, dtype: torch.dtype):
    load = lambda: GPTModel.from_checkpoint(pth, config=HEADS, dtype=dtype)  # noqa: E731
    found = verify(load, open_model(pth, config=HEADS), against=against)
    assert found.passed
    assert found.agreed_tokens == found.new_tokens == TINY.context_length - 7
    assert found.difference <= found.tolerance


def test_one_wrong_weight_fails(against: str, pth: Path):
    def load() -> GPTModel:
        model = GPTModel.from_checkpoint(pth, config=HEADS)
        with torch.no_grad():
            model.trf_blocks[2].att.W_key.weight[5, 7] += 1
        return model

    found = verify(load, open_model(pth, config=HEADS), against=against)
    assert not found.passed
    assert found.difference > found.tolerance


def test_nan_fails(against: str, pth: Path):
    def load() -> GPTModel:
        model = GPTModel.from_checkpoint(pth, config=HEADS)
        model.final_norm.shift.data.fill_(float("nan"))
        return model

    assert not verify(load, open_model(pth, config=HEADS), against=against).passed


def test_a_wrong_cache_fails_by_its_tokens(against: str, pth: Path, monkeypatch: pytest.MonkeyPatch):
    """Logits come from a pass without a cache; only what was written shows a wrong one."""
    from gpt2lite.generation import KVCache

    monkeypatch.setattr(
        KVCache, "positions", lambda self, T: torch.zeros(T, dtype=torch.int64) + self.length // 2
    )
    found = verify(
        lambda: GPTModel.from_checkpoint(pth, config=HEADS), open_model(pth, config=HEADS), against=against
    )
    assert found.difference <= found.tolerance
    assert found.agreed_tokens < found.new_tokens
    assert not found.passed


def test_transformers_reads_its_own_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    peer = huggingface()
    peer.save_pretrained(tmp_path / "hub")
    monkeypatch.setattr("gpt2lite.verification.convert", lambda *_, **__: pytest.fail("converted"))
    folder = tmp_path / "hub"
    assert verify(lambda: GPTModel.from_checkpoint(folder), open_model(folder), against="transformers").passed


def test_lora_layers_are_merged_both_ways(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    model = GPTModel(TINY)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".W_query." in name:
            state[name.replace("W_query.", "W_query.linear.")] = tensor
            if name.endswith("weight"):
                layer = name.removesuffix(".weight")
                state[f"{layer}.lora.A"] = torch.randn(TINY.emb_dim, 4, generator=generator)
                state[f"{layer}.lora.B"] = torch.randn(4, TINY.emb_dim, generator=generator)
        else:
            state[name] = tensor
    path = save_pth(state, tmp_path)
    path.with_suffix(".json").write_text(json.dumps(HEADS))

    def load(alpha: float) -> GPTModel:
        return GPTModel.from_checkpoint(path, lora_alpha=alpha)

    assert verify(lambda: load(0.5), open_model(path, lora_alpha=0.5)).passed
    assert not verify(lambda: load(0.6), open_model(path, lora_alpha=0.5)).passed


def test_a_classifier_is_compared_by_its_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = save_pth(GPTModel(GPTConfig.of(TINY.as_dict() | {"n_classes": 2})).state_dict(), tmp_path)
    path.with_suffix(".json").write_text(json.dumps(HEADS | {"n_classes": 2}))
    assert main(["verify", str(path)]) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["with a bias", "without one", "in bfloat16"])
def test_a_classifier_that_is_converted_is_compared_with_transformers_class(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = GPTConfig.of(TINY.as_dict() | {"n_classes": 3, "head_bias": kind != "without one"})
    model = randomise(GPTModel(config)).to(torch.bfloat16 if kind == "in bfloat16" else None)
    path = save_pth(model.state_dict(), tmp_path)
    path.with_suffix(".json").write_text(json.dumps(HEADS | {"n_classes": 3}))
    assert main(["verify", str(path), "--against", "transformers"]) == 0
    said = capsys.readouterr().out
    assert "so gpt2lite converted it" in " ".join(said.split())
    assert "tokens" not in said
    assert "PASS" in said

    def with_other_head() -> GPTModel:
        model = GPTModel.from_checkpoint(path)
        model.out_head.weight.data[2] *= 3
        return model

    assert not verify(with_other_head, open_model(path), against="transformers").passed


@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "GPT2ForTokenClassification"])
def test_a_classifier_is_compared_with_the_class_that_its_folder_names(kind: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = huggingface().config
    config.num_labels, config.pad_token_id = 3, 2746 % config.vocab_size  # the prompt's last token
    getattr(transformers, kind)(config).save_pretrained(folder := tmp_path / "hub")

    def with_other_head() -> GPTModel:
        model = GPTModel.from_checkpoint(folder)
        model.out_head.weight.data[2, 5] += 1
        return model

    found = verify(lambda: GPTModel.from_checkpoint(folder), open_model(folder), against="transformers")
    assert found.passed
    assert not verify(with_other_head, open_model(folder), against="transformers").passed
    said = json.loads((folder / "config.json").read_text()) | {"architectures": ["GPT2ForQuestionAnswering"]}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(UsageError, match="names GPT2ForQuestionAnswering; the classifiers compared are"):
        verify(lambda: GPTModel.from_checkpoint(folder), open_model(folder), against="transformers")


def test_an_unknown_reference_is_refused(pth: Path):
    with pytest.raises(UsageError, match="against must be torch or transformers, got 'jax'"):
        verify(lambda: GPTModel(TINY), pth, against="jax")


def test_the_command_passes_the_embedded_model(against: str, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--against", against]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "PASS"
    assert "32 of 32 agree" in out
    assert err == ""
    assert main(["verify", "--against", against, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_the_command_fails_with_1(
    pth: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    other = pth.with_name("other.pth")
    write_random_checkpoint(TINY, other)
    wrong = GPTModel.from_checkpoint(other, config={"n_heads": 4})
    monkeypatch.setattr("gpt2lite.cli.checkpoints.load_to_read", lambda opened, args: wrong)
    assert main(["verify", str(pth), "--n-heads", "4"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "FAIL"
    assert "no tokenizer found" in out


def test_a_file_in_the_official_layout_is_converted_for_transformers(tmp_path: Path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    path = save_hub(huggingface().state_dict(), tmp_path)
    load = lambda: GPTModel.from_checkpoint(path, config=HEADS)  # noqa: E731
    assert verify(load, open_model(path, config=HEADS), against="transformers", folder=tmp_path).passed
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between transformers and peft
def test_an_adapter_is_compared_with_transformers_in_its_bases_folder_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """transformers loads the adapter that lies beside the base, and would silently leave out any other."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    huggingface().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    peer = peft.get_peft_model(huggingface(), lora)
    peer.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peer.save_pretrained(tmp_path / "adapter")
    words = ["verify", str(tmp_path / "adapter")]
    assert main(words) == 0
    assert main([*words, "--against", "transformers"]) == 1
    assert "copy its two files here, or compare with plain torch" in capsys.readouterr().err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, tmp_path / "base")
    assert main(["verify", str(tmp_path / "base"), "--against", "transformers"]) == 0
    assert "PASS" in capsys.readouterr().out
