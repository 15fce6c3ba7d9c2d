"""Files made to break a reader: each known way, and some thousand drawn by chance.

docs/THREATS.md says what is promised, and names these tests.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from formats import CLASSES, FORMATS, TINY, opens
from mutating import CANARY
from running import run_cases
from safetensors.torch import save_file
from test_tf_bundle import HEADER, block, pair, table, varint
from watching import faults

from gpt2lite import CheckpointError, GPT2LiteError, GPTModel, InsufficientMemoryError
from gpt2lite.cli import main
from gpt2lite.cli.terminal import shown_text
from gpt2lite.errors import visible

CASES = 110  # of each format; benchmarks/fuzz.py runs any number


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_end_in_checkpoint_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gpt2lite.hub.fetch", no_hub)
    assert list(run_cases(name, range(CASES), tmp_path)) == []


def no_hub(name: object, **options: object) -> Path:
    raise CheckpointError(name, "not found, in a test without a network")


# ---- what is no plain file ---------------------------------------------------------------------------------


def a_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(before)


def a_link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def a_link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


OTHER_KINDS: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "link to a FIFO": a_link_to_a_fifo,
    "socket": a_socket,
    "folder": Path.mkdir,
    "endless": a_link("/dev/zero"),
    "terminal": a_link("/dev/tty"),
    "entry of /proc": a_link("/proc/self/environ"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": a_link("nothing"),
}
# Every file that is read, by the format that has it.
READ = [(name, file) for name, format in FORMATS.items() for file in format.files if file != "checkpoint"]
READ += [("shards", "model-00001-of-00003.safetensors"), ("hub", "model.safetensors")]
READ += [("tf", "model.ckpt.data-00000-of-00001"), ("pth", "hparams.json")]
# What is not an error: the state before it is taken; a log in which nothing is yet.
GOES_ON = [("out/step-000002.pth", kind) for kind in OTHER_KINDS] + [("out/metrics.jsonl", "entry of /proc")]


@pytest.mark.parametrize(("name", "file"), READ, ids=[f"{name}: {file}" for name, file in READ])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gpt2lite.hub.fetch", no_hub)
    format, path = FORMATS[name], tmp_path / file
    format.write(tmp_path)
    for kind, make in OTHER_KINDS.items():
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.with_name("fifo").unlink(missing_ok=True)
        make(path)
        assert faults(format.read, tmp_path, 0) == [], kind
        if (file, kind) not in GOES_ON:
            with pytest.raises(CheckpointError, match=str(tmp_path)):
                format.read(tmp_path)


# ---- what is small on disk and large in memory -------------------------------------------------------------


def in_a_zip(pickled: bytes, path: Path, **entries: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)


PROTOCOL = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\nq\x00"
NUMBERS = "".join(f"K{chr(i)}" for i in range(100)).encode()
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x01tQK\x00K\x01\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
# Pickles of some megabytes, or of a few bytes, each of which takes a hundred times as much if it is believed.
PICKLES = {
    "lists": b"]" * 2_000_000 + b".",
    "dicts": b"}" * 2_000_000 + b".",
    "marks": b"(" * 2_000_000 + b".",
    "nested tuples": b")" + b"\x85" * 2_000_000 + b".",
    "ordered dicts": ORDERED + b"h\x00)R" * 500_000 + b".",
    "unknown objects": b"ca\nb\nq\x00" + b"h\x00)R" * 500_000 + b".",
    "unknown names": b"ca\nb\n0" * 400_000 + b"N.",
    "kept names": b"ca\nb\n" * 400_000 + b".",
    "sets": b"\x8f" * 1_000_000 + b".",
    "memo": b"N" + b"\x94" * 4_000_000 + b".",
    "text announced": b"X" + struct.pack("<I", 10**9) + b"a.",
    "bytes announced": b"\x8e" + struct.pack("<Q", 10**12) + b"a.",
    "bytearray announced": b"\x96" + struct.pack("<Q", 10**12) + b"a.",
    "frame announced": b"\x95" + struct.pack("<Q", 10**12) + b"N.",
    "number announced": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
    "long names": b"}X" + struct.pack("<I", 900) + b"a" * 900 + b"](" + NUMBERS * 5000 + b"es.",
    "long names of dicts": b"}(" + b"".join(
        b"X" + struct.pack("<I", 900) + b"%900d" % i + b"](" + NUMBERS * 9 + b"e" for i in range(200)
    ) + b"u.",
    "tensors out of the memo": b"](" + TENSOR + b"q\x01" + b"h\x01" * 400_000 + b"e.",
    "tensors in dicts": b"}(X\x01\x00\x00\x00a](" + TENSOR + b"q\x01" + b"h\x01" * 900 + b"eq\x02"
    + b"".join(b"X\x05\x00\x00\x00%05dh\x02" % i for i in range(900)) + b"u.",
    "a bomb of the memo": b"]q\x00"
    + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b".",
    "tuples for keys": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
}  # fmt: skip


def header(said: str) -> Callable[[Path], object]:
    raw = said.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def beside(file: str, content: str | int) -> Callable[[Path], None]:
    """A small checkpoint, and beside it a file with a text, or without content of a size."""

    def write(folder: Path) -> None:
        torch.save(GPTModel(TINY).state_dict(), folder / "model.pth")
        with open(folder / file, "w") as opened:
            opened.truncate(content) if isinstance(content, int) else opened.write(content)

    return write


def many_layers(folder: Path, n: int) -> None:
    ends = ("ln_1.weight", "attn.c_attn.weight", "mlp.c_fc.weight")
    names = ["wte.weight", *(f"h.{i}.{end}" for i in range(n) for end in ends)]
    ranges = {name: [4 * i, 4 * i + 4] for i, name in enumerate(names)}
    raw = json.dumps(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": at} for n, at in ranges.items()}
    ).encode()
    content = struct.pack("<Q", len(raw)) + raw + bytes(4 * len(names))
    (folder / "model.safetensors").write_bytes(content)


def many_models(folder: Path) -> None:
    save_file(
        {f"{i}.h.0.attn.c_attn.weight": torch.zeros(1) for i in range(4000)}, folder / "model.safetensors"
    )


def strange_names(folder: Path) -> None:
    tensors = {f"{'h.attn.c_' * 20}{i}": torch.zeros(1) for i in range(10_000)}
    save_file(tensors, folder / "model.safetensors")


def expanded(folder: Path) -> None:
    state = GPTModel(CLASSES).state_dict()
    torch.save(state | {"tok_emb.weight": torch.zeros(1).expand(10**9, 16)}, folder / "model.pth")


def expanded_masks(folder: Path) -> None:
    state = GPTModel(CLASSES).state_dict()
    masks = {f"trf_blocks.{i}.att.mask": torch.zeros(1).expand(10**6, 10**6) for i in range(2)}
    torch.save(state | masks, folder / "model.pth")


def tf_index(folder: Path) -> None:
    FORMATS["tf"].write(folder)
    path = folder / "model.ckpt.index"
    names = [pair(b"a" * 900 * (not i) + b"%06d" % i, b"", 900 if i else 0) for i in range(80_000)]
    path.write_bytes(table(block(pair(b"", HEADER)), block(*names)))


def circular(folder: Path) -> None:
    FORMATS["tf"].write(folder)
    path = folder / "model.ckpt.index"
    first = block(pair(b"", HEADER))
    own = varint(0) + varint(len(first) - 5)
    path.write_bytes(table(first, handles=[own] * 50_000))


def llmc(folder: Path) -> None:
    head = struct.pack("<256i", 20240326, 3, 1, 1, 1000, 1, 1, 1, *[0] * 248)
    (folder / "model.bin").write_bytes(head)


def directory(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        for i in range(60_000):
            archive.writestr(f"archive/{i}", b"")


def quoted(folder: Path) -> None:
    """Two entries of a zip whose data are the same bytes, of which one says it has 4 GiB."""
    torch.save(GPTModel(TINY).state_dict(), folder / "model.pth")
    raw = bytearray((folder / "model.pth").read_bytes())
    first = raw.index(b"PK\x01\x02")
    raw[first + 20 : first + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    (folder / "model.pth").write_bytes(raw)


def doubled_merges(folder: Path) -> None:
    FORMATS["lists"].write(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = ["#version: 0.2", "a b", "ab c"]
    token = "a"
    for _ in range(17):
        merges.append(f"{token} {token}")
        token += token
        vocab |= {token: len(vocab)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(merges))


LARGE: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    **{
        f"pickle: {name}": (
            lambda folder, raw=raw: in_a_zip(PROTOCOL + raw, folder / "model.pth"),
            opens("model.pth"),
        )
        for name, raw in PICKLES.items()
    },
    **{
        f"meta.pkl: {name}": (
            lambda folder, raw=raw: (
                beside("x", "")(folder),
                (folder / "meta.pkl").write_bytes(PROTOCOL + raw),
            ),
            opens("model.pth"),
        )
        for name, raw in PICKLES.items()
        if name in ("lists", "text announced", "bytes announced", "tuples for keys")
    },
    "header of lists": (header('{"a":[' + "[]," * 2_000_000 + "0]}"), opens("")),
    "header of objects": (header('{"a":[' + "{}," * 2_000_000 + "0]}"), opens("")),
    "header of numbers": (header('{"a":[' + "1.5," * 2_000_000 + "0]}"), opens("")),
    "header without an end": (header('{"a":' * 500_000), opens("")),
    "header of one wide text": (header('{"a":"' + "\U0001f600" * 2_000_000 + '"}'), opens("")),
    "header that repeats": (header('{"a":1' + ',"a":1' * 500_000 + "}"), opens("")),
    "header of metadata": (header('{"__metadata__":{"gpt2lite":"' + "[" * 900_000 + '"}}'), opens("")),
    "config of 1 TB": (beside("config.json", 10**12), opens("")),
    "side file of 1 TB": (beside("model.json", 10**12), opens("model.pth")),
    "adapter of 1 TB": (beside("adapter_config.json", 10**12), opens("")),
    "index of 1 TB": (beside("model.safetensors.index.json", 10**12), opens("")),
    "tokenizer of 1 TB": (beside("tokenizer.json", 10**12), opens("model.pth")),
    "tiktoken of 1 TB": (beside("model.tiktoken", 10**12), opens("model.pth")),
    "meta.pkl of 1 TB": (beside("meta.pkl", 10**12), opens("model.pth")),
    "metadata of 1 TB": (beside(".metadata", 10**12), opens("")),
    "a config's deep nest": (beside("config.json", '{"n_head":' + "[" * 100_000), opens("")),
    "a config's nest": (beside("config.json", '{"n_head":' + "[" * 900 + "]" * 900 + "}"), opens("")),
    "a config's digits": (beside("config.json", '{"n_head":' + "1" * 5000 + "}"), opens("")),
    "a config's 4,000 digits": (beside("config.json", '{"n_head":' + "1" * 4000 + "}"), opens("")),
    "a config's layers": (beside("config.json", '{"n_layer": 20000, "n_head": 2}'), opens("")),
    "20,000 layers": (partial(many_layers, n=20_000), opens("")),
    "10,000 layers": (partial(many_layers, n=10_000), opens("")),
    "4,000 models": (many_models, opens("")),
    "10,000 strange names": (strange_names, opens("")),
    "expanded masks": (expanded_masks, opens("")),
    "entries that grow": (tf_index, opens("")),
    "a circle": (circular, opens("")),
    "1,000 layers of llm.c": (llmc, opens("model.bin")),
    "60,000 entries": (directory, opens("")),
    "4 GiB quoted": (quoted, opens("")),
    "tokens that double": (doubled_merges, opens("")),
}


@pytest.mark.parametrize(("write", "read"), LARGE.values(), ids=LARGE)
def test_what_is_small_on_disk_stays_small(write, read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gpt2lite.hub.fetch", no_hub)
    write(tmp_path)
    nbytes = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*"))
    assert faults(read, tmp_path, nbytes) == []


def ids_twice(folder: Path) -> None:
    FORMATS["lists"].write(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"abc": vocab["ab"]}, ensure_ascii=False))


# What chance found once, beside what the other tests name.
FOUND: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "dropouts without the first": (
        beside("config.json", '{"n_head": 2, "attn_pdrop": 0.1, "embd_pdrop": 0.2}'),
        opens(""),
    ),
    "more heads than a float holds": (beside("config.json", f'{{"n_head": 1{"0" * 400}}}'), opens("")),
    "two tokens of one id": (ids_twice, opens("")),
}


@pytest.mark.parametrize(("write", "read"), FOUND.values(), ids=FOUND)
def test_what_was_found_by_chance_stays_mended(write, read, tmp_path: Path):
    write(tmp_path)
    assert faults(read, tmp_path, 0) == []


def test_a_vocabulary_of_a_billion_rows_in_four_bytes_is_opened_and_not_loaded(tmp_path: Path):
    expanded(tmp_path)
    assert faults(opens("", n_heads=2), tmp_path, 0) == []
    with pytest.raises(InsufficientMemoryError, match="will not fit in memory"):
        GPTModel.from_checkpoint(tmp_path / "model.pth", config={"n_heads": 2}, strategy="stream")


def test_a_payload_is_seen_by_what_watches_for_it(tmp_path: Path):
    """The watch itself: the same payload, run by Python's own unpickler, is a fault."""
    in_a_zip(
        PROTOCOL + CANARY.replace(b"CANARY", str(tmp_path / "canary").encode()) + b".", tmp_path / "m.pth"
    )
    assert faults(opens("m.pth"), tmp_path, 0) == []
    assert not (tmp_path / "canary").exists()
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        found = faults(lambda folder: pickle.loads(archive.read("archive/data.pkl")), tmp_path, 0)
    assert (tmp_path / "canary").exists()
    assert any("os.system" in fault for fault in found)


# ---- what a terminal would obey ----------------------------------------------------------------------------


def test_no_message_holds_what_a_terminal_obeys():
    error = CheckpointError("a\x1b[2Jb", "c\x07\u202e\x9b\ud800\r", name="\x1b")
    assert str(error) == r"a\x1b[2Jb: c\x07\u202e\x9b\ud800\r"
    assert (error.path, error.name) == ("a\x1b[2Jb", "\x1b")  # facts stay as they are
    assert visible("a\tb\né ☂ \U0001f600") == "a\tb\né ☂ \U0001f600"
    assert str(GPT2LiteError("a\x00")) == r"a\x00"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_generated_text_is_shown_on_a_terminal_and_unchanged_in_a_pipe(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    assert shown_text("a\x1b[2J\n") == ("a\\x1b[2J\n" if is_terminal else "a\x1b[2J\n")


def test_inspect_prints_names_that_a_terminal_can_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = GPTModel(TINY).state_dict() | {"\x1b]0;title\x07": torch.zeros(3)}
    torch.save(model, tmp_path / "model.pth")
    assert main(["inspect", str(tmp_path / "model.pth"), "--n-heads", "2"]) == 0
    printed = capsys.readouterr().out
    assert r"\x1b]0;title\x07" in printed
    assert "\x1b" not in printed
