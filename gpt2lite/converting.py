"""One program's checkpoint as another's: names, orientation, layout and file, tensor by tensor.

Names and orientation come from the dialects' tables, read backwards; what is special of a target's files
stands in TARGETS.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2lite.checkpoint.chunks import CHUNK_BYTES, TensorToWrite, join
from gpt2lite.checkpoint.manifest import Manifest
from gpt2lite.checkpoint.reading import map_tensors, memory_of, read_bytes_into
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.checkpoint.writing import (
    Arrange,
    Progress,
    destination_of,
    fill_tensor_folder,
    fill_torch_zip,
    replacing,
    require_new_folder,
    require_space,
    spans_on_disk,
)
from gpt2lite.checkpoint.writing_safetensors import fill_safetensors, fill_safetensors_folder
from gpt2lite.config import GPTConfig
from gpt2lite.dialects import DIALECTS, Placement, expand_rows
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.loading.skeleton import build_on_meta
from gpt2lite.memory import parse_size
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened
from gpt2lite.tokenizer import GENERATION, hub_files, tokenizer_files, write_beside

HEAD, EMBEDDING = "out_head.weight", "tok_emb.weight"
END_OF_TEXT = 50256  # GPT-2's own token
MAX_LISTED = 5


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _transformers_config(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as GPT2LMHeadModel.save_pretrained writes it; both names of dtype, for old and new."""
    end = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied_head,
        **drops,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": _dtype_name(dtype),
        "torch_dtype": _dtype_name(dtype),
    }


def _nanogpt_args(config: GPTConfig) -> dict[str, Any]:
    """`model_args` of a nanoGPT checkpoint."""
    return {
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.emb_dim,
        "block_size": config.context_length,
        "bias": config.bias,
        "vocab_size": config.vocab_size,
        "dropout": config.drop_rate,
    }


def _nanogpt_state(config: GPTConfig) -> dict[str, Any]:
    """What lies beside `model` in nanoGPT's ckpt.pt: enough for sample.py and train.py --init_from=resume.

    The training begins at step 0 with its own settings: the optimizer's groups are those that nanoGPT makes,
    without moments, since there are none of this model.
    """
    biases = 6 * config.n_layers + 1 if config.bias else 0
    counts = {0.1: 4 * config.n_layers + 2, 0.0: 2 * config.n_layers + 1 + biases}  # by weight decay
    groups = [
        {"params": [torch.empty(0, device="meta") for _ in range(count)], "weight_decay": decay}
        for decay, count in counts.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
    begin = {"iter_num": 0, "best_val_loss": 1e9}
    return {"optimizer": optimizer, "model_args": _nanogpt_args(config), **begin}


def _nanogpt_fields(config: GPTConfig) -> GPTConfig:
    has_bias = config.bias or config.qkv_bias
    return replace(config, bias=has_bias, qkv_bias=has_bias, tied_head=True)


@dataclass(frozen=True, slots=True)
class Target:
    """What a program expects of a file beyond its dialect's names.

    `fields` gives the config that its model class has: biases that it has and the source lacks become zeros,
    which is exact. `prefix` stands before every name but the head's. `drops_tie` are the formats in which a
    tied head is left out, since its readers tie it. In a `.pth` the state dict is under `wrapper`, beside
    what `beside` says.
    """

    fields: Callable[[GPTConfig], GPTConfig]
    prefix: str = ""
    mask: str = ""
    drops_tie: tuple[str, ...] = ("per-tensor",)
    wrapper: str = ""
    beside: Callable[[GPTConfig], Mapping[str, Any]] | None = None
    folder_config: Callable[[GPTConfig, torch.dtype], dict[str, Any]] = lambda config, dtype: config.as_dict()


TARGETS = {
    "book": Target(fields=lambda config: replace(config, bias=True), mask="trf_blocks.{i}.att.mask"),
    "huggingface": Target(
        fields=lambda config: replace(config, bias=True, qkv_bias=True),
        prefix="transformer.",
        drops_tie=("safetensors", "per-tensor"),
        folder_config=_transformers_config,
    ),
    "nanogpt": Target(
        fields=_nanogpt_fields,
        prefix="transformer.",
        drops_tie=("safetensors", "per-tensor"),
        wrapper="model",
        beside=_nanogpt_state,
    ),
}
SUFFIXES = {".pth": "pth", ".pt": "pth", ".bin": "pth", ".safetensors": "safetensors"}
# No folder is named so by somebody who wants one, unlike `gpt2.v2`.
OTHER_FILES = ".ckpt .gguf .ggml .gz .h5 .index .json .msgpack .npy .npz .onnx .ot .pb .pickle .pkl .tar .zip"


# ---- what will be written ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """Everything that is to be written, decided from headers; `run` writes it."""

    source: Manifest
    destination: Path
    dialect: str
    to: str
    format: str
    config: GPTConfig
    tensors: tuple[TensorToWrite, ...]
    max_shard_bytes: int | None
    beside: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that will lie on disk."""
        ties = self.format != "safetensors"
        return sum(tensor.nbytes for tensor in self.tensors if not (ties and tensor.shares))

    @property
    def is_folder(self) -> bool:
        """Whether the destination will be a folder."""
        return _is_folder(self.destination, self.format)


def _is_folder(destination: Path, format: str) -> bool:
    return format == "per-tensor" or (
        format == "safetensors" and destination.suffix.lower() != ".safetensors"
    )


def _format_of(destination: Path, format: str | None) -> str:
    """The format that was asked for or that the destination's suffix says; a folder is safetensors."""
    suffix = destination.suffix.lower()
    said = SUFFIXES.get(suffix)
    if format is not None and format not in WRITERS:
        raise UsageError(f"no format is called {format!r}; there are {', '.join(WRITERS)}")
    if format and said and said != format:
        raise UsageError(f"{destination}: its suffix says {said}, format says {format}")
    found = format or said or "safetensors"
    if suffix in OTHER_FILES.split() and _is_folder(destination, found):
        wanted = f'take {", ".join(SUFFIXES)}, or none for a folder, or say format="pth"'
        raise UsageError(
            f"{destination}: {suffix} is the suffix of a file that is not written here; {wanted}"
        )
    return found


def _check_destination(source: Manifest, destination: Path, format: str, max_shard_bytes: int | None) -> None:
    folder = _is_folder(destination, format)
    if folder:
        require_new_folder(destination)
    followed = destination_of(destination)
    sources = (source.path, *(file.path for file in source.files))
    if followed.exists() and any(map(followed.samefile, sources)):
        raise UsageError(f"{destination}: is the source itself; name another place")
    if max_shard_bytes and (not folder or format != "safetensors"):
        raise UsageError(f"{destination}: shards go into a folder, as safetensors; name a folder")


def _views(opened: Opened[GPTModel], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every parameter by our name, mapped. Raises CheckpointError where one is missing or does not fit."""
    plan = opened.plan(dtype=dtype)
    mapped = map_tensors(plan.spans.values())
    return {
        name: target.placement.of(mapped[target.span.name])
        for target in plan.targets
        for name in target.names
    }


def _with_zeros(views: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The parameters that a model of `config` has: biases that the source lacks are zeros."""
    wanted = build_on_meta(lambda: GPTModel(config)).state_dict()
    like = views[EMBEDDING].dtype
    return {
        name: views[name] if name in views else torch.zeros(tensor.shape, dtype=like, device="cpu")
        for name, tensor in wanted.items()
    }


def _target_config(found: GPTConfig, to: str, views: Mapping[str, Tensor]) -> GPTConfig:
    """The config in which a target holds this model. Raises UsageError where it cannot."""
    config = TARGETS[to].fields(found)
    if found.n_classes and to != "book":
        raise UsageError(f"{to} has no head of {found.n_classes} classes, as this model has")
    if found.activation != "gelu_tanh" and to == "book":
        raise UsageError("the book's model computes GELU by tanh, this one exactly; take another target")
    if config.tied_head and not found.tied_head and not torch.equal(views[HEAD], views[EMBEDDING]):
        raise UsageError(f"{to} has no output head apart from its token embedding, as this model has")
    return config


def _groups(to: str, views: Mapping[str, Tensor], n_layers: int) -> dict[str, list[tuple[str, Placement]]]:
    """A target's stored names, and which of our parameters each is made of, in order."""
    groups: dict[str, list[tuple[str, Placement]]] = {}
    for theirs, ours, placement in expand_rows(DIALECTS[to].rows, n_layers):
        if ours in views:
            groups.setdefault(theirs, []).append((ours, placement))
    return groups


def _stored(
    to: str, format: str, config: GPTConfig, views: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[TensorToWrite]:
    """The tensors of the target's file: the inverse of its rows."""
    target = TARGETS[to]
    embedding = ""
    for theirs, group in _groups(to, views, config.n_layers).items():
        (ours, placement), *_ = group
        name = theirs if ours == HEAD else target.prefix + theirs
        embedding = name if ours == EMBEDDING else embedding
        parts = [placement.unplace(views[part]) for part, placement in group]
        axis = placement.rows_axis % parts[0].dim() if len(parts) > 1 else 0
        tensor = join(name, parts, axis=axis, dtype=dtype)
        if ours != HEAD or not config.tied_head:
            yield tensor
        elif format not in target.drops_tie:
            yield replace(tensor, shares=embedding)
    size, like = config.context_length, dtype or views[EMBEDDING].dtype
    for i in range(config.n_layers) if target.mask else ():
        yield TensorToWrite(
            target.mask.format(i=i), like, (size, size), lambda: [memory_of(_mask(size, like))]
        )


def _mask(size: int, dtype: torch.dtype) -> Tensor:
    """The book's buffer: 1 where a token must not see."""
    return torch.ones(size, size, dtype=torch.float32, device="cpu").triu(1).to(dtype)


def plan_conversion(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "book",
    format: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    config: GPTConfig | Mapping[str, Any] | None = None,
) -> Conversion:
    """Decide all that `convert` will write, and refuse what cannot be, before a byte is written.

    Reads headers; for a target that ties a head that the source does not, also head and embedding. Raises as
    `convert`.
    """
    if to not in TARGETS or to not in DIALECTS:
        raise UsageError(f"no target is called {to!r}; there are {', '.join(TARGETS.keys() & DIALECTS)}")
    destination = Path(destination)
    format = _format_of(destination, format)
    max_shard_bytes = parse_size(max_shard_size) if max_shard_size is not None else None
    opened = open_model(source, config=config)
    manifest = opened.reading.manifest
    if opened.reading.adapters:
        raise UsageError(
            f"{manifest.path}: holds LoRA layers; merge them first: "
            "GPTModel.from_checkpoint(…).save_checkpoint(…), with the book's lora_alpha=…"
        )
    _check_destination(manifest, destination, format, max_shard_bytes)
    views = _views(opened, dtype)
    written = _target_config(opened.config, to, views)
    tensors = tuple(_stored(to, format, written, _with_zeros(views, written), dtype))
    at = Path(source) if Path(source).exists() else opened.path
    beside = _beside(at, to, _is_folder(destination, format), written.vocab_size)
    return Conversion(
        manifest, destination, opened.reading.dialect, to, format, written, tensors, max_shard_bytes, beside
    )


def _beside(source: Path, to: str, in_folder: bool, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer's files, which go where the weights go, and what else transformers wants there."""
    if in_folder and to == "huggingface":
        return hub_files(source, vocab_size)
    return tokenizer_files(source, in_folder=in_folder)


# ---- writing -----------------------------------------------------------------------------------------------


class Writer(Protocol):
    """Writes a conversion's tensors to a path that is not there."""

    def __call__(
        self, job: Conversion, tensors: Sequence[TensorToWrite], path: Path, progress: Progress
    ) -> None:
        """Write."""


def _write_pth(job: Conversion, tensors: Sequence[TensorToWrite], path: Path, progress: Progress) -> None:
    target = TARGETS[job.to]
    beside = target.beside(job.config) if target.beside else {}
    if target.wrapper:
        arrange: Arrange = lambda state: {target.wrapper: state, **beside}  # noqa: E731
        fill_torch_zip(path, tensors, progress, job.config.as_dict(), arrange)
    else:
        fill_torch_zip(path, tensors, progress, job.config.as_dict())


def _write_safetensors(
    job: Conversion, tensors: Sequence[TensorToWrite], path: Path, progress: Progress
) -> None:
    if not job.is_folder:
        fill_safetensors(path, tensors, progress, job.config.as_dict())
        return
    path.mkdir()
    fill_safetensors_folder(path, tensors, progress, job.max_shard_bytes)
    (dtype, _), *_ = Counter(tensor.dtype for tensor in tensors).most_common()
    fields = TARGETS[job.to].folder_config(job.config, dtype)
    if GENERATION in job.beside:
        said = json.loads(job.beside[GENERATION])
        fields |= {name: said.get(name) for name in ("bos_token_id", "eos_token_id")}
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_per_tensor(
    job: Conversion, tensors: Sequence[TensorToWrite], path: Path, progress: Progress
) -> None:
    fill_tensor_folder(path, tensors, progress, job.config.as_dict())


WRITERS: dict[str, Writer] = {
    "pth": _write_pth,
    "safetensors": _write_safetensors,
    "per-tensor": _write_per_tensor,
}


# ---- proving -----------------------------------------------------------------------------------------------


def _hashed(tensor: TensorToWrite) -> tuple[TensorToWrite, Callable[[], bytes]]:
    """The tensor, and a function that says the hash of what it has yielded."""
    seen = hashlib.sha256()

    def chunks() -> Iterator[memoryview]:
        for chunk in tensor.chunks():
            seen.update(chunk)
            yield chunk

    return replace(tensor, chunks=chunks), seen.digest


def _hash_file(source: ByteSource, offset: int, nbytes: int) -> bytes:
    """The hash of a byte range, from the disk where the system can be told to forget its copy."""
    found = hashlib.sha256()
    buffer = memory_of(torch.empty(min(nbytes, CHUNK_BYTES), dtype=torch.uint8, device="cpu"))
    for begin in range(offset, offset + nbytes, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, offset + nbytes - begin)]
        read_bytes_into(piece, source, begin)
        found.update(piece)
    return found.digest()


def _written_files(job: Conversion, path: Path) -> list[Path]:
    shards = job.is_folder and job.format == "safetensors"
    return sorted(path.glob("*.safetensors")) if shards else [path]


def verify(job: Conversion, path: Path, digests: Mapping[str, Callable[[], bytes]]) -> None:
    """Read back what was written and compare names, dtypes, shapes and every byte's hash.

    Holds one chunk. Raises CheckpointError that names the tensors that differ.
    """
    spans = spans_on_disk(_written_files(job, path))
    inside = f"{TARGETS[job.to].wrapper}." if job.format == "pth" and TARGETS[job.to].wrapper else ""
    wanted = {inside + tensor.name: tensor for tensor in job.tensors}
    wrong = sorted(spans.keys() ^ wanted.keys())
    for name in spans.keys() & wanted.keys():
        span, tensor = spans[name], wanted[name]
        same = (span.dtype, span.shape, span.is_contiguous) == (tensor.dtype, tensor.shape, True)
        stored = tensor.shares if job.format != "safetensors" and tensor.shares else tensor.name
        if not same or _hash_file(span.source, span.offset, span.nbytes) != digests[stored]():
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        raise CheckpointError(
            job.destination,
            f"read back, {', '.join(wrong[:MAX_LISTED])}{more} differ(s) from what was "
            "written. Nothing was kept: the disk or the memory is not sound, or another program wrote there.",
        )


def run_conversion(job: Conversion, *, verified: bool = True, progress: Progress | None = None) -> Path:
    """Write what was planned, and read it back to prove it unless told not to. Raises as `convert`."""
    require_space(job.destination, job.nbytes)
    hashed = [_hashed(tensor) for tensor in job.tensors] if verified else []
    tensors = [tensor for tensor, _ in hashed] or list(job.tensors)
    with replacing(job.destination) as temporary:
        WRITERS[job.format](job, tensors, temporary, progress or (lambda done, total: None))
        for name, content in job.beside.items() if job.is_folder else ():
            (temporary / name).write_bytes(content)
        job.source.check_unchanged()
        if verified:
            verify(job, temporary, {tensor.name: digest for tensor, digest in hashed})
    if not job.is_folder:
        write_beside(job.destination, job.beside)
    return job.destination


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "book",
    format: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    config: GPTConfig | Mapping[str, Any] | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write any checkpoint that loads here as another program reads it, and return where.

    `to` is "book" (with the masks that its class wants), "huggingface" (transformers' GPT2LMHeadModel) or
    "nanogpt". `format` is "pth", "safetensors" or "per-tensor" (a folder with a file a tensor); by default
    the destination's suffix says it, and a name without is a folder of safetensors with its config.json, in
    shards of `max_shard_size` (bytes, or "5GB"). Other files carry the config in themselves. `dtype`
    casts; otherwise no value changes, and biases that a target has and the source lacks are zeros. `config`
    says what the source cannot, such as {"n_heads": 4}.

    Maps the source and holds two chunks of 8 MiB in memory, whatever the model. The destination appears
    whole or not at all, an old file stays until then; with `verify` only after every tensor was read back
    from the disk and its hash compared. `progress` is called with (bytes done, bytes in all).

    Raises CheckpointError for a source that is damaged or incomplete and for a result that is not what was
    written, UsageError for a wrong argument or what the target cannot say, OSError for a full disk; all but
    the second before anything is written.
    """
    job = plan_conversion(
        source,
        destination,
        to=to,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        config=config,
    )
    return run_conversion(job, verified=verify, progress=progress)
