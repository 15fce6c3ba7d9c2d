"""Writers that are killed, that fill a disk, or that write to one place at once."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from answers import answer

from gpt2lite import GPTModel, UsageError
from gpt2lite.checkpoint.writing import remove_parts, replacing


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answer("dying.py", tmp_path_factory.mktemp("dying"), threads=1)


@pytest.mark.parametrize("kind", ["killed", "disk full", "at once"])
def test_what_a_writer_replaces_is_whole_and_nothing_is_left(found: dict[str, Any], kind: str):
    if None in found[kind].values():
        pytest.skip("this process may not mount a small disk")
    assert len(found[kind]) == 4
    assert [fault for each in found[kind].values() for fault in each["faults"]] == []


def leave(path: Path) -> Path:
    """What a killed writer leaves."""
    child = os.fork()
    if not child:
        with replacing(path) as temporary:
            temporary.write_text("half")
            os._exit(0)
    os.waitpid(child, 0)
    (left,) = path.parent.glob(f".{path.name}.*.part")
    return left


def test_only_what_a_killed_writer_of_the_same_destination_left_is_removed(tmp_path: Path):
    left, others = leave(tmp_path / "a.txt"), leave(tmp_path / "b.txt")
    mine = tmp_path / ".a.txt.12345678.part"
    mine.mkdir()
    with replacing(tmp_path / "a.txt") as temporary:
        assert not any(left.iterdir())
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert not left.exists()
    assert mine.exists()
    assert (others / "b.txt").read_text() == "half"


def test_a_folder_is_cleared_of_what_killed_writers_left_but_not_of_what_is_written_now(tmp_path: Path):
    left = leave(tmp_path / "a.txt")
    (tmp_path / "notes.part").mkdir()
    with replacing(tmp_path / "b.txt") as temporary:
        temporary.write_text("whole")
        remove_parts(tmp_path)
        assert not left.exists()
        assert temporary.exists()
    assert sorted(os.listdir(tmp_path)) == ["b.txt", "notes.part"]


def test_who_writes_where_another_one_writes_is_told(tmp_path: Path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("first")
        with pytest.raises(UsageError, match=r"a\.txt: another process is writing it, in \.a\.txt\."):
            replacing(tmp_path / "a.txt").__enter__()
    assert (tmp_path / "a.txt").read_text() == "first"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_another_one_made_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: Any):
    from gpt2lite.checkpoint import writing

    lock = writing._lock

    def lock_late(folder: Path, target: Path) -> int:
        target.mkdir()  # between the first look and the lock
        return lock(folder, target)

    monkeypatch.setattr(writing, "_lock", lock_late)
    with pytest.raises(UsageError, match="out: is a folder, which a file cannot replace"):
        replacing(tmp_path / "out").__enter__()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_replaced_file_keeps_its_owner(model: GPTModel, tmp_path: Path):
    path = model.save_checkpoint(tmp_path / "model.pth")
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    model.save_checkpoint(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o640)


def test_all_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_writer_returns(
    tmp_path: Path, monkeypatch: Any
):
    calls, fsync, rename = [], os.fsync, os.replace

    def spy_fsync(opened: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{opened}")).name)
        fsync(opened)

    def spy_rename(old: Path, new: Path) -> None:
        calls.append(f"renamed to {new.name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_rename)
    with replacing(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "inner").write_text("x")
    assert calls == ["inner", "out", "renamed to out", tmp_path.name]


def test_without_locks_what_one_finds_there_is_another_ones(tmp_path: Path, monkeypatch: Any):
    def refuse(held: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = leave(tmp_path / "a.txt")
    monkeypatch.setattr("fcntl.flock", refuse)
    with replacing(tmp_path / "b.txt") as temporary:
        temporary.write_text("whole")
    with pytest.raises(UsageError, match=r"a\.txt: another process is writing it"):
        replacing(tmp_path / "a.txt").__enter__()
    assert sorted(os.listdir(tmp_path)) == [left.name, "b.txt"]


def test_links_and_folders_that_a_killed_writer_left_are_removed_and_not_followed(tmp_path: Path):
    left = leave(tmp_path / "a.txt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").write_text("kept")
    (left / "deeper").mkdir()
    (left / "link").symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "a.txt") as temporary:
        assert not any(left.iterdir())
        temporary.write_text("whole")
    assert (tmp_path / "mine" / "kept").read_text() == "kept"
