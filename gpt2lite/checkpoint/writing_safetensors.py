"""The safetensors writer, in one file or in shards as huggingface_hub divides them.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lite.checkpoint.chunks import TensorToWrite, made_ahead
from gpt2lite.checkpoint.manifest import BOUND_CONFIG
from gpt2lite.checkpoint.safetensors_file import DTYPES
from gpt2lite.checkpoint.writing import Config, Progress, replacing
from gpt2lite.errors import UsageError

CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 8
FLUSH_BYTES = 64 << 20
ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _header(tensors: Iterable[TensorToWrite], config: Config | None) -> bytes:
    """The length and the JSON header, padded with spaces so that the data begin aligned."""
    bound = {} if config is None else {BOUND_CONFIG: json.dumps(config)}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **bound}}
    end = 0
    for tensor in tensors:
        if tensor.dtype not in CODES:
            raise UsageError(f"{tensor.name} is {tensor.dtype}, for which safetensors has no code")
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _write_all(file: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


@contextmanager
def _flushed_meanwhile(file: int) -> Iterator[Callable[[int], None]]:
    """A function to tell what was written: a thread has the disk take it while more is made."""
    with ThreadPoolExecutor(1) as flusher:
        pending: list[Future[None]] = []
        waiting = 0

        def wrote(nbytes: int) -> None:
            nonlocal waiting
            waiting += nbytes
            if waiting >= FLUSH_BYTES and (not pending or pending[0].done()):
                for flush in pending:
                    flush.result()
                pending[:], waiting = [flusher.submit(os.fsync, file)], 0

        yield wrote
        for flush in pending:  # whose error no later fsync would say again
            flush.result()


def fill_safetensors(
    path: Path, tensors: Sequence[TensorToWrite], progress: Progress, config: Config | None = None
) -> None:
    """Write a new `.safetensors` file, two chunks in memory at a time; the config goes into its metadata.

    The format cannot tie: tensors that share another's bytes are written again. Raises UsageError for a
    dtype that the format lacks.
    """
    header = _header(tensors, config)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with _flushed_meanwhile(file) as wrote:
            _write_all(file, header)
            chunks = itertools.chain.from_iterable(tensor.chunks() for tensor in tensors)
            for chunk in made_ahead(chunks):
                _write_all(file, chunk)
                wrote(len(chunk))
                done += len(chunk)
                progress(done, total)
    finally:
        os.close(file)


def write_safetensors(
    path: Path, tensors: Sequence[TensorToWrite], progress: Progress, config: Config | None = None
) -> None:
    """Write a `.safetensors` file as `fill_safetensors`; it appears whole or not at all."""
    with replacing(path) as temporary:
        fill_safetensors(temporary, tensors, progress, config)


def divide(tensors: Iterable[TensorToWrite], max_bytes: int) -> list[list[TensorToWrite]]:
    """Tensors in order, in shards of at most `max_bytes`; what is larger has a shard of its own."""
    shards: list[list[TensorToWrite]] = []
    current: list[TensorToWrite] = []
    for tensor in tensors:
        if tensor.nbytes > max_bytes:
            shards.append([tensor])
            continue
        if sum(each.nbytes for each in current) + tensor.nbytes > max_bytes:
            shards.append(current)
            current = []
        current.append(tensor)
    return [*shards, current] if current else shards


def fill_safetensors_folder(
    folder: Path, tensors: Sequence[TensorToWrite], progress: Progress, max_shard_bytes: int | None = None
) -> None:
    """Write `model.safetensors` into a folder, or shards and an index where one file would be too large."""
    shards = divide(tensors, max_shard_bytes) if max_shard_bytes else [list(tensors)]
    if len(shards) <= 1:
        fill_safetensors(folder / ONE, tensors, progress)
        return
    total, before = sum(tensor.nbytes for tensor in tensors), 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        fill_safetensors(folder / name, shard, lambda done, _, before=before: progress(before + done, total))  # type: ignore[misc]
        before += sum(tensor.nbytes for tensor in shard)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
