"""TensorFlow's checkpoints: what TensorFlow wrote is read bit for bit, without it; all else is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import randomise
from test_checkpoint import assert_holds, assert_refused, bytes_of

from gpt2lite import GPTConfig, GPTModel
from gpt2lite.checkpoint import Manifest, open_checkpoint, side_file, tf_bundle
from gpt2lite.checkpoint.reading import read_span
from gpt2lite.checkpoint.tf_bundle import MAGIC, MAX_INDEX_BYTES
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

# GPT-2's names and shapes, 2 layers of 64, written by TensorFlow 2.21; expected.json is of its values.
WRITTEN = Path(__file__).resolve().parent / "data" / "openai_tf_tiny"
SHARD = "model.ckpt.data-00000-of-00001"
FLOAT, STRING, RESOURCE = 1, 7, 20
INTO_SIGN = 1 << 63
SUM = b"\xff" * 4  # a CRC-32C, which is not read


# ---- a writer ----------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape_of(*sizes: int) -> bytes:
    return b"".join(field(2, field(1, size)) for size in sizes)


def entry(
    shape: bytes = shape_of(2, 3), nbytes: int = 24, *, dtype: int = FLOAT, shard: int = 0, offset: int = 0,
    more: bytes = b"",
) -> bytes:  # fmt: skip
    numbers = field(1, dtype) + field(2, shape) + field(3, shard) + field(4, offset) + field(5, nbytes)
    return numbers + varint(6 << 3 | 5) + SUM + more


def pair(key: bytes, value: bytes, shared: int = 0) -> bytes:
    return varint(shared) + varint(len(key)) + varint(len(value)) + key + value


def block(*pairs: bytes, restarts: int = 1, kind: int = 0) -> bytes:
    return b"".join(pairs) + bytes(4) + restarts.to_bytes(4, "little") + bytes([kind]) + SUM


def table(*blocks: bytes, handles: list[bytes] | None = None) -> bytes:
    data, own = b"", []
    for written in blocks:
        own.append(varint(len(data)) + varint(len(written) - 5))
        data += written
    filters, directory = (
        block(),
        block(*(pair(k.to_bytes(2, "big"), handle) for k, handle in enumerate(handles or own))),
    )
    footer = varint(len(data)) + varint(len(filters) - 5)
    footer += varint(len(data) + len(filters)) + varint(len(directory) - 5)
    return data + filters + directory + footer.ljust(40, b"\0") + MAGIC


HEADER = field(1, 1) + field(3, field(1, 1))


def bundle(*entries: bytes, header: bytes = HEADER) -> bytes:
    """An index of the tensors v, w, x, …"""
    named = (pair(bytes([ord("w") + k]), value) for k, value in enumerate(entries))
    return table(block(pair(b"", header), *named))


def write(folder: Path, index: bytes, data: bytes = bytes(range(24))) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.ckpt.index").write_bytes(index)
    (folder / SHARD).write_bytes(data)
    return folder / "model.ckpt.index"


def write_state(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    data, pairs = b"", []
    for name, tensor in sorted(state.items()):
        raw = bytes(bytes_of(tensor))
        content = entry(shape_of(*tensor.shape), len(raw), offset=len(data))
        pairs.append(block(pair(name.encode(), content)))
        data += raw
    return write(folder, table(block(pair(b"", HEADER)), *pairs), data)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "124M"))


# ---- what TensorFlow writes --------------------------------------------------------------------------------


def test_what_tensorflow_wrote_is_read_bit_for_bit():
    expected = json.loads((WRITTEN / "expected.json").read_text())
    manifest = open_checkpoint(WRITTEN)
    assert manifest.format == "tf_bundle"
    assert manifest.tensors.keys() == expected.keys()
    for name, span in manifest.tensors.items():
        found = hashlib.sha256(bytes(bytes_of(read_span(span)))).hexdigest()
        dtype = str(span.dtype).removeprefix("torch.")
        assert {"dtype": dtype, "shape": list(span.shape), "sha256": found} == expected[name], name
    assert manifest.tensors["model/h0/attn/c_attn/w"].shape == (1, 64, 192)
    assert_holds(manifest, {name: read_span(span) for name, span in manifest.tensors.items()})


@pytest.mark.parametrize("name", ["", "model.ckpt", "model.ckpt.index"])
def test_folder_prefix_and_index_open_the_same(name: str):
    manifest = open_checkpoint(WRITTEN / name)
    assert manifest == open_checkpoint(WRITTEN)
    assert manifest.path == WRITTEN / "model.ckpt.index"
    assert {file.path for file in manifest.files} == {manifest.path, WRITTEN / SHARD}
    assert (side_file(manifest.path, ".json").parent / "hparams.json").is_file()


def test_an_index_is_known_by_its_content(copied: Path):
    for file in ("model.ckpt.index", SHARD):
        (copied / file).rename(copied / file.replace("model.ckpt", "w").replace(".index", ""))
    assert len(open_checkpoint(copied / "w").tensors) == 28


@pytest.mark.parametrize("said", ["other.ckpt", "/where/it/was/trained/other.ckpt"])
def test_of_several_the_one_that_tensorflow_noted_is_opened(said: str, copied: Path):
    write(copied, bundle(entry()))
    for file in ("model.ckpt.index", SHARD):
        shutil.copy(copied / file, copied / file.replace("model", "other"))
    (copied / "checkpoint").write_text(
        f'model_checkpoint_path: "{said}"\nall_model_checkpoint_paths: "model.ckpt"\n'
    )
    assert open_checkpoint(copied).path == copied / "other.ckpt.index"


@pytest.mark.parametrize(
    "note", [None, "", 'model_checkpoint_path: "gone"', 'model_checkpoint_path: ""', "\0"]
)
def test_of_several_without_a_note_all_are_named(note: str | None, copied: Path):
    shutil.copy(copied / "model.ckpt.index", copied / "other.ckpt.index")
    (copied / "checkpoint").unlink()
    if note is not None:
        (copied / "checkpoint").write_text(note)
    assert_refused(copied, "several.*model.ckpt.index, other.ckpt.index")


def test_scalars_empty_tensors_and_several_blocks_are_read(tmp_path: Path):
    state = {"scalar": torch.tensor(3.5), "none": torch.empty(0, 5), "w": torch.arange(6.0).reshape(2, 3)}
    manifest = open_checkpoint(write_state(tmp_path, state))
    assert_holds(manifest, state)


def test_tensors_of_several_data_files_are_read(tmp_path: Path):
    two = field(1, 2) + field(3, field(1, 1))
    path = write(tmp_path, bundle(entry(), entry(shard=1), header=two))
    (tmp_path / SHARD).unlink()
    for shard in (0, 1):
        (tmp_path / f"model.ckpt.data-0000{shard}-of-00002").write_bytes(bytes([shard]) * 24)
    manifest = open_checkpoint(path)
    assert [set(bytes_of(read_span(span))) for span in manifest.tensors.values()] == [{0}, {1}]
    assert len(manifest.files) == 3


@pytest.mark.parametrize("dtype", [STRING, RESOURCE, 0])
def test_what_torch_has_no_dtype_for_is_listed_and_the_rest_is_read(dtype: int, tmp_path: Path):
    manifest = open_checkpoint(write(tmp_path, bundle(entry(), entry(dtype=dtype, offset=24))))
    assert list(manifest.tensors) == ["w"]
    assert manifest.unreadable == {"x": f"has TensorFlow's dtype {dtype}, which is not read"}


WRITER = """
import sys
import tensorflow.compat.v1 as tf
def save(prefix, sharded=False):
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, prefix, write_meta_graph=False)
with tf.Graph().as_default():
    for dtype in sys.argv[2:]:
        tf.get_variable(dtype, initializer=tf.cast(tf.constant([[0, 1, 2], [1, 0, 3]]), dtype))
    tf.get_variable("scalar", initializer=tf.constant(3.5))
    tf.get_variable("empty", initializer=tf.zeros((0, 5)))
    tf.get_variable("text", initializer=tf.constant(["a", "b"]))
    for i in range(20):
        tf.get_variable(f"model/h{i}/attn/c_attn/w", initializer=tf.fill((3,), float(i)))
    save(sys.argv[1] + "/model.ckpt")
with tf.Graph().as_default():
    tf.get_variable("w", shape=(10, 4), partitioner=tf.fixed_size_partitioner(2))
    save(sys.argv[1] + "/sliced.ckpt")
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="tensorflow is not installed")
def test_every_dtype_that_tensorflow_writes_is_read_and_its_slices_are_refused(tmp_path: Path):
    names = [str(dtype).removeprefix("torch.") for dtype in tf_bundle.DTYPES.values()]
    command = [sys.executable, "-c", WRITER, str(tmp_path), *names]
    written = subprocess.run(command, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    values = torch.tensor([[0, 1, 2], [1, 0, 3]])
    expected = {str(dtype).removeprefix("torch."): values.to(dtype) for dtype in tf_bundle.DTYPES.values()}
    expected |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 5)}
    expected |= {f"model/h{i}/attn/c_attn/w": torch.full((3,), float(i)) for i in range(20)}
    manifest = open_checkpoint(tmp_path / "model.ckpt")
    assert_holds(manifest, expected)
    assert_refused(tmp_path / "sliced.ckpt.index", "b'w' is partitioned: stored in slices")


# ---- damage ------------------------------------------------------------------------------------------------


def slice_key() -> bytes:
    return table(block(pair(b"", HEADER), pair(b"\0w\0\1\1\2\x80", entry())))


def two_blocks(first: bytes, second: bytes) -> bytes:
    return table(block(pair(b"", HEADER), pair(first, entry())), block(pair(second, entry())))


def one_block_twice() -> bytes:
    only = block(pair(b"", HEADER))
    return table(only, handles=[varint(0) + varint(len(only) - 5)] * 2)


def handles_to(offset: int, size: int) -> bytes:
    return table(block(pair(b"", HEADER)), handles=[varint(offset) + varint(size)])


def pairs(*written: bytes, restarts: int = 1) -> bytes:
    return table(block(pair(b"", HEADER), *written, restarts=restarts))


DAMAGES = {
    "no footer": (bundle(entry())[:-1], "do not end as a TensorFlow index does.*truncated"),
    "bad magic": (bundle(entry())[:-1] + b"\0", "do not end as a TensorFlow index does"),
    "only magic": (MAGIC, "its 8 bytes do not end"),
    "empty": (b"", "is empty"),
    "too large": (bytes(MAX_INDEX_BYTES) + MAGIC, "the limit is 1 MiB"),
    "footer without an end": (bytes(60) + b"\xff" * 40 + MAGIC, "a varint in it never ends"),
    "footer of zeros": (bytes(100) + MAGIC, "a block of 0 bytes announces 0 restarts"),
    "footer past the file": (varint(2**63) * 4 + MAGIC, "lies in bytes 9223372036854775808"),
    "block past the footer": (handles_to(0, 1 << 40), "a block lies in bytes 0 to 1099511627776"),
    "block elsewhere": (handles_to(1, 5), "is compressed|announces .* restarts"),
    "one block twice": (one_block_twice(), "a block begins at byte 0, the one before ends at"),
    "a thousand empty blocks": (table(*[block()] * 1001), "has more than 1000 blocks"),
    "handle cut": (
        table(block(pair(b"", HEADER)), handles=[b"\x80"]),
        "a varint in it never ends",
    ),
    "snappy": (table(block(pair(b"", HEADER), kind=1)), "is compressed.*Save it again"),
    "restarts past the block": (pairs(restarts=1 << 31), "announces 2147483648 restarts"),
    "shares more than there is": (pairs(pair(b"w", entry(), shared=1)), "shares 1 bytes of a 0-byte name"),
    "value past the block": (
        table(block(pair(b"", HEADER), varint(0) + varint(1) + varint(1 << 40) + b"w")),
        "1099511627776 of value",
    ),
    "long name": (pairs(pair(b"x" * 2000, entry())), "names have at most 1000"),
    "cut in a pair": (pairs(b"\0"), "an entry shares 0 bytes|never ends"),
    "names that fall": (two_blocks(b"w", b"v"), "the name b'v' comes after b'w'"),
    "one name twice": (two_blocks(b"w", b"w"), "the name b'w' comes after b'w'"),
    "name that is not UTF-8": (pairs(pair(b"\xff", entry())), r"the name b'\\xff' is not UTF-8"),
    "no header": (table(block(pair(b"w", entry()))), "begins with the entry b'w', not with the header"),
    "nothing": (table(),  "begins with the entry None"),
    "big-endian": (bundle(entry(), header=HEADER + field(2, 1)), "written on a big-endian machine"),
    "of the future": (bundle(entry(), header=field(1, 1) + field(3, field(2, 2))), "readers of version 2"),
    "no data files": (bundle(entry(), header=b""), "announces 0 data files"),
    "too many data files": (bundle(header=field(1, 1 << 40)), "announces 1099511627776 data files"),
    "negative data files": (bundle(header=field(1, (1 << 64) - 1)), "announces 18446744073709551615"),
    "sliced": (bundle(entry(more=field(7, b""))), "b'w' is partitioned: stored in slices"),
    "a slice": (slice_key(), "b'w' is partitioned: stored in slices"),
    "entry cut": (bundle(entry()[:-3]), "a field of kind 5 and 4 bytes reaches past its message"),
    "entry that ends in a number": (bundle(entry() + b"\x80"), "a varint in it never ends"),
    "endless number": (bundle(b"\x08" + b"\xff" * 30), "a varint in it never ends"),
    "part past its message": (bundle(field(1, 1) + b"\x12\x7f"), "a field of kind 2 and 127 bytes"),
    "groups": (bundle(b"\x0b\x0c"), "a field of kind 3"),
    "unknown rank": (bundle(entry(field(3, 1))), "w has shape .*which no tensor can"),
    "negative size": (bundle(entry(shape_of(2, (1 << 64) - 3))), "w has shape .2, 18446744073709551613"),
    "a thousand axes": (bundle(entry(shape_of(*[1] * 1000), 4)), "which no tensor can"),
    "negative offset": (bundle(entry(offset=INTO_SIGN)), "offset 9223372036854775808.*no tensor"),
    "negative bytes": (bundle(entry(nbytes=INTO_SIGN)), "9223372036854775808 bytes, which no tensor"),
    "sizes that overflow": (bundle(entry(shape_of(2**40, 2**40))), "more bytes than can be counted"),
    "empty, sizes that overflow": (bundle(entry(shape_of(0, 2**62, 2**62), 0)), "more bytes than can be"),
    "data file that is not": (bundle(entry(shard=1)), "w is in data file 1; the last is 0"),
    "too few bytes for its shape": (bundle(entry(nbytes=20)), "takes 20 bytes, .* needs 24"),
    "past the end": (bundle(entry(offset=4)), "w lies in bytes 4 to 28, the file ends at 24"),
    "overlap": (bundle(entry(), entry(offset=20)), "x begins at byte 20, inside of the tensor before"),
    "same bytes twice": (bundle(entry(), entry()), "x begins at byte 0, inside of the tensor before it"),
}  # fmt: skip


@pytest.mark.parametrize(("index", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_bad_index_is_a_checkpoint_error(index: bytes, message: str, tmp_path: Path):
    path = write(tmp_path, index)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(path).removesuffix(".index") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_damages_are_of_a_sound_file(tmp_path: Path):
    expected = torch.tensor(list(range(24)), dtype=torch.uint8).view(torch.float32).reshape(2, 3)
    assert_holds(open_checkpoint(write(tmp_path, bundle(entry()))), {"w": expected})


def test_a_missing_data_file_is_named(copied: Path):
    (copied / SHARD).unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"{SHARD}: no such file.*needs 1 data files beside it"):
        open_checkpoint(copied)


def test_a_short_data_file_is_truncated(copied: Path):
    with open(copied / SHARD, "r+b") as file:
        file.truncate(474_000)
    assert_refused(copied, "model/wte lies in bytes .*the file ends at 474000.*truncated")


@pytest.mark.parametrize("name", [SHARD, "checkpoint"])
def test_another_of_its_files_is_no_checkpoint_and_the_index_is_asked_for(name: str):
    assert_refused(WRITTEN / name, "checkpoint")


def test_a_prefix_without_an_index_is_not_found(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match=r"model\.ckpt: no such file or folder"):
        open_checkpoint(tmp_path / "model.ckpt")


def test_an_index_cut_anywhere_is_a_checkpoint_error(copied: Path):
    path = copied / "model.ckpt.index"
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"do not end as a TensorFlow index does|is empty"):
            open_checkpoint(copied)


def opened_soundly(path: Path) -> Manifest | None:
    """The manifest, whose tensors lie in their files; None for a CheckpointError."""
    try:
        manifest = open_checkpoint(path)
    except CheckpointError as error:
        return None if len(str(error)) < 1000 else pytest.fail(f"a long message: {error}")
    for span in manifest.tensors.values():
        assert 0 <= span.offset <= span.offset + span.nbytes <= manifest.files[span.source].size
    return manifest


def mangled(data: bytes, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for at in range(len(data)):
        yield data[:at] + bytes([data[at] ^ chance.choice([1, 0x80, 0xFF])]) + data[at + 1 :]
    for _ in range(600):
        some = bytearray(data)
        for at in chance.sample(range(len(data)), chance.randint(1, 8)):
            some[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        begin = chance.randrange(len(data))
        yield bytes(some[:begin] + some[begin + chance.choice([0, 0, 1, 9]) :])


@pytest.mark.parametrize("small", [True, False], ids=["a small index", "TensorFlow's index"])
def test_whatever_an_index_says_it_opens_soundly_or_not_at_all(small: bool, copied: Path):
    path = copied / "model.ckpt.index"
    data = bundle(entry(), entry(offset=24)) if small else path.read_bytes()
    outcomes = set()
    for damaged in mangled(data, seed=1):
        path.write_bytes(damaged)
        outcomes.add(opened_soundly(copied) is None)
    assert outcomes == {True, False}


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.fixture
def in_our_names(tmp_path: Path) -> Path:
    state = randomise(GPTModel(GPTConfig(10, 8, 8, 2, 1))).state_dict()
    (tmp_path / "hparams.json").write_text(json.dumps({"n_head": 2, "n_layer": 1, "n_embd": 8}))
    return write_state(tmp_path, state)


def test_a_bundle_in_our_names_loads_with_the_heads_that_lie_beside_it(in_our_names: Path):
    model = GPTModel.from_checkpoint(in_our_names.parent)
    assert model.config.n_heads == 2
    for name, tensor in randomise(GPTModel(GPTConfig(10, 8, 8, 2, 1))).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
