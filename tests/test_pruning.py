"""A model without some of its blocks: which ones, and that what is written is an ordinary checkpoint."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gpt2lite
from gpt2lite import GPTConfig, GPTModel, UsageError
from gpt2lite.config import EMBEDDED
from gpt2lite.tokenizer import tokenizer_for

STORIES = Path(__file__).parent.parent / "scripts" / "stories.py"


def by_hand(model: GPTModel, blocks: tuple[int, ...]) -> GPTModel:
    """The smaller model as anybody would make it: a new one, whose blocks are those of the large one."""
    config = GPTConfig.of(model.config.as_dict() | {"n_layers": len(blocks)})
    small = GPTModel(config).eval()
    state = model.state_dict()
    for name in small.state_dict():
        part = name.split(".")
        if part[0] == "trf_blocks":
            part[1] = str(blocks[int(part[1])])
        small.state_dict()[name].copy_(state[".".join(part)])
    return small


@pytest.fixture(scope="module")
def stories() -> str:
    command = [sys.executable, str(STORIES), "--seed", "2", "--count", "6"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def ids(stories: str) -> Tensor:
    return torch.tensor(tokenizer_for(EMBEDDED, 1024).encode(stories, allowed_special="all"))


@pytest.fixture(scope="module")
def embedded() -> GPTModel:
    return GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32)


def saved(tmp_path: Path, **fields: object) -> Path:
    config = {"vocab_size": 61, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 5} | fields
    torch.manual_seed(1)
    model = GPTModel(config)
    with torch.no_grad():  # so large that every block matters
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.2
    return model.save_checkpoint(tmp_path / "large.pth")


def test_the_block_that_the_text_misses_least_goes_first(embedded: GPTModel, ids: Tensor):
    found = gpt2lite.choose_blocks(embedded, ids, 2)
    losses = {3: {}, 2: {}}
    for count in losses:
        for blocks in combinations(range(4), count):
            each = gpt2lite.evaluate(by_hand(embedded, blocks), ids, stride=256)
            losses[count][blocks] = each.nats / each.tokens
    first = min(losses[3], key=losses[3].__getitem__)
    second = min((two for two in losses[2] if {*two} < {*first}), key=losses[2].__getitem__)
    assert found.kept == second
    assert found.losses[1:] == pytest.approx([losses[3][first], losses[2][second]], rel=1e-5)
    whole = gpt2lite.evaluate(embedded, ids, stride=256)
    assert found.losses[0] == pytest.approx(whole.nats / whole.tokens)
    # chosen is not worse than the first half or every second block
    assert found.losses[2] <= min(losses[2][0, 1], losses[2][0, 2]) * (1 + 1e-5)


@pytest.mark.parametrize("blocks", [(0, 1, 4), (3,), (1, 2, 3, 4)])
@pytest.mark.parametrize(
    "fields", [{}, {"tied_head": True}, {"qkv_bias": False}, {"n_classes": 3, "head_bias": True}]
)
def test_what_is_written_is_the_model_made_by_hand(blocks: tuple[int, ...], fields: dict, tmp_path: Path):
    path = saved(tmp_path, **fields)
    small = gpt2lite.prune(path, tmp_path / "small.pth", blocks=blocks)
    wanted, found = by_hand(GPTModel.from_checkpoint(path), blocks), GPTModel.from_checkpoint(small)
    assert found.config == wanted.config
    assert all(torch.equal(found.state_dict()[name], value) for name, value in wanted.state_dict().items())
    opened = gpt2lite.keep_blocks(gpt2lite.open_model(path), blocks)
    for strategy in opened.forecast():  # without a file of its own, too
        loaded = opened.load(strategy=strategy).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in wanted.state_dict().items()), strategy


@pytest.mark.parametrize("source", ["book", "huggingface", "nanogpt"])
def test_transformers_computes_the_same_of_a_pruned_folder(source: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    is_nano = source == "nanogpt"
    activation = "gelu" if is_nano else "gelu_tanh"
    large = saved(tmp_path, tied_head=is_nano, activation=activation)
    path = gpt2lite.convert(large, tmp_path / "of.pth", to=source)
    opened = gpt2lite.open_model(path, config={"n_heads": 4, "activation": activation})
    folder = gpt2lite.prune(opened, tmp_path / "hub", blocks=[0, 2, 3], to="huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = GPTModel.from_checkpoint(folder)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours(tokens), atol=1e-4)


def test_lora_layers_stay_with_their_blocks(tmp_path: Path):
    torch.manual_seed(0)
    model = GPTModel.from_checkpoint(saved(tmp_path))
    state, extra = model.state_dict(), {}
    for at in range(5):
        name = f"trf_blocks.{at}.ff.layers.0"
        extra[f"{name}.linear.weight"] = state.pop(f"{name}.weight")
        extra[f"{name}.linear.bias"] = state.pop(f"{name}.bias")
        extra[f"{name}.lora.A"], extra[f"{name}.lora.B"] = torch.randn(32, 2), torch.randn(2, 128)
    torch.save(state | extra, tmp_path / "lora.pth")
    opened = gpt2lite.open_model(tmp_path / "lora.pth", config={"n_heads": 4}, lora_alpha=2.0)
    small = gpt2lite.keep_blocks(opened, [1, 4]).load()
    wanted = by_hand(opened.load(), (1, 4)).state_dict()
    assert all(torch.equal(small.state_dict()[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either blocks"),
        ({"blocks": [0], "keep": 1, "text": "x"}, "either blocks"),
        ({"keep": 1}, "either blocks"),
        ({"blocks": [0], "text": "x"}, "either blocks"),
        ({"blocks": []}, "blocks must be"),
        ({"blocks": [2, 1]}, "blocks must be"),
        ({"blocks": [1, 1]}, "blocks must be"),
        ({"blocks": [0, 9]}, "blocks must be"),
        ({"blocks": [-1]}, "blocks must be"),
        ({"blocks": [True]}, "blocks must be"),
        ({"keep": 0, "text": "Once upon a time"}, "keep must be"),
        ({"keep": 5, "text": "Once upon a time"}, "keep must be"),
        ({"keep": 2.0, "text": "Once upon a time"}, "keep must be"),
        ({"keep": 2, "text": ""}, "nothing to predict"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_no_file(arguments: dict, said: str, tmp_path: Path):
    with pytest.raises(UsageError, match=said):
        gpt2lite.prune(EMBEDDED, tmp_path / "small.pth", **arguments)
    assert not (tmp_path / "small.pth").exists()


def test_choosing_leaves_the_model_as_it_was(embedded: GPTModel, ids: Tensor):
    embedded.train()
    before, seen = {name: value.clone() for name, value in embedded.state_dict().items()}, []
    gpt2lite.choose_blocks(embedded, ids[:600], 3, lambda done, total: seen.append((done, total)))
    assert embedded.training
    assert isinstance(embedded.trf_blocks, nn.Sequential)
    assert all(torch.equal(before[name], value) for name, value in embedded.state_dict().items())
    assert seen == [(1, 3), (2, 3), (3, 3)]
    embedded.eval()


def test_the_command_says_what_was_kept_and_lost(stories: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    from gpt2lite.cli import main

    (tmp_path / "held-out.txt").write_text(stories)
    arguments = ["prune", str(EMBEDDED), str(tmp_path / "hub"), "--to", "hf", "--keep-blocks", "2"]
    assert main(arguments) == 1
    assert "--keep-blocks needs --text" in capsys.readouterr().err
    named = [*arguments[:-2], "--blocks", "0", "--text", str(tmp_path / "held-out.txt")]
    assert main(named) == 1
    assert "leave it out" in capsys.readouterr().err
    assert main([*arguments, "--text", str(tmp_path / "held-out.txt")]) == 0
    said = capsys.readouterr().out
    assert "0, 1 of 4" in said
    assert "1.8 MiB → 1.1 MiB" in said
    assert "nats per token" in said
    assert gpt2lite.open_model(tmp_path / "hub").config.n_layers == 2
    assert tokenizer_for(tmp_path / "hub", 1024).encode("Once upon") == tokenizer_for(EMBEDDED, 1024).encode(
        "Once upon"
    )
