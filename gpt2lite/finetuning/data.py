"""Token files, and batches by number: of a text's windows, or of examples."""

from __future__ import annotations

import codecs
import hashlib
import math
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, NamedTuple, TextIO, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt2lite.checkpoint.source import ByteSource, in_memory, mapped, memory_of
from gpt2lite.checkpoint.writing import Progress, full_disk_named, replacing
from gpt2lite.config import GPTConfig
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.generation.prompts import ends_of, is_dense
from gpt2lite.reading_text import not_utf8, text_stream
from gpt2lite.tokenizer import Encoding, Tokenizer, as_tokenizer

T = TypeVar("T")
NO_HEADER = "no header"  # nanoGPT's train.bin
IGNORED = -100  # a target that does not count; F.cross_entropy's own ignore_index
PIECE = 2**18  # characters of a text in memory at a time
CHECKED = 2**20  # ids looked at together; even
MOST_IDS = 2**16  # that two bytes can number
# Controls other than spaces, backspace and escape; and what is not UTF-8.
NOT_TEXT = re.compile(r"[\0-\x07\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
SPACES, FEW_IDS = re.compile(r"[ \n\u3000]"), 1024
# NumPy's format 1.0: one row of little-endian integers, as numpy.save writes it.
NPY = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '(\S+)', 'fortran_order': \w+, 'shape': \((\d+),\), } *\n", re.S
)
NPY_DTYPES = {b"<u2": torch.uint16, b"<u4": torch.uint32, b"<i4": torch.int32, b"<i8": torch.int64}
# What else begins so, named .bin; a row's bytes are more than ids would have by chance.
NOT_TOKENS = {
    rb"PK\x03\x04": "a zip, as torch.save and numpy.savez write it",
    rb"\x80[\x02-\x05](\x95.{6}\0\0|[]}]\x94?[q(]|\x8a\x0a|c[a-z_]{4})": "a pickle",
    rb".{6}\0\0\{\"": "safetensors",
    rb"\x1f\x8b\x08[\0-\x1f]|BZh[1-9]1AY|\xfd7zXZ\0|\x28\xb5\x2f\xfd": "compressed",
    rb"MMIDIDX\0|ARROW1\0|PAR1|\x89(HDF|PNG)\r\n": "another program's file",
}
LLMC_HEADER = 1024  # bytes: 256 int32, of which the first three are magic, version and count
LLMC = {20240520: (1, torch.uint16), 20240801: (7, torch.uint32)}  # llm.c, dev/data/data_common.py
# GPT-2's pattern never continues from a non-space across a space or line end, and never looks back, so the
# text before such a border and the text after it are encoded as they are together.
TO_LAST_BORDER = re.compile(r".*\S(?=[ \n])", re.DOTALL)


class Batch(NamedTuple):
    """Rows to learn from: `ids` and `targets`, each (B, T) int64, T up to the context.

    The target at a place is what the model should say there: in text the *next* token, so that
    targets[:, t] is ids[:, t + 1] (transformers shifts labels itself; here they are already shifted); for a
    classifier the class, 0 … n_classes - 1, at the last token of a row. -100 (IGNORED) does not count. The
    loss is the mean over all targets of a step that count. Every batch is checked before it is used.
    """

    ids: Tensor
    targets: Tensor


def _require_tensors(batch: object) -> None:
    if not isinstance(batch, Batch):
        raise UsageError(f"wanted Batch(ids, targets), got {type(batch).__name__}")
    for name, tensor in zip(Batch._fields, batch, strict=True):
        has_values = isinstance(tensor, Tensor) and is_dense(tensor)
        found = f"{tuple(tensor.shape)} {tensor.dtype}" if has_values else f"{tensor!r:.60}"
        is_one = has_values and tensor.dtype == torch.int64 and tensor.dim() == 2 and tensor.numel()
        if not is_one or (tensor.shape, tensor.device) != (batch.ids.shape, batch.ids.device):
            wanted = "(B, T) torch.int64, dense, ids and targets alike and on one device"
            raise UsageError(f"Batch.{name} is {found}; wanted {wanted}")


def own_copy(batch: Batch) -> Batch:
    """The same batch, which a task that writes all into one buffer does not change."""
    _require_tensors(batch)
    return Batch(*map(torch.clone, batch))


def check_batch(batch: Batch, config: GPTConfig) -> None:
    """Raise UsageError, with what was found, where a model of this config cannot learn from a batch."""
    _require_tensors(batch)
    ids, targets = batch
    ends = (config.vocab_size, config.n_classes or config.vocab_size)
    for name, tensor, end in zip(Batch._fields, batch, ends, strict=True):
        wrong = tensor[(tensor < 0) | (tensor >= end)]
        if len(wrong := wrong if tensor is ids else wrong[wrong != IGNORED]):
            wanted = f"0 … {end - 1} ({IGNORED} for a target to ignore)"
            raise UsageError(f"Batch.{name} holds {int(wrong[0])}; wanted {wanted}")
    if ids.shape[1] > config.context_length:
        raise UsageError(f"Batch: rows of {ids.shape[1]} tokens, the context is {config.context_length}")
    if not config.n_classes:
        _require_shifted(ids, targets)


def _require_shifted(ids: Tensor, targets: Tensor) -> None:
    """Refuse targets that are not the next tokens, but for a few, or those of inputs that were made noisy."""
    counted = targets != IGNORED
    is_next = targets[:, :-1] == ids[:, 1:]
    is_copy = bool((targets == ids)[counted].all()) and not bool(is_next[counted[:, :-1]].all())
    # A target before another target stands in the row when the model predicts that one.
    inner = is_next[counted[:, :-1] & counted[:, 1:]]
    if is_copy or (len(inner) and inner.float().mean() < 0.5):
        found = "a copy of ids" if is_copy else f"the next token at {int(inner.sum())} of {len(inner)} places"
        raise UsageError(f"Batch.targets are {found}; shift them: Batch(ids[:, :-1], ids[:, 1:])")


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
        yield from (memory_of(in_memory(part).cpu().contiguous()) for part in tensor.flatten().split(CHECKED))


# ---- token files -------------------------------------------------------------------------------------------


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
    """NumPy's format 1.0, of one length for every count, because the count is known last."""
    fields = f"{{'descr': '<u{width}', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY" + struct.pack("<BBH", 1, 0, 118) + fields.ljust(117).encode() + b"\n"


def tokenize_file(text: Path, tokens: Path, encoding: Encoding, progress: Progress | None = None) -> int:
    """Write a UTF-8 text's ids to a token file; returns how many there are.

    A `.npy` says its own width: uint16, or uint32 for vocabularies above 65,536; any other name is nanoGPT's
    train.bin, uint16 without a header. The ids are those of the whole text, line ends read as \\n and the
    tokenizer's special tokens as such. Holds PIECE characters and their ids, a few MB, or the longest stretch
    without a space or a line end; the whole text for a tokenizer that looks past spaces. The file appears
    whole or not at all. `progress` is called with (bytes read, bytes in all). Raises UsageError for a text
    that is empty, a pipe or not UTF-8, and for a vocabulary that needs 32 bits in a file without a header.
    """
    encoding, is_npy = as_tokenizer(encoding), tokens.suffix == ".npy"
    if encoding.n_vocab > MOST_IDS and not is_npy:
        raise UsageError(f"{tokens}: 16 bits cannot number {encoding.n_vocab} tokens; name the file .npy")
    _require_text(text)
    if tokens.exists() and tokens.samefile(text):
        raise UsageError(f"{tokens}: is the text itself; choose another file for its tokens")
    with replacing(tokens) as half, open(half, "wb") as written:
        return _write_ids(text, written, encoding, is_npy, progress)


def map_text(text: Path, folder: Path, encoding: Encoding, vocab_size: int) -> Tensor:
    """A text's ids, as `tokenize_file` writes them, mapped over a file in `folder` that has no name."""
    _require_text(text)
    with full_disk_named(folder), TemporaryFile(dir=folder) as written:
        _write_ids(text, written, as_tokenizer(encoding), True, None)
        written.flush()
        return _checked(mapped(written.fileno()), text, vocab_size)


def _require_text(text: Path) -> None:
    if not text.stat().st_size:
        found = "empty; there is nothing to tokenize" if text.is_file() else "no file; save it as one first"
        raise UsageError(f"{text}: is {found}")


def _write_ids(
    text: Path, written: BinaryIO, encoding: Tokenizer, is_npy: bool, progress: Progress | None
) -> int:
    width, nbytes = 2 if encoding.n_vocab <= MOST_IDS else 4, text.stat().st_size
    with open(text, "rb") as source:
        decoded = text_stream(source)
        begin = written.write(_npy_header(width, 0)) if is_npy else 0
        try:
            for piece in _pieces(decoded) if encoding.cuts_at_spaces else [decoded.read()]:
                if "\0" in piece:
                    raise UsageError(f"{text}: holds NUL, as token files do; call those .bin or .npy")
                ids = encoding.encode(piece, allowed_special="all")
                written.write(array("H" if width == 2 else "I", ids))
                if progress:
                    progress(source.tell(), nbytes)
        except UnicodeDecodeError as error:
            raise not_utf8(text, source.tell(), error) from None
        count = (written.tell() - begin) // width
        written.seek(0)
        written.write(_npy_header(width, count) if is_npy else b"")
        return count


def _is_text(head: bytes, vocab_size: int) -> bool:
    """Whether the first bytes read as text: UTF-8, or spaces and no control in one or two bytes a character.

    Of GPT-2's ids in 16 bits, most have a control for their upper byte, and its commonest marks are controls
    themselves. The ids of a small vocabulary may be characters.
    """
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    for encoding in (
        "utf-8",
        "latin-1",
        *(("utf-16-le", "utf-16-be") if FEW_IDS < vocab_size <= MOST_IDS else ()),
    ):
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head)  # may end within a character
        odd, spaces = len(NOT_TEXT.findall(text)), len(SPACES.findall(text))
        if encoding == "utf-8" and text and 5 * odd <= len(text):  # a fifth: Latin-1's letters
            return True
        if not odd and (50 * spaces > len(text) or head.startswith(marks)):
            return True
    return False


def _layout_of(path: Path, head: bytes, nbytes: int, vocab_size: int) -> tuple[str, torch.dtype, int, int]:
    """(whose format a token file has, dtype, offset of the ids, how many), by its size and first bytes."""
    found = NPY.match(head)
    if found and found[1] in NPY_DTYPES:
        return ".npy", NPY_DTYPES[found[1]], found.end(), int(found[2])
    if head.startswith(b"\x93NUMPY"):
        version = ".".join(map(str, head[6:8]))
        found_header = f"{head[10:70].decode('latin-1')!r}, format {version or 'missing'}"
        wanted = "one row of little-endian integers in a .npy (uint16, uint32, int32 or int64, format 1.0)"
        raise CheckpointError(path, f"wanted {wanted}, found {found_header}")
    if other := next((what for first, what in NOT_TOKENS.items() if re.match(first, head, re.S)), ""):
        raise CheckpointError(path, f"is {other}, not tokens; save its ids as one row in a .npy")
    magic, version, count = struct.unpack_from("<iii", head.ljust(12, b"\0"))
    if int.from_bytes(head[:4], "big") in LLMC:
        raise CheckpointError(path, "llm.c's tokens in big-endian order, wanted little-endian")
    if magic in LLMC:
        known, dtype = LLMC[magic]
        if version != known:
            raise CheckpointError(path, f"llm.c's tokens of version {version}, wanted {known}")
        return "llm.c", dtype, LLMC_HEADER, count
    if _is_text(head, vocab_size):
        raise CheckpointError(path, f"looks like text, not tokens; give it another suffix than {path.suffix}")
    if len(head) == LLMC_HEADER and not any(head[64:]) and any(head):
        raise CheckpointError(path, f"begins with a header of an unknown kind ({magic}); save it as .npy")
    return NO_HEADER, torch.uint16, 0, max(-(-nbytes // 2), 1)


def _other_width(ids: Tensor) -> str:
    """Of numbers (N,) that were read as 16 bits without a header: what shows that they are not, or ""."""
    few, most = sorted(int(ids[place::2].amax()) if len(ids) > 3 else 1 for place in (0, 1))
    low, high, exponents = ids & 255, ids >> 8, ids >> 10 & 31
    distinct = len(ids.unique())
    # Among GPT-2's ids the low byte takes any value; were it drawn evenly, this many bits speak against it.
    surprise = distinct * (8 - math.log2(int(low.amax()) + 1))
    signs = {
        "every second id would be 0 or nearly, as with 32 bits": few <= 15 and few * 256 <= most,
        "its two bytes would vary alike, as with 8 bits": surprise > 40 and 2 * high.amax() >= low.amax(),
        "they would be floats": distinct > 40 and ((exponents > 4) & (exponents < 17)).float().mean() > 0.9,
    }
    return next((sign for sign, is_seen in signs.items() if is_seen), "")


def open_tokens(path: Path, vocab_size: int) -> Tensor:
    """A token file, mapped: (N,) of the file's own integers. Reads it once to check it.

    It is a `.npy` of one row, llm.c's `.bin`, whose headers say the width, or nanoGPT's: uint16, no header.
    Raises CheckpointError for a file that is empty, truncated, holds an id that is not < vocab_size, or has
    no header and is text, or may be of another width: where the ids look like halves, pairs or floats, or 16
    bits cannot number the vocabulary.
    """
    source = ByteSource(path)
    if not source.state().size:
        raise CheckpointError(path, f"0 bytes of tokens ({NO_HEADER}), wanted 2; truncated?")
    return _checked(source.map(), path, vocab_size)


def _checked(file: torch.UntypedStorage, path: Path, vocab_size: int) -> Tensor:
    content = torch.empty(0, dtype=torch.uint8, device="cpu").set_(file)
    nbytes, head = len(content), bytes(memory_of(in_memory(content[:LLMC_HEADER])))
    kind, dtype, offset, count = _layout_of(path, head, nbytes, vocab_size)
    found, wanted = nbytes - offset, count * dtype.itemsize
    if found < 1 or found != wanted:
        raise CheckpointError(path, f"{found} bytes of tokens ({kind}), wanted {wanted}; truncated?")
    tokens = torch.empty(0, dtype=dtype, device="cpu").set_(file[offset:], 0, (count,), (1,))
    low, high = ends_of(tokens)
    if low < 0 or high >= vocab_size:
        said = f"holds the id {min(low, 0) or high}, the model's are below {vocab_size}"
        raise CheckpointError(path, f"{said}; tokenize the text for it: gpt2lite tokenize --model")
    is_large = vocab_size > MOST_IDS
    why = f"{vocab_size} ids need more" if is_large else _other_width(in_memory(tokens[:CHECKED]).long())
    if kind == NO_HEADER and why:
        raise CheckpointError(path, f"has no header, which means 16 bits per id, but {why}; save it as .npy")
    return tokens


# ---- batches -----------------------------------------------------------------------------------------------


def _generator(seed: int, number: int) -> torch.Generator:
    """Another stream for each number; torch uses 32 bits of a seed, and the odd factor parts the seeds."""
    return torch.Generator("cpu").manual_seed((seed * 0x9E3779B1 + number) % 2**32)


def shuffled(count: int, seed: int, number: int) -> list[int]:
    """0 … count - 1 in an order drawn from (seed, number)."""
    return torch.randperm(count, generator=_generator(seed, number), device="cpu").tolist()


def _starts(tokens: Tensor, seq_len: int) -> int:
    """At how many places a window and its last target can start. Raises UsageError for a shorter text."""
    if len(tokens) <= seq_len:
        lacks = f"the text has {len(tokens)} tokens, a window needs {seq_len + 1}"
        raise UsageError(f"{lacks}; use a smaller seq_len")
    return len(tokens) - seq_len


def _windows(tokens: Tensor, starts: Sequence[int], seq_len: int) -> Batch:
    rows = torch.stack([in_memory(tokens[start : start + seq_len + 1]).long() for start in starts])
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def _grouped(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def text_batches(tokens: Tensor, seq_len: int, batch_size: int, seed: int) -> Batches:
    """Windows of a text (N,) at random places, drawn from (seed, number of the batch).

    Raises UsageError where N <= seq_len.
    """
    count = _starts(tokens, seq_len)

    def batch(number: int) -> Batch:
        generator = _generator(seed, number)
        starts = torch.randint(count, (batch_size,), generator=generator, device="cpu")
        return _windows(tokens, starts.tolist(), seq_len)

    return batch


def text_windows(tokens: Tensor, seq_len: int, batch_size: int, most: int) -> list[Batch]:
    """The first `most` windows of a text, or all: one behind the other, so that no target comes twice.

    The last batch may be smaller. Raises UsageError where N <= seq_len.
    """
    starts = range(0, _starts(tokens, seq_len), seq_len)[:most]
    return [_windows(tokens, some, seq_len) for some in _grouped(starts, batch_size)]


def _padded(examples: Sequence[Example]) -> Batch:
    parts = zip(*examples, strict=True)
    ids, targets = ([torch.tensor(row, device="cpu") for row in part] for part in parts)
    return Batch(pad_sequence(ids, True), pad_sequence(targets, True, IGNORED))


def example_batches(examples: Sequence[Example], batch_size: int, seed: int) -> Batches:
    """Epoch after epoch, each in an order drawn from (seed, epoch); a batch may reach into the next.

    Rows are filled up on the right to the longest of their batch, with targets that are IGNORED; the ids
    there are 0, since nothing before them sees them.
    """

    def batch(number: int) -> Batch:
        places = [divmod(number * batch_size + row, len(examples)) for row in range(batch_size)]
        orders = {epoch: shuffled(len(examples), seed, epoch) for epoch, _ in places}
        return _padded([examples[orders[epoch][index]] for epoch, index in places])

    return batch


def example_windows(examples: Sequence[Example], batch_size: int) -> list[Batch]:
    """All examples in their order, padded as `example_batches` does; the last batch may be smaller."""
    return [_padded(some) for some in _grouped(examples, batch_size)]
