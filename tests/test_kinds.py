"""Folders are what their content says, and what is no checkpoint says what it is and what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from torch import nn

from gpt2lite import CheckpointError, GPTModel, save_per_tensor
from gpt2lite.checkpoint import open_checkpoint

HEADS = {"n_heads": TINY.n_heads}
W = {"w": torch.arange(3.0)}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


# ---- folders -----------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.mark.parametrize("name", ["ckpt.pt", "model.pth", "gpt2.bin", "model-final.safetensors", "last.ckpt"])
def test_a_folder_with_one_checkpoint_opens_it_whatever_lies_beside(
    name: str, model: GPTModel, tmp_path: Path
):
    optimizer, scheduler = trained(model)
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / name)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state_0.pth")
    torch.save({"scale": 2.0}, tmp_path / "scaler.pt")
    torch.save({"args": 1}, tmp_path / "training_args.bin")
    (tmp_path / "train.bin").write_bytes(bytes(100))
    (tmp_path / "log.txt").write_text("step 1")
    loaded = GPTModel.from_checkpoint(tmp_path, config=HEADS)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert open_checkpoint(tmp_path).path == tmp_path / name


def test_two_checkpoints_are_both_named(tmp_path: Path):
    torch.save(W, tmp_path / "ckpt.pt")
    torch.save(W, tmp_path / "best.pth")
    message = refusal(tmp_path)
    assert message == f"{tmp_path}: holds best.pth, ckpt.pt; pass the one that is the checkpoint"
    assert open_checkpoint(tmp_path / "best.pth").tensors.keys() == W.keys()


def test_a_tensor_beside_a_checkpoint_does_not_make_it_a_folder_of_tensors(tmp_path: Path):
    torch.save(W, tmp_path / "ckpt.pt")
    torch.save(torch.ones(2), tmp_path / "mean.pt")
    assert open_checkpoint(tmp_path).path == tmp_path / "ckpt.pt"


def test_a_checkpoint_beside_a_folder_of_tensors_is_asked_about(model: GPTModel, tmp_path: Path):
    folder = save_per_tensor(model, tmp_path / "parts")
    assert open_checkpoint(folder).format == "tensor_folder"
    torch.save(W, folder / "model.pth")
    count = len(model.state_dict())
    assert refusal(folder) == (
        f"{folder}: holds {count} files of exactly one tensor each and model.pth; pass the one that is the "
        "checkpoint"
    )


def test_a_tensor_may_be_called_as_a_passenger_is(tmp_path: Path):
    module = nn.ModuleDict(
        {"scaler": nn.Linear(2, 2), "adapter": nn.Linear(2, 2), "optimizer": nn.Linear(2, 2)}
    )
    folder = save_per_tensor(module, tmp_path / "parts")
    assert open_checkpoint(folder).tensors.keys() == module.state_dict().keys()


def test_a_damaged_file_in_a_folder_of_tensors_is_named(model: GPTModel, tmp_path: Path):
    folder = save_per_tensor(model, tmp_path / "parts")
    whole = (folder / "tok_emb.weight.pt").read_bytes()
    (folder / "tok_emb.weight.pt").write_bytes(whole[:-9])
    assert "tok_emb.weight.pt" in refusal(folder)


def test_deepspeeds_one_rank_opens_and_its_optimizer_is_a_passenger(model: GPTModel, tmp_path: Path):
    folder = tmp_path / "global_step1"
    folder.mkdir()
    module = {"module": model.state_dict(), "global_steps": 1, "optimizer": None}
    torch.save(module, folder / "mp_rank_00_model_states.pt")
    for rank in range(2):
        optimizer = {"optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}}}
        torch.save(optimizer, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert open_checkpoint(folder).path.name == "mp_rank_00_model_states.pt"
    loaded = GPTModel.from_checkpoint(folder, config=HEADS)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
            r"several model-parallel ranks; .*zero_to_fp32\.py",
        ),
        (["layer_00-model_states.pt", "mp_rank_00_model_states.pt"], r"ranks; .*zero_to_fp32\.py"),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], r"ZeRO-3 checkpoint, in parts; .*zero_to_fp32\.py"),
        (["__0_0.distcp"], "a distributed checkpoint of torch.*dcp_to_torch"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_checkpoint_in_parts_is_refused_with_the_way_to_join_it(
    names: list[str], message: str, tmp_path: Path
):
    for name in names:
        torch.save({"module": W}, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_distributed_checkpoint_is_opened(tmp_path: Path):
    from torch.distributed.checkpoint import save

    save(W, checkpoint_id=tmp_path / "dcp", no_dist=True)
    opened = open_checkpoint(tmp_path / "dcp")
    assert opened.format == "dcp"
    assert opened.tensors.keys() == W.keys()


@pytest.mark.parametrize(
    ("folders", "likely"),
    [
        (["checkpoint-500"], "checkpoint-500"),
        (["checkpoint-500", "checkpoint-1000", "runs"], "checkpoint-1000"),
        (["global_step9", "global_step10"], "global_step10"),
        (["final"], "final"),
    ],
)
def test_a_folder_of_folders_names_the_likely_one(folders: list[str], likely: str, tmp_path: Path):
    for name in folders:
        (tmp_path / name).mkdir()
    (tmp_path / "trainer_state.json").write_text("{}")
    assert refusal(tmp_path).endswith(f". Did you mean {tmp_path / likely}?")


def test_folders_without_a_likely_one_are_named_alone(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert refusal(tmp_path).endswith("found a, b")


def test_an_optimizer_alone_is_said(model: GPTModel, tmp_path: Path):
    optimizer, _ = trained(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"optimizer_state_dict": optimizer.state_dict(), "step": 3}, tmp_path / "state.pth")
    for path in (tmp_path / "optimizer.pt", tmp_path / "state.pth", tmp_path):
        assert refusal(path).endswith("only an optimizer's state; pass the weights file")
    torch.save({"model": W, "optimizer": optimizer.state_dict()}, tmp_path / "whole.pth")
    assert "model.w" in open_checkpoint(tmp_path / "whole.pth").tensors


# ---- what is no checkpoint ---------------------------------------------------------------------------------


def zipped(**entries: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "."), content)
    return data.getvalue()


def tarred(name: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return data.getvalue()


def by_numpy(save: Callable[..., None], *arrays: numpy.ndarray, **named: numpy.ndarray) -> bytes:
    data = io.BytesIO()
    save(data, *arrays, **named)
    return data.getvalue()


def scripted() -> bytes:
    data = io.BytesIO()
    module = torch.jit.trace_module(nn.Linear(2, 2), {"forward": torch.ones(1, 2)})
    torch.jit.save(module, data)
    return data.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
NOT_CHECKPOINTS: dict[str, tuple[bytes, str]] = {
    "Git LFS": (LFS, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "HTML": (b"<!DOCTYPE html><html><title>Virus scan warning", "is a web page; log in .* download"),
    "HTML, lower case": (b"\n <html><head>", "is a web page"),
    "HTML with a mark": (b"\xef\xbb\xbf<!doctype html>", "is a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a web page"),
    "a JSON error": (b'{"error":"No such repository"}', r"a server's error \(No such repository\); download"),
    "a JSON message": (b'{"message": "Not Found", "status": "404"}', r"a server's error \(Not Found\)"),
    "config.json": (b'{"model_type": "gpt2", "n_head": 12}', "a model's config; pass its folder"),
    "other JSON": (b'{"a": 1}', "it is JSON, not weights; pass the weights file"),
    "a JSON list": (b"[1, 2]", "is text, not weights"),
    "text": (b"Entry not found", "is text, not weights; if you downloaded it, try again"),
    "UTF-8": ("Nicht gefunden: größer".encode(), "is text, not weights"),
    "gzip": (gzip.compress(b"x" * 99), "is compressed with gzip; unpack it first"),
    "bzip2": (bz2.compress(b"x" * 99), "is compressed with bzip2; unpack it first"),
    "xz": (lzma.compress(b"x" * 99), "is compressed with xz; unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00" + bytes(99), "is compressed with zstd; unpack it first"),
    "tar": (tarred("model/model.safetensors"), "is a tar archive; unpack it first"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 148, 24), "is a GGUF or ggml file of llama.cpp; pass"),
    "GGUF of 123 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 123, 24), "is a GGUF or ggml file"),
    "ggml": (b"lmgg" + struct.pack("<6i", 50257, 1024, 768, 12, 12, 1), "is a GGUF or ggml file"),
    "ggjt": (b"tjgg" + struct.pack("<i", 3), "is a GGUF or ggml file"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.1:\xff\x01", "is an ONNX graph; pass the checkpoint"),
    "ONNX without a producer": (b"\x08\x0a:\xd0\x01\n\x03abc", "is an ONNX graph"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is HDF5, as Keras writes tf_model.h5; save it"),
    "msgpack": (b"\x81\xabtransformer\x85\xa1h\x8c\xa10", "is Flax's msgpack; save it as"),
    "msgpack of many": (b"\xde\x00\x94\xa3wte\x81", "is Flax's msgpack"),
    "npy": (by_numpy(numpy.save, numpy.ones(3)), "is one NumPy array"),
    "npz": (by_numpy(numpy.savez, wte=numpy.ones(3)), r"NumPy's \.npz; torch\.save"),
    "compressed npz": (by_numpy(numpy.savez_compressed, wte=numpy.ones(3)), r"NumPy's \.npz"),
    "TorchScript": (scripted(), r"a TorchScript program, or Rust's \.ot; .*torch\.jit\.load"),
    "a zip": (zipped(**{"model/config.json": b"{}", "model/model.safetensors": b""}),
        "it holds model/config.json, model/model.safetensors: unpack it first"),
    "a bare pickle": (pickle.dumps({"w": [1.0]}), "is a bare pickle, readable only by running it"),
    "TensorFlow's note": (b'model_checkpoint_path: "model.ckpt"\n', "pass its folder or a checkpoint's .ind"),
    "zeros": (bytes(999), r"begins with b'\\x00"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "pytorch_model.bin"])
def test_what_is_no_checkpoint_says_what_it_is_and_what_to_do(
    data: bytes, message: str, name: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(data)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_the_advice_for_torchscript_gives_a_checkpoint(tmp_path: Path):
    """Also for Rust's names, which have | where others have a dot."""
    holder = nn.Module()
    holder.register_parameter("h|0|w", nn.Parameter(torch.arange(3.0)))
    torch.jit.save(torch.jit.script(holder), tmp_path / "rust_model.ot")
    state = torch.jit.load(tmp_path / "rust_model.ot").state_dict()
    torch.save({n.replace("|", "."): t for n, t in state.items()}, tmp_path / "model.pth")
    assert list(open_checkpoint(tmp_path / "model.pth").tensors) == ["h.0.w"]


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "model.gguf"])
def test_a_folder_with_nothing_but_what_is_not_read_says_what_that_is(name: str, tmp_path: Path):
    data = {
        "h5": NOT_CHECKPOINTS["HDF5"],
        "msgpack": NOT_CHECKPOINTS["msgpack"],
        "gguf": NOT_CHECKPOINTS["GGUF"],
    }
    content, message = data[name.rpartition(".")[2]]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_header_whose_length_begins_like_gzip_is_safetensors(tmp_path: Path):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    length = 0x00088B1F
    data = length.to_bytes(8, "little") + header.ljust(length) + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert list(open_checkpoint(tmp_path / "model.safetensors").tensors) == ["w"]
