"""Every strategy on every kind of checkpoint, against a plain torch.load and copy."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise
from torch import nn

from gpt2lite import (
    STRATEGIES,
    CheckpointError,
    GPTConfig,
    GPTModel,
    InsufficientMemoryError,
    Tuning,
    UsageError,
    forecast,
    load_module,
    save_per_tensor,
)
from gpt2lite.checkpoint.source import FileReader
from gpt2lite.loading import stream as stream_engine

ONE_FILE = [name for name in STRATEGIES if name != "per_tensor"]
HEADS = {"n_heads": TINY.n_heads}


def book(**options: object) -> nn.Module:
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch is not installed")
    shape = {key: value for key, value in TINY.as_dict().items() if key not in ("bias", "tied_head")}
    return randomise(ch04.GPTModel(shape | options))


def book_fast() -> nn.Module:
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="llms-from-scratch is not installed")
    return randomise(ch04.GPTModelFast(TINY.as_dict()))


def huggingface(head: bool = True) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=TINY.vocab_size, n_positions=TINY.context_length, n_embd=TINY.emb_dim,
        n_head=TINY.n_heads, n_layer=TINY.n_layers, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomise(transformers.GPT2LMHeadModel(config) if head else transformers.GPT2Model(config))


def ours(**options: object) -> GPTModel:
    return randomise(GPTModel(GPTConfig.of(TINY.as_dict() | options)))


def save_pth(state: object, folder: Path) -> Path:
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def save_legacy(state: object, folder: Path) -> Path:
    """As torch did before 1.6: data begin where the pickles happen to end."""
    torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def save_safetensors(state: dict[str, torch.Tensor], folder: Path) -> Path:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    library.save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    return folder / "model.safetensors"


def save_hub(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """The official layout: no prefix, no head, stored masks, and data that begins at an odd byte."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(TINY.n_layers)}
    tensors = masks | {
        name.removeprefix("transformer."): t for name, t in state.items() if name != "lm_head.weight"
    }
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * 4
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * ((3 - len(raw)) % 4)
    data = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors.values())
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert (8 + len(raw)) % 4 == 3
    return path


def save_sharded_by_transformers(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """What `save_pretrained` writes for a model larger than a shard, its head count in config.json."""
    model = huggingface()
    model.load_state_dict(state)
    model.save_pretrained(folder / "hub", max_shard_size="100KB")
    assert len(list((folder / "hub").glob("*.safetensors"))) > 2
    return folder / "hub"


def save_sharded_bin(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """As transformers wrote it when it still wrote pickles; returns the index itself."""
    pointers = [tensor.data_ptr() for tensor in state.values()]
    shard_of = {  # tied tensors lie in one shard
        name: f"pytorch_model-{pointers.index(tensor.data_ptr()) % 3 + 1:05}-of-00003.bin"
        for name, tensor in state.items()
    }
    for shard in set(shard_of.values()):
        torch.save({name: state[name] for name in state if shard_of[name] == shard}, folder / shard)
    total = sum(tensor.nbytes for tensor in state.values())
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": shard_of}))
    return index


def save_wrapped(state: dict[str, torch.Tensor], folder: Path) -> Path:
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(101, 48)}},
        "param_groups": [{}],
    }
    return save_pth({"model_state_dict": state, "optimizer_state_dict": optimizer}, folder)


def save_compiled(state: dict[str, torch.Tensor], folder: Path) -> Path:
    return save_pth({f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}, folder)


def save_folder(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """The article's own loop."""
    (folder / "model_parameters").mkdir()
    for name, tensor in state.items():
        torch.save(tensor.clone(), folder / "model_parameters" / f"{name}.pt")
    return folder / "model_parameters"


def prefixed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model_state_dict.module.{name}": tensor for name, tensor in state.items()}


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Path]]] = {
    "ours-pth": (ours, save_pth),
    "ours-tied-pth": (lambda: ours(tied_head=True), save_pth),
    "ours-no-bias-pth": (lambda: ours(bias=False, qkv_bias=False), save_pth),
    "ours-legacy-pth": (ours, save_legacy),
    "ours-tied-legacy-pth": (lambda: ours(tied_head=True), save_legacy),
    "ours-safetensors": (ours, save_safetensors),
    "ours-folder": (ours, save_folder),
    "ours-compiled-pth": (ours, save_compiled),
    "ours-prefixed-safetensors": (ours, lambda s, f: save_safetensors(prefixed(s), f)),
    "ours-prefixed-folder": (ours, lambda s, f: save_folder(prefixed(s), f)),
    "book-pth": (book, save_pth),
    "book-no-qkv-bias-pth": (lambda: book(qkv_bias=False), save_pth),
    "book-wrapped-pth": (book, save_wrapped),
    "book-folder": (book, save_folder),
    "book-safetensors": (book, save_safetensors),
    "fast-pth": (book_fast, save_pth),
    "fast-safetensors": (book_fast, save_safetensors),
    "fast-folder": (book_fast, save_folder),
    "hf-pth": (huggingface, save_pth),
    "hf-legacy-pth": (huggingface, save_legacy),
    "hf-no-prefix-pth": (lambda: huggingface(head=False), save_pth),
    "hf-hub-safetensors": (huggingface, save_hub),
    "hf-sharded-safetensors": (huggingface, save_sharded_by_transformers),
    "hf-sharded-bin": (huggingface, save_sharded_bin),
    "hf-folder": (huggingface, save_folder),
}


def expected_parameters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names for a peer's weights, by hand: the reference that the tables are checked against."""
    t = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    if "h.0.attn.c_attn.weight" not in t:
        plain = {"norm1.weight": "norm1.scale", "norm1.bias": "norm1.shift", "norm2.weight": "norm2.scale",
                 "norm2.bias": "norm2.shift", "final_norm.weight": "final_norm.scale",
                 "final_norm.bias": "final_norm.shift", "att.proj": "att.out_proj"}  # fmt: skip
        found = {}
        for name, tensor in t.items():
            for theirs, mine in plain.items():
                name = name.replace(theirs, mine)
            if ".qkv." in name:
                for part, leaf in zip(
                    tensor.split(TINY.emb_dim), ("W_query", "W_key", "W_value"), strict=True
                ):
                    found[name.replace("qkv", leaf)] = part
            elif not name.endswith(".mask"):
                found[name] = tensor
        return found
    C = TINY.emb_dim
    outside = {"tok_emb.weight": "wte.weight", "out_head.weight": "wte.weight"}
    outside |= {
        "pos_emb.weight": "wpe.weight",
        "final_norm.scale": "ln_f.weight",
        "final_norm.shift": "ln_f.bias",
    }
    found = {mine: t[theirs] for mine, theirs in outside.items()}
    for i in range(TINY.n_layers):
        h, b = f"h.{i}", f"trf_blocks.{i}"
        for k, leaf in enumerate(("W_query", "W_key", "W_value")):
            found[f"{b}.att.{leaf}.weight"] = t[f"{h}.attn.c_attn.weight"][:, k * C : (k + 1) * C].T
            found[f"{b}.att.{leaf}.bias"] = t[f"{h}.attn.c_attn.bias"][k * C : (k + 1) * C]
        for theirs, mine in (
            ("attn.c_proj", "att.out_proj"),
            ("mlp.c_fc", "ff.layers.0"),
            ("mlp.c_proj", "ff.layers.2"),
        ):
            found[f"{b}.{mine}.weight"] = t[f"{h}.{theirs}.weight"].T
            found[f"{b}.{mine}.bias"] = t[f"{h}.{theirs}.bias"]
        for theirs, mine in (("ln_1", "norm1"), ("ln_2", "norm2")):
            found[f"{b}.{mine}.scale"], found[f"{b}.{mine}.shift"] = (
                t[f"{h}.{theirs}.weight"],
                t[f"{h}.{theirs}.bias"],
            )
    return found


def assert_equal_bits(
    model: nn.Module, expected: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.to(dtype or tensor.dtype)), name
        assert state[name].dtype == (dtype or tensor.dtype), name


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_bits_of_plain_torch_and_the_peers_logits(
    kind: str, strategy: str, tmp_path: Path, ids: torch.Tensor
):
    make, save = KINDS[kind]
    if strategy == "per_tensor" and not kind.endswith("folder"):
        pytest.skip("per_tensor reads a folder")
    peer = make()
    path = save(peer.state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, "cpu", strategy, config=HEADS)
    assert_equal_bits(loaded, expected_parameters(peer.state_dict()))
    assert not loaded.training
    if hasattr(peer, "lm_head") or hasattr(peer, "out_head"):
        theirs = peer(ids)
        difference = loaded(ids) - getattr(theirs, "logits", theirs)
        assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_logits_equal_transformers_to_fp64_rounding(strategy: str, tmp_path: Path, ids: torch.Tensor):
    peer = huggingface().double()
    path = save_pth(peer.state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS)
    assert (loaded(ids) - peer(ids).logits).abs().max() <= 1e-10


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("kind", ["ours-tied-pth", "hf-hub-safetensors", "fast-pth", "ours-folder"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_equals_casting_what_plain_torch_loads(
    kind: str, strategy: str, dtype: torch.dtype, tmp_path: Path
):
    make, save = KINDS[kind]
    if strategy == "per_tensor" and not kind.endswith("folder"):
        pytest.skip("per_tensor reads a folder")
    peer = make()
    path = save(peer.state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS, dtype=dtype)
    assert_equal_bits(loaded, expected_parameters(peer.state_dict()), dtype)


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_the_files_dtypes_are_kept_tensor_by_tensor(strategy: str, tmp_path: Path):
    mixed = ours()
    for name, parameter in mixed.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.float16)
    path = save_pth(mixed.state_dict(), tmp_path)
    assert_equal_bits(load_module(ours, path, strategy=strategy), mixed.state_dict())


def is_norm(name: str) -> bool:
    return "norm" in name


def is_embedding(name: str) -> bool:
    return "emb" in name or "head" in name


@pytest.mark.parametrize(
    ("stays", "others"),
    [(is_norm, torch.float16), (is_embedding, torch.bfloat16), (lambda name: False, torch.float8_e4m3fn)],
    ids=["norms fp32", "embeddings fp32", "all fp8"],
)
def test_dtypes_that_a_gpt_cannot_compute_with_are_refused_or_cast(
    stays: Callable[[str], bool], others: torch.dtype, tmp_path: Path, ids: torch.Tensor
):
    state = {name: t if stays(name) else t.to(others) for name, t in ours().state_dict().items()}
    path = save_pth(state, tmp_path)
    for read in (GPTModel.from_checkpoint, forecast):
        with pytest.raises(CheckpointError, match=rf"holds .*{others} .* Pass dtype=torch.float32"):
            read(path, config=HEADS)
    loaded = GPTModel.from_checkpoint(path, config=HEADS, dtype=torch.float32)
    assert_equal_bits(loaded, {name: tensor.float() for name, tensor in state.items()})
    assert loaded(ids).isfinite().all()


def test_a_dtype_that_a_gpt_cannot_compute_in_is_refused(pth: Path):
    with pytest.raises(UsageError, match=r"cannot compute in torch.float8_e5m2; pass dtype"):
        GPTModel.from_checkpoint(pth, config=HEADS, dtype=torch.float8_e5m2)


@pytest.mark.parametrize("strategy", ONE_FILE)
@pytest.mark.parametrize("kind", ["ours-tied-pth", "hf-pth", "hf-hub-safetensors"])
def test_a_tie_survives_and_is_one_memory(strategy: str, kind: str, tmp_path: Path):
    make, save = KINDS[kind]
    loaded = GPTModel.from_checkpoint(save(make().state_dict(), tmp_path), strategy=strategy, config=HEADS)
    assert loaded.config.tied_head
    assert loaded.out_head.weight is loaded.tok_emb.weight


def test_either_key_of_a_tie_may_be_absent(tied_model: GPTModel, tmp_path: Path):
    for absent in ("out_head.weight", "tok_emb.weight"):
        state = tied_model.state_dict()
        del state[absent]
        loaded = GPTModel.from_checkpoint(save_pth(state, tmp_path), config=HEADS)
        assert_equal_bits(loaded, tied_model.state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_copying_strategies_end_with_contiguous_parameters(strategy: str, tmp_path: Path):
    path = save_folder(huggingface().state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS)
    transposed = [name for name, p in loaded.named_parameters() if not p.is_contiguous()]
    assert bool(transposed) == (strategy == "mmap")


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_a_loaded_model_trains(strategy: str, pth: Path, ids: torch.Tensor):
    loaded = GPTModel.from_checkpoint(pth, strategy=strategy, config=HEADS).train()
    loaded(ids).logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())


def test_mapped_parameters_are_the_files_pages_and_writing_to_them_leaves_the_file(
    pth: Path, model: GPTModel
):
    loaded = GPTModel.from_checkpoint(pth, strategy="mmap", config=HEADS)
    with torch.no_grad():
        loaded.tok_emb.weight.zero_()
    assert_equal_bits(GPTModel.from_checkpoint(pth, config=HEADS), model.state_dict())


@pytest.mark.parametrize("strategy", ["mmap", "stream"])
def test_saving_one_parameter_does_not_write_the_whole_memory(strategy: str, pth: Path, tmp_path: Path):
    loaded = GPTModel.from_checkpoint(pth, strategy=strategy, config=HEADS)
    torch.save(loaded.final_norm.scale, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4000


@pytest.mark.parametrize("strategy", ONE_FILE)
@pytest.mark.parametrize("kind", ["book-wrapped-pth", "hf-hub-safetensors"])
def test_nothing_but_the_model_outlives_the_load(strategy: str, kind: str, tmp_path: Path):
    """Without the garbage collector's help: what a reference cycle holds would stay on the device."""
    make, save = KINDS[kind]
    path = save(make().state_dict(), tmp_path)
    gc.collect()
    gc.disable()
    try:
        before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
        loaded = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS)
        known = before | {id(p) for p in loaded.parameters()}
        left = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in known]
    finally:
        gc.enable()
    assert [tuple(tensor.shape) for tensor in left] == []


ARTICLES_LOOP = """
import sys, torch
from gpt2lite import GPTModel
path = sys.argv[1]
model = GPTModel.from_checkpoint(path, strategy=sys.argv[2], config={"n_heads": 4}).train()
optimizer = torch.optim.AdamW(model.parameters())
model(torch.arange(32)[None]).logsumexp(-1).mean().backward()
optimizer.step()
torch.save(model.state_dict(), path)
again = GPTModel.from_checkpoint(path, config={"n_heads": 4})
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
print("done")
"""


@pytest.mark.parametrize("strategy", ["auto", "baseline", "sequential", "meta", "stream"])
def test_the_articles_loop_of_load_train_save_load_works(strategy: str, pth: Path):
    command = [sys.executable, "-c", ARTICLES_LOOP, str(pth), strategy]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_what_torch_save_writes_loads_in_the_books_own_class(pth: Path, model: GPTModel, ids: torch.Tensor):
    peer = book()
    missing, unexpected = peer.load_state_dict(torch.load(pth, weights_only=True), strict=False)
    assert unexpected == []
    assert {name.rpartition(".")[2] for name in missing} == {"mask"}
    assert (peer(ids) - model(ids)).abs().max() <= 1e-4


# ---- the streaming engine ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize(
    "kind", ["ours-pth", "hf-hub-safetensors", "fast-pth", "fast-folder", "ours-tied-pth"]
)
@pytest.mark.parametrize("ring_bytes", [64, 1000, 4096, 1 << 16])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_ring_smaller_than_a_tensor_or_even_a_row_still_fills_every_bit(
    kind: str, ring_bytes: int, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tuning = Tuning(chunk_bytes=max(ring_bytes, 4096), ring_bytes=ring_bytes)
    allocated = []
    allocate = stream_engine.allocate_slot
    monkeypatch.setattr(
        stream_engine, "allocate_slot", lambda n, *, pinned: allocated.append(n) or allocate(n, pinned=pinned)
    )
    make, save = KINDS[kind]
    peer = make()
    path = save(peer.state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, strategy="stream", config=HEADS, dtype=dtype, tuning=tuning)
    assert_equal_bits(loaded, expected_parameters(peer.state_dict()), dtype)
    assert sum(allocated) <= ring_bytes


class Odd(nn.Module):
    """Tensors that a file may hold in any way that torch can save."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.empty(5, 7))
        self.permuted = nn.Parameter(torch.empty(3, 4, 5))
        self.expanded = nn.Parameter(torch.empty(6, 3))
        self.stepped = nn.Parameter(torch.empty(4, 2))
        self.scalar = nn.Parameter(torch.empty(()))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.deep = nn.Parameter(torch.empty(2, 3, 4, 5))
        self.small_view = nn.Parameter(torch.empty(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(9, dtype=torch.bool))


def odd_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "transposed": torch.randn(7, 5).t(),
        "permuted": torch.randn(5, 3, 4).permute(1, 2, 0),
        "expanded": torch.randn(3).expand(6, 3),
        "stepped": torch.randn(8, 6)[::2, ::3],
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "deep": torch.randn(2, 3, 4, 5),
        "small_view": torch.randn(10_000)[77:80],
        "count": torch.tensor(12),
        "flags": torch.rand(9) > 0.5,
    }


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("strategy", ONE_FILE)
@pytest.mark.parametrize("ring_bytes", [64, 1 << 20])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_strided_scalar_empty_and_integer_tensors_load_into_any_module(
    strategy: str, ring_bytes: int, dtype: torch.dtype | None, tmp_path: Path
):
    state, tuning = odd_state(), Tuning(chunk_bytes=max(ring_bytes, 4096), ring_bytes=ring_bytes)
    loaded = load_module(Odd, save_pth(state, tmp_path), strategy=strategy, dtype=dtype, tuning=tuning)
    for name, tensor in state.items():
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor.to(wanted)), name


def test_an_error_of_a_reader_is_raised_and_stops_the_others(pth: Path, monkeypatch: pytest.MonkeyPatch):
    real, calls = FileReader.read_into, []
    fails_at = math.inf

    def failing(file: FileReader, memories: Iterable[memoryview], offset: int) -> None:
        calls.append(offset)
        if len(calls) == fails_at:
            raise OSError(5, "the disk is gone")
        if len(calls) > fails_at:
            time.sleep(0.05)  # a busy machine may take its time to tell the others
        real(file, memories, offset)

    monkeypatch.setattr(FileReader, "read_into", failing)
    for dtype in (None, torch.bfloat16):  # read in place, and through the ring
        load = partial(GPTModel.from_checkpoint, pth, config=HEADS, dtype=dtype)
        fails_at, tuning = math.inf, Tuning(chunk_bytes=4096, ring_bytes=4096)
        calls.clear()
        load(tuning=tuning)
        needed, fails_at = len(calls), 5
        calls.clear()
        with pytest.raises(OSError, match="the disk is gone"):
            load(tuning=tuning)
        assert len(calls) < needed / 2


def test_a_file_that_changes_during_the_load_is_an_error(pth: Path, monkeypatch: pytest.MonkeyPatch):
    real = FileReader.read_into

    def touching(file: FileReader, memories: Iterable[memoryview], offset: int) -> None:
        os.utime(pth, ns=(1, 1))
        real(file, memories, offset)

    monkeypatch.setattr(FileReader, "read_into", touching)
    with pytest.raises(CheckpointError, match=r"model.pth: changed while it was being read"):
        GPTModel.from_checkpoint(pth, config=HEADS)


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_progress_rises_to_the_total_and_ends_there(strategy: str, pth: Path):
    seen: list[tuple[int, int]] = []
    GPTModel.from_checkpoint(pth, strategy=strategy, config=HEADS, progress=lambda *at: seen.append(at))
    assert seen
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert len({total for _, total in seen}) == 1


# ---- any module --------------------------------------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("positions", torch.arange(4.0), persistent=False)
        self.twin = self.layer


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("strategy", ONE_FILE)
def test_buffers_that_no_file_holds_are_computed_again(strategy: str, tmp_path: Path):
    original = randomise(WithBuffers())
    loaded = load_module(WithBuffers, save_pth(original.state_dict(), tmp_path), strategy=strategy)
    assert_equal_bits(loaded, original.state_dict())
    assert torch.equal(loaded.positions, torch.arange(4.0))
    assert loaded.twin.weight is loaded.layer.weight


def test_load_module_finds_the_modules_names_behind_wrappers_and_prefixes(tmp_path: Path):
    original = nn.Linear(3, 2)
    state = {f"_orig_mod.module.{name}": tensor for name, tensor in original.state_dict().items()}
    path = save_pth({"model": state, "optimizer": {"momentum": torch.ones(5)}}, tmp_path)
    assert_equal_bits(load_module(lambda: nn.Linear(3, 2), path), original.state_dict())


def test_load_module_refuses_a_build_that_returns_no_module(pth: Path):
    with pytest.raises(UsageError, match=r"build\(\) must return an nn.Module, got dict"):
        load_module(dict, pth)
    with pytest.raises(UsageError, match=r"build must be a function that returns an nn.Module, got Linear"):
        load_module(nn.Linear(2, 2), pth)


class SharedBuffer(nn.Module):
    """One unsaved buffer under two names, as shared rotary tables are."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(3.0)
        self.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        for part in self.parts:
            part.register_buffer("table", table, persistent=False)
        self.parts[0].weight.requires_grad_(False)


class ReadsValues(nn.Module):
    """Its constructor needs the value of a tensor, as drop-path schedules do."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.layer = nn.Linear(3, 2)


class TiedByMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight.data = self.a.weight.data
        self.register_buffer("view", self.a.weight)


class ClonesItsState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in super().state_dict(*args, **kwargs).items()}


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("strategy", ONE_FILE)
@pytest.mark.parametrize("make", [SharedBuffer, ReadsValues, ClonesItsState])
def test_unusual_modules_load_like_any_other(strategy: str, make: Callable[[], nn.Module], tmp_path: Path):
    original = randomise(make())
    loaded = load_module(make, save_pth(original.state_dict(), tmp_path), strategy=strategy)
    assert_equal_bits(loaded, original.state_dict())
    if isinstance(loaded, SharedBuffer):
        assert torch.equal(loaded.parts[0].table, torch.arange(3.0))
        assert loaded.parts[0].table is loaded.parts[1].table or strategy in ("baseline", "sequential")
    wants_grad = [p.requires_grad for p in original.parameters()]
    assert [p.requires_grad for p in loaded.parameters()] == wants_grad


@pytest.mark.parametrize("strategy", ["meta", "mmap", "stream"])
def test_tensors_tied_by_their_memory_stay_tied(strategy: str, tmp_path: Path):
    loaded = load_module(TiedByMemory, save_pth(TiedByMemory().state_dict(), tmp_path), strategy=strategy)
    with torch.no_grad():
        loaded.a.weight.fill_(7)
    assert loaded.b.weight.eq(7).all()
    assert loaded.view.eq(7).all()


def test_an_untied_model_from_a_tied_file_has_two_memories(tied_model: GPTModel, tmp_path: Path):
    path = save_pth(tied_model.state_dict(), tmp_path)
    for strategy in ONE_FILE:
        loaded = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS | {"tied_head": False})
        with torch.no_grad():
            loaded.out_head.weight.zero_()
        assert torch.equal(loaded.tok_emb.weight, tied_model.tok_emb.weight), strategy


@pytest.mark.parametrize("strategy", ["meta", "mmap", "stream"])
def test_a_buffer_computed_from_a_parameter_is_named(strategy: str, tmp_path: Path):
    class Derived(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("doubled", self.weight.detach() * 2, persistent=False)

    path = save_pth(nn.Linear(2, 2).state_dict(), tmp_path)
    with pytest.raises(UsageError, match=r'cannot be built on meta \(doubled\) needs strategy="sequential"'):
        load_module(Derived, path, strategy=strategy)


@pytest.mark.parametrize("strategy", ["meta", "mmap", "stream"])
def test_the_default_device_of_the_caller_does_not_matter(strategy: str, tmp_path: Path):
    peer = huggingface()
    for save in (save_pth, save_safetensors):
        path = save(dict(peer.state_dict()) if save is save_pth else peer.transformer.state_dict(), tmp_path)
        with torch.device("meta"):
            loaded = GPTModel.from_checkpoint(path, strategy=strategy, config=HEADS)
        assert_equal_bits(loaded, expected_parameters(peer.state_dict()))


def test_cpu_0_is_the_cpu(pth: Path, model: GPTModel):
    assert_equal_bits(GPTModel.from_checkpoint(pth, "cpu:0", config=HEADS), model.state_dict())


def test_a_mapped_cast_is_contiguous(tmp_path: Path):
    path = save_pth(huggingface().state_dict(), tmp_path)
    loaded = GPTModel.from_checkpoint(path, strategy="mmap", config=HEADS, dtype=torch.bfloat16)
    assert all(p.is_contiguous() for p in loaded.parameters())


def test_columns_of_a_huge_storage_do_not_multiply_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.columns = nn.ParameterList([torch.empty(256, 1) for _ in range(4)])

    allocated = []
    allocate = stream_engine.allocate_slot
    monkeypatch.setattr(
        stream_engine, "allocate_slot", lambda n, *, pinned: allocated.append(n) or allocate(n, pinned=pinned)
    )
    tuning = Tuning(ring_bytes=1 << 12)
    storage = torch.randn(256, 64)
    state = {f"columns.{i}": storage[:, i : i + 1] for i in range(4)}
    assert_equal_bits(load_module(Columns, save_pth(state, tmp_path), tuning=tuning), state)
    assert allocated == [-(-(255 * 64 + 1) * 4 // 16) * 16]  # one slot, as large as what must be read whole


def test_memory_that_runs_out_is_one_clear_error(pth: Path, monkeypatch: pytest.MonkeyPatch):
    def exhausted(self: stream_engine.Ring, *args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nmore")

    monkeypatch.setattr(stream_engine.Ring, "deliver", exhausted)
    with pytest.raises(
        InsufficientMemoryError, match=r'model.pth: memory ran out on cpu with strategy="stream"'
    ):
        GPTModel.from_checkpoint(pth, strategy="stream", config=HEADS, dtype=torch.bfloat16)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_all_mismatches_are_one_error_that_lists_them(strategy: str, model: GPTModel, tmp_path: Path):
    state = model.state_dict()
    del state["trf_blocks.1.norm1.scale"]
    del state["final_norm.shift"]
    state["surplus"] = torch.zeros(1)
    state["trf_blocks.0.ff.layers.0.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        GPTModel.from_checkpoint(save_pth(state, tmp_path), strategy=strategy, config=TINY)
    message = str(caught.value)
    assert "model.pth: does not fit the model in 4 place(s)" in message
    for fragment in (
        "trf_blocks.1.norm1.scale: missing",
        "final_norm.shift: missing",
        "surplus: unexpected",
        "trf_blocks.0.ff.layers.0.bias has shape (7,)",
    ):
        assert fragment in message


def test_a_config_of_another_official_size_is_named(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    names = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768), "h.0.attn.c_attn.weight": (768, 2304)}
    names |= {f"h.{i}.ln_1.weight": (768,) for i in range(12)}
    header, offset = {}, 0
    for name, shape in names.items():
        nbytes = torch.Size(shape).numel() * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + offset)  # sparse: the data takes no disk
    with pytest.raises(CheckpointError, match=r"Is this gpt2 rather than gpt2-medium\?"):
        GPTModel.from_checkpoint(path, config=GPTConfig.named("gpt2-medium"))


def test_a_tied_config_for_an_untied_file_is_refused(pth: Path):
    with pytest.raises(CheckpointError, match="are two tensors; the model ties"):
        GPTModel.from_checkpoint(pth, config=HEADS | {"tied_head": True})


def test_a_head_count_that_cannot_be_known_says_what_to_pass(pth: Path):
    with pytest.raises(CheckpointError, match=r'Pass config=\{"n_heads": …\} .* into model.json'):
        GPTModel.from_checkpoint(pth)


def test_the_head_count_is_found_in_a_side_file_a_wrapper_or_a_config_json(model: GPTModel, tmp_path: Path):
    beside = tmp_path / "beside"
    beside.mkdir()
    path = save_pth(model.state_dict(), beside)
    path.with_suffix(".json").write_text(json.dumps(model.config.as_dict()))
    assert GPTModel.from_checkpoint(path).config == model.config

    wrapped = save_pth({"model": model.state_dict(), "model_args": {"n_head": 4}}, tmp_path)
    assert GPTModel.from_checkpoint(wrapped).config == model.config

    folder = tmp_path / "hub"
    folder.mkdir()
    huggingface().save_pretrained(folder)
    assert GPTModel.from_checkpoint(folder).config.n_heads == 4

    sharded = save_sharded_by_transformers(huggingface().state_dict(), tmp_path / "sharded")
    assert GPTModel.from_checkpoint(sharded).config.n_heads == 4
    (sharded / "config.json").rename(sharded / "model.json")
    index = sharded / "model.safetensors.index.json"
    assert GPTModel.from_checkpoint(index).config.n_heads == 4


def test_a_side_file_that_is_no_json_is_named(pth: Path):
    pth.with_suffix(".json").write_text("not json")
    with pytest.raises(CheckpointError, match=r"model.json: not valid JSON"):
        GPTModel.from_checkpoint(pth)


def test_a_folder_may_be_named_by_a_dot(model: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(save_folder(model.state_dict(), tmp_path))
    assert_equal_bits(GPTModel.from_checkpoint(".", config=HEADS), model.state_dict())


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_integer_weights_are_refused(strategy: str, model: GPTModel, tmp_path: Path):
    state = model.state_dict() | {"out_head.weight": torch.ones(101, 48, dtype=torch.int8)}
    with pytest.raises(
        CheckpointError, match=r"out_head.weight holds torch.int8, out_head.weight needs floating"
    ):
        GPTModel.from_checkpoint(save_pth(state, tmp_path), strategy=strategy, config=HEADS)


def test_a_variant_of_gpt2_with_other_arithmetic_is_refused(tmp_path: Path):
    huggingface().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(CheckpointError, match=r"config.json: activation_function='relu', wanted"):
        GPTModel.from_checkpoint(tmp_path)


def test_a_wrong_head_count_that_cannot_divide_is_refused(pth: Path):
    with pytest.raises(UsageError, match=r"model.pth: .*emb_dim=48 does not divide by n_heads=5"):
        GPTModel.from_checkpoint(pth, config={"n_heads": 5})


def test_weights_of_something_else_name_what_was_found(tmp_path: Path):
    path = save_pth(nn.Linear(2, 2).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"not a GPT-2 with known names; it holds bias, weight"):
        GPTModel.from_checkpoint(path)


def test_two_dialects_in_one_file_are_ambiguous(tmp_path: Path):
    path = save_pth(ours().state_dict() | huggingface().state_dict(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds 2 models, under '' \(book\) and 'transformer' \(huggingface\)"
    ):
        GPTModel.from_checkpoint(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "fastest"}, "unknown strategy 'fastest'; choose from auto, baseline"),
        ({"strategy": "per_tensor"}, "gpt2lite.save_per_tensor"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "meta"}, "a model on the meta device holds no weights"),
        ({"device": "cuda:99"}, "cuda:99 was asked for, but this machine has .* Use cpu instead"),
        ({"device": None}, "unknown device None"),
        ({"dtype": "float16"}, "dtype must be a floating-point torch.dtype or None, got 'float16'"),
        ({"config": {"heads": 4}}, "config has no field heads; it has vocab_size"),
        ({"config": 12}, "config must be a GPTConfig, a dict or None, got 12"),
        ({"dtype": torch.int8}, "dtype must be a floating-point torch.dtype or None, got torch.int8"),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_says_what_to_do(
    arguments: dict[str, object], message: str, pth: Path
):
    with pytest.raises(ValueError, match=message):
        GPTModel.from_checkpoint(pth, **{"config": HEADS, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_one_clear_error(pth: Path):
    with pytest.raises(UsageError, match="no CUDA device that torch can use"):
        GPTModel.from_checkpoint(pth, "cuda", config=HEADS)


def test_per_tensor_reads_what_save_per_tensor_wrote_and_keeps_the_tie(tied_model: GPTModel, tmp_path: Path):
    folder = save_per_tensor(tied_model, tmp_path / "exploded")
    loaded = GPTModel.from_checkpoint(folder, strategy="per_tensor", config=HEADS)
    assert_equal_bits(loaded, tied_model.state_dict())
    assert loaded.config.tied_head


@pytest.mark.parametrize("strategy", ONE_FILE)
def test_a_tensor_whose_elements_overlap_is_read_as_torch_reads_it(strategy: str, tmp_path: Path):
    overlapping = torch.arange(8.0).as_strided((2, 2, 2), (3, 3, 1))
    path = save_pth({"weight": overlapping}, tmp_path)
    build = lambda: nn.ParameterDict({"weight": torch.empty(2, 2, 2)})  # noqa: E731
    assert torch.equal(load_module(build, path, strategy=strategy).weight, overlapping)
