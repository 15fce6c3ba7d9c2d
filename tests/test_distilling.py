"""Learning from a teacher: the loss and its gradients, the run, what it costs, and that it is worth it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt2lite
from gpt2lite import GPTConfig, GPTModel, Recipe, UsageError
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning.data import Batch, text_batches, text_windows
from gpt2lite.finetuning.distilling import load_teacher
from gpt2lite.finetuning.losses import ROWS_TAUGHT, Teaching, summed_loss
from gpt2lite.finetuning.states import Task
from gpt2lite.finetuning.tasks import held_out
from gpt2lite.tokenizer import tokenizer_for

SIZES = {"vocab_size": 61, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
CPU = torch.device("cpu")


def made(path: Path, seed: int = 0, **fields: Any) -> Path:
    torch.manual_seed(seed)
    model = GPTModel(SIZES | fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * 0.1
    return model.save_checkpoint(path)


def task_of(tokens: Tensor, seq_len: int = 16, batch_size: int = 4) -> Task:
    train = text_batches(tokens, seq_len, batch_size, 0)
    return Task(train, text_windows(tokens, seq_len, batch_size, 8))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(61, (400,), generator=torch.Generator().manual_seed(5))


def hinton(logits: Tensor, theirs: Tensor, targets: Tensor, alpha: float, temperature: float) -> Tensor:
    """The loss as the paper says it, whole and in its own dtype."""
    wanted, found = (theirs / temperature).softmax(1), (logits / temperature).softmax(1)
    divergence = (wanted * (wanted.log() - found.log())).sum()
    return (1 - alpha) * F.cross_entropy(
        logits, targets, reduction="sum"
    ) + alpha * temperature**2 * divergence


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("rows", [1, ROWS_TAUGHT, 3 * ROWS_TAUGHT + 5])
def test_loss_and_gradients_are_those_of_the_paper(alpha: float, temperature: float, rows: int):
    torch.manual_seed(0)
    head, teacher = nn.Linear(24, 97).double(), nn.Linear(40, 97).double()
    hidden, theirs = torch.randn(rows, 24).double().requires_grad_(), torch.randn(rows, 40).double()
    targets = torch.randint(97, (rows,))
    parts = (hidden, head.weight, head.bias)
    with torch.no_grad():
        teaching = Teaching(teacher, theirs, alpha, temperature)
        wanted_logits = teacher(theirs)
    found = summed_loss(head, hidden, targets, chunked=True, teaching=teaching)
    wanted = hinton(head(hidden), wanted_logits, targets, alpha, temperature)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for ours, theirs_ in zip(
        torch.autograd.grad(found, parts), torch.autograd.grad(wanted, parts), strict=True
    ):
        assert torch.allclose(ours, theirs_, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3 * ROWS_TAUGHT + 5])
def test_hidden_states_are_drawn_together_as_mean_squares_say(rows: int):
    torch.manual_seed(0)
    head, teacher = nn.Linear(24, 97).double(), nn.Linear(24, 97).double()
    hidden, theirs = torch.randn(rows, 24).double().requires_grad_(), torch.randn(rows, 24).double()
    targets, parts = torch.randint(97, (rows,)), (hidden, head.weight, head.bias)
    with torch.no_grad():
        teaching, logits = Teaching(teacher, theirs, 0.3, 2.0, hidden_weight=5.0), teacher(theirs)
    found = summed_loss(head, hidden, targets, chunked=True, teaching=teaching)
    wanted = hinton(head(hidden), logits, targets, 0.3, 2.0) + 5.0 * F.mse_loss(hidden, theirs) * rows
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    pairs = zip(torch.autograd.grad(found, parts), torch.autograd.grad(wanted, parts), strict=True)
    assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-12) for pair in pairs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_plain_loop_in_fp64(accumulate: int, tokens: Tensor, tmp_path: Path):
    teacher, student = (
        made(tmp_path / "teacher.pth", 1, n_layers=3, emb_dim=48),
        made(tmp_path / "student.pth"),
    )
    recipe = Recipe(
        steps=5, batch_size=4, accumulate=accumulate, teacher=str(teacher), alpha=0.7, temperature=3.0,
        warmup_steps=0, clip=0.0,
    )  # fmt: skip
    model, task = GPTModel.from_checkpoint(student), task_of(tokens)
    plain, teaching = GPTModel.from_checkpoint(student).double(), GPTModel.from_checkpoint(teacher).double()
    found = []
    gpt2lite.finetune(
        model, task, tmp_path / "out", recipe, report=lambda metrics: found.append(metrics.loss)
    )
    decays = [[p for p in plain.parameters() if (p.dim() < 2) == flat] for flat in (False, True)]
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(decays, (0.1, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        batches = [task.train(step * accumulate + part) for part in range(accumulate)]
        loss = torch.zeros((), dtype=torch.float64)
        for ids, targets in batches:
            with torch.no_grad():
                theirs = teaching(ids).flatten(0, 1)
            loss = loss + hinton(plain(ids).flatten(0, 1), theirs, targets.flatten(), 0.7, 3.0)
        loss = loss / sum(batch.targets.numel() for batch in batches)
        assert found[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, ours), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not name.endswith("W_key.bias"):  # whose gradient is rounding alone: softmax does not see it
            assert torch.allclose(ours, wanted.float(), atol=2e-5), name


@pytest.mark.parametrize(
    "levers",
    [
        {"recompute": True},
        {"step_in_backward": True, "clip": 0.0},
        {"lora_rank": 4},
        {"last_blocks": 1},
        {"autocast": True},
        {"teacher_dtype": "bfloat16"},
        {"teacher_dtype": "int8"},
    ],
    ids=lambda levers: " ".join(levers),
)
def test_levers_compose_with_a_teacher_and_a_cut_run_ends_with_the_same_bits(
    levers: dict[str, Any], tokens: Tensor, tmp_path: Path
):
    teacher, student = made(tmp_path / "teacher.pth", 1, n_layers=3), made(tmp_path / "student.pth")
    recipe = Recipe(steps=4, save_every=2, teacher=str(teacher), alpha=1.0, **levers)
    whole = GPTModel.from_checkpoint(student)
    gpt2lite.finetune(whole, task_of(tokens), tmp_path / "whole", recipe)

    def cut(metrics: Any) -> None:
        if metrics.step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        gpt2lite.finetune(
            GPTModel.from_checkpoint(student), task_of(tokens), tmp_path / "cut", recipe, report=cut
        )
    again = GPTModel.from_checkpoint(student)
    gpt2lite.finetune(again, task_of(tokens), tmp_path / "cut", recipe, resume=True)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in whole.state_dict().items())
    plain = GPTModel.from_checkpoint(student)
    alone = replace(recipe, teacher="", alpha=0.5, teacher_dtype="float32")
    gpt2lite.finetune(plain, task_of(tokens), tmp_path / "plain", alone)
    assert any(not torch.equal(plain.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_a_run_is_resumed_with_its_own_teacher(tokens: Tensor, tmp_path: Path):
    teacher, student = made(tmp_path / "teacher.pth", 1), made(tmp_path / "student.pth")
    recipe = Recipe(steps=2, save_every=1, teacher=str(teacher))
    gpt2lite.finetune(GPTModel.from_checkpoint(student), task_of(tokens), tmp_path / "out", recipe)
    more, model = replace(recipe, steps=3), GPTModel.from_checkpoint(student)
    others = {"teacher": "", "alpha": 0.1, "temperature": 1.0, "hidden_weight": 1.0, "teacher_dtype": "int8"}
    for name, value in others.items():
        with pytest.raises(UsageError, match="resume with the same"):
            gpt2lite.finetune(
                model, task_of(tokens), tmp_path / "out", replace(more, **{name: value}), resume=True
            )
    made(teacher, 2)
    with pytest.raises(UsageError, match="another teacher"):
        gpt2lite.finetune(model, task_of(tokens), tmp_path / "out", more, resume=True)
    made(teacher, 1)
    with pytest.warns(UserWarning, match="steps"):
        gpt2lite.finetune(model, task_of(tokens), tmp_path / "out", more, resume=True)


@pytest.mark.parametrize(
    ("fields", "recipe", "said"),
    [
        ({"vocab_size": 62}, {}, "vocabulary of 62"),
        ({"context_length": 8}, {}, "context of 8"),
        ({"n_classes": 3, "head_bias": True}, {}, "no classifiers"),
        ({"emb_dim": 48}, {"hidden_weight": 1.0}, "widths of 48 and 32; they must be equal"),
    ],
)
def test_who_cannot_teach_is_refused_before_a_folder_is_made(
    fields: dict[str, Any], recipe: dict[str, Any], said: str, tokens: Tensor, tmp_path: Path
):
    teacher, student = made(tmp_path / "teacher.pth", **fields), made(tmp_path / "student.pth")
    with pytest.raises(UsageError, match=said):
        gpt2lite.finetune(
            GPTModel.from_checkpoint(student),
            task_of(tokens),
            tmp_path / "out",
            Recipe(teacher=str(teacher), **recipe),
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=said):
        gpt2lite.forecast_training(lambda: GPTModel(SIZES), Recipe(teacher=str(teacher), **recipe))


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 1.1}, {"alpha": -0.1}, {"alpha": True}, {"temperature": 0}, {"temperature": float("nan")},
        {"teacher": None}, {"teacher": 3}, {"teacher": "x", "teacher_dtype": "fp4"},
        {"alpha": 0.9},
        {"temperature": 1.0},
        {"teacher_dtype": "int8"},
        {"teacher": "x", "chunked_loss": False}, {"teacher": "x", "compile": True},
    ],
)  # fmt: skip
def test_recipes_that_cannot_work_are_refused(values: dict[str, Any]):
    with pytest.raises(UsageError):
        Recipe(**values)


def test_a_classifier_is_not_taught(tokens: Tensor, tmp_path: Path):
    teacher = made(tmp_path / "teacher.pth")
    model = GPTModel.from_checkpoint(teacher)
    gpt2lite.as_classifier(model, 2)
    batch = Batch(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[-100, -100, -100, 0]] * 2))
    task = Task(lambda number: batch, [batch], labels=("no", "yes"))
    with pytest.raises(UsageError, match="no classifiers"):
        gpt2lite.finetune(model, task, tmp_path / "out", Recipe(teacher=str(teacher)))


def test_a_mapped_teacher_takes_no_memory_and_one_that_is_cast_does(tmp_path: Path):
    teacher = made(tmp_path / "teacher.pth", n_layers=4, emb_dim=64)
    forecasts = {
        dtype: gpt2lite.forecast_training(
            lambda: GPTModel(SIZES), Recipe(teacher=str(teacher), teacher_dtype=dtype)
        )
        for dtype in ("float32", "bfloat16", "int8")
    }
    nbytes = gpt2lite.open_model(teacher).plan().model_bytes
    assert forecasts["float32"].teacher < nbytes / 10
    assert forecasts["float32"].teacher_mapped >= nbytes
    assert forecasts["bfloat16"].teacher == pytest.approx(nbytes / 2, rel=0.1)
    assert forecasts["int8"].teacher < nbytes / 2
    loaded = load_teacher(GPTModel(SIZES), Recipe(teacher=str(teacher)), CPU)
    assert loaded is not None
    assert not loaded.training


def test_the_command_distils_what_it_pruned(tmp_path: Path, capsys: pytest.CaptureFixture):
    from gpt2lite.cli import main

    stories = Path(__file__).parent.parent / "scripts" / "stories.py"
    command = [sys.executable, str(stories), "--seed", "3", "--count", "40"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (tmp_path / "text.txt").write_text(text)
    small = gpt2lite.prune(EMBEDDED, tmp_path / "small.pth", blocks=[0, 1])
    flags = [
        "--steps",
        "3",
        "--seq-len",
        "32",
        "--batch-size",
        "2",
        "--teacher",
        str(EMBEDDED),
        "--alpha",
        "0.9",
    ]
    assert (
        main(
            [
                "finetune",
                str(small),
                "--text",
                str(tmp_path / "text.txt"),
                "--out",
                str(tmp_path / "out"),
                *flags,
            ]
        )
        == 0
    )
    assert GPTModel.from_checkpoint(tmp_path / "out" / "model.pth").config.n_layers == 2
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["loss"] > 0
    capsys.readouterr()
    assert main(["plan", str(small), "--train", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"]["teacher"] > 0  # stored in fp16, cast to fp32
    assert GPTConfig.of(gpt2lite.open_model(small).config).n_layers == 2


def test_the_command_prunes_and_distils_in_one_go(tmp_path: Path, capsys: pytest.CaptureFixture):
    from gpt2lite.cli import main

    words = ("Once upon a time there was a fox. ", "Ella had a lantern. ", "Tom lived by the river. ")
    text = "".join(words[at * at % 3] + words[at % 3] for at in range(300))
    (tmp_path / "text.txt").write_text(text)
    command = ["finetune", str(EMBEDDED), "--text", str(tmp_path / "text.txt"), "--seq-len", "32"]
    command += ["--batch-size", "2", "--teacher", str(EMBEDDED), "--keep-blocks", "2"]
    assert main([*command, "--steps", "2", "--out", str(tmp_path / "whole")]) == 0
    encoding = tokenizer_for(EMBEDDED, 1024)
    ids = torch.tensor(encoding.encode(text))
    chosen = gpt2lite.choose_blocks(GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32), held_out(ids), 2)
    assert f"blocks {chosen.kept[0]}, {chosen.kept[1]} of 4" in capsys.readouterr().out
    ours = GPTModel.from_checkpoint(tmp_path / "whole" / "model.pth")
    assert ours.config.n_layers == 2

    assert main([*command, "--steps", "1", "--out", str(tmp_path / "cut")]) == 0
    with pytest.warns(UserWarning, match="was made with steps=1"):
        assert main([*command, "--steps", "2", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert GPTModel.from_checkpoint(tmp_path / "cut" / "model.pth").config.n_layers == 2

    records = ["finetune", str(EMBEDDED), "--classify", str(tmp_path / "text.txt"), "--keep-blocks", "2"]
    assert main([*records, "--out", str(tmp_path / "no")]) == 1
    assert "--keep-blocks chooses by --text" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_teacher_of_another_language_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    from gpt2lite.cli import main

    small = gpt2lite.prune(EMBEDDED, tmp_path / "small.pth", blocks=[0])
    other = gpt2lite.prune(EMBEDDED, tmp_path / "other.pth", blocks=[0])
    ranks = (tmp_path / "other.tiktoken").read_text().splitlines()
    swapped = [(ranks[at ^ 1] if at < 2 else line).split()[0] + f" {at}" for at, line in enumerate(ranks)]
    (tmp_path / "other.tiktoken").write_text("\n".join(swapped) + "\n")
    (tmp_path / "text.txt").write_text("Once upon a time there was a fox. " * 200)
    words = ["finetune", str(small), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert main([*words, "--steps", "1", "--teacher", str(other)]) == 1
    assert "both must use the same tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
