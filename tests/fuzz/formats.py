"""Sound files of every format that is read, by the real writers, and how each is read before its weights."""

from __future__ import annotations

import base64
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import torch

from gpt2lite import GPTConfig, GPTModel, Recipe, convert, finetune, load_lora, open_model
from gpt2lite.finetuning.data import open_tokens, text_batches, text_windows, tokenize_file
from gpt2lite.finetuning.loop import read_metrics
from gpt2lite.finetuning.states import Task, newest_state, saved_recipe
from gpt2lite.tokenizer import CHARACTERS, files_beside, tokenizer_files, tokenizer_for

TINY = GPTConfig(vocab_size=300, context_length=16, emb_dim=16, n_heads=2, n_layers=2, tied_head=True)
CLASSES = GPTConfig(vocab_size=300, context_length=16, emb_dim=16, n_heads=2, n_layers=2, n_classes=3)
TF = Path(__file__).resolve().parent.parent / "data" / "openai_tf_tiny"


@dataclass(frozen=True)
class Format:
    """Writes a folder; `files` are those to mutate, by how; `read` is given the folder."""

    write: Callable[[Path], object]
    files: dict[str, str]
    read: Callable[[Path], object]


def _model(config: GPTConfig = TINY) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(config)


def opens(name: str, **config: int) -> Callable[[Path], None]:
    """Everything that is said of a checkpoint before a weight is read."""

    def read(folder: Path) -> None:
        opened = open_model(folder / name, config=config or None, local_files_only=True)
        opened.config, opened.labels  # noqa: B018
        if files_beside(opened.path):
            tokenizer_for(opened.path, opened.config.vocab_size)

    return read


def _said(folder: Path, name: str = "model.pth", legacy: bool = False) -> None:
    """As a training script saves: a dict with the config, numbers and a log beside the weights."""
    content = {"model": _model().state_dict(), "n_heads": 2, "log": [0.5, 0.25], "config": {"n_heads": 2}}
    torch.save(content, folder / name, _use_new_zipfile_serialization=not legacy)


def _hub(folder: Path) -> None:
    _said(folder)
    convert(folder / "model.pth", folder / "hub", to="huggingface")
    for file in (folder / "hub").iterdir():
        file.rename(folder / file.name)
    (folder / "hub").rmdir()
    (folder / "model.pth").unlink()
    _tree(folder)


def _shards(folder: Path) -> None:
    _said(folder)
    convert(folder / "model.pth", folder / "hub", to="huggingface", max_shard_size="20000B")
    for file in (folder / "hub").iterdir():
        file.rename(folder / file.name)
    (folder / "model.pth").unlink()


def _dcp(folder: Path) -> None:
    _said(folder)
    convert(folder / "model.pth", folder / "dcp", format="dcp")


def _per_tensor(folder: Path) -> None:
    _said(folder)
    convert(folder / "model.pth", folder / "parts", format="per-tensor")


def _llmc(folder: Path) -> None:
    numbers = (16, 300, 2, 2, 16, 304)
    C, T, L, Vp = 16, 16, 2, 304
    count = Vp * C + T * C + L * (2 * C + 3 * C * (C + 1) + C * (C + 1) + 2 * C + 8 * C * C + 5 * C) + 2 * C
    header = struct.pack("<256i", 20240326, 3, *numbers, *[0] * 248)
    (folder / "model.bin").write_bytes(header + bytes(4 * count))


def _classifier(folder: Path) -> None:
    _model(CLASSES).save_checkpoint(folder / "model.safetensors", labels=["a", "b", "c"])
    (folder / "labels.json").write_text('["a", "b", "c"]')
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2, "n_embd": 16}))


def _adapter(folder: Path) -> None:
    from safetensors.torch import save_file

    _hub(folder)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "bias": "none"}
    said |= {"base_model_name_or_path": "gpt2", "rank_pattern": {}, "alpha_pattern": {"h.0.attn": 4}}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    names = [f"base_model.model.transformer.h.{i}.attn.c_attn.lora_" for i in range(2)]
    tensors = {f"{name}A.weight": torch.zeros(2, 16) for name in names}
    tensors |= {f"{name}B.weight": torch.zeros(48, 2) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors")


def _beside(folder: Path) -> None:
    torch.save(_model().state_dict(), folder / "model.pth")
    (folder / "model.json").write_text('{"n_heads": 2, "n_layers": 2, "activation": "gelu_tanh"}')


def _with_tokens(folder: Path) -> None:
    _said(folder)
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b" a"]
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks)]
    (folder / "model.tiktoken").write_bytes(b"\n".join(lines))


def _lists(folder: Path) -> None:
    _said(folder)
    vocab = {token: id for id, token in enumerate([*CHARACTERS, "ab", "abc", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')


def _tree(folder: Path) -> None:
    vocab = {token: id for id, token in enumerate([*CHARACTERS, "ab", "abc"])}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b", "ab c"], "dropout": None}
    before = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    row = {"id": 258, "content": "<|endoftext|>", "special": True, "normalized": False}
    row |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    tree = {"version": "1.0", "added_tokens": [row], "normalizer": None, "pre_tokenizer": before}
    tree |= {"post_processor": None, "decoder": {**before}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False))


def _characters(folder: Path) -> None:
    _said(folder)
    letters = [chr(0x4E00 + id) for id in range(TINY.vocab_size)]
    meta = {
        "stoi": {c: i for i, c in enumerate(letters)},
        "itos": dict(enumerate(letters)),
        "vocab_size": 300,
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def _run(folder: Path) -> None:
    recipe = Recipe(steps=2, batch_size=2, seq_len=8, save_every=1, warmup_steps=0, lora_rank=2)
    tokens = torch.arange(200).to(torch.uint16)
    task = Task(text_batches(tokens, 8, 2, 0), text_windows(tokens, 8, 2, 1))
    finetune(_model(), task, folder / "out", recipe)


def _read_run(folder: Path) -> None:
    read_metrics(folder / "out")
    newest_state(folder / "out")
    saved_recipe(folder / "out")


def _read_lora(folder: Path) -> None:
    load_lora(_model(), folder / "out" / "adapters.pth")


def _ids(folder: Path) -> None:
    (folder / "text.txt").write_text("abc ab\n" * 100)
    _with_tokens(folder)
    encoding = tokenizer_for(folder / "model.pth", 300)
    tokenize_file(folder / "text.txt", folder / "train.npy", encoding)
    tokenize_file(folder / "text.txt", folder / "train.bin", encoding)
    raw = (folder / "train.bin").read_bytes()
    head = struct.pack("<256i", 20240520, 1, len(raw) // 2, *[0] * 253)
    (folder / "llmc.bin").write_bytes(head + raw)


def _read_ids(folder: Path) -> None:
    for name in ("train.npy", "train.bin", "llmc.bin"):
        open_tokens(folder / name, 300)


def _tokenizer_is_copied(folder: Path) -> None:
    opens("")(folder)
    tokenizer_files(folder, in_folder=True)


FORMATS = {
    "pth": Format(_said, {"model.pth": "zip"}, opens("model.pth")),
    "legacy": Format(lambda f: _said(f, legacy=True), {"model.pth": "pickle"}, opens("model.pth")),
    "safetensors": Format(_classifier, {"model.safetensors": "safetensors"}, opens("")),
    "config": Format(_classifier, {"config.json": "json", "labels.json": "json"}, opens("")),
    "shards": Format(_shards, {"model.safetensors.index.json": "json"}, opens("")),
    "hub": Format(_hub, {"config.json": "json"}, opens("")),
    "dcp": Format(_dcp, {"dcp/.metadata": "pickle"}, opens("dcp")),
    "per tensor": Format(_per_tensor, {"parts/config.json": "json"}, opens("parts")),
    "tf": Format(
        lambda f: copytree(TF, f, dirs_exist_ok=True),
        {"model.ckpt.index": "bytes", "checkpoint": "bytes", "hparams.json": "json"},
        opens(""),
    ),
    "llm.c": Format(_llmc, {"model.bin": "head"}, opens("model.bin")),
    "adapter": Format(
        _adapter, {"adapter_config.json": "json", "adapter_model.safetensors": "safetensors"}, opens("")
    ),
    "side file": Format(_beside, {"model.json": "json"}, opens("model.pth")),
    "tiktoken": Format(_with_tokens, {"model.tiktoken": "lines"}, opens("model.pth")),
    "lists": Format(
        _lists,
        {"vocab.json": "json", "merges.txt": "lines", "tokenizer_config.json": "json"}
        | {"special_tokens_map.json": "json"},
        opens(""),
    ),
    "tokenizer.json": Format(_hub, {"tokenizer.json": "json"}, _tokenizer_is_copied),
    "meta.pkl": Format(_characters, {"meta.pkl": "pickle"}, opens("model.pth")),
    "state": Format(_run, {"out/step-000002.pth": "zip", "out/metrics.jsonl": "lines"}, _read_run),
    "adapters.pth": Format(_run, {"out/adapters.pth": "zip"}, _read_lora),
    "tokens": Format(_ids, {"train.npy": "head", "train.bin": "head", "llmc.bin": "head"}, _read_ids),
}
