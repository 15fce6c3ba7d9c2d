"""What the writers promise: files that torch.load reads, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpt2lite.checkpoint import open_checkpoint, torch_zip, writing
from gpt2lite.checkpoint.reading import read_span
from gpt2lite.checkpoint.source import memory_of
from gpt2lite.checkpoint.torch_zip import ALIGNMENT, fill_torch_zip
from gpt2lite.checkpoint.writing import TensorToWrite, replacing, require_space, write_whole
from gpt2lite.converting import convert, save_per_tensor
from gpt2lite.errors import CheckpointNotFoundError, DiskFullError, UsageError
from gpt2lite.model import GPTModel

STATE = {
    "wte.weight": torch.arange(300.0).reshape(30, 10),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "none": torch.empty(0, 5),
    "half": torch.arange(7).to(torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "eighth": torch.arange(9).to(torch.float8_e4m3fn),
    "counts": torch.arange(3).to(torch.uint16),
    "complex": torch.tensor([1 + 2j, 3 - 4j]),
}


def ignore(done: int, total: int) -> None:
    pass


def bytes_of(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def chunks_of(tensor: torch.Tensor, size: int = 100) -> Callable[[], Iterable[memoryview]]:
    def chunks() -> Iterator[memoryview]:
        whole = memory_of(tensor)
        for begin in range(0, len(whole), size):
            yield whole[begin : begin + size]

    return chunks


def to_write(state: dict[str, torch.Tensor]) -> list[TensorToWrite]:
    return [
        TensorToWrite(name, tensor.dtype, tuple(tensor.shape), chunks_of(tensor))
        for name, tensor in state.items()
    ]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes_of(found[name]) == bytes_of(tensor), name


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_whole(fill_torch_zip, tmp_path / "model.pth", to_write(STATE), ignore)
    return tmp_path / "model.pth"


# ---- fill_torch_zip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load_reads_what_is_written(mmap, written):
    assert_same(torch.load(written, weights_only=True, mmap=mmap), STATE)


def test_open_checkpoint_reads_what_is_written(written):
    spans = open_checkpoint(written).tensors
    assert_same({name: read_span(span) for name, span in spans.items()}, STATE)


def test_every_tensor_is_aligned(written):
    offsets = [span.offset for span in open_checkpoint(written).tensors.values()]
    assert len(set(offsets)) >= len(STATE) - 1
    assert {offset % ALIGNMENT for offset in offsets} == {0}


def test_the_checksums_are_right(written):
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
        assert all(info.CRC for info in archive.infolist() if info.file_size)


def test_an_empty_state_dict_is_written(tmp_path):
    write_whole(fill_torch_zip, tmp_path / "empty.pth", [], ignore)
    assert torch.load(tmp_path / "empty.pth", weights_only=True) == {}
    assert open_checkpoint(tmp_path / "empty.pth").tensors == {}


def test_progress_counts_every_byte_once(tmp_path):
    seen: list[tuple[int, int]] = []
    written = tmp_path / "m.pth"
    write_whole(fill_torch_zip, written, to_write(STATE), lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in STATE.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(set(seen))


def test_the_old_file_is_replaced(written):
    write_whole(fill_torch_zip, written, to_write({"w": torch.ones(2)}), ignore)
    assert list(torch.load(written, weights_only=True)) == ["w"]
    assert list(written.parent.iterdir()) == [written]


def failing(after: int) -> Iterator[memoryview]:
    yield memoryview(bytes(after))
    raise RuntimeError("the source broke")


def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(written):
    before = written.read_bytes()
    broken = TensorToWrite("broken", torch.float32, (100,), lambda: failing(200))
    with pytest.raises(RuntimeError, match="the source broke"):
        write_whole(fill_torch_zip, written, [*to_write(STATE), broken], ignore)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_a_failure_half_way_leaves_no_new_file(tmp_path):
    broken = TensorToWrite("broken", torch.float32, (100,), lambda: failing(200))
    with pytest.raises(RuntimeError, match="the source broke"):
        write_whole(fill_torch_zip, tmp_path / "m.pth", [broken], ignore)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist"):
        write_whole(fill_torch_zip, tmp_path / "nowhere" / "m.pth", [], ignore)


# ---- save_per_tensor ---------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("no_rows", torch.empty(0, 3))
        self.register_buffer("no_rows_either", torch.empty(0, 3))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())


APART = ["embedding.weight", "no_rows", "no_rows_either", "norm.bias", "norm.weight", "turned"]


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.iterdir())
    assert {file.suffix for file in files} == {".pt"}
    return {file.stem: torch.load(file, weights_only=True) for file in files}


def test_a_model_is_saved_with_a_file_a_tensor_and_ties_once(tmp_path):
    model = Tied()
    assert save_per_tensor(model, tmp_path / "parts") == tmp_path / "parts"
    assert_same(read_folder(tmp_path / "parts"), {name: model.state_dict()[name] for name in APART})


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["pth", "safetensors"])
def test_a_checkpoint_is_saved_with_a_file_a_tensor(save, tmp_path):
    state = {"b": torch.arange(4.0), "a": torch.arange(6).reshape(2, 3), "none": torch.empty(0, 2)}
    save(state, tmp_path / "model")
    save_per_tensor(tmp_path / "model", tmp_path / "parts")
    assert_same(read_folder(tmp_path / "parts"), dict(sorted(state.items())))


def test_a_tied_checkpoint_is_saved_with_ties_once_under_the_first_name(tmp_path):
    model = Tied()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    save_per_tensor(tmp_path / "model.pth", tmp_path / "parts")
    assert_same(read_folder(tmp_path / "parts"), {name: model.state_dict()[name] for name in APART})


def test_a_view_is_saved_without_the_storage_around_it(tmp_path):
    torch.save({"w": torch.zeros(1_000_000)[5:8]}, tmp_path / "model.pth")
    save_per_tensor(tmp_path / "model.pth", tmp_path / "parts")
    assert (tmp_path / "parts" / "w.pt").stat().st_size < 5000


def test_the_folder_is_read_back_as_a_checkpoint(tmp_path):
    model = Tied()
    save_per_tensor(model, tmp_path / "parts")
    spans = open_checkpoint(tmp_path / "parts").tensors
    expected = {name: model.state_dict()[name] for name in APART}
    assert_same({name: read_span(span) for name, span in spans.items()}, expected)


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="already exists; choose a new folder"):
        save_per_tensor(Tied(), tmp_path / "parts")
    assert (tmp_path / "parts" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["../../escaped", "a/b", ".hidden", "a\0b", ""], ids=repr)
def test_a_name_that_no_file_can_have_is_refused_and_nothing_is_left(name, tmp_path):
    torch.save({"first": torch.ones(1), "nested": torch.ones(1), name: torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="which cannot be a file's name"):
        save_per_tensor(tmp_path / "model.pth", tmp_path / "parts")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_a_missing_source_leaves_no_folder(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        save_per_tensor(tmp_path / "elsewhere.pth", tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_half_way_leaves_no_folder(tmp_path, monkeypatch):
    saved, fill = [], torch_zip.fill_torch_zip

    def fill_until_full(path: Path, *rest: object, **more: object) -> None:
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        fill(path, *rest, **more)

    monkeypatch.setattr(torch_zip, "fill_torch_zip", fill_until_full)
    with pytest.raises(OSError, match="No space left"):
        save_per_tensor(Tied(), tmp_path / "parts")
    assert len(saved) == 2
    assert list(tmp_path.iterdir()) == []


# ---- what they share ---------------------------------------------------------------------------------------


def interrupted(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt("by hand")


def test_replacing_leaves_nothing_when_interrupted(tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(KeyboardInterrupt, match="by hand"):
        interrupted(tmp_path / "kept")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("kept", "old")]


def test_too_little_disk_is_an_error_before_writing(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"needs .* bytes, .* are free, .* are missing") as caught:
        require_space(tmp_path, 1 << 62)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(("nbytes", "written", "needed"), [(100, 10, 90), (100, 100, 1), (0, 10, 0)])
def test_a_full_disk_says_how_many_bytes_were_to_come(nbytes: int, written: int, needed: int, tmp_path: Path):
    def fill() -> None:
        with replacing(tmp_path / "model.pth", nbytes) as temporary:
            temporary.write_bytes(bytes(written))
            raise RuntimeError("torch's writer failed") from OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(DiskFullError) as caught:
        fill()
    assert caught.value.errno == errno.EDQUOT
    assert (f"needs {needed} bytes" in str(caught.value)) == bool(needed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunk_bytes", [1, 100, 8 << 20])
def test_a_tensors_chunks_are_its_bytes_whatever_their_size(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(writing, "CHUNK_BYTES", chunk_bytes)
    wide, tall = torch.arange(12.0).reshape(3, 4), torch.arange(90_000.0).reshape(300, 300).t()
    cases = [([wide, wide + 1], 0), ([wide, wide[:, :1]], 1), ([tall, tall + 1], 1), ([tall], 0)]
    for parts, axis in (*cases, ([torch.arange(90.0).reshape(45, 2)], 0)):
        found = writing.join("joined", parts, axis=axis)
        whole = torch.cat(parts, axis)
        chunks = list(found.chunks())
        assert b"".join(chunks) == whole.contiguous().numpy().tobytes()
        assert max(map(len, chunks)) <= max(chunk_bytes, whole[:1].nbytes)
        assert (found.shape, found.nbytes) == (tuple(whole.shape), whole.nbytes)
    narrow = writing.join("promoted", [wide.half(), wide.bfloat16()])
    assert (narrow.dtype, narrow.shape) == (torch.float32, (6, 4))


def test_chunks_are_made_one_after_the_other_where_there_is_no_thread(monkeypatch: pytest.MonkeyPatch):
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    chunks = [memoryview(bytes([n])) for n in range(5)]
    assert list(writing.made_ahead(chunks)) == chunks
    monkeypatch.setattr(writing.ThreadPoolExecutor, "submit", no_thread)
    assert list(writing.made_ahead(chunks)) == chunks


def test_tied_tensors_are_one_and_what_merely_begins_there_is_not():
    base = torch.arange(12.0)
    state = {"a": base, "b": base, "c": base[:6], "d": base.view(3, 4), "e": base.view(torch.int32)}
    state |= {"none": torch.empty(0), "none too": torch.empty(0)}
    found = writing.tensors_of(state)
    assert [tensor.shares for tensor in found] == ["", "a", "", "", "", "", ""]
    assert writing.stored_bytes(found) == base.nbytes * 3 + base[:6].nbytes


def test_equal_tensors_give_equal_bytes_at_any_time(
    model: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = model.save_checkpoint(tmp_path / "first.pth")
    monkeypatch.setattr("zipfile.time.localtime", lambda *_: time.struct_time((2001, 2, 3, 4, 5, 6, 0, 0, 0)))
    assert model.save_checkpoint(tmp_path / "second.pth").read_bytes() == first.read_bytes()


# ---- destinations ------------------------------------------------------------------------------------------


def test_a_link_is_followed_and_stays_a_link(model: GPTModel, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "big.pth").write_bytes(b"old")
    (tmp_path / "middle.pth").symlink_to("disk/big.pth")
    (tmp_path / "model.pth").symlink_to(tmp_path / "middle.pth")
    model.save_checkpoint(tmp_path / "model.pth")
    assert (tmp_path / "model.pth").is_symlink()
    assert (tmp_path / "middle.pth").is_symlink()
    assert_same(torch.load(tmp_path / "disk" / "big.pth", weights_only=True), dict(model.state_dict()))
    assert sorted(file.name for file in (tmp_path / "disk").iterdir()) == ["big.pth"]


def test_a_link_to_nothing_writes_where_it_points(model: GPTModel, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    for name in ("model.pth", "parts"):
        (tmp_path / name).symlink_to(Path("disk") / name)
    model.save_checkpoint(tmp_path / "model.pth")
    save_per_tensor(model, tmp_path / "parts")
    assert_same(torch.load(tmp_path / "disk" / "model.pth", weights_only=True), dict(model.state_dict()))
    assert (tmp_path / "parts").is_symlink()
    assert read_folder(tmp_path / "disk" / "parts").keys() == model.state_dict().keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_replaced_file_keeps_its_mode_and_a_new_one_honours_umask(
    suffix: str, model: GPTModel, tmp_path: Path
):
    before = os.umask(0o027)
    try:
        (tmp_path / f"old{suffix}").touch()
        for mode in (0o604, 0o440, 0o777):
            (tmp_path / f"old{suffix}").chmod(mode)
            model.save_checkpoint(tmp_path / f"old{suffix}")
            assert stat.S_IMODE((tmp_path / f"old{suffix}").stat().st_mode) == mode
        model.save_checkpoint(tmp_path / f"new{suffix}")
        assert stat.S_IMODE((tmp_path / f"new{suffix}").stat().st_mode) == 0o640
        save_per_tensor(model, tmp_path / "parts")
        assert stat.S_IMODE((tmp_path / "parts").stat().st_mode) == 0o750
    finally:
        os.umask(before)


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def link_into_nowhere(path: Path) -> None:
    path.symlink_to("nowhere/model.pth")


def occupied_by_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


NO_DESTINATIONS = {
    "a circle of links": ("model.pth", circle, "model.pth: its links form a loop; choose another name"),
    "a link into no folder": (
        "model.pth",
        link_into_nowhere,
        "model.pth: is a link to .*nowhere/model.pth; the folder .*nowhere does not exist",
    ),
    "a FIFO": ("model.pth", os.mkfifo, "model.pth: is a FIFO, socket or device, which a file cannot replace"),
    "a socket": ("model.pth", occupied_by_socket, "model.pth: is a FIFO, socket or device"),
    "a device": ("model.pth", lambda path: path.symlink_to("/dev/null"), "is a FIFO, socket or device"),
    "a folder": ("model.pth", Path.mkdir, "model.pth: is a folder, which a file cannot replace"),
    "a long name": (
        "x" * 252 + ".pth",
        lambda path: None,
        "longer than the file system allows; choose another name",
    ),
    "no folder": ("none/model.pth", lambda path: None, "the folder .*none does not exist; make it first"),
    "a file as folder": ("a/model.pth", lambda path: path.parent.touch(), "the folder .*a is a file, not a"),
}


@pytest.mark.parametrize(("name", "occupy", "message"), NO_DESTINATIONS.values(), ids=NO_DESTINATIONS)
def test_where_no_file_can_be_put_nothing_is_written(
    name: str, occupy: Callable[[Path], object], message: str, pth: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(pth.parent)
    (pth.parent / "out").mkdir()
    destination = pth.parent / "out" / name
    occupy(destination)
    before = sorted(os.listdir(pth.parent / "out"))
    with pytest.raises(UsageError, match=message):
        convert(pth, destination, config={"n_heads": 4})
    if destination.suffix != ".pt":
        with pytest.raises(UsageError, match=message):
            GPTModel.from_checkpoint(pth, config={"n_heads": 4}).save_checkpoint(destination)
    assert sorted(os.listdir(pth.parent / "out")) == before


def test_a_hub_folders_config_is_not_written_over(model: GPTModel, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_head": 2}')
    model.save_checkpoint(tmp_path / "config.pth")
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "gpt2", "n_head": 2}
    assert sorted(os.listdir(tmp_path)) == ["config.json", "config.pth"]


def test_the_longest_name_that_fits_is_written(model: GPTModel, tmp_path: Path):
    name = "ß" * 125 + ".pth"  # 254 bytes
    model.save_checkpoint(tmp_path / name)
    assert len(os.listdir(tmp_path)) == 1
    assert_same(torch.load(tmp_path / name, weights_only=True), dict(model.state_dict()))


def test_a_tensor_whose_name_no_file_can_have_is_refused_before_anything_is_written(tmp_path: Path):
    torch.save({"a": torch.ones(1), "x" * 253: torch.ones(1)}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="longer than the file system allows"):
        save_per_tensor(tmp_path / "model.pth", tmp_path / "parts")
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_file_where_a_folder_is_wanted_is_said(tmp_path: Path):
    (tmp_path / "parts").touch()
    with pytest.raises(UsageError, match="parts: already exists as a file"):
        save_per_tensor(Tied(), tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "format", "is_file", "opened_as"),
    [
        ("model.bin", None, True, "torch_zip"),
        ("MODEL.PTH", None, True, "torch_zip"),
        ("model", "pth", True, "torch_zip"),
        ("model.ckpt", "pth", True, "torch_zip"),
        ("model.SafeTensors", None, True, "safetensors"),
        ("model.safetensors", "safetensors", True, "safetensors"),
        ("gpt2-v1.5", None, False, "safetensors"),
        ("model", "safetensors", False, "safetensors"),
        ("model", "per-tensor", False, "tensor_folder"),
    ],
)
def test_the_format_is_the_one_that_was_asked_for(
    name: str, format: str | None, is_file: bool, opened_as: str, pth: Path
):
    found = convert(pth, pth.parent / f"new-{name}", format=format, config={"n_heads": 4})
    assert found.is_file() == is_file
    assert open_checkpoint(found).format == opened_as


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("x.PTH", "safetensors", "its suffix says pth, format says safetensors"),
        ("x.safetensors", "pth", "its suffix says safetensors, format says pth"),
        ("x.bin", "per-tensor", "its suffix says pth, format says per-tensor"),
        ("x.ckpt", None, r"\.ckpt files are not written here; use \.pth"),
        ("x.H5", "safetensors", r"\.h5 files are not written here"),
        ("x.npz", "per-tensor", r"\.npz files are not written here"),
    ],
)
def test_a_suffix_that_says_another_format_is_refused(name: str, format: str | None, message: str, pth: Path):
    with pytest.raises(UsageError, match=message):
        convert(pth, pth.parent / name, format=format, config={"n_heads": 4})
    assert os.listdir(pth.parent) == ["model.pth"]
