"""The real huggingface_hub client against a server on loopback that answers as the Hub does."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_server import Hub, Repo, as_the_hub, commit_of
from huggingface_hub import constants
from test_cli import has_gpt2_encoding, on_a_terminal

from gpt2lite import CheckpointError, CheckpointNotFoundError, GPTModel, UsageError
from gpt2lite.cli import main
from gpt2lite.hub import OFFICIAL, fetch, fetch_file

HEADS = {"n_heads": 4}
NO_USE = {"tf_model.h5": b"tensorflow", "onnx/model.onnx": b"onnx", "flax_model.msgpack": b"flax"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of transformers', its files in one piece and in shards; one piece is more than 10 MiB."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50257, n_positions=64, n_embd=64, n_head=4, n_layer=2, bos_token_id=0, eos_token_id=0
    )
    model, folder = transformers.GPT2LMHeadModel(config).eval(), tmp_path_factory.mktemp("peer")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="200KB")
    return SimpleNamespace(
        model=model, single=files_of(folder / "single"), sharded=files_of(folder / "sharded")
    )


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.serve()
    yield hub
    hub.stop()


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client of this process turned to the server, with an empty cache; no other host can be reached."""
    as_the_hub(hub, monkeypatch, tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def tiny(hub: Hub, client: Path, peer: SimpleNamespace) -> str:
    hub.repos["owner/tiny"] = {"main": peer.single | NO_USE}
    return "owner/tiny"


def small(**files: bytes) -> Repo:
    return {"main": {name.replace("__", "."): content for name, content in files.items()}}


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    """Of a process whose Hub is the server and whose way to anywhere else is a closed port."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    closed = {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return {**inherited, **closed, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}


def run(hub: Hub, home: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process in such an environment answers."""
    environment = environment_of(hub, home) | more
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=120
    )


def same_logits(ours: GPTModel, peer: SimpleNamespace) -> None:
    ids = torch.arange(0, 50000, 1000)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), peer.model(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_model_by_its_name_gives_transformers_logits(tiny: str, peer: SimpleNamespace):
    same_logits(GPTModel.from_pretrained(tiny), peer)


def test_only_config_and_one_set_of_weights_are_fetched(tiny: str, hub: Hub):
    hub.repos[tiny]["main"] |= {"pytorch_model.bin": b"the same once more"}
    folder = fetch(tiny)
    assert hub.fetched() == {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == hub.fetched()


def test_the_tokenizer_is_fetched_where_there_is_one(tiny: str, hub: Hub):
    names = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"}
    hub.repos[tiny]["main"] |= dict.fromkeys(names, b"{}")
    assert {path.name for path in fetch(tiny).iterdir()} >= names


def test_a_second_time_nothing_is_fetched(tiny: str, hub: Hub):
    first = fetch(tiny)
    hub.asked.clear()
    assert fetch(tiny) == first
    assert hub.fetched() == set()


def test_shards_are_fetched_with_their_index(hub: Hub, client: Path, peer: SimpleNamespace):
    stray = {"model-00001-of-00099.safetensors": b"of an older set"}
    hub.repos["owner/sharded"] = {"main": peer.sharded | NO_USE | stray}
    folder = fetch("owner/sharded")
    wanted = {name for name in peer.sharded if "model" in name} | {"config.json", "generation_config.json"}
    assert len(wanted) > 4
    assert {path.name for path in folder.iterdir()} == wanted


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"pytorch_model.bin", "config.json"}, {"pytorch_model.bin", "config.json"}),
        ({"model.safetensors"}, {"model.safetensors"}),
        ({"model.safetensors", "model.safetensors.index.json", "a"}, {"model.safetensors"}),
        (
            {"pytorch_model.bin.index.json", "a", "b", "c"},
            {"pytorch_model.bin.index.json", "a", "b"},
        ),
        (
            {"model.safetensors.index.json", "a", "b", "pytorch_model.bin"},
            {"model.safetensors.index.json", "a", "b"},
        ),
    ],
    ids=lambda names: "+".join(sorted(names)),
)
def test_weights_are_taken_in_this_order(files: set[str], wanted: set[str], hub: Hub, client: Path):
    index = json.dumps({"weight_map": {"x": "a", "y": "b", "z": "a"}}).encode()
    hub.repos["owner/m"] = {"main": {name: index if "index" in name else name.encode() for name in files}}
    folder = fetch("owner/m")
    assert {path.name for path in folder.iterdir()} == wanted == hub.fetched()


def test_the_cache_serves_when_the_server_is_gone(tiny: str, hub: Hub, peer: SimpleNamespace):
    first = fetch(tiny)
    hub.stop()
    assert fetch(tiny) == first
    same_logits(GPTModel.from_pretrained(tiny), peer)


def test_local_files_only_asks_the_server_nothing(tiny: str, hub: Hub):
    first = fetch(tiny)
    hub.asked.clear()
    assert fetch(tiny, local_files_only=True) == first
    assert hub.asked == []


def test_offline_mode_takes_the_cache_and_else_says_what_to_do(
    tiny: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    first = fetch(tiny)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(tiny) == first
    with pytest.raises(CheckpointError, match=r"owner/more: not in the cache .*HF_HUB_OFFLINE forbids"):
        fetch("owner/more")
    assert hub.asked == []


def test_local_files_only_without_the_files_is_one_clear_error(client: Path):
    message = "owner/tiny: not in the cache .*local_files_only=True forbids .*pass the folder"
    with pytest.raises(CheckpointError, match=message):
        fetch("owner/tiny", local_files_only=True)


def test_a_cache_that_lacks_a_shard_is_not_taken(hub: Hub, client: Path, peer: SimpleNamespace):
    hub.repos["owner/sharded"] = {"main": dict(peer.sharded)}
    folder = fetch("owner/sharded")
    assert fetch("owner/sharded", local_files_only=True) == folder
    next(folder.glob("*-of-*")).unlink()
    with pytest.raises(CheckpointError, match="owner/sharded: not in the cache"):
        fetch("owner/sharded", local_files_only=True)


def test_a_download_that_was_cut_is_resumed_where_it_stopped(tiny: str, hub: Hub, peer: SimpleNamespace):
    hub.cuts = 1
    folder = fetch(tiny)
    ranges = [span for method, path, span in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert ranges == [None, f"bytes={constants.DOWNLOAD_CHUNK_SIZE}-"]
    assert (folder / "model.safetensors").read_bytes() == peer.single["model.safetensors"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(tiny: str, hub: Hub):
    hub.repos[tiny]["v1.0"] = {"model.safetensors": b"older", "config.json": b"{}"}
    tagged = fetch(tiny, revision="v1.0")
    assert (tagged / "model.safetensors").read_bytes() == b"older"
    assert fetch(tiny, revision=commit_of(tiny, "v1.0")) == tagged != fetch(tiny)
    assert fetch(tiny, revision="v1.0", local_files_only=True) == tagged


def test_an_official_name_stands_for_its_repository(hub: Hub, client: Path):
    hub.repos[OFFICIAL["gpt2-xl"]] = small(model__safetensors=b"weights")
    assert (fetch("gpt2-xl") / "model.safetensors").read_bytes() == b"weights"


def cached_by_its_short_name(name: str, commit: str, files: dict[str, bytes], cache: Path) -> Path:
    """A snapshot as transformers leaves it after from_pretrained("gpt2")."""
    repo = cache / f"models--{name}"
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "openai-community/gpt2-xl"])
@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "local_files_only", "the server is gone"])
def test_offline_a_snapshot_under_the_short_name_serves(
    name: str,
    offline: str,
    hub: Hub,
    client: Path,
    peer: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = cached_by_its_short_name(name.rpartition("/")[2], "6" * 40, peer.single, client)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline == "HF_HUB_OFFLINE")
    hub.status = 503
    only = offline == "local_files_only"
    assert fetch(name, local_files_only=only) == folder
    assert fetch(name, revision="6" * 40, local_files_only=only) == folder
    same_logits(GPTModel.from_pretrained(name, local_files_only=only), peer)
    with pytest.raises(CheckpointError, match=r"not in the cache|answered 503"):
        fetch(name, revision="7" * 40, local_files_only=only)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not in the cache|answered 503"):
        fetch(name, local_files_only=only)


def test_online_a_complete_snapshot_of_the_same_commit_under_the_short_name_is_not_fetched_again(
    hub: Hub, client: Path, peer: SimpleNamespace
):
    repo = OFFICIAL["gpt2"]
    hub.repos[repo] = {"main": peer.single | NO_USE}
    folder = cached_by_its_short_name("gpt2", commit_of(repo, "main"), peer.single, client)
    assert fetch("gpt2") == fetch(repo) == folder
    assert hub.fetched() == set()
    (folder / "config.json").unlink()
    assert fetch("gpt2") != folder
    assert hub.fetched() >= {"config.json", "model.safetensors"}


def test_online_a_snapshot_of_another_commit_under_the_short_name_is_not_taken(
    hub: Hub, client: Path, peer: SimpleNamespace
):
    hub.repos[OFFICIAL["distilgpt2"]] = {"main": dict(peer.single)}
    folder = cached_by_its_short_name("distilgpt2", "6" * 40, peer.single, client)
    assert fetch("distilgpt2") != folder
    assert hub.fetched() >= {"config.json", "model.safetensors"}


def test_a_repositorys_own_snapshot_comes_before_the_one_under_its_short_name(hub: Hub, client: Path):
    hub.repos[OFFICIAL["gpt2"]] = small(model__safetensors=b"new")
    cached_by_its_short_name("gpt2", "6" * 40, {"model.safetensors": b"old"}, client)
    folder = fetch("gpt2")
    hub.stop()
    assert fetch("gpt2") == folder
    assert (folder / "model.safetensors").read_bytes() == b"new"


def test_a_single_file_comes_from_the_cache_of_the_short_name_too(hub: Hub, client: Path):
    folder = cached_by_its_short_name("gpt2", "6" * 40, {"vocab.json": b"{}"}, client)
    assert fetch_file(OFFICIAL["gpt2"], "vocab.json") == folder / "vocab.json"
    assert hub.asked == []


def adapter_of(base: str, revision: str | None = None) -> dict[str, bytes]:
    """A PEFT adapter of the base, which lies elsewhere: one layer, moved by 1 everywhere."""
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["h.0.attn.c_attn"]}
    said |= {"base_model_name_or_path": base, "revision": revision}
    key, content = "base_model.model.transformer.h.0.attn.c_attn", io.BytesIO()
    factors = {f"{key}.lora_A.weight": torch.ones(1, 64), f"{key}.lora_B.weight": torch.ones(192, 1)}
    torch.save(factors, content)
    return {"adapter_config.json": json.dumps(said).encode(), "adapter_model.bin": content.getvalue()}


def test_an_adapters_name_fetches_it_and_its_base_as_the_caller_says(
    tiny: str, hub: Hub, client: Path, tmp_path: Path
):
    plain = GPTModel.from_pretrained(tiny).trf_blocks[0].att.W_value.weight
    hub.repos["owner/base"] = {"main": {"config.json": b"{}"}, "v1": hub.repos[tiny]["main"]}
    hub.repos["owner/tuned"] = {"main": {}, "v2": adapter_of("owner/base", "v1")}
    hub.private = {"owner/base": "hf_right", "owner/tuned": "hf_right"}
    options: dict[str, Any] = {"revision": "v2", "token": "hf_right", "cache_dir": tmp_path / "mine"}
    loaded = GPTModel.from_pretrained("owner/tuned", **options)
    assert torch.equal(loaded.trf_blocks[0].att.W_value.weight, plain + 1)
    hub.asked.clear()
    again = GPTModel.from_pretrained("owner/tuned", **options, local_files_only=True)
    assert torch.equal(again.trf_blocks[0].att.W_value.weight, plain + 1)
    assert hub.asked == []
    with pytest.raises(CheckpointError, match=r"adapter without its base: .*'owner/base'.*if it is private"):
        GPTModel.from_checkpoint(fetch("owner/tuned", **options))


def test_a_base_and_an_adapter_in_one_repository_are_both_fetched(tiny: str, hub: Hub):
    plain = GPTModel.from_pretrained(tiny).trf_blocks[0].att.W_value.weight
    hub.repos["owner/both"] = {"main": hub.repos[tiny]["main"] | adapter_of("owner/both")}
    assert torch.equal(GPTModel.from_pretrained("owner/both").trf_blocks[0].att.W_value.weight, plain + 1)


def test_a_token_opens_what_is_private(hub: Hub, client: Path):
    hub.repos["owner/mine"] = small(model__safetensors=b"weights")
    hub.private["owner/mine"] = "hf_right"
    with pytest.raises(CheckpointNotFoundError, match=r"if it is private, run `hf auth login`.*HF_TOKEN"):
        fetch("owner/mine")
    with pytest.raises(CheckpointNotFoundError, match="if it is private"):
        fetch("owner/mine", token="hf_wrong")
    assert (fetch("owner/mine", token="hf_right") / "model.safetensors").is_file()


def test_another_cache_can_be_named(tiny: str, tmp_path: Path):
    folder = fetch(tiny, cache_dir=tmp_path / "mine")
    assert tmp_path / "mine" in folder.parents
    assert fetch(tiny, cache_dir=tmp_path / "mine", local_files_only=True) == folder


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "owner/none",
            CheckpointNotFoundError,
            "owner/none: no such file or folder, and no model on http",
        ),
        (
            "owner/empty",
            CheckpointNotFoundError,
            r"owner/empty: holds no weights .*model.safetensors or .*found README.md, tf_model.h5",
        ),
        ("owner/gated", CheckpointError, r"owner/gated: is gated. Accept its terms .*HF_TOKEN"),
        ("owner/lost", CheckpointError, r"owner/lost: pytorch_model.bin.index.json names .* not there: a, b"),
        ("owner/odd", CheckpointError, r"owner/odd: .* names files that are not there: 1, \['a'\]"),
        ("owner/bad", CheckpointError, "index.json: not valid JSON"),
        ("owner/list", CheckpointError, "not an index of shards; expected a weight_map"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(
    name: str, kind: type[Exception], message: str, hub: Hub, client: Path
):
    hub.repos["owner/empty"] = small(README__md=b"words", tf_model__h5=b"tensorflow")
    hub.repos["owner/gated"] = small(model__safetensors=b"weights", config__json=b"{}")
    hub.gated.add("owner/gated")
    index = json.dumps({"weight_map": {"x": "a", "y": "b"}}).encode()
    hub.repos["owner/lost"] = small(pytorch_model__bin__index__json=index)
    odd = json.dumps({"weight_map": {"x": 1, "y": ["a"]}}).encode()
    hub.repos["owner/odd"] = small(pytorch_model__bin__index__json=odd)
    hub.repos["owner/list"] = small(pytorch_model__bin__index__json=b'{"weight_map": []}')
    hub.repos["owner/bad"] = small(pytorch_model__bin__index__json=b"[1")
    with pytest.raises(kind, match=message) as raised:
        fetch(name)
    assert "\n" not in str(raised.value)


def test_an_unknown_revision_is_one_clear_error_even_where_something_is_cached(tiny: str):
    fetch(tiny)
    with pytest.raises(CheckpointNotFoundError, match="owner/tiny: has no revision 'v9'; pass a branch"):
        fetch(tiny, revision="v9")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, r"owner/tiny: \S+ answered 503. Try later, or download it on a machine that can"),
        (403, r"owner/tiny: \S+ answered 403. .*to get access, run"),
        (200, r"owner/tiny: cannot be fetched from \S+ \(JSONDecodeError\("),
    ],
)
def test_a_server_that_fails_is_named_with_its_answer(status: int, message: str, hub: Hub, client: Path):
    hub.status = status
    with pytest.raises(CheckpointError, match=message):
        fetch("owner/tiny")


def test_a_server_that_is_down_is_said_with_the_way_around(
    hub: Hub, client: Path, monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(CheckpointError, match=r"cannot be fetched .*ConnectError.*pass the folder"):
            fetch("owner/tiny")


def test_a_cache_that_cannot_be_written_is_named(tiny: str, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be stored in .*file: .*Pass another cache_dir"):
        fetch(tiny, cache_dir=tmp_path / "file")


def test_a_path_that_is_there_wins_and_comes_back_as_it_is(
    hub: Hub, client: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("owner/tiny").mkdir(parents=True)
    Path("gpt2").write_text("a file")
    assert fetch("owner/tiny") == Path("owner/tiny")
    assert fetch("gpt2") == Path("gpt2")
    assert fetch(tmp_path / "gpt2") == tmp_path / "gpt2"
    with pytest.raises(UsageError, match="gpt2: a local path has no revision='v1'; leave it out"):
        fetch("gpt2", revision="v1")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.pth", "model.pth: no such file or folder$"),
        ("owner/model.safetensors", "no such file or folder$"),
        ("./owner/tiny", "./owner/tiny: no such file or folder$"),
        ("../tiny", "no such file or folder$"),
        ("/owner/tiny", "no such file or folder$"),
        ("gpt3", "gpt3: no such file or folder, and not the name of a Hub model .*distilgpt2 or owner/name"),
        ("hf:/gpt2", "hf:/gpt2: no such file or folder. An address has two slashes: hf://owner/name, https"),
        ("hf:owner/name", "An address has two slashes"),
        ("https:/host/model.pth", "An address has two slashes"),
        ("a/b/c", "not the name of a Hub model"),
        ("owner/a--b", "not the name of a Hub model"),
        ("owner/a..b", "not the name of a Hub model"),
        ("owner/tiny\n", "not the name of a Hub model"),
        ("-owner/tiny", "not the name of a Hub model"),
        ("owner/" + "a" * 91, "not the name of a Hub model"),
    ],
)
def test_what_is_no_repositorys_name_is_never_asked_for(name: str, message: str, hub: Hub, client: Path):
    with pytest.raises(CheckpointNotFoundError, match=message):
        fetch(name)
    assert hub.asked == []


def test_a_single_file_comes_from_the_cache_once_it_was_fetched(hub: Hub, client: Path):
    hub.repos["owner/words"] = small(vocab__json=b"{}")
    first = fetch_file("owner/words", "vocab.json")
    hub.asked.clear()
    assert fetch_file("owner/words", "vocab.json") == first
    assert hub.asked == []


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_the_commands_take_names_and_revisions(
    command: str, hub: Hub, tiny: str, capsys: pytest.CaptureFixture[str]
):
    hub.repos[tiny]["v1"] = hub.repos[tiny]["main"]
    assert main([command, tiny, "--json", "--revision", "v1"]) == 0
    output = capsys.readouterr()
    assert commit_of(tiny, "v1") in json.loads(output.out)["path"]
    assert output.err == ""


@pytest.mark.parametrize("words", [["inspect"], ["plan"], ["bench"], ["generate", "--model"]])
def test_the_commands_say_in_one_line_that_a_name_is_unknown(
    words: list[str], client: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "owner/none"]) == 1
    assert re.fullmatch(r"gpt2lite: owner/none: no such file or folder, .*\n", capsys.readouterr().err)


def test_quiet_silences_the_clients_bars_too(hub: Hub, tiny: str, tmp_path: Path):
    words = ("inspect", tiny, "--json")
    for home, more, drawn in (("a", (), True), ("b", ("--quiet",), False)):
        seen = on_a_terminal(*words, *more, **environment_of(hub, tmp_path / home))
        assert ("model.safetensors: 100%" in seen) is drawn
        assert drawn or json.loads(seen)["dialect"] == "huggingface"


def test_bench_measures_a_model_of_the_hub(hub: Hub, tiny: str, tmp_path: Path):
    words = ("bench", tiny, "--strategies", "mmap", "--folder", tmp_path)
    result = run(hub, tmp_path, "-m", "gpt2lite", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{tiny}, ")


@has_gpt2_encoding
def test_generate_writes_with_a_model_of_the_hub(hub: Hub, tiny: str, tmp_path: Path):
    words = ("generate", "--model", tiny, "--n-heads", "4", "--max-new-tokens", "3")
    result = run(hub, tmp_path, "-m", "gpt2lite", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Hello, I am")


CACHED = {  # tiktoken's names of the same bytes: each the SHA-1 of where it fetches them
    "merges.txt": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "vocab.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
ENCODE = "from gpt2lite.tokenizer import gpt2_encoding as e; print(e().encode('Hello, I am'))"


@has_gpt2_encoding
def test_the_hubs_vocabulary_stands_in_for_tiktokens_download(hub: Hub, tmp_path: Path):
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    hub.repos[OFFICIAL["gpt2"]] = {
        "main": {name: (cache / as_cached).read_bytes() for name, as_cached in CACHED.items()}
    }
    result = run(hub, tmp_path, "-c", ENCODE, TIKTOKEN_CACHE_DIR=str(tmp_path / "tiktoken"))
    assert (result.returncode, result.stdout) == (0, "[15496, 11, 314, 716]\n"), result.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"merges.txt": b"other merges", "vocab.json": b"{}"}, "KeyError|the Hub"),
        ({"merges.txt": b"a b\n", "vocab.json": b'{"a": 0, "b": 1, "ab": 2}'}, "not GPT-2's vocabulary"),
        ({}, "answered 404|no model on http"),
    ],
)
def test_without_the_right_vocabulary_the_error_says_how_to_do_without_a_network(
    files: dict[str, bytes], message: str, hub: Hub, tmp_path: Path
):
    if files:
        hub.repos[OFFICIAL["gpt2"]] = {"main": files}
    empty = tmp_path / "tiktoken"
    result = run(hub, tmp_path, "-c", ENCODE, TIKTOKEN_CACHE_DIR=str(empty))
    said = result.stderr.splitlines()[-1]
    assert "CheckpointError: GPT-2's encoding cannot be fetched from tiktoken" in said
    assert "set TIKTOKEN_CACHE_DIR to the cache folder of a machine that has it" in said
    assert re.search(message, said)
    assert not empty.exists()
