"""Checkpoints that lie elsewhere: on a server that answers as the Hub does, or makes every mistake."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import TINY, randomise
from hub_server import Fault, Handler, Hub, Server, as_the_hub, commit_of
from huggingface_hub import constants, utils

import gpt2lite
from gpt2lite import CheckpointError, CheckpointNotFoundError, GPTConfig, GPTModel, UsageError, open_model
from gpt2lite.checkpoint import http_ranges, remote, torch_zip
from gpt2lite.checkpoint.source import STEP
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.loading.schedule import Tuning

REPO = "owner/tiny"
HEADS = {"n_heads": TINY.n_heads}
CONFIG = GPTConfig(vocab_size=8000, context_length=64, emb_dim=96, n_heads=4, n_layers=4)  # 7 MiB of weights
PEM = Path(__file__).parent / "loopback.pem"
LOCAL = {"NO_PROXY": "127.0.0.1,localhost", "HTTPS_PROXY": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def big() -> GPTModel:
    return randomise(GPTModel(CONFIG))


@pytest.fixture(scope="module")
def files(big: GPTModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One model as several programs write it."""
    folder = tmp_path_factory.mktemp("files")
    big.save_checkpoint(folder / "model.safetensors")
    big.save_checkpoint(folder / "ours.pth")
    torch.save(big.state_dict(), folder / "plain.pth")
    torch.save(big.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    gpt2lite.convert(
        folder / "plain.pth", folder / "hub", to="huggingface", max_shard_size="2MiB", config=HEADS
    )
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return found | {f"sharded/{path.name}": path.read_bytes() for path in (folder / "hub").iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    hub.serve()
    as_the_hub(hub, monkeypatch, tmp_path)
    hub.repos[REPO] = {"main": dict(files)}
    yield hub
    hub.stop()


@pytest.fixture
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds for those who wait are shorter here."""
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.01, 0.01, 0.01))
    monkeypatch.setattr(http_ranges, "TIMEOUT", 0.5)
    monkeypatch.setattr(http_ranges, "CONNECT_TIMEOUT", 0.5)


def require_same(found: GPTModel, wanted: GPTModel) -> None:
    stored = wanted.state_dict()
    assert found.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in found.state_dict().items())


def connections_to(hub: Hub) -> list[Any]:
    """This process's ends of connections to a server, without those that the Hub's client keeps."""
    getattr(utils, "close_session", lambda: None)()  # older clients keep none
    ends = psutil.Process().net_connections("tcp")
    return [end for end in ends if end.raddr and end.raddr.port == hub.server.server_port and is_open(end)]


def is_open(end: Any) -> bool:
    return end.status == "ESTABLISHED"


# ---- every place and format --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "ours.pth", "plain.pth", "legacy.pth", "sharded"])
def test_what_lies_on_the_hub_is_loaded_from_there_bit_for_bit(hub: Hub, big: GPTModel, name: str):
    require_same(GPTModel.from_checkpoint(f"hf://{REPO}/{name}", config=HEADS), big)


def test_a_model_by_its_name_without_the_cache(hub: Hub, big: GPTModel, tmp_path: Path):
    require_same(GPTModel.from_pretrained(REPO, cache=False), big)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("revision", ["main", "old"])
def test_an_address_may_name_a_revision(hub: Hub, files: dict[str, bytes], big: GPTModel, revision: str):
    hub.repos[REPO] = {"main": {}, "old": {}} | {revision: {"m.safetensors": files["model.safetensors"]}}
    require_same(GPTModel.from_checkpoint(f"hf://{REPO}@{revision}/m.safetensors"), big)
    with pytest.raises(UsageError, match=f"names the revision {revision}, and revision='other' was passed"):
        open_model(f"hf://{REPO}@{revision}/m.safetensors", revision="other")


def test_an_address_of_the_hub_is_the_same_as_its_own(hub: Hub, big: GPTModel):
    opened = open_model(f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors")
    assert str(opened.path) == f"hf://{REPO}/model.safetensors"
    require_same(opened.load(), big)


@pytest.mark.parametrize("name", ["model.safetensors", "sharded/model.safetensors.index.json"])
def test_any_https_address_and_what_lies_beside_it(hub: Hub, big: GPTModel, name: str):
    opened = open_model(f"{hub.cdn}/{REPO}/main/{name}?download=true")
    assert "download" not in str(opened.path)
    require_same(opened.load(), big)


def test_the_config_beside_an_address_counts(hub: Hub, files: dict[str, bytes]):
    config = json.dumps({"model_type": "llama"}).encode()
    hub.repos[REPO]["main"] = {"model.safetensors": files["model.safetensors"], "config.json": config}
    for address in (f"{hub.cdn}/{REPO}/main/model.safetensors", f"hf://{REPO}"):
        with pytest.raises(CheckpointError, match="model_type='llama'; gpt2lite opens gpt2 only"):
            open_model(address)


def test_the_tokenizer_beside_it_is_used(hub: Hub):
    hub.repos[REPO]["main"]["sharded/tokenizer.json"] = b"{}"
    with pytest.raises(CheckpointError, match=f"hf://{REPO}/sharded/tokenizer.json"):
        _ = open_model(f"hf://{REPO}/sharded").beside.tokenizer


def test_fsspec_reads_what_it_knows(files: dict[str, bytes], big: GPTModel):
    fsspec = pytest.importorskip("fsspec", reason="the extra [remote] is not installed")
    memory = fsspec.filesystem("memory")
    for name, content in files.items():
        memory.pipe_file(f"/bucket/{name}", content)
    for name in ("model.safetensors", "plain.pth", "sharded"):
        require_same(GPTModel.from_checkpoint(f"memory://bucket/{name}", config=HEADS), big)
    opened = open_model("memory://bucket/plain.pth", config=HEADS)
    memory.pipe_file("/bucket/plain.pth", files["plain.pth"][:STEP])
    with pytest.raises(CheckpointError, match=r"bytes came from byte .*; it was changed or truncated"):
        opened.load()
    with pytest.raises(CheckpointNotFoundError, match=r"memory://bucket/none\.pth: no such file"):
        open_model("memory://bucket/none.pth")


def test_an_address_that_nobody_reads_says_what_to_install():
    with pytest.raises(
        UsageError, match=r"pip install 'gpt2lite\[remote\]', and what fsspec needs for nowhere://"
    ):
        open_model("nowhere://bucket/model.pth")


# ---- headers alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "ours.pth", "plain.pth"])
def test_opening_takes_a_few_requests_and_the_forecast_no_more(hub: Hub, name: str):
    opened = open_model(f"hf://{REPO}/{name}", config=HEADS)
    assert opened.forecast("cuda")["stream"].peak_device >= opened.plan().model_bytes
    asked = [path for method, path, span in hub.asked if "agent-harnesses" not in path]  # of newer clients
    assert len(asked) <= 5
    assert hub.sent <= 2 * remote.BLOCK


def test_a_model_with_its_tokenizer_opens_with_six_requests(hub: Hub, tmp_path: Path):
    folder = gpt2lite.convert(EMBEDDED, tmp_path / "embedded", to="huggingface")
    hub.repos[REPO] = {"main": {path.name: path.read_bytes() for path in folder.iterdir()}}
    opened = open_model(REPO, cache=False)
    asked = [path for _, path, _ in hub.asked if "agent-harnesses" not in path]
    assert len(asked) <= 6
    assert not any("vocab.json" in path for path in asked)
    assert opened.beside.tokenizer.n_vocab == opened.config.vocab_size


def test_headers_of_the_size_of_gpt2_xl_take_less_than_a_mebibyte(hub: Hub, tmp_path: Path):
    with torch.device("meta"):
        state = GPTModel(GPTConfig.named("gpt2-xl")).state_dict()
    small = {name: torch.zeros([1] * value.dim()) for name, value in state.items()}
    torch.save(small, tmp_path / "many.pth")
    hub.repos[REPO]["main"]["many.pth"] = (tmp_path / "many.pth").read_bytes()
    with pytest.raises(CheckpointError, match=r"hf://owner/tiny/many.pth"):
        open_model(f"hf://{REPO}/many.pth").plan()
    assert hub.sent <= 1 << 20


def test_a_pickle_from_elsewhere_runs_nothing(hub: Hub, tmp_path: Path):
    class Canary:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sang"),)

    buffer = io.BytesIO()
    torch.save({"state": {"w": torch.zeros(2)}, "x": Canary()}, buffer)
    hub.repos[REPO]["main"]["evil.pth"] = buffer.getvalue()
    hub.repos[REPO]["main"]["evil.bin"] = pickle.dumps(Canary())
    for name in ("evil.pth", "evil.bin"):
        with pytest.raises(CheckpointError):
            open_model(f"hf://{REPO}/{name}")
    assert not (tmp_path / "sang").exists()


def test_a_zip_of_another_layout_is_read_by_its_own_headers(
    hub: Hub, big: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "repacked.pth"
    with (
        zipfile.ZipFile(io.BytesIO(hub.repos[REPO]["main"]["plain.pth"])) as was,
        zipfile.ZipFile(path, "w") as now,
    ):
        for name in was.namelist():
            now.writestr(name, was.read(name))
            now.fp.write(b"gap")  # type: ignore[union-attr]
            now.start_dir = now.fp.tell()  # type: ignore[union-attr,attr-defined]
    hub.repos[REPO]["main"]["repacked.pth"] = path.read_bytes()
    require_same(GPTModel.from_checkpoint(f"hf://{REPO}/repacked.pth", config=HEADS), big)
    monkeypatch.setattr(torch_zip, "MAX_ASKED", 10)
    with pytest.raises(CheckpointError, match="a request for each would take long; download it"):
        open_model(f"hf://{REPO}/repacked.pth")


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["mmap", "baseline", "sequential", "meta", "per_tensor"])
def test_other_strategies_are_refused_with_those_that_can(hub: Hub, strategy: str):
    with pytest.raises(UsageError, match='strategy="stream" or "auto"; download it for the others'):
        open_model(f"hf://{REPO}/model.safetensors").load(strategy=strategy)


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_offload_is_refused(hub: Hub, place: str):
    with pytest.raises(UsageError, match=f'offload="{place}" does not go with a file that lies elsewhere'):
        open_model(f"hf://{REPO}/model.safetensors").load("cpu", offload=place)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://tiny", "not an address on the Hub; wanted hf://owner/name"),
        (f"hf://{REPO}/other.pth", "other.pth: not in the repository, which holds legacy.pth, "),
        ("hf://owner/none/model.pth", "no model on .* that you can access"),
        ("https://me:secret@127.0.0.1/model.pth", "https://127.0.0.1/model.pth: no password in an address"),
        ("https://127.0.0.1/folder/", "names a folder; pass the address of the file in it"),
    ],
)
def test_an_address_that_leads_nowhere_says_why(hub: Hub, address: str, said: str):
    with pytest.raises((CheckpointError, UsageError), match=said) as caught:
        open_model(address)
    assert "secret" not in str(caught.value)


def test_the_network_can_be_forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match="which local_files_only=True forbids"):
        open_model(f"hf://{REPO}/model.safetensors", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids fetching"):
        open_model(f"hf://{REPO}/model.safetensors")


@pytest.mark.parametrize("block", [0, CONFIG.n_layers - 1])
def test_a_mask_that_is_not_causal_is_refused_when_it_is_loaded(hub: Hub, big: GPTModel, block: int):
    mask = torch.ones(CONFIG.context_length, CONFIG.context_length).triu(1)
    masks = {f"trf_blocks.{i}.att.mask": mask.clone() for i in range(CONFIG.n_layers)}
    masks[f"trf_blocks.{block}.att.mask"][-1, :8] = 1  # a window
    buffer = io.BytesIO()
    torch.save(big.state_dict() | masks, buffer)
    hub.repos[REPO]["main"]["window.pth"] = buffer.getvalue()
    opened = open_model(f"hf://{REPO}/window.pth", config=HEADS)
    with pytest.raises(CheckpointError, match=f"{block}.att.mask is not GPT-2's causal mask"):
        opened.load()


def test_an_address_in_a_file_is_not_followed(hub: Hub, files: dict[str, bytes]):
    from safetensors.torch import save

    said = {"peft_type": "LORA", "base_model_name_or_path": f"{hub.cdn}/{REPO}/main/model.safetensors"}
    hub.repos["owner/lora"] = {
        "main": {
            "adapter_config.json": json.dumps(said).encode(),
            "adapter_model.safetensors": save({"w": torch.zeros(1)}),
        }
    }
    with pytest.raises(CheckpointNotFoundError, match="an address in a file is not followed"):
        open_model("hf://owner/lora")
    assert not any("/cdn/owner/tiny" in path for _, path, _ in hub.asked)


# ---- faults ------------------------------------------------------------------------------------------------


def answers(status: int, content: bytes = b"", **headers: str) -> Callable[[Handler, bytes, int, int], None]:
    return lambda handler, *_: handler.answer(status, content, **headers)


def hangs_up_after(most: int) -> Callable[[Handler, bytes, int, int], None]:
    return lambda handler, content, start, stop: handler.send(content, start, stop, most=most)


def with_headers(**headers: str) -> Callable[[Handler, bytes, int, int], None]:
    return lambda handler, content, start, stop: handler.send(content, start, stop, **headers)


def reset(handler: Handler, content: bytes, start: int, stop: int) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
    handler.send_header("ETag", '"x"')
    handler.end_headers()
    handler.wfile.write(content[start : start + 1000])
    handler.reset()


def trickle(handler: Handler, content: bytes, start: int, stop: int) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
    handler.send_header("ETag", '"x"')
    handler.end_headers()
    for byte in content[start:stop]:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def silence(handler: Handler, content: bytes, start: int, stop: int) -> None:
    time.sleep(2)
    handler.close_connection = True


def garbage(handler: Handler, *_: object) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True


def all_of_it(handler: Handler, content: bytes, start: int, stop: int) -> None:
    del handler.headers["Range"]
    handler.send(content, 0, len(content))


def fewer(handler: Handler, content: bytes, start: int, stop: int) -> None:
    handler.send(content, start, min(stop, start + 5000))


def in_chunks(handler: Handler, content: bytes, start: int, stop: int) -> None:
    handler.send(content, start, stop, Content_Length="", Transfer_Encoding="chunked")


def expire(handler: Handler, content: bytes, start: int, stop: int) -> None:
    handler.hub.signed = f"?signature={len(handler.hub.asked)}"
    handler.answer(403)


def changed(handler: Handler, content: bytes, start: int, stop: int) -> None:
    """The repository gets another file, and addresses of the first expire."""
    main = handler.hub.repos[REPO]["main"]
    main["model.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    handler.answer(403)


def shorter(handler: Handler, content: bytes, start: int, stop: int) -> None:
    handler.send(content[:-4], start, stop - 4)


RIGHT = ""  # the right weights
PAGE = b"<html>please log in</html>"
FAULTS: dict[str, tuple[list[Fault], str]] = {
    "reset in the middle": ([Fault(reset)], RIGHT),
    "reset in the middle, six times": ([Fault(hangs_up_after(STEP))] * 6, RIGHT),
    "503 twice": ([Fault(answers(503))] * 2, RIGHT),
    "503 for ever": ([Fault(answers(503), lasts=True)], "answered 503. Check the network and try again"),
    "429 with Retry-After": ([Fault(answers(429, Retry_After="1"))], RIGHT),
    "429 with a date": ([Fault(answers(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"))], RIGHT),
    "429 for an hour": ([Fault(answers(429, Retry_After="3600"))], "answered 429. Check the network"),
    "a short body": ([Fault(hangs_up_after(3000))], RIGHT),
    "no answer": ([Fault(silence)], RIGHT),
    "a slow trickle": ([Fault(trickle)], RIGHT),
    "a slow trickle for ever": (
        [Fault(trickle, lasts=True)],
        r"\d+ bytes came in \d seconds. Check the network",
    ),
    "a signed address that expired": ([Fault(expire)], RIGHT),
    "an address that no longer leads there": ([Fault(answers(404), lasts=True)], "answered 404"),
    "no HTTP": ([Fault(garbage)], RIGHT),
    "fewer bytes than asked for, rightly labelled": ([Fault(fewer)], RIGHT),
    "a wrong range": (
        [Fault(with_headers(Content_Range="bytes 0-9/7"))],
        "has 7 bytes, and had .*; it changed. Load it again",
    ),
    "a range that begins elsewhere": (
        [Fault(with_headers(Content_Range="bytes 5-9/*"))],
        "answered with 'bytes 5-9/.*', wanted bytes",
    ),
    "no range at all": ([Fault(with_headers(Content_Range=""))], "answered with '', wanted bytes"),
    "another ETag": ([Fault(with_headers(ETag='"y"'))], "changed while it was being read. Load it again"),
    "another file in its place": ([Fault(changed)], "changed while it was being read. Load it again"),
    "a file that became shorter": ([Fault(shorter)], "and had .*; it changed. Load it again"),
    "416": ([Fault(answers(416))], "is shorter than it was; it changed"),
    "200 instead of 206": (
        [Fault(all_of_it)],
        "answered with all of .* bytes, not with bytes .* or download it",
    ),
    "a web page": ([Fault(answers(200, PAGE))], "answered with all of 26 bytes, not with"),
    "gzip": ([Fault(with_headers(Content_Encoding="gzip"))], "answered 206, as gzip, wanted 206"),
    "chunks": ([Fault(in_chunks)], "answered 206, in chunks"),
    "a length that is not the range's": (
        [Fault(with_headers(Content_Length="10"))],
        "10 bytes for a range of",
    ),
    "a teapot": ([Fault(answers(418))], "answered 418, wanted 206"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_in_the_right_weights_or_one_clear_error(
    hub: Hub, big: GPTModel, in_haste: None, name: str
):
    faults, said = FAULTS[name]
    opened = open_model(f"hf://{REPO}/model.safetensors")
    hub.faults = list(faults)
    if said == RIGHT:
        require_same(opened.load(tuning=Tuning(readers=2, chunk_bytes=STEP)), big)
        assert not hub.faults
    else:
        with pytest.raises(CheckpointError, match=said) as caught:
            opened.load(tuning=Tuning(readers=2, chunk_bytes=STEP))
        assert str(caught.value).startswith(f"hf://{REPO}/model.safetensors: ")
    assert not [thread for thread in threading.enumerate() if "reader" in thread.name]
    assert not connections_to(hub)


@pytest.mark.parametrize("name", ["503 twice", "reset in the middle", "gzip", "a web page", "a short body"])
def test_a_fault_while_headers_are_read(hub: Hub, in_haste: None, name: str):
    faults, said = FAULTS[name]
    hub.faults = list(faults)
    if said == RIGHT:
        open_model(f"hf://{REPO}/plain.pth", config=HEADS)
    else:
        with pytest.raises(CheckpointError, match=f"hf://{REPO}/plain.pth: .*{said}"):
            open_model(f"hf://{REPO}/plain.pth", config=HEADS)


class Redirector(BaseHTTPRequestHandler):
    """Leads to `target`, for ever if that is itself."""

    target = ""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(302 if self.path == "/model.safetensors" else 404)
        self.send_header("Location", self.target or self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def redirector() -> Iterator[type[Redirector]]:
    handler = type("Own", (Redirector,), {})
    server = Server(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield handler
    server.shutdown()
    server.server_close()


def test_redirects_are_followed_once_and_not_for_ever(
    hub: Hub, big: GPTModel, redirector: Any, in_haste: None
):
    with pytest.raises(CheckpointError, match=r"model.safetensors: the server answered 302 .*infinite loop"):
        open_model(f"{redirector.address}/model.safetensors")
    redirector.target = f"{hub.cdn}/{REPO}/main/model.safetensors"
    require_same(GPTModel.from_checkpoint(f"{redirector.address}/model.safetensors"), big)


def test_a_server_that_is_not_there(hub: Hub, in_haste: None):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/model.pth"
        with pytest.raises(CheckpointError, match=f"{address}: cannot be found: .*refused"):
            open_model(address)


def test_a_token_is_asked_for_and_goes_to_its_own_host_alone(hub: Hub, big: GPTModel):
    hub.private[REPO] = "hf_secret"
    with pytest.raises(CheckpointNotFoundError, match="if it is private, run `hf auth login`"):
        open_model(f"hf://{REPO}/model.safetensors")
    hub.tokens.clear()
    require_same(GPTModel.from_checkpoint(f"hf://{REPO}/model.safetensors", token="hf_secret"), big)
    seen = {host.partition(":")[0]: set() for host, _ in hub.tokens}
    for host, token in hub.tokens:
        seen[host.partition(":")[0]].add(token)
    assert seen["localhost"] == {None}
    assert "Bearer hf_secret" in seen["127.0.0.1"]


def test_a_gate_is_named(hub: Hub):
    hub.gated.add(REPO)
    with pytest.raises(CheckpointError, match=f"{REPO}: is gated. Accept its terms at"):
        open_model(f"hf://{REPO}/model.safetensors")


# ---- certificates and proxies ------------------------------------------------------------------------------


@pytest.fixture
def secure(files: dict[str, bytes]) -> Iterator[Hub]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(PEM)
    hub = Hub()
    hub.serve(context)
    hub.repos[REPO] = {"main": dict(files)}
    yield hub
    hub.stop()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_certificates_are_those_of_the_environment(
    secure: Hub, big: GPTModel, monkeypatch: pytest.MonkeyPatch, variable: str
):
    for name in http_ranges.TRUSTED:
        monkeypatch.delenv(name, raising=False)
    address = f"{secure.cdn}/{REPO}/main/model.safetensors"
    with pytest.raises(CheckpointError, match=r"the certificate is not trusted \(self-signed certificate\)"):
        open_model(address)
    monkeypatch.setenv(variable, str(PEM))
    opened = open_model(address)
    require_same(opened.load(), big)
    monkeypatch.delenv(variable)
    with pytest.raises(CheckpointError, match=r"certificate of localhost is not trusted .*Set SSL_CERT_FILE"):
        opened.load()


class Proxy(BaseHTTPRequestHandler):
    """Fetches for others, and tunnels; keeps what it was asked and how it was asked."""

    seen: list[tuple[str, str | None]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Proxy-Authorization")))
        kept = {name: value for name, value in self.headers.items() if name == "Range"}
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            answer = direct.open(urllib.request.Request(self.path, headers=kept))
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content = answer.read()
            self.send_response(answer.status)
            for name in ("Content-Range", "Content-Length", "ETag"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(content)

    def do_CONNECT(self) -> None:
        self.seen.append((self.path, self.headers.get("Proxy-Authorization")))
        host, port = self.path.split(":")
        self.send_response(200)
        self.end_headers()
        with socket.create_connection((host, int(port))) as there:
            back = threading.Thread(target=self.pump, args=(there, self.connection), daemon=True)
            back.start()
            self.pump(self.connection, there)
            back.join()
        self.close_connection = True

    @staticmethod
    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxies_are_those_of_the_environment(
    hub: Hub, secure: Hub, big: GPTModel, monkeypatch: pytest.MonkeyPatch, scheme: str
):
    handler = type("Own", (Proxy,), {"seen": []})
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name in ("NO_PROXY", "no_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    monkeypatch.setenv(f"{scheme}_proxy", f"http://me:word@127.0.0.1:{server.server_port}")
    place = {"http": hub, "https": secure}[scheme]
    require_same(GPTModel.from_checkpoint(f"{place.cdn}/{REPO}/main/model.safetensors"), big)
    assert {auth for _, auth in handler.seen} == {"Basic bWU6d29yZA=="}
    asked = len(handler.seen)
    monkeypatch.setenv("no_proxy", "localhost")
    require_same(GPTModel.from_checkpoint(f"{place.cdn}/{REPO}/main/model.safetensors"), big)
    assert len(handler.seen) == asked
    server.shutdown()
    server.server_close()


# ---- the hash that is stated -------------------------------------------------------------------------------


def test_the_hash_that_the_hub_states_is_compared_when_verify_asks(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert main(["verify", f"hf://{REPO}/model.safetensors", "--device", "cpu"]) == 0
    assert "PASS" in capsys.readouterr().out
    opened = open_model(f"hf://{REPO}/model.safetensors")
    content = files["model.safetensors"]
    hub.repos[REPO]["main"]["model.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    (source,) = opened.reading.manifest.files
    with pytest.raises(
        CheckpointError, match=r"its SHA-256 is .*, stated is .*; it is damaged or not that file"
    ):
        source.check_sha256()


# ---- the commands ------------------------------------------------------------------------------------------


def test_every_command_takes_an_address(
    hub: Hub, big: GPTModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    address, heads = f"hf://{REPO}/plain.pth", ["--n-heads", "4"]
    assert main(["inspect", address, *heads]) == 0
    assert main(["plan", address, *heads, "--device", "cpu"]) == 0
    assert address in capsys.readouterr().out
    assert main(["convert", address, str(tmp_path / "here.pth"), *heads, "--quiet"]) == 0
    require_same(GPTModel.from_checkpoint(tmp_path / "here.pth"), big)
    assert main(["bench", address, *heads]) == 1
    assert "bench compares ways to load a local file; download it" in capsys.readouterr().err


def test_text_is_written_with_the_tokenizer_that_lies_there(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = gpt2lite.convert(EMBEDDED, tmp_path / "embedded", to="huggingface", dtype=torch.float32)
    hub.repos["owner/embedded"] = {"main": {path.name: path.read_bytes() for path in folder.iterdir()}}
    told = ["--max-new-tokens", "5", "--prompt", "Once upon a time", "--device", "cpu"]
    texts = []
    for path in (str(folder), "hf://owner/embedded"):
        assert main(["generate", path, *told]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    model = GPTModel.from_pretrained("owner/embedded", cache=False)
    assert copy.deepcopy(model).generate("Once", 3) == model.generate("Once", 3)


def test_a_model_from_elsewhere_is_finetuned(hub: Hub, tmp_path: Path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a girl. " * 60, encoding="utf-8")
    folder = gpt2lite.convert(EMBEDDED, tmp_path / "embedded", to="huggingface", dtype=torch.float32)
    hub.repos["owner/embedded"] = {"main": {path.name: path.read_bytes() for path in folder.iterdir()}}
    told = ["--steps", "2", "--seq-len", "16", "--batch-size", "2", "--device", "cpu", "--quiet"]
    out = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    assert main(["finetune", "hf://owner/embedded", *out, *told]) == 0
    assert GPTModel.from_checkpoint(tmp_path / "run" / "model.pth").config.n_layers > 0


# ---- processes ---------------------------------------------------------------------------------------------


def start(hub: Hub, home: Path, code: str, **more: str) -> subprocess.Popen[str]:
    """A fresh process whose Hub is the server and whose way to anywhere else is a closed port."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**inherited, **LOCAL, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **more}
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


LOADED = f"""
import torch, gpt2lite
from gpt2lite import GPTModel
model = GPTModel.from_pretrained({REPO!r}, cache=False)
"""
WATCHED = """
import sys
written = []
def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & 0o1101:  # to write, create or truncate
        written.append(args[0])
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        written.append(args[0])
sys.dont_write_bytecode = True
"""


def test_nothing_is_written_to_disk(hub: Hub, tmp_path: Path):
    imports = "import huggingface_hub, gpt2lite.hub, gpt2lite.model"
    code = f"{WATCHED}\n{imports}\nsys.addaudithook(watch){LOADED}print(written)"
    process = start(hub, tmp_path / "home", code)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, "[]"), err
    assert not (tmp_path / "home" / "hub").exists()


@pytest.mark.parametrize("dtype", ["None", "torch.bfloat16"])
def test_the_host_holds_the_model_and_the_ring(hub: Hub, tmp_path: Path, dtype: str):
    config = GPTConfig(8000, 512, 512, 8, 24)  # 330 MiB
    with torch.no_grad():
        GPTModel(config).save_checkpoint(tmp_path / "model.safetensors")
    hub.repos["owner/large"] = {"main": {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}}
    code = f"""
import torch
from gpt2lite import GPTModel, open_model, track_memory
open_model("hf://{REPO}/model.safetensors").load(dtype={dtype})  # imports
opened = open_model("hf://owner/large")
forecast = opened.forecast(dtype={dtype})["stream"]
with track_memory() as tracked:
    model = opened.load(dtype={dtype})
print(tracked.peak_host_anonymous - forecast.peak_host_anonymous, opened.plan(dtype={dtype}).model_bytes)
"""
    process = start(hub, tmp_path / "home", code)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    over, model_bytes = map(int, out.split())
    assert model_bytes > 100 << 20
    assert over <= 24 << 20


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT there")
def test_ctrl_c_ends_a_load_whose_server_says_nothing(hub: Hub, tmp_path: Path):
    """Nobody would answer for an hour: a reader that is not woken keeps the process."""
    code = f"""
import threading, signal
from gpt2lite import open_model
from gpt2lite.checkpoint import http_ranges
http_ranges.TIMEOUT = 3600
signal.signal(signal.SIGINT, signal.default_int_handler)
opened = open_model("hf://{REPO}/model.safetensors")
print("opened", flush=True)
input()
try:
    opened.load()
except KeyboardInterrupt:
    mine = [t.name for t in threading.enumerate() if "reader" in t.name]
    print("stopped", mine, flush=True)
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**inherited, **LOCAL, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "opened\n"
        arrived, release = threading.Event(), threading.Event()

        def hold(handler: Handler, content: bytes, start: int, stop: int) -> None:
            arrived.set()
            release.wait(120)
            handler.close_connection = True

        hub.faults = [Fault(hold, lasts=True)]
        process.stdin.write("\n")
        process.stdin.flush()
        assert arrived.wait(60)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            release.set()
        assert out == "stopped []\n", err


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_read_that_waits_is_woken(hub: Hub, secure: Hub, monkeypatch: pytest.MonkeyPatch, scheme: str):
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    place = {"http": hub, "https": secure}[scheme]
    (source,) = open_model(f"{place.cdn}/{REPO}/main/model.safetensors").reading.manifest.files
    monkeypatch.setattr(http_ranges, "TIMEOUT", 3600)
    arrived, release, errors = threading.Event(), threading.Event(), list[Exception]()

    def hold(handler: Handler, content: bytes, start: int, stop: int) -> None:
        handler.send(content, start, stop, most=10)
        arrived.set()
        release.wait(120)

    def read() -> None:
        try:
            reader.read_into([memoryview(bytearray(STEP))], 0)
        except CheckpointError as error:
            errors.append(error)

    place.faults = [Fault(hold, lasts=True)]
    with source.reader() as reader:
        thread = threading.Thread(target=read)
        thread.start()
        assert arrived.wait(60)
        reader.stop()
        thread.join(60)
        release.set()
    assert not thread.is_alive()
    assert len(errors) == 1


def test_an_error_in_the_middle_leaves_no_thread_and_no_socket(hub: Hub):
    class Stop(Exception):
        pass

    def progress(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        open_model(f"hf://{REPO}/model.safetensors").load(
            tuning=Tuning(readers=4, chunk_bytes=STEP), progress=progress
        )
    assert not [thread for thread in threading.enumerate() if "reader" in thread.name]
    assert not connections_to(hub)


def test_a_commit_is_pinned_when_it_is_opened(hub: Hub, big: GPTModel, files: dict[str, bytes]):
    opened = open_model(f"hf://{REPO}/model.safetensors")
    asked = [path for method, path, _ in hub.asked if method == "HEAD"]
    assert all(commit_of(REPO, "main") in path for path in asked)
    require_same(opened.load(), big)


def test_a_word_where_yes_or_no_is_wanted_is_refused():
    with pytest.raises(UsageError, match="cache must be True or False, got 'no'"):
        GPTModel.from_pretrained("gpt2", cache="no")  # type: ignore[arg-type]
