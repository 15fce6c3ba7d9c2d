"""Perplexity against a loop written by the protocol around transformers, and what int8 costs of it."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise
from test_loading import HEADS, huggingface, save_pth

from gpt2lite import GPTConfig, GPTModel, UsageError, evaluate
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.evaluation import Evaluation, loss_of, windows
from gpt2lite.tokenizer import tokenizer_for

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def stories() -> str:
    """Held-out ones, which the embedded model has not read."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        from stories import stories
    finally:
        sys.path.remove(str(SCRIPTS))
    return "\n\n".join(stories(seed=2, count=25))


def peers_nats(peer: torch.nn.Module, ids: torch.Tensor, context: int, stride: int) -> float:
    """Token by token: each is predicted by transformers from what the earliest window holds before it."""
    nats = 0.0
    for place in range(1, len(ids)):
        window = math.ceil(max(place - context, 0) / stride)
        before = ids[None, window * stride : place]
        nats -= float(peer(before).logits[0, -1].double().log_softmax(-1)[ids[place]])
    return nats


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [
        (75, 32, 16),
        (75, 32, 32),
        (75, 32, 1),
        (75, 20, 7),
        (20, 32, 16),
        (33, 32, 16),
        (2, 1, 1),
        (64, 32, 32),
    ],
)
@torch.inference_mode()
def test_it_is_the_protocol_around_transformers(length: int, context: int, stride: int, tmp_path: Path):
    peer = huggingface()
    model = GPTModel.from_checkpoint(save_pth(peer.state_dict(), tmp_path), config=HEADS)
    ids = torch.randint(TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    found = evaluate(model, ids, context=context, stride=stride)
    assert found.tokens == length - 1
    assert found.nats == pytest.approx(peers_nats(peer, ids, context, stride), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))


def one_by_one(model: GPTModel, ids: list[int], context: int, stride: int) -> tuple[int, float]:
    """Every token's loss from a forward of its own, in the first window that has all before it."""
    nats, begin = 0.0, 0
    for place in range(1, len(ids)):
        begin += stride if place - begin > context else 0
        logits = model(torch.tensor([ids[begin:place]]))[0, -1]
        nats -= float(logits.double().log_softmax(-1)[ids[place]])
    return len(ids) - 1, nats


@pytest.mark.parametrize("context", [1, 2, 5, 8])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 23])
def test_windows_that_do_not_fit_are_a_plain_loop_over_tokens(length: int, context: int):
    model = randomise(GPTModel(GPTConfig(101, 8, 16, 2, 2)))
    ids = torch.randint(101, (length,), generator=torch.Generator().manual_seed(length))
    for stride in range(1, context + 1):
        with torch.inference_mode():
            tokens, nats = one_by_one(model, ids.tolist(), context, stride)
        found = evaluate(model, ids, context=context, stride=stride)
        assert (found.tokens, found.nats) == (tokens, pytest.approx(nats, rel=1e-5))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_each_token_but_the_first_is_predicted_once(stride: int):
    found = list(windows(50, 8, stride))
    assert [place for _, end, first in found for place in range(first, end)] == list(range(1, 50))
    assert all(end - 1 - begin <= 8 and first > begin for begin, end, first in found)


def test_an_even_guess_has_the_perplexity_of_the_vocabulary(config: GPTConfig):
    clueless = GPTModel(config).eval()
    torch.nn.init.zeros_(clueless.out_head.weight)
    assert evaluate(clueless, torch.arange(100)).perplexity == pytest.approx(config.vocab_size)


@torch.inference_mode()
def test_the_loss_of_many_rows_is_that_of_all_at_once(model: GPTModel):
    hidden, ids = torch.randn(300, TINY.emb_dim), torch.randint(TINY.vocab_size, (300,))
    whole = torch.nn.functional.cross_entropy(model.out_head(hidden), ids, reduction="sum")
    assert float(loss_of(model, hidden, ids)) == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.arange(50), {"context": 33}, "context must be in 1 … 32"),
        (torch.arange(50), {"context": 0}, "context must be in 1 … 32"),
        (torch.arange(50), {"stride": 0}, "stride must be in 1 … 32"),
        (torch.arange(50), {"context": 8, "stride": 9}, "stride must be in 1 … 8"),
        (torch.arange(1), {}, "a text of 1 tokens has nothing to predict"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    model: GPTModel, ids: torch.Tensor, options: dict[str, int], message: str
):
    with pytest.raises(UsageError, match=message):
        evaluate(model, ids, **options)


def test_a_classifier_is_refused():
    with pytest.raises(UsageError, match="classifier of 2 classes"):
        evaluate(GPTModel(GPTConfig.of(TINY.as_dict() | {"n_classes": 2})), torch.arange(50))


def test_int8_costs_the_embedded_model_less_than_half_a_percent(stories: str):
    encoding = tokenizer_for(EMBEDDED, 1024)
    ids = torch.tensor(encoding.encode(stories))
    whole = evaluate(GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32), ids)
    int8 = evaluate(GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32, quantize="int8"), ids)
    assert whole.perplexity < 5
    assert abs(int8.perplexity / whole.perplexity - 1) <= 0.005
    assert int8.nats != whole.nats


def test_the_command_says_the_same_of_a_file_and_of_standard_input(
    stories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    text = tmp_path / "stories.txt"
    text.write_text(stories[:3000])
    assert main(["evaluate", "--text", str(text), "--context", "64", "--stride", "64", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    model, encoding = GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32), tokenizer_for(EMBEDDED, 1024)
    found = evaluate(model, torch.tensor(encoding.encode(stories[:3000])), context=64, stride=64)
    assert said["perplexity"] == pytest.approx(found.perplexity, abs=1e-4)
    assert said["bits_per_byte"] == pytest.approx(found.nats / math.log(2) / 3000, abs=1e-4)
    assert said["tokens"] == found.tokens
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stories[:3000].encode())))
    assert main(["evaluate", "--text", "-", "--context", "64", "--stride", "64"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["perplexity", str(said["perplexity"])]
    assert err == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "a text of 0 tokens"), (b"\xff\xfe", "text.txt: not UTF-8"), (None, "text.txt")],
)
def test_the_command_refuses_a_text_in_one_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert main(["evaluate", "--text", str(text)]) == 1
    assert message in capsys.readouterr().err


def test_a_model_with_nan_is_refused_and_a_huge_loss_is_an_infinite_perplexity(model: GPTModel):
    ids = torch.arange(20)
    assert Evaluation(2, 2000.0, 1.0).perplexity == math.inf
    model.out_head.weight.data[3] = math.nan
    with pytest.raises(UsageError, match="the model's loss is nan: its weights are not finite"):
        evaluate(model, ids)
