from __future__ import annotations

import pytest
import torch

from gpt2lite import GPTConfig, GPTModel, UsageError, generate
from gpt2lite.generation import generate_tokens, sample


def without_cache(model: GPTModel, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_the_cached_path_writes_the_tokens_of_the_uncached(model: GPTModel, ids: torch.Tensor):
    assert torch.equal(generate(model, ids, 15), without_cache(model, ids, 15))


def test_greedy_equals_transformers(tmp_path, ids: torch.Tensor):
    from test_loading import HEADS, huggingface, save_pth

    peer = huggingface()
    ours = GPTModel.from_checkpoint(save_pth(peer.state_dict(), tmp_path), config=HEADS)
    theirs = peer.generate(ids, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generate(ours, ids, 15), theirs)


def test_a_whole_context_can_be_filled(model: GPTModel):
    assert generate(model, torch.zeros(1, 1, dtype=torch.long), 31).shape == (1, 32)


def test_the_same_seed_gives_the_same_text_and_another_gives_another(model: GPTModel, ids: torch.Tensor):
    first, again, other = (generate(model, ids, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_top_k_draws_only_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(200, 4)
    drawn = sample(logits, 1.0, 2, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {1, 3}


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = sample(logits.expand(60_000, 3), 0.5, None, torch.Generator().manual_seed(0))
    shares = drawn.flatten().bincount(minlength=3) / 60_000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)


def test_ids_past_the_vocabulary_are_never_drawn(model: GPTModel, ids: torch.Tensor):
    tokens = torch.cat(list(generate_tokens(model, ids, 15, temperature=5.0, seed=0, vocabulary=7)), 1)
    assert tokens.max() < 7


def test_generation_ends_where_every_row_has_stopped(model: GPTModel, ids: torch.Tensor):
    whole = generate(model, ids[:1], 15)
    third = int(whole[0, ids.shape[1] + 2])
    cut = generate(model, ids[:1], 15, stop=[third])
    assert cut[0].tolist() == whole[0, : cut.shape[1]].tolist()
    assert cut[0, -1] == third
    assert cut.shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (
            [[1] * 30],
            {"max_new_tokens": 5},
            "30 tokens and 5 new ones are more than the context of 32.* 2 at most",
        ),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[101]], {}, r"ids must be in 0 … 100, got 101 … 101"),
        ([1], {}, r"ids must be a tensor of integers of shape \(batch, tokens ≥ 1\)"),
        ([[]], {}, r"ids must be a tensor of integers of shape"),
        ([[1.5]], {}, r"ids must be a tensor of integers of shape"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0"),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0"),
        ([[], []], {}, r"ids must be a tensor of integers"),
        ([[1]], {"seed": -1}, r"seed must be in 0 … 2\*\*64 - 1, got -1"),
        ([[1]], {"top_k": 0, "temperature": 1.0}, "top_k must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_generated_is_one_clear_error(model: GPTModel, ids: list, options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        generate(model, torch.tensor(ids), **{"max_new_tokens": 3, **options})


def test_ids_that_are_no_tensor_are_refused(model: GPTModel):
    with pytest.raises(UsageError, match=r"ids must be a tensor of integers .* got list"):
        generate(model, [[1, 2]], 3)


def test_a_temperature_near_zero_is_greedy(model: GPTModel, ids: torch.Tensor):
    assert torch.equal(generate(model, ids, 9, temperature=1e-40, seed=0), generate(model, ids, 9))


def test_half_precision_generates_on_cpu(config: GPTConfig):
    model = GPTModel(config).to(torch.bfloat16).eval()
    assert generate(model, torch.zeros(1, 3, dtype=torch.long), 4).shape == (1, 7)
