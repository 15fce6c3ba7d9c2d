"""Token files against the encoding of the whole, batches by their number, examples against hand-made ones."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import pickle
import random
import struct
from array import array
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import tiktoken
import torch
from conftest import TINY
from test_cli import has_gpt2_encoding
from torch.utils.data import DataLoader

from gpt2lite import Batch, CheckpointError, GPTConfig, GPTModel, Task, UsageError, finetune
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.finetuning import data
from gpt2lite.finetuning.data import (
    IGNORED,
    Example,
    check_batch,
    example_batches,
    example_windows,
    open_tokens,
    text_batches,
    text_windows,
    tokenize_file,
)
from gpt2lite.finetuning.examples import (
    Record,
    classifier_examples,
    format_prompt,
    instruction_examples,
    read_records,
    split,
)
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.tasks import classifier_task, instruction_task, text_task, tokens_of
from gpt2lite.tokenizer import (
    END_OF_TEXT,
    WORDS_AND_SPACES,
    Encoding,
    as_tokenizer,
    gpt2_encoding,
    tokenizer_for,
)

# What GPT-2's pattern treats apart, or Python and Rust might: among them NBSP, U+001C, which only Python
# takes for a space, a combining accent, and a zero-width joiner.
ATOMS = ["a", "word", "'ll", "'", " ", "  ", "\n", "\n\n", "\t", "\xa0", "\u3000", "\x1c", "\x85", "\u2028"]
ATOMS += [".", "1", "²", "é", "e\u0301", "\u200d", "中", "。", "👩", END_OF_TEXT, "<|", "|>", "endoftext"]


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return tokenizer_for(EMBEDDED, 1024)


def awkward(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(ATOMS) for _ in range(rng.randrange(1, 120)))


def tokenized(text: str, folder: Path, encoding: Encoding) -> list[int]:
    source, tokens = folder / "text.txt", folder / "text.bin"
    source.write_bytes(text.encode())
    count = tokenize_file(source, tokens, encoding)
    found = array("H", tokens.read_bytes())
    assert count == len(found)
    return found.tolist()


def whole(text: str, encoding: Encoding) -> list[int]:
    return encoding.encode(text, allowed_special={END_OF_TEXT})


# ---- token files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 30])
def test_a_text_in_pieces_has_the_ids_of_the_whole(
    piece: int, encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "PIECE", piece)
    for seed in range(150):
        text = awkward(seed)
        assert tokenized(text, tmp_path, encoding) == whole(text, encoding), repr(text)


@has_gpt2_encoding
def test_so_it_has_with_the_pattern_of_gpt2_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "PIECE", 7)
    for seed in range(300):
        text = awkward(seed)
        assert tokenized(text, tmp_path, gpt2_encoding()) == whole(text, gpt2_encoding()), repr(text)


@pytest.mark.parametrize(
    "text",
    ["one word after another " * 30_000, "nospace" * 100_000, " " * 300_000, "\n" * 300_000 + "end"],
    ids=["no line end", "no space", "only spaces", "line ends first"],
)
def test_a_long_text_without_lines_has_the_ids_of_the_whole(text: str, encoding: Encoding, tmp_path: Path):
    assert len(text) > data.PIECE
    assert tokenized(text, tmp_path, encoding) == whole(text, encoding)


@pytest.mark.parametrize("special", ["<|user|>", "<|to the user|>"])
@pytest.mark.parametrize("pattern", [WORDS_AND_SPACES, r"[^\s]+[\r\n]*|\s+"])
def test_special_tokens_of_the_tokenizer_are_read_as_such(
    special: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "PIECE", 7)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b".\n": 256}
    raw = tiktoken.Encoding("raw", pat_str=pattern, mergeable_ranks=ranks, special_tokens={special: 300})
    text = f"Hello there.\n{special} said.\n" * 9
    wanted = raw.encode(text, allowed_special="all")
    assert wanted.count(300) == 9
    assert tokenized(text, tmp_path, raw) == tokenized(text, tmp_path, as_tokenizer(raw)) == wanted


def test_pieces_are_no_longer_than_they_need_to_be(
    encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "PIECE", 100)
    with open(tmp_path / "text.txt", "w+", encoding="utf-8") as file:
        file.write("中文。\n" * 1000 + "some words " * 1000)
        file.seek(0)
        assert max(map(len, data._pieces(file))) < 120


def test_line_ends_are_read_as_everywhere(encoding: Encoding, tmp_path: Path):
    assert tokenized("a\r\nb\rc\n", tmp_path, encoding) == whole("a\nb\nc\n", encoding)


def test_the_file_is_little_endian_uint16_and_progress_ends_with_all(encoding: Encoding, tmp_path: Path):
    source, tokens, seen = tmp_path / "text.txt", tmp_path / "text.bin", []
    source.write_text("Once there was a fox.\n" * 20_000 + "é")
    count = tokenize_file(source, tokens, encoding, lambda *now: seen.append(now))
    ids = whole(source.read_text(), encoding)
    assert tokens.read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)
    assert count == len(ids)
    nbytes = source.stat().st_size
    assert seen == sorted(seen)
    assert seen[0][0] < nbytes
    assert seen[-1] == (nbytes, nbytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.txt: is empty"),
        (b"a b\n" * 300_000 + b"\xff rest", "text.txt: not UTF-8 at byte 1200000"),
        ("é ".encode() * 9000 + b"\xc3\xa9\xe4\xb8", "text.txt: not UTF-8 at byte 27002"),
    ],
    ids=["empty", "wrong far behind", "ends within a character"],
)
def test_a_text_that_cannot_be_read_leaves_what_was_there(
    content: bytes, message: str, encoding: Encoding, tmp_path: Path
):
    source, tokens = tmp_path / "text.txt", tmp_path / "text.bin"
    source.write_bytes(content)
    tokens.write_bytes(b"as it was")
    with pytest.raises(UsageError, match=message):
        tokenize_file(source, tokens, encoding)
    assert tokens.read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.txt"]


def test_a_text_is_never_written_over(encoding: Encoding, tmp_path: Path):
    source = tmp_path / "text.txt"
    source.write_text("dear to somebody")
    with pytest.raises(UsageError, match="is the text itself"):
        tokenize_file(source, source, encoding)
    assert source.read_text() == "dear to somebody"


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path: Path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    large = tiktoken.Encoding(
        "large", pat_str=WORDS_AND_SPACES, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 2**16}
    )
    with pytest.raises(UsageError, match=r"text.bin: 16 bits cannot number 65537 tokens; name the file .npy"):
        tokenize_file(tmp_path / "text.txt", tmp_path / "text.bin", large)


def test_open_tokens_gives_back_what_was_written(encoding: Encoding, tmp_path: Path):
    ids = tokenized("Once there was a fox. " * 100, tmp_path, encoding)
    tokens = open_tokens(tmp_path / "text.bin", encoding.n_vocab)
    assert tokens.dtype == torch.uint16
    assert tokens.tolist() == ids


def test_ids_above_32767_stay_positive(tmp_path: Path):
    path = tmp_path / "text.bin"
    path.write_bytes(array("H", [0, 50256, 65535] * 5).tobytes())
    tokens = open_tokens(path, 65536)
    assert text_batches(tokens, 14, 1, seed=0)(0).ids[0, :3].tolist() == [0, 50256, 65535]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.bin: 0 bytes of tokens .no header., wanted 2"),
        (b"\1\0\2", "text.bin: 3 bytes of tokens .no header., wanted 4"),
        (array("H", [1, 1024, 3]).tobytes(), "text.bin: holds the id 1024, the model's are below 1024"),
        (array("H", [0] * 9 + [50256]).tobytes(), "text.bin: holds the id 50256"),
    ],
    ids=["empty", "odd", "first beyond", "in a later part"],
)
def test_a_file_that_is_not_the_models_is_refused(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "CHECKED", 4)
    path = tmp_path / "text.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_tokens(path, 1024)


LLMC = {torch.uint16: (20240520, 1), torch.uint32: (20240801, 7)}
IDS = [7, 1023, 0, 500] * 9


def llmc(dtype: torch.dtype, ids: list[int] = IDS, version: int | None = None) -> bytes:
    magic, known = LLMC[dtype]
    header = array("i", [magic, known if version is None else version, len(ids)] + [0] * 253)
    return header.tobytes() + array("H" if dtype == torch.uint16 else "I", ids).tobytes()


def npy(content: object, path: Path) -> bytes:
    numpy.save(path, content)
    return path.read_bytes()


def by_torch(ids: list[int], **options: bool) -> bytes:
    data = io.BytesIO()
    torch.save(torch.tensor(ids), data, **options)
    return data.getvalue()


class Loaded:
    """Fails a test that loads it."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_llmcs_token_files_say_their_width(dtype: torch.dtype, tmp_path: Path):
    path = tmp_path / "text.bin"
    path.write_bytes(llmc(dtype))
    tokens = open_tokens(path, 1024)
    assert (tokens.dtype, tokens.tolist()) == (dtype, IDS)
    assert text_batches(tokens, len(IDS) - 1, 1, seed=0)(0).targets.tolist() == [IDS[1:]]


@pytest.mark.parametrize("kind", ["uint16", "uint32", "int32", "int64"])
def test_numpys_files_say_their_width(kind: str, tmp_path: Path):
    numpy.save(tmp_path / "text.npy", numpy.array(IDS, kind))
    assert tokens_of(tmp_path / "text.npy", None, 1024, tmp_path / "none").tolist() == IDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array("I", IDS).tobytes(), "has no header, which means 16 bits per id, but every second"),
        (array("q", IDS).tobytes(), "every second id would be 0 or nearly, as with 32 bits; save it as .npy"),
        (array("f", IDS).tobytes(), "holds the id"),
        (array("i", [-100, *IDS]).tobytes(), "holds the id 65535"),
        (b"Once there was a fox. " * 9, "looks like text, not tokens; give it another suffix than .bin"),
        ("Größe über alles".encode() * 50, "looks like text"),
        ("Größe über alles".encode("latin-1") * 50, "looks like text"),
        (b"\x1b[0m page one\f", "looks like text"),
        (b"hello\n", "looks like text"),
        (b"\x93NUMPY", "wanted one row of little-endian .*format missing"),
        ("Это было лучшее из времён.\n".encode("koi8-r") * 50, "looks like text"),
        (struct.pack(">3i", 20240520, 1, 9) + bytes(1030), "llm.c's tokens in big-endian order"),
        (struct.pack("<3i", 278895051, 1, 9) + bytes(1030), "begins with a header of an unknown kind"),
        (llmc(torch.uint16)[:-2], "70 bytes of tokens .llm.c., wanted 72; truncated"),
        (llmc(torch.uint32, version=3), "llm.c's tokens of version 3, wanted 7"),
        (llmc(torch.uint16, [5, 2000]), "holds the id 2000, the model's are below 1024"),
        ("cut", "280 bytes of tokens ..npy., wanted 288"),
        (numpy.array(IDS, ">u2"), "wanted one row of little-endian integers in a .npy"),
        (numpy.array([5, 6], "u1"), "uint16, uint32, int32 or int64, format 1.0"),
        (numpy.array([5, 6], "i2"), "uint16, uint32, int32 or int64, format 1.0"),
        (numpy.array([5, 6], "u8"), "uint16, uint32, int32 or int64, format 1.0"),
        (numpy.array(IDS, "f4"), "wanted one row of little-endian integers"),
        (numpy.array([IDS], "u2"), "wanted one row of little-endian integers"),
        (numpy.array([IDS, IDS], order="F"), "wanted one row of little-endian integers.*'fortran_order': "),
        (numpy.array([Loaded()]), "wanted one row of little-endian integers.*'descr': '.O'"),
        (pickle.dumps(Loaded()), "is a pickle, not tokens; save its ids as one row in a .npy"),
        (pickle.dumps(IDS, 2), "is a pickle, not tokens"),
        (pickle.dumps(numpy.array(IDS)), "is a pickle, not tokens"),
        (by_torch(IDS), "is a zip, as torch.save and numpy.savez write it, not tokens"),
        (by_torch(IDS, _use_new_zipfile_serialization=False), "is a pickle, not tokens"),
        (gzip.compress(bytes(99)), "is compressed, not tokens"),
        (safetensors.torch.save({"ids": torch.tensor(IDS)}), "is safetensors, not tokens"),
        (b"PAR1" + bytes(40), "is another program's file, not tokens"),
        (numpy.array([5, -1]), "holds the id -1, the model's are below 1024"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_token_file_of_another_width_is_refused(content: object, message: str, tmp_path: Path):
    path = tmp_path / "text.bin"
    whole = npy(numpy.array(IDS) if isinstance(content, str) else content, tmp_path / "a.npy")
    whole = whole[:-8] if isinstance(content, str) else whole
    path.write_bytes(content if isinstance(content, bytes) else whole)
    with pytest.raises(CheckpointError, match=message):
        open_tokens(path, 1024)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "shift_jis", "gb18030", "koi8-r"])
@pytest.mark.parametrize("vocab_size", [50257, 65536])
def test_text_of_another_encoding_is_not_taken_for_ids(encoding: str, vocab_size: int, tmp_path: Path):
    path = tmp_path / "train.bin"
    path.write_bytes("Это было лучшее из времён, это было худшее.\n".encode(encoding) * 40)
    with pytest.raises(CheckpointError, match="looks like text, not tokens"):
        open_tokens(path, vocab_size)
    path.write_bytes("\ufeff最好的时代。最坏的时代。".encode("utf-16-le") * 40)
    with pytest.raises(CheckpointError, match="looks like text, not tokens"):
        open_tokens(path, vocab_size)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (numpy.random.RandomState(0).randint(0, 65, 1000).astype("u1"), "vary alike, as with 8 bits"),
        (numpy.random.RandomState(0).randint(0, 190, 1000).astype(">u2"), "vary alike, as with 8 bits"),
        (numpy.random.RandomState(0).rand(1000).astype("f2"), "they would be floats"),
        (numpy.random.RandomState(0).randint(0, 99_999, 1000).astype("u4") & 0xFBFFF, "as with 32 bits"),
    ],
    ids=["uint8", "big-endian", "fp16", "uint32"],
)
def test_numbers_that_are_not_uint16_are_seen_without_a_header(
    kind: numpy.ndarray, message: str, tmp_path: Path
):
    (tmp_path / "text.bin").write_bytes(kind.tobytes())
    with pytest.raises(CheckpointError, match=message):
        open_tokens(tmp_path / "text.bin", 50257)


@pytest.mark.parametrize("vocabulary", [65, 257, 1024, 20_000, 32_000, 50257])
def test_ids_of_any_vocabulary_open_without_a_header(vocabulary: int, tmp_path: Path):
    drawn = numpy.random.RandomState(0).rand(2000)
    for name, ids in {"even": drawn * vocabulary, "Zipf": vocabulary**drawn}.items():
        (tmp_path / name).write_bytes(ids.astype("u2").tobytes())
        assert open_tokens(tmp_path / name, vocabulary).tolist() == ids.astype("u2").tolist()
    ascii = [*b"Once there was a fox. " * 50, vocabulary - 1]
    if vocabulary == 257:
        (tmp_path / "bytes").write_bytes(array("H", ascii).tobytes())
        assert open_tokens(tmp_path / "bytes", vocabulary).tolist() == ascii


def test_tokens_are_not_tokenized_again(encoding: Encoding, tmp_path: Path):
    for name in ("train.BIN", "train.tok"):
        (tmp_path / name).write_bytes(array("H", [65, 66, 67, 65] * 9).tobytes())
    assert (
        tokens_of(tmp_path / "train.BIN", encoding, 1024, tmp_path / "none").tolist() == [65, 66, 67, 65] * 9
    )
    with pytest.raises(UsageError, match=r"train.tok: holds NUL, as token files do; call those .bin or .npy"):
        tokens_of(tmp_path / "train.tok", encoding, 1024, tmp_path)


def test_a_large_vocabulary_gets_32_bits_and_needs_them(tmp_path: Path):
    source = tmp_path / "text.txt"
    source.write_bytes("\ufeffOnce there was a fox.".encode())
    ids = list(b"Once there was a fox.")
    ranks = {bytes([byte]): byte for byte in range(256)}
    for kind, vocabulary in ((torch.uint16, 2**16), (torch.uint32, 2**16 + 1)):
        large = tiktoken.Encoding(
            "large",
            pat_str=WORDS_AND_SPACES,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: vocabulary - 1},
        )
        assert tokenize_file(source, tmp_path / "text.npy", large) == len(ids)
        tokens = open_tokens(tmp_path / "text.npy", vocabulary)
        assert (tokens.dtype, tokens.tolist()) == (kind, ids)
        assert numpy.load(tmp_path / "text.npy").tolist() == ids
    small = tiktoken.Encoding("small", pat_str=WORDS_AND_SPACES, mergeable_ranks=ranks, special_tokens={})
    tokenize_file(source, tmp_path / "text.bin", small)
    with pytest.raises(CheckpointError, match="16 bits per id, but 65537 ids need more"):
        open_tokens(tmp_path / "text.bin", 2**16 + 1)


def tokenize_command(*words: object) -> int:
    return main(["tokenize", *map(str, words)])


def test_the_command_writes_the_ids_of_the_models_tokenizer(
    encoding: Encoding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, tokens = tmp_path / "text.txt", tmp_path / "text.bin"
    source.write_text("Once there was a fox.")
    ids = whole("Once there was a fox.", encoding)
    assert tokenize_command(source, tokens, "--model", EMBEDDED) == 0
    assert open_tokens(tokens, 1024).tolist() == ids
    assert capsys.readouterr() == (f"{len(ids)} tokens to {tokens}\n", "")


@has_gpt2_encoding
def test_the_command_takes_gpt2s_tokenizer_where_no_model_is_named(tmp_path: Path):
    source, tokens = tmp_path / "text.txt", tmp_path / "text.bin"
    source.write_text("Hello, I am")
    tokenize_command(source, tokens)
    assert open_tokens(tokens, 50257).tolist() == [15496, 11, 314, 716]


# ---- batches -----------------------------------------------------------------------------------------------

COUNTED = torch.arange(1000).to(torch.uint16)


def same(one: data.Batch, other: data.Batch) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


def test_text_batches_are_windows_whose_targets_are_one_ahead():
    batch = text_batches(COUNTED, 16, 4, seed=0)(3)
    assert batch.ids.shape == batch.targets.shape == (4, 16)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.ids + 1)
    assert torch.equal(batch.ids, batch.ids[:, :1] + torch.arange(16))


def test_a_batch_depends_on_its_number_and_the_seed_alone():
    first, again = text_batches(COUNTED, 16, 4, seed=0), text_batches(COUNTED, 16, 4, seed=0)
    backwards = [again(number) for number in reversed(range(20))][::-1]
    assert all(same(first(number), backwards[number]) for number in range(20))
    assert len({tuple(first(number).ids[:, 0].tolist()) for number in range(20)}) == 20
    assert not any(same(text_batches(COUNTED, 16, 4, seed)(0), first(0)) for seed in (1, 2, -1, 2**32 + 1))


def test_every_window_of_a_text_can_be_drawn():
    draw = text_batches(COUNTED[:20], 16, 8, seed=0)
    assert {int(start) for number in range(20) for start in draw(number).ids[:, 0]} == {0, 1, 2, 3}
    assert text_batches(COUNTED[:17], 16, 1, seed=0)(0).targets[0].tolist() == list(range(1, 17))


@pytest.mark.parametrize("length", [0, 1, 16])
def test_a_text_shorter_than_a_window_is_refused(length):
    message = f"the text has {length} tokens, a window needs 17; use a smaller seq_len"
    with pytest.raises(UsageError, match=message):
        text_batches(COUNTED[:length], 16, 4, seed=0)
    with pytest.raises(UsageError, match=message):
        text_windows(COUNTED[:length], 16, 4, most=10)


def test_text_windows_predict_each_token_once():
    batches = text_windows(COUNTED, 16, 8, most=1000)
    assert [len(batch.ids) for batch in batches] == [8] * 7 + [6]
    assert torch.cat([batch.targets.flatten() for batch in batches]).tolist() == list(range(1, 993))
    assert torch.cat([batch.ids.flatten() for batch in batches]).tolist() == list(range(992))
    assert [len(batch.ids) for batch in text_windows(COUNTED, 16, 8, most=10)] == [8, 2]
    assert len(text_windows(COUNTED[:17], 16, 8, most=10)) == 1


EXAMPLES = [Example([i] * (i + 1), [IGNORED] * i + [i]) for i in range(7)]


def test_rows_are_filled_up_on_the_right():
    batch = example_windows(EXAMPLES[1:4], 3)[0]
    assert batch.ids.tolist() == [[1, 1, 0, 0], [2, 2, 2, 0], [3, 3, 3, 3]]
    assert batch.targets.tolist() == [
        [IGNORED, 1, IGNORED, IGNORED],
        [IGNORED, IGNORED, 2, IGNORED],
        [IGNORED, IGNORED, IGNORED, 3],
    ]


def test_example_windows_keep_the_order():
    batches = example_windows(EXAMPLES, 3)
    assert [batch.ids[:, 0].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]


def test_an_epoch_holds_each_example_once_and_batches_reach_into_the_next():
    draw = example_batches(EXAMPLES, 4, seed=0)
    drawn = [int(i) for number in range(7) for i in draw(number).ids[:, 0]]
    epochs = [tuple(drawn[start : start + 7]) for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1
    assert same(example_batches(EXAMPLES, 4, seed=0)(5), draw(5))


def test_a_batch_may_be_larger_than_all_examples():
    batch = example_batches(EXAMPLES[:2], 5, seed=0)(0)
    assert sorted(batch.ids[:4, 0].tolist()) == [0, 0, 1, 1]
    assert len(batch.ids) == 5


ROWS_OF_TEXT = torch.randint(101, (4, 14), generator=torch.Generator().manual_seed(0))
ROW = ROWS_OF_TEXT[:, :-1]
NOT_NEXT = {
    "as they are": (ROW, ROW),
    "two ahead": (ROWS_OF_TEXT[:, :-2], ROWS_OF_TEXT[:, 2:]),
    "the other way": (ROWS_OF_TEXT[:, 1:], ROW),
    "three behind": (ROWS_OF_TEXT[:, 3:], ROWS_OF_TEXT[:, :-3]),
    "all one": (ROW, torch.full_like(ROW, 5)),
    "of another tokenizer": (ROW, (ROW * 7 + 3) % 101),
    "some as they are": (ROW, ROW.where(ROW % 2 == 0, IGNORED)),
    "one as it is": (ROW, ROW.where(torch.arange(13) == 7, IGNORED)),
}


@pytest.mark.parametrize("kind", NOT_NEXT)
def test_targets_that_are_not_the_next_tokens_are_refused(kind: str):
    message = r"Batch.targets are .*; shift them: Batch\(ids\[:, :-1\], ids\[:, 1:\]\)"
    with pytest.raises(UsageError, match=message):
        check_batch(Batch(*NOT_NEXT[kind]), TINY)


def test_what_may_be_learned_beside_plain_text():
    noisy = ROW.where(torch.rand(ROW.shape, generator=torch.Generator().manual_seed(0)) > 0.3, 7)
    answer = torch.arange(13) == torch.tensor([[3], [7], [12], [5]])
    right = {
        "tokens of the input dropped": (noisy, ROWS_OF_TEXT[:, 1:]),
        "answers of one token that no row holds": (ROW, torch.full_like(ROW, 9).where(answer, IGNORED)),
        "responses alone": (ROW, ROWS_OF_TEXT[:, 1:].where(torch.arange(13) > 6, IGNORED)),
        "one token": (ROW[:, :1], ROW[:, 1:2]),
    }
    for ids, targets in right.values():
        check_batch(Batch(ids, targets), TINY)
    check_batch(Batch(ROW, ROW % 2), GPTConfig.of(TINY.as_dict() | {"n_classes": 2}))


NO_BATCHES = {
    "a tuple": (ROW, ROWS_OF_TEXT[:, 1:]),
    "a list": [ROW, ROWS_OF_TEXT[:, 1:]],
    "a dict": {"ids": ROW, "targets": ROW},
    "nothing": None,
    "a tensor": ROW,
    "lists": Batch(ROW.tolist(), ROWS_OF_TEXT[:, 1:].tolist()),
    "arrays": Batch(ROW.numpy(), ROWS_OF_TEXT[:, 1:].numpy()),
    "floats": Batch(ROW.float(), ROWS_OF_TEXT[:, 1:]),
    "no memory": Batch(ROW.to("meta"), ROW.to("meta")),
    "targets without memory": Batch(ROW, ROW.to("meta")),
    "sparse": Batch(ROW.to_sparse(), ROW),
}


@pytest.mark.parametrize("kind", NO_BATCHES)
def test_what_is_no_batch_is_refused(kind: str):
    with pytest.raises(UsageError, match=r"wanted Batch\(ids, targets\)|wanted \(B, T\) torch.int64"):
        check_batch(NO_BATCHES[kind], TINY)


def shifted(rows: torch.Tensor) -> Batch:
    return Batch(rows[:, :-1], rows[:, 1:])


GOOD = shifted(ROWS_OF_TEXT)
NO_TASKS = {
    "batches in place of a function": ({"train": [GOOD]}, "train must be a function of a batch's number"),
    "a generator to train": ({"train": iter([GOOD])}, "train must be"),
    "no validation": ({"validation": None}, "validation must be a list of Batch, got None"),
    "a generator": ({"validation": iter([GOOD])}, "validation must be a list of Batch"),
    "a loader": ({"validation": DataLoader([GOOD], batch_size=None)}, "validation must be a list of Batch"),
    "a function": ({"validation": lambda n: GOOD}, "validation must be a list of Batch"),
    "one batch": ({"validation": GOOD}, "validation must be a list of Batch"),
    "one label": ({"labels": "spam"}, "Task.labels: wanted 4 names of classes"),
    "numbers": ({"labels": (0, 1)}, "Task.labels: wanted 2 names of classes"),
    "a text": ({"sample": "Once"}, "sample must be a function of the model, or None"),
    "a digest of bytes": ({"digest": b"1"}, "digest must be a str"),
}


@pytest.mark.parametrize("kind", NO_TASKS)
def test_what_is_no_task_is_refused_where_it_is_made(kind: str):
    given, message = NO_TASKS[kind]
    with pytest.raises(UsageError, match=message):
        Task(**{"train": lambda n: GOOD, "validation": [GOOD]} | given)


@pytest.mark.parametrize("kind", ["drawn", "an iterator's", "counted", "one buffer"])
def test_a_batch_that_changes_under_its_number_is_refused(kind: str, tmp_path: Path):
    rows = torch.randint(101, (99, 4, 14), generator=torch.Generator().manual_seed(0))
    calls, each, buffer = itertools.count(), iter(rows), torch.empty(4, 14, dtype=torch.int64)
    draw = {
        "drawn": lambda n: rows[int(torch.randint(99, ()))],
        "an iterator's": lambda n: next(each),
        "counted": lambda n: rows[next(calls)],
        "one buffer": lambda n: buffer.copy_(rows[next(calls)]),
    }[kind]
    task = Task(lambda n: shifted(draw(n)), [])
    with pytest.raises(
        UsageError,
        match=r"train\(0\) gave another batch the second time; number n must always be the same batch",
    ):
        finetune(GPTModel(TINY), task, tmp_path / "out", Recipe(steps=2, seq_len=13))
    assert not (tmp_path / "out").exists()


def test_a_task_may_write_its_batches_into_one_buffer(tmp_path: Path):
    rows = torch.randint(101, (99, 4, 14), generator=torch.Generator().manual_seed(0))
    buffer, ends = torch.empty_like(rows[0]), []
    for draw in (lambda n: shifted(rows[n]), lambda n: shifted(buffer.copy_(rows[n]))):
        torch.manual_seed(0)
        model = GPTModel(TINY)
        finetune(model, Task(draw, []), tmp_path / str(len(ends)), Recipe(steps=2, seq_len=13, accumulate=2))
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---- records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "spam.json",
            '[{"text": "Hi, you", "label": 0}, {"text": "line\\u2028end", "label": "1", "x": null}]',
        ),
        ("spam.jsonl", '{"text": "Hi, you", "label": 0}\n\n{"text": "line\u2028end", "label": 1}\r\n'),
        ("spam.csv", 'text,label\r\n"Hi, you",0\r\n"line\u2028end",1\r\n'),
        ("SPAM.CSV", '\ufeffid,text,label\n7,"Hi, you",0\n\n8,line\u2028end,1\n'),
    ],
)
def test_every_kind_of_file_holds_the_same_records(name: str, content: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(content.encode())
    records = read_records(path, ("text", "label"))
    assert [(record["text"], record["label"]) for record in records] == [
        ("Hi, you", "0"),
        ("line\u2028end", "1"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "label": 1}\n\n{"text":', "a.jsonl, line 3: not JSON"),
        ("a.json", b'[{"text": "a",\n"label": }]', "a.json, line 2: not JSON"),
        ("a.json", b"[" * 200_000, "a.json, line 1: not JSON"),
        ("a.json", b'{"text": "a", "label": 1}', "a.json: holds a dict, wanted a list of objects"),
        ("a.json", b'[{"text": "a", "label": 1}, 5]', "a.json, entry 2: is a int, wanted an object"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n["a"]', "a.jsonl, line 2: is a list, wanted an object"),
        ("a.json", b'[{"text": "a"}]', "a.json, entry 1: lacks label as text, found text"),
        ("a.jsonl", b'{"id": 1}', "a.jsonl, line 1: lacks text, label as text, found id"),
        ("a.jsonl", b'{"text": ["a"], "label": 1}', "a.jsonl, line 1: lacks text as text, found label"),
        ("a.jsonl", b'{"text": "", "label": null}', "a.jsonl, line 1: lacks label as text, found text"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1, "input": {}}',
            "a.jsonl, line 1: lacks input as text, found text, label",
        ),
        ("a.csv", b"text,label\na,1\nb\n", "a.csv, line 3: lacks label as text, found text"),
        ("a.csv", b"text,label\nHi, you,1\n", "a.csv, line 2: not CSV .more cells than the header"),
        ("a.csv", b'text,label\n"Hi you,1\n', "a.csv, line 2: not CSV .unexpected end of data"),
        ("a.csv", b"text,label\n", "a.csv: holds no records; wanted some with text, label"),
        ("a.json", b"[]", "a.json: holds no records"),
        ("a.jsonl", b"\n", "a.jsonl: holds no records"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl: not UTF-8 at byte 10"),
        ("a.parquet", b"", "a.parquet: unknown kind of file '.parquet'; choose from .json, .jsonl, .csv"),
        ("a", b"", "a: unknown kind of file ''"),
    ],
)
def test_what_holds_no_records_is_refused(name: str, content: bytes, message: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_records(path, ("text", "label"))


def test_split_parts_the_records_always_the_same_way():
    training, validation = split(range(100), 0.1, seed=0)
    assert sorted(training + validation) == list(range(100))
    assert len(validation) == 10
    assert validation != list(range(10))
    assert split(range(100), 0.1, seed=0) == (training, validation)
    assert split(range(100), 0.1, seed=1) != (training, validation)


def test_split_leaves_one_on_either_side():
    assert [len(part) for part in split(range(3), 0.001, seed=0)] == [2, 1]
    assert [len(part) for part in split(range(3), 0.999, seed=0)] == [1, 2]


@pytest.mark.parametrize(
    ("count", "fraction", "message"),
    [
        (1, 0.5, "found 1 record, wanted at least 2"),
    ],
)
def test_what_cannot_be_split_is_refused(count: int, fraction: float, message: str):
    with pytest.raises(UsageError, match=message):
        split(range(count), fraction, seed=0)


# ---- examples ----------------------------------------------------------------------------------------------

ASKED = Record({"instruction": "Name a colour.", "output": "Red."})
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nName a colour.\n\n### Response:\n"
)


def test_the_prompt_is_the_books_byte_for_byte():
    assert format_prompt(ASKED) == format_prompt(ASKED | {"input": ""}) == PROMPT
    assert format_prompt({"instruction": "Translate.", "input": "rouge"}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nTranslate.\n\n### Input:\nrouge\n\n### Response:\n"
    )


def test_the_loss_is_taken_on_the_response_and_the_end_alone(encoding: Encoding):
    [(_, example)] = instruction_examples([ASKED], encoding, 512)
    learned = [target for target in example.targets if target != IGNORED]
    assert encoding.decode(example.ids) == PROMPT + "Red."
    assert encoding.decode(learned) == "Red." + END_OF_TEXT
    assert learned[-1] == encoding.eot_token
    begin = example.targets.index(learned[0])
    assert encoding.decode(example.ids[: begin + 1]) == PROMPT
    assert example.targets == [IGNORED] * begin + example.ids[begin + 1 :] + [encoding.eot_token]


def test_a_long_response_is_cut_and_a_long_prompt_left_out(encoding: Encoding):
    long = ASKED | {"output": "Red and blue. " * 100}
    [(_, example)] = instruction_examples([long], encoding, 4096)
    room = len(encoding.encode_ordinary(PROMPT)) + 1
    with pytest.warns(
        UserWarning, match=f"of 2 instructions, 1 are left out .* {room} tokens., and 1 are cut"
    ):
        [(_, cut)] = instruction_examples([long, ASKED | {"instruction": "Name. " * 100}], encoding, room)
    assert cut == Example(example.ids[:room], example.targets[:room])
    assert sum(target != IGNORED for target in cut.targets) == 2


def test_prompts_that_leave_no_room_at_all_are_refused(encoding: Encoding):
    room = len(encoding.encode_ordinary(PROMPT))
    with pytest.raises(UsageError, match=f"2 of 2 prompts leave no room for a response in {room} tokens"):
        instruction_examples([ASKED, ASKED], encoding, room)


def test_a_special_token_in_a_record_is_plain_text(encoding: Encoding):
    [(_, example)] = instruction_examples([ASKED | {"output": END_OF_TEXT}], encoding, 512)
    assert encoding.eot_token not in example.ids
    assert example.targets.count(encoding.eot_token) == 1
    [[ids, _], _], _ = classifier_examples(
        [Record(text=END_OF_TEXT, label="a"), Record(text="", label="b")], encoding, 64
    )
    assert encoding.eot_token not in ids


def labelled(*labels: str) -> list[Record]:
    return [Record({"text": f"Text number {number}", "label": label}) for number, label in enumerate(labels)]


def test_the_class_is_the_target_of_the_last_token(encoding: Encoding):
    examples, labels = classifier_examples(labelled("spam", "ham", "spam"), encoding, 512)
    assert labels == ["ham", "spam"]
    assert [example.targets[-1] for example in examples] == [1, 0, 1]
    for number, (ids, targets) in enumerate(examples):
        assert ids == encoding.encode(f"Text number {number}")
        assert targets[:-1] == [IGNORED] * (len(ids) - 1)


def test_a_long_text_keeps_its_beginning_and_an_empty_one_is_the_end_of_text(encoding: Encoding):
    records = [Record(text="Once there was a fox", label="a"), Record(text="", label="b")]
    with pytest.warns(UserWarning, match="1 of 2 texts are cut to 3 tokens"):
        examples, _ = classifier_examples(records, encoding, 3)
    assert examples[0] == Example(encoding.encode("Once there was a fox")[:3], [IGNORED, IGNORED, 0])
    assert examples[1] == Example([encoding.eot_token], [1])


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (("10", "9", "-1"), ["-1", "9", "10"]),
        (("10", "9", "b"), ["10", "9", "b"]),
        (("1e1", "1", " 0 "), ["0", "1", "1e1"]),
    ],
)
def test_labels_are_in_their_order(found: tuple[str, ...], wanted: list[str], encoding: Encoding):
    assert classifier_examples(labelled(*found), encoding, 64)[1] == wanted


def test_no_labels_are_refused(encoding: Encoding):
    with pytest.raises(UsageError, match="needs at least two labels, found none"):
        classifier_examples([], encoding, 64)


ROWS = {
    "number": (
        '{"text":"a","label":0}\n\n{"text":"b","label":1}\n{"text":"c","label":1.0}',
        r"line 4: .*'1.0' look",
    ),
    "bool": (
        '{"text":"a","label":true}\n{"text":"b","label":1}',
        "line 2: the label '1' looks like 'True' at .*line 1",
    ),
    "case": (
        '{"text":"a","label":"Spam"}\n{"text":"b","label":"spam"}',
        "line 2: the label 'spam' looks like 'Spam'",
    ),
    "width": (
        '{"text":"a","label":"\\uff11"}\n{"text":"b","label":"1"}',
        "line 2: the label '1' looks like '\uff11'",
    ),
    "zero width": (
        '{"text":"a","label":"spam"}\n{"text":"b","label":"spam\\u200b"}',
        "line 2: the label .* looks like 'spam'",
    ),
    "soft hyphen": ('{"text":"a","label":"spam"}\n{"text":"b","label":"sp\\u00adam"}', "looks like 'spam'"),
    "two spaces": (
        '{"text":"a","label":"not spam"}\n{"text":"b","label":"not  spam"}',
        "looks like 'not spam'",
    ),
    "None": (
        '{"text":"a","label":"None"}\n{"text":"b","label":"x"}',
        "line 1: the label is 'None', a missing",
    ),
    "N/A": ('{"text":"a","label":"x"}\n{"text":"b","label":"N/A"}', "line 2: the label is 'N/A', a missing"),
    "twice a key": ('{"text":"a","label":"x","label":"y"}', "line 1: not JSON .twice the key 'label'"),
    "nan": (
        '{"text":"a","label":NaN}\n{"text":"b","label":1}',
        "line 1: the label is 'nan', a missing one; label the row",
    ),
    "half a character": ('{"text":"cut \\ud83d","label":1}', "line 1: text holds half a character .'cut "),
    "blank": (
        '{"text":"a","label":1}\n{"text":"b","label":"  "}',
        "line 2: the label is '  ', a missing one; label the row",
    ),
}


@pytest.mark.parametrize(("content", "message"), ROWS.values(), ids=ROWS)
def test_labels_that_look_alike_or_are_missing_are_refused_by_their_line(
    content: str, message: str, encoding: Encoding, tmp_path: Path
):
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        classifier_examples(read_records(path, ("text", "label")), encoding, 64)


def test_a_csv_may_hold_long_fields_and_spaces_around_labels_but_no_label_twice(
    encoding: Encoding, tmp_path: Path
):
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"{"word " * 30_000}",spam\nshort, spam\nother,ham\n')
    records = read_records(path, ("text", "label"))
    with pytest.warns(UserWarning, match="1 of 3 texts are cut to 64 tokens"):
        assert classifier_examples(records, encoding, 64)[1] == ["ham", "spam"]
    assert csv.field_size_limit() == 131072
    path.write_text("text,label,label\na,1,2\n")
    with pytest.raises(UsageError, match=r"a.csv, line 1: not CSV .two columns are called label"):
        read_records(path, ("text", "label"))
    path.write_text("text,label\na,1\n,\n")
    with pytest.raises(UsageError, match=r"a.csv, line 3: the label is ''"):
        classifier_examples(read_records(path, ("text", "label")), encoding, 64)


# ---- tasks -------------------------------------------------------------------------------------------------

SMALL = GPTConfig(1024, 256, 16, 2, 1)


def lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_few_long_instructions_are_left_out_whichever_part_they_fall_in(encoding: Encoding, tmp_path: Path):
    long = ASKED | {"instruction": "Name. " * 300}
    path = lines(tmp_path / "a.jsonl", [ASKED] * 9 + [long])
    for seed in range(8):
        with pytest.warns(UserWarning, match="of 10 instructions, 1 are left out"):
            task = instruction_task(path, GPTModel(SMALL), Recipe(seed=seed), encoding=encoding)
        assert sum(len(batch.ids) for batch in task.validation) == 1
    lines(path, [ASKED] * 3 + [long] * 7)
    with pytest.raises(UsageError, match="7 of 10 prompts leave no room for a response in 256 tokens"):
        instruction_task(path, GPTModel(SMALL), Recipe(), encoding=encoding)


def test_a_class_that_is_not_validated_or_not_learned_is_said(encoding: Encoding, tmp_path: Path):
    records = [{"text": f"Text {i}", "label": "rare" if i == 5 else "ab"[i % 2]} for i in range(60)]
    path = lines(tmp_path / "a.jsonl", records)
    seen = set()
    for seed in range(12):
        with pytest.warns(UserWarning, match=r"a.jsonl: no rows of .*rare .*; give more rows") as said:
            classifier_task(path, GPTModel(SMALL), Recipe(seed=seed), encoding=encoding)
        seen |= {str(each.message).split("rare ")[-1] for each in said}
    assert {message.split(",")[0].split(";")[0] for message in seen} == {"to learn from", "to validate with"}


def test_tasks_of_other_data_have_other_digests(encoding: Encoding, tmp_path: Path):
    rows = [{"text": f"Text {i}", "label": "ab"[i % 2]} for i in range(60)]
    for row in (rows[7], rows[8]):
        digests = []
        for text in ("Text", "Fox"):
            row["text"] = text
            path = lines(tmp_path / "a.jsonl", rows)
            digests.append(classifier_task(path, GPTModel(SMALL), Recipe(), encoding=encoding).digest)
        assert digests[0] != digests[1]
    tokens = torch.arange(1000).to(torch.uint16)
    before = text_task(tokens, GPTModel(SMALL), Recipe(seq_len=16), encoding=encoding).digest
    tokens[444] = 3
    assert text_task(tokens, GPTModel(SMALL), Recipe(seq_len=16), encoding=encoding).digest != before


def test_a_tokenizer_of_characters_classifies_and_cannot_end_a_response(tmp_path: Path):
    characters = "".join(sorted({*"some text, ab"}))
    table = {"stoi": {c: i for i, c in enumerate(characters)}, "itos": dict(enumerate(characters))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(table))
    own = tokenizer_for(tmp_path / "model.pth", len(characters))
    config, recipe = GPTConfig(len(characters), 32, 16, 2, 1), Recipe(seq_len=32)
    rows = [{"text": "some text, " + "ab"[i % 2] * (1 + i % 3), "label": "xy"[i % 2]} for i in range(40)]
    task = classifier_task(lines(tmp_path / "a.jsonl", rows), GPTModel(config), recipe, encoding=own)
    check_batch(task.train(0), GPTConfig.of(config.as_dict() | {"n_classes": 2}))
    asked = lines(tmp_path / "b.jsonl", [{"instruction": "text", "output": "some"}] * 9)
    with pytest.raises(UsageError, match=r"meta.pkl: this tokenizer has no end-of-text token"):
        instruction_task(asked, GPTModel(config), recipe, encoding=own)


def test_what_fills_a_row_up_does_not_reach_the_model():
    model = GPTModel(GPTConfig.of(TINY.as_dict() | {"n_classes": 2})).eval()
    batch = example_windows([Example([5] * n, [IGNORED] * (n - 1) + [n % 2]) for n in (2, 9)], 2)[0]
    other = batch.ids.where(torch.arange(9) < torch.tensor([[2], [9]]), 77)
    counts = batch.targets != IGNORED
    assert torch.equal(model(batch.ids)[counts], model(other)[counts])


def test_one_class_is_none(encoding: Encoding):
    with pytest.raises(UsageError, match="needs at least two labels, found spam"):
        classifier_examples(labelled("spam", "spam"), encoding, 64)


def test_labels_of_many_digits_are_told_apart_and_sorted_by_value(encoding: Encoding):
    labels = ["1e999999999", "9007199254740993", "9007199254740992"]
    records = [Record(text="a", label=label) for label in labels]
    assert classifier_examples(records, encoding, 8)[1] == labels[::-1]
