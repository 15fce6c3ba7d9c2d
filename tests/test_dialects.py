"""Dialects with a twist: turned weights, other activations, classifiers, adapters, TensorFlow's names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, randomise
from test_formats import llmc_header
from test_loading import HEADS, ONE_FILE, huggingface, save_pth
from torch import nn

from gpt2lite import CheckpointError, GPTConfig, GPTModel, UsageError, forecast
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.reading import read_span
from gpt2lite.cli import main
from gpt2lite.dialects.reading import DIALECTS, read_dialect

OPENAI = Path(__file__).parent / "data" / "openai_tf_tiny"
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MODEL_ARGS = {
    "n_layer": TINY.n_layers, "n_head": TINY.n_heads, "n_embd": TINY.emb_dim, "block_size": 32,
    "bias": True, "vocab_size": TINY.vocab_size, "dropout": 0.0,
}  # fmt: skip


def peer(activation: str) -> nn.Module:
    """Hugging Face's GPT-2, which computes with either GELU."""
    model = huggingface()
    for block in model.transformer.h:
        block.mlp.act = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
    return model


def turned(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict as nanoGPT and minGPT have it: Hugging Face's names, (out, in)."""
    state = model.state_dict()
    return {n: t.t().contiguous() if n.endswith(TURNED) else t for n, t in state.items()}


def masks() -> dict[str, torch.Tensor]:
    size = TINY.context_length
    mask = torch.ones(size, size).tril().view(1, 1, size, size)
    return {f"transformer.h.{i}.attn.bias": mask for i in range(TINY.n_layers)}


def assert_same_logits(loaded: nn.Module, theirs: nn.Module, ids: torch.Tensor) -> None:
    with torch.no_grad():
        expected = theirs(ids)
        assert (loaded(ids) - getattr(expected, "logits", expected)).abs().max() <= 1e-4


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("strategy", ONE_FILE)
def test_nanogpts_checkpoint_is_read_with_its_exact_gelu(strategy: str, tmp_path: Path, ids: torch.Tensor):
    theirs = peer("gelu")
    state = {f"_orig_mod.{name}": tensor for name, tensor in turned(theirs).items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(9)}}}
    path = save_pth(
        {"model": state, "optimizer": optimizer, "model_args": MODEL_ARGS, "iter_num": 5}, tmp_path
    )
    loaded = GPTModel.from_checkpoint(path, strategy=strategy)
    assert (loaded.config.activation, loaded.config.n_heads) == ("gelu", TINY.n_heads)
    assert loaded.config.tied_head
    assert_same_logits(loaded, theirs, ids)


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_mingpts_state_dict_is_read_with_the_tanh(strategy: str, tmp_path: Path, ids: torch.Tensor):
    theirs = peer("gelu_tanh")
    state = turned(theirs) | masks()
    state["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
    loaded = GPTModel.from_checkpoint(save_pth(state, tmp_path), strategy=strategy, config=HEADS)
    assert not loaded.config.tied_head
    assert loaded.config.activation == "gelu_tanh"
    assert_same_logits(loaded, theirs, ids)


def test_nanogpt_without_biases_and_with_a_padded_vocabulary(tmp_path: Path):
    state = {n: t for n, t in turned(peer("gelu")).items() if not n.endswith(".bias")}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(27, TINY.emb_dim)])
    path = save_pth({"model": state, "model_args": MODEL_ARGS | {"bias": False, "vocab_size": 128}}, tmp_path)
    config = GPTModel.from_checkpoint(path).config
    assert (config.bias, config.qkv_bias, config.vocab_size) == (False, False, 128)


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_may_be_of_either_program_is_an_error_that_names_both(
    wrapped: bool, tmp_path: Path, ids: torch.Tensor, capsys: pytest.CaptureFixture[str]
):
    theirs = peer("gelu")
    state: dict[str, Any] = turned(theirs)
    saved = {"model": state | masks(), "model_args": MODEL_ARGS} if wrapped else state
    path = save_pth(saved, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"may be from nanoGPT.*or from minGPT.*\{\"activation\": \"gelu\"\}"
    ):
        GPTModel.from_checkpoint(path, config=HEADS)
    assert_same_logits(GPTModel.from_checkpoint(path, config=HEADS | {"activation": "gelu"}), theirs, ids)
    assert forecast(path)["stream"].stays_host > 0
    assert main(["inspect", str(path)]) == 0
    assert "activation=None" in capsys.readouterr().out
    chosen = ("--n-heads", str(TINY.n_heads), "--activation", "gelu")
    assert main(["inspect", str(path), *chosen]) == 0
    assert "activation=gelu\n" in capsys.readouterr().out


def test_a_config_of_the_hub_chooses_the_activation(tmp_path: Path, ids: torch.Tensor):
    theirs = peer("gelu")
    save_pth(theirs.state_dict(), tmp_path)
    words = {"n_head": TINY.n_heads, "n_layer": TINY.n_layers, "n_embd": TINY.emb_dim}
    (tmp_path / "config.json").write_text(json.dumps(words | {"activation_function": "gelu"}))
    assert_same_logits(GPTModel.from_checkpoint(tmp_path / "model.pth"), theirs, ids)


def test_an_activation_that_is_none_is_refused():
    with pytest.raises(UsageError, match="activation must be gelu_tanh or gelu, got 'relu'"):
        GPTConfig.of(TINY.as_dict() | {"activation": "relu"})


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_openais_tensorflow_checkpoint_is_loaded(strategy: str):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    leaves = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}
    state = {}
    for name, span in open_checkpoint(OPENAI).tensors.items():
        *path, leaf = name.removeprefix("model/").replace("h0", "h.0").replace("h1", "h.1").split("/")
        tensor = read_span(span)
        state[".".join(["transformer", *path, leaves[leaf]])] = tensor[0] if tensor.dim() == 3 else tensor
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state, strict=True)
    loaded = GPTModel.from_checkpoint(OPENAI, strategy=strategy)
    assert loaded.config.n_heads == 4  # from hparams.json
    assert_same_logits(loaded, theirs, torch.arange(24).view(2, 12))


@pytest.mark.parametrize("strategy", ["mmap", "stream", "meta"])
def test_llm_c_is_loaded_and_computes_what_its_source_does(strategy: str, tmp_path: Path, ids: torch.Tensor):
    theirs = peer("gelu_tanh")
    state = {name.removeprefix("transformer."): tensor for name, tensor in turned(theirs).items()}
    padding = torch.full((27, TINY.emb_dim), 7.0)
    blocks = [torch.cat([state["wte.weight"], padding]), state["wpe.weight"]]
    for leaf in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            blocks += [state[f"h.{i}.{leaf}.{kind}"] for i in range(TINY.n_layers)]
    blocks += [state["ln_f.weight"], state["ln_f.bias"]]
    sizes = {"T": TINY.context_length, "V": TINY.vocab_size, "L": TINY.n_layers, "heads": TINY.n_heads}
    header = llmc_header(**sizes, C=TINY.emb_dim, Vp=TINY.vocab_size + 27)
    data = b"".join(block.contiguous().numpy().tobytes() for block in blocks)
    (tmp_path / "gpt2.bin").write_bytes(header + data)
    loaded = GPTModel.from_checkpoint(tmp_path / "gpt2.bin", strategy=strategy)
    assert (loaded.config.vocab_size, loaded.config.activation) == (TINY.vocab_size, "gelu_tanh")
    assert_same_logits(loaded, theirs, ids)


def book_model() -> nn.Module:
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch is not installed")
    shape = [
        key
        for key in TINY.as_dict()
        if key not in ("bias", "tied_head", "n_classes", "head_bias", "activation")
    ]
    return randomise(ch04.GPTModel({key: TINY.as_dict()[key] for key in shape}))


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_the_books_classifier_keeps_its_head(strategy: str, tmp_path: Path, ids: torch.Tensor):
    theirs = book_model()
    theirs.out_head = randomise(nn.Linear(TINY.emb_dim, 2), seed=3)
    loaded = GPTModel.from_checkpoint(
        save_pth(theirs.state_dict(), tmp_path), strategy=strategy, config=HEADS
    )
    assert (loaded.config.n_classes, loaded.config.head_bias) == (2, True)
    assert loaded(ids).shape == (2, 17, 2)
    assert_same_logits(loaded, theirs, ids)


def test_a_classifier_is_not_asked_for_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = randomise(GPTModel(GPTConfig.of(TINY.as_dict() | {"n_classes": 2, "vocab_size": 50257})))
    path = save_pth(model.state_dict(), tmp_path)
    assert main(["generate", "--model", str(path), "--n-heads", str(TINY.n_heads)]) == 1
    assert "is a classifier of 2 classes" in capsys.readouterr().err


def with_lora(alpha: float) -> nn.Module:
    appendix = pytest.importorskip(
        "llms_from_scratch.appendix_e", reason="llms-from-scratch is not installed"
    )
    model = book_model()
    appendix.replace_linear_with_lora(model, rank=4, alpha=alpha)
    return randomise(model)


@pytest.mark.parametrize("strategy", ONE_FILE)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_books_lora_layers_are_merged(
    strategy: str, dtype: torch.dtype | None, tmp_path: Path, ids: torch.Tensor
):
    theirs = with_lora(alpha=0.5)
    path = save_pth(theirs.state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS, dtype=dtype, lora_alpha=0.5)
    expected, found = theirs(ids).detach(), loaded(ids).detach()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    saved = torch.load(path, weights_only=True)
    assert torch.equal(
        saved["out_head.linear.weight"], theirs.out_head.linear.weight
    )  # the file is as it was


def test_lora_without_its_alpha_and_an_alpha_without_lora_are_errors(tmp_path: Path, pth: Path):
    path = save_pth(with_lora(alpha=2).state_dict(), tmp_path / ".")
    with pytest.raises(CheckpointError, match=r"holds LoRA layers without their alpha"):
        GPTModel.from_checkpoint(path, config=HEADS)
    with pytest.raises(UsageError, match="lora_alpha must be a number"):
        GPTModel.from_checkpoint(path, config=HEADS, lora_alpha=float("nan"))


def test_an_alpha_for_a_file_without_lora_is_an_error(pth: Path):
    with pytest.raises(CheckpointError, match=r"holds no LoRA layers, but lora_alpha=2.0 was passed"):
        GPTModel.from_checkpoint(pth, config=HEADS, lora_alpha=2.0)


def whole_lora(folder: Path, **attributes: float) -> tuple[nn.Module, Path]:
    """The book's model with LoRA layers of alpha 8, of which the last has attributes of its own."""
    theirs = with_lora(alpha=8)
    vars(theirs.out_head.lora).update(attributes)
    torch.save(theirs, folder / "model.pth")
    return theirs, folder / "model.pth"


@pytest.mark.parametrize("attributes", [{}, {"alpha": 32}])
def test_a_whole_models_lora_layers_say_their_own_alpha(attributes: Any, tmp_path: Path, ids: torch.Tensor):
    theirs, path = whole_lora(tmp_path, **attributes)
    expected, found = theirs(ids).detach(), GPTModel.from_checkpoint(path)(ids).detach()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_lora_layer_that_keeps_its_rank_divides_by_it(tmp_path: Path):
    theirs, path = whole_lora(tmp_path, rank=4)
    head = theirs.out_head
    expected = head.linear.weight + 8 / 4 * (head.lora.A @ head.lora.B).T
    assert torch.allclose(GPTModel.from_checkpoint(path).out_head.weight, expected, rtol=1e-4, atol=1e-6)


def test_another_alpha_than_a_whole_models_layers_say_is_an_error(tmp_path: Path):
    path = whole_lora(tmp_path)[1]
    GPTModel.from_checkpoint(path, lora_alpha=8)
    with pytest.raises(
        CheckpointError, match=r"holds LoRA layers of scale 8.0, but lora_alpha=16 was passed"
    ):
        GPTModel.from_checkpoint(path, lora_alpha=16)


@pytest.mark.parametrize("place", ["config", "hyper_parameters"])
@pytest.mark.parametrize("word", ["alpha", "lora_alpha"])
@pytest.mark.filterwarnings("ignore:.*ignored")
def test_another_alpha_than_a_config_beside_the_weights_says_is_an_error(
    place: str, word: str, tmp_path: Path
):
    said = {"model": with_lora(alpha=8).state_dict(), place: {"n_heads": TINY.n_heads, word: 8}}
    path = save_pth(said, tmp_path)
    for right in (8, 2):  # times the rank of 4
        GPTModel.from_checkpoint(path, lora_alpha=right)
    with pytest.raises(CheckpointError, match=rf"{word}=8, wanted 16"):
        GPTModel.from_checkpoint(path, lora_alpha=16)


def test_lora_factors_that_do_not_fit_are_named(tmp_path: Path):
    state = with_lora(alpha=2).state_dict()
    state["out_head.lora.A"] = torch.zeros(TINY.emb_dim + 1, 4)
    with pytest.raises(CheckpointError, match=r"out_head\.lora\.A .* do not fit out_head\.weight"):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS, lora_alpha=2.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("strategy", ["mmap", "stream", "meta"])
def test_merging_is_foretold(strategy: str, tmp_path: Path):
    pytest.importorskip("llms_from_scratch.appendix_e", reason="llms-from-scratch is not installed")
    script = """
import sys
import torch
from llms_from_scratch.appendix_e import replace_linear_with_lora
from gpt2lite import GPTConfig, GPTModel, forecast, track_memory
def save(config, path):
    model = GPTModel(config)
    replace_linear_with_lora(model, rank=4, alpha=2)
    torch.save(model.state_dict(), path)
strategy, folder = sys.argv[1:]
if strategy == "save":
    save(GPTConfig(8000, 256, 1024, 8, 2), folder + "/large.pth")
    save(GPTConfig(80, 16, 16, 8, 2), folder + "/tiny.pth")
    sys.exit()
options = {"strategy": strategy, "lora_alpha": 2.0, "config": {"n_heads": 8}}
GPTModel.from_checkpoint(folder + "/tiny.pth", **options)
foretold = forecast(folder + "/large.pth")[strategy].peak_host_anonymous
with track_memory() as memory:
    GPTModel.from_checkpoint(folder + "/large.pth", **options)
print(foretold - memory.peak_host_anonymous)
"""
    for word in ("save", strategy):
        command = [sys.executable, "-c", script, word, str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert abs(int(result.stdout)) <= 16 << 20


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", ["gpt2", "gpt2-xl"])
def test_every_table_is_complete_at_official_sizes(dialect: str, size: str):
    """Each parameter has exactly one place, and its shape comes back from what is stored."""
    config = GPTConfig.named(size)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in GPTModel(config).state_dict().items()}
    placed = {}
    for _, ours, placement in DIALECTS[dialect].rows:
        for i in range(config.n_layers) if "{i}" in ours else (0,):
            name = ours.format(i=i)
            assert name not in placed
            if name in shapes:
                stored = list(placement.unplace(torch.empty(shapes[name], device="meta")).shape)
                stored[placement.rows_axis] *= 3 if placement.narrows else 1
                placed[name] = placement.shape_of(tuple(stored))
    tied = {"out_head.weight": shapes["out_head.weight"]}  # stored or not
    assert placed | tied == shapes


def test_a_reading_of_openai_leaves_nothing_over():
    reading = read_dialect(open_checkpoint(OPENAI))
    assert (reading.dialect, reading.unexpected, reading.passengers) == ("openai", (), ())
