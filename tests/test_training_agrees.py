"""Random recipes against a loop in plain fp64, written here; cut and resumed; run again on the same model."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, randomise
from torch import Tensor
from torch.func import functional_call

from gpt2lite import Batch, CheckpointError, GPTConfig, GPTModel, Recipe, Task, UsageError, finetune
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning.data import IGNORED
from gpt2lite.finetuning.loop import read_metrics
from gpt2lite.finetuning.lora import add_lora
from gpt2lite.finetuning.training import choose_trained

STEPS, BETAS, EPS = 10, (0.9, 0.95), 1e-8


def fresh(rng: random.Random, drop_rate: float = 0.0) -> GPTModel:
    tied, dtype = (
        rng.random() < 0.5,
        rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(rng.randrange(1000))
        return GPTModel(GPTConfig(61, 16, 24, 2, 2, tied_head=tied, drop_rate=drop_rate)).to(dtype).eval()


def recipe_of(rng: random.Random) -> Recipe:
    in_backward = rng.random() < 0.3
    trained: list[dict[str, Any]] = [
        {},
        {"last_blocks": 1},
        {"lora_rank": 3, "lora_alpha": 2.0, "lora_targets": ("W_value", "layers.0")},
    ]
    return Recipe(
        steps=STEPS,
        batch_size=2,
        accumulate=1 if in_backward else rng.choice([1, 3]),
        learning_rate=rng.choice([1e-3, 3e-3]),
        warmup_steps=rng.choice([0, 3]),
        weight_decay=rng.choice([0.0, 0.2]),
        clip=0.0 if in_backward else rng.choice([0.0, 0.3]),
        seed=rng.randrange(2**32),
        autocast=rng.random() < 0.25,
        recompute=rng.random() < 0.5,
        chunked_loss=rng.random() < 0.5,
        step_in_backward=in_backward,
        **rng.choice(trained),
    )


def draw(number: int) -> Batch:
    """Rows of which some targets do not count, another number of them in each batch."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(61, (2, 17), generator=generator)
    counts = torch.rand(2, 16, generator=generator) < 0.2 + 0.1 * (number % 7)
    counts[0, 0] = True
    return Batch(ids[:, :-1], torch.where(counts, ids[:, 1:], IGNORED))


TASK = Task(draw, [])


def with_adapters(base: dict[str, Tensor], trained: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """All weights of the plain model, from what is trained and what is not."""
    weights = base | {name: tensor for name, tensor in trained.items() if ".lora." not in name}
    for name in [name for name in trained if name.endswith(".lora.A")]:
        layer = name.removesuffix(".lora.A")
        added = alpha * (trained[name] @ trained[f"{layer}.lora.B"]).T
        weights[f"{layer}.weight"] = base[f"{layer}.weight"] + added
    return weights


def plain_run(model: GPTModel, recipe: Recipe) -> tuple[list[float], dict[str, Tensor]]:
    """(the loss of each step, the weights at the end) of the recipe in fp64, without any of our loop."""
    adapted = copy.deepcopy(model).to(torch.promote_types(model.pos_emb.weight.dtype, torch.float32))
    choose_trained(adapted, recipe)  # for the adapters' first values
    trained = {n: p.detach().double() for n, p in adapted.named_parameters() if p.requires_grad}
    plain = copy.deepcopy(model).double()
    base = {name: p.detach() for name, p in plain.named_parameters()}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in trained.items()}
    losses = []
    for step in range(recipe.steps):
        batches = [draw(step * recipe.accumulate + part) for part in range(recipe.accumulate)]
        leaves = {name: p.requires_grad_() for name, p in trained.items()}
        weights = with_adapters(base, leaves, recipe.lora_alpha)
        ids, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        logits = functional_call(plain, weights, (ids,))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        scale = min(1.0, recipe.clip / (float(norm) + 1e-6)) if recipe.clip else 1.0
        rate = recipe.learning_rate_at(step)
        for (name, p), grad in zip(leaves.items(), grads, strict=True):
            first, second = moments[name]
            first.lerp_(scale * grad, 1 - BETAS[0])
            second.lerp_((scale * grad) ** 2, 1 - BETAS[1])
            size = (second / (1 - BETAS[1] ** (step + 1))).sqrt() + EPS
            kept = p.detach() * (1 - rate * (recipe.weight_decay if p.dim() > 1 else 0.0))
            trained[name] = kept - rate * first / (1 - BETAS[0] ** (step + 1)) / size
        losses.append(float(loss.detach()))
    return losses, with_adapters(base, trained, recipe.lora_alpha)


def bounds(dtype: torch.dtype, recipe: Recipe) -> tuple[float, float]:
    """(of a loss, of a weight): rounding in what it trains in, then in what it is saved in.

    Adam divides by what may be near nothing, so rounding of a gradient may turn a step: with autocast, all.
    """
    saved = 2 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    if recipe.autocast:
        return 3e-2, 2 * STEPS * recipe.learning_rate + saved
    return (1e-9, 1e-9) if dtype == torch.float64 else (2e-5, 0.1 * recipe.learning_rate + saved)


@pytest.mark.parametrize("seed", range(16))
def test_a_random_recipe_trains_as_plain_fp64(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    model, recipe = fresh(rng), recipe_of(rng)
    dtype = model.pos_emb.weight.dtype
    losses, weights = plain_run(model, recipe)
    path = finetune(model, TASK, tmp_path / "out", recipe)
    of_loss, of_weight = bounds(dtype, recipe)
    found = [each["loss"] for each in read_metrics(tmp_path / "out")]
    assert found == pytest.approx(losses, rel=of_loss)
    for name, parameter in GPTModel.from_checkpoint(path).named_parameters():
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter.double(), weights[name], rtol=0, atol=of_weight, msg=name)


@pytest.mark.parametrize("seed", range(16))
def test_a_random_recipe_cut_at_a_random_step_ends_with_the_same_bits(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    model, recipe = fresh(rng, rng.choice([0.0, 0.2])), recipe_of(rng)
    recipe = replace(recipe, save_every=rng.randrange(1, 5))
    cut, base = rng.randrange(STEPS), copy.deepcopy(model)
    whole = finetune(model, TASK, tmp_path / "whole", recipe)

    def stop(metrics: Any) -> None:
        if metrics.step == cut:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        finetune(copy.deepcopy(base), TASK, tmp_path / "cut", recipe, report=stop)
    found = finetune(base, TASK, tmp_path / "cut", recipe, resume=True)
    assert found.read_bytes() == whole.read_bytes()
    logged = [[(each["step"], each["loss"]) for each in read_metrics(p.parent)] for p in (whole, found)]
    assert logged[0] == logged[1]


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_computes_with_the_weights_as_they_are(outer: bool, tmp_path: Path):
    """Autocast keeps the casts of weights until the outermost one ends: those would be of the first step."""
    recipe = Recipe(steps=6, batch_size=2, learning_rate=0.05, warmup_steps=0, autocast=True)
    model, losses = fresh(random.Random(1)).float(), list[float]()
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        finetune(model, TASK, tmp_path / "out", recipe, report=lambda metrics: losses.append(metrics.loss))
    plain, again = fresh(random.Random(1)).float(), list[float]()
    report = lambda metrics: again.append(metrics.loss)  # noqa: E731
    finetune(plain, TASK, tmp_path / "plain", replace(recipe, autocast=False), report=report)
    assert losses == pytest.approx(again, rel=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_a_second_run_on_a_model_is_that_on_a_copy_of_it(seed: int, tmp_path: Path):
    rng = random.Random(seed)
    model = fresh(rng, rng.choice([0.0, 0.2]))
    finetune(model, TASK, tmp_path / "first", recipe_of(rng))
    again, other = recipe_of(rng), GPTModel(model.config).to(model.pos_emb.weight.dtype)
    other.load_state_dict(model.state_dict())
    paths = [finetune(each, TASK, tmp_path / str(i), again) for i, each in enumerate((model, other))]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_embedded_model_learns_alike_in_files_of_every_dtype(tmp_path: Path):
    def counted(number: int) -> Batch:
        first = torch.randint(900, (4, 1), generator=torch.Generator().manual_seed(number))
        rows = (first + torch.arange(25) * 5) % 1000
        return Batch(rows[:, :-1], rows[:, 1:])

    recipe, ends = Recipe(steps=12, batch_size=4, learning_rate=1e-3, warmup_steps=2), []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = GPTModel.from_checkpoint(EMBEDDED, dtype=dtype)
        model.save_checkpoint(tmp_path / "start.pth")
        model, out = GPTModel.from_checkpoint(tmp_path / "start.pth"), tmp_path / str(dtype)
        finetune(model, Task(counted, [counted(10**6)]), out, replace(recipe, seed=len(ends)))
        ends.append(read_metrics(out)[-1]["validation_loss"])
        assert ends[-1] < 0.9 * read_metrics(out)[0]["loss"]
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-2)


NO_MODELS: dict[str, tuple[Any, str]] = {
    "DataParallel": (
        lambda model: torch.nn.DataParallel(model),
        "trains a GPTModel, got DataParallel; unwrap",
    ),
    "another class": (lambda model: torch.nn.Linear(2, 2), "trains a GPTModel, got Linear"),
    "fp8": (
        lambda model: model.to(torch.float8_e4m3fn),
        "a model of torch.float8_e4m3fn does not train; load",
    ),
    "fp64 in fp32": (
        lambda model: [model.trf_blocks[0].double(), model][1],
        "float32 and torch.float64 does",
    ),
}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_does_not_train_is_refused_before_anything_is_written(kind: str, tmp_path: Path):
    made, message = NO_MODELS[kind]
    with pytest.raises(UsageError, match=message):
        finetune(made(fresh(random.Random(0)).float()), TASK, tmp_path / "out", Recipe(steps=1))
    assert not (tmp_path / "out").exists()


def test_a_hook_that_the_file_will_not_have_is_said(tmp_path: Path):
    model = fresh(random.Random(0)).float()
    model.trf_blocks[1].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.warns(UserWarning, match=r"trf_blocks.1 has forward hooks; what they change will not be in"):
        finetune(model, TASK, tmp_path / "out", Recipe(steps=1))


def test_dropout_that_the_caller_set_is_drawn_again_by_the_seed_alone(tmp_path: Path):
    def run(name: str, **levers: Any) -> Tensor:
        model = fresh(random.Random(0)).float()
        model.trf_blocks[0].drop_resid.p = model.trf_blocks[1].att.drop_rate = 0.5
        torch.rand(len(name))
        finetune(model, TASK, tmp_path / name, Recipe(steps=3, **levers))
        return model.tok_emb.weight.detach()

    first = run("first")
    assert torch.equal(run("again"), first)
    torch.testing.assert_close(run("with the blocks run twice", recompute=True), first, rtol=0, atol=1e-6)


def test_a_model_saved_with_adapters_says_their_alpha(tmp_path: Path):
    model = randomise(GPTModel(TINY))
    add_lora(model, Recipe(lora_rank=4, lora_alpha=8))
    wanted = randomise(model)(IDS := torch.arange(5)[None])
    path = model.save_checkpoint(tmp_path / "adapted.pth")
    torch.testing.assert_close(GPTModel.from_checkpoint(path, lora_alpha=8)(IDS), wanted)
    with pytest.raises(CheckpointError, match="lora_alpha=8, wanted 4"):
        GPTModel.from_checkpoint(path, lora_alpha=4)
