"""What the writers promise: files that torch.load reads, whole or not at all."""

from __future__ import annotations

import errno
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.reading import memory_of, read_span
from gpt2lite.checkpoint.writing import (
    ALIGNMENT,
    TensorToWrite,
    replacing,
    require_space,
    save_per_tensor,
    write_torch_zip,
)
from gpt2lite.errors import CheckpointNotFoundError, UsageError
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
    write_torch_zip(tmp_path / "model.pth", to_write(STATE), ignore)
    return tmp_path / "model.pth"


# ---- write_torch_zip ---------------------------------------------------------------------------------------


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
    write_torch_zip(tmp_path / "empty.pth", [], ignore)
    assert torch.load(tmp_path / "empty.pth", weights_only=True) == {}
    assert open_checkpoint(tmp_path / "empty.pth").tensors == {}


def test_progress_counts_every_byte_once(tmp_path):
    seen: list[tuple[int, int]] = []
    write_torch_zip(tmp_path / "m.pth", to_write(STATE), lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in STATE.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(set(seen))


def test_the_old_file_is_replaced(written):
    write_torch_zip(written, to_write({"w": torch.ones(2)}), ignore)
    assert list(torch.load(written, weights_only=True)) == ["w"]
    assert list(written.parent.iterdir()) == [written]


def failing(after: int) -> Iterator[memoryview]:
    yield memoryview(bytes(after))
    raise RuntimeError("the source broke")


def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(written):
    before = written.read_bytes()
    broken = TensorToWrite("broken", torch.float32, (100,), lambda: failing(200))
    with pytest.raises(RuntimeError, match="the source broke"):
        write_torch_zip(written, [*to_write(STATE), broken], ignore)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_a_failure_half_way_leaves_no_new_file(tmp_path):
    broken = TensorToWrite("broken", torch.float32, (100,), lambda: failing(200))
    with pytest.raises(RuntimeError, match="the source broke"):
        write_torch_zip(tmp_path / "m.pth", [broken], ignore)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist"):
        write_torch_zip(tmp_path / "nowhere" / "m.pth", [], ignore)


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
    with pytest.raises(UsageError, match="is there already"):
        save_per_tensor(Tied(), tmp_path / "parts")
    assert (tmp_path / "parts" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("name", ["../../escaped", "a/b", ".hidden", "a\0b", ""], ids=repr)
def test_a_name_that_is_no_file_name_is_refused_and_nothing_is_left(name, tmp_path):
    torch.save({"first": torch.ones(1), "nested": torch.ones(1), name: torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="which is no file name"):
        save_per_tensor(tmp_path / "model.pth", tmp_path / "parts")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_a_missing_source_leaves_no_folder(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        save_per_tensor(tmp_path / "elsewhere.pth", tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_half_way_leaves_no_folder(tmp_path, monkeypatch):
    saved, save = [], torch.save

    def save_until_full(tensor: torch.Tensor, path: Path) -> None:
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        save(tensor, path)

    monkeypatch.setattr(torch, "save", save_until_full)
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
    with pytest.raises(OSError, match=r"are to be written, .* are free") as caught:
        require_space(tmp_path, 1 << 62)
    assert caught.value.errno == errno.ENOSPC


def test_equal_tensors_give_equal_bytes_at_any_time(
    model: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = model.save_checkpoint(tmp_path / "first.pth")
    monkeypatch.setattr("zipfile.time.localtime", lambda *_: time.struct_time((2001, 2, 3, 4, 5, 6, 0, 0, 0)))
    assert model.save_checkpoint(tmp_path / "second.pth").read_bytes() == first.read_bytes()
