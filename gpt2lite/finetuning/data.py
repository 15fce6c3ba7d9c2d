"""Token files, and batches by number: of a text's windows, or of examples."""

from __future__ import annotations

import hashlib
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor

from gpt2lite.checkpoint.reading import memory_of
from gpt2lite.checkpoint.writing import Progress, replacing
from gpt2lite.config import GPTConfig
from gpt2lite.encoding import END_OF_TEXT, Encoding
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.reading_text import not_utf8, text_stream

IGNORED = -100  # a target that is none; F.cross_entropy's own ignore_index
PIECE = 2**18  # characters of a text in memory at a time
CHECKED = 2**20  # ids looked at together
MOST_IDS = 2**16  # that two bytes can tell apart
PRINTABLE = bytes([*b"\t\n\r", *range(32, 127)])
NPY_MAGIC = b"\x93NUMPY"
NPY_SAYS = re.compile(
    rb"^.{6}\x01\x00..\{'descr': '(.\w+)', 'fortran_order': \w+, 'shape': \((\d+),\)", re.DOTALL
)
NPY_DTYPES = {
    "<u2": torch.uint16,
    "<u4": torch.uint32,
    "<i4": torch.int32,
    "<i8": torch.int64,
}
LLMC_HEADER = 1024  # bytes: 256 int32, of which the first three are magic, version and count
LLMC_MAGICS = {20240520: (1, torch.uint16), 20240801: (7, torch.uint32)}  # llm.c, dev/data/data_common.py
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


def _npy_header(width: int, count: int) -> bytes:
    """NumPy's format 1.0, of one length for every count, which is known last."""
    said = f"{{'descr': '<u{width}', 'fortran_order': False, 'shape': ({count},), }}"
    return NPY_MAGIC + struct.pack("<BBH", 1, 0, 118) + said.ljust(117).encode() + b"\n"


def tokenize_file(text: Path, tokens: Path, encoding: Encoding, progress: Progress | None = None) -> int:
    """Write a UTF-8 text's ids to a token file; returns how many there are.

    A `.npy` says its own width, uint16 or for vocabularies above 65,536 uint32; any other name is nanoGPT's
    train.bin, uint16 and no header. The ids are those of the whole text, line ends read as \\n and
    <|endoftext|> as the special token. Holds PIECE characters and their ids, a few MB, or the longest stretch
    without a space or a line end; the whole text for a tokenizer that looks past spaces. The file appears
    whole or not at all. `progress` is called with (bytes read, bytes in all). Raises UsageError for a text
    that is empty or not UTF-8, and a vocabulary that uint16 cannot number where there is no header.
    """
    is_npy, width = tokens.suffix == ".npy", 2 if encoding.n_vocab <= MOST_IDS else 4
    if width > 2 and not is_npy:
        raise UsageError(
            f"{tokens}: {encoding.n_vocab} tokens are more than the {MOST_IDS} that 16 bits can number; "
            "name it .npy, which says its width"
        )
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
        begin = written.write(_npy_header(width, 0)) if is_npy else 0
        try:
            whole = not getattr(encoding, "cuts_at_spaces", True)
            for piece in [decoded.read()] if whole else _pieces(decoded):
                ids = encoding.encode(piece, allowed_special={END_OF_TEXT})
                written.write(array("H" if width == 2 else "I", ids))
                if progress:
                    progress(source.tell(), nbytes)
        except UnicodeDecodeError as error:
            raise not_utf8(text, source.tell(), error) from None
        count = (written.tell() - begin) // width
        written.seek(0)
        written.write(_npy_header(width, count) if is_npy else b"")
        return count


def _read_layout(path: Path) -> tuple[str, torch.dtype, int, int]:
    """(whose format a token file has, dtype, offset of the ids, how many), nanoGPT's without a header."""
    nbytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(LLMC_HEADER)
    if head.startswith(NPY_MAGIC):
        said, length = NPY_SAYS.search(head), struct.unpack_from("<H", head.ljust(10), 8)[0]
        if said is None or said[1].decode() not in NPY_DTYPES:
            raise CheckpointError(path, "wanted one row of little-endian integers in a .npy of format 1.0")
        return (".npy", NPY_DTYPES[said[1].decode()], 10 + length, int(said[2]))
    magic, version, count = struct.unpack_from("<iii", head.ljust(12, b"\0"))
    if magic in LLMC_MAGICS:
        known, dtype = LLMC_MAGICS[magic]
        if version != known:
            raise CheckpointError(path, f"llm.c's tokens of version {version}, wanted {known}")
        return ("llm.c", dtype, LLMC_HEADER, count)
    if not nbytes or nbytes % 2:
        raise CheckpointError(path, f"{nbytes} bytes, wanted two a token. Is it a token file, and whole?")
    if len(head) >= 16 and not head.translate(None, PRINTABLE):
        raise CheckpointError(path, f"looks like text, not tokens; give it another suffix than {path.suffix}")
    return ("nanoGPT", torch.uint16, 0, nbytes // 2)


def _scan(path: Path, dtype: torch.dtype, offset: int) -> tuple[int, int, bool]:
    """(the least id, the largest, whether every second one is 0).

    Read, since pages of a mapping would count as the process's memory from then on.
    """
    least = most = 0
    used = [False, False]  # the ids at even places, and at odd ones
    with open(path, "rb") as file:
        file.seek(offset)
        while part := bytearray(file.read(CHECKED * dtype.itemsize)):
            ids = torch.frombuffer(part, dtype=dtype).long()
            least, most = min(least, int(ids.min())), max(most, int(ids.max()))
            used = [some or bool(ids[parity::2].any()) for parity, some in enumerate(used)]
    return least, most, not all(used)


def open_tokens(path: Path, vocab_size: int) -> Tensor:
    """A token file, mapped: (N,) of the file's own integers. Reads it once to check it, CHECKED at a time.

    It is a `.npy` of one row, llm.c's `.bin`, whose headers say the width, or nanoGPT's: uint16, no header.
    Raises CheckpointError for a file that is empty, truncated, holds an id that is not < vocab_size, or has
    no header and may be of another width: where every second id would be 0, or 16 bits cannot number the
    vocabulary.
    """
    kind, dtype, offset, count = _read_layout(path)
    nbytes = path.stat().st_size
    if not count or offset + count * dtype.itemsize != nbytes:
        raise CheckpointError(
            path,
            f"its header ({kind}) says {count} tokens of {dtype.itemsize} bytes, the file has "
            f"{nbytes - offset} bytes for them. Is it whole?",
        )
    least, most, has_gaps = _scan(path, dtype, offset)
    if least < 0 or most >= vocab_size:
        raise CheckpointError(
            path,
            f"holds the id {least if least < 0 else most}, the model's are below {vocab_size}. "
            "Tokenize the text for this model: gpt2lite tokenize --model",
        )
    if kind == "nanoGPT" and (vocab_size > MOST_IDS or (has_gaps and count > 3)):
        why = f"{vocab_size} ids need more" if vocab_size > MOST_IDS else "every second id would be 0"
        raise CheckpointError(
            path,
            f"has no header, so it would be read as 16 bits a token, but {why}. "
            "Save it as .npy, which says its width",
        )
    begin = offset // dtype.itemsize
    return torch.from_file(str(path), shared=False, size=begin + count, dtype=dtype)[begin:]


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
