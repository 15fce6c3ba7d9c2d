"""Token files, and batches by number: of a text's windows, or of examples."""

from __future__ import annotations

import hashlib
import io
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import tiktoken
import torch
from torch import Tensor

from gpt2lite.checkpoint.reading import memory_of
from gpt2lite.checkpoint.writing import Progress, replacing
from gpt2lite.config import GPTConfig
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.tokenizer import END_OF_TEXT

IGNORED = -100  # a target that is none; F.cross_entropy's own ignore_index
PIECE = 2**18  # characters of a text in memory at a time
CHECKED = 2**20  # ids looked at together
MOST_IDS = 2**16  # that two bytes can tell apart
# No piece of GPT-2's pattern goes on from anything else to a space, and none looks back, so that what is
# before such a place and what is after it are encoded apart as they are together. Nor does END_OF_TEXT.
TO_LAST_BORDER = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class Batch(NamedTuple):
    """Rows to learn from: `ids` and `targets`, each (B, T) int64, T up to the context.

    The target at a place is what the model should say there: in text the *next* token, so that
    targets[:, t] is ids[:, t + 1] (transformers shifts labels itself, here they are shifted already); for a
    classifier the class, 0 … n_classes - 1, at the last token of a row. -100 (IGNORED) does not count. The
    loss is the mean over all targets of a step that count. `check_batch` is asked wherever one is used.
    """

    ids: Tensor
    targets: Tensor


def _are_unshifted(ids: Tensor, targets: Tensor, counted: Tensor) -> bool:
    """Whether each target is its own token, and some are not the next one."""
    copies = bool((targets == ids)[counted].all())
    return copies and not bool((targets[:, :-1] == ids[:, 1:])[counted[:, :-1]].all())


def check_batch(batch: Batch, config: GPTConfig) -> None:
    """Raise UsageError, with what was found, where a model of this config cannot learn from a batch."""
    ids, targets = batch
    for name, tensor in zip(Batch._fields, batch, strict=True):
        if tensor.dtype != torch.int64 or tensor.dim() != 2 or tensor.shape != ids.shape or not ids.numel():
            raise UsageError(
                f"Batch.{name} is {tuple(tensor.shape)} {tensor.dtype}; wanted (B, T) torch.int64, "
                "ids and targets of one shape"
            )
    if ids.shape[1] > config.context_length:
        raise UsageError(f"Batch: rows of {ids.shape[1]} tokens, the context is {config.context_length}")
    counted = targets != IGNORED
    ends = (config.vocab_size, config.n_classes or config.vocab_size)
    for name, values, end in zip(Batch._fields, (ids, targets[counted]), ends, strict=True):
        least, most = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
        if least < 0 or most >= end:
            raise UsageError(
                f"Batch.{name} holds {least if least < 0 else most}; wanted 0 … {end - 1}, "
                f"and {IGNORED} for a target that does not count"
            )
    if not config.n_classes and _are_unshifted(ids, targets, counted):
        raise UsageError(
            "Batch.targets are the ids themselves, which trains a model to copy; they must be one ahead: "
            "Batch(ids[:, :-1], ids[:, 1:])"
        )


class Example(NamedTuple):
    """Token ids and as many targets, IGNORED where no loss is taken."""

    ids: list[int]
    targets: list[int]


Batches = Callable[[int], Batch]  # number n is always the same batch: a run is resumed from n alone


def digest_of(*parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of all bytes, in hex."""
    found = hashlib.sha256()
    for part in chain(*parts):
        found.update(part)
    return found.hexdigest()


def tensor_parts(*tensors: Tensor) -> Iterator[bytes | memoryview]:
    """Shapes and bytes, CHECKED numbers at a time."""
    for tensor in tensors:
        yield f"{tuple(tensor.shape)} {tensor.dtype}".encode()
        yield from (memory_of(part.cpu().contiguous()) for part in tensor.flatten().split(CHECKED))


def _pieces(text: TextIO) -> Iterator[str]:
    """A text in parts whose encodings, one after the other, are the encoding of the whole."""
    rest = ""
    while read := text.read(PIECE):
        rest += read
        if border := TO_LAST_BORDER.match(rest):
            yield border[0]
            rest = rest[border.end() :]
    yield rest


def tokenize_file(
    text: Path, tokens: Path, encoding: tiktoken.Encoding, progress: Progress | None = None
) -> int:
    """Write a UTF-8 text's ids as nanoGPT's train.bin, uint16 and no header; returns how many there are.

    The ids are those of the whole text, line ends read as \\n and <|endoftext|> as the special token. Holds
    PIECE characters and their ids, a few MB, or the longest stretch without a space or a line end. The
    file appears whole or not at all. `progress` is called with (bytes read, bytes in all).
    Raises UsageError for a text that is empty or not UTF-8, and a vocabulary that uint16 cannot number.
    """
    if encoding.n_vocab > MOST_IDS:
        raise UsageError(f"{encoding.name}: {encoding.n_vocab} tokens; a token file can number {MOST_IDS}")
    nbytes = text.stat().st_size
    if not nbytes:
        raise UsageError(f"{text}: is empty; there is nothing to tokenize")
    if tokens.exists() and tokens.samefile(text):
        raise UsageError(f"{tokens}: is the text itself; name another file for its tokens")
    with (
        open(text, "rb") as source,
        io.TextIOWrapper(source, "utf-8") as decoded,
        replacing(tokens) as half,
        open(half, "wb") as written,
    ):
        try:
            for piece in _pieces(decoded):
                written.write(array("H", encoding.encode(piece, allowed_special={END_OF_TEXT})))
                if progress:
                    progress(source.tell(), nbytes)
        except UnicodeDecodeError as error:
            place = source.tell() - len(error.object) + error.start
            raise UsageError(f"{text}: not UTF-8 at byte {place} ({error.reason}); convert it") from None
        return written.tell() // 2


def _largest(path: Path) -> int:
    """Of all ids; read, since pages of a mapping would count as the process's memory from then on."""
    with open(path, "rb") as file:
        parts = iter(lambda: bytearray(file.read(2 * CHECKED)), b"")
        return max(int(torch.frombuffer(part, dtype=torch.uint16).int().max()) for part in parts)


def open_tokens(path: Path, vocab_size: int) -> Tensor:
    """A token file, mapped: (N,) uint16. Reads it once to check it, CHECKED ids at a time.

    Raises CheckpointError for a file that is empty, ends within an id, or holds one that is not < vocab_size.
    """
    nbytes = path.stat().st_size
    if not nbytes or nbytes % 2:
        raise CheckpointError(f"{path}: {nbytes} bytes, wanted two a token. Is it a token file, and whole?")
    largest = _largest(path)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path}: holds the id {largest}, the model's are below {vocab_size}. "
            "Tokenize the text for this model: gpt2lite tokenize --model"
        )
    return torch.from_file(str(path), shared=False, size=nbytes // 2, dtype=torch.uint16)


def _generator(seed: int, number: int) -> torch.Generator:
    """Another stream for each number; torch uses 32 bits of a seed, and the odd factor parts the seeds."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)


def shuffled(count: int, seed: int, number: int) -> list[int]:
    """0 … count - 1 in an order drawn from (seed, number)."""
    order: list[int] = torch.randperm(count, generator=_generator(seed, number)).tolist()
    return order


def _windows(tokens: Tensor, starts: Sequence[int], seq_len: int) -> Batch:
    rows = torch.stack([tokens[start : start + seq_len + 1].long() for start in starts])
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def _require_window(tokens: Tensor, seq_len: int) -> None:
    if len(tokens) <= seq_len:
        raise UsageError(
            f"the text has {len(tokens)} tokens, a window needs {seq_len + 1}; use a smaller --seq-len"
        )


def text_batches(tokens: Tensor, seq_len: int, batch_size: int, seed: int) -> Batches:
    """Windows of a text (N,) at random places, drawn from (seed, number of the batch).

    Raises UsageError for a text shorter than seq_len + 1 tokens.
    """
    _require_window(tokens, seq_len)

    def batch(number: int) -> Batch:
        starts = torch.randint(len(tokens) - seq_len, (batch_size,), generator=_generator(seed, number))
        return _windows(tokens, starts.tolist(), seq_len)

    return batch


def text_windows(tokens: Tensor, seq_len: int, batch_size: int, most: int) -> list[Batch]:
    """The first `most` windows of a text, or all: one behind the other, so that no target comes twice.

    The last batch may be smaller. Raises UsageError for a text shorter than seq_len + 1 tokens.
    """
    _require_window(tokens, seq_len)
    starts = range(0, len(tokens) - seq_len, seq_len)[:most]
    parts = (starts[first : first + batch_size] for first in range(0, len(starts), batch_size))
    return [_windows(tokens, part, seq_len) for part in parts]


def _padded(examples: Sequence[Example], pad: int) -> Batch:
    length = max(len(example.ids) for example in examples)
    ids = [example.ids + [pad] * (length - len(example.ids)) for example in examples]
    targets = [example.targets + [IGNORED] * (length - len(example.targets)) for example in examples]
    return Batch(torch.tensor(ids), torch.tensor(targets))


def example_batches(examples: Sequence[Example], batch_size: int, seed: int, pad: int) -> Batches:
    """Epoch after epoch, each in an order drawn from (seed, epoch); a batch may reach into the next.

    Rows are filled up on the right to the longest of their batch, with `pad` and targets that are IGNORED.
    """

    def batch(number: int) -> Batch:
        places = [divmod(number * batch_size + row, len(examples)) for row in range(batch_size)]
        orders = {epoch: shuffled(len(examples), seed, epoch) for epoch, _ in places}
        return _padded([examples[orders[epoch][index]] for epoch, index in places], pad)

    return batch


def example_windows(examples: Sequence[Example], batch_size: int, pad: int) -> list[Batch]:
    """All examples in their order, padded as `example_batches` does; the last batch may be smaller."""
    return [
        _padded(examples[first : first + batch_size], pad) for first in range(0, len(examples), batch_size)
    ]
