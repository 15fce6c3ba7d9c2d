"""A model that several processes share, in real ones: torchrun, gloo, 2 and 4 ranks, which run `ranks.py`."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, randomise
from ranks import BIG_HEADS, RECIPE, curve, task
from torch import nn
from torch.distributed import checkpoint

from gpt2lite import CheckpointError, GPTConfig, GPTModel, Recipe, UsageError, convert, finetune
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning.loop import read_metrics
from gpt2lite.finetuning.lora import add_lora
from gpt2lite.tokenizer import tokenizer_files

MIB = 1 << 20
KINDS = ("fsdp", "tp", "ddp", "both")
SIZES = (2, 4)
RUNS = [*((2, kind) for kind in KINDS), (4, "fsdp"), (4, "both")]
BIG = GPTConfig(8001, 1024, 512, BIG_HEADS, 8)  # 130 MiB; rows that divide by neither; 32 MiB of masks
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc on this system")


def torchrun(size: int, *args: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(
        [*TORCHRUN, str(size), *map(str, args)], capture_output=True, text=True, env=env, timeout=600
    )


def saw(folder: Path, size: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"saw-{size}-{rank}.json").read_text()) for rank in range(size)]


def write_files(folder: Path) -> None:
    model = randomise(GPTModel(TINY))
    torch.save(model.state_dict(), folder / "model.pth")
    tied = randomise(GPTModel(GPTConfig.of(TINY.as_dict() | {"tied_head": True})))
    tied.save_checkpoint(folder / "tied.pth")
    (folder / "other").mkdir()
    randomise(GPTModel(tied.config), seed=1).save_checkpoint(folder / "other" / "tied.pth")
    adapted = GPTModel(TINY)
    add_lora(adapted, Recipe(lora_rank=2))
    torch.save(adapted.state_dict(), folder / "lora.pth")
    model.save_checkpoint(folder / "model.safetensors")
    convert(folder / "tied.pth", folder / "sharded", to="huggingface", max_shard_size="20KiB")
    convert(folder / "model.safetensors", folder / "hub.safetensors", to="huggingface")
    three = GPTModel({**TINY.as_dict(), "n_heads": 3})
    torch.save(three.state_dict(), folder / "three.pth")
    torch.save(nn.Linear(2, 2).state_dict(), folder / "linear.pth")
    torch.save(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)).state_dict(), folder / "plain.pth")
    write_random_checkpoint(BIG, folder / "big.pth")
    convert(folder / "big.pth", folder / "big.safetensors", to="huggingface", config={"n_heads": BIG_HEADS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes, then 2 ranks, then 4, which resume what the two began."""
    folder = tmp_path_factory.mktemp("ranks")
    write_files(folder)
    one = GPTModel.from_checkpoint(folder / "tied.pth")
    finetune(one, task(), folder / "one", Recipe(**RECIPE))
    one = GPTModel.from_checkpoint(folder / "tied.pth")
    finetune(one, task(), folder / "lora", Recipe(**RECIPE, lora_rank=2))
    for size in SIZES:
        result = torchrun(size, Path(__file__).with_name("ranks.py"), folder)
        assert result.returncode == 0, result.stderr[-4000:]
        for kind in KINDS if size == 2 else ():
            shutil.copytree(folder / f"run-{kind}-2", folder / f"cut-{kind}")
            (folder / f"cut-{kind}" / "step-000010.pth").unlink()
            shutil.copytree(folder / f"cut-{kind}", folder / f"alone-{kind}")
    return folder


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_has_the_bits_of_one_process(folder: Path, size: int, kind: str):
    for found in saw(folder, size):
        loads = {name: each for name, each in found["loads"].items() if f" {kind} " in name}
        assert len(loads) == (8 if size == 2 else 4)
        assert all(equal for equal, *_ in loads.values())
        tied = {f"{file} {kind} stream" for file in ("tied.pth", "sharded")}
        assert {name for name, (*_, is_tied) in loads.items() if is_tied} == tied & loads.keys()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_writes_and_evaluates_as_one_process_does(folder: Path, size: int, kind: str):
    for found in saw(folder, size):
        for name, (_, difference, same_tokens, off, _) in found["loads"].items():
            if f" {kind} " in name:
                assert difference <= (1e-5 if kind in ("tp", "both") else 0), name
                assert same_tokens, name
                assert off <= 1e-3, name


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_and_reads_its_own_part(folder: Path, size: int):
    for found in saw(folder, size):
        for name, (shard, peak, read, foreseen) in found["memory"].items():
            assert shard <= read <= shard + 8 * MIB, name
            assert peak <= shard + 64 * MIB + 24 * MIB, name
            assert peak <= foreseen + max(24 * MIB, 0.03 * foreseen), name


def test_a_strategy_that_reads_the_whole_file_fills_a_part_as_forecast(folder: Path):
    nbytes = (folder / "big.pth").stat().st_size
    for shard, peak, foreseen in (found["whole_files"] for found in saw(folder, 2)):
        assert nbytes < foreseen < shard + 1.01 * nbytes
        assert peak <= foreseen + 24 * MIB


def test_the_first_rank_reads_for_all_where_it_is_told_to(folder: Path):
    for rank, found in enumerate(each["broadcasts"] for each in saw(folder, 2)):
        whole, peak, read, foreseen = found["sizes"]
        assert found["equal"] == [True] * 3
        assert read < 4 * MIB if rank else whole <= read  # what measures reads, too
        assert whole <= foreseen
        assert peak <= foreseen + 24 * MIB


@pytest.mark.parametrize("size", SIZES)
def test_dividing_sends_nothing_and_short_parts_are_copied_once_as_forecast(folder: Path, size: int):
    first, *others = (found["traps"] for found in saw(folder, size))
    assert all(found["sent"] == 0 for found in (first, *others))
    assert first["copied"] == 0 < others[-1]["copied"] == others[-1]["foreseen"]


def test_fsdp_ranks_hold_the_model_once_together(folder: Path):
    shards = [found["memory"]["big.pth fsdp"][0] for found in saw(folder, 4)]
    with torch.device("meta"):
        model = GPTModel(BIG)
    assert sum(shards) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_any_module_is_divided_also_over_more_ranks_than_rows(folder: Path, size: int):
    found = saw(folder, size)
    assert all(each["modules"][name][0] for each in found for name in ("alone", "by hand"))
    parts = [each["modules"]["alone"][1] for each in found]
    assert [sum(column) for column in zip(*parts, strict=True)] == [15, 5, 5, 1]
    assert parts[-1][-1] == 0  # the last rank has no row of the last layer
    assert all(each["modules"]["by hand"][1][2:] == [5, 1] for each in found)  # not divided


# ---- training, saving --------------------------------------------------------------------------------------


def assert_close(got: list[Any], wanted: list[Any]) -> None:
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(("size", "kind"), RUNS)
def test_ranks_train_on_the_curve_of_one_process(folder: Path, size: int, kind: str):
    for found in saw(folder, size):
        assert_close(found["trains"][kind], curve(folder / "one"))


def test_adapters_train_with_ddp_on_the_curve_of_one_process(folder: Path):
    for found in saw(folder, 2):
        assert_close(found["trains"]["lora"], curve(folder / "lora"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_ranks_saved_goes_on_with_four(folder: Path, kind: str):
    for found in saw(folder, 4):
        assert_close(found["resumes"][kind], curve(folder / "one"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_ranks_saved_goes_on_with_one(folder: Path, kind: str):
    out = folder / f"alone-{kind}"
    finetune(GPTModel.from_checkpoint(folder / "tied.pth"), task(), out, Recipe(**RECIPE), resume=True)
    assert_close(curve(out), curve(folder / "one"))


@pytest.mark.parametrize(("size", "kind"), RUNS)
def test_ranks_save_the_bytes_that_one_process_saves(folder: Path, tmp_path: Path, size: int, kind: str):
    out = folder / f"run-{kind}-{size}"
    model = GPTModel.from_checkpoint(out / "model.pth")
    assert model.out_head.weight is model.tok_emb.weight
    for name in ("model.pth", "again.safetensors"):
        model.save_checkpoint(tmp_path / name)
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert not [path for path in (*out.iterdir(), *folder.iterdir()) if path.suffix == ".part"]


# ---- torch's own checkpoints (DCP) -------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_reads_its_own_ranges_of_a_distributed_checkpoint(folder: Path, size: int):
    for found in (each["dcp"] for each in saw(folder, size)):
        assert found["equal"]
        assert found["shard"] <= found["read"] <= found["shard"] + 8 * MIB


@pytest.mark.parametrize("size", SIZES)
def test_a_distributed_checkpoint_opens_in_one_process_and_is_converted(
    folder: Path, tmp_path: Path, size: int
):
    wanted = next(GPTModel.from_checkpoint(folder / "tied.pth").parameters())
    source = folder / f"dcp-{size}"
    for strategy in ("stream", "sequential", "meta"):
        model = GPTModel.from_checkpoint(source, strategy=strategy, config={"n_heads": TINY.n_heads})
        assert torch.equal(model.tok_emb.weight, wanted)
    with pytest.raises(UsageError, match="cannot be mapped; use strategy="):
        GPTModel.from_checkpoint(source, strategy="mmap", config={"n_heads": TINY.n_heads})
    convert(source, tmp_path / "model.pth", config={"n_heads": TINY.n_heads})
    assert torch.equal(torch.load(tmp_path / "model.pth")["tok_emb.weight"], wanted)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_distributed_checkpoint_that_convert_writes(folder: Path, tmp_path: Path):
    convert(folder / "model.safetensors", tmp_path / "dcp", format="dcp")
    wanted = GPTModel.from_checkpoint(folder / "model.safetensors").state_dict()
    found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
    checkpoint.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert GPTModel.from_checkpoint(tmp_path / "dcp", strategy="mmap").config == TINY


def test_commands_that_read_open_what_ranks_wrote(folder: Path, capsys: pytest.CaptureFixture[str]):
    source, short = folder / "embedded-2", ["--max-new-tokens", "8", "--prompt", "Once upon a time"]
    for name, content in tokenizer_files(EMBEDDED, in_folder=True).items():
        (source / name).write_bytes(content)
    heads = str(GPTModel.from_checkpoint(EMBEDDED).config.n_heads)
    assert main(["generate", *short]) == 0
    wanted = capsys.readouterr().out
    assert main(["generate", "--model", str(source), "--n-heads", heads, *short]) == 0
    assert capsys.readouterr().out == wanted


class Shout:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict_metadata": Shout()}, "not the .metadata of a distributed checkpoint"),
        (Shout(), "not the .metadata of a distributed checkpoint"),
        (None, "its pickle is damaged"),
    ],
)
def test_a_metadata_pickle_is_never_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, said: str
):
    (tmp_path / ".metadata").write_bytes(b"\x80\x04junk" if content is None else pickle.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        GPTModel.from_checkpoint(tmp_path)
    assert not capsys.readouterr().out


def test_a_metadata_that_names_a_file_elsewhere_is_refused(folder: Path, tmp_path: Path):
    convert(folder / "model.safetensors", tmp_path / "dcp", format="dcp")
    path = tmp_path / "dcp" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../0_0.distcp"[:12]))
    with pytest.raises(CheckpointError, match="which is no file in it"):
        GPTModel.from_checkpoint(tmp_path / "dcp")


# ---- what is refused, and errors ---------------------------------------------------------------------------

REFUSED = {
    "baseline": "a model over several ranks is never built whole; use strategy=",
    "int8": "LoRA layers, int8 weights and modules that load themselves or cannot be built on meta",
    "lora in the file": "are not divided over ranks; load it without mesh",
    "broadcast": 'Tuning(broadcast=True) needs a mesh with mesh_dim_names=("ddp",)',
    "broadcast mapped": 'broadcast=True goes with strategy="stream"',
    "names": "a mesh with the dimensions ('pp',); known mesh_dim_names",
    "lora": "does not train with lora_rank",
    "classifier": "out_head.weight, out_head.bias came into the model after it was divided",
    "16 bits": "a divided model trains in fp32",
    "no seed": "must draw the same tokens; pass a seed",
    "heads": "3 heads do not divide by",
    "module": "Linear has no plan for tensor parallelism; pass parallelize",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_ranks_cannot_do_is_refused_by_name_on_all(folder: Path, what: str):
    assert all(REFUSED[what] in found["refusals"][what] for size in SIZES for found in saw(folder, size))


@pytest.mark.parametrize("size", SIZES)
def test_an_error_on_one_rank_is_raised_on_all(folder: Path, size: int):
    *others, last = (found["refusals"] for found in saw(folder, size))
    assert last["one rank"] == "OSError: its disk is full"
    assert {each["one rank"] for each in others} == {
        f"GPT2LiteError: rank {size - 1}: OSError: its disk is full"
    }
    assert others[0]["memory"].startswith("GPT2LiteError: rank 1: InsufficientMemoryError: ")


OTHER = "UsageError: rank 1 was given other {} than rank 0"
DIFFER = {
    "prompts": "prompts or options",
    "number of tokens": "prompts or options",
    "text": "ids, context or stride",
    "file": "configs",
    "weights": "files or options",
    "dtype": "files or options",
    "heads": "configs",
    "recipe": "recipe, data or folder",
    "data": "recipe, data or folder",
    "later data": "batches for step 2",
    "path": "paths",
}


@pytest.mark.parametrize("what", DIFFER)
def test_ranks_that_are_given_different_things_are_all_told_so(folder: Path, what: str):
    for found in saw(folder, 2):
        assert found["differ"][what].startswith(OTHER.format(DIFFER[what]))


@pytest.mark.parametrize(
    ("what", "rank", "wanted"),
    [
        ("a wrong prompt", 1, "UsageError: ids must be a tensor of integers"),
        ("no file", 1, "CheckpointNotFoundError: "),
        ("no batch", 1, "OSError: its disk is full"),
        ("report", 0, "OSError: its disk is full"),
    ],
)
def test_a_rank_that_fails_alone_ends_what_all_do(folder: Path, what: str, rank: int, wanted: str):
    for number, found in enumerate(saw(folder, 2)):
        prefix = "" if number == rank else f"GPT2LiteError: rank {rank}: "
        assert found["differ"][what].startswith(prefix + wanted)


@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_rank_that_ends_while_others_wait_for_it_ends_them(folder: Path, how: str):
    began = time.monotonic()
    result = torchrun(2, Path(__file__).with_name("ranks.py"), folder, how)
    assert result.returncode != 0
    assert time.monotonic() - began < 90  # and not torch's half an hour
    assert how == "dies" or "OSError: its disk is full" in result.stderr


# ---- the command line --------------------------------------------------------------------------------------


def test_ranks_without_torchrun_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["finetune", str(folder / "tied.pth"), "--text", __file__, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--parallel", "fsdp"]) == 1
    assert "torchrun --nproc-per-node 2 -m gpt2lite … --parallel fsdp" in capsys.readouterr().err


def test_processes_that_are_not_told_how_to_share_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate"]) == 1
    assert "--parallel fsdp, tp, ddp" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", ["fsdp", "tp", "ddp"])
def test_plan_needs_no_ranks(folder: Path, capsys: pytest.CaptureFixture[str], parallel: str):
    options = ["--n-heads", str(BIG_HEADS), "--json"]
    plan = ["plan", str(folder / "big.pth"), "--ranks", "4", "--parallel", parallel, *options]
    assert main(plan) == 0
    rows = {row["strategy"]: row for row in json.loads(capsys.readouterr().out)["strategies"]}
    foreseen = rows["stream"]["forecast"]["peak_host_anonymous"]
    if parallel != "ddp":
        assert foreseen == saw(folder, 4)[0]["memory"][f"big.pth {parallel}"][3]
        assert rows["baseline"]["why"].startswith("a model over several ranks")


def test_plan_of_training_divides_what_ranks_share(folder: Path, capsys: pytest.CaptureFixture[str]):
    plan = ["plan", str(folder / "tied.pth"), "--train", "--json", "--batch-size", "2", "--seq-len", "8"]
    found = {}
    for ranks in ([], ["--ranks", "2"], ["--ranks", "2", "--parallel", "ddp"]):
        assert main([*plan, *ranks]) == 0
        found[" ".join(ranks)] = json.loads(capsys.readouterr().out)["forecast"]
    one, fsdp, ddp = found.values()
    for name in ("weights", "gradients", "optimizer"):
        assert ddp[name] == one[name]
        assert one[name] / 2 <= fsdp[name] <= 0.52 * one[name]  # the first has one row more


def test_sigterm_finishes_the_step_on_all_ranks_and_saves(tmp_path: Path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Once upon a time there was a test that nobody had to wait for. " * 40)
    size = ["--steps", "5000", "--seq-len", "32", "--batch-size", "2", "--validate-every", "5000"]
    command = [
        "-m",
        "gpt2lite",
        "finetune",
        EMBEDDED,
        "--text",
        text,
        "--out",
        out,
        "--dtype",
        "float32",
        *size,
    ]
    arguments = [*TORCHRUN, "2", *command, "--parallel", "fsdp"]
    run = subprocess.Popen([*map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while run.poll() is None and not len(metrics := read_metrics(out)) > 1:
            time.sleep(0.1)
        run.terminate()
        said = run.communicate(timeout=120)[0].decode()
    finally:
        run.kill()
    metrics = read_metrics(out)
    assert "interrupted" in said
    assert [path.name for path in out.glob("step-*.pth")] == [f"step-{len(metrics):06}.pth"]
    assert [each["step"] for each in metrics] == [*range(len(metrics))]  # one rank alone wrote
