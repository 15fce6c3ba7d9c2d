"""Token files, and batches by number: of a text's windows, or of examples."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

from gpt2lite.checkpoint.writing import Progress, replacing
from gpt2lite.encoding import END_OF_TEXT, Encoding
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.reading_text import not_utf8, text_stream

IGNORED = -100  # a target that is none; F.cross_entropy's own ignore_index
PIECE = 2**18  # characters of a text in memory at a time
CHECKED = 2**20  # ids looked at together
MOST_IDS = 2**16  # that two bytes can tell apart
# No piece of GPT-2's pattern goes on from anything else to a space, and none looks back, so that what is
# before such a place and what is after it are encoded apart as they are together. Nor does END_OF_TEXT.
TO_LAST_BORDER = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class Batch(NamedTuple):
    """ids and targets, each (B, T) int64; IGNORED where no loss is taken."""

    ids: Tensor
    targets: Tensor


class Example(NamedTuple):
    """Token ids and as many targets, IGNORED where no loss is taken."""

    ids: list[int]
    targets: list[int]


Batches = Callable[[int], Batch]  # number n is always the same batch: a run is resumed from n alone


def _pieces(text: TextIO) -> Iterator[str]:
    """A text in parts whose encodings, one after the other, are the encoding of the whole."""
    rest = ""
    while read := text.read(PIECE):
        rest += read
        if border := TO_LAST_BORDER.match(rest):
            yield border[0]
            rest = rest[border.end() :]
    yield rest


def tokenize_file(text: Path, tokens: Path, encoding: Encoding, progress: Progress | None = None) -> int:
    """Write a UTF-8 text's ids as nanoGPT's train.bin, uint16 and no header; returns how many there are.

    The ids are those of the whole text, line ends read as \\n and <|endoftext|> as the special token. Holds
    PIECE characters and their ids, a few MB, or the longest stretch without a space or a line end; the whole
    text for a tokenizer that looks past spaces. The file appears whole or not at all. `progress` is called
    with (bytes read, bytes in all).
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
        text_stream(source) as decoded,
        replacing(tokens) as half,
        open(half, "wb") as written,
    ):
        try:
            whole = not getattr(encoding, "cuts_at_spaces", True)
            for piece in [decoded.read()] if whole else _pieces(decoded):
                written.write(array("H", encoding.encode(piece, allowed_special={END_OF_TEXT})))
                if progress:
                    progress(source.tell(), nbytes)
        except UnicodeDecodeError as error:
            raise not_utf8(text, source.tell(), error) from None
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
