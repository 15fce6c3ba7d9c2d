"""How a sound file is made bad: each kind by its own structure, so that the bad part is reached."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

SIZES = (0, 1, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
CANARY = b"cposix\nsystem\n(S'touch CANARY'\ntR"  # what must not run
NAMES = ("os system", "builtins eval", "collections OrderedDict", "torch Size", "torch FloatStorage", "a b")


def _deep(levels: int, with_dicts: bool) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"a": found} if with_dicts else [found]
    return found


def _value(random: Random) -> Any:
    """What nobody expects in a JSON value."""
    return random.choice([
        None, True, False, [], {}, "", 0, -1, 1, 2, 0.5, 10**18, 10**30, 10**4000, -0.0, 1e308, float("nan"),
        float("inf"), "\x1b[31m\x07", "\ud800", "x" * 5000, "gpt2", "../..", "/dev/zero", "a\nb", [1, [2]],
        [[]] * 50, {"": {}}, {"a": {"n_heads": 3}}, _deep(100, True), _deep(70, False), ["a", "b", "c"],
        "1", [0, 1],
    ])  # fmt: skip


def of_bytes(data: bytes, random: Random) -> bytes:
    """A byte, a number, a cut or a repetition somewhere."""
    at, raw = random.randrange(len(data) + 1), bytearray(data)
    match random.randrange(7):
        case 0:
            raw[at : at + 1] = bytes([random.randrange(256)])
        case 1:
            return bytes(raw[:at])
        case 2:
            raw[at : at + random.choice([1, 2, 4, 8, 100])] = b""
        case 3:
            raw[at : at + 4] = struct.pack("<I", random.choice(SIZES) & 0xFFFFFFFF)
        case 4:
            raw[at : at + 8] = struct.pack("<Q", random.choice(SIZES))
        case 5:
            raw[at:at] = raw[at : at + random.choice([1, 4, 50, 1000])] * random.choice([1, 2, 50])
        case _:
            for _ in range(random.randrange(1, 9)):
                place = random.randrange(len(raw) + 1)
                raw[place : place + 1] = bytes(
                    byte ^ 1 << random.randrange(8) for byte in raw[place : place + 1]
                )
    return bytes(raw)


def of_head(data: bytes, random: Random) -> bytes:
    """The same among the first bytes, or one of the first numbers."""
    if random.random() < 0.4:
        return of_bytes(data[:1024], random) + data[1024:]
    at = 4 * random.randrange(16)
    number = random.choice([*SIZES, random.randrange(2000)]) & 0xFFFFFFFF
    return data[:at] + struct.pack("<I", number) + data[at + 4 :]


def of_lines(data: bytes, random: Random) -> bytes:
    """Lines that are doubled, exchanged, taken away, or spoiled."""
    lines = data.split(b"\n")
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(6):
        case 0:
            lines[at], lines[other] = lines[other], lines[at]
        case 1:
            del lines[at]
        case 2:
            lines.insert(at, lines[other])
        case 3:
            lines[at] = of_bytes(lines[at], random)
        case 4:
            lines[at] = json.dumps(_value(random)).encode()
        case _:
            return of_bytes(data, random)
    return b"\n".join(lines)


def _paths(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys]
    return found


def of_json(data: bytes, random: Random) -> bytes:
    """A value or key of it, or of its text: twice a key, 5,000 digits, a nest that has no end."""
    if random.random() < 0.15:
        return of_bytes(data, random)
    tree = json.loads(data)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        paths = _paths(tree)
        if not paths:
            break
        node, key = random.choice(paths)
        match random.randrange(6):
            case 0 if isinstance(node, dict):
                del node[key]
            case 1 if isinstance(node, dict):
                node[random.choice(["", "n_heads", "\x1b[2J", "a.b", "x" * 2000])] = node.pop(key)
            case 2:
                other, from_key = random.choice(paths)
                node[key] = json.loads(json.dumps(other[from_key])) if from_key in _keys(other) else None
            case _:
                node[key] = _value(random)
    text = json.dumps(tree)
    match random.randrange(12):
        case 0:
            text = text[:-1] + "," + text[1:-1] + text[-1]
        case 1:
            text = text.replace("2", "2" * 5000, 1)
        case 2:
            text = text[:-1] + ',"deep":' + "[" * 100_000 + text[-1]
        case 3:
            text = text[:-1] + ',"wide":[' + "[]," * 100_000 + "0]" + text[-1]
    return text.encode("utf-8", "surrogatepass")


def _keys(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))


def of_safetensors(data: bytes, random: Random) -> bytes:
    """The header as JSON, with its length made right again; or bytes."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.2:
        return of_head(data, random)
    header = of_json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _opcodes(data: bytes) -> list[bytes]:
    """The opcodes of one pickle or several, each with its argument, as far as they can be told apart."""
    parts, at, file = [], 0, io.BytesIO(data)
    try:
        while at < len(data):
            places = [place for _, _, place in pickletools.genops(file)]
            at = file.tell()
            parts += [data[begin:end] for begin, end in pairwise([*places, at])]
    except ValueError:  # here begins what is no pickle
        pass
    return [*parts, data[at:]] if parts else [data]


def _operation(random: Random) -> bytes:
    """An opcode that could stand anywhere."""
    size = random.choice(SIZES)
    where, name = random.choice(NAMES).split()
    return random.choice([
        CANARY, CANARY, b"]", b"}", b")", b"(", b"0", b"1", b"2", b"R", b"b", b"s", b"u", b"a", b"e", b"t",
        b"Q", b"\x85", b"\x81", b"\x93", b"\x94", b"N", b"\x88", b"K\x05",
        b"G" + struct.pack(">d", float("nan")), b"\x8f", b"\x91",
        b"h" + bytes([random.randrange(256)]), b"j" + struct.pack("<I", size & 0xFFFFFFFF),
        b"q" + bytes([random.randrange(256)]), b"r" + struct.pack("<I", size & 0xFFFFFFFF),
        b"X" + struct.pack("<I", size & 0xFFFFFFFF) + b"a", b"\x8d" + struct.pack("<Q", size),
        b"B" + struct.pack("<I", size & 0xFFFFFFFF), b"\x96" + struct.pack("<Q", size),
        b"\x8b" + struct.pack("<i", size & 0x7FFFFFFF), b"\x8a\x09" + struct.pack("<Qb", size, 0),
        b"J" + struct.pack("<I", size & 0xFFFFFFFF), f"c{where}\n{name}\n".encode(), b"]" * 200_000,
        b"(" * 200_000, b"\x85" * 5000, b")\x81" * 2000, b"ccollections\nOrderedDict\n)R" * 5000,
        b"\x95" + struct.pack("<Q", size),
    ])  # fmt: skip


def of_pickle(data: bytes, random: Random) -> bytes:
    """Opcodes that are left out, doubled, exchanged, put in, or have another argument."""
    parts = _opcodes(data)
    for _ in range(random.choice([1, 1, 2, 4])):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        match random.randrange(7):
            case 0:
                parts[at] = b""
            case 1:
                parts[at], parts[other] = parts[other], parts[at]
            case 2:
                parts[at] += parts[other]
            case 3 if len(parts[at]) > 1:
                parts[at] = parts[at][:1] + of_bytes(parts[at][1:], random)
            case 4 if parts[at][:1] in (b"K", b"M", b"J"):
                parts[at] = b"\x8a\x09" + struct.pack("<Qb", random.choice(SIZES), 0)
            case 5:
                return of_bytes(data, random)
            case _:
                parts[at] += _operation(random)
    return b"".join(parts)


def of_zip(data: bytes, random: Random) -> bytes:
    """One entry by its kind, with its checksum made right again; an entry twice or gone; or bytes."""
    if random.random() < 0.2:
        return of_bytes(data, random)
    if random.random() < 0.2:  # the directory at the end
        cut = data.rfind(b"PK\x01\x02", 0, len(data) - random.randrange(1, 400))
        return data[:cut] + of_bytes(data[cut:], random)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = random.randrange(len(entries))
    pickles = [i for i, (name, _) in enumerate(entries) if name.endswith(".pkl")]
    match random.randrange(8):
        case 0:
            del entries[at]
        case 1:
            entries[at] = of_bytes(entries[at][0].encode(), random).decode("latin-1"), entries[at][1]
        case 2:
            name, content = entries[at]
            is_json = name.endswith(".json")
            entries[at] = name, of_json(content, random) if is_json else of_bytes(content, random)
        case _:
            name, content = entries[pickles[0]]
            entries[pickles[0]] = name, of_pickle(content, random)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two entries of one name
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name or "a"), content)
    return out.getvalue()


MUTATORS: dict[str, Callable[[bytes, Random], bytes]] = {
    "bytes": of_bytes,
    "head": of_head,
    "lines": of_lines,
    "json": of_json,
    "safetensors": of_safetensors,
    "pickle": of_pickle,
    "zip": of_zip,
}
