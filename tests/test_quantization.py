"""Weights as int8 as they stream: the same as of the loaded model, in the memory that was foretold."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise
from test_loading import HEADS, KINDS, save_pth

from gpt2lite import (
    STRATEGIES,
    CheckpointError,
    GPT2LiteError,
    GPTConfig,
    GPTModel,
    InsufficientMemoryError,
    Recipe,
    Task,
    Tuning,
    UsageError,
    finetune,
    forecast,
    load_lora,
    merge_lora,
)
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.cli import main
from gpt2lite.finetuning.data import text_batches
from gpt2lite.generation.engines import ENGINES, KVCache
from gpt2lite.quantization import Int8Embedding, Int8Linear

MIB = 1 << 20
LANGUAGE_KINDS = [kind for kind in KINDS if "lora" not in kind.lower()]
KEPT = ("pos_emb.weight",)


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's numbers by the definition: the largest becomes 127."""
    scale = weight.float().abs().amax(1) / 127
    return (weight.float() / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def assert_is_rounding_of(found: GPTModel, whole: GPTModel) -> None:
    wanted = dict(whole.named_parameters(remove_duplicate=False))
    state = dict(found.named_parameters(remove_duplicate=False))
    for name, parameter in wanted.items():
        if parameter.dim() < 2 or name in KEPT:
            assert torch.equal(state[name], parameter), name
            continue
        weight, scale = rounded(parameter.detach())
        torch.testing.assert_close(state[name.replace("weight", "scale")], scale, rtol=1e-6, atol=0, msg=name)
        assert state[name].dtype == torch.int8
        # a quotient that lies between two numbers may go either way
        assert int((state[name].int() - weight.int()).abs().max()) <= 1, name
        assert (state[name] == weight).float().mean() > 0.999, name


@pytest.mark.parametrize(
    "tuning", [Tuning(), Tuning(chunk_bytes=8192, ring_bytes=8192)], ids=["", "tiny ring"]
)
@pytest.mark.parametrize("kind", LANGUAGE_KINDS)
def test_every_kind_of_checkpoint_becomes_the_rounding_of_what_it_holds(
    kind: str, tuning: Tuning, tmp_path: Path, unwritten_memory_is_nan: None
):
    make, save = KINDS[kind]
    path = save(make().state_dict(), tmp_path)
    whole = GPTModel.from_checkpoint(path, strategy="stream", config=HEADS)
    found = GPTModel.from_checkpoint(path, config=HEADS, quantize="int8", tuning=tuning)
    assert_is_rounding_of(found, whole)
    tied = whole.out_head.weight is whole.tok_emb.weight
    assert (found.out_head.weight is found.tok_emb.weight) == tied
    assert (found.out_head.scale is found.tok_emb.scale) == tied


def test_a_row_of_zeros_stays_zero(model: GPTModel, tmp_path: Path, ids: torch.Tensor):
    with torch.no_grad():
        model.out_head.weight[3] = 0
    found = GPTModel.from_checkpoint(save_pth(model.state_dict(), tmp_path), config=HEADS, quantize="int8")
    assert not found.out_head.weight[3].any()
    assert found.out_head.scale[3] == 0
    assert torch.equal(found(ids)[..., 3], torch.zeros(ids.shape))


def test_layers_compute_with_the_rounded_numbers(pth: Path, ids: torch.Tensor):
    found = GPTModel.from_checkpoint(pth, config=HEADS, quantize="int8")
    plain = GPTModel.from_checkpoint(pth, config=HEADS)
    with torch.no_grad():
        for name, part in found.named_modules():
            if isinstance(part, Int8Linear | Int8Embedding):
                plain.get_submodule(name).weight.copy_(part.weight.float() * part.scale[:, None])
    torch.testing.assert_close(found(ids), plain(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_matrix_takes_the_dtype(pth: Path, dtype: torch.dtype, ids: torch.Tensor):
    found = GPTModel.from_checkpoint(pth, config=HEADS, quantize="int8", dtype=dtype)
    scales = {
        name for name, _ in found.named_parameters() if name.endswith(("W_key.scale", "out_head.scale"))
    }
    assert len(scales) == TINY.n_layers + 1
    assert found.final_norm.scale.dtype == found.pos_emb.weight.dtype == found(ids).dtype == dtype
    assert found.out_head.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numba_gives_torchs_logits_of_int8(pth: Path, dtype: torch.dtype, ids: torch.Tensor):
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    found = GPTModel.from_checkpoint(pth, config=HEADS, quantize="int8", dtype=dtype)
    with torch.inference_mode():
        wanted = found(ids)[:, -1].float()
        cache = KVCache(found.config, len(ids), ids.shape[1], found.pos_emb.weight)
        step = ENGINES["numba"][1](found, cache)
        step(ids[:, :-3])
        logits = [step(column) for column in ids[:, -3:].split(1, 1)][-1]
    tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
    torch.testing.assert_close(logits, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"strategy": name}, "stream") for name in STRATEGIES if name != "stream"),
        ({"quantize": "int4"}, "quantize must be None or int8, got 'int4'"),
    ],
)
def test_what_cannot_be_quantised_is_refused(pth: Path, options: Mapping[str, str], message: str):
    arguments = {"quantize": "int8", **options}
    with pytest.raises(UsageError, match=message):
        GPTModel.from_checkpoint(pth, config=HEADS, **arguments)


@pytest.mark.parametrize("tied", [False, True])
def test_whatever_else_is_done_with_int8_is_refused_by_its_name(tied: bool, tmp_path: Path):
    config = GPTConfig.of(TINY.as_dict() | {"tied_head": tied})
    recipe = Recipe(steps=1, batch_size=2, seq_len=8, lora_rank=2)
    task = Task(text_batches(torch.arange(99), 8, 2, 0), [])
    model = randomise(GPTModel(config))
    model.save_checkpoint(tmp_path / "model.pth")
    finetune(model, task, tmp_path / "out", recipe)
    int8 = GPTModel.from_checkpoint(tmp_path / "model.pth", quantize="int8")
    before = int8.generate([[1, 2]], 9)
    torch.save(int8.state_dict() | {"config": config.as_dict()}, tmp_path / "dict.pth")
    torch.save(int8, tmp_path / "whole.pth")
    for use, message in (
        (lambda: finetune(int8, task, tmp_path / "other", recipe), "an int8 model does not train"),
        (
            lambda: load_lora(int8, tmp_path / "out" / "adapters.pth"),
            "adapter for .*W_query, which in the model is int8; load the model without",
        ),
        (lambda: int8.save_checkpoint(tmp_path / "x.pth"), "cannot save an int8 model"),
        (lambda: GPTModel.from_checkpoint(tmp_path / "dict.pth", config=config), "holds torch.int8"),
        (lambda: GPTModel.from_checkpoint(tmp_path / "whole.pth"), "class='gpt2lite.quantization.Int8"),
    ):
        with pytest.raises(GPT2LiteError, match=message):
            use()
    merge_lora(int8)  # has none
    assert torch.equal(int8.generate([[1, 2]], 9)[0], before[0])
    assert torch.equal(copy.deepcopy(int8).generate([[1, 2]], 9)[0], before[0])


def test_an_int8_model_is_not_saved(pth: Path, tmp_path: Path):
    found = GPTModel.from_checkpoint(pth, config=HEADS, quantize="int8")
    with pytest.raises(UsageError, match="cannot save an int8 model"):
        found.save_checkpoint(tmp_path / "again.pth")
    assert not (tmp_path / "again.pth").exists()


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("names", ["book", "huggingface"])
def test_the_peak_is_the_int8_model_and_the_ring(tmp_path: Path, names: str):
    from gpt2lite import convert

    script = """
import json, sys
from gpt2lite import GPTModel, forecast, track_memory
def load(path):
    return GPTModel.from_checkpoint(path, quantize="int8", config={"n_heads": 8})
load(sys.argv[1])
foretold = forecast(sys.argv[2], quantize="int8", config={"n_heads": 8})["stream"].peak_host_anonymous
with track_memory() as memory:
    model = load(sys.argv[2])
print(json.dumps([memory.peak_host_anonymous, foretold, sum(p.nbytes for p in model.parameters())]))
"""
    paths = []
    for name, config in (
        ("small", GPTConfig(100, 32, 64, 8, 2)),
        ("large", GPTConfig(8000, 512, 512, 8, 8)),
    ):
        path = tmp_path / f"{name}.pth"
        write_random_checkpoint(config, path)
        if names == "huggingface":  # (in, out): rows of ours are columns of theirs
            path = convert(path, tmp_path / name, to="huggingface", config={"n_heads": 8}, verify=False)
        paths.append(path)
    result = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    peak, foretold, model_bytes = json.loads(result.stdout)
    assert model_bytes < 0.3 * 133 * MIB  # of fp32's
    assert abs(peak - foretold) <= 24 * MIB
    assert peak <= model_bytes + 64 * MIB + 24 * MIB


def test_a_cap_below_the_int8_model_is_refused_and_one_above_it_loads(tmp_path: Path):
    path = tmp_path / "model.pth"
    write_random_checkpoint(GPTConfig(8000, 512, 512, 8, 8), path)
    options = {"quantize": "int8", "config": {"n_heads": 8}}
    with pytest.raises(InsufficientMemoryError, match="nothing was allocated"):
        GPTModel.from_checkpoint(path, max_host_memory="24MiB", **options)
    assert (
        GPTModel.from_checkpoint(path, max_host_memory="64MiB", **options).out_head.weight.dtype == torch.int8
    )
    assert list(forecast(path, quantize="int8", config={"n_heads": 8})) == ["stream"]


def test_the_commands_take_it(pth: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(pth), "--n-heads", "4", "--quantize", "int8"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not int8") == len(STRATEGIES) - 1
    assert shown.splitlines()[-1].split() == ["auto", "stream"]
    assert main(["generate", "--quantize", "int8", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")


KEPT_MIXTURES = {
    "tok_emb.weight": True,
    "out_head.weight": True,
    "final_norm.scale": False,
    "pos_emb.weight": False,
}


@pytest.mark.parametrize(("name", "loads"), KEPT_MIXTURES.items())
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_file_of_several_dtypes_computes_or_is_refused_when_it_is_loaded(
    model: GPTModel, tmp_path: Path, ids: torch.Tensor, name: str, loads: bool, dtypes: tuple
):
    most, other = dtypes
    state = {each: tensor.to(other if each == name else most) for each, tensor in model.state_dict().items()}
    path = save_pth(state, tmp_path)
    if loads:
        found = GPTModel.from_checkpoint(path, config=HEADS, quantize="int8")
        assert found(ids).dtype == most
        assert found.generate(ids, 3).shape == (2, 20)
        return
    with pytest.raises(CheckpointError, match=rf"holds .*{name} …\); GPTModel computes in one of"):
        GPTModel.from_checkpoint(path, config=HEADS, quantize="int8")
