"""Other files than one zip or one safetensors: the bytes that were written, else a CheckpointError."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import struct
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import (
    HUGE,
    SAVED_DTYPES,
    TREES,
    a_tensor,
    assert_holds,
    assert_refused,
    assert_same_as_torch_load,
    bytes_of,
    bytes_read,
    flips,
    opens_soundly_or_not_at_all,
    payloads,
    sample,
    tensors_in,
)

from gpt2lite.checkpoint import FOLDER_FILES, open_checkpoint, open_sharded
from gpt2lite.checkpoint.llmc_bin import open_llmc
from gpt2lite.checkpoint.reading import map_tensors, read_span, sizes_read
from gpt2lite.checkpoint.safetensors import open_safetensors
from gpt2lite.checkpoint.source import ByteSource, FileReader, FileState
from gpt2lite.checkpoint.tf_bundle import open_tf_bundle
from gpt2lite.checkpoint.torch_zip import MAGIC_NUMBER, open_torch_legacy, open_torch_zip
from gpt2lite.errors import CheckpointError

# ---- written before torch 1.6 ------------------------------------------------------------------------------

LEGACY_TREES = {name: make for name, make in TREES.items() if name != "two dtypes on one storage"}
SYSTEM = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def save_legacy(tree: object, path: Path, protocol: int = 2) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)


@dataclass
class OldStorage:
    """Pickles as old torch's reference to a storage, or to a part of it."""

    key: object = "0"
    numel: object = 6
    view: object = None
    tag: object = "storage"
    kind: type = torch.FloatStorage


class OldPickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        return (
            (obj.tag, obj.kind, obj.key, "cpu", obj.numel, obj.view) if isinstance(obj, OldStorage) else None
        )


class FiveParts(pickle.Pickler):
    """As the zip's: no view."""

    def persistent_id(self, obj: object) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.numel) if isinstance(obj, OldStorage) else None


def dumped(tree: object, protocol: int = 2, pickler: type[pickle.Pickler] = OldPickler) -> bytes:
    buffer = BytesIO()
    pickler(buffer, protocol).dump(tree)
    return buffer.getvalue()


SIX = struct.pack("<q6f", 6, *range(6))


def parts(
    tree: object = None,
    *,
    magic: object = MAGIC_NUMBER,
    version: object = 1001,
    system: object = SYSTEM,
    keys: object = ("0",),
    data: bytes = SIX,
) -> bytes:
    """A legacy file from its parts; as they are, a sound one."""
    tree = {"w": a_tensor(OldStorage())} if tree is None else tree
    pickles = (magic, version, system, tree, list(keys) if isinstance(keys, tuple) else keys)
    return b"".join(part if isinstance(part, bytes) else dumped(part) for part in pickles) + data


@pytest.mark.parametrize("make", LEGACY_TREES.values(), ids=LEGACY_TREES)
def test_whatever_old_torch_saved_is_read_bit_for_bit(make, tmp_path):
    save_legacy(make(), tmp_path / "model.pth")
    assert assert_same_as_torch_load(tmp_path / "model.pth").format == "torch_zip"


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # torch's own view of complex32
@pytest.mark.parametrize("name", SAVED_DTYPES)
def test_every_dtype_in_a_legacy_file_is_read_bit_for_bit(name, tmp_path):
    """Also those that torch saves into a legacy file and then cannot load, for want of a storage class."""
    written = sample(getattr(torch, name))
    save_legacy({"w": written}, tmp_path / "model.pth")
    span = open_checkpoint(tmp_path / "model.pth").tensors["w"]
    for found in (read_span(span), map_tensors([span])["w"]):
        assert (found.dtype, bytes_of(found)) == (written.dtype, bytes_of(written))


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("make", LEGACY_TREES.values(), ids=LEGACY_TREES)
def test_legacy_files_of_other_pickle_protocols_are_read_too(make, protocol, tmp_path):
    """Frames and all: an unpickler that read ahead would lose its place between the pickles."""
    save_legacy(make(), tmp_path / "model.pth", protocol)
    expected = tensors_in(torch.load(tmp_path / "model.pth", weights_only=False))
    spans = open_checkpoint(tmp_path / "model.pth").tensors
    assert {name: bytes_of(read_span(span)) for name, span in spans.items()} == {
        name: bytes_of(tensor) for name, tensor in expected.items()
    }


def test_the_parts_are_of_a_sound_legacy_file(tmp_path):
    """Else a row below could pass for another reason than its own."""
    (tmp_path / "m.pth").write_bytes(parts())
    manifest = assert_same_as_torch_load(tmp_path / "m.pth")
    assert read_span(manifest.tensors["w"]).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_bytes_after_the_last_storage_are_left_alone_as_torch_does(tmp_path):
    (tmp_path / "m.pth").write_bytes(parts() + parts())
    assert_same_as_torch_load(tmp_path / "m.pth")


def test_the_storages_of_a_legacy_file_are_all_that_torch_load_allocates(tmp_path):
    """Whole ones, for a tensor on a part too, and those that no tensor stands on."""
    tree = {"w": torch.zeros(1000)[:10], "tied": torch.ones(7), "bare": torch.arange(3).untyped_storage()}
    save_legacy(tree, tmp_path / "m.pth")
    manifest = open_checkpoint(tmp_path / "m.pth")
    assert sorted(sizes_read(manifest, ["w"])) == [24, 28, 4000]


LEGACY_DAMAGES = {
    "magic alone": (dumped(MAGIC_NUMBER), "its pickle is damaged"),
    "another number": (parts(magic=MAGIC_NUMBER << 80), "its magic number is <int>, wanted"),
    "another version": (parts(version=1002), "its version is 1002, wanted 1001"),
    "version True": (parts(version=True), "its version is True, wanted 1001"),
    "big-endian": (
        parts(system={"little_endian": False}),
        "not marked as written on a little-endian.*save only the weights",
    ),
    "no machine": (parts(system={}), "not marked as written on a little-endian"),
    "machine is a list": (parts(system=[]), "not marked as written on a little-endian"),
    "keys of another type": (parts(keys=(0,)), r"its list of storages is \[0\]"),
    "keys are a dict": (parts(keys={"0": 0}), "its list of storages is <dict>"),
    "a key too few": (parts(keys=()), r"0 storages does not fit.*describes 1; they differ in \['0'\]"),
    "a key too many": (parts(keys=("0", "1")), r"they differ in \['1'\]"),
    "a key twice": (parts(keys=("0", "0")), "2 storages does not fit its pickle, which describes 1"),
    "count too small": (parts(data=b"\x05" + SIX[1:]), "storage 0 has 5 elements of torch.float32, 24 bytes"),
    "negative count": (parts(data=b"\xff" * 8 + SIX[8:]), "storage 0 has -1 elements"),
    "no data": (parts(data=b""), "storage 0 lies in bytes .* truncated"),
    "last byte missing": (parts()[:-1], "storage 0 lies in bytes .* truncated"),
    "past its storage": (
        parts({"w": a_tensor(OldStorage(), 1)}),
        "w reaches past the end of its storage 0",
    ),
    "a view, as of torch 0.3": (
        parts({"w": a_tensor(OldStorage(view=("1", 0, 5)))}),
        "refers to <tuple>, which is not a whole storage.*save only the weights",
    ),
    "a view of another kind": (parts({"w": a_tensor(OldStorage(view=7))}), "which is not a whole storage"),
    "one storage, two sizes": (
        parts({"w": [OldStorage(), OldStorage(numel=7)]}),
        "describes storage 0 in two ways",
    ),
    "one storage, two dtypes": (
        parts({"w": [OldStorage(), OldStorage(kind=torch.IntStorage)]}),
        "describes storage 0 in two ways",
    ),
    "a module's source": (parts({"w": OldStorage(tag="module")}), "refers to .*, which is not a storage"),
    "a zip's storage": (
        parts(dumped({"w": OldStorage()}, pickler=FiveParts)),
        r"refers to \('storage', .*\), which is not a whole storage",
    ),
    "negative size": (parts({"w": OldStorage(numel=-6)}), "which is not a storage"),
    "uncountable": (parts({"w": OldStorage(numel=2**62)}), "which is not a storage"),
    "huge": (parts({"w": OldStorage(numel=2**60)}), "storage 0 lies in bytes .* truncated"),
    "a long string announced": (
        parts(b"\x80\x02X\xff\xff\xff\x7f."),
        "its pickles are damaged, or larger than 64 MiB",
    ),
}


@pytest.mark.parametrize(("data", "message"), LEGACY_DAMAGES.values(), ids=LEGACY_DAMAGES)
def test_a_bad_legacy_file_is_a_checkpoint_error(data, message, tmp_path):
    (tmp_path / "model.pth").write_bytes(data)
    assert_refused(tmp_path / "model.pth", message)


@pytest.mark.parametrize("data", [parts({"a": "x" * 600, "b": "y" * 600}), parts(b"\x80\x02I" + b"1" * 1100)])
def test_the_pickles_of_a_legacy_file_are_limited_together(data, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2lite.checkpoint.torch_zip.MAX_SMALL_BYTES", 1000)
    (tmp_path / "model.pth").write_bytes(data)
    assert_refused(tmp_path / "model.pth", "its pickles are damaged, or larger than")


def test_a_tar_of_the_first_torch_is_refused_by_name(tmp_path):
    with tarfile.open(tmp_path / "model.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert_refused(
        tmp_path / "model.pth",
        "a tar archive; unpack it first.* before 0.1.10 wrote it.*save only the weights",
    )


@pytest.mark.parametrize("part", ["version", "system", "tree", "keys"])
def test_no_pickle_of_a_legacy_file_runs_code(part, tmp_path):
    for payload in payloads(tmp_path / "ran").values():
        pickled = dumped([payload, MAGIC_NUMBER])
        (tmp_path / "m.pth").write_bytes(parts(pickled) if part == "tree" else parts(**{part: pickled}))
        with contextlib.suppress(CheckpointError):
            assert open_checkpoint(tmp_path / "m.pth").tensors == {}
        assert not (tmp_path / "ran").exists()


def random_damages(data: bytes, count: int) -> Iterator[bytes]:
    """One to three bytes changed, or the end cut off, in a different way each time and the same every run."""
    chance = random.Random(0)
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        yield bytes(damaged[: chance.randrange(len(data))] if chance.random() < 0.2 else damaged)


def test_a_damaged_legacy_file_is_a_checkpoint_error_or_harmless(tmp_path):
    save_legacy({"w": torch.arange(6.0).reshape(2, 3), "tied": torch.ones(2), "step": 7}, tmp_path / "m.pth")
    data, outcomes = (tmp_path / "m.pth").read_bytes(), set()
    for damaged in (*flips(data, range(len(data))), *random_damages(data, 1000)):
        (tmp_path / "m.pth").write_bytes(damaged)
        outcomes.add(opens_soundly_or_not_at_all(tmp_path / "m.pth"))
    assert outcomes == {True, False}


def test_a_legacy_file_cut_anywhere_is_a_checkpoint_error(tmp_path):
    save_legacy({"w": torch.arange(600.0), "b": torch.ones(7)}, tmp_path / "m.pth")
    data = (tmp_path / "m.pth").read_bytes()
    for size in (*range(0, 600, 7), *range(600, len(data), 100), len(data) - 1):
        (tmp_path / "m.pth").write_bytes(data[:size])
        with pytest.raises(
            CheckpointError, match=r"is empty|begins with|bare pickle|damaged|truncated|was not run"
        ):
            open_checkpoint(tmp_path / "m.pth")


# ---- sharded -----------------------------------------------------------------------------------------------

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(5)
SHARDS = {"1.safetensors": {"a": A}, "2.safetensors": {"b": B}}
MAP = {"a": "1.safetensors", "b": "2.safetensors"}


def save_shards(
    folder: Path,
    weight_map: object = MAP,
    shards: dict[str, dict[str, torch.Tensor]] = SHARDS,
    **more: object,
) -> Path:
    """Shards and their index; as they are, sound ones."""
    for name, tensors in shards.items():
        write = save_file if name.endswith(".safetensors") else save_legacy if "old" in name else torch.save
        write(tensors, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_bytes(
        weight_map
        if isinstance(weight_map, bytes)
        else json.dumps(more | {"weight_map": weight_map}).encode()
    )
    return index


@pytest.mark.parametrize("as_folder", [True, False], ids=["folder", "index"])
def test_shards_are_read_as_one(as_folder, tmp_path):
    index = save_shards(tmp_path, metadata={"total_size": 64, "n_head": 4, "list": []})
    manifest = open_checkpoint(tmp_path if as_folder else index)
    assert_holds(manifest, {"a": A, "b": B})
    assert (manifest.path, manifest.format) == (index, "safetensors")
    assert manifest.values == {"metadata.total_size": 64, "metadata.n_head": 4}
    assert {file.path.name for file in manifest.files} == {index.name, *SHARDS}


def test_pickled_shards_are_read_as_one_whether_zips_or_not(tmp_path):
    shards = {"1.bin": {"a": A, "tied": A}, "2-old.bin": {"b": B}}
    index = save_shards(tmp_path, {"a": "1.bin", "b": "2-old.bin", "tied": "1.bin"}, shards)
    manifest = open_checkpoint(index.rename(tmp_path / "pytorch_model.bin.index.json"))
    assert_holds(manifest, {"a": A, "b": B, "tied": A})
    assert manifest.tensors["a"].address == manifest.tensors["tied"].address
    assert sorted(sizes_read(manifest, ["a"])) == [24, 40]
    assert open_checkpoint(tmp_path).path == manifest.path


@pytest.mark.parametrize("name", ["./1.safetensors", "sub/1.safetensors", ".//sub/../1.safetensors"])
def test_a_shard_may_lie_in_a_subfolder_and_is_not_looked_for_above(name, tmp_path):
    (tmp_path / "sub").mkdir()
    index = save_shards(tmp_path, MAP | {"a": name})
    (tmp_path / "sub" / "1.safetensors").write_bytes((tmp_path / "1.safetensors").read_bytes())
    if ".." in name:
        assert_refused(index, "which is not a file in this folder")
    else:
        assert_holds(open_checkpoint(index), {"a": A, "b": B})


def test_shards_may_be_links_as_in_the_hub_s_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_shards(tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_holds(open_checkpoint(tmp_path / "snapshot"), {"a": A, "b": B})


def test_a_whole_file_is_preferred_to_shards_and_safetensors_to_pickles(tmp_path):
    index, preferred = save_shards(tmp_path), []
    (tmp_path / "pytorch_model.bin.index.json").write_bytes(index.read_bytes())
    torch.save({"a": A}, tmp_path / "pytorch_model.bin")
    save_file({"a": A}, tmp_path / "model.safetensors")
    for _ in range(4):
        preferred.append(open_checkpoint(tmp_path).path.name)
        (tmp_path / preferred[-1]).unlink()
    assert preferred == list(FOLDER_FILES)


def test_a_changed_shard_is_noticed(tmp_path):
    manifest = open_checkpoint(save_shards(tmp_path))
    manifest.check_unchanged()
    save_file({"b": torch.ones(9)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"2.safetensors: changed while it was being read"):
        manifest.check_unchanged()


def placed_in(shard: object) -> dict[str, Any]:
    return {"weight_map": MAP | {"a": shard}}


BAD_SHARDS = {
    "not JSON": ({"weight_map": b'{"weight_map": {"a": "1.safetensors"'}, "not valid JSON"),
    "not UTF-8": ({"weight_map": b'{"weight_map": {"\xff": "1.safetensors"}}'}, "not valid JSON"),
    "a name twice": ({"weight_map": b'{"weight_map": {"a": "1", "a": "2"}}'}, "a key occurs twice"),
    "deep": ({"weight_map": b'{"a":' * 100_000}, "not valid JSON"),
    "no map": ({"weight_map": b'{"architectures": ["GPT2LMHeadModel"]}'}, "no weight_map that names tensors"),
    "map is a list": ({"weight_map": ["a"]}, "no weight_map that names tensors"),
    "empty map": ({"weight_map": {}}, "no weight_map that names tensors"),
    "absolute": (placed_in("/etc/1.safetensors"), "said to be in '/etc/1.safetensors', which is not a file"),
    "climbs": (placed_in("../1.safetensors"), "a: is said to be in '../1.safetensors', which is not a file"),
    "drive": (placed_in("C:1.safetensors"), "a: is said to be in 'C:1.safetensors', which is not a file"),
    "backslash": (placed_in("..\\1.safetensors"), "which is not a file in this folder"),
    "number": (placed_in(1), "a: is said to be in '1', which is not a file in this folder"),
    "nothing": (placed_in(""), "a: is said to be in '', which is not a file in this folder"),
    "missing": (placed_in("3.safetensors"), "3.safetensors: no such file"),
    "a folder": (placed_in("."), "is said to be in '.', which is not a file"),
    "zero byte": (placed_in("1.safe\0tensors"), r"'1.safe\\x00tensors': cannot be opened"),
    "half a character": (placed_in("\ud800"), r"'\\ud800': cannot be opened"),
    "long name": (placed_in("x" * 300), "cannot be opened"),
    "itself": (placed_in("model.safetensors.index.json"), "expected a shard, found an index"),
    "not in its shard": (
        {"weight_map": MAP | {"c": "2.safetensors"}},
        "c: is not in 2.safetensors, where the index looks for it",
    ),
    "not named": ({"weight_map": {"a": "1.safetensors"}, "shards": {"1.safetensors": {"a": A, "b": B}}},
        "b: is in 1.safetensors; the index says nothing"),
    "in two shards": (
        {"shards": {"1.safetensors": {"a": A}, "2.safetensors": {"a": A, "b": B}}},
        "a: is in 2.safetensors; the index says 1.safetensors",
    ),
    "two formats": (
        {"weight_map": {"a": "1.bin", "b": "2.safetensors"}, "shards": SHARDS | {"1.bin": {"a": A}}},
        "the shards are of 2 formats, safetensors and torch_zip; wanted one",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_bad_shards_are_a_checkpoint_error(arguments, message, tmp_path):
    assert_refused(save_shards(tmp_path, **arguments), message)


def test_a_damaged_shard_is_named(tmp_path):
    index = save_shards(tmp_path)
    os.truncate(tmp_path / "2.safetensors", 90)
    assert_refused(index, r"1 place\(s\)[^\n]*\n  .*2.safetensors: .*truncated")


def test_all_that_is_wrong_with_shards_is_said_at_once(tmp_path):
    weight_map = {"a": "2.safetensors", "c": "3.safetensors", "d": "/4.safetensors"}
    with pytest.raises(CheckpointError, match=r"does not fit its shards in 4 place\(s\)") as caught:
        open_checkpoint(save_shards(tmp_path, weight_map))
    assert str(caught.value).splitlines()[1:] == [
        "  d: is said to be in '/4.safetensors', which is not a file in this folder",
        f"  {tmp_path}/3.safetensors: no such file or folder",
        "  a: is not in 2.safetensors, where the index looks for it",
        "  b: is in 2.safetensors; the index says nothing",
    ]


def test_a_huge_index_is_not_read(tmp_path):
    index = save_shards(tmp_path)
    os.truncate(index, HUGE)
    assert_refused(index, "the limit is 16 MiB")


# ---- llm.c -------------------------------------------------------------------------------------------------

VERSIONS = {3: torch.float32, 5: torch.bfloat16}
SMALL = {
    "T": 8,
    "V": 11,
    "L": 3,
    "heads": 2,
    "C": 4,
    "Vp": 16,
}  # in the header's order


def llmc_header(version: int = 3, magic: int = 20240326, rest: int = 0, **numbers: int) -> bytes:
    return struct.pack("<256i", magic, version, *(SMALL | numbers).values(), rest, *[0] * 247)


def llmc_blocks(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The sixteen, stacked over the layers, in order, as the format's description has them."""
    T, L, C, Vp = SMALL["T"], SMALL["L"], SMALL["C"], SMALL["Vp"]
    shapes = {
        "wte": (Vp, C), "wpe": (T, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
        "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
        "lnfw": (C,), "lnfb": (C,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def llmc_data(dtype: torch.dtype = torch.float32) -> bytes:
    return bytes(byte for block in llmc_blocks(dtype).values() for byte in bytes_of(block))


def nanogpt_names(blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By hand: the reference that the table is checked against."""
    found = {"wte.weight": blocks["wte"][: SMALL["V"]], "wpe.weight": blocks["wpe"]}
    found |= {"ln_f.weight": blocks["lnfw"], "ln_f.bias": blocks["lnfb"]}
    leaves = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2", "fc": "mlp.c_fc"}
    for i in range(SMALL["L"]):
        for theirs, leaf in (leaves | {"fcproj": "mlp.c_proj"}).items():
            found[f"h.{i}.{leaf}.weight"] = blocks[f"{theirs}w"][i]
            found[f"h.{i}.{leaf}.bias"] = blocks[f"{theirs}b"][i]
    return found


@pytest.mark.parametrize(("version", "dtype"), VERSIONS.items())
def test_llm_c_is_read_layer_by_layer_under_nanogpt_s_names(version, dtype, tmp_path):
    (tmp_path / "gpt2.bin").write_bytes(llmc_header(version) + llmc_data(dtype))
    manifest = open_checkpoint(tmp_path / "gpt2.bin")
    assert_holds(manifest, nanogpt_names(llmc_blocks(dtype)))
    assert manifest.format == "llmc"
    assert manifest.values == {"n_head": 2, "format": "llm.c", "vocab_size": 11, "block_size": 8}
    assert list(sizes_read(manifest, ["wte.weight"])) == [11 * 4 * dtype.itemsize]


def test_the_padding_of_llm_c_s_vocabulary_may_be_none(tmp_path):
    blocks = llmc_blocks(torch.float32)
    data = llmc_data()[5 * 4 * 4 :]  # as if five rows had never been
    (tmp_path / "gpt2.bin").write_bytes(llmc_header(Vp=11) + data)
    spans = open_checkpoint(tmp_path / "gpt2.bin").tensors
    assert torch.equal(read_span(spans["wte.weight"]), blocks["wte"][5:])
    assert torch.equal(read_span(spans["ln_f.bias"]), blocks["lnfb"])


def test_a_context_of_123_does_not_make_llm_c_safetensors(tmp_path):
    """Its ninth byte is then the brace that begins a safetensors header."""
    data = llmc_header(T=123) + bytes(115 * 4 * 4) + llmc_data()
    assert data[8:9] == b"{"
    (tmp_path / "gpt2.bin").write_bytes(data)
    assert open_checkpoint(tmp_path / "gpt2.bin").format == "llmc"


def whole(**numbers: int) -> bytes:
    return llmc_header(**numbers) + llmc_data()


SIZE = len(whole())
LLMC_DAMAGES = {
    "another file of llm.c": (whole(magic=20240520), "begins with"),
    "unpadded": (whole(version=1), "version 1; wanted version 3 .* or 5"),
    "a version to come": (whole(version=7), "version 7; wanted version 3 .* or 5"),
    "version 0": (whole(version=0), "begins with"),
    "negative version": (whole(version=-3), "version -3; wanted"),
    "no context": (whole(T=0), "block_size is 0, wanted at least 1"),
    "no vocabulary": (whole(V=0), "vocab_size is 0, wanted at least 1"),
    "negative layers": (whole(L=-3), "n_layer is -3, wanted at least 1"),
    "many layers": (whole(L=1001), "n_layer is 1001, wanted at most 1000"),
    "no heads": (whole(heads=0), "n_head is 0, wanted at least 1"),
    "heads do not divide": (whole(heads=3), "n_embd 4 is not a multiple of n_head 3"),
    "more heads than channels": (whole(heads=8), "n_embd 4 is not a multiple of n_head 8"),
    "padding takes away": (whole(Vp=10), "padded_vocab_size is 10, less than vocab_size"),
    "all at once": (whole(L=0, heads=3, Vp=1), "n_layer is 0.*; padded_vocab_size is 1.*; n_embd 4 is not"),
    "a ninth number": (whole(rest=1), "more than eight numbers"),
    "huge": (whole(T=2**31 - 1, V=2**31 - 1, Vp=2**31 - 1, L=1000), "describes .* bytes, the file has"),
    "one row more": (whole(T=9), f"describes {SIZE + 16} bytes, the file has {SIZE}"),
    "the other dtype": (whole(version=5), f"the file has {SIZE}"),
    "last byte missing": (whole()[:-1], f"describes {SIZE} bytes, the file has {SIZE - 1}: truncated"),
    "a byte more": (whole() + b"0", f"describes {SIZE} bytes, the file has {SIZE + 1}"),
    "header alone": (llmc_header(), "the file has 1024"),
    "header cut": (llmc_header()[:1000], "ends within its llm.c header, at byte 1000"),
}


@pytest.mark.parametrize(("data", "message"), LLMC_DAMAGES.values(), ids=LLMC_DAMAGES)
def test_bad_llm_c_is_a_checkpoint_error(data, message, tmp_path):
    (tmp_path / "gpt2.bin").write_bytes(data)
    assert_refused(tmp_path / "gpt2.bin", message)


def test_a_damaged_llm_c_header_is_a_checkpoint_error_or_harmless(tmp_path):
    """Harmless: what leaves every size as it is, like another divisor for the heads."""
    outcomes = {True: 0, False: 0}
    header, data = whole()[:1024], whole()[1024:]
    damages = [damaged + data for damaged in flips(header, range(1024))]
    damages += [damaged + header[32:] + data for damaged in random_damages(header[:32], 500)]
    for damaged in damages:
        (tmp_path / "gpt2.bin").write_bytes(damaged)
        outcomes[opens_soundly_or_not_at_all(tmp_path / "gpt2.bin")] += 1
    assert outcomes[False] > 20 * outcomes[True] > 0


# ---- bytes that lie elsewhere ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elsewhere:
    """A source that only it can open."""

    is_local: ClassVar[bool] = True  # whose zips are read by their own headers
    path: Path

    def __str__(self) -> str:
        return f"elsewhere:{self.path.name}"

    def state(self) -> FileState:
        return ByteSource(self.path).state()

    def open(self) -> BinaryIO:
        return io.open(self.path, "rb")  # noqa: UP020 - the builtin is taken away

    def reader(self) -> FileReader:
        return ByteSource(self.path).reader()

    def sibling(self, name: str) -> Elsewhere:
        return Elsewhere(self.path.parent / name)


def save_zip(folder: Path) -> Path:
    torch.save({"a": A}, folder / "m.pth")
    return folder / "m.pth"


def save_old(folder: Path) -> Path:
    save_legacy({"a": A}, folder / "m.pth")
    return folder / "m.pth"


def save_llmc(folder: Path) -> Path:
    (folder / "m.bin").write_bytes(llmc_header() + llmc_data())
    return folder / "m.bin"


BUNDLE = Path(__file__).resolve().parent / "data" / "openai_tf_tiny" / "model.ckpt.index"
ELSEWHERE = {
    open_torch_zip: save_zip,
    open_torch_legacy: save_old,
    open_safetensors: lambda folder: save_shards(folder).with_name("1.safetensors"),
    open_sharded: save_shards,
    open_llmc: save_llmc,
    open_tf_bundle: lambda folder: BUNDLE,
}


@pytest.mark.parametrize("opener", ELSEWHERE, ids=lambda opener: opener.__name__)
def test_openers_read_the_source_that_they_are_given_and_open_no_path(opener, tmp_path, monkeypatch):
    source = Elsewhere(ELSEWHERE[opener](tmp_path))
    monkeypatch.setattr("builtins.open", None)
    manifest = opener(source)
    monkeypatch.undo()
    assert {type(file) for file in manifest.files} == {Elsewhere}
    assert {span.source for span in manifest.tensors.values()} <= manifest.files.keys()
    assert manifest.tensors.keys() == open_checkpoint(source.path).tensors.keys()


# ---- what opening costs ------------------------------------------------------------------------------------


def large_legacy(path: Path) -> None:
    """As if 2 GiB of zeros had been written, without writing them."""
    stored = OldStorage(numel=HUGE // 4)
    tree = {"w": a_tensor(stored, 0, (HUGE // 4,), (1,))}
    path.write_bytes(parts(tree, data=struct.pack("<q", HUGE // 4)))
    os.truncate(path, path.stat().st_size + HUGE)


def large_llmc(path: Path) -> None:
    """One layer of four channels, and a context of 2 GiB."""
    path.write_bytes(llmc_header(V=1, Vp=1, T=HUGE // 16, L=1))
    os.truncate(path, 1024 + HUGE + 4 * (4 + 13 * 4 + 12 * 4 * 4 + 2 * 4))


LARGE = {"legacy": (large_legacy, "w"), "llm.c": (large_llmc, "wpe.weight")}


@pytest.mark.parametrize(("make", "name"), LARGE.values(), ids=LARGE)
def test_opening_neither_reads_nor_allocates_a_tensor(make, name, tmp_path):
    make(tmp_path / "large")
    tracemalloc.start()
    before = bytes_read() if os.access("/proc/self/io", os.R_OK) else None
    manifest = open_checkpoint(tmp_path / "large")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest.tensors[name].nbytes == HUGE
    assert peak < 1e6
    assert before is None or bytes_read() - before < 1e6


@pytest.mark.parametrize(("make", "name"), LARGE.values(), ids=LARGE)
def test_what_lies_beyond_2_gib_is_found(make, name, tmp_path):
    make(tmp_path / "large")
    span = open_checkpoint(tmp_path / "large").tensors[name]
    last = replace(span, shape=(1,), stride=(1,), offset=span.offset + HUGE - 4)
    with open(tmp_path / "large", "r+b") as file:
        file.seek(last.offset)
        file.write(struct.pack("<f", 2.5))
    assert map_tensors([span])[name].flatten()[-1] == 2.5
    assert read_span(last).item() == 2.5
