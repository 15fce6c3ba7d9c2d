from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from conftest import in_threads, randomise, where_positions_decide
from test_loading import HEADS, huggingface

from gpt2lite import (
    GenerateOptions,
    GPTConfig,
    GPTModel,
    InsufficientMemoryError,
    UsageError,
    convert,
    evaluate,
    generate,
)
from gpt2lite.config import EMBEDDED
from gpt2lite.generation import ENGINES, KVCache
from gpt2lite.generation.decoding import (
    Sampling,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    probabilities,
)
from gpt2lite.generation.engines import CursorCache, choose_engine, last_logits
from gpt2lite.generation.prompts import usable_vocabulary
from gpt2lite.tokenizer import tokenizer_for

LONG = GPTConfig(vocab_size=101, context_length=256, emb_dim=48, n_heads=4, n_layers=3)


@pytest.fixture
def long_model() -> GPTModel:
    """One that does not run into a short cycle: position decides."""
    model = where_positions_decide(GPTModel(LONG))
    assert len(set(model.generate([[1]], 100, engine="torch")[0].tolist())) > 20
    return model


@pytest.fixture(scope="module")
def embedded() -> GPTModel:
    return GPTModel.from_checkpoint(EMBEDDED, dtype=torch.float32)


def without_cache(model: GPTModel, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


# ---- greedy ------------------------------------------------------------------------------------------------


def test_the_cached_path_writes_the_tokens_of_the_uncached(model: GPTModel, ids: torch.Tensor, engine: str):
    assert torch.equal(model.generate(ids, 15, engine=engine), without_cache(model, ids, 15))


def test_the_function_and_the_method_are_one(model: GPTModel, ids: torch.Tensor):
    assert torch.equal(generate(model, ids, 5), model.generate(ids, 5))
    streamed = torch.cat(list(model.generate_tokens(ids, 5)), 1)
    assert torch.equal(streamed, model.generate(ids, 5)[:, -5:])


def test_greedy_equals_transformers_for_200_tokens_ragged_batch_included(
    tmp_path, embedded: GPTModel, engine: str
):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    convert(EMBEDDED, tmp_path / "hf", to="huggingface")
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    encoding = tokenizer_for(EMBEDDED, embedded.config.vocab_size)
    texts = ("Once upon a time", "The old man went to the sea, and", "A", "Every day she")
    prompts = [torch.tensor(encoding.encode(text)) for text in texts]
    longest = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in prompts])
    is_text = torch.stack([torch.arange(longest) >= longest - len(row) for row in prompts]).long()
    options = {"max_new_tokens": 200, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    theirs = peer.generate(padded, attention_mask=is_text, **options)
    found = embedded.generate(prompts, 200, engine=engine)
    for row, prompt, their in zip(found, prompts, theirs, strict=True):
        assert row.tolist() == their[longest - len(prompt) :].tolist()
        assert len(set(row.tolist())) > 50


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_numba_computes_torchs_logits(activation: str, bias: bool, tied: bool):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    fields = {"activation": activation, "bias": bias, "qkv_bias": bias, "tied_head": tied}
    model = randomise(GPTModel(GPTConfig.of(LONG.as_dict() | fields)))
    assert_same_logits(model, torch.randint(101, (3, 9), generator=torch.Generator().manual_seed(0)))


def steps(model: GPTModel, ids: torch.Tensor, engine: str) -> torch.Tensor:
    """Logits (B, 4, V) of four tokens behind a prompt."""
    with torch.inference_mode():
        cache = KVCache(model.config, len(ids), ids.shape[1], model.pos_emb.weight)
        last_logits(model, ids[:, :-4], cache)
        step = ENGINES[engine][1](model, cache)
        return torch.stack([step(column).float().clone() for column in ids[:, -4:].split(1, dim=1)], 1)


def assert_same_logits(model: GPTModel, ids: torch.Tensor, tolerance: float = 1e-4) -> None:
    theirs = model(ids)[:, -4:].float().detach()
    ours = steps(model, ids, "numba")
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("sizes", [(13,), (1, 7, 5), (4, 9), (6, 6, 1)])
@pytest.mark.parametrize("pads", [None, (0, 3, 8)], ids=["even", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numba_takes_any_number_of_tokens_at_a_time(
    long_model: GPTModel, sizes: tuple[int, ...], pads: tuple[int, ...] | None, dtype: torch.dtype
):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    ids = torch.randint(101, (3, 13), generator=torch.Generator().manual_seed(0))
    model = long_model.to(dtype)
    found = {}
    with torch.inference_mode():
        for engine in ("torch", "numba"):
            starts = None if pads is None else torch.tensor(pads)
            cache = KVCache(LONG, 3, 13, model.pos_emb.weight, starts)
            step = ENGINES[engine][1](model, cache)
            logits = [step(some) for some in ids.split(sizes, 1)]
            found[engine] = logits[-1].float()
    tolerance = (1e-5 if dtype == torch.float32 else 3e-2) * float(found["torch"].abs().max())
    torch.testing.assert_close(found["numba"], found["torch"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("strategy", ["stream", "mmap"])
def test_numba_reads_official_weights_where_they_lie(tmp_path, strategy: str):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    from safetensors.torch import save_file

    peer = huggingface()
    state = {
        name.removeprefix("transformer."): t for name, t in peer.state_dict().items() if "lm_head" not in name
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "p" * 5})  # data at an odd byte
    model = GPTModel.from_checkpoint(tmp_path / "model.safetensors", strategy=strategy, config=HEADS)
    is_mapped = not model.trf_blocks[0].att.W_query.weight.is_contiguous()
    assert is_mapped == (strategy == "mmap")
    assert_same_logits(model, torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(0)))


def test_numba_computes_in_bfloat16_weights_and_cache(long_model: GPTModel):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    model = long_model.to(torch.bfloat16)
    ids = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_same_logits(model, ids, tolerance=0.05)  # torch rounds after every operation
    assert_same_logits(model.float(), ids)


def test_half_precision_generates_on_cpu(config: GPTConfig):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = GPTModel(config).to(dtype).eval()
        assert model.generate(torch.zeros(1, 3, dtype=torch.long), 4).shape == (1, 7)


def test_a_whole_context_can_be_filled(model: GPTModel, engine: str):
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 31, engine=engine).shape == (1, 32)


def test_generation_from_several_threads_at_once(long_model: GPTModel, engine: str):
    ids = torch.zeros(1, 3, dtype=torch.long)
    alone = long_model.generate(ids, 60, engine=engine)
    found = in_threads(4, lambda: long_model.generate(ids, 60, engine=engine))
    assert all(torch.equal(each, alone) for each in found)


def test_a_wrapped_layer_a_hook_and_a_large_batch_are_left_to_torch(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")

    class LoRA(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 2

    assert choose_engine(model, 1, 5, "auto") == "torch"  # not worth numba's start
    monkeypatch.setattr("gpt2lite.generation.engines.FEWEST_FOR_NUMBA", 1)
    assert choose_engine(model, 1, 5, "auto") == "numba"
    assert choose_engine(model, 65, 5, "auto") == "torch"
    handle = model.trf_blocks[0].register_forward_hook(lambda *_: None)
    assert choose_engine(model, 1, 5, "auto") == "torch"
    handle.remove()
    model.trf_blocks[1].att.W_key = LoRA(model.trf_blocks[1].att.W_key)
    assert choose_engine(model, 1, 5, "auto") == "torch"


# ---- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 5}, {"repetition_penalty": 1.4}])
def test_rows_of_any_length_are_what_each_is_alone(long_model: GPTModel, engine: str, options: dict):
    prompts = [[7, 8, 9], [1], list(range(40)), [3, 3]]
    together = long_model.generate(prompts, 30, engine=engine, **options)
    for number, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
        own = options | ({"seed": options["seed"] + number} if "seed" in options else {})
        assert row.tolist() == long_model.generate([prompt], 30, engine=engine, **own)[0].tolist()


def test_every_row_stops_by_itself(long_model: GPTModel, engine: str):
    prompts = [[1, 2, 3], [50], [9, 9]]
    whole = long_model.generate(prompts, 20, engine=engine)
    stop = [int(whole[0][3 + 4]), int(whole[1][1 + 9])]
    found = long_model.generate(prompts, 20, stop=stop, engine=engine)
    for prompt, row, full in zip(prompts, found, whole, strict=True):
        new = full[len(prompt) :].tolist()
        ends = min((new.index(each) for each in stop if each in new), default=19)
        assert row.tolist() == full[: len(prompt) + ends + 1].tolist()


def test_in_a_tensor_what_stopped_is_filled_with_its_stop(long_model: GPTModel):
    ids = torch.tensor([[1, 2], [50, 3]])
    whole = long_model.generate(ids, 20)
    stop = int(whole[0, 5])
    found = long_model.generate(ids, 20, stop=[stop])
    row = found[0, 2:].tolist()
    assert set(row[row.index(stop) :]) == {stop}


def test_generation_ends_where_every_row_has_stopped(model: GPTModel, ids: torch.Tensor):
    whole = model.generate(ids[:1], 15)
    third = int(whole[0, ids.shape[1] + 2])
    cut = model.generate(ids[:1], 15, stop=[third])
    assert cut[0].tolist() == whole[0, : cut.shape[1]].tolist()
    assert cut[0, -1] == third
    assert cut.shape[1] <= ids.shape[1] + 3


def test_a_row_ends_behind_a_stop_string_even_across_tokens(embedded: GPTModel):
    model, encoding = embedded, tokenizer_for(EMBEDDED, embedded.config.vocab_size)
    prompts = [encoding.encode("Once upon a time"), encoding.encode("The")]
    whole = model.generate(prompts, 60, encoding=encoding)
    texts = [encoding.decode(row.tolist()[len(prompt) :]) for prompt, row in zip(prompts, whole, strict=True)]
    stop = texts[0][30:42]
    found = model.generate(prompts, 60, stop=stop, encoding=encoding)
    for prompt, row, text in zip(prompts, found, texts, strict=True):
        cut = encoding.decode(row.tolist()[len(prompt) :])
        end = text.find(stop)
        assert text.startswith(cut)
        assert stop not in cut[:-1] if end < 0 else end + len(stop) <= len(cut) < end + len(stop) + 12
    assert len(found[0]) < len(whole[0])


def test_a_pad_leaves_no_nan_behind(long_model: GPTModel):
    batch = [[1] * 100, [2]]
    with torch.inference_mode():
        ids = torch.zeros(2, 100, dtype=torch.long)
        ids[0], ids[1, -1] = 1, 2
        cache = KVCache(LONG, 2, 101, long_model.pos_emb.weight, pads=torch.tensor([0, 99]))
        logits = last_logits(long_model, ids, cache)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[1], long_model(torch.tensor([[2]]))[0, -1], atol=1e-4, rtol=1e-4)
    assert len(long_model.generate(batch, 2)[1]) == 3


# ---- the window --------------------------------------------------------------------------------------------


def by_hand(model: GPTModel, ids: list[int], count: int, window: int) -> list[int]:
    """Read `window` tokens again whenever the context is full."""
    text, seen = list(ids), list(ids)
    if len(seen) >= model.config.context_length:
        seen = seen[-window:]
    for _ in range(count):
        token = int(model(torch.tensor([seen]))[0, -1].argmax())
        text.append(token)
        seen.append(token)
        if len(seen) > model.config.context_length:
            seen = seen[-window:]
    return text


@pytest.mark.parametrize("length", [1, 20, 32, 50])
def test_a_window_slides_past_the_context(model: GPTModel, engine: str, length: int):
    prompt = torch.randint(101, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    found = model.generate([prompt], 70, window=16, engine=engine)[0]
    assert found.tolist() == by_hand(model, prompt, 70, 16)


def test_rows_in_a_window_are_what_each_is_alone(model: GPTModel, engine: str):
    prompts = [[1, 2, 3], list(range(30)), [5]]
    together = model.generate(prompts, 60, window=10, engine=engine)
    assert together[1].tolist() == by_hand(model, prompts[1], 60, 10)
    assert [len(row) for row in together] == [63, 90, 61]


# ---- sampling ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_and_another_gives_another(model: GPTModel, ids: torch.Tensor):
    first, again, other = (model.generate(ids, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 4, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_tokens_come_as_often_as_their_exact_probabilities(options: dict):
    """Against transformers' own warpers, in their order."""
    from transformers.generation import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    expected = logits
    for name in warpers:
        if name in options:
            expected = warpers[name](options[name])(None, expected)
    exact = expected.softmax(-1)
    sampling = Sampling(**{"temperature": 1.0} | options)
    torch.testing.assert_close(probabilities(logits, sampling), exact)
    drawn = draw(logits.expand(60_000, 12), sampling)
    shares = drawn.flatten().bincount(minlength=12) / 60_000
    torch.testing.assert_close(shares, exact[0], atol=0.012, rtol=0)
    assert set(drawn.flatten().tolist()) <= set(exact[0].nonzero().flatten().tolist())


def test_the_penalty_is_transformers(model: GPTModel, ids: torch.Tensor):
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 101, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(2, 101, dtype=torch.bool).scatter_(1, ids, True)
    torch.testing.assert_close(
        penalise(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    )


def test_a_strong_penalty_never_repeats(model: GPTModel):
    row = model.generate([[1, 2, 3]], 25, repetition_penalty=1e9)[0].tolist()
    assert len(set(row)) == len(row)


def test_each_filter_keeps_at_least_one():
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    for kept in (keep_top_k(logits, 1), keep_top_p(logits, 1e-9), keep_min_p(logits, 1.0)):
        assert kept[0, 0] == 5
        assert kept[0, 1:].max() == -math.inf
    assert torch.equal(keep_min_p(logits, 0.0), logits)
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_a_temperature_near_zero_is_greedy(model: GPTModel, ids: torch.Tensor):
    assert torch.equal(model.generate(ids, 9, temperature=1e-40, seed=0), model.generate(ids, 9))


@pytest.mark.parametrize(
    ("vocab_size", "usable"), [(50257, 50257), (50304, 50257), (50258, 50258), (101, 101), (51200, 50257)]
)
def test_rows_that_only_pad_the_vocabulary_are_never_drawn(vocab_size: int, usable: int):
    config = GPTConfig(vocab_size=vocab_size, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    assert usable_vocabulary(config, None) == usable
    model = randomise(GPTModel(config))
    if usable < vocab_size:
        model.out_head.weight.data[usable:] = 100 * model.out_head.weight.data[0].sign()
    for options in ({}, {"temperature": 5.0, "seed": 0}):
        assert model.generate(torch.zeros(4, 1, dtype=torch.long), 5, **options).max() < usable


# ---- memory ------------------------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_is_refused_first():
    wide = GPTConfig(vocab_size=11, context_length=1 << 22, emb_dim=64, n_heads=1, n_layers=96)
    with torch.device("meta"):
        model = GPTModel(wide)
    model.to_empty(device="cpu")
    ids = torch.zeros(64, 1, dtype=torch.long)
    for write in (model.generate, model.generate_tokens):
        with pytest.raises(InsufficientMemoryError, match="keys and values of 64 × 4000001 tokens") as raised:
            write(ids, 4_000_000)
        assert raised.value.needed == {"host": 2 * 96 * 64 * 4_000_001 * 64 * 4}


# ---- what a CUDA graph needs, on any device ----------------------------------------------------------------


@pytest.mark.parametrize("pads", [None, [0, 3]])
def test_a_cursor_on_the_device_computes_the_same(model: GPTModel, ids: torch.Tensor, pads: list | None):
    with torch.inference_mode():
        start = None if pads is None else torch.tensor(pads)
        plain = KVCache(model.config, 2, 32, model.pos_emb.weight, start)
        last_logits(model, ids, plain)
        plain.memory[:, :, :, :, plain.length :] = (
            0  # the graph multiplies what no token has written yet by 0
        )
        moving = CursorCache(plain)
        moving.memory = plain.memory.clone()
        for token in range(5):
            column = torch.full((2, 1), token)
            moving.follow(plain)
            expected, found = last_logits(model, column, plain), last_logits(model, column, moving)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Graphs emulated by running the same work on the same tensors again; the devices that recorded them."""
    devices: list[torch.device] = []

    def record(device: torch.device, work: Callable[[], torch.Tensor]) -> tuple[Callable, torch.Tensor]:
        devices.append(device)
        for _ in range(2):
            work()
        result = work().clone()
        return lambda: result.copy_(work()), result

    monkeypatch.setattr("gpt2lite.generation.engines.record", record)
    monkeypatch.setattr("gpt2lite.generation.engines.has_graphs", lambda device: True)
    return devices


@pytest.mark.parametrize(
    ("prompts", "count", "options", "graphs"),
    [
        ([[1]], 255, {}, 1),
        ([[1] * 253], 3, {}, 1),  # recorded where the context ends
        ([[1], [5, 6, 7, 8], [9] * 40], 200, {}, 1),
        ([[1]], 400, {"window": 1}, 1),
        ([[1], [5, 6, 7, 8]], 400, {"window": 1}, 1),  # the pads end with the first window
        ([[1], [5, 6, 7, 8]], 800, {"window": 3}, 1),
        ([[1, 2], [3]], 60, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.3}, 1),
    ],
)
def test_replayed_graphs_write_torchs_tokens(
    long_model: GPTModel, recorded: list, prompts: list[list[int]], count: int, options: dict, graphs: int
):
    wanted = long_model.generate(prompts, count, engine="torch", **options)
    found = long_model.generate(prompts, count, engine="cuda_graph", **options)
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]
    assert len(recorded) == graphs


def test_a_graph_is_recorded_on_its_own_device_and_not_on_the_current(monkeypatch: pytest.MonkeyPatch):
    from gpt2lite import devices

    said: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_stream(self, other: Stream) -> None:
            assert other.device == self.device

        def __enter__(self) -> None:
            said.append(f"stream of {self.device}")

        def __exit__(self, *_: object) -> None: ...

    @contextmanager
    def current(index: int) -> Iterator[None]:
        said.append(f"device {index}")
        yield
        said.append("back")

    monkeypatch.setattr(devices, "is_here", lambda device: True)
    monkeypatch.setattr(torch.accelerator, "device_index", current)
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replays"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, capture_error_mode: stream)
    monkeypatch.setattr(devices, "_recording_streams", {})

    def work() -> torch.Tensor:
        said.append("work")
        return torch.ones(2)

    replay, result = devices.record(torch.device("cuda", 1), work)
    assert (replay, result.tolist()) == ("replays", [1, 1])
    own = "stream of cuda:1"
    assert said == ["device 1", own, "work", "work", own, "work", "back"]


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (
            [[1] * 30],
            {"max_new_tokens": 5},
            r"30 tokens and 5 new ones exceed the context of 32.* 2 at most.*window=16",
        ),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ([[101]], {}, r"ids must be in 0 … 100, got 101 … 101"),
        ([1], {}, r"ids must be a tensor of integers of shape \(batch, tokens ≥ 1\)"),
        ([[]], {}, r"ids must be a tensor of integers of shape"),
        ([[1.5]], {}, r"ids must be a tensor of integers of shape"),
        ([[1]], {"temperature": -1.0}, "temperature must be 0"),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0"),
        ([[], []], {}, r"ids must be a tensor of integers"),
        ([[1]], {"seed": -1}, r"seed must be an int in 0 … 2\*\*64 - 1, got -1"),
        ([[1]], {"top_k": 0, "temperature": 1.0}, "top_k must be an int of at least 1, got 0"),
        ([[1]], {"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0"),
        ([[1]], {"min_p": 2.0}, "min_p must be a number in 0 … 1, got 2"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty must be a number in 1e-9 … 1e9"),
        ([[1]], {"window": 32}, "window must be an int in 1 … 31, got 32"),
        ([[1]], {"stop": [1.5]}, "stop must be token ids in 0 … 100 and non-empty strings"),
        ([[1]], {"stop": [""]}, "stop must be token ids in 0 … 100 and non-empty strings"),
        ([[1]], {"stop": ["."]}, "stop strings need the encoding"),
        ([[1]], {"engine": "warp"}, "engine must be one of auto, numba, cuda_graph, torch, got 'warp'"),
        ([[1]], {"engine": "cuda_graph"}, "cannot run this model: the model is not on a GPU"),
    ],
)
def test_what_cannot_be_generated_is_one_clear_error(model: GPTModel, ids: list, options: dict, message: str):
    for prompts in (torch.tensor(ids), ids):
        with pytest.raises(UsageError, match=message):
            model.generate(prompts, **{"max_new_tokens": 3, **options})
    with pytest.raises(UsageError, match=message):
        model.generate_tokens(torch.tensor(ids), **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize("ids", [[], None, 5, [["a"]], [torch.zeros(1, 2, dtype=torch.long)]])
def test_ids_that_are_none_are_refused(model: GPTModel, ids: object):
    with pytest.raises(UsageError, match="ids must be a tensor of integers"):
        model.generate(ids, 3)


def test_without_numba_torch_takes_over_and_says_what_to_install(model: GPTModel, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "gpt2lite.generation.kernels", raising=False)
    assert model.generate([[1]], 3)[0].shape == (4,)
    with pytest.raises(UsageError, match=r"numba cannot be imported .*: pip install 'gpt2lite\[cpu\]'"):
        model.generate([[1]], 3, engine="numba")


def test_tokens_come_one_by_one(model: GPTModel):
    tokens = model.generate_tokens([[1, 2]], 25)
    first = [int(token) for token in itertools.islice(tokens, 3)]
    assert first == model.generate([[1, 2]], 3)[0].tolist()[2:]


@pytest.mark.parametrize("seed", ["x", 1.0, -1, 2**64, True])
def test_a_seed_that_is_none_is_refused_at_once(model: GPTModel, seed: object):
    with pytest.raises(UsageError, match=r"seed must be an int in 0 … 2\*\*64 - 1, got"):
        model.generate([[1]], 2, temperature=1.0, seed=seed)


@pytest.mark.parametrize("temperature", [1e-8, 1e-46, 5e-324])
def test_the_coldest_temperatures_are_greedy(model: GPTModel, temperature: float):
    wanted = model.generate(torch.tensor([[5]]), 6)
    assert torch.equal(model.generate(torch.tensor([[5]]), 6, temperature=temperature, seed=0), wanted)


def test_a_stopped_row_is_filled_with_what_the_model_knows():
    """Where the encoding has more tokens than the model, its end of text among them."""
    encoding = tokenizer_for(EMBEDDED, 1024)
    model = randomise(GPTModel(GPTConfig(600, 32, 16, 2, 2)))
    first = encoding.decode([int(model.generate([[5]], 1)[0][-1])])
    rows = model.generate([[5], [7, 9]], 5, stop=[first], encoding=encoding)
    assert len(rows[0]) == 2


@pytest.mark.parametrize(
    "stop",
    [
        [None, 1],
        [True],
        [1.5],
        [b"x"],
        [""],
        b"x",
        None,
        1.5,
        "",
        101,
        [-1],
        [2**70],
        [[1]],
        torch.tensor([1]),
    ],
    ids=str,
)
def test_what_is_no_stop_is_refused(model: GPTModel, stop: object):
    with pytest.raises(UsageError, match="stop must be token ids in 0 … 100 and non-empty strings"):
        model.generate([[1]], 2, stop=stop, encoding=tokenizer_for(EMBEDDED, 1024))


WRONG = [True, math.nan, -1, math.inf, [0.5], 1j, Decimal("0.5"), torch.tensor(1)]
NEVER_NONE = ("temperature", "repetition_penalty", "stop", "engine")
OWN = {"temperature": [2**1100], "repetition_penalty": [2**1100, 0], "seed": [2**70, 1.5], "top_k": [1.5]}


@pytest.mark.parametrize("name", [*sorted(GenerateOptions.__optional_keys__), "max_new_tokens"])
def test_an_option_of_another_type_or_range_is_refused_by_its_name(model: GPTModel, name: str):
    none = [None] if name in NEVER_NONE else []
    text = [] if name == "stop" else ["0.7"]
    for value in (*WRONG, *none, *text, *OWN.get(name, [])):
        with pytest.raises(UsageError, match=f"^{name} must be .*, got "):
            model.generate([[1]], **{"max_new_tokens": 3, "temperature": 1.0, name: value})


def test_an_option_at_the_end_of_its_range_is_taken(model: GPTModel):
    for options in (
        {"temperature": 1e308, "repetition_penalty": 1e-9},
        {"temperature": 5e-324, "repetition_penalty": 1e9},
        {"temperature": 2, "top_k": 10**9, "top_p": 1, "min_p": 0, "seed": 2**64 - 1},
        {"temperature": 1, "top_k": 1, "top_p": 5e-324, "min_p": 1, "seed": 0, "window": 31, "stop": 100},
        {"top_k": None, "top_p": None, "min_p": None, "seed": None, "window": None, "encoding": None},
    ):
        assert len(model.generate([[1]], 9, **options)[0]) == 10


def test_an_encoding_without_an_end_of_text_and_with_gaps_can_generate(model: GPTModel):
    """tiktoken raises KeyError for both."""
    ranks = {bytes([byte]): byte for byte in range(80)} | {b"ab": 100}
    encoding = tiktoken.Encoding("gaps", pat_str=r"\w+|.", mergeable_ranks=ranks, special_tokens={})
    rows = model.generate([[1], [2]], 25, temperature=2.0, seed=0, encoding=encoding, stop="never\n")
    assert {id for row in rows for id in row.tolist()} & set(range(80, 100))


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        model = GPTModel(GPTConfig(101, 32, 16, 2, 1))
    for use in (lambda: model.generate([[1]], 3), lambda: evaluate(model, torch.arange(9))):
        with pytest.raises(UsageError, match="the model's weights are on meta, without memory; load or"):
            use()


class Louder(GPTModel):
    def hidden(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        return 2 * super().hidden(ids, cache)


def own_forward(model: GPTModel) -> None:
    block = model.trf_blocks[1]
    block.forward = lambda x, cache, mask: -type(block).forward(block, x, cache, mask)


def own_hidden(model: GPTModel) -> None:
    model.hidden = lambda ids, cache=None: -GPTModel.hidden(model, ids, cache)


CHANGES = {
    "another activation": lambda model: [
        setattr(block.ff.layers, "1", torch.nn.ReLU()) for block in model.trf_blocks
    ],
    "the other GELU": lambda model: setattr(model.trf_blocks[2].ff.layers, "1", torch.nn.GELU()),
    "one layer more": lambda model: model.trf_blocks[0].ff.layers.append(torch.nn.ReLU()),
    "another norm": lambda model: setattr(model, "final_norm", torch.nn.Identity()),
    "a head of two layers": lambda model: setattr(
        model, "out_head", torch.nn.Sequential(model.out_head, torch.nn.Tanh())
    ),
    "a subclass": lambda model: setattr(model, "__class__", Louder),
    "a block's own forward": own_forward,
    "the model's own hidden": own_hidden,
    "a hook": lambda model: model.trf_blocks[0].register_forward_hook(lambda module, args, y: -y),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_computed_by_torch(change: str, long_model: GPTModel, monkeypatch):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    monkeypatch.setattr("gpt2lite.generation.engines.FEWEST_FOR_NUMBA", 0)
    assert choose_engine(long_model, 1, 20, "auto") == "numba"
    CHANGES[change](long_model)
    assert choose_engine(long_model, 1, 20, "auto") == "torch"
    with pytest.raises(UsageError, match=r'engine="numba" cannot run this model: \S+ is not as in GPTModel'):
        long_model.generate([[1]], 20, engine="numba")


NOT_DENSE = {
    "sparse": lambda: torch.arange(3).to_sparse(),
    "meta": lambda: torch.arange(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.arange(3), torch.arange(4)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("make", NOT_DENSE.values(), ids=NOT_DENSE)
def test_ids_without_a_value_at_each_place_are_refused(make, model):
    for ids, found in ((make(), "one"), ([make()], "a row")):
        with pytest.raises(UsageError, match=f"got {found} that is nested, sparse, quantized or on meta"):
            model.generate(ids, 2)
