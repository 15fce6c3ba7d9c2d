"""Conversions against the peers' own classes, cut short in every way, and within memory."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise
from safetensors.torch import load_file, save_file
from test_loading import HEADS, KINDS, book, expected_parameters, huggingface, ours, save_pth
from torch import nn

import gpt2lite.converting as converting
from gpt2lite import CheckpointError, GPTConfig, GPTModel, UsageError, convert
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.checkpoint import writing
from gpt2lite.checkpoint.writing import made_ahead
from gpt2lite.cli import main
from gpt2lite.config import EMBEDDED
from gpt2lite.dialects.reading import DIALECTS
from gpt2lite.tokenizer import as_encoding, read_encoding

pytestmark = pytest.mark.filterwarnings("ignore:nanogpt computes gelu, this model")

MIB = 1 << 20
MEDIUM = GPTConfig(8000, 512, 512, 8, 6)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(writing, "TILE", (7, 5))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_loads_as(path: Path, expected: dict[str, torch.Tensor]) -> GPTModel:
    """Loads with nothing said, with these bits; biases that are not expected are zeros."""
    loaded = GPTModel.from_checkpoint(path)
    state = loaded.state_dict()
    assert not expected.keys() - state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected.get(name, torch.zeros_like(tensor))), name
    return loaded


# ---- against the peers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_the_books_class_takes_every_tensor(format: str, qkv_bias: bool, pth: Path, ids: torch.Tensor):
    model = ours(qkv_bias=qkv_bias)
    save_pth(model.state_dict(), pth.parent)
    made = convert(pth, pth.parent / f"book.{format}", config=HEADS)
    state = torch.load(made, weights_only=True) if format == "pth" else load_file(made)
    peer = book(qkv_bias=qkv_bias)
    peer.load_state_dict(state, strict=True)
    assert (peer(ids) - model(ids)).abs().max() <= 1e-4


def test_a_mask_is_the_books(pth: Path):
    state = torch.load(convert(pth, pth.parent / "book.pth", config=HEADS), weights_only=True)
    assert torch.equal(state["trf_blocks.1.att.mask"], book().state_dict()["trf_blocks.1.att.mask"])


def assert_transformers_loads(folder: Path, model: GPTModel, ids: torch.Tensor) -> None:
    """Every parameter is there, nothing is beside it, and the logits are those of the same parameters."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peer, said = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (peer.eval()(ids).logits - model(ids)).abs().max() <= 1e-4
    assert (peer.lm_head.weight is peer.transformer.wte.weight) == model.config.tied_head
    loaded = expected_parameters(peer.state_dict()) | {"out_head.weight": peer.lm_head.weight}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [None, "20KiB"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_folder_and_gives_the_same_logits(
    size: str | None, tied: bool, tmp_path: Path, ids: torch.Tensor
):
    model = ours(tied_head=tied)
    folder = convert(
        save_pth(model.state_dict(), tmp_path), tmp_path / "hf", to="huggingface", config=HEADS,
        max_shard_size=size,
    )  # fmt: skip
    assert_transformers_loads(folder, model, ids)
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (size is None)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_pth_as_the_hubs_pytorch_model(tied: bool, tmp_path: Path, ids: torch.Tensor):
    model = ours(tied_head=tied)
    source = save_pth(model.state_dict(), tmp_path)
    folder = convert(source, tmp_path / "hf", to="huggingface", config=HEADS)
    convert(source, folder / "pytorch_model.bin", to="huggingface", config=HEADS)
    (folder / "model.safetensors").unlink()
    assert_transformers_loads(folder, model, ids)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "folder"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_are_the_official_gpt2s_where_the_head_is_tied_else_those_that_transformers_saves(
    tied: bool, name: str, tmp_path: Path
):
    made = convert(
        save_pth(ours(tied_head=tied).state_dict(), tmp_path), tmp_path / name, to="huggingface", config=HEADS
    )
    peer = huggingface()
    theirs = {key: tensor.shape for key, tensor in peer.state_dict().items()}
    if tied:
        theirs = {key: tensor.shape for key, tensor in peer.transformer.state_dict().items()}
    file = made / "model.safetensors" if name == "folder" else made
    mine = torch.load(file, weights_only=True) if name == "a.pth" else load_file(file)
    assert {key: tensor.shape for key, tensor in mine.items()} == theirs


def load_whole(pth: Path) -> dict[str, torch.Tensor]:
    whole = load_file(convert(pth, pth.parent / "whole.safetensors", to="huggingface", config=HEADS))
    order = {name: n for n, name in enumerate(json_header(pth.parent / "whole.safetensors"))}
    return dict(sorted(whole.items(), key=lambda item: order[item[0]]))


def json_header(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_shards_and_index_are_as_huggingface_divides_them(pth: Path):
    split = pytest.importorskip("huggingface_hub").split_torch_state_dict_into_shards
    folder = convert(pth, pth.parent / "hf", to="huggingface", config=HEADS, max_shard_size="19000B")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert sorted(shards)[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["weight_map"] == {name: file for file, state in shards.items() for name in state}
    sizes = {file: sum(t.nbytes for t in state.values()) for file, state in shards.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    whole = load_whole(pth)
    theirs = split(whole, filename_pattern="model{suffix}.safetensors", max_shard_size=19_000)
    assert {file: sorted(state) for file, state in shards.items()} == {
        file: sorted(names) for file, names in theirs.filename_to_tensors.items()
    }


def test_nanogpt_gets_its_wrapper_and_out_in_weights(tied_model: GPTModel, tmp_path: Path):
    made = convert(save_pth(tied_model.state_dict(), tmp_path), tmp_path / "c.pt", to="nanogpt", config=HEADS)
    saved, state = torch.load(made, weights_only=True), tied_model.state_dict()
    assert saved["model_args"] == {
        "n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": 32, "bias": True, "vocab_size": 101,
        "dropout": 0.0,
    }  # fmt: skip
    stored = saved["model"]
    assert stored["lm_head.weight"].data_ptr() == stored["transformer.wte.weight"].data_ptr()
    fused = torch.cat([state[f"trf_blocks.2.att.W_{leaf}.weight"] for leaf in ("query", "key", "value")])
    assert torch.equal(stored["transformer.h.2.attn.c_attn.weight"], fused)
    assert torch.equal(stored["transformer.h.0.mlp.c_proj.weight"], state["trf_blocks.0.ff.layers.2.weight"])
    assert len(stored) == 3 + 2 + 3 * 12


def test_a_head_that_equals_the_embedding_is_nanogpts_tie_and_another_is_refused(tmp_path: Path):
    model = ours()
    with pytest.raises(UsageError, match="nanogpt ties its output head to the token embedding"):
        convert(save_pth(model.state_dict(), tmp_path), tmp_path / "c.pt", to="nanogpt", config=HEADS)
    assert names_in(tmp_path) == {"model.pth"}
    model.out_head.weight.data.copy_(model.tok_emb.weight)
    convert(save_pth(model.state_dict(), tmp_path), tmp_path / "c.pt", to="nanogpt", config=HEADS)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_nanogpts_file_comes_back_with_the_same_logits(activation: str, tmp_path: Path, ids: torch.Tensor):
    """nanoGPT computes with the exact GELU; the file remembers what the weights were trained with."""
    model = randomise(GPTModel(GPTConfig.of(TINY.as_dict() | {"tied_head": True, "activation": activation})))
    source = model.save_checkpoint(tmp_path / "model.pth")
    made = convert(source, tmp_path / "ckpt.pt", to="nanogpt")
    assert torch.equal(GPTModel.from_checkpoint(made)(ids), model(ids))
    back = convert(made, tmp_path / "folder", to="huggingface")
    assert torch.equal(GPTModel.from_checkpoint(back)(ids), model(ids))
    torch.save(torch.load(made, weights_only=True), made)  # as nanoGPT itself writes it
    assert GPTModel.from_checkpoint(made).config.activation == "gelu"  # alone it is nanoGPT's


@pytest.mark.parametrize(
    ("config", "to", "said"),
    [
        ({"n_classes": 2}, "nanogpt", "language model only, and this one is a classifier; use book"),
        ({"activation": "gelu"}, "book", "book computes gelu_tanh, this model gelu; choose another target"),
        ({"head_bias": True}, "huggingface", "no bias in its output head"),
        ({"head_bias": True}, "book", "no bias in its output head"),
        ({"head_bias": True, "tied_head": True}, "nanogpt", "no bias in its output head"),
    ],
)
def test_what_a_target_cannot_compute_is_refused(
    config: dict[str, object], to: str, said: str, tmp_path: Path
):
    source = randomise(GPTModel(GPTConfig.of(TINY.as_dict() | config))).save_checkpoint(
        tmp_path / "model.pth"
    )
    with pytest.raises(UsageError, match=said):
        convert(source, tmp_path / "out.pth", to=to)
    assert names_in(tmp_path) == {"model.pth"}


@pytest.mark.parametrize(("activation", "warned"), [("gelu_tanh", 1), ("gelu", 0)])
def test_an_activation_that_nanogpt_does_not_compute_is_a_warning_that_names_both(
    activation: str, warned: int, tmp_path: Path
):
    model = GPTModel(GPTConfig.of(TINY.as_dict() | {"tied_head": True, "activation": activation}))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        convert(model.save_checkpoint(tmp_path / "model.pth"), tmp_path / "ckpt.pt", to="nanogpt")
    said = [str(each.message) for each in found]
    assert said == ["nanogpt computes gelu, this model gelu_tanh: its logits will differ there"] * warned


def wide(tied: bool, folder: Path) -> nn.Module:
    """transformers' model with the embedded one's tokenizer and 16 rows of padding, saved in a folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"vocab_size": 1040, "n_positions": 32, "n_embd": 48, "n_head": 4, "n_layer": 2}
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    peer = randomise(transformers.GPT2LMHeadModel(config))
    peer.save_pretrained(folder)
    shutil.copy(EMBEDDED.with_suffix(".tiktoken"), folder.with_suffix(".tiktoken"))
    return peer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_llama_cpp_gets_every_tensor_by_its_own_table_of_names(
    dtype: torch.dtype | None, tied: bool, tmp_path: Path
):
    """llama.cpp's own run of such a file is in docs/checkpoints.md."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    peer = wide(tied, tmp_path / "hub")
    made = gguf.GGUFReader(convert(tmp_path / "hub", tmp_path / "new.gguf", to="gguf", dtype=dtype))
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in made.tensors}
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, peer.config.n_layer)
    for name, tensor in peer.state_dict().items():
        if tied and name == "lm_head.weight":
            continue  # llama.cpp takes the embedding's
        wanted = tensor.t() if re.search(r"c_(attn|proj|fc)\.weight", name) else tensor
        wanted = wanted.to(dtype) if wanted.dim() == 2 and "wpe" not in name else wanted
        torch.testing.assert_close(
            found.pop(theirs.get_name(name, (".weight", ".bias"))), wanted, rtol=0, atol=0
        )
    assert not found
    fields = {key: field.contents() for key, field in made.fields.items()}
    kind = gguf.LlamaFileType.MOSTLY_F16 if dtype else gguf.LlamaFileType.ALL_F32
    of_llm, of_attention = gguf.Keys.LLM, gguf.Keys.Attention
    for key, value in {
        gguf.Keys.General.ARCHITECTURE: "gpt2",
        gguf.Keys.General.FILE_TYPE: kind,
        of_llm.BLOCK_COUNT: 2,
        of_llm.CONTEXT_LENGTH: 32,
        of_llm.EMBEDDING_LENGTH: 48,
        of_llm.FEED_FORWARD_LENGTH: 192,
        of_attention.HEAD_COUNT: 4,
        of_attention.LAYERNORM_EPS: pytest.approx(1e-5),
    }.items():
        assert fields[key.format(arch="gpt2")] == value


def test_llama_cpp_gets_the_tokenizer_in_the_file_and_nothing_beside_it(tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    wide(True, tmp_path / "hub")
    made = gguf.GGUFReader(convert(tmp_path / "hub", tmp_path / "new.gguf", to="gguf"))
    fields = {key: field.contents() for key, field in made.fields.items()}
    of, own = gguf.Keys.Tokenizer, read_encoding(EMBEDDED.with_suffix(".tiktoken"))
    tokens, kinds = fields[of.LIST], fields[of.TOKEN_TYPE]
    vocab = {token: id for id, token in enumerate(tokens) if kinds[id] == gguf.TokenType.NORMAL}
    merges = [line.split(" ") for line in fields[of.MERGES]]
    again = as_encoding("again", vocab, merges, {"<|endoftext|>": own.eot_token})
    text = "Anna said: it's 3 o'clock!\n\n  Ünï"
    assert again.encode(text) == own.encode(text)
    assert tokens[own.eot_token] == "<|endoftext|>"
    assert [kinds.count(each) for each in (gguf.TokenType.CONTROL, gguf.TokenType.UNUSED)] == [1, 16]
    assert (fields[of.BOS_ID], fields[of.EOS_ID], fields[of.ADD_BOS]) == (own.eot_token, own.eot_token, False)
    assert (fields[of.MODEL], fields[of.PRE]) == ("gpt2", "gpt-2")
    assert names_in(tmp_path) == {"hub", "hub.tiktoken", "new.gguf"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("new.gguf", {}, r'llama.cpp reads \.gguf files, and to="gguf" \(--to gguf\) writes them'),
        ("new.pth", {"to": "gguf"}, r"llama.cpp reads \.gguf files"),
        ("new.gguf", {"to": "gguf", "dtype": torch.float64}, "is torch.float64; pass a dtype"),
        ("new.gguf", {"to": "gguf", "config": {"activation": "gelu"}}, "gguf computes gelu_tanh, this model"),
        ("new.gguf", {"to": "gguf", "format": "pth"}, "its suffix says gguf, format says pth"),
    ],
)
def test_what_llama_cpp_cannot_read_is_refused(
    name: str, options: dict[str, object], message: str, tmp_path: Path
):
    pytest.importorskip("gguf", reason="gguf is not installed")
    source = randomise(GPTModel(GPTConfig(1024, 32, 48, 4, 2))).save_checkpoint(tmp_path / "model.pth")
    if options.get("config"):
        source = randomise(GPTModel(GPTConfig(1024, 32, 48, 4, 2, activation="gelu"))).save_checkpoint(source)
    shutil.copy(EMBEDDED.with_suffix(".tiktoken"), source.with_suffix(".tiktoken"))
    before = names_in(tmp_path)
    with pytest.raises(UsageError, match=message):
        convert(source, tmp_path / name, **options)
    assert names_in(tmp_path) == before


def test_without_the_package_gguf_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["convert", str(EMBEDDED), str(tmp_path / "new.gguf"), "--to", "gguf"]) == 1
    assert "to write .gguf files, pip install 'gpt2lite[gguf]'" in capsys.readouterr().err
    assert names_in(tmp_path) == set()


def test_what_a_load_says_it_leaves_out_a_conversion_says_too(pth: Path, model: GPTModel):
    state = {**model.state_dict(), "v_head.summary.weight": torch.zeros(1, 48)}
    path = save_pth(state, pth.parent)
    with pytest.warns(UserWarning, match=r"opens the language model without v_head.summary.weight"):
        convert(path, pth.parent / "out.pth", config=HEADS)


# ---- every kind to every target, and back ------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("format", ["pth", "safetensors", "per-tensor"])
@pytest.mark.parametrize("to", ["book", "huggingface"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_to_every_target_and_back_with_the_same_bits(
    kind: str, to: str, format: str, tmp_path: Path
):
    make, save = KINDS[kind]
    peer = make()
    source = save(peer.state_dict(), tmp_path)
    (tmp_path / "out").mkdir()
    made = tmp_path / "out" / {"pth": "a.pth", "safetensors": "folder", "per-tensor": "parts"}[format]
    convert(source, made, to=to, format=format, config=HEADS)
    expected = expected_parameters(peer.state_dict())
    there = assert_loads_as(made, expected)
    back = convert(made, tmp_path / "out" / "back.pth")
    assert_loads_as(back, expected)
    if format != "safetensors" or to == "huggingface":  # the book's names in safetensors are both copies
        assert there.config.tied_head == GPTModel.from_checkpoint(source, config=HEADS).config.tied_head


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["ours-tied-pth", "ours-no-bias-pth", "hf-hub-safetensors", "hf-folder"])
def test_nanogpt_gets_every_bit(kind: str, tmp_path: Path):
    make, save = KINDS[kind]
    peer = make()
    if kind == "ours-no-bias-pth":
        peer.out_head.weight.data.copy_(peer.tok_emb.weight)
    source = save(peer.state_dict(), tmp_path)
    stored = torch.load(convert(source, tmp_path / "n.pt", to="nanogpt", config=HEADS), weights_only=True)
    assert stored["model_args"]["bias"] == (kind != "ours-no-bias-pth")
    wanted = expected_parameters(peer.state_dict())
    rows = DIALECTS["nanogpt"].rows
    for theirs, mine, placement in rows:
        for i in range(TINY.n_layers):
            prefix = "" if mine == "out_head.weight" else "transformer."
            if mine.format(i=i) in wanted:
                found = placement.of(stored["model"][prefix + theirs.format(i=i)])
                assert torch.equal(found, wanted[mine.format(i=i)])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("to", ["book", "huggingface"])
def test_a_cast_is_torchs(to: str, pth: Path, model: GPTModel):
    made = convert(pth, pth.parent / "half.safetensors", to=to, dtype=torch.bfloat16, config=HEADS)
    loaded = GPTModel.from_checkpoint(made)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name


def test_a_tied_head_is_one_storage_in_the_books_pth(tied_model: GPTModel, tmp_path: Path):
    source = save_pth(tied_model.state_dict(), tmp_path)
    state = torch.load(convert(source, tmp_path / "b.pth", config=HEADS), weights_only=True)
    assert state["out_head.weight"].data_ptr() == state["tok_emb.weight"].data_ptr()


def test_the_data_of_a_safetensors_file_begin_aligned(pth: Path):
    raw = convert(pth, pth.parent / "a.safetensors", config=HEADS).read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("destination", "arguments", "message"),
    [
        ("model.pth", {}, "model.pth: is the source itself"),
        ("out.pth", {"to": "llama"}, "unknown target 'llama'; choose from book, huggingface, nanogpt"),
        ("out.pth", {"format": "zip"}, "unknown format 'zip'; choose from pth, safetensors, per-tensor"),
        ("out.pth", {"format": "safetensors"}, "its suffix says pth, format says safetensors"),
        ("out.pth", {"max_shard_size": "1MiB"}, "only a folder of safetensors has shards"),
        ("out", {"max_shard_size": "much"}, "'much' is not a memory size"),
        ("there", {}, "there: already exists; choose a new folder"),
        ("there", {"format": "pth"}, "is a folder, which a file cannot replace"),
        ("nowhere/out.pth", {}, "the folder .*nowhere does not exist"),
        ("out.pth", {"dtype": torch.int8}, "dtype must be a floating-point"),
        ("out.pth", {"config": {"n_heads": 4, "tied_head": True}}, "are two tensors; the model ties"),
    ],
)
def test_what_cannot_be_done_is_one_error_before_anything_is_written(
    destination: str, arguments: dict[str, object], message: str, pth: Path
):
    (pth.parent / "there").mkdir()
    before = names_in(pth.parent)
    with pytest.raises((UsageError, CheckpointError), match=message):
        convert(pth, pth.parent / destination, **{"config": HEADS, **arguments})
    assert names_in(pth.parent) == before


def test_a_mistyped_option_is_a_type_error_that_names_the_nearest(pth: Path):
    with pytest.raises(TypeError, match="'shard_size'; did you mean max_shard_size"):
        convert(pth, pth.parent / "out", shard_size=1)  # type: ignore[call-arg]


def with_dtype(path: Path, name: str, code: str) -> Path:
    """A safetensors file, one of its tensors said to be of another dtype."""
    raw = path.read_bytes()
    length, header = int.from_bytes(raw[:8], "little"), json_header(path)
    changed = json.dumps(header | {name: {**header[name], "dtype": code}}).encode()  # type: ignore[dict-item]
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])
    return path


@pytest.mark.parametrize("strategy", ["stream", "mmap", "baseline"])
def test_a_dtype_that_torch_lacks_is_refused_where_it_is_needed_and_only_there(
    strategy: str, model: GPTModel, tmp_path: Path
):
    state = {**model.state_dict(), "beside": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    beside = with_dtype(tmp_path / "model.safetensors", "beside", "F4")
    loaded = GPTModel.from_checkpoint(beside, strategy=strategy, config=HEADS)
    assert torch.equal(loaded.pos_emb.weight, model.pos_emb.weight)
    needed = with_dtype(beside, "pos_emb.weight", "F4")
    with pytest.raises(CheckpointError, match=r"pos_emb\.weight has dtype F4, which torch lacks"):
        GPTModel.from_checkpoint(needed, strategy=strategy, config=HEADS)


@pytest.mark.parametrize("leaves", [("lora.A",), ("lora.A", "lora.B"), ("mask",)])
def test_adapters_and_masks_of_a_dtype_that_torch_lacks_are_not_left_out_silently(
    leaves: tuple[str, ...], model: GPTModel, tmp_path: Path
):
    state, layer = dict(model.state_dict()), "trf_blocks.0.att.W_query"
    if "mask" in leaves:
        layer = "trf_blocks.0.att"
        state[f"{layer}.mask"] = torch.ones(32, 32)
    else:
        state[f"{layer}.linear.weight"] = state.pop(f"{layer}.weight")
        state[f"{layer}.lora.A"] = torch.ones(TINY.emb_dim, 4)
        state[f"{layer}.lora.B"] = torch.ones(4, TINY.emb_dim)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    for leaf in leaves:
        with_dtype(path, f"{layer}.{leaf}", "F4")
    with pytest.raises(CheckpointError, match=f"{leaves[0]} has dtype F4"):
        GPTModel.from_checkpoint(path, config=HEADS)


def test_a_link_to_the_source_is_the_source(pth: Path):
    os.link(pth, pth.parent / "link.pth")
    with pytest.raises(UsageError, match="is the source itself"):
        convert(pth, pth.parent / "link.pth", config=HEADS)


def test_too_little_disk_is_an_error_before_writing(pth: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="are missing"):
        convert(pth, pth.parent / "out.pth", config=HEADS)
    assert names_in(pth.parent) == {"model.pth"}


# ---- faults and cuts ---------------------------------------------------------------------------------------


def flip_once(after: int) -> Callable[[Iterable[memoryview]], Iterator[memoryview]]:
    """`made_ahead` that flips a bit of the first large chunk on its way to the file."""

    def flipped(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        left = after
        for chunk in made_ahead(chunks):
            left -= len(chunk)
            if left < 0:
                left, data = 1 << 60, bytearray(chunk)
                data[len(data) // 2] ^= 4
                chunk = memoryview(data)
            yield chunk

    return flipped


@pytest.mark.parametrize("destination", ["out.safetensors", "out"])
def test_verify_finds_a_flipped_bit_and_keeps_the_old(
    destination: str, pth: Path, monkeypatch: pytest.MonkeyPatch
):
    (pth.parent / "out.safetensors").write_text("old")
    monkeypatch.setattr("gpt2lite.checkpoint.safetensors.made_ahead", flip_once(50_000))
    with pytest.raises(CheckpointError, match=r"read back, .* differ from what was written"):
        convert(pth, pth.parent / destination, to="huggingface", config=HEADS)
    assert names_in(pth.parent) == {"model.pth", "out.safetensors"}
    assert (pth.parent / "out.safetensors").read_text() == "old"


def test_verify_finds_a_flipped_bit_in_a_zip(pth: Path, monkeypatch: pytest.MonkeyPatch):
    fill = converting.fill_torch_zip

    def fill_and_flip(path: Path, *rest: object) -> None:
        fill(path, *rest)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(converting, "fill_torch_zip", fill_and_flip)
    with pytest.raises(CheckpointError, match="read back"):
        convert(pth, pth.parent / "out.pth", config=HEADS)
    assert names_in(pth.parent) == {"model.pth"}
    assert convert(pth, pth.parent / "out.pth", config=HEADS, verify=False).exists()


def test_a_source_that_changes_meanwhile_leaves_nothing(pth: Path):
    def touch(done: int, total: int) -> None:
        os.utime(pth, (1, 1))

    with pytest.raises(CheckpointError, match="changed while it was being read"):
        convert(pth, pth.parent / "out", config=HEADS, progress=touch)
    assert names_in(pth.parent) == {"model.pth"}


SLOWLY = """
import sys, time
from gpt2lite import convert
def wait(done, total):
    print("begun", flush=True)
    time.sleep(60)
convert(sys.argv[1], sys.argv[2], to="huggingface", config={"n_heads": 4}, progress=wait)
"""


@pytest.fixture
def begun(pth: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a conversion that has written a part and waits."""
    started = []

    def start(destination: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SLOWLY, str(pth), str(pth.parent / destination)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("destination", ["out.pth", "out.safetensors"])
def test_a_kill_in_the_middle_leaves_the_old_file(destination: str, begun, pth: Path):
    (pth.parent / destination).write_text("old")
    process = begun(destination)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (pth.parent / destination).read_text() == "old"
    assert not (pth.parent / "out.json").exists()


@pytest.mark.parametrize("destination", ["out.pth", "out.safetensors", "out"])
def test_ctrl_c_in_the_middle_leaves_nothing(destination: str, begun, pth: Path):
    process = begun(destination)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert process.returncode != 0
    assert names_in(pth.parent) == {"model.pth"}


def test_a_disk_that_fills_half_way_leaves_the_old_file(pth: Path, monkeypatch: pytest.MonkeyPatch):
    def full(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        yield from itertools.islice(made_ahead(chunks), 3)
        raise OSError(28, "No space left on device")

    (pth.parent / "out.safetensors").write_text("old")
    monkeypatch.setattr("gpt2lite.checkpoint.safetensors.made_ahead", full)
    with pytest.raises(OSError, match="No space left"):
        convert(pth, pth.parent / "out.safetensors", config=HEADS)
    monkeypatch.undo()
    assert names_in(pth.parent) == {"model.pth", "out.safetensors"}


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("destination", ["out.safetensors", "out.pth"])
def test_converting_holds_a_few_chunks_and_not_the_model(destination: str, tmp_path: Path):
    script = """
import sys
from gpt2lite import convert, track_memory
small, source, made = sys.argv[1:]
convert(small, small + "." + made.rpartition(".")[2], to="huggingface", config={"n_heads": 8})
with track_memory() as memory:
    convert(source, made, to="huggingface", config={"n_heads": 8})
print(memory.peak_host_anonymous)
"""
    write_random_checkpoint(GPTConfig(100, 32, 64, 8, 2), tmp_path / "small")
    write_random_checkpoint(MEDIUM, tmp_path / "model.pth")
    words = [str(tmp_path / name) for name in ("small", "model.pth", destination)]
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert int(result.stdout) <= 96 * MIB  # of 133; a busy machine's sampler counts some of what is mapped


# ---- save_checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["saved.pth", "saved.safetensors"])
def test_what_is_saved_loads_with_nothing_said(name: str, tied: bool, tmp_path: Path):
    model = randomise(GPTModel(replace(TINY, tied_head=tied, drop_rate=0.1)))
    loaded = assert_loads_as(model.save_checkpoint(tmp_path / name), model.state_dict())
    assert loaded.config == model.config
    assert names_in(tmp_path) == {name}
    assert (loaded.out_head.weight is loaded.tok_emb.weight) == tied


def test_a_model_with_turned_weights_is_saved(tmp_path: Path):
    state = huggingface().state_dict()
    loaded = GPTModel.from_checkpoint(save_pth(state, tmp_path), strategy="mmap", config=HEADS)
    assert_loads_as(loaded.save_checkpoint(tmp_path / "saved.pth"), expected_parameters(state))


OVER_ITSELF = """
import sys, torch
from gpt2lite import GPTModel
path = sys.argv[1]
model = GPTModel.from_checkpoint(path, strategy="mmap", config={"n_heads": 4})
with torch.no_grad():
    model.pos_emb.weight.add_(1)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
for _ in range(2):
    model.save_checkpoint(path)
    again = GPTModel.from_checkpoint(path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
print("done")
"""


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_model_that_stands_on_a_file_is_saved_over_it(name: str, model: GPTModel, tmp_path: Path):
    path = model.save_checkpoint(tmp_path / name)
    result = subprocess.run(
        [sys.executable, "-c", OVER_ITSELF, str(path)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.bin", "the name must end in .pth or .safetensors"), ("no/m.pth", "does not exist")],
)
def test_a_wrong_place_to_save_is_a_usage_error(name: str, message: str, model: GPTModel, tmp_path: Path):
    with pytest.raises(UsageError, match=message):
        model.save_checkpoint(tmp_path / name)
    assert names_in(tmp_path) == set()


def test_a_model_on_meta_has_nothing_to_save(tmp_path: Path):
    with torch.device("meta"):
        model = GPTModel(TINY)
    with pytest.raises(UsageError, match="is on the meta device and has no values to write"):
        model.save_checkpoint(tmp_path / "model.pth")


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made(
    pth: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "500")
    words = ["convert", str(pth), str(pth.parent / "hf"), "--to", "hf", "--n-heads", "4"]
    assert main([*words, "--max-shard-size", "100KiB", "--dtype", "float16"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["source"] == f"{pth} (book, torch_zip)"
    assert said["destination"] == str(pth.parent / "hf")
    assert (said["dialect"], said["format"]) == ("huggingface", "safetensors")
    assert said["verified"] == "yes, every tensor read back"
    assert said["size"].endswith("in 41 tensors")


def test_the_script_converts_without_reading_back(pth: Path):
    script = Path(__file__).resolve().parent.parent / "scripts" / "convert.py"
    words = [str(pth), str(pth.parent / "x.pth"), "--n-heads", "4", "--no-verify"]
    result = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].split() == ["verified", "no"]


def test_the_command_refuses_in_one_line(pth: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", str(pth), str(pth), "--n-heads", "4"]) == 1
    assert capsys.readouterr().err == f"gpt2lite: {pth}: is the source itself; choose another place\n"
