"""What the parsers promise: the bytes that torch.load gives, and a CheckpointError for everything else."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.manifest import Manifest, Unread
from gpt2lite.checkpoint.reading import map_tensors, read_span, read_tensors
from gpt2lite.checkpoint.safetensors import DTYPES
from gpt2lite.checkpoint.source import memory_of
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

CPU = torch.device("cpu")
HUGE = 2 << 30
SAVED_DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
]
SAFETENSORS_DTYPES = list(DTYPES.values())

Damage = Callable[[Path], object]


# ---- helpers -----------------------------------------------------------------------------------------------


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Four rows of bytes that differ, seen as `dtype`."""
    low = 2 if dtype is torch.bool else 256
    return (torch.arange(64, dtype=torch.int64) * 37 % low).to(torch.uint8).reshape(4, 16).view(dtype)


def bytes_of(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def tensors_in(tree: object, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    if not isinstance(tree, dict | list | tuple):
        return {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = {}
    for key, child in items:
        found |= tensors_in(child, f"{name}.{key}" if name else str(key))
    return found


def assert_holds(manifest: Manifest, expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, by every way to get at them."""
    assert manifest.tensors.keys() == expected.keys()
    mapped = map_tensors(manifest.tensors.values())
    loaded = read_tensors(manifest, expected, CPU)
    for name, tensor in expected.items():
        for ours in (read_span(manifest.tensors[name]), mapped[name], loaded[name]):
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape), name
            assert ours.stride() == tensor.stride(), name
            assert bytes_of(ours) == bytes_of(tensor), name


def assert_same_as_torch_load(path: Path) -> Manifest:
    manifest = open_checkpoint(path)
    assert_holds(manifest, tensors_in(torch.load(path, weights_only=True)))
    return manifest


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def saved(tree: object) -> bytes:
    buffer = BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def small() -> bytes:
    return saved({"w": torch.arange(6.0).reshape(2, 3), "step": 7})


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def rewritten(**changes: bytes | None) -> Damage:
    """A sound file with some entries (`__` for `/` and `_` for `.`) given other bytes, or taken away."""

    def write(path: Path) -> None:
        entries = entries_of(small())
        for name, data in changes.items():
            entries["archive/" + name.replace("__", "/").replace("_", ".")] = data
        write_zip(path, {name: data for name, data in entries.items() if data is not None})

    return write


@dataclass
class Stored:
    """Pickles as a reference to a storage."""

    key: object = "0"
    numel: object = 6
    tag: object = "storage"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class StoragePickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        return (obj.tag, torch.FloatStorage, obj.key, "cpu", obj.numel) if isinstance(obj, Stored) else None


def pickled(tree: object, protocol: int = 2) -> bytes:
    buffer = BytesIO()
    StoragePickler(buffer, protocol).dump(tree)
    return buffer.getvalue()


def a_tensor(
    storage: object = None, offset: object = 0, shape: object = (2, 3), stride: object = (3, 1), *more: object
) -> Call:
    storage = Stored() if storage is None else storage
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict(), *more)


def zip_of(data: bytes) -> Damage:
    return rewritten(data_pkl=data)


def zip_of_tensor(*arguments: object) -> Damage:
    return zip_of(pickled({"w": a_tensor(*arguments)}))


def nest(innermost: object, depth: int, of: type = list) -> object:
    """2**depth references to one object, in a few bytes of pickle."""
    for _ in range(depth):
        innermost = of((innermost, innermost))
    return innermost


def cyclic() -> dict[str, object]:
    tree: dict[str, object] = {}
    tree["self"] = tree
    return tree


# ---- what torch.save writes --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # torch's own view of complex32
@pytest.mark.parametrize("name", SAVED_DTYPES)
def test_every_dtype_that_torch_saves_is_read_bit_for_bit(name, tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"w": sample(getattr(torch, name))}, path)
    assert assert_same_as_torch_load(path).tensors["w"].dtype is getattr(torch, name)


def shared_storage() -> dict[str, torch.Tensor]:
    whole = torch.arange(100.0)
    return {"whole": whole, "head": whole[:10], "tail": whole[90:], "every third": whole[2::3]}


def nested_checkpoint() -> dict[str, Any]:
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, amsgrad=True)
    module(torch.ones(3, 5)).square().sum().backward()
    optimizer.step()
    return {"model_state_dict": module.state_dict(), "optimizer_state_dict": optimizer.state_dict()}


def other_values() -> dict[str, Any]:
    return {
        "w": torch.ones(2),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "cpu": torch.device("cpu"),
        "none": None,
        "big": 10**30,
        "negative": -5,
        "text": "größer",
        "flag": True,
        "rate": 0.5,
        (1, "a"): "a tuple for a key",
    }


TREES = {
    "state dict with _metadata": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).state_dict(),
    "parameters": lambda: dict(nn.Linear(3, 4).named_parameters()),
    "parameter with an attribute": lambda: {"w": tagged_parameter()},
    "scalar": lambda: {"w": torch.tensor(3.5)},
    "zero-size": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, 5), "c": torch.empty(0, 2**40)},
    "empty state dict": dict,
    "bare tensor": lambda: torch.arange(5),
    "list of tensors": lambda: [torch.arange(5), (torch.ones(1), [torch.zeros(2)])],
    "transposed": lambda: {"w": torch.arange(12.0).reshape(3, 4).t()},
    "permuted": lambda: {"w": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)},
    "expanded": lambda: {"w": torch.arange(4.0).expand(5, 4), "s": torch.tensor(2.0).expand(3, 3)},
    "sliced": lambda: {"w": torch.arange(100.0).reshape(10, 10)[2:9:3, 1:8:2]},
    "small view of a large storage": lambda: {"w": torch.arange(300_000)[200_000:200_003]},
    "shared storage": shared_storage,
    "tied": lambda: dict.fromkeys(("first", "second"), torch.arange(6.0)),
    "two dtypes on one storage": lambda: {"w": torch.ones(4), "bits": torch.ones(4).view(torch.int32)},
    "AdamW": nested_checkpoint,
    "other values": other_values,
}


def tagged_parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.arange(4.0))
    parameter.decay = False
    return parameter


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_whatever_torch_saves_is_read_bit_for_bit(make, tmp_path):
    torch.save(make(), tmp_path / "model.pth")
    assert_same_as_torch_load(tmp_path / "model.pth")


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_other_pickle_protocols_are_read_too(make, protocol, tmp_path):
    """torch.load(weights_only=True) itself reads protocol 2 alone."""
    torch.save(make(), tmp_path / "model.pth", pickle_protocol=protocol)
    manifest = open_checkpoint(tmp_path / "model.pth")
    expected = tensors_in(torch.load(tmp_path / "model.pth", weights_only=False))
    assert manifest.tensors.keys() == expected.keys()
    for name, span in manifest.tensors.items():
        assert bytes_of(read_span(span)) == bytes_of(expected[name])


def test_values_beside_the_tensors_are_kept_by_dotted_name(tmp_path):
    torch.save(other_values() | {"args": {"n_head": 12, "betas": (0.9, 0.95)}}, tmp_path / "m.pth")
    values = open_checkpoint(tmp_path / "m.pth").values
    assert (values["args.n_head"], values["args.betas.1"]) == (12, 0.95)
    assert (values["size.1"], values["dtype"], values["device"]) == (3, torch.bfloat16, "cuda:1")
    assert (values["big"], values["text"], values["none"]) == (10**30, "größer", None)


def test_ties_have_one_address_and_others_have_not(tmp_path):
    one = torch.arange(6.0)
    tree = {"a": one, "tied": one, "part": one[:3], "turned": one.reshape(2, 3).t(), "equal": one.clone()}
    torch.save(tree | {"none": torch.empty(0), "nothing": torch.empty(0)}, tmp_path / "m.pth")
    spans = open_checkpoint(tmp_path / "m.pth").tensors
    same = [name for name in spans if spans[name].address == spans["a"].address]
    assert same == ["a", "tied"]
    assert spans["none"].address != spans["nothing"].address


def test_a_small_view_spans_its_own_bytes_alone(tmp_path):
    torch.save({"w": torch.zeros(1_000_000)[500:510]}, tmp_path / "m.pth")
    span = open_checkpoint(tmp_path / "m.pth").tensors["w"]
    assert (span.numel, span.nbytes, span.extent) == (10, 40, 40)


def test_an_expanded_tensor_is_small_on_disk_and_large_in_memory(tmp_path):
    torch.save({"w": torch.tensor([1.0, 2.0]).expand(1000, 2)}, tmp_path / "m.pth")
    span = open_checkpoint(tmp_path / "m.pth").tensors["w"]
    assert (span.nbytes, span.extent) == (8000, 8)


def test_what_is_mapped_is_saved_alone(tmp_path):
    torch.save({"large": torch.zeros(100_000), "w": torch.arange(3.0)}, tmp_path / "m.pth")
    mapped = map_tensors(open_checkpoint(tmp_path / "m.pth").tensors.values())
    assert mapped["w"].untyped_storage().nbytes() == 12


def test_writing_to_what_is_mapped_leaves_the_file_alone(tmp_path):
    torch.save({"w": torch.arange(3.0)}, tmp_path / "m.pth")
    before = (tmp_path / "m.pth").read_bytes()
    map_tensors(open_checkpoint(tmp_path / "m.pth").tensors.values())["w"].fill_(9)
    assert (tmp_path / "m.pth").read_bytes() == before


@pytest.mark.parametrize(
    "extra", [b"", struct.pack("<HH3s", 0x4242, 3, b"abc"), struct.pack("<HH", 0x4242, 0) * 9], ids=len
)
def test_a_zip_written_again_by_another_tool_is_read(extra, tmp_path):
    entries = entries_of(saved(shared_storage() | {"b": sample(torch.bfloat16)}))
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo("größer/" + name.partition("/")[2])
            info.extra = extra
            with archive.open(info, "w", force_zip64=True) as entry:
                entry.write(data)
        archive.comment = b"written again"
    assert open_checkpoint(tmp_path / "m.pth").tensors.keys() == {*shared_storage(), "b"}
    expected = tensors_in(torch.load(BytesIO(saved(shared_storage() | {"b": sample(torch.bfloat16)}))))
    for span in open_checkpoint(tmp_path / "m.pth").tensors.values():
        assert bytes_of(read_span(span)) == bytes_of(expected[span.name])


class Unseekable(BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise OSError("a pipe")

    def tell(self) -> int:
        raise OSError("a pipe")


def test_a_zip_written_to_a_pipe_with_data_descriptors_is_read(tmp_path):
    pipe = Unseekable()
    with zipfile.ZipFile(pipe, "w") as archive:
        for name, data in entries_of(small()).items():
            archive.writestr(name, data)
    assert zipfile.ZipFile(BytesIO(pipe.getvalue())).infolist()[0].flag_bits & 8
    (tmp_path / "m.pth").write_bytes(pipe.getvalue())
    assert_holds(open_checkpoint(tmp_path / "m.pth"), {"w": torch.arange(6.0).reshape(2, 3)})


@pytest.fixture
def without_crc() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.usefixtures("without_crc")
def test_a_zip_without_checksums_is_read(tmp_path):
    (tmp_path / "m.pth").write_bytes(small())
    assert_same_as_torch_load(tmp_path / "m.pth")


def test_the_extension_does_not_matter(tmp_path):
    save_file({"w": torch.arange(3.0)}, tmp_path / "model.pth")
    torch.save({"w": torch.arange(3.0)}, tmp_path / "model.safetensors")
    formats = [open_checkpoint(tmp_path / f"model.{end}").format for end in ("pth", "safetensors")]
    assert formats == ["safetensors", "torch_zip"]


# ---- safetensors -------------------------------------------------------------------------------------------


def safetensors_bytes(header: object, data: bytes = b"", *, odd: bool = False) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (odd and len(raw) % 2 == 0)
    return len(raw).to_bytes(8, "little") + raw + data


def f32(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES, ids=str)
def test_every_dtype_of_safetensors_is_read_bit_for_bit(dtype, tmp_path):
    expected = {"w": sample(dtype), "scalar": sample(dtype)[0, 0].clone(), "none": sample(dtype)[:0].clone()}
    save_file(expected, tmp_path / "model.safetensors", metadata={"format": "pt"})
    manifest = open_checkpoint(tmp_path / "model.safetensors")
    assert_holds(manifest, expected)
    assert manifest.values == {"__metadata__.format": "pt"}


def test_safetensors_whose_data_is_not_aligned_is_read(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    header = {"w": f32([2, 3], 0, 24), "b": f32([3], 24, 30, "BF16")}
    data = bytes(bytes_of(values)) + bytes(range(6))
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, data, odd=True))
    assert open_checkpoint(path).tensors["w"].offset % 4
    halves = torch.tensor(list(range(6)), dtype=torch.uint8).view(torch.bfloat16)
    assert_holds(open_checkpoint(path), {"w": values, "b": halves})


def test_safetensors_without_tensors_is_empty(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").tensors == {}


# ---- folders -----------------------------------------------------------------------------------------------


def test_a_folder_with_a_file_a_tensor_is_read(tmp_path):
    state = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).state_dict()
    for name, tensor in state.items():
        torch.save(tensor, tmp_path / f"{name}.pt")
    manifest = open_checkpoint(tmp_path)
    assert manifest.format == "tensor_folder"
    assert_holds(manifest, dict(sorted(state.items())))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_from_the_hub_is_read_by_its_one_file(name, tmp_path):
    (save_file if name.endswith("safetensors") else torch.save)({"w": torch.arange(3.0)}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    manifest = open_checkpoint(tmp_path)
    assert manifest.path == tmp_path / name
    assert_holds(manifest, {"w": torch.arange(3.0)})


def test_safetensors_are_preferred_to_a_pickle_in_the_same_folder(tmp_path):
    save_file({"w": torch.arange(3.0)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).format == "safetensors"


FOLDER_DAMAGES = {
    "empty": (lambda path: path.mkdir(), "without weights.*found nothing"),
    "without weights": (lambda path: fill(path, "README.md", b"hello"), "without weights.*found README.md"),
    "an empty file": (lambda path: fill(path, "w.pt", b""), "w.pt: is empty"),
    "an empty Hub file": (lambda path: fill(path, "pytorch_model.bin", b""), "is empty"),
    "truncated": (lambda path: fill(path, "w.pt", saved(torch.ones(9))[:-9]), "truncated or damaged"),
}


def fill(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir()
    (folder / name).write_bytes(data)


@pytest.mark.parametrize(("damage", "message"), FOLDER_DAMAGES.values(), ids=FOLDER_DAMAGES)
def test_a_bad_folder_is_a_checkpoint_error(damage, message, tmp_path):
    damage(tmp_path / "folder")
    assert_refused(tmp_path / "folder", message)


# ---- damaged and foreign zips ------------------------------------------------------------------------------


class Program(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@dataclass
class TrainingConfig:
    n_head: int = 12


def flag_entries(flag: int) -> Damage:
    """Set a flag in the directory of a sound file."""

    def write(path: Path) -> None:
        data = bytearray(small())
        at = data.index(b"PK\x01\x02")
        data[at + 8] |= flag
        path.write_bytes(data)

    return write


def deflated(path: Path) -> None:
    write_zip(path, entries_of(small()), zipfile.ZIP_DEFLATED)


def duplicated(path: Path) -> None:
    info = [zipfile.ZipInfo("archive/data.pkl"), zipfile.ZipInfo("archive/dataxpkl")]
    with zipfile.ZipFile(path, "w") as archive:
        for entry in info:
            archive.writestr(entry, b"")
    path.write_bytes(path.read_bytes().replace(b"dataxpkl", b"data.pkl"))


def moved_entry(path: Path) -> None:
    """The directory says that the first storage begins where the second does."""
    data = saved([torch.zeros(4), torch.ones(4)])
    with zipfile.ZipFile(BytesIO(data)) as archive:
        first, second = (archive.getinfo(f"archive/data/{i}").header_offset for i in (0, 1))
    head, directory = data[: data.index(b"PK\x01\x02")], data[data.index(b"PK\x01\x02") :]
    path.write_bytes(head + directory.replace(struct.pack("<I", first), struct.pack("<I", second)))


def before_the_file(path: Path) -> None:
    """The directory claims to lie later than it does, so that the first entry would begin before byte 0."""
    rewritten()(path)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    location = struct.unpack_from("<I", data, end + 16)[0]
    struct.pack_into("<I", data, end + 16, location + 1000)
    path.write_bytes(data)


def past_the_file(path: Path) -> None:
    """An offset that no file reaches, and no system call takes."""
    rewritten()(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.getinfo("archive/data/0").header_offset = 2**63 - 40
        archive.comment = b"changed"  # so that the directory is written again


def future_zip(path: Path) -> None:
    data = bytearray(small())
    data[data.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(data)


def damaged_pickle(path: Path) -> None:
    data = small()
    path.write_bytes(data.replace(b"step", b"stop", 1))


def large_byteorder(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled({}))
        archive.writestr("archive/byteorder", "little")
        archive.getinfo("archive/byteorder").file_size = archive.start_dir = HUGE


def raw(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data)


def build_on(module_and_name: bytes, state: bytes) -> Damage:
    """GLOBAL, a state, BUILD: what __setstate__ would be called by."""
    return zip_of(b"\x80\x02c" + module_and_name + state + b"b.")


ZIP_DAMAGES = {
    "empty": (raw(b""), "is empty"),
    "zeros": (raw(bytes(4096)), r"begins with b'\\x00"),
    "text": (raw(b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "signature only": (raw(b"PK\x03\x04"), "no valid zip directory"),
    "cut in the middle": (lambda path: path.write_bytes(small()[:500]), "truncated or damaged"),
    "last byte missing": (lambda path: path.write_bytes(small()[:-1]), "truncated or damaged"),
    "deflated": (deflated, "compressed or encrypted"),
    "encrypted": (flag_entries(1), "compressed or encrypted"),
    "TorchScript": (
        rewritten(constants_pkl=b"", code____torch___py=b"", data_pkl=b""),
        "TorchScript program",
    ),
    "without data.pkl": (rewritten(data_pkl=None), "a zip without data.pkl"),
    "not torch's": (lambda path: write_zip(path, {"a.txt": b"", "b.txt": b""}), "a zip without data.pkl"),
    "big-endian": (rewritten(byteorder=b"big"), "other byte order, b'big'"),
    "two data.pkl": (duplicated, "two entries of one name"),
    "entry of another name": (moved_entry, "archive/data/0 does not begin where the zip directory says"),
    "entry before the file": (
        before_the_file,
        "archive/data.pkl does not begin where the zip directory says",
    ),
    "entry past the file": (past_the_file, "archive/data/0 does not begin where the zip directory says"),
    "version of the future": (future_zip, "no valid zip directory.*NotImplementedError"),
    "large byteorder": (large_byteorder, "its byteorder is larger than"),
    "damaged pickle": (damaged_pickle, "its data.pkl is truncated or damaged"),
    "bare pickle": (raw(pickle.dumps({"w": [1, 2]})), "a bare pickle"),
    "empty pickle": (zip_of(b""), "its pickle is damaged"),
    "pickle without an end": (zip_of(pickled({"a": 1})[:-1]), "its pickle is damaged"),
    "unknown opcode": (zip_of(b"\x80\x02\xff."), "its pickle is damaged"),
    "a buffer of 2**40 bytes": (zip_of(b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."), "is damaged"),
    "extension": (zip_of(b"\x80\x02\x82\x01."), "its pickle is damaged"),
    "setstate of ours": (build_on(b"torch._utils\n_rebuild_tensor_v2\n", b"]q\x00K\x00a"), "tries to modify"),
    "attributes of ours": (build_on(b"torch\nSize\n", b"}(U\x05buildK\x00u"), "tries to modify"),
    "items of ours": (build_on(b"torch\nfloat32\n", b"N}U\x01aK\x00s\x86"), "tries to modify"),
    "setting an item of ours": (zip_of(b"\x80\x02ctorch\nSize\nK\x00K\x01s."), "tries to modify"),
    "calling what is no function": (zip_of(b"\x80\x02K\x01)R."), "its pickle is damaged"),
    "another persistent id": (zip_of_tensor(Stored(tag="module")), "which is not a storage"),
    "negative storage": (zip_of_tensor(Stored(numel=-6)), "which is not a storage"),
    "flag for a storage size": (zip_of_tensor(Stored(numel=2**62)), "which is not a storage"),
    "key that is no string": (zip_of_tensor(Stored(key=nest(1, 22))), "which is not a storage"),
    "past its storage": (zip_of_tensor(Stored(), 1), "w reaches past the end of its storage 0"),
    "past its own part": (zip_of_tensor(Stored(numel=3)), "w reaches past the end of its storage 0"),
    "strides past its storage": (zip_of_tensor(None, 0, (2, 3), (4, 1)), "reaches past the end"),
    "negative size": (zip_of_tensor(None, 0, (2, -3), (3, 1)), r"shape \(2, -3\).*no tensor can have"),
    "negative stride": (zip_of_tensor(None, 0, (2, 3), (-3, 1)), r"strides \(-3, 1\)"),
    "negative offset": (zip_of_tensor(None, -1), "offset -1"),
    "flag for an offset": (zip_of_tensor(None, True), "offset True"),
    "fraction for a size": (zip_of_tensor(None, 0, (2, 3.0), (3, 1)), r"shape \(2, 3.0\)"),
    "size of 5,000 digits": (zip_of_tensor(None, 0, (2, 10**5000), (3, 1)), "shape <tuple>"),
    "sizes that overflow": (zip_of_tensor(None, 0, (2**40, 2**40), (0, 0)), "no tensor can have"),
    "empty, sizes that overflow": (
        zip_of_tensor(None, 0, (0, 2**62, 2**62), (0, 0, 0)),
        "no tensor can have",
    ),
    "a thousand axes": (zip_of_tensor(None, 0, (1,) * 1000, (1,) * 1000), "no tensor can have"),
    "fewer strides than sizes": (zip_of_tensor(None, 0, (2, 3), (1,)), "no tensor can have"),
    "shape that is no tuple": (zip_of_tensor(None, 0, [2, 3], (3, 1)), r"shape \[2, 3\]"),
    "shape that is a nest": (zip_of_tensor(None, 0, nest(1, 22), (3, 1)), "shape <list>"),
    "too few arguments": (zip_of(pickled(Call(torch._utils._rebuild_tensor_v2, 1))), "its pickle is damaged"),
    "holds itself": (zip_of(pickled(cyclic())), "more than 32 levels"),
    "a thousand levels": (zip_of(b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b"."), "more than 32 levels"),
    "billion laughs": (zip_of(pickled(nest(1, 29))), "values take over 16 MiB; not weights"),
    "billion silences": (zip_of(pickled(nest([], 29))), "names of tensors and values take over 16 MiB"),
    "long name": (zip_of(pickled({"x" * 2000: [1] * 100})), "names of 1000 characters"),
    "one name twice": (zip_of(pickled({"a": {"b": 1}, "a.b": 2})), "the name 'a.b' occurs twice"),
}


# What is described and does nothing: no tensors, no values.
INERT = {
    "a set": zip_of(pickled({"w": {1, 2}}, 4)),
    "a config object": zip_of(pickled({"config": Stored}, 4)),
    "a set of lying nests": zip_of(pickled({"w": [Call(set, [nest(1, 22, tuple)])]})),
    "allowed name, wrong module": zip_of(b"\x80\x02cos\nOrderedDict\n)R."),
    "storage, wrong module": zip_of(b"\x80\x02cos\nFloatStorage\n."),
    "dtype, wrong module": zip_of(b"\x80\x02cos\nfloat32\n."),
    "torch, no dtype": zip_of(b"\x80\x02ctorch\nload\n."),
    "torch, imported lazily": zip_of(b"\x80\x02ctorch\n_dynamo\n."),
    "dotted": zip_of(b"\x80\x04\x8c\x05torch\x8c\x0eSize.__class__\x93."),
    "an instance of protocol 0": zip_of(b"(S'true'\nios\nsystem\n."),
    "an instance of protocol 1": zip_of(b"(cos\nsystem\nS'true'\no."),
    "nest for a key": zip_of(pickled({nest(1, 22, tuple): 1})),
    "nest for an ordered key": zip_of(pickled(Call(OrderedDict, [[nest(1, 22, tuple), 1]]))),
    "nest for a key of protocol 0": zip_of(b"(" + pickled(nest(1, 22, tuple), 0)[:-1] + b"I1\nd."),
    "key of 5,000 digits": zip_of(pickled({10**5000: 1})),
}


@pytest.mark.parametrize("write", INERT.values(), ids=INERT)
def test_what_is_not_known_is_described_and_gives_nothing(write, tmp_path):
    write(tmp_path / "model.pth")
    found = open_checkpoint(tmp_path / "model.pth")
    assert (found.tensors, found.unreadable) == ({}, {})
    assert all(isinstance(value, Unread) for value in found.values.values())  # a description, no value


NOT_READ = {
    "tensor on a number": (zip_of_tensor(5), "built on 5, not on a storage"),
    "tensor on a nest": (zip_of_tensor(nest(1, 22)), "built on <list>, not on a storage"),
    "storage missing": (zip_of_tensor(Stored(key="1")), "needs data/1 of 24 bytes, which is missing"),
    "storage elsewhere": (zip_of_tensor(Stored(key="../byteorder")), "which is missing"),
    "storage too short": (zip_of_tensor(Stored(numel=7)), "needs data/0 of 28 bytes, which has 24"),
    "storage too long": (zip_of_tensor(Stored(numel=5), 0, (1, 3)), "needs data/0 of 20 bytes, which has 24"),
    "conjugated": (zip_of_tensor(None, 0, (2, 3), (3, 1), {"conj": True}), "conjugated or negated"),
}


@pytest.mark.parametrize(("write", "reason"), NOT_READ.values(), ids=NOT_READ)
def test_a_tensor_that_is_not_read_says_why(write, reason, tmp_path):
    write(tmp_path / "model.pth")
    found = open_checkpoint(tmp_path / "model.pth")
    assert not found.tensors
    assert reason in found.unreadable["w"]


@pytest.mark.parametrize(("damage", "message"), ZIP_DAMAGES.values(), ids=ZIP_DAMAGES)
def test_a_bad_zip_is_a_checkpoint_error(damage, message, tmp_path):
    damage(tmp_path / "model.pth")
    assert_refused(tmp_path / "model.pth", message)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
def test_a_scripted_module_is_a_checkpoint_error(tmp_path):
    torch.jit.script(Program()).save(tmp_path / "program.pt")
    assert_refused(tmp_path / "program.pt", "TorchScript program")


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder") as caught:
        open_checkpoint(tmp_path / "model.pth")
    assert isinstance(caught.value, FileNotFoundError)


def test_the_damages_are_of_a_sound_file(tmp_path):
    """Else a row above could pass for another reason than its own."""
    rewritten()(tmp_path / "m.pth")
    assert_holds(open_checkpoint(tmp_path / "m.pth"), {"w": torch.arange(6.0).reshape(2, 3)})
    zip_of_tensor()(tmp_path / "m.pth")
    assert_holds(open_checkpoint(tmp_path / "m.pth"), {"w": torch.arange(6.0).reshape(2, 3)})


def payloads(mark: Path) -> dict[str, Call]:
    return {
        "os.system": Call(os.system, f"touch '{mark}'"),
        "open": Call(open, str(mark), "w"),
        "exec": Call(exec, f"import pathlib; pathlib.Path({str(mark)!r}).touch()"),
        "method": Call(getattr(mark, "touch")),  # noqa: B009 - a bound method, pickled as a getattr
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("key", payloads(Path()))
def test_a_pickle_that_wants_to_run_code_does_not_run(key, protocol, tmp_path):
    mark = tmp_path / "ran"
    data = pickled({"w": payloads(mark)[key]}, protocol)
    opened = pickle.loads(data)["w"]
    assert mark.exists(), "a payload that works"
    if hasattr(opened, "close"):
        opened.close()
    mark.unlink()
    zip_of(data)(tmp_path / "model.pth")
    found = open_checkpoint(tmp_path / "model.pth")
    assert found.tensors == {}
    assert all(isinstance(value, Unread) for value in found.values.values())
    assert not mark.exists()


def test_attributes_of_a_state_dict_do_not_reach_the_reader(tmp_path):
    """`_metadata` is harmless; an attribute `items` would take the place of the method."""
    state = Call(OrderedDict)
    state.call += {"items": 5}, None, iter([("w", a_tensor())])
    zip_of(pickled(state))(tmp_path / "m.pth")
    assert list(open_checkpoint(tmp_path / "m.pth").tensors) == ["w"]


def test_a_large_memo_index_takes_no_memory(tmp_path):
    zip_of(b"\x80\x02}r\xff\xff\xff\x00.")(tmp_path / "m.pth")
    tracemalloc.start()
    open_checkpoint(tmp_path / "m.pth")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_a_zip_cut_anywhere_is_a_checkpoint_error(tmp_path):
    data = saved({"w": torch.arange(600.0), "b": torch.ones(7)})
    for size in range(0, len(data), len(data) // 60):
        (tmp_path / "m.pth").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"is empty|begins with|truncated or damaged"):
            open_checkpoint(tmp_path / "m.pth")


def opens_soundly_or_not_at_all(path: Path) -> bool:
    """Whether it opens; if so, every tensor can be read."""
    try:
        manifest = open_checkpoint(path)
    except CheckpointError:
        return False
    for span in manifest.tensors.values():
        read_span(span)
    map_tensors(manifest.tensors.values())
    return True


def flips(data: bytes, places: range) -> Iterator[bytes]:
    for at in places:
        if data[at - 1 : at + 2] == b"ZZZ":  # torch's padding
            continue
        for mask in (0x01, 0xFF):
            yield data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def test_a_flipped_byte_in_a_zip_is_a_checkpoint_error_or_harmless(tmp_path, without_crc):
    """Without checksums, so that the flips reach the unpickler."""
    data = small()
    outcomes = set()
    for flipped in flips(data, range(len(data))):
        (tmp_path / "m.pth").write_bytes(flipped)
        outcomes.add(opens_soundly_or_not_at_all(tmp_path / "m.pth"))
    assert outcomes == {True, False}


def test_a_flipped_byte_in_a_pickle_with_its_checksum_is_noticed(tmp_path):
    data = small()
    begin = data.index(b"\x80\x02")
    for flipped in flips(data, range(begin, data.index(b".PK", begin))):
        (tmp_path / "m.pth").write_bytes(flipped)
        assert_refused(tmp_path / "m.pth", "its data.pkl is truncated or damaged")


# ---- damaged safetensors -----------------------------------------------------------------------------------


def st(header: object, data: bytes = b"") -> Damage:
    return raw(safetensors_bytes(header, data))


W = f32([2], 0, 8)
DATA = bytes(8)
SAFETENSORS_DAMAGES = {
    "longer header than file": (
        raw((1000).to_bytes(8, "little") + b"{}"),
        "a header of 1000 bytes in a file of",
    ),
    "header over the limit": (raw((100_000_001).to_bytes(8, "little") + b"{}"), "a header of 100000001"),
    "header of 2**64 - 1": (raw(b"\xff" * 8 + b"{}"), "a header of 18446744073709551615"),
    "not JSON": (st(b'{"w": '), "not valid JSON"),
    "not UTF-8": (st(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (st(b'{"w": ' + b"[" * 100_000), "not valid JSON"),
    "duplicate key": (st(b'{"w": 1, "w": 2}'), "a key occurs twice"),
    "number of 5,000 digits": (st(b'{"w": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "header is a list": (raw(safetensors_bytes([1, 2])), "begins with"),
    "entry is a list": (st({"w": [1]}, DATA), "not dtype, shape, offsets"),
    "no shape": (st({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA), "not dtype, shape, offsets"),
    "three offsets": (st({"w": W | {"data_offsets": [0, 4, 8]}}, DATA), "not dtype, shape, offsets"),
    "offsets as text": (st({"w": f32([2], "0", "8")}, DATA), "not dtype, shape, offsets"),
    "flag for a size": (st({"w": f32([2, True], 0, 8)}, DATA), "not dtype, shape, offsets"),
    "fraction for a size": (st({"w": f32([2.0], 0, 8)}, DATA), "not dtype, shape, offsets"),
    "negative size": (st({"w": f32([-2], 0, 8)}, DATA), "not dtype, shape, offsets"),
    "negative offset": (st({"w": f32([2], -8, 0)}, DATA), "not dtype, shape, offsets"),
    "NaN for an offset": (st({"w": f32([2], float("nan"), 8)}, DATA), "not dtype, shape, offsets"),
    "size of 4,000 digits": (st({"w": f32([10**4000, 10**4000], 0, 8)}, DATA), "not dtype, shape, offsets"),
    "a thousand axes": (st({"w": f32([1] * 1000, 0, 4)}, bytes(4)), "not dtype, shape, offsets"),
    "sizes that overflow": (st({"w": f32([2**40, 2**40], 0, 8)}, DATA), "more bytes than can be counted"),
    "empty, sizes that overflow": (st({"w": f32([0, 2**62, 2**62], 0, 0)}), "more bytes than can be counted"),
    "unknown dtype, gap": (st({"w": f32([2], 4, 12, "F33")}, bytes(12)), "w begins at byte .*, expected at"),
    "unknown dtype, same bytes": (st({"v": W, "w": f32([2], 0, 8, "F33")}, DATA), "w begins at byte 0"),
    "unknown dtype, ends before it begins": (st({"w": f32([2], 8, 0, "F33")}, DATA), "takes -8 bytes"),
    "too few bytes for its shape": (
        st({"w": f32([3], 0, 8)}, DATA),
        r"takes 8 bytes, .* needs 12",
    ),
    "ends before it begins": (st({"w": f32([2], 8, 0)}, DATA), "takes -8 bytes"),
    "overlap": (st({"v": W, "w": f32([2], 4, 12)}, bytes(12)), "w begins at byte .*, expected at"),
    "same bytes twice": (st({"v": W, "w": W}, DATA), "w begins at byte .*, expected at"),
    "gap": (st({"v": W, "w": f32([2], 12, 20)}, bytes(20)), "w begins at byte .*, expected at"),
    "gap before the first": (st({"w": f32([2], 4, 12)}, bytes(12)), "w begins at byte .*, expected at"),
    "trailing bytes": (st({"w": W}, bytes(9)), "its tensors end at byte 8 of 9"),
    "truncated": (st({"w": W}, bytes(7)), "truncated or damaged"),
    "long name": (st({"x" * 2000: W}, DATA), "a name longer than 1000 characters"),
}


@pytest.mark.parametrize(("damage", "message"), SAFETENSORS_DAMAGES.values(), ids=SAFETENSORS_DAMAGES)
def test_bad_safetensors_are_a_checkpoint_error(damage, message, tmp_path):
    damage(tmp_path / "model.safetensors")
    assert_refused(tmp_path / "model.safetensors", message)


def test_a_dtype_that_torch_lacks_is_listed_and_the_rest_is_read(tmp_path):
    st({"w": W, "new": f32([4], 8, 10, "F4")}, bytes(10))(tmp_path / "m.safetensors")
    found = open_checkpoint(tmp_path / "m.safetensors")
    assert_holds(found, {"w": torch.zeros(2)})
    assert list(found.unreadable) == ["new"]
    assert "has dtype F4" in found.unreadable["new"]


def test_the_safetensors_that_are_damaged_are_sound(tmp_path):
    st({"w": W}, DATA)(tmp_path / "m.safetensors")
    assert_holds(open_checkpoint(tmp_path / "m.safetensors"), {"w": torch.zeros(2)})


def test_safetensors_cut_anywhere_are_a_checkpoint_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(600.0), "b": torch.ones(7)}, path)
    data = path.read_bytes()
    for size in range(0, len(data), len(data) // 60):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"is empty|begins with|truncated"):
            open_checkpoint(path)


def test_a_flipped_byte_in_safetensors_is_a_checkpoint_error_or_harmless(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(6.0), "b": torch.ones(7)}, path, metadata={"format": "pt"})
    data = path.read_bytes()
    outcomes = set()
    for flipped in flips(data, range(8 + int.from_bytes(data[:8], "little"))):
        path.write_bytes(flipped)
        outcomes.add(opens_soundly_or_not_at_all(path))
    assert outcomes == {True, False}


# ---- what opening costs ------------------------------------------------------------------------------------


def large_safetensors(path: Path) -> None:
    path.write_bytes(safetensors_bytes({"w": f32([HUGE // 4], 0, HUGE)}))
    os.truncate(path, path.stat().st_size + HUGE)


def large_zip(path: Path) -> None:
    """As if 2 GiB of zeros had been written, without writing them."""
    with zipfile.ZipFile(path, "w") as archive:
        stored = Stored(numel=HUGE // 4)
        archive.writestr("archive/data.pkl", pickled({"w": a_tensor(stored, 0, (HUGE // 4,), (1,))}))
        archive.writestr("archive/data/0", b"")
        info = archive.getinfo("archive/data/0")
        info.file_size = info.compress_size = HUGE
        archive.start_dir += HUGE


LARGE = {"safetensors": large_safetensors, "zip": large_zip}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_opening_allocates_no_tensor(make, tmp_path):
    make(tmp_path / "large")
    tracemalloc.start()
    manifest = open_checkpoint(tmp_path / "large")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest.tensors["w"].nbytes == HUGE
    assert peak < 1e6


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="needs /proc/self/io to count bytes read")
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_opening_reads_no_tensor(make, tmp_path):
    make(tmp_path / "large")
    before = bytes_read()
    open_checkpoint(tmp_path / "large")
    assert 0 < bytes_read() - before < 1e6


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_mapping_reads_what_is_touched_beyond_2_gib(make, tmp_path):
    make(tmp_path / "large")
    span = open_checkpoint(tmp_path / "large").tensors["w"]
    with open(tmp_path / "large", "r+b") as file:
        file.seek(span.offset + HUGE - 4)
        file.write(struct.pack("<f", 2.5))
    assert map_tensors([span])["w"][-1] == 2.5
    last = replace(span, shape=(1,), offset=span.offset + HUGE - 4)
    assert read_span(last).item() == 2.5


# ---- files that change -------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> Manifest:
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "m.pth")
    return open_checkpoint(tmp_path / "m.pth")


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    os.replace(path.with_suffix(".new"), path)


CHANGES = {
    "replaced": replaced,
    "truncated": lambda path: os.truncate(path, 1000),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changed_is_noticed(change, opened):
    opened.check_unchanged()
    change(opened.path)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        opened.check_unchanged()


def test_a_file_that_went_away_is_noticed(opened):
    opened.path.unlink()
    with pytest.raises(CheckpointNotFoundError, match="no such file"):
        opened.check_unchanged()


def test_one_changed_file_of_a_folder_is_noticed(tmp_path):
    for name in "ab":
        torch.save(torch.ones(2), tmp_path / f"{name}.pt")
    manifest = open_checkpoint(tmp_path)
    replaced(tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"b\.pt: changed while it was being read"):
        manifest.check_unchanged()


def test_reading_past_the_end_is_a_checkpoint_error(opened):
    span = opened.tensors["w"]
    os.truncate(opened.path, span.offset + 100)
    with pytest.raises(CheckpointError, match=f"ends at byte {span.offset + 100}; it was truncated"):
        read_span(span)
    with pytest.raises(CheckpointError, match="ends before w; it was truncated"):
        map_tensors([span])


def test_exposed_memory_outlives_its_tensor_s_name():
    exposed = memory_of(torch.full((1 << 20,), 7, dtype=torch.uint8))
    others = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(4)]
    assert set(exposed[:: 1 << 10]) == {7}
    assert len(others) == 4


def test_what_torch_load_refuses_is_a_checkpoint_error(opened):
    opened.path.write_bytes(small()[:300])
    with pytest.raises(CheckpointError, match=r"torch\.load refuses it"):
        read_tensors(opened, ["w"], CPU)
