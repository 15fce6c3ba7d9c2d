"""Attacks on files of models that were published, each with where it is from: none runs, none hangs.

What scanners list as dangerous is here as names, one of each module; what got past `weights_only`, past a
scanner, or into a parser, as files of our own making that have the property that was described.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from formats import opens
from watching import faults

from gpt2lite import CheckpointError
from gpt2lite.checkpoint import open_checkpoint

PICKLESCAN = "PickleScan, _unsafe_globals (github.com/mmaitre314/picklescan)"
MODELSCAN = "ModelScan, unsafe_globals (github.com/protectai/modelscan)"
GLOBALS: dict[str, str] = {
    MODELSCAN: """__builtin__.eval __builtin__.compile __builtin__.getattr __builtin__.apply __builtin__.exec
        __builtin__.open __builtin__.breakpoint __builtin__.__import__ builtins.eval builtins.compile
        builtins.getattr builtins.exec builtins.open builtins.breakpoint builtins.__import__
        runpy._run_code os.system nt.system posix.system socket.create_connection subprocess.Popen sys.exit
        operator.attrgetter pty.spawn pickle.loads webbrowser.open httplib.HTTPSConnection requests.api.get
        aiohttp.client.request""",
    PICKLESCAN: """aiohttp.request asyncio.run bdb.Bdb.run commands.getoutput ctypes.CDLL functools.partial
        numpy.f2py.compile numpy.testing._private.utils.runstring operator.itemgetter operator.methodcaller
        shutil.rmtree ssl.get_server_certificate code.InteractiveInterpreter.runcode cProfile.run
        distutils.file_util.write_file doctest.debug_script ensurepip._run_pip
        idlelib.autocomplete.AutoComplete.get_entity idlelib.calltip.get_entity
        idlelib.debugobj.ObjectTreeItem.SetText idlelib.pyshell.ModifiedInterpreter.runcode
        idlelib.run.Executive.runcode lib2to3.pgen2.grammar.Grammar.loads
        lib2to3.pgen2.pgen.ParserGenerator.make_label pdb.run _pickle.loads pip.main profile.Profile.run
        pydoc.pipepager timeit.timeit torch._dynamo.guards.GuardBuilder.get
        torch._inductor.codecache.compile_file
        torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
        torch.jit.unsupported_tensor_ops.execWrapper torch.serialization.load
        torch.utils._config_module.ConfigModule.load_config torch.utils.bottleneck.__main__.run_cprofile
        torch.utils.collect_env.run torch.utils.data.datapipes.utils.decoder.basichandlers trace.Trace.run
        venv.create""",
    # A class of a module below one that is listed, which a comparison of whole names missed.
    "CVE-2025-10157": "asyncio.unix_events._UnixSubprocessTransport._start",
    "CVE-2025-1716": "pip.main",
}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(name: str) -> list[tuple[str, str]]:
    """(module, attribute) in each way that a dotted name can be divided."""
    parts = name.split(".")
    return [(".".join(parts[:at]), ".".join(parts[at:])) for at in range(1, len(parts))]


def called(name: str, mark: Path) -> list[bytes]:
    """Pickles that call a name in each of the ways that the format has."""
    found, argument = [], text(f"touch '{mark}'")
    for module, attribute in named(name):
        plain = f"c{module}\n{attribute}\n".encode()
        on_stack = text(module) + text(attribute) + b"\x93"
        found += [
            b"\x80\x02" + plain + b"(" + argument + b"tR.",
            b"\x80\x04" + on_stack + argument + b"\x85R.",
        ]
        found += [
            b"\x80\x02" + plain + argument + b"\x85\x81.",
            b"\x80\x02" + plain + b")\x81" + argument + b"b.",
        ]
        found += [f"(S'touch {mark}'\ni{module}\n{attribute}\n.".encode(), b"(" + plain + argument + b"o."]
        found += [b"\x80\x02}" + text("w") + plain + argument + b"\x85Rs0" + plain + argument + b"\x85R\xff"]
    return found


def zipped(pickled: bytes, **entries: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", **entries}.items():
            archive.writestr(f"archive/{name}", data)
    return content.getvalue()


@pytest.mark.parametrize("source", GLOBALS)
def test_no_name_that_a_scanner_lists_is_called_or_imported(source: str, tmp_path: Path):
    path, mark = tmp_path / "model.pth", tmp_path / "ran"
    for name in GLOBALS[source].split():
        for pickled in called(name, mark):
            path.write_bytes(zipped(pickled))
            before = set(sys.modules)
            assert faults(opens("model.pth"), tmp_path, path.stat().st_size) == [], (name, pickled)
            assert {module for module, _ in named(name)} & (set(sys.modules) - before) == set()
            assert not mark.exists(), (name, pickled)


# ---- files -------------------------------------------------------------------------------------------------

PAYLOAD = b"\x80\x02cposix\nsystem\n" + text("touch ran") + b"\x85R."
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK%ctQK\x00K%c\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)


def a_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(PAYLOAD)
            archive.addfile(entry, io.BytesIO(PAYLOAD))
    return content.getvalue()


def changed(content: bytes, mark: bytes, at: int, new: bytes) -> bytes:
    """With other bytes so far behind the first mark."""
    begin = content.index(mark) + at
    return content[:begin] + new + content[begin + len(new) :]


def packed(**entries: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {"data.pkl": PAYLOAD, **entries}.items():
            archive.writestr(f"archive/{name}", data)
    return content.getvalue()


def overlapping() -> bytes:
    """All entries of the directory are the same bytes of the file."""
    content = zipped(b"\x80\x02N.", a=b"0" * 1000, b=b"1" * 1000)
    directory = content.index(b"PK\x01\x02")
    entries = content[directory:].split(b"PK\x01\x02")
    same = [entry[:38] + bytes(4) + entry[42:] for entry in entries[1:]]
    return content[:directory] + b"".join(b"PK\x01\x02" + entry for entry in same)


def header(said: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


LOCAL, DIRECTORY = b"PK\x03\x04", b"PK\x01\x02"
SAFETENSORS = "safetensors, attacks/README.md, proposal"
FILES: dict[str, tuple[str, bytes]] = {
    "CVE-2025-32434, torch.load(weights_only=True) of a .tar": ("model.pth", a_tar()),
    "CVE-2026-24747, SETITEMS of a list": ("model.pth", zipped(b"\x80\x02](K\x00K\x01u.")),
    "CVE-2026-24747, SETITEM of a tensor": (
        "model.pth",
        zipped(b"\x80\x02" + TENSOR % (1, 1) + b"K\x00K\x01s.", **{"data/0": bytes(4)}),
    ),
    "CVE-2026-24747, a storage larger than its entry": (
        "model.pth",
        zipped(b"\x80\x02}" + text("w") + TENSOR % (100, 100) + b"s.", **{"data/0": bytes(4)}),
    ),
    "CVE-2025-1889, a pickle under another suffix": ("model.safetensors", PAYLOAD),
    "CVE-2025-1944, another name in the entry's own header": (
        "model.pth",
        changed(zipped(PAYLOAD), LOCAL, 30, b"archive/none.pkl"),
    ),
    "CVE-2025-1945, flags of an encrypted entry": (
        "model.pth",
        changed(zipped(PAYLOAD), DIRECTORY, 8, b"\1"),
    ),
    "CVE-2025-10155, a bare pickle under torch's suffix": ("model.bin", PAYLOAD),
    "CVE-2025-10156, a wrong checksum": ("model.pth", changed(zipped(PAYLOAD), DIRECTORY, 16, b"\0\0\0\0")),
    "nullifAI (ReversingLabs 2025), a stream that breaks behind its payload": (
        "model.pth",
        zipped(PAYLOAD[:-1] + b"\xff\xfe"),
    ),
    "nullifAI, a 7z": ("model.pth", b"7z\xbc\xaf\x27\x1c" + bytes(100)),
    "Fickling (Trail of Bits), a pickle before a zip": ("model.pth", PAYLOAD + zipped(b"\x80\x02N.")),
    "Fickling, a zip before a pickle": ("model.pth", zipped(b"\x80\x02N.") + PAYLOAD),
    "A better zip bomb (Fifield 2019), overlapping entries; CVE-2024-0450": ("model.pth", overlapping()),
    "a zip bomb; safetensors, attacks/torch_dos_create.py": (
        "model.pth",
        packed(**{"data/0": bytes(50_000_000)}),
    ),
    f"{SAFETENSORS} 1, a length beyond the file": ("model.safetensors", header(b"{}", length=2**62)),
    f"{SAFETENSORS} 2, a long header": ("model.safetensors", header(b"{" + b" " * 20_000_000 + b"}")),
    f"{SAFETENSORS} 3, negative offsets": ("model.safetensors", header({"w": entry([1], -4, 0)}, bytes(4))),
    f"{SAFETENSORS} 3, offsets out of the file": (
        "model.safetensors",
        header({"w": entry([9], 0, 36)}, bytes(4)),
    ),
    f"{SAFETENSORS} 4, tensors on the same bytes": (
        "model.safetensors",
        header({f"w{i}": entry([1000], 0, 4000) for i in range(1000)}, bytes(4000)),
    ),
    f"{SAFETENSORS} 5, shapes that do not fit": (
        "model.safetensors",
        header({"w": entry([2], 0, 4)}, bytes(4)),
    ),
    f"{SAFETENSORS} 7, deep JSON": ("model.safetensors", header(b'{"w":' * 100_000)),
}


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_a_published_attack_is_a_checkpoint_error(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where the payload would leave its mark
    (tmp_path / name).write_bytes(content)
    assert faults(opens(name), tmp_path, len(content)) == []
    with pytest.raises(CheckpointError, match=str(tmp_path / name)):
        opens(name)(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_payloads_are_pickles(tmp_path: Path):
    for pickled in (*called("os.system", tmp_path)[:-1], PAYLOAD):
        assert [*pickletools.genops(pickled)][-1][0].name == "STOP"
    (tmp_path / "model.pth").write_bytes(zipped(PAYLOAD))
    assert open_checkpoint(tmp_path / "model.pth").tensors == {}
