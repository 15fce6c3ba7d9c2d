"""What a load reads into the page cache, and what it leaves there."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import time
from pathlib import Path

import pytest
import torch
from test_forecast import needs_proc
from test_loading import assert_equal_bits

from gpt2lite import CheckpointError, GPTConfig, GPTModel, Tuning, forecast, track_memory
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.source import BUFFER_BYTES, ByteSource, PastCache, read_each

CONFIG = GPTConfig(8000, 512, 512, 8, 8)


def are_cached(path: Path) -> list[bool]:
    """Of each page of a file whether it lies in the page cache."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        vector, address = (ctypes.c_ubyte * pages)(), ctypes.c_char.from_buffer(mapped)
        answer = library.mincore(
            ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(len(mapped)), vector
        )
        del address
    if answer:
        pytest.skip("mincore does not answer here")
    return [bool(flag & 1) for flag in vector]


def pages_cached(path: Path) -> int:
    """Bytes of a file that lie in the page cache."""
    return sum(are_cached(path)) * mmap.PAGESIZE


def forget(path: Path) -> None:
    for _ in range(20):
        ByteSource(path).forget()
        time.sleep(0.05)  # by then what the system was reading ahead has come, and can be forgotten, too
        if not pages_cached(path):
            return
    if pages_cached(path) > path.stat().st_size // 4:
        pytest.skip("this file system does not give cached pages back")


def remember(path: Path) -> None:
    path.read_bytes()
    if pages_cached(path) < path.stat().st_size * 3 // 4:
        pytest.skip("this system keeps no page cache of this file")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    write_random_checkpoint(CONFIG, path)
    return path


@pytest.mark.parametrize("is_cached", [False, True])
def test_ranges_from_all_over_a_file_are_read_as_they_are(is_cached: bool, large: Path):
    chance, whole = random.Random(0), large.read_bytes()
    ranges = [(chance.randrange(len(whole)), chance.randrange(9000)) for _ in range(200)]
    ranges += [(len(whole) - 10, 30), (len(whole) + 5000, 30), (0, 0)]
    (remember if is_cached else forget)(large)
    with large.open("rb") as file:
        found = read_each(file.fileno(), ranges)
    assert found == [whole[offset : offset + nbytes] for offset, nbytes in ranges]


def test_opening_leaves_the_page_cache_as_it_was(large: Path):
    """A page of each entry's header, left there, would break up what is read ahead later."""
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("this system cannot tell what is cached")
    forget(large)
    assert len(open_checkpoint(large).tensors) > 100
    ends = (4 << 20) // mmap.PAGESIZE  # the pickle and the zip's directory, and what is read ahead of those
    assert not any(are_cached(large)[ends:-ends])
    remember(large)
    open_checkpoint(large)
    assert pages_cached(large) >= large.stat().st_size * 3 // 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_was_read_can_leave_the_page_cache(dtype: torch.dtype | None, large: Path):
    options, size = {"config": {"n_heads": 8}, "dtype": dtype}, large.stat().st_size
    forget(large)
    remember(large)
    GPTModel.from_checkpoint(large, **options)
    assert pages_cached(large) >= size * 3 // 4  # not all: the kernel may take pages at any time
    GPTModel.from_checkpoint(large, **options, tuning=Tuning(keep_cached=False))
    assert pages_cached(large) <= size // 4  # masks, which are not read, and what the kernel holds together


@pytest.fixture
def past_cache_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each read past the page cache brings."""
    reads, real = [], PastCache.read_once

    def counting(file: PastCache, memories: list[memoryview], offset: int) -> int:
        reads.append(real(file, memories, offset))
        return reads[-1]

    monkeypatch.setattr(PastCache, "read_once", counting)
    return reads


def forget_for_past_cache(path: Path) -> None:
    forget(path)
    if not ByteSource(path).is_best_past_cache():
        pytest.skip("this system does not read this file past the page cache, or not fast")
    forget(path)  # the pages that told


def test_reads_past_the_page_cache_fill_memories_in_order(large: Path):
    forget_for_past_cache(large)
    chance, whole = random.Random(0), large.read_bytes()
    begins = [0, 1, 4095, 4096, len(whole) - 5000, *(chance.randrange(len(whole) - 5000) for _ in range(50))]
    with PastCache(large) as file:
        for offset in begins:
            most = min(len(whole) - offset, 5 << 20)
            memory = memoryview(bytearray(chance.choice([1, most, chance.randrange(1, most)])))
            cuts = sorted(chance.randrange(len(memory) + 1) for _ in range(6))
            parts = [memory[a:b] for a, b in zip([0, *cuts], [*cuts, len(memory)], strict=True)]
            file.read_into(parts, offset)
            assert memory == whole[offset : offset + len(memory)], offset
        for offset, nbytes in ((len(whole) - 10, 11), (len(whole), 1), (len(whole) + 5000, 1)):
            with pytest.raises(CheckpointError, match=r"model.pth: ends at byte"):
                file.read_into([memoryview(bytearray(nbytes))], offset)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_not_to_be_cached_is_read_past_the_page_cache(
    dtype: torch.dtype | None, large: Path, past_cache_reads: list[int]
):
    options = {"strategy": "stream", "config": {"n_heads": 8}, "dtype": dtype}
    expected = GPTModel.from_checkpoint(large, **options).state_dict()
    assert not past_cache_reads
    forget_for_past_cache(large)
    past_cache_reads.clear()
    loaded = GPTModel.from_checkpoint(large, **options, tuning=Tuning(keep_cached=False))
    assert_equal_bits(loaded, expected)
    assert sum(past_cache_reads) >= large.stat().st_size * 3 // 4
    remember(large)
    past_cache_reads.clear()
    loaded = GPTModel.from_checkpoint(large, **options, tuning=Tuning(keep_cached=False))
    assert_equal_bits(loaded, expected)
    assert sum(past_cache_reads) <= 1  # the trial


def test_a_system_that_cannot_read_past_the_page_cache_reads_through_it(
    large: Path, past_cache_reads: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    forget(large)
    options = {"strategy": "stream", "config": {"n_heads": 8}}
    loaded = GPTModel.from_checkpoint(large, **options, tuning=Tuning(keep_cached=False))
    assert_equal_bits(loaded, GPTModel.from_checkpoint(large, **options).state_dict())
    assert not past_cache_reads


@needs_proc
def test_buffers_of_reads_past_the_page_cache_are_foretold(large: Path):
    """All of them, though the first readers are done before the model's last page is touched."""
    options = {"config": {"n_heads": 8}, "tuning": Tuning(keep_cached=False, readers=8)}
    forget_for_past_cache(large)
    foretold = forecast(large, **options)["stream"]
    with track_memory() as memory:
        loaded = GPTModel.from_checkpoint(large, strategy="stream", **options)
    assert loaded.config.n_layers == 8
    assert foretold.peak_host_anonymous - foretold.stays_host == 8 * BUFFER_BYTES
    assert foretold.stays_host - (1 << 20) < memory.peak_host_anonymous
    assert memory.peak_host_anonymous < foretold.peak_host_anonymous + (1 << 20)


@needs_proc
@pytest.mark.parametrize("chunk_bytes", [Tuning().chunk_bytes, 10_000_001])
def test_prefetch_reads_what_is_mapped_and_mmap_alone_does_not(chunk_bytes: int, large: Path):
    wanted = forecast(large, config={"n_heads": 8})["mmap"].stays_mapped
    for prefetch in (False, True):
        forget(large)
        loaded = GPTModel.from_checkpoint(
            large,
            strategy="mmap",
            config={"n_heads": 8},
            tuning=Tuning(prefetch=prefetch, chunk_bytes=chunk_bytes),
        )
        assert (pages_cached(large) >= 0.9 * wanted) is prefetch
    assert_equal_bits(loaded, GPTModel.from_checkpoint(large, config={"n_heads": 8}).state_dict())


@needs_proc
def test_what_prefetch_maps_is_foretold(large: Path):
    options = {"config": {"n_heads": 8}, "tuning": Tuning(prefetch=True)}
    foretold = forecast(large, **options)["mmap"]
    with track_memory() as memory:
        loaded = GPTModel.from_checkpoint(large, strategy="mmap", **options)
    assert loaded.config.n_layers == 8
    assert abs(memory.peak_host_reclaimable - foretold.peak_host_reclaimable) <= 16 << 20
    assert foretold.peak_host_anonymous == 0
