"""Training against transformers and AdamW, levers against none, cut runs against whole ones."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, randomise
from test_loading import HEADS, huggingface, save_pth

from gpt2lite import (
    CheckpointError,
    GPTConfig,
    GPTModel,
    Purpose,
    Recipe,
    Task,
    TrainingDivergedError,
    TrainingForecast,
    UsageError,
    as_classifier,
    convert,
    finetune,
    forecast_training,
    load_lora,
    merge_lora,
    open_model,
)
from gpt2lite.checkpoint import open_checkpoint, writing
from gpt2lite.cli import main
from gpt2lite.finetuning import lora, states
from gpt2lite.finetuning.data import (
    IGNORED,
    Batch,
    digest_of,
    tensor_parts,
    text_batches,
    text_windows,
)
from gpt2lite.finetuning.examples import read_records
from gpt2lite.finetuning.forecast import find_levers
from gpt2lite.finetuning.loop import read_metrics, validate
from gpt2lite.finetuning.losses import ROWS, summed_loss
from gpt2lite.finetuning.training import Trainer, choose_trained
from gpt2lite.tokenizer import Beside

SCRIPTS = Path(__file__).parent.parent / "scripts"
MIB = 1 << 20
TIED = GPTConfig.of(TINY.as_dict() | {"tied_head": True})
QUICK = Recipe(steps=8, batch_size=4, seq_len=12, learning_rate=1e-3, warmup_steps=1)
TOKENS = torch.randint(101, (4000,), generator=torch.Generator().manual_seed(0)).to(torch.uint16)


def fresh(config: GPTConfig = TIED, dtype: torch.dtype = torch.float32) -> GPTModel:
    """GPT-2's initial values, always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return GPTModel(config).to(dtype).eval()


def batch(rows: int = 4, length: int = 12, seed: int = 0) -> Batch:
    ids = torch.randint(101, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:])


def task(recipe: Recipe, **options: Any) -> Task:
    return Task(
        text_batches(TOKENS, 12, recipe.batch_size, recipe.seed), text_windows(TOKENS, 12, 8, 5), **options
    )


def trained(recipe: Recipe, *, config: GPTConfig = TIED, steps: int = 3, dtype: torch.dtype = torch.float64):
    """The weights after some steps, in fp64 unless told otherwise."""
    model = fresh(config, dtype)
    choose_trained(model, recipe)
    trainer = Trainer(model, recipe)
    for number in range(steps):
        parts = [batch(recipe.batch_size, seed=number * 2 + part) for part in range(recipe.accumulate)]
        trainer.step(number, parts)
    trainer.close()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=name)


# ---- the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, 2 * ROWS + 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", ["both", "hidden", "head"])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_whole(rows: int, bias: bool, trains: str):
    torch.manual_seed(0)
    targets, found = torch.randint(70, (rows,)), []
    start = torch.randn(rows, 16, dtype=torch.float64)
    head = torch.nn.Linear(16, 70, bias, dtype=torch.float64).requires_grad_(trains != "hidden")
    for chunked in (False, True):
        hidden = start.clone().requires_grad_(trains != "head")
        loss = summed_loss(head, hidden, targets, chunked=chunked) / rows
        head.zero_grad()
        loss.backward()
        found.append([loss.detach(), hidden.grad, *(p.grad for p in head.parameters())])
    for whole, parts in zip(*found, strict=True):
        assert (whole is None) == (parts is None)
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


def test_under_autocast_it_is_the_whole_loss_in_16_bits():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(300, 16), torch.nn.Linear(16, 70), torch.randint(70, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        parts, whole = (summed_loss(head, hidden, targets, chunked=chunked) for chunked in (True, False))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=0)


# ---- steps -------------------------------------------------------------------------------------------------


def peer_and_ours(dtype: torch.dtype) -> tuple[Any, torch.optim.Optimizer, GPTModel, Trainer]:
    """transformers' model with AdamW, and ours from its weights."""
    peer = huggingface().to(dtype)
    state = GPTModel(TIED).state_dict()
    from test_loading import expected_parameters

    model = GPTModel(TIED).to(dtype)
    model.load_state_dict({name: expected_parameters(peer.state_dict())[name] for name in state})
    for p in (*peer.parameters(), *model.parameters()):
        p.data.mul_(0.2)  # randomise's are large, and a step from there is chaos
    flat = [[p for p in peer.parameters() if (p.dim() < 2) == one] for one in (False, True)]
    groups = [{"params": flat[0], "weight_decay": 0.1}, {"params": flat[1], "weight_decay": 0.0}]
    recipe = Recipe(steps=50, warmup_steps=5, learning_rate=3e-3)
    choose_trained(model, recipe)
    peer.config.attn_pdrop = peer.config.resid_pdrop = peer.config.embd_pdrop = 0.0
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return peer.train(), torch.optim.AdamW(groups, betas=(0.9, 0.95)), model, Trainer(model, recipe)


def peers_step(peer: Any, optimizer: torch.optim.Optimizer, learning_rate: float, ids: torch.Tensor) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = peer(ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def row(seed: int) -> torch.Tensor:
    return torch.randint(101, (4, 13), generator=torch.Generator().manual_seed(seed))


def test_a_step_is_that_of_transformers_and_adamw():
    from test_loading import expected_parameters

    peer, optimizer, model, trainer = peer_and_ours(torch.float64)
    ids = row(0)
    wanted = peers_step(peer, optimizer, trainer.recipe.learning_rate_at(0), ids)
    loss, norm = trainer.step(0, [Batch(ids[:, :-1], ids[:, 1:])])
    assert loss == pytest.approx(wanted, rel=1e-6)  # transformers' loss is in fp32
    assert norm > 0
    after = expected_parameters(peer.state_dict())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), after[name], rtol=0, atol=2e-6, msg=name)


def test_the_curve_of_fifty_steps_is_that_of_transformers():
    peer, optimizer, _, trainer = peer_and_ours(torch.float32)
    theirs, ours = [], []
    for number in range(50):
        ids = row(number % 5)
        theirs.append(peers_step(peer, optimizer, trainer.recipe.learning_rate_at(number), ids))
        ours.append(trainer.step(number, [Batch(ids[:, :-1], ids[:, 1:])])[0])
    assert ours[45] < 0.98 * ours[0]  # the same rows
    assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize(
    "levers",
    [
        {"chunked_loss": False},
        {"recompute": True},
        {"step_in_backward": True},
        {"accumulate": 2, "batch_size": 2},
        {"recompute": True, "step_in_backward": True, "chunked_loss": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [TIED, TINY], ids=["tied", "untied"])
def test_a_lever_on_memory_changes_no_weight(levers: dict[str, Any], config: GPTConfig):
    plain = replace(QUICK, clip=0.0)
    if "accumulate" in levers:  # the same rows, in halves
        model, other = fresh(config, torch.float64), fresh(config, torch.float64)
        whole, halves = batch(4), [Batch(*(part[i : i + 2] for part in batch(4))) for i in (0, 2)]
        first = Trainer(model, plain).step(0, [whole])
        second = Trainer(other, replace(plain, **levers)).step(0, halves)
        assert first == pytest.approx(second, rel=1e-12)
        assert_same(dict(other.named_parameters()), dict(model.named_parameters()), 1e-12)
        return
    wanted = trained(plain, config=config)
    assert_same(trained(replace(plain, **levers), config=config), wanted, 1e-12)
    assert not torch.equal(wanted["final_norm.scale"], fresh(config).final_norm.scale)


def test_recomputed_dropout_drops_the_same():
    config = GPTConfig.of(TIED.as_dict() | {"drop_rate": 0.2})
    wanted = trained(QUICK, config=config)
    assert_same(trained(replace(QUICK, recompute=True), config=config), wanted, 1e-12)
    assert any(not torch.equal(tensor, wanted[name]) for name, tensor in trained(QUICK).items())


def test_autocast_is_the_step_in_16_bits():
    wanted = trained(QUICK, dtype=torch.float32)
    found = trained(replace(QUICK, autocast=True), dtype=torch.float32)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert any(not torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert_same(found, wanted, 6e-3)  # at most twice the three learning rates: Adam's steps are signs


def test_the_last_blocks_alone_change():
    found, before = trained(replace(QUICK, last_blocks=1)), fresh(dtype=torch.float64)
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, found[name])}
    assert changed == {name for name in found if name.startswith(("trf_blocks.2.", "final_norm."))}


@pytest.mark.parametrize("learning_rate", [1e30, 1e300])
def test_a_loss_that_is_no_number_stops_and_says_what_to_try(learning_rate: float, tmp_path: Path):
    recipe = replace(QUICK, learning_rate=learning_rate, warmup_steps=0)
    with pytest.raises(TrainingDivergedError, match=r"step \d: .* Try a learning rate below 1e\+"):
        finetune(fresh(), task(recipe), tmp_path / "out", replace(recipe, save_every=1))
    assert not (tmp_path / "out" / "model.pth").exists()


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize(
    ("levers", "dtype"),
    [
        ({"learning_rate": 1e39}, torch.float32),
        ({"learning_rate": 1e20}, torch.float32),
        ({"learning_rate": 1e5}, torch.float16),
        ({"learning_rate": 1e20, "step_in_backward": True, "clip": 0.0}, torch.float32),
    ],
    ids=str,
)
def test_the_last_step_may_not_end_in_weights_that_are_useless(
    levers: dict[str, Any], dtype: torch.dtype, validates: bool, tmp_path: Path
):
    recipe, own = replace(QUICK, steps=1, warmup_steps=0, **levers), task(QUICK)
    with pytest.raises(TrainingDivergedError, match="Try a learning rate below 1"):
        finetune(fresh(dtype=dtype), own if validates else Task(own.train, []), tmp_path / "out", recipe)
    assert not (tmp_path / "out" / "model.pth").exists()
    saved = [path.name for path in (tmp_path / "out").glob("step-*.pth")]
    assert saved == (["step-000001.pth"] if dtype == torch.float16 else [])  # it is finite in fp32
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_a_model_of_weights_that_are_no_numbers_is_refused(tmp_path: Path):
    model = fresh()
    model.pos_emb.weight.data[-1] = float("nan")  # a place that no row of the data reaches
    with pytest.raises(UsageError, match=r"pos_emb.weight holds infinities or NaN"):
        finetune(model, task(QUICK), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


# ---- adapters ----------------------------------------------------------------------------------------------


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained(ids: torch.Tensor):
    model, recipe = fresh(), replace(QUICK, lora_rank=3, lora_targets=("W_query", "layers.2"))
    before = model(ids)
    choose_trained(model, recipe)
    torch.testing.assert_close(model(ids), before)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = [f"trf_blocks.{i}.{layer}" for i in range(3) for layer in ("att.W_query", "ff.layers.2")]
    assert names == {f"{layer}.lora.{part}" for layer in wanted for part in "AB"}


@pytest.mark.parametrize(
    "levers", [{}, {"recompute": True}, {"step_in_backward": True, "clip": 0.0}], ids=str
)
def test_adapters_are_kept_alone_merged_in_the_end_and_open_as_the_books(
    levers: dict[str, Any], ids: torch.Tensor, tmp_path: Path
):
    recipe = replace(QUICK, lora_rank=4, lora_alpha=2.0, learning_rate=1e-2, **levers)
    unmerged = []

    def keep(metrics: Any) -> None:
        if metrics.step == recipe.steps - 1:
            unmerged.append(
                (model(ids).detach(), {n: p.detach().clone() for n, p in model.state_dict().items()})
            )

    model = fresh()
    path = finetune(model, task(recipe), tmp_path / "out", recipe, report=keep)
    logits, state = unmerged[0]
    assert not torch.allclose(logits, fresh()(ids), atol=1e-3)
    torch.testing.assert_close(GPTModel.from_checkpoint(path)(ids), logits, rtol=1e-4, atol=1e-4)
    book = save_pth(state, tmp_path)
    opened = GPTModel.from_checkpoint(book, config=HEADS, lora_alpha=2.0)
    torch.testing.assert_close(opened(ids), logits, rtol=1e-4, atol=1e-4)
    again = fresh()
    load_lora(again, path.with_name("adapters.pth"))
    torch.testing.assert_close(again(ids), logits, rtol=1e-4, atol=1e-4)
    merge_lora(again)
    torch.testing.assert_close(again(ids), logits, rtol=1e-4, atol=1e-4)
    assert not [name for name in again.state_dict() if "lora" in name]


def test_adapters_stay_fp32_on_a_16_bit_base_and_are_merged_as_they_were(tmp_path: Path):
    recipe, found = replace(QUICK, lora_rank=2, learning_rate=1e-2), fresh(dtype=torch.bfloat16)
    path = finetune(fresh(dtype=torch.bfloat16), task(recipe), tmp_path / "out", recipe)
    load_lora(found, path.with_name("adapters.pth"))
    assert {p.dtype for name, p in found.named_parameters() if ".lora." in name} == {torch.float32}
    assert found(batch().ids).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora(found)
    assert_same(weights(found), weights(GPTModel.from_checkpoint(path)), 0.0)


def test_a_file_of_adapters_with_a_wrong_checksum_is_refused(tmp_path: Path):
    recipe = replace(QUICK, steps=1, lora_rank=2)
    path = finetune(fresh(), task(recipe), tmp_path / "out", recipe).with_name("adapters.pth")
    blank_middle(path)
    with pytest.raises(CheckpointError, match=r"adapters.pth: not a file of LoRA adapters .*CRC"):
        load_lora(fresh(), path)


@pytest.mark.parametrize("content", [b"no pickle", None])
def test_what_is_no_file_of_adapters_is_refused(content: bytes | None, tmp_path: Path):
    from gpt2lite import CheckpointError

    path = tmp_path / "adapters.pth"
    torch.save({"lora": {}}, path) if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a file of LoRA adapters"):
        load_lora(fresh(), path)


def test_adapters_of_another_base_are_a_warning(tmp_path: Path):
    recipe, other, same = replace(QUICK, steps=1, lora_rank=2), fresh(), fresh()
    finetune(fresh(), task(recipe), tmp_path / "out", recipe)
    with torch.no_grad():
        other.trf_blocks[1].norm1.scale[3] += 1e-3
    with pytest.warns(UserWarning, match=r"trained on another model.* trf_blocks.1.norm1.scale"):
        load_lora(other, tmp_path / "out" / "adapters.pth")
    load_lora(same, tmp_path / "out" / "adapters.pth")


def test_adapters_are_put_around_plain_layers_once(tmp_path: Path):
    recipe = replace(QUICK, steps=1, lora_rank=2)
    path = finetune(fresh(), task(recipe), tmp_path / "out", recipe).with_name("adapters.pth")
    twice = fresh()
    assert load_lora(twice, path) == ()
    with pytest.raises(CheckpointError, match=r"W_query, which in the model is a layer with an adapter al"):
        load_lora(twice, path)
    with pytest.raises(CheckpointError, match=r"trf_blocks.2.*, which in the model is no linear layer"):
        load_lora(fresh(replace(TIED, n_layers=2)), path)


def test_adapters_of_another_model_are_refused(tmp_path: Path):
    from gpt2lite import CheckpointError

    recipe = replace(QUICK, steps=1, lora_rank=2)
    finetune(fresh(), task(recipe), tmp_path / "out", recipe)
    other = GPTModel(GPTConfig(101, 32, 32, 4, 3))
    with pytest.raises(CheckpointError, match=r"lora.A is \(48, 2\), the model has one of \(32, 2\)"):
        load_lora(other, tmp_path / "out" / "adapters.pth")


# ---- whole runs --------------------------------------------------------------------------------------------


class Cut(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"step_in_backward": True, "clip": 0.0},
        {"accumulate": 2, "recompute": True},
        {"lora_rank": 2},
        {"last_blocks": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [0, 3, 7])
def test_a_run_that_was_cut_and_resumed_ends_with_the_same_bits(
    levers: dict[str, Any], cut: int, tmp_path: Path
):
    recipe = replace(QUICK, **levers)
    config = GPTConfig.of(TIED.as_dict() | {"drop_rate": 0.1})
    whole = finetune(fresh(config), task(recipe), tmp_path / "whole", recipe)

    def stop(metrics: Any) -> None:
        if metrics.step == cut:
            raise Cut

    recipe = replace(recipe, save_every=2)
    with pytest.raises(Cut):
        finetune(fresh(config), task(recipe), tmp_path / "cut", recipe, report=stop)
    torch.rand(5)  # the program's own draws do not matter
    found = finetune(fresh(config), task(recipe), tmp_path / "cut", recipe, resume=True)
    assert whole.read_bytes() == found.read_bytes()
    steps = [each["step"] for each in read_metrics(tmp_path / "cut")]
    assert steps == list(range(recipe.steps))
    losses = [[each["loss"] for each in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_what_is_kept(tmp_path: Path):
    recipe, seen = replace(QUICK, steps=7, validate_every=3, save_every=2, keep=2), []
    options = {"sample": lambda model: "a text"}
    finetune(fresh(), task(recipe, **options), tmp_path / "out", recipe, report=seen.append)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["metrics.jsonl", "model.pth", "step-000006.pth", "step-000007.pth"]
    lines = read_metrics(tmp_path / "out")
    assert [each["step"] for each in lines if "validation_loss" in each] == [2, 5, 6]
    assert lines[2]["sample"] == "a text"
    assert [each.loss for each in seen] == [each["loss"] for each in lines]
    state = GPTModel.from_checkpoint(tmp_path / "out" / "step-000007.pth")
    final = GPTModel.from_checkpoint(tmp_path / "out" / "model.pth")
    assert_same(dict(state.named_parameters()), dict(final.named_parameters()), 0.0)
    assert open_checkpoint(tmp_path / "out" / "model.pth").tensors["out_head.weight"]


def test_resuming_otherwise_is_refused(tmp_path: Path):
    finetune(fresh(), task(QUICK), tmp_path / "out", QUICK)
    other = replace(QUICK, learning_rate=0.5, clip=2.0)
    with pytest.raises(UsageError, match=r"step-000008.pth: was made with learning_rate=0.001, clip=1.0"):
        finetune(fresh(), task(other), tmp_path / "out", other, resume=True)


def test_a_rate_that_is_a_tensor_is_set_in_place():
    """torchao's 8-bit Adam compiles its step around the tensor."""
    model = fresh()
    choose_trained(model, QUICK)
    trainer = Trainer(model, QUICK)
    rates = [torch.tensor(9.0) for _ in range(2)]
    for group, rate in zip(trainer.optimizers[model.pos_emb.weight].param_groups, rates, strict=True):
        group["lr"] = rate
    trainer.step(0, [batch()])
    assert [float(rate) for rate in rates] == pytest.approx([QUICK.learning_rate_at(0)] * 2)
    trainer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, 0 or more, got nan"),
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"lora_rank": 2, "last_blocks": 1}, "exclude each other"),
        ({"step_in_backward": True}, "needs clip=0 and accumulate=1"),
        (
            {"lora_targets": ("W_key", "head")},
            r"unknown lora_targets \('W_key', 'head'\); choose from W_query",
        ),
        ({"lora_targets": None}, "unknown lora_targets None"),
        ({"lora_targets": (1,)}, "unknown lora_targets"),
        ({"lora_targets": [["W_query"]]}, "unknown lora_targets"),
        ({"lora_rank": 2, "lora_alpha": 0}, "lora_alpha must be more than 0"),
        ({"autocast": "no"}, "autocast must be True or False, got 'no'"),
        ({"chunked_loss": "False"}, "chunked_loss must be True or False, got 'False'"),
        ({"recompute": None}, "recompute must be True or False, got None"),
        ({"compile": "x"}, "compile must be True or False, got 'x'"),
        ({"seed": 2**40}, r"seed must be below 2\*\*32, got 1099511627776"),
        ({"seed": 1.5}, "seed must be an int of at least 0, got 1.5"),
        ({"seed": None}, "seed must be an int of at least 0, got None"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps=6 is more than steps=5: no step has the peak"),
        ({"learning_rate": 10**400}, "learning_rate must be a finite number"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a finite number, 0 or more, got '1e-4'"),
        ({"learning_rate": 0}, "learning_rate must be more than 0"),
        ({"save_every": 0}, "save_every must be an int of at least 1, got 0"),
        ({"steps": True}, "steps must be an int of at least 1, got True"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number, 0 or more"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Recipe(**options)


def test_what_is_no_recipe_is_refused(tmp_path: Path):
    for recipe in ({}, {"steps": 3}):
        with pytest.raises(UsageError, match="recipe must be a Recipe, got a dict"):
            finetune(fresh(), task(QUICK), tmp_path / "out", recipe)  # type: ignore[arg-type]
    assert [Recipe(steps=steps).warmup for steps in (1, 5, 20, 200)] == [0, 2, 10, 10]


class Wider(GPTModel):
    """A layer more than its config says, and another way through it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.adapter = torch.nn.Linear(48, 48)

    def hidden(self, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return self.adapter(super().hidden(ids, cache))


def test_a_model_whose_file_would_open_as_another_is_refused(tmp_path: Path):
    buffered, headed, relu, untied, smaller = fresh(), fresh(), fresh(), fresh(), fresh(TINY)
    buffered.trf_blocks[1].register_buffer("calls", torch.zeros(1))
    headed.trf_blocks[2].att.n_heads = 2
    relu.trf_blocks[0].ff.layers[1] = torch.nn.ReLU()
    untied.out_head.weight = torch.nn.Parameter(untied.out_head.weight.detach().clone())
    smaller.pos_emb = torch.nn.Embedding(16, 48)
    for model, message in (
        (Wider(TIED), r"adapter.weight is \(48, 48\), wanted no such part"),
        (Wider(TIED), r"the model computes something else than GPTModel's GPTModel"),
        (buffered, r"trf_blocks.1.calls is \(1,\), wanted no such part"),
        (headed, "trf_blocks.2.att computes something else than GPTModel's CausalSelfAttention"),
        (relu, "trf_blocks.0.ff.layers.1 computes something else than GPTModel's GELU"),
        (untied, "the head is tied or not, unlike config.tied_head=True"),
        (smaller, r"pos_emb.weight is \(16, 48\), wanted \(32, 48\)"),
    ):
        with pytest.raises(UsageError, match=message):
            finetune(model, task(QUICK), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_train_are_refused(pth: Path, tmp_path: Path):
    int8 = GPTModel.from_checkpoint(pth, config=HEADS, quantize="int8")
    for model, recipe, message in (
        (int8, QUICK, "an int8 model does not train"),
        (
            fresh(GPTConfig.of(TINY.as_dict() | {"n_classes": 2})),
            QUICK,
            "text needs a model with a language head",
        ),
        (fresh(), replace(QUICK, seq_len=33), "seq_len=33 is more than the context of 32"),
        (fresh(), replace(QUICK, last_blocks=4), "last_blocks=4: the model has 3"),
    ):
        with pytest.raises(UsageError, match=message):
            finetune(model, task(QUICK), tmp_path / "out", recipe)


def test_a_classifier_learns_from_the_last_token(tmp_path: Path, ids: torch.Tensor):
    """Class 1 where the last token is odd, padded rows among them."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> Batch:
        lengths = torch.randint(2, 9, (16,), generator=generator.manual_seed(number))
        found = torch.randint(101, (16, 8), generator=generator)
        targets = torch.full((16, 8), IGNORED)
        rows = torch.arange(16)
        targets[rows, lengths - 1] = found[rows, lengths - 1] % 2
        return Batch(found, targets)

    model, recipe = fresh(TINY), replace(QUICK, steps=150, learning_rate=3e-3)
    as_classifier(model, 2)
    assert model(ids).shape == (2, 17, 2)
    own = Task(draw, [draw(10_000 + number) for number in range(4)], labels=("even", "odd"))
    path = finetune(model, own, tmp_path / "out", recipe)
    opened = GPTModel.from_checkpoint(path)
    assert opened.config.n_classes == 2
    loss, accuracy = validate(opened, own.validation, recipe)
    assert accuracy is not None
    assert accuracy >= 0.95
    assert read_metrics(tmp_path / "out")[-1]["accuracy"] == accuracy
    assert loss < 0.3


# ---- the model before and after ----------------------------------------------------------------------------


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levers", [{}, {"lora_rank": 2}], ids=str)
def test_a_model_of_16_bits_trains_as_the_same_in_fp32_and_is_saved_as_it_came(
    dtype: torch.dtype, levers: dict[str, Any], tmp_path: Path
):
    recipe = replace(QUICK, learning_rate=3e-5, **levers)
    finetune(fresh(dtype=dtype), task(recipe), tmp_path / "16", replace(recipe, save_every=3, keep=9))
    wanted = fresh(dtype=dtype).float()
    finetune(wanted, task(recipe), tmp_path / "32", recipe)
    found = GPTModel.from_checkpoint(tmp_path / "16" / "model.pth")
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert_same(weights(found), weights(wanted.to(dtype)), 0.0)
    cut = tmp_path / "16" / "step-000006.pth"
    for path in (*(tmp_path / "16").glob("step-*8.*"), tmp_path / "16" / "model.pth"):
        path.unlink()
    assert {p.dtype for p in torch.load(cut, weights_only=True)["model"].values()} == {torch.float32}
    again = finetune(fresh(dtype=dtype), task(recipe), tmp_path / "16", recipe, resume=True)
    assert_same(weights(GPTModel.from_checkpoint(again)), weights(found), 0.0)


def test_fp64_stays_fp64_and_16_bits_are_forecast_as_fp32(tmp_path: Path):
    path = finetune(fresh(dtype=torch.float64), task(QUICK), tmp_path / "out", QUICK)
    assert {p.dtype for p in GPTModel.from_checkpoint(path).parameters()} == {torch.float64}
    costs = [
        forecast_training(lambda: GPTModel(TIED), QUICK, "cpu", dtype)
        for dtype in (torch.float16, torch.float32)
    ]
    assert costs[0] == costs[1]


def test_gradients_that_lie_there_do_not_count(tmp_path: Path):
    wanted, model = fresh(), fresh()
    (model(batch().ids).square().mean() * 50).backward()
    recipe = replace(QUICK, steps=1)
    for number, each in enumerate((wanted, model)):
        finetune(each, task(recipe), tmp_path / str(number), recipe)
    assert_same(weights(model), weights(wanted), 0.0)


@pytest.mark.filterwarnings("ignore:.*has forward hooks")
@pytest.mark.parametrize("levers", [{}, {"lora_rank": 2}, {"step_in_backward": True, "clip": 0.0}], ids=str)
def test_after_a_run_that_failed_the_model_is_as_it_was_and_trains(levers: dict[str, Any], tmp_path: Path):
    model, calls = fresh(GPTConfig.of(TIED.as_dict() | {"drop_rate": 0.1})), []
    model.trf_blocks[1].train()
    model.pos_emb.requires_grad_(False)
    recipe, before = replace(QUICK, **levers), weights(model)
    handle = model.pos_emb.register_forward_hook(lambda *_: calls.append(1))
    spoilt = model.final_norm.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(TrainingDivergedError):
        finetune(model, task(recipe), tmp_path / "bad", recipe)
    spoilt.remove()
    assert_same(weights(model), before, 0.0)
    for _ in range(2):
        assert all(p.grad is None for p in model.parameters())
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"pos_emb.weight"}
        assert [module.training for module in model.trf_blocks] == [False, True, False]
        assert not model.training
        other = fresh(model.config)
        other.load_state_dict(model.state_dict())
        other.pos_emb.requires_grad_(False)
        out = tmp_path / f"out{len(calls)}"
        finetune(model, task(recipe), out, recipe)
        finetune(other, task(recipe), out / "other", recipe)
        assert_same(weights(model), weights(other), 0.0)
    assert torch.equal(model.pos_emb.weight, before["pos_emb.weight"])
    assert len(calls) > 2 * QUICK.steps
    handle.remove()


def test_what_is_all_frozen_is_refused(tmp_path: Path):
    with pytest.raises(
        UsageError, match="nothing to train: every weight that the recipe trains has requires"
    ):
        finetune(fresh().requires_grad_(False), task(QUICK), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def labelled(number: int) -> Batch:
    """Class 1 where the last token is odd."""
    ids = torch.randint(101, (16, 6), generator=torch.Generator().manual_seed(number))
    targets = torch.full_like(ids, IGNORED)
    targets[:, -1] = ids[:, -1] % 2
    return Batch(ids, targets)


def test_adapters_of_a_classifier_hold_its_head_and_train_further(tmp_path: Path):
    recipe = replace(QUICK, steps=20, learning_rate=1e-2, lora_rank=2, lora_alpha=4.0)
    own = Task(labelled, [labelled(99)], labels=("even", "odd"))

    def classifier(seed: int) -> GPTModel:
        model = fresh(TINY)
        as_classifier(model, 2, seed)
        return model

    path = finetune(classifier(0), own, tmp_path / "out", recipe)
    wanted, found = GPTModel.from_checkpoint(path), classifier(1)
    found.purpose = Purpose(("odd", "even"))
    assert load_lora(found, path.with_name("adapters.pth")) == ("even", "odd") == found.purpose.labels
    saved = torch.load(path.with_name("adapters.pth"))
    torch.save(saved | {"labels": ["even", "odd", "more"]}, tmp_path / "adapters.pth")
    with pytest.raises(
        CheckpointError, match=r"labels: wanted 2 names of classes, .* found \['even', 'odd',"
    ):
        load_lora(classifier(1), tmp_path / "adapters.pth")
    ids = labelled(5).ids
    torch.testing.assert_close(found(ids), wanted(ids), rtol=1e-4, atol=1e-5)
    assert open_model(path).labels == ("even", "odd")
    with pytest.raises(CheckpointError, match=r"out_head.weight is .2, 48., the model has one of .101, 48."):
        load_lora(fresh(TINY), path.with_name("adapters.pth"))
    with pytest.raises(UsageError, match="has LoRA adapters already, of rank 2 and alpha 4"):
        finetune(found, own, tmp_path / "more", replace(recipe, lora_rank=3))
    with pytest.raises(UsageError, match="LoRA adapters already, of rank 2 and alpha 4; describe them"):
        finetune(found, own, tmp_path / "more", replace(recipe, lora_rank=0))
    before = found(ids).detach()
    more = finetune(found, own, tmp_path / "more", replace(recipe, steps=3))
    after = GPTModel.from_checkpoint(more)(ids)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(found(ids), after)


# ---- resuming ----------------------------------------------------------------------------------------------


def cut_run(out: Path, recipe: Recipe = QUICK, at: int = 3) -> None:
    """Ends after the fourth step, with the states of steps 2 and 4."""

    def stop(metrics: Any) -> None:
        if metrics.step == at:
            raise Cut

    with pytest.raises(Cut):
        finetune(fresh(), task(recipe), out, replace(recipe, save_every=2), report=stop)


def resumed(
    out: Path, recipe: Recipe = QUICK, model: GPTModel | None = None, own: Task | None = None
) -> Path:
    return finetune(model or fresh(), own or task(recipe), out, recipe, resume=True)


@pytest.mark.parametrize("damage", ["missing", "smaller", "16 bits"])
def test_moments_that_do_not_fit_are_refused(damage: str, tmp_path: Path):
    cut_run(tmp_path / "out")
    path = tmp_path / "out" / "step-000004.pth"
    saved = torch.load(path, weights_only=True)
    name, moments = next(iter(saved["optimizer"].items()))
    changed = {
        "missing": {},
        "smaller": moments | {"exp_avg": torch.zeros(3)},  # torch's fused step would write past its end
        "16 bits": moments | {"exp_avg_sq": moments["exp_avg_sq"].half()},
    }
    saved["optimizer"][name] = changed[damage]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=rf"step-000004.pth: its moments do not fit {name}; delete"):
        resumed(tmp_path / "out")


def test_the_scale_of_fp16s_loss_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gpt2lite.finetuning.training.has_bfloat16", lambda device: False)
    recipe = replace(QUICK, autocast=True)
    whole = finetune(fresh(), task(recipe), tmp_path / "whole", recipe).read_bytes()
    cut_run(tmp_path / "out", recipe)
    path = tmp_path / "out" / "step-000004.pth"
    assert torch.load(path, weights_only=True)["scaler"]["scale"] == 65536.0
    assert resumed(tmp_path / "out", recipe).read_bytes() == whole
    assert Trainer(fresh(), recipe).scaler.get_scale() == 65536.0


def test_a_pruned_run_that_is_resumed_whole_names_the_flag(tmp_path: Path):
    cut_run(tmp_path / "out")
    with pytest.raises(UsageError, match=r"another model .*pruned by the same --keep-blocks"):
        resumed(tmp_path / "out", model=fresh(replace(TIED, n_layers=2)))


def other_model() -> GPTModel:
    model = fresh()
    with torch.no_grad():
        model.tok_emb.weight[7, 3] += 1e-3  # in one number
    return model


@pytest.mark.parametrize("levers", [{}, {"lora_rank": 2}, {"last_blocks": 1}], ids=str)
def test_another_model_or_other_data_are_named_and_refused(levers: dict[str, Any], tmp_path: Path):
    recipe, out = replace(QUICK, **levers), tmp_path / "out"
    cut_run(out, recipe)
    validation = task(recipe).validation
    with pytest.raises(UsageError, match=r"step-000004.pth: was made with another model .give it as it was"):
        resumed(out, recipe, other_model())
    for others in (
        Task(text_batches(TOKENS[1:], 12, 4, 0), validation),
        Task(lambda n: task(recipe).train(n if n == 0 else n + 1), validation),
        Task(task(recipe).train, validation[1:]),
        Task(task(recipe).train, validation, digest="of others"),
    ):
        with pytest.raises(
            UsageError, match=r"step-000004.pth: was made with other data; resume with the same"
        ):
            resumed(out, recipe, own=others)
    with pytest.raises(UsageError, match="was made with seed=0; resume"):
        resumed(out, replace(recipe, seed=1), own=task(recipe))


def test_a_finished_run_of_lora_is_not_resumed_with_its_own_model(tmp_path: Path):
    model, recipe = fresh(), replace(QUICK, lora_rank=2)
    path = finetune(model, task(recipe), tmp_path / "out", recipe)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="was made with another model"):
        resumed(tmp_path / "out", recipe, model)
    assert resumed(tmp_path / "out", recipe).read_bytes() == before


def test_more_steps_and_another_learning_rate_are_allowed_and_said(tmp_path: Path):
    out = tmp_path / "out"
    finetune(fresh(), task(QUICK), out, QUICK)
    more = replace(QUICK, steps=12, learning_rate=5e-4)
    with pytest.warns(UserWarning, match=r"steps=8, learning_rate=0.001; from step 8 on it is steps=12, lea"):
        resumed(out, more)
    assert [each["step"] for each in read_metrics(out)] == list(range(12))
    assert read_metrics(out)[9]["learning_rate"] == more.learning_rate_at(9)
    with pytest.raises(
        UsageError, match=r"step-000012.pth: was made with steps=12, learning_rate=0.0005; res"
    ):
        resumed(out, QUICK)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", None], ids=["empty", "no zip", "half"])
def test_a_damaged_newest_state_is_said_and_the_one_before_it_taken(content: bytes | None, tmp_path: Path):
    wanted, out = finetune(fresh(), task(QUICK), tmp_path / "whole", QUICK), tmp_path / "out"
    cut_run(out)
    newest = out / "step-000004.pth"
    newest.write_bytes(newest.read_bytes()[:-2000] if content is None else content)
    with pytest.warns(
        UserWarning, match=r"000004.pth: not a whole saved state .* Going on from step-000002.p"
    ):
        assert resumed(out).read_bytes() == wanted.read_bytes()
    assert [each["step"] for each in read_metrics(out)] == list(range(8))
    for path in out.glob("step-*.pth"):
        path.write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"step-000008.pth: not a whole saved state"):
        resumed(out)


def blank_middle(path: Path) -> None:
    """64 bytes of zeros in the largest tensor, where no header is."""
    with zipfile.ZipFile(path) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    largest = max(tensors, key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    middle = largest.header_offset + largest.file_size // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)


def test_a_state_with_a_wrong_checksum_is_said_and_the_one_before_it_taken(tmp_path: Path):
    wanted, out = finetune(fresh(), task(QUICK), tmp_path / "whole", QUICK), tmp_path / "out"
    cut_run(out)
    blank_middle(out / "step-000004.pth")
    with pytest.warns(
        UserWarning, match=r"000004.pth: not a whole saved state .*CRC.* Going on from step-000002"
    ):
        assert resumed(out).read_bytes() == wanted.read_bytes()


def test_a_state_without_checksums_is_read(tmp_path: Path):
    out = tmp_path / "out"
    torch.serialization.set_crc32_options(False)
    try:
        wanted = finetune(fresh(), task(QUICK), out, QUICK).read_bytes()
    finally:
        torch.serialization.set_crc32_options(True)
    assert resumed(out).read_bytes() == wanted


def test_what_a_killed_process_left_half_written_goes_when_its_run_is_resumed(tmp_path: Path):
    wanted = finetune(fresh(), task(QUICK), tmp_path / "whole", QUICK)
    cut = tmp_path / "out" / ".step-000004.pth.0a1b2c3d.part"

    def stop(metrics: Any) -> None:
        raise EOFError

    with pytest.raises(EOFError):
        finetune(fresh(), task(QUICK), cut.parent, QUICK, report=stop)
    cut.mkdir()
    (cut / "step-000004.pth").write_bytes(b"half")
    assert resumed(cut.parent).read_bytes() == wanted.read_bytes()
    assert not cut.exists()


def test_states_are_in_the_order_of_their_steps(tmp_path: Path):
    recipe, out = replace(QUICK, steps=1), tmp_path / "out"
    finetune(fresh(), task(recipe), out, recipe)
    saved = torch.load(out / "step-000001.pth", weights_only=True)
    for step in (999_999, 1_000_000):
        last = {"last_batch": digest_of(tensor_parts(*task(recipe).train(step - 1)))}
        torch.save(saved | last | {"step": step}, out / f"step-{step:06}.pth")
    with pytest.warns(UserWarning, match="from step 1000000 on"):
        resumed(out, replace(recipe, steps=1_000_001))
    assert sorted(path.name for path in out.glob("step-*.pth")) == ["step-1000000.pth", "step-1000001.pth"]


def test_a_half_written_line_of_metrics_is_made_again(tmp_path: Path):
    out, path = tmp_path / "out", tmp_path / "out" / "metrics.jsonl"
    cut_run(out)
    whole = path.read_text()
    path.write_text(whole + '{"step": 4, "lo')
    assert len(read_metrics(out)) == 4
    resumed(out)
    assert [each["step"] for each in read_metrics(out)] == list(range(8))


@pytest.mark.parametrize("damage", ["deleted", "another run's", "cut"])
def test_metrics_are_restored_from_the_state(damage: str, tmp_path: Path):
    out, path = tmp_path / "out", tmp_path / "out" / "metrics.jsonl"
    cut_run(out)
    whole = path.read_text().splitlines()[:4]
    path.unlink() if damage == "deleted" else path.write_text("" if damage == "cut" else '{"step": 99}\n' * 9)
    resumed(out)
    assert [each["step"] for each in read_metrics(out)] == list(range(8))
    assert path.read_text().splitlines()[:4] == whole


def test_a_state_under_another_name_or_of_an_older_kind_is_refused(tmp_path: Path):
    out = tmp_path / "out"
    cut_run(out)
    saved = torch.load(out / "step-000004.pth", weights_only=True)
    (out / "step-000002.pth").replace(out / "step-000004.pth")
    with pytest.raises(
        CheckpointError, match=r"step-000004.pth: holds the state of step 2; has it been renamed"
    ):
        resumed(out)
    del saved["made_from"]
    torch.save(saved, out / "step-000004.pth")
    with pytest.raises(CheckpointError, match=r"not a whole saved state .*its 'made_from' is missing"):
        resumed(out)


def test_resuming_where_nothing_was_run_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("mistyped", "empty"):
        with pytest.raises(UsageError, match=f"{name}: no run to resume there. Check its name"):
            resumed(tmp_path / name)
    assert not (tmp_path / "mistyped").exists()


def test_a_run_whose_states_are_gone_is_not_begun_again(tmp_path: Path):
    out = tmp_path / "out"
    finetune(fresh(), task(QUICK), out, QUICK)
    for path in out.glob("step-*.pth"):
        path.unlink()
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        UsageError, match=r"metrics.jsonl and model.pth, but no saved state .step-….pth. to res"
    ):
        resumed(out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("resume", [True, False])
def test_one_folder_takes_one_run_at_a_time(resume: bool, tmp_path: Path):
    out, said = tmp_path / "out", []
    if resume:
        cut_run(out)

    def start_another(metrics: Any) -> None:
        with pytest.raises(UsageError, match="out: another run writes there") as error:
            resumed(out)
        said.append(error)

    finetune(fresh(), task(QUICK), out, replace(QUICK, save_every=1), resume=resume, report=start_another)
    assert len(said) == (4 if resume else 8)
    resumed(out)  # nothing is left of the lock


def test_metrics_that_are_no_json_are_one_error_or_restored(tmp_path: Path):
    out, path = tmp_path / "out", tmp_path / "out" / "metrics.jsonl"
    cut_run(out)
    whole = path.read_bytes()
    for content in (b'{"step": 0\n' + whole, whole + b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl, line [15]: not valid JSON"):
            read_metrics(out)
    resumed(out)
    assert [each["step"] for each in read_metrics(out)] == list(range(8))


@pytest.mark.parametrize("damage", ["deleted", "truncated", "longer"])
@pytest.mark.parametrize("save_every", [1, 100])
def test_metrics_that_change_during_a_run_are_whole_in_the_end(damage: str, save_every: int, tmp_path: Path):
    path = tmp_path / "out" / "metrics.jsonl"

    def spoil(metrics: Any) -> None:
        if metrics.step == 3 and damage == "deleted":
            path.unlink()
        elif metrics.step == 3:
            path.write_bytes(path.read_bytes()[:-30] if damage == "truncated" else b"no line")

    finetune(fresh(), task(QUICK), tmp_path / "out", replace(QUICK, save_every=save_every), report=spoil)
    assert [each["step"] for each in read_metrics(tmp_path / "out")] == list(range(8))
    saved = torch.load(tmp_path / "out" / "step-000008.pth", weights_only=True)
    assert saved["metrics"] == path.read_text()


class GoneLater(list[Batch]):
    """Batches that can be gone through twice, before the first step."""

    def __iter__(self) -> Iterator[Batch]:
        self.times = getattr(self, "times", 0) + 1
        if self.times > 2:
            raise Cut
        return super().__iter__()


@pytest.mark.parametrize("fails", ["train", "validation", "sample", "report", "memory"])
@pytest.mark.parametrize("levers", [{}, {"step_in_backward": True, "clip": 0.0}], ids=str)
def test_what_raises_costs_no_step(fails: str, levers: dict[str, Any], tmp_path: Path):
    recipe = replace(QUICK, validate_every=5, **levers)
    wanted = finetune(fresh(), task(recipe), tmp_path / "whole", recipe)
    good, out, hooks = task(recipe), tmp_path / "out", list[Any]()

    def fail(*_: Any) -> Any:
        for hook in hooks:
            hook.remove()
        raise Cut

    def train(number: int) -> Batch:
        return good.train(number) if number < 5 else fail()

    def report(metrics: Any) -> None:
        if metrics.step == 4 and fails == "memory":  # in the middle of the next step's forward
            hooks.append(model.final_norm.register_forward_hook(fail))
        if metrics.step == 4 and fails == "report":
            fail()

    model, own = fresh(), good
    if fails == "train":
        own = replace(own, train=train)
    elif fails == "sample":
        own = replace(own, sample=fail)
    elif fails == "validation":
        own = replace(own, validation=GoneLater(own.validation))
    with pytest.raises(Cut) as error:
        finetune(model, own, out, recipe, report=report)
    assert error.value.__cause__ is None
    assert [path.name for path in out.glob("*.pth")] == ["step-000005.pth"]
    assert resumed(out, recipe).read_bytes() == wanted.read_bytes()
    assert [each["step"] for each in read_metrics(out)] == list(range(8))


def test_a_failure_to_save_does_not_hide_what_ended_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    def fail(metrics: Any) -> None:
        monkeypatch.setattr(torch, "save", full)
        raise Cut

    with pytest.raises(Cut) as error:
        finetune(fresh(), task(QUICK), tmp_path / "out", QUICK, report=fail)
    assert str(error.value.__cause__) == "the disk is full"


@pytest.mark.parametrize("sample", [torch.ones(2), b"bytes", 1.5, ["a"]], ids=str)
def test_a_sample_that_is_no_text_is_refused_and_costs_no_step(sample: Any, tmp_path: Path):
    recipe, out = replace(QUICK, validate_every=2), tmp_path / "out"
    with pytest.raises(UsageError, match=f"Task.sample returned a {type(sample).__name__}, wanted a str"):
        finetune(fresh(), task(QUICK, sample=lambda model: sample), out, recipe)
    assert len(read_metrics(out)) == 2
    resumed(out, replace(QUICK, validate_every=3), own=task(QUICK, sample=lambda model: "\udcff ☂"))
    assert [each.get("sample") for each in read_metrics(out)][2] == "\udcff ☂"


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def press(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", [0, 3, 7])
def test_ctrl_c_in_any_step_saves_it_and_raises(at: int, tmp_path: Path):
    wanted, out = finetune(fresh(), task(QUICK), tmp_path / "whole", QUICK), tmp_path / "out"
    before = signal.getsignal(signal.SIGINT)

    def report(metrics: Any) -> None:
        if metrics.step == at:
            press()

    with pytest.raises(KeyboardInterrupt):
        finetune(fresh(), task(QUICK), out, QUICK, report=report)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in out.glob("*.pth")] == [f"step-{at + 1:06}.pth"]
    assert resumed(out).read_bytes() == wanted.read_bytes()


def test_a_second_ctrl_c_ends_a_slow_sample_at_once(tmp_path: Path):
    recipe, out, pressed = replace(QUICK, validate_every=3), tmp_path / "out", []

    def sample(model: Any) -> str:
        for number in range(4):
            pressed.append(number)
            press()
        return "never"

    with pytest.raises(KeyboardInterrupt):
        finetune(fresh(), task(QUICK, sample=sample), out, recipe)
    assert pressed == [0, 1]
    assert [path.name for path in out.glob("*.pth")] == ["step-000003.pth"]
    assert len(read_metrics(out)) == 3


@pytest.mark.parametrize("handler", [signal.SIG_IGN, "own"])
def test_a_handler_of_the_caller_stays_and_counts(handler: Any, tmp_path: Path):
    calls: list[int] = []
    own = (lambda *_: calls.append(1)) if handler == "own" else handler
    before = signal.signal(signal.SIGINT, own)
    try:
        if handler == "own":  # pressed while the model is saved: the caller hears of it when all is whole
            with pytest.raises(KeyboardInterrupt):
                finetune(fresh(), task(QUICK), tmp_path / "out", QUICK, report=press)
        else:
            finetune(fresh(), task(QUICK), tmp_path / "out", QUICK, report=press)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(read_metrics(tmp_path / "out")) == (1 if handler == "own" else 8)


@pytest.mark.parametrize("where", ["merge_lora", "save_lora", "save_checkpoint"])
def test_ctrl_c_after_the_last_step_leaves_model_and_files_whole(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = replace(QUICK, lora_rank=2, learning_rate=1e-2)
    wanted_model, model, out = fresh(), fresh(), tmp_path / "out"
    wanted = finetune(wanted_model, task(recipe), tmp_path / "whole", recipe)
    home = {"merge_lora": torch.nn.Module, "save_lora": states, "save_checkpoint": writing}[where]
    name = {"merge_lora": "set_submodule", "save_lora": "replacing", "save_checkpoint": "_flush"}[where]
    plain = getattr(home, name)

    def pressing(*args: Any) -> Any:
        is_there = where != "save_checkpoint" or "model.pth" in str(args)
        if recipe.steps == len(read_metrics(out)) and is_there:
            press()
        return plain(*args)

    monkeypatch.setattr(home, name, pressing)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, task(recipe), out, recipe)
    monkeypatch.undo()
    names = {path.name for path in out.iterdir()}
    if "model.pth" in names:
        assert (out / "model.pth").read_bytes() == wanted.read_bytes()
    assert not [name for name in names if name.endswith(".part")]
    found, merged = weights(model), weights(wanted_model)
    last = "trf_blocks.2.att.W_query.weight"
    assert_same(found, merged if torch.equal(found[last], merged[last]) else weights(fresh()), 0.0)
    assert resumed(out, recipe).read_bytes() == wanted.read_bytes()


def test_ctrl_c_while_adapters_are_merged_waits_for_the_last(monkeypatch: pytest.MonkeyPatch):
    wanted, model, recipe = fresh(), fresh(), replace(QUICK, lora_rank=2)
    for each in (wanted, model):
        lora.add_lora(each, recipe)
        for layer in lora.lora_layers(each).values():
            layer.lora.B.data.fill_(0.1)
    merge_lora(wanted)
    plain = torch.nn.Module.set_submodule

    def pressing(*args: Any) -> None:
        press()
        plain(*args)

    monkeypatch.setattr(torch.nn.Module, "set_submodule", pressing)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(model)
    assert_same(weights(model), weights(wanted), 0.0)


# ---- the process belongs to the caller --------------------------------------------------------------------


@contextmanager
def default_of(setting: str) -> Iterator[None]:
    """An unusual default of the process, as a caller may have set it."""
    dtype = torch.get_default_dtype()
    try:
        if setting == "float64":
            torch.set_default_dtype(torch.float64)
        elif setting == "meta":
            torch.set_default_device("meta")
        elif setting == "deterministic":
            torch.use_deterministic_algorithms(True)
        modes: dict[str, Any] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
        modes["autocast"] = partial(torch.autocast, "cpu", torch.bfloat16)
        with modes.get(setting, nullcontext)():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)


def process_state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        signal.getsignal(signal.SIGINT),
        csv.field_size_limit(),
    )


@pytest.mark.parametrize("levers", [{}, {"lora_rank": 2}], ids=str)
@pytest.mark.parametrize(
    "setting", ["float64", "meta", "no_grad", "inference_mode", "deterministic", "autocast"]
)
def test_training_ends_the_same_under_every_default_and_leaves_it(
    setting: str, levers: dict[str, Any], tmp_path: Path
):
    recipe = replace(QUICK, steps=3, **levers)
    config = GPTConfig.of(TIED.as_dict() | {"drop_rate": 0.1})
    wanted, found = fresh(config), fresh(config)
    finetune(wanted, task(recipe), tmp_path / "wanted", recipe)
    with default_of(setting):
        before = process_state()
        path = finetune(found, task(recipe), tmp_path / "found", recipe)
        assert finetune(fresh_again(config), task(recipe), tmp_path / "found", recipe, resume=True) == path
        assert process_state() == before
    assert_same(weights(found), weights(wanted), 0.0)


def fresh_again(config: GPTConfig) -> GPTModel:
    """`fresh`, whatever the defaults are."""
    with torch.inference_mode(False), torch.device("cpu"):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return fresh(config)
        finally:
            torch.set_default_dtype(dtype)


def test_a_model_made_in_inference_mode_is_refused(tmp_path: Path):
    with torch.inference_mode():
        model = fresh()
    with pytest.raises(UsageError, match=r"made under torch.inference_mode does not train"):
        finetune(model, task(QUICK), tmp_path / "out", QUICK)


def test_two_threads_with_dropout_train_as_one_and_leave_the_generator(tmp_path: Path):
    recipe, config = replace(QUICK, steps=4), GPTConfig.of(TIED.as_dict() | {"drop_rate": 0.3})
    models = [fresh(config) for _ in range(3)]
    finetune(models[0], task(recipe), tmp_path / "alone", recipe)
    before = process_state()
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(finetune, m, task(recipe), tmp_path / str(i), recipe)
            for i, m in enumerate(models[1:])
        ]
        for run in runs:
            run.result()
    assert process_state() == before
    for model in models[1:]:
        assert_same(weights(model), weights(models[0]), 0.0)


def test_loading_adapters_and_a_bad_table_leave_the_process(tmp_path: Path):
    recipe, path = replace(QUICK, steps=1, lora_rank=2), tmp_path / "a.csv"
    finetune(fresh(), task(recipe), tmp_path / "out", recipe)
    path.write_text("text,label\na,b,c\n" + "word " * 99_999)
    model, before = fresh(), process_state()
    load_lora(model, tmp_path / "out" / "adapters.pth")
    with pytest.raises(UsageError) as error:
        read_records(path, ("text", "label"))
    assert "more cells than the header" in str(error.value)
    assert process_state() == before


# ---- batches -----------------------------------------------------------------------------------------------

GOOD = batch()


def changed(row: int, column: int, value: int) -> torch.Tensor:
    targets = GOOD.targets.clone()
    targets[row, column] = value
    return targets


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (GOOD.ids, "Batch.targets are a copy of ids; shift them: Batch"),
        (torch.where(GOOD.ids % 2 == 0, GOOD.ids, IGNORED), "Batch.targets are a copy of ids"),
        (changed(3, 11, -1), "Batch.targets holds -1; wanted 0 … 100 .-100 for a target to ignore"),
        (changed(0, 0, 101), "Batch.targets holds 101; wanted 0 … 100"),
        (GOOD.targets.int(), r"Batch.targets is .4, 12. torch.int32; wanted .B, T. torch.int64"),
        (GOOD.targets[:, 1:], r"Batch.targets is .4, 11. torch.int64; wanted"),
        (GOOD.targets[0], r"Batch.targets is .12,. torch.int64; wanted"),
        (torch.full_like(GOOD.ids, IGNORED), "every target of its batches is -100, so none counts"),
    ],
    ids=["unshifted", "unshifted, some", "-1", "beyond", "int32", "shorter", "one row", "none counts"],
)
def test_targets_that_teach_nothing_or_something_else_are_refused(
    targets: torch.Tensor, message: str, tmp_path: Path
):
    with pytest.raises(UsageError, match=message):
        finetune(fresh(), Task(lambda n: Batch(GOOD.ids, targets), []), tmp_path / "out", QUICK)
    good = lambda n: GOOD  # noqa: E731
    with pytest.raises(UsageError, match=message.replace("its batches", "the validation")):
        finetune(fresh(), Task(good, [Batch(GOOD.ids, targets)]), tmp_path / "new", QUICK)
    assert not (tmp_path / "new").exists()


def test_batches_that_are_unusual_and_right_train(tmp_path: Path):
    same = torch.full((2, 9), 5)
    with torch.inference_mode():
        written = row(0)
    last = torch.full_like(GOOD.ids, IGNORED)
    last[:, -1] = GOOD.ids[:, -1]
    for number, own in enumerate(
        (Batch(same, same), Batch(written[:, :-1], written[:, 1:]), Batch(GOOD.ids, last))
    ):
        recipe = replace(QUICK, steps=1, chunked_loss=bool(number % 2))
        finetune(fresh(), Task(lambda n, own=own: own, []), tmp_path / str(number), recipe)


# ---- commands and scripts ----------------------------------------------------------------------------------


def run_script(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, str(SCRIPTS / f"finetune_{name}.py")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", ["text", "instructions", "classifier"])
def test_the_examples_run_without_arguments_and_learn(name: str, tmp_path: Path):
    result = run_script(name, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    model = Path(result.stdout.splitlines()[-1])
    lines = read_metrics(model.parent)
    validated = [each for each in lines if "validation_loss" in each]
    assert validated[-1]["validation_loss"] < 0.5 * lines[0]["loss"]
    if name == "classifier":
        assert validated[-1]["accuracy"] >= 0.95
        assert json.loads((model.parent / "labels.json").read_text()) == ["he", "she"]
    else:
        written = subprocess.run(
            [sys.executable, "-m", "gpt2lite", "generate", "--model", str(model), "--prompt", "Weather for"],
            capture_output=True,
            text=True,
        )
        assert written.returncode == 0
        assert name != "text" or "Morning:" in written.stdout
    assert (model.parent / "loss.png").stat().st_size > 1000


def test_ctrl_c_saves_and_the_run_goes_on_from_there(tmp_path: Path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Once upon a time there lived a cat. " * 300)
    command = [
        sys.executable,
        "-m",
        "gpt2lite",
        "finetune",
        "--text",
        text,
        "--out",
        out,
        "--batch-size",
        "1",
    ]
    command += ["--seq-len", "16", "--steps", "400", "--save-every", "100000", "--validate-every", "100000"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not read_metrics(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    (state,) = out.glob("step-*.pth")
    step = int(state.stem.removeprefix("step-"))
    assert len(read_metrics(out)) == step < 400
    assert main([*map(str, command[3:]), "--resume"]) == 0
    assert [each["step"] for each in read_metrics(out)] == list(range(400))


@pytest.mark.parametrize(
    ("flag", "content", "words", "message"),
    [
        ("--text", "", (), "data.txt: is empty"),
        ("--text", "Too short.", (), "need a window of 257 tokens each; use a smaller --seq-len"),
        ("--text", "word " * 500, ("--learning-rate", "nan"), "learning_rate must be a finite number"),
        ("--text", "word " * 500, ("--seq-len", "257"), "seq_len=257 is more than the context of 256"),
        ("--text", b"\xff", (), "not UTF-8"),
        (
            "--instructions",
            '{"instruction": "a", "output": "b"}\n{"instruc',
            (),
            "data.jsonl, line 2: not JSON",
        ),
        ("--instructions", '{"instruction": "a"}\n', (), "data.jsonl, line 1: lacks output"),
        ("--classify", '{"text": "a", "label": 1}\n' * 3, (), "at least two labels, found 1"),
        ("--classify", '{"text": "a"}\n', (), "data.jsonl, line 1: lacks label"),
        ("--text", None, (), "data.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flag: str,
    content: str | bytes | None,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    path, out = tmp_path / ("data.txt" if flag == "--text" else "data.jsonl"), tmp_path / "out"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["finetune", flag, str(path), "--out", str(out), *words]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_is_not_empty_and_a_classifier_given_to_text_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("a word " * 500)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["finetune", "--text", str(text), "--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    classifier = save_pth(
        randomise(GPTModel(GPTConfig(50257, 8, 4, 2, 1, n_classes=2))).state_dict(), tmp_path
    )
    classifier.with_suffix(".json").write_text(json.dumps({"n_heads": 2}))
    words = ["finetune", str(classifier), "--text", str(text), "--out", str(tmp_path / "new")]
    if main(words) == 1:
        said = capsys.readouterr().err
        assert "classifier of 2 classes writes no text" in said or "TIKTOKEN_CACHE_DIR" in said
    assert not (tmp_path / "new").exists()


def classify(out: Path, labels: str, *words: object, data: str = "abc") -> int:
    """Three texts under three labels, twenty times."""
    rows = [{"text": text, "label": label} for text, label in zip(data, labels.split(), strict=True)] * 20
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--classify", path, "--out", out, "--seq-len", 8, *words]
    return main(["finetune", *map(str, flags)])


def test_ctrl_c_before_the_tokenizer_is_written_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = Beside.save

    def pressing(beside: Beside, checkpoint: Path) -> None:
        press()
        plain(beside, checkpoint)

    monkeypatch.setattr(Beside, "save", pressing)
    with suppress(KeyboardInterrupt):
        classify(tmp_path / "1", "red sky tree", "--steps", 1)
    assert (tmp_path / "1" / "model.tiktoken").exists()
    assert not (tmp_path / "1" / "loss.png").exists()


def test_a_classifier_keeps_its_rows_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert classify(tmp_path / "1", "red sky tree", "--steps", 1) == 0
    before = GPTModel.from_checkpoint(tmp_path / "1" / "model.pth").out_head
    capsys.readouterr()
    words = ("--steps", 1, "--learning-rate", 1e-12, tmp_path / "1" / "model.pth")
    assert classify(tmp_path / "2", "red azure tree", *words) == 0
    assert capsys.readouterr().out.startswith("labels kept: red, tree; new: azure; dropped: sky\n")
    assert open_model(tmp_path / "2" / "model.pth").labels == ("azure", "red", "tree")
    after = GPTModel.from_checkpoint(tmp_path / "2" / "model.pth").out_head
    for part in ("weight", "bias"):
        torch.testing.assert_close(getattr(after, part)[1:], getattr(before, part)[::2], rtol=0, atol=1e-6)
    assert not torch.allclose(after.weight[0], before.weight[1], atol=1e-3)
    assert classify(tmp_path / "3", "tree sky red", *words) == 0
    assert "labels kept" not in capsys.readouterr().out


def test_labels_of_another_model_or_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    classify(tmp_path / "1", "red sky tree", "--steps", 1)
    labels, model = tmp_path / "1" / "labels.json", tmp_path / "1" / "model.pth"
    for content, message in (
        ('["sky", "red", "tree"]', "the config in it says red, sky, tree, but "),
        ('["sky", "red", "tree"]', "labels.json says sky, red, tree. Is one of them another run's?"),
        (
            '["red", "sky"]',
            "labels.json: wanted 3 names of classes, in the order of the head's rows, found ['red', 'sky']",
        ),
        ('["red", "sky"', "labels.json: not valid JSON"),
        ('{"red": 0}', "labels.json: holds a JSON dict, expected a list"),
    ):
        labels.write_text(content)
        assert classify(tmp_path / "2", "red sky tree", "--steps", 1, model) == 1
        assert message in capsys.readouterr().err
    labels.unlink()
    assert open_model(model).labels == ("red", "sky", "tree")
    unnamed = GPTModel.from_checkpoint(model)
    unnamed.purpose = Purpose()
    unnamed.save_checkpoint(model)
    (tmp_path / "1" / "step-000001.pth").unlink()
    assert classify(tmp_path / "2", "red sky tree", "--steps", 1, model) == 1
    assert "no names for a head of 3 classes; write labels.json" in capsys.readouterr().err
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize("labels", ["ab", ("a", "a"), ("a", 1)], ids=str)
def test_labels_that_name_no_classes_are_refused(labels: Any):
    with pytest.raises(UsageError, match=r"Task.labels: wanted 2 names of classes, in the order of the head"):
        Task(labelled, [], labels=labels)
    assert Task(labelled, [], labels=["a", "b"]).labels == ("a", "b")


def labelled_run(out: Path, *labels: str) -> Path:
    model = fresh(TINY)
    as_classifier(model, 2)
    own = Task(labelled, [labelled(99)], labels=labels)
    return finetune(model, own, out, replace(QUICK, steps=2, warmup_steps=0))


@pytest.mark.parametrize("swapped", ["model.pth", "labels.json"])
def test_labels_are_bound_to_their_model(swapped: str, tmp_path: Path):
    one, two = labelled_run(tmp_path / "1", "even", "odd"), labelled_run(tmp_path / "2", "odd", "even")
    (two.parent / swapped).replace(one.parent / swapped)
    said = {"model.pth": ("odd, even", "even, odd"), "labels.json": ("even, odd", "odd, even")}[swapped]
    message = r"1/model.pth, the config in it says {}, but .*1/labels.json says {}. Is one of them another"
    with pytest.raises(CheckpointError, match=message.format(*said)):
        _ = open_model(one).labels


def test_every_file_with_a_classifiers_head_says_its_labels(tmp_path: Path):
    path = labelled_run(tmp_path / "out", "even", "odd")
    path.with_name("labels.json").unlink()
    convert(path, tmp_path / "other.safetensors")
    convert(path, tmp_path / "other.pth")
    convert(path, tmp_path / "folder", format="per-tensor")
    assert torch.load(path, weights_only=True).keys() == GPTModel.from_checkpoint(path).state_dict().keys()
    for name in ("out/model.pth", "out/step-000002.pth", "other.safetensors", "other.pth", "folder"):
        assert open_model(tmp_path / name).labels == ("even", "odd")
    with pytest.raises(
        UsageError, match=r"labels: wanted 2 names of classes, in the order of the head's rows, found .'even'"
    ):
        GPTModel.from_checkpoint(path).save_checkpoint(tmp_path / "new.pth", labels=["even"])
    for wrong in (["even", "even"], ["even", 1], "ab"):
        with pytest.raises(UsageError, match="wanted 2 names of classes"):
            GPTModel.from_checkpoint(path).save_checkpoint(tmp_path / "new.pth", labels=wrong)
    with pytest.raises(UsageError, match="wanted 0 names"):
        fresh().save_checkpoint(tmp_path / "new.pth", labels=["even"])
    assert not (tmp_path / "new.pth").exists()


@pytest.mark.parametrize(
    ("said", "labels"),
    [
        ({"0": "no", "1": "yes"}, ("no", "yes")),
        ({"1": "yes", "0": "no"}, ("no", "yes")),
        ({"0": "LABEL_0", "1": "LABEL_1"}, ()),
        (None, ()),
    ],
    ids=["ordered", "turned", "placeholders", "none"],
)
def test_labels_of_transformers_are_read(
    said: dict[str, str] | None, labels: tuple[str, ...], tmp_path: Path
):
    model = fresh(TINY)
    as_classifier(model, 2)
    save_pth(model.state_dict(), tmp_path)
    config = {"model_type": "gpt2", "n_head": 4} | ({"id2label": said} if said else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path / "model.pth").labels == labels
    (tmp_path / "labels.json").write_text('["no", "yes"]')
    assert open_model(tmp_path / "model.pth").labels == ("no", "yes")


def test_the_command_resumes_with_the_runs_own_recipe(tmp_path: Path):
    out = tmp_path / "1"
    assert classify(out, "red sky tree", "--steps", 2, "--clip", 3, "--lora-targets", "W_key") == 0
    with pytest.warns(UserWarning, match="steps=2; from step 2 on it is steps=4"):
        assert classify(out, "red sky tree", "--resume", "--steps", 4) == 0
    assert len(read_metrics(out)) == 4
    saved = GPTModel.from_checkpoint(out / "model.pth")
    assert {p.dtype for p in saved.parameters()} == {torch.float16}  # as the embedded model came


# ---- forecasts ---------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, torch
from gpt2lite import GPTConfig, GPTModel, Recipe, forecast_training, track_memory
from gpt2lite.finetuning.data import Batch
from gpt2lite.finetuning.training import Trainer, choose_trained
def run(config, recipe, length):
    model = GPTModel(config)
    choose_trained(model, recipe)
    trainer = Trainer(model, recipe)
    ids = torch.randint(100, (recipe.batch_size, length + 1))
    for number in range(3):
        trainer.step(number, [Batch(ids[:, :-1], ids[:, 1:])] * recipe.accumulate)
recipe = Recipe(**{"batch_size": 4, "seq_len": 256} | json.loads(sys.argv[1]))
config = GPTConfig(8000, 256, 512, 8, 6, tied_head=True)
run(GPTConfig(100, 16, 16, 2, 2, tied_head=True), recipe, 16)
with track_memory() as memory:
    run(config, recipe, recipe.seq_len)
foretold = forecast_training(lambda: GPTModel(config), recipe)
print(json.dumps([memory.peak_host_anonymous, foretold.peak]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"recompute": True, "step_in_backward": True, "clip": 0.0},
        {"lora_rank": 8},
        {"chunked_loss": False},
        # Few tokens: a CPU without bf16 takes minutes for what others do in seconds.
        {"autocast": True, "batch_size": 1, "seq_len": 64},
        {"autocast": True, "batch_size": 1, "seq_len": 64, "lora_rank": 8},
    ],
    ids=str,
)
def test_training_takes_what_was_forecast(levers: dict[str, Any]):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(levers)], capture_output=True, text=True
    )
    measured, foretold = json.loads(result.stdout.splitlines()[-1])
    assert abs(foretold - measured) <= max(0.03 * measured, 24 * MIB)


def test_plan_tells_training_and_fits_it(pth: Path, capsys: pytest.CaptureFixture[str]):
    words = ["plan", str(pth), "--n-heads", "4", "--train", "--batch-size", "8", "--seq-len", "32"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "peak"
    assert main([*words, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["forecast"]
    assert whole["optimizer"] == 2 * whole["gradients"] == 2 * whole["weights"]
    assert main([*words, "--fit", f"{whole['peak'] - 1}B", "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["fits"]
    assert fitted["forecast"]["peak"] < whole["peak"]
    assert fitted["levers"]
    assert main([*words, "--fit", "1KiB"]) == 1
    assert "1.0 KiB: does not fit in any way; the least takes" in capsys.readouterr().out
    assert main([*words, "--fit", f"{whole['peak'] - 1}B", "--lora-rank", "2"]) == 0
    assert "fits as asked" in capsys.readouterr().out
    assert main([*words, "--fit", f"{whole['peak'] - 1}B"]) == 0
    assert "does not fit as asked; it would with\n" in capsys.readouterr().out


def test_only_levers_that_are_needed_are_named():
    peaks = {"recompute": 40, "batch_size": 20}  # what each saves of 100; the others save nothing
    changed = Recipe(batch_size=4)

    def predict(recipe: Recipe) -> TrainingForecast:
        saved = sum(saved for name, saved in peaks.items() if getattr(recipe, name) != getattr(changed, name))
        return TrainingForecast(0, 0, 0, 0, 0, 0, 0, 100 - saved)

    def named(limit: int) -> list[str]:
        return [lever for lever, _ in find_levers(changed, limit, predict)[0]]

    assert named(100) == []
    assert named(60) == ["recompute=True"]
    assert named(40) == ["recompute=True", "batch_size=1 (was 4)"]
    assert named(10) == named(40)  # nothing fits: the lowest peak
    for asked in ({"lora_rank": 4}, {"last_blocks": 1}):
        levers, _ = find_levers(replace(changed, **asked), 10, predict)
        assert not [lever for lever, _ in levers if "lora" in lever or "last_blocks" in lever]


def test_plan_counts_a_classifiers_head(pth: Path, capsys: pytest.CaptureFixture[str]):
    words = ["plan", str(pth), "--n-heads", "4", "--train", "--json", "--batch-size", "2", "--seq-len", "8"]
    found = []
    for more in ([], ["--classes", "3"]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["forecast"]["weights"])
    assert found[0] - found[1] == 4 * (101 * 48 - 3 * 48 - 3)


def test_targets_in_any_form_are_the_same_recipe():
    assert Recipe(lora_targets=["W_key"]) == Recipe(lora_targets="W_key") == Recipe(lora_targets=("W_key",))


@pytest.mark.parametrize("options", [(0,), (-1,), (2.0,), (2, None), (2, 1.5), (2, 2**64), (2, -1)])
def test_a_head_is_refused_before_the_model_is_changed(options: tuple, model: GPTModel):
    with pytest.raises(UsageError, match="must be an int of at least"):
        as_classifier(model, *options)
    assert not model.config.n_classes
