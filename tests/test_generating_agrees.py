"""What is generated and evaluated is what was asked for, or it is refused: never something close."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, in_threads, randomise, where_positions_decide
from torch import Tensor

from gpt2lite import GPTConfig, GPTModel, UsageError, evaluate
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning.data import open_tokens, tokenize_file
from gpt2lite.finetuning.examples import read_records
from gpt2lite.generation import KVCache
from gpt2lite.generation.decoding import Sampling, keep_top_p, penalise, probabilities
from gpt2lite.generation.engines import CursorCache, last_logits
from gpt2lite.reading_text import typed_text
from gpt2lite.tokenizer import tokenizer_for

Command = pytest.CaptureFixture[str]


# ---- modes -------------------------------------------------------------------------------------------------


@pytest.fixture
def dropping() -> GPTModel:
    """In training mode with dropout, but for one block."""
    model = randomise(GPTModel(GPTConfig.of(TINY.as_dict() | {"drop_rate": 0.4}))).train()
    model.trf_blocks[1].eval()
    return model


def modes(model: GPTModel) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def in_eval(model: GPTModel) -> GPTModel:
    copy = GPTModel(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def test_dropout_is_off_and_every_mode_is_kept(dropping: GPTModel, ids: Tensor, engine: str):
    before, right = modes(dropping), in_eval(dropping)
    text = torch.arange(90)
    assert evaluate(dropping, text).nats == evaluate(right, text).nats
    for options in ({}, {"window": 9}, {"temperature": 1.0, "seed": 1}):
        wanted = right.generate(ids, 15, engine=engine, **options)
        assert torch.equal(dropping.generate(ids, 15, engine=engine, **options), wanted)
    assert modes(dropping) == before


def test_the_mode_is_kept_after_an_error_and_between_tokens(dropping: GPTModel, ids: Tensor):
    before = modes(dropping)
    tokens = dropping.generate_tokens(ids, 15)
    next(tokens)
    assert modes(dropping) == before
    tokens.close()

    def fail(*_: object) -> None:
        raise RuntimeError("a hook of the caller's")

    dropping.trf_blocks[2].register_forward_hook(fail)
    for work in (lambda: dropping.generate(ids, 3), lambda: evaluate(dropping, ids[0])):
        with pytest.raises(RuntimeError, match="a hook of the caller's"):
            work()
        assert modes(dropping) == before


def test_threads_that_share_a_model_in_training_mode_all_get_the_right_tokens(
    dropping: GPTModel, ids: Tensor
):
    before, wanted = modes(dropping), in_eval(dropping).generate(ids, 15, engine="torch")
    found = in_threads(4, lambda: dropping.generate(ids, 15, engine="torch"))
    assert all(torch.equal(each, wanted) for each in found)
    assert modes(dropping) == before


# ---- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("p", [1e-6, 0.5, 0.9, 0.999999, math.nextafter(1, 0)])
def test_top_p_keeps_every_token_that_belongs(spread: float, p: float):
    """Beside sums without rounding: a token belongs where those before it have less than p."""
    logits = torch.randn(1, 20_011, generator=torch.Generator().manual_seed(0)) * spread
    shares = logits[0].double().softmax(0).sort(descending=True).values.tolist()
    low, high = 0, len(shares)
    while low < high:  # the first whose predecessors have p together
        middle = (low + high) // 2
        low, high = (low, middle) if math.fsum(shares[:middle]) >= p else (middle + 1, high)
    kept = int(keep_top_p(logits, p).isfinite().sum())
    assert kept == min(low, len(shares)) or (1 - p < 1e-12 and kept >= len(shares) - 1)


@pytest.mark.parametrize("options", [{"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 50257}, {"top_k": 10**6}])
def test_a_filter_that_lets_all_through_changes_nothing(options: dict):
    logits = torch.randn(2, 50257, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(probabilities(logits, Sampling(1.0, **options)), probabilities(logits, Sampling(1.0)))
    assert torch.equal(logits, keep_top_p(logits, 1.0))


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_filter_without_a_temperature_is_refused(model: GPTModel, options: dict, capsys: Command):
    name, value = next(iter(options.items()))
    with pytest.raises(
        UsageError, match=f"{name} has no effect at temperature 0; pass a temperature above 0"
    ):
        model.generate([[1]], 3, **options)
    assert main(["generate", f"--{name.replace('_', '-')}", str(value)]) == 1
    out, err = capsys.readouterr()
    assert (out, f"{name} has no effect" in err) == ("", True)
    assert model.generate([[1]], 3, top_p=1.0, min_p=0.0)[0].shape == (4,)  # asks for nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_penalty_is_computed_in_fp32_as_in_transformers(dtype: torch.dtype):
    processors = pytest.importorskip("transformers.generation", reason="transformers is not installed")
    logits = (torch.randn(3, 999, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    ids = torch.randint(999, (3, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, 999, dtype=torch.bool).scatter_(1, ids, True)
    wanted = processors.RepetitionPenaltyLogitsProcessor(1.1)(ids, logits.float())
    assert torch.equal(penalise(logits, seen, 1.1), wanted)


def test_sixteen_bits_choose_the_token_that_the_penalty_leaves_first(config: GPTConfig):
    """3.03125 / 1.01 = 3.0012 is above 3, and would be 3 in bf16, where the lower id comes first."""
    model = GPTModel(GPTConfig.of(config.as_dict() | {"head_bias": True})).bfloat16().eval()
    torch.nn.init.zeros_(model.out_head.weight)
    torch.nn.init.constant_(model.out_head.bias, -9)
    model.out_head.bias.data[3], model.out_head.bias.data[7] = 3, 3.03125
    assert model.generate([[7]], 1, repetition_penalty=1.01, engine="torch")[0].tolist() == [7, 7]


def test_seeds_that_differ_above_32_bits_draw_other_tokens(model: GPTModel):
    texts = [
        model.generate([[1]], 20, temperature=1.5, seed=seed)[0].tolist() for seed in (0, 2**32, 2**40, 2**63)
    ]
    assert len(set(map(tuple, texts))) == 4
    row = model.generate([[1], [1]], 20, temperature=1.5, seed=2**40 - 1)[1]
    assert row.tolist() == texts[2]


# ---- numbers that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 0}], ids=str)
def test_a_model_with_nan_is_one_clear_error(model: GPTModel, engine: str, options: dict, value: float):
    model.trf_blocks[1].ff.layers[2].weight.data[3, 5] = value
    with pytest.raises(UsageError, match=r"logits are NaN or infinite: its weights .*float32 is too narrow"):
        model.generate([[1, 2]], 5, engine=engine, **options)
    with pytest.raises(UsageError, match="logits are NaN or infinite"):
        list(model.generate_tokens([[1, 2]], 5, engine=engine, **options))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("pads", [None, [0, 3]])
def test_what_fresh_memory_holds_does_not_reach_a_cursor(
    model: GPTModel, ids: Tensor, garbage: float, pads: list[int] | None
):
    starts = None if pads is None else torch.tensor(pads)
    with torch.inference_mode():
        caches = [KVCache(model.config, 2, 32, model.pos_emb.weight, starts) for _ in range(2)]
        for cache, value in zip(caches, (0.0, garbage), strict=True):
            cache.memory.fill_(value)
            last_logits(model, ids[:, :9], cache)
        plain, moving = caches[0], CursorCache(caches[1])
        for column in ids[:, 9:].split(1, dim=1):
            moving.cursor.fill_(plain.length)
            wanted, found = last_logits(model, column, plain), last_logits(model, column, moving)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_tokens_as_they_come_can_be_trained_on(model: GPTModel, ids: Tensor):
    for token in model.generate_tokens(ids, 2):
        assert not token.is_inference()
        model(token).logsumexp(-1).sum().backward()
    assert model.tok_emb.weight.grad is not None


# ---- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)]
)
def test_a_row_in_a_batch_is_what_it_is_alone_but_for_rounding(dtype: torch.dtype, bound: float):
    """In 16 bits, so not to the token: what `generate` promises is the size of the difference."""
    model = GPTModel(GPTConfig(1000, 64, 96, 4, 4)).to(dtype).eval()
    prompts = [list(range(n)) for n in (1, 3, 9, 17)]
    padded = torch.tensor([[0] * (17 - len(row)) + row for row in prompts])
    with torch.inference_mode():
        starts = torch.tensor([17 - len(row) for row in prompts])
        cache = KVCache(model.config, 4, 17, model.pos_emb.weight, starts)
        together = last_logits(model, padded, cache).float()
        alone = torch.cat([model(torch.tensor([row]))[:, -1] for row in prompts]).float()
    assert (together - alone).abs().max() <= bound * alone.abs().max()


# ---- ids ---------------------------------------------------------------------------------------------------

NO_TEXT = [
    (torch.arange(50)[None], r"of shape \(tokens,\), one text, got torch.int64 \(1, 50\)"),
    (torch.arange(50.0), r"integers of shape \(tokens,\), one text, got torch.float32 \(50,\)"),
    (torch.ones(50, dtype=torch.bool), r"got torch.bool \(50,\)"),
    ([1, 2, 3], "got list"),
    (torch.tensor([1, 101, 5]), r"ids must be in 0 … 100, got 1 … 101"),
    (torch.tensor([1, -1]), r"ids must be in 0 … 100, got -1 … 1"),
]


@pytest.mark.parametrize(("ids", "message"), NO_TEXT, ids=[message for _, message in NO_TEXT])
def test_evaluate_refuses_what_are_no_ids_of_a_text(model: GPTModel, ids: object, message: str):
    with pytest.raises(UsageError, match=message):
        evaluate(model, ids)


@pytest.mark.parametrize("options", [{"context": 8.0}, {"context": True}, {"context": 8, "stride": 1.5}])
def test_evaluate_refuses_windows_that_are_no_ints(model: GPTModel, options: dict):
    with pytest.raises(UsageError, match="must be in 1 …"):
        evaluate(model, torch.arange(50), **options)


@pytest.mark.parametrize(
    "ids", [torch.ones(1, 5), torch.ones(1, 5, dtype=torch.bool), [[1.5]], [[True]], torch.ones(5).long()]
)
def test_generate_refuses_what_are_no_ids(model: GPTModel, ids: object):
    for generate in (model.generate, model.generate_tokens):
        with pytest.raises(UsageError, match="ids must be a tensor of integers of shape"):
            generate(ids, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32])
def test_integers_of_any_width_are_ids(model: GPTModel, dtype: torch.dtype):
    ids = torch.arange(90)
    assert evaluate(model, ids.to(dtype)).nats == evaluate(model, ids).nats
    assert torch.equal(model.generate(ids[None, :9].to(dtype), 5), model.generate(ids[None, :9], 5))


# ---- one reader for text -----------------------------------------------------------------------------------

TEXT = "Once upon a time, there was a cat.\nShe said: “no”.\n\nOne day\x0cshe\u2028ran away.\n"
WAYS = {
    "plain": TEXT.encode(),
    "mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "Windows": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
    "old Mac": TEXT.replace("\n", "\r").encode(),
}


def said(capsys: Command, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "latin-1"))


@pytest.mark.parametrize("way", WAYS)
def test_a_text_is_the_same_however_it_was_saved_and_wherever_it_is_read(
    way: str, tmp_path: Path, capsys: Command, monkeypatch: pytest.MonkeyPatch
):
    encoding = tokenizer_for(EMBEDDED, 1024)
    path, prompts = tmp_path / "text.txt", ("generate", "--max-new-tokens", "2", "--prompts")
    path.write_bytes(TEXT.encode())
    evaluated = ("evaluate", "--context", "16", "--json", "--text")
    right = said(capsys, *evaluated, str(path)).split('"tokens_per_second"')[0]
    written = said(capsys, *prompts, str(path))
    assert written.count("─" * 40) == 2  # three lines that are not blank

    path.write_bytes(WAYS[way])
    assert said(capsys, *evaluated, str(path)).split('"tokens_per_second"')[0] == right
    assert said(capsys, *prompts, str(path)) == written
    type_in(monkeypatch, WAYS[way])
    assert said(capsys, *evaluated, "-").replace('"-"', f'"{path}"').startswith(right)
    type_in(monkeypatch, WAYS[way])
    assert said(capsys, *prompts, "-") == written
    tokenize_file(path, tmp_path / "ids.bin", encoding)
    assert open_tokens(tmp_path / "ids.bin", 1024).tolist() == encoding.encode(TEXT)


@pytest.mark.parametrize("way", ["plain", "mark", "Windows"])
def test_records_are_read_like_any_text(way: str, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(WAYS[way].split(TEXT[:4].encode())[0] + b'text,label\r\n"a\r\nb",x\r\n')
    assert read_records(tmp_path / "a.csv", ("text", "label")) == [{"text": "a\nb", "label": "x"}]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"text": "a\u2028b"}\r\n\r\n'.encode())
    assert read_records(tmp_path / "a.jsonl", ("text",)) == [{"text": "a\u2028b"}]


def test_what_is_typed_is_read_as_a_file_is():
    assert typed_text("--prompt", "\ufeffé\r\nb") == "é\nb"
    with pytest.raises(UsageError, match="--prompt: not UTF-8 at byte 1"):
        typed_text("--prompt", "a\udcff")  # what Python makes of the byte 0xff


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfab\xff", b"abcde\xff"])
def test_the_first_wrong_byte_is_named_in_a_text_and_on_standard_input(
    content: bytes, tmp_path: Path, capsys: Command, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "text.txt").write_bytes(content)
    type_in(monkeypatch, content)
    for words in (["evaluate", "--text"], ["generate", "--prompts"]):
        for name in (str(tmp_path / "text.txt"), "-"):
            type_in(monkeypatch, content)
            assert main([*words, name]) == 1
            assert f"{name}: not UTF-8 at byte 5" in capsys.readouterr().err


# ---- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), ("--max-new-tokens", "9")])
def test_one_prompt_that_is_too_long_is_refused_before_any_is_written_on(
    extra: tuple[str, ...], tmp_path: Path, capsys: Command
):
    (tmp_path / "prompts.txt").write_text("Once upon a time\n" * 9 + "Anna " * 300)
    assert main(["generate", "--prompts", str(tmp_path / "prompts.txt"), *extra]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "new ones exceed the context of 256; shorten the prompt, or let a window slide: window=128" in err


def test_a_prompt_that_fills_the_context_is_not_told_to_ask_for_none(model: GPTModel):
    with pytest.raises(UsageError, match="new ones exceed the context of 32; shorten the prompt, or let"):
        model.generate([[1] * 40], 3)
    with pytest.raises(UsageError, match="shorten the prompt, ask for 2 at most, or let a window slide"):
        model.generate([[1] * 30], 3)


# ---- numba beside the program ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numba() -> None:
    """Compiled, so that a fresh process need not."""
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    GPTModel(TINY).eval().generate([[1]], 2, engine="numba")


PROGRAM = """
import warnings
import torch
from gpt2lite import GPTConfig, GPTModel
torch.manual_seed(0)
model = GPTModel(GPTConfig(101, 32, 48, 4, 3)).eval()
right = model.generate([[1]], 9, engine="torch")[0].tolist()
def noted():
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        assert model.generate([[1]], 9)[0].tolist() == right
    return [str(note.message) for note in notes]
import gpt2lite.generation.engines as engines
engines.FEWEST_FOR_NUMBA = 1
"""


def run(program: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("numba")
@pytest.mark.parametrize("count", ["1", "5"])
def test_torch_keeps_its_number_of_threads(count: str):
    found = run(
        f"torch.set_num_threads({count})\n"
        "for tokens in (1, 9):\n    model.generate([[1]], tokens, engine='numba')\n"
        "    print(torch.get_num_threads())\n"
        "from gpt2lite.generation import kernels\n"
        "try:\n    with kernels.threads_of_torch():\n        raise OSError\n"
        "except OSError:\n    print(torch.get_num_threads())",
        NUMBA_NUM_THREADS="2",
    )
    assert found.split() == [count] * 3


DAMAGE = {  # what does it, the environment, a fragment of the warning
    "JIT": ("", {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set"),
    "threads": ("", {"NUMBA_THREADING_LAYER": "tbb"}, "threading layer"),
    "no cache": (
        "import numba.core.caching as caching\ncaching.CacheImpl._locator_classes = []",
        {},
        "cannot cache function",
    ),
    "truncated cache": (
        "from gpt2lite.generation.kernels import run_block\n"
        "index = run_block._cache._cache_file._index_path\n"
        "open(index, 'wb').write(b'\\x80')",
        {"NUMBA_CACHE_DIR": "CACHE"},
        "EOFError|Unpickling|truncated",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_where_numba_does_not_work_torch_takes_over_with_one_warning(damage: str, tmp_path: Path):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    program, environment, message = DAMAGE[damage]
    cache = {name: value.replace("CACHE", str(tmp_path)) for name, value in environment.items()}
    first, second = run(f"{program}\nprint(*noted())\nprint(*noted())", **cache).split("\n")[:2]
    assert "numba does not work here" in first
    assert "torch generates instead. Set NUMBA_CACHE_DIR" in first
    assert any(part in first for part in message.split("|"))
    assert second == ""


def test_what_torch_makes_by_default_does_not_matter(model: GPTModel, engine: str):
    wanted = model.generate([[1, 2], [3]], 9, engine=engine, repetition_penalty=1.2)
    before = torch.get_default_dtype()
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "meta")):
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            found = model.generate([[1, 2], [3]], 9, engine=engine, repetition_penalty=1.2)
            loss = evaluate(model, torch.arange(90, device="cpu")).nats
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        assert [row.tolist() for row in found] == [row.tolist() for row in wanted]
        assert loss == evaluate(model, torch.arange(90)).nats


def test_weights_that_changed_in_place_are_the_ones_that_write(engine: str):
    model, other = (where_positions_decide(GPTModel(TINY)) for _ in range(2))
    for parameter in other.parameters():
        parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
    before, wanted = (each.generate([[1, 2]], 9, engine="torch")[0] for each in (model, other))
    assert not torch.equal(before, wanted)
    assert torch.equal(model.generate([[1, 2]], 9, engine=engine)[0], before)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(model.generate([[1, 2]], 9, engine=engine)[0], wanted)


def test_a_callback_that_raises_leaves_everything_as_it_was(dropping: GPTModel, engine: str):
    modes, state = [module.training for module in dropping.modules()], torch.get_rng_state()
    wanted = dropping.generate([[1, 2]], 9, engine=engine)[0].tolist()[2:]
    seen = []

    def callback(token: Tensor) -> None:
        seen.append(int(token))
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        if len(seen) == 3:
            raise EOFError

    tokens = dropping.generate_tokens([[1, 2]], 9, engine=engine, temperature=1.0, top_k=1, seed=3)
    with pytest.raises(EOFError):
        list(map(callback, tokens))
    assert seen == wanted[:3]
    assert [module.training for module in dropping.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["attention", "config"])
def test_heads_that_are_not_the_configs_are_refused(change: str, model: GPTModel, ids: Tensor, engine: str):
    if change == "config":
        model.config = replace(model.config, n_heads=2)
    else:
        model.trf_blocks[1].att.n_heads = 2
    for work in (lambda: model.generate(ids, 2, engine=engine), lambda: evaluate(model, ids[0])):
        with pytest.raises(UsageError, match=r"attention has n_heads=., its config says ."):
            work()


def test_a_model_of_fewer_blocks_is_run_by_torch_and_numba_stays(model: GPTModel, ids: Tensor):
    del model.trf_blocks[2]
    with pytest.raises(UsageError, match=r"cannot run this model: trf_blocks is not as in GPTModel"):
        model.generate(ids, 2, engine="numba")
    assert model.generate(ids, 2, engine="torch").shape[1] == ids.shape[1] + 2


def test_half_a_character_is_no_stop_and_no_memory_no_ids(model: GPTModel, ids: Tensor):
    with pytest.raises(UsageError, match="stop must be token ids in 0 … 100 and non-empty strings"):
        model.generate(ids, 2, stop=["\ud83d"])
    with pytest.raises(UsageError, match="ids must be a tensor of integers"):
        model.generate(ids.to("meta"), 2)
