from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import randomise

from gpt2lite import GPTConfig, GPTModel, UsageError
from gpt2lite.model import KVCache

ARTICLE = {
    "vocab_size": 101,
    "context_length": 32,
    "drop_rate": 0.0,
    "qkv_bias": True,
    "emb_dim": 48,
    "n_layers": 3,
    "n_heads": 4,
}


def test_the_articles_dict_and_a_config_make_the_same_untied_model():
    model = GPTModel(ARTICLE)
    assert model.config == GPTConfig(101, 32, 48, 4, 3)
    assert model.out_head.weight is not model.tok_emb.weight


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_official_sizes_are_tied_and_have_the_published_number_of_parameters(name: str, parameters: int):
    with torch.device("meta"):
        model = GPTModel(GPTConfig.named(name))
    assert model.out_head.weight is model.tok_emb.weight
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.head_dim == 64


def test_building_xl_on_meta_runs_no_initialiser(monkeypatch: pytest.MonkeyPatch):
    called = []
    for name in ("normal_", "uniform_", "fill_", "zero_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, **kw: called.append(self))
    with torch.device("meta"):
        GPTModel(GPTConfig.named("gpt2-xl"))
    assert called == []


def test_parameter_names_are_the_books():
    book = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch is not installed")
    theirs = {name: tuple(p.shape) for name, p in book.GPTModel(ARTICLE).named_parameters()}
    assert {name: tuple(p.shape) for name, p in GPTModel(ARTICLE).named_parameters()} == theirs


def test_initial_values_are_gpt2s(config: GPTConfig):
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(1000, 64, 128, 4, 8))
    shortcut = 0.02 / (2 * 8) ** 0.5
    assert model.tok_emb.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.trf_blocks[3].ff.layers[2].weight.std().item() == pytest.approx(shortcut, rel=0.05)
    assert model.trf_blocks[3].att.out_proj.weight.std().item() == pytest.approx(shortcut, rel=0.05)
    assert model.final_norm.scale.eq(1).all()
    assert model.trf_blocks[0].att.W_key.bias.eq(0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_logits_equal_the_books_model(dtype: torch.dtype, tolerance: float, ids: torch.Tensor):
    book = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch is not installed")
    theirs = randomise(book.GPTModel(ARTICLE)).to(dtype)
    ours = GPTModel(ARTICLE).to(dtype).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == []
    assert all(name.endswith(".mask") for name in unexpected)
    torch.set_default_dtype(dtype)  # the book's GELU computes its constant in the default dtype
    try:
        expected = theirs(ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (ours(ids) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_biases_are_where_the_config_says(qkv_bias: bool, bias: bool, ids: torch.Tensor):
    model = GPTModel(ARTICLE | {"qkv_bias": qkv_bias, "bias": bias})
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("W_query.bias") for name in names) == qkv_bias
    assert any(name.endswith(("out_proj.bias", "ff.layers.0.bias", "shift")) for name in names) == bias
    assert model(ids).isfinite().all()


def test_dropout_acts_in_training_and_not_in_evaluation(ids: torch.Tensor):
    model = GPTModel(ARTICLE | {"drop_rate": 0.5})
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("pieces", [[17], [1] * 17, [5, 12], [5, 7, 1, 1, 3]])
def test_a_cache_fed_in_pieces_gives_the_logits_of_the_whole(
    model: GPTModel, ids: torch.Tensor, pieces: list[int]
):
    with torch.no_grad():
        cache = KVCache(model.config, 2, 20, like=model.tok_emb.weight)
        parts = [model(part, cache) for part in ids.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)
    assert cache.length == 17


def test_more_tokens_than_the_context_is_one_clear_error(model: GPTModel):
    with pytest.raises(UsageError, match="33 tokens do not fit the context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emb_dim": 50}, "emb_dim=50 does not divide by n_heads=4"),
        ({"n_layers": 0}, "n_layers must be a positive int of 31 bits, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive int of 31 bits, got True"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"qkv_bias": 1}, "qkv_bias must be True or False, got 1"),
        ({"n_embd": 48}, r"config has no field n_embd; it has vocab_size"),
    ],
)
def test_an_impossible_config_is_refused(change: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        GPTModel(ARTICLE | change)


def test_a_config_that_lacks_sizes_names_them():
    with pytest.raises(UsageError, match=r"config lacks vocab_size, context_length, n_heads, n_layers"):
        GPTModel({"emb_dim": 48})


def test_an_unknown_official_name_lists_the_known():
    with pytest.raises(UsageError, match="unknown GPT-2 size 'gpt3'; did you mean gpt2"):
        GPTConfig.named("gpt3")


LENGTHS = (1, 5, 16, 32)  # 32 is the whole context


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_a_traced_model_takes_any_length(tokens: torch.Tensor):
    model = GPTModel(ARTICLE).eval()
    traced = torch.jit.trace(model, (tokens[:, :7],))
    for length in LENGTHS:
        assert torch.equal(traced(tokens[:, :length]), model(tokens[:, :length]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("limits", [{}, {"min": 1, "max": 32}, {"min": 2, "max": 31}], ids=str)
def test_an_exported_model_takes_any_length(limits: dict[str, int], tokens: torch.Tensor):
    model = GPTModel(ARTICLE).eval()
    dynamic = ({0: torch.export.Dim("B"), 1: torch.export.Dim("T", **limits)},)
    exported = torch.export.export(model, (tokens[:, :7].contiguous(),), dynamic_shapes=dynamic).module()
    for length in LENGTHS if limits.get("max") != 31 else (2, 31):
        for rows in (tokens, tokens[:1]):
            assert torch.equal(exported(rows[:, :length]), model(rows[:, :length]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_an_exported_model_takes_any_length_in_bfloat16_whatever_this_processor_has(tokens: torch.Tensor):
    model = GPTModel(ARTICLE).eval().bfloat16()
    long = tokens.repeat(40 // len(tokens) + 1, 1)  # rows enough for widening the weights
    dynamic = ({0: torch.export.Dim("B"), 1: torch.export.Dim("T", min=1, max=32)},)
    exported = torch.export.export(model, (long[:, :7].contiguous(),), dynamic_shapes=dynamic).module()
    for length in LENGTHS:
        assert exported(long[:, :length]).shape == (*long[:, :length].shape, model.config.vocab_size)
        torch.testing.assert_close(exported(long[:, :length]), model(long[:, :length]), atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_written_as_onnx_with_a_dynamic_length(tokens: torch.Tensor, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, path = GPTModel(ARTICLE).eval(), tmp_path / "model.onnx"
    dynamic = ({1: torch.export.Dim("T", min=1, max=32)},)
    torch.onnx.export(model, (tokens[:, :7].contiguous(),), path, dynamo=True, dynamic_shapes=dynamic)
    session = runtime.InferenceSession(path)
    name = session.get_inputs()[0].name
    for length in LENGTHS:
        (found,) = session.run(None, {name: tokens[:, :length].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(tokens[:, :length]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_token_alone_has_the_logits_that_a_cache_gives_it(dtype: torch.dtype, tokens: torch.Tensor):
    model = GPTModel(ARTICLE).eval().to(dtype)
    cache = KVCache(model.config, 2, 1, model.tok_emb.weight)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :1]), model(tokens[:, :1], cache))
