"""What a pickle names and we do not know is described, never imported, never called."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import importlib
import json
import pathlib
import random
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from llms_from_scratch.ch04 import GPTModel as BookModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lite import GPTConfig, GPTModel
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.manifest import MAX_DEPTH, Unread
from gpt2lite.checkpoint.reading import read_span, read_tensors, sizes_read
from gpt2lite.errors import CheckpointError

CPU = torch.device("cpu")
SMALL = {"vocab_size": 50, "n_embd": 8, "n_layer": 2, "n_head": 2}
BOOK = {
    "vocab_size": 50,
    "context_length": 16,
    "emb_dim": 8,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": True,
}

NANO = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Config:
    block_size: int = 16
    vocab_size: int = 50
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.n_embd = config.n_head, config.n_embd
        self.register_buffer("mask", torch.ones(2, 2), persistent=False)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
"""

# Opens a file where none of its classes can be imported, and loads it in three ways.
OPENING = """
import json, sys
BLOCKED = {"llms_from_scratch", "transformers", "nano_model"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in BLOCKED, f"{name} was imported"
sys.meta_path.insert(0, Blocker())
import torch
from gpt2lite import GPTModel
from gpt2lite.checkpoint import open_checkpoint
from gpt2lite.checkpoint.manifest import MAX_DEPTH, Unread
from gpt2lite.checkpoint.reading import map_tensors, read_span, read_tensors
path, out, config = sys.argv[1:]
found = open_checkpoint(path)
ways = [
    read_tensors(found, found.tensors, torch.device("cpu")),
    map_tensors(found.tensors.values()),
    {name: read_span(span) for name, span in found.tensors.items()},
]
ways += [
    GPTModel.from_checkpoint(path, config=json.loads(config), strategy=name).state_dict()
    for name in ("stream", "mmap", "baseline")
]
torch.save(ways, out)
print(json.dumps([list(found.tensors), dict(found.modules), {k: repr(v) for k, v in found.values.items()}]))
"""


def nano_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    (folder / "nano_model.py").write_text(NANO)
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("nano_model", None)
    module: Any = importlib.import_module("nano_model")
    return module.GPT(module.Config())


WHOLE = {
    "book": lambda *_: BookModel(BOOK),
    "transformers": lambda *_: GPT2LMHeadModel(GPT2Config(n_positions=16, **SMALL)),
    "nanoGPT": nano_model,
    "ours": lambda *_: GPTModel(OURS),
}
FACTS = {
    "book": {"trf_blocks.0.att.num_heads": "2", "drop_emb.p": "0.1", "trf_blocks.1.norm1.eps": "1e-05"},
    "transformers": {
        "config.n_head": "2",
        "config.layer_norm_epsilon": "1e-05",
        "transformer.h.0.attn.num_heads": "2",
        "transformer.h.1.attn.scale_attn_weights": "True",
    },
    "nanoGPT": {
        "config.n_head": "2",
        "transformer.h.1.attn.n_head": "2",
        "transformer.h.0.ln_1.eps": "1e-05",
    },
    "ours": {},
}


OURS = GPTConfig(vocab_size=50, context_length=16, emb_dim=8, n_heads=2, n_layers=2, qkv_bias=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("nested", [False, True], ids=["whole", "in a dict"])
@pytest.mark.parametrize("key", WHOLE)
def test_a_pickled_module_opens_without_its_class_bit_for_bit(key, nested, tmp_path, monkeypatch):
    model = WHOLE[key](tmp_path, monkeypatch)
    prefix = "model." if nested else ""
    torch.save({"model": model, "epoch": 3} if nested else model, tmp_path / "model.pth")
    said = {"n_heads": 2} | ({"activation": "gelu"} if key == "nanoGPT" else {})
    paths = [str(tmp_path / name) for name in ("model.pth", "out.pth")]
    command = [sys.executable, "-c", OPENING, *paths, json.dumps(said)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, modules, values = json.loads(done.stdout)
    state = model.state_dict()
    assert names == [prefix + name for name in state]
    assert modules[prefix.rstrip(".")] == f"{type(model).__module__}.{type(model).__name__}"
    assert {name: values[prefix + name] for name in FACTS[key]} == FACTS[key]
    *read, streamed, mapped, baseline = torch.load(tmp_path / "out.pth", weights_only=True)
    for name, tensor in state.items():
        assert all(torch.equal(bits(way[prefix + name]), bits(tensor)) for way in read), name
    assert streamed.keys() == mapped.keys() == baseline.keys()
    for name, tensor in streamed.items():
        assert all(torch.equal(way[name], tensor) for way in (mapped, baseline)), name
        if key == "ours":
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_every_protocol_gives_the_names_of_state_dict(protocol, as_zip, tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.ModuleDict({"x": nn.Embedding(2, 3)}))
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("unsaved", torch.ones(2), persistent=False)
    model[2].x.weight = nn.Parameter(model[1].weight)
    model.insert(3, model[1])
    torch.save(
        model,
        tmp_path / "model.pth",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=as_zip,
    )
    found = open_checkpoint(tmp_path / "model.pth")
    state = model.state_dict()
    assert list(found.tensors) == list(state)
    assert all(torch.equal(read_span(found.tensors[name]), state[name]) for name in state)
    spans = found.tensors
    assert spans["1.weight"].address == spans["3.weight"].address == spans["2.x.weight"].address
    assert (found.values["0.momentum"], found.values["1.in_features"]) == (0.1, 3)
    assert found.modules["2.x"] == "torch.nn.modules.sparse.Embedding"


# ---- passengers --------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class Config:
    n_head: int = 4
    name: str = "small"


@dataclass(frozen=True, slots=True)
class Slotted:
    n_head: int = 4


class Slots:
    __slots__ = ("__dict__", "n_head")

    def __init__(self) -> None:
        self.n_head, self.depth = 4, 2


class Keyworded:
    def __new__(cls, *, weight: object) -> Keyworded:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, object]]:
        return (), {"weight": torch.ones(1)}


class Attributes(dict):
    """A dict with attributes."""


def scheduler() -> object:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.ones(1)], 0.1), lambda_factor)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will do without it one day
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def lambda_factor(epoch: int) -> float:
    return 0.5


PASSENGERS: dict[str, Any] = {
    "set": {1, "a", (2, 3)},
    "frozenset": frozenset({1}),
    "bytes": b"x",
    "bytearray": bytearray(b"x"),
    "complex": 1j,
    "Counter": collections.Counter("aab"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2]),
    "datetime": datetime.datetime(2024, 5, 1),
    "path": pathlib.PurePosixPath("a/b"),
    "array": numpy.arange(6.0),
    "scalar": numpy.float64(2.5),
    "random state": (random.getstate(), numpy.random.get_state()),
    "generator": numpy.random.default_rng(0),
    "enum": Color.RED,
    "enums for keys": {Color.RED: 1, Color.BLUE: 2},
    "tensors for keys": {torch.ones(1): 1, torch.ones(2): 2},
    "nested key": {((1, 2), 3): 4},
    "function": lambda_factor,
    "class": Config,
    "slots by position": Slotted(),
    "our config": OURS,
    "optimizer": torch.optim.AdamW([torch.ones(1)]),
    "scheduler": scheduler(),
    "sparse": torch.eye(2).to_sparse(),
    "quantized": quantized(),
    "meta": torch.empty(2, device="meta"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", PASSENGERS)
def test_what_lies_beside_the_weights_does_not_matter(key, as_zip, protocol, tmp_path):
    tree = {"w": torch.arange(3.0), "beside": PASSENGERS[key], "step": 7}
    torch.save(tree, tmp_path / "m.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
    found = open_checkpoint(tmp_path / "m.pth")
    assert found.values["step"] == 7
    for read in (read_span(found.tensors["w"]), read_tensors(found, ["w"], CPU)["w"]):
        assert read.tolist() == [0, 1, 2]
    assert list(found.tensors) == ["w"]


CONFIGS: dict[str, Any] = {
    "dataclass": Config(),
    "Namespace": argparse.Namespace(n_head=4, nested=SimpleNamespace(n_head=5), betas=(0.9, 0.95)),
    "SimpleNamespace": SimpleNamespace(n_head=4),
    "GPT2Config": GPT2Config(n_head=4),
    "dict with attributes": Attributes(n_head=4),
    "dict and slots": Slots(),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("key", CONFIGS)
def test_the_attributes_of_a_config_object_are_values(key, protocol, tmp_path):
    torch.save(
        {"model": {"w": torch.ones(1)}, "config": CONFIGS[key]}, tmp_path / "m.pth", pickle_protocol=protocol
    )
    found = open_checkpoint(tmp_path / "m.pth")
    assert found.values["config.n_head"] == 4
    assert found.values.get("config.nested.n_head", 5) == 5
    assert found.values.get("config.betas.1", 0.95) == 0.95


class Heads(enum.IntEnum):
    SIX = 6


@pytest.mark.parametrize("protocol", [2, 5])
def test_what_is_not_plain_is_seen_but_not_read(protocol, tmp_path):
    unread = {
        "slots": OURS,
        "other": Slotted(),
        "numpy": numpy.int64(6),
        "enum": Heads.SIX,
        "function": torch.relu,
    }
    unread |= {"bytes": b"6", "type": torch.nn.ReLU, "within": [SimpleNamespace(n_head=numpy.int64(6))]}
    torch.save(unread, tmp_path / "m.pth", pickle_protocol=protocol)
    values = open_checkpoint(tmp_path / "m.pth").values
    assert list(values) == [*list(unread)[:-1], "within.0.n_head"]
    assert all(isinstance(value, Unread) for value in values.values())


def test_a_config_that_two_models_share_is_listed_behind_both(tmp_path):
    config = GPT2Config(n_positions=16, **SMALL)
    model = GPT2LMHeadModel(config)
    torch.save({"model": model, "config": model.config}, tmp_path / "m.pth")
    values = open_checkpoint(tmp_path / "m.pth").values
    assert values["model.config.n_head"] == values["config.n_head"] == 2
    assert "model.transformer.config.n_head" not in values, "each object once"


# ---- tensors that are not read -----------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """A subclass, whose numbers may mean anything."""


class Packed:
    """Not a tensor, but made of one."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        return Packed, (self.data,)


UNREADABLE: dict[str, tuple[Any, str]] = {
    "sparse": (torch.eye(2).to_sparse(), "_rebuild_sparse_tensor"),
    "meta": (torch.empty(2, device="meta"), "_rebuild_meta_tensor"),
    "subclass": (torch.ones(2).as_subclass(Wrapped), "Wrapped"),  # type: ignore[arg-type]
    "conjugated": (torch.ones(2, dtype=torch.complex64).conj(), "conjugated or negated lazily"),
    "made of a tensor": (Packed(torch.ones(2)), "Packed.*not run"),
    "made with keywords": (Keyworded(weight=0), "Keyworded.*not run"),
    "attributes": (SimpleNamespace(data=torch.ones(2)), "SimpleNamespace.*not run"),
}


@pytest.mark.parametrize("key", UNREADABLE)
def test_a_tensor_that_is_not_read_is_listed_with_its_reason(key, tmp_path):
    node, reason = UNREADABLE[key]
    torch.save({"w": node, "b": torch.ones(1)}, tmp_path / "m.pth", pickle_protocol=4)
    found = open_checkpoint(tmp_path / "m.pth")
    assert list(found.tensors) == ["b"]
    assert list(found.unreadable) == ["w"]
    assert re.search(reason, found.unreadable["w"])


def test_a_tensor_with_attributes_is_a_tensor(tmp_path):
    tagged = torch.ones(2)
    tagged.note = "mine"  # type: ignore[attr-defined]
    torch.save({"w": tagged, "buffer": nn.Buffer(torch.ones(1))}, tmp_path / "m.pth")
    assert list(open_checkpoint(tmp_path / "m.pth").tensors) == ["w", "buffer"]


def test_a_registered_parameter_of_an_unknown_kind_is_not_read(tmp_path):
    torch.save(nn.LazyLinear(3), tmp_path / "m.pth")
    assert list(open_checkpoint(tmp_path / "m.pth").unreadable) == ["weight", "bias"]


def test_a_file_that_torch_load_may_refuse_is_predicted_as_it_is_read(tmp_path):
    torch.save({"w": torch.zeros(100)[:3], "beside": {1}}, tmp_path / "inert.pth")
    torch.save({"w": torch.zeros(100)[:3]}, tmp_path / "plain.pth")
    sizes = {
        name: list(sizes_read(open_checkpoint(tmp_path / name), ["w"])) for name in ("inert.pth", "plain.pth")
    }
    assert sizes == {"inert.pth": [12], "plain.pth": [400]}


# ---- nothing runs ------------------------------------------------------------------------------------------

CANARY = """
from pathlib import Path
import torch
Path(MARK).touch()

class Canary(torch.nn.Linear):
    def __setstate__(self, state):
        Path(MARK).touch()
        super().__setstate__(state)

class Reduced:
    def __reduce__(self):
        return Path.touch, (Path(MARK),)
"""


def test_a_canary_in_reduce_setstate_and_a_modules_name_does_not_sing(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (tmp_path / "canary.py").write_text(CANARY.replace("MARK", repr(str(mark))))
    monkeypatch.syspath_prepend(tmp_path)
    canary: Any = importlib.import_module("canary")
    model = canary.Canary(2, 2)
    torch.save({"model": model, "beside": canary.Reduced()}, tmp_path / "m.pth")
    mark.unlink()
    torch.load(tmp_path / "m.pth", weights_only=False)
    assert mark.exists(), "a canary that sings"
    mark.unlink()
    del sys.modules["canary"]
    found = open_checkpoint(tmp_path / "m.pth")
    read_tensors(found, found.tensors, CPU)
    assert "canary" not in sys.modules
    assert not mark.exists()
    assert list(found.tensors) == ["model.weight", "model.bias"]
    assert found.modules == {"model": "canary.Canary"}


def test_a_module_that_holds_itself_is_a_checkpoint_error(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1))
    model._modules["again"] = model
    torch.save(model, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="more than 32 levels"):
        open_checkpoint(tmp_path / "m.pth")


def test_attributes_that_refer_to_each_other_end(tmp_path):
    model, config = nn.Linear(1, 1), SimpleNamespace(n_head=4)
    config.self, config.model, model.config = config, model, config
    config.items = [config] * 2
    torch.save(model, tmp_path / "m.pth")
    assert open_checkpoint(tmp_path / "m.pth").values["config.n_head"] == 4


def test_shards_list_what_is_not_read(tmp_path):
    torch.save({"a": torch.ones(1), "b": torch.eye(2).to_sparse()}, tmp_path / "one.bin")
    index = {"weight_map": {"a": "one.bin", "b": "one.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = open_checkpoint(tmp_path)
    assert (list(found.tensors), list(found.unreadable)) == (["a"], ["b"])


def test_attributes_that_repeat_each_other_endlessly_end(tmp_path):
    """2**40 references to one object within an attribute, and the weights after it."""
    bomb: object = SimpleNamespace(n=1)
    for _ in range(40):
        bomb = [bomb, bomb]
    torch.save({"config": SimpleNamespace(bomb=bomb), "w": torch.ones(1)}, tmp_path / "m.pth")
    assert list(open_checkpoint(tmp_path / "m.pth").tensors) == ["w"]


def test_a_tree_is_read_to_the_depth_that_the_message_names(tmp_path: Path):
    tree: object = torch.ones(2)
    for _ in range(MAX_DEPTH):
        tree = {"a": tree}
    torch.save(tree, tmp_path / "model.pth")
    assert list(open_checkpoint(tmp_path / "model.pth").tensors) == [".".join("a" * MAX_DEPTH)]
    torch.save({"a": tree}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=f"more than {MAX_DEPTH} levels"):
        open_checkpoint(tmp_path / "model.pth")
