"""One program's checkpoint as another's: names, orientation, layout and file, tensor by tensor.

Names and orientation come from the dialects' tables, read backwards; what is special about a target's
files is in TARGETS.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint import open_checkpoint, writing
from gpt2lite.checkpoint.dcp import fill_dcp
from gpt2lite.checkpoint.gguf_file import fill_gguf, read_back
from gpt2lite.checkpoint.json_text import json_object
from gpt2lite.checkpoint.manifest import Manifest
from gpt2lite.checkpoint.reading import map_tensors
from gpt2lite.checkpoint.remote import Place
from gpt2lite.checkpoint.safetensors import fill_safetensors, fill_safetensors_folder
from gpt2lite.checkpoint.source import in_memory
from gpt2lite.checkpoint.torch_zip import fill_tensor_folder, fill_torch_zip
from gpt2lite.checkpoint.writing import Progress, TensorToWrite, Wrote
from gpt2lite.config import PURPOSE, GPTConfig, Purpose
from gpt2lite.dialects.configs import OURS, check_masks
from gpt2lite.dialects.reading import WRITTEN
from gpt2lite.errors import CheckpointError, UsageError, listed
from gpt2lite.loading.options import check_names
from gpt2lite.loading.skeleton import sketch
from gpt2lite.memory import parse_size
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened, Source, place_of
from gpt2lite.tokenizer import GENERATION, SETTINGS, gguf_fields, hub_files, tokenizer_files, write_beside

if TYPE_CHECKING:
    from typing_extensions import Unpack

HEAD, EMBEDDING, POSITIONS = "out_head.weight", "tok_emb.weight", "pos_emb.weight"
HEAD_BIAS, SHIFT = "out_head.bias", "final_norm.shift"
END_OF_TEXT = 50256  # GPT-2's own token
GGUF_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # llama.cpp's llama_ftype
ROWS = 1024  # of an embedding, compared at a time


# ---- what programs expect ----------------------------------------------------------------------------------


def _in_their_words(config: GPTConfig, words: str) -> dict[str, Any]:
    """The fields that these words stand for, read backwards from what configs are read by."""
    return {word: getattr(config, OURS.get(word, word)) for word in words.split()}


def _transformers_config(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as GPT2LMHeadModel.save_pretrained writes it; both names of dtype, for old and new."""
    end = END_OF_TEXT if config.vocab_size > END_OF_TEXT else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **_in_their_words(config, "n_layer n_head n_embd vocab_size n_positions tie_word_embeddings"),
        "n_ctx": config.context_length,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        **dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch.")),
    }


def _of_a_classifier(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json of a classifier: the class that reads it, its labels both ways, its padding."""
    labels = fields["id2label"].items()
    return fields | {
        "architectures": ["GPT2ForSequenceClassification"],
        "label2id": {label: int(row) for row, label in labels},
        "pad_token_id": fields["eos_token_id"],
    }


def _nanogpt_checkpoint(config: GPTConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """nanoGPT's ckpt.pt: enough for sample.py and train.py --init_from=resume.

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
    args = _in_their_words(config, "n_layer n_head n_embd vocab_size block_size bias dropout")
    rest = {"model_args": args, "iter_num": 0, "best_val_loss": 1e9}
    return {"model": state, "optimizer": optimizer, **rest}


def _openai_fields(config: GPTConfig) -> GPTConfig:
    return replace(config, bias=True, qkv_bias=True, head_bias=False)


def _gguf_fields(job: Conversion) -> dict[str, Any]:
    """What llama.cpp asks of a GPT-2 beside its tensors."""
    config, matrix = job.config, job.tensors[0].dtype
    words = {
        "context_length": config.context_length,
        "embedding_length": config.emb_dim,
        "feed_forward_length": 4 * config.emb_dim,
        "block_count": config.n_layers,
        "attention.head_count": config.n_heads,
        "attention.layer_norm_epsilon": 1e-5,
    }
    fields = {f"gpt2.{word}": value for word, value in words.items()}
    return {"general.file_type": GGUF_FILE_TYPES.get(matrix, 0), **fields, **job.inside}


def _nanogpt_fields(config: GPTConfig) -> GPTConfig:
    has_bias = config.bias or config.qkv_bias
    return replace(config, bias=has_bias, qkv_bias=has_bias, tied_head=True)


@dataclass(frozen=True, slots=True)
class Target:
    """What a program expects of a file beyond its dialect's names.

    `fields` gives the config that its model class has: biases that it has and the source lacks become zeros,
    which is exact. `tied_head_in` are the formats that hold a tied head; a `.pth` stores it once. `prefix`
    stands before every name but the head's, unless no file of the target holds a tied head and this one is
    tied. `classifier_head` is the name of a classifier's weight, "" where the program has no classifiers.
    `activation` is the only one that the program computes, None where its config says which. `arrange`
    puts a state dict into what a `.pth` holds. With `has_wide_vectors`, biases, norms and positions are
    float32 beside matrices of any dtype.
    """

    fields: Callable[[GPTConfig], GPTConfig]
    activation: str | None = None
    classifier_head: str = ""
    prefix: str = ""
    mask: str = ""
    has_wide_vectors: bool = False
    tied_head_in: Collection[str] = ("pth",)
    arrange: Callable[[GPTConfig, dict[str, Any]], object] = lambda config, state: state
    folder_config: Callable[[GPTConfig, torch.dtype], dict[str, Any]] = lambda config, dtype: config.as_dict()


TARGETS = {
    "book": Target(
        fields=lambda config: replace(config, bias=True),
        activation="gelu_tanh",
        classifier_head=HEAD,
        mask="trf_blocks.{i}.att.mask",
        tied_head_in=("pth", "safetensors"),  # which stores it twice
    ),
    "huggingface": Target(
        fields=_openai_fields,
        prefix="transformer.",
        classifier_head="score.weight",
        tied_head_in=(),
        folder_config=_transformers_config,
    ),
    "nanogpt": Target(
        fields=_nanogpt_fields, activation="gelu", prefix="transformer.", arrange=_nanogpt_checkpoint
    ),
    "gguf": Target(fields=_openai_fields, activation="gelu_tanh", tied_head_in=(), has_wide_vectors=True),
}
SUFFIXES = {".pth": "pth", ".pt": "pth", ".bin": "pth", ".safetensors": "safetensors", ".gguf": "gguf"}
# No folder is named so by somebody who wants one, unlike `gpt2.v2`.
OTHER_FILES = ".ckpt .ggml .gz .h5 .index .json .msgpack .npy .npz .onnx .ot .pb .pickle .pkl .tar .zip"


# ---- what will be written ----------------------------------------------------------------------------------


class ConvertOptions(TypedDict, total=False):
    """What to write.

    to: "book" (the default, with the masks that its class wants), "huggingface" (transformers'
    GPT2LMHeadModel), "nanogpt" or "gguf" (llama.cpp, through the package gguf). format: "pth", "safetensors",
    "per-tensor" (a folder with a file per tensor), "dcp" (a folder for torch.distributed.checkpoint) or
    "gguf"; by default the destination's suffix says it,
    and a name without one is a folder of safetensors with its config.json, in shards of max_shard_size
    (bytes, or "5GB"). dtype: casts; otherwise no value changes. config: what the source does not say, such as
    {"n_heads": 4}.
    """

    to: str
    format: str | None
    dtype: torch.dtype | None
    max_shard_size: int | str | None
    config: GPTConfig | Mapping[str, Any] | None


@dataclass(frozen=True)
class Conversion:
    """Everything that is to be written, decided from headers.

    `beside` are other files, by their names; `inside` is what a format keeps of the tokenizer in its own.
    """

    source: Manifest
    destination: Path
    dialect: str
    to: str
    format: str
    in_folder: bool
    config: GPTConfig
    tensors: tuple[TensorToWrite, ...]
    max_shard_bytes: int | None
    purpose: Purpose = Purpose()  # noqa: RUF009  frozen
    beside: Mapping[str, bytes] = field(default_factory=dict)
    inside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that will lie on disk."""
        return writing.stored_bytes(self.tensors)


def _format_of(destination: Path, format: str | None) -> tuple[str, bool]:
    """The format that was asked for or that the destination's suffix says; whether it is a folder."""
    suffix = destination.suffix.lower()
    said = SUFFIXES.get(suffix)
    if format is not None and format not in WRITERS:
        raise UsageError(f"unknown format {format!r}; choose from {', '.join(WRITERS)}")
    if format and said and said != format:
        raise UsageError(f"{destination}: its suffix says {said}, format says {format}")
    found = format or said or "safetensors"
    in_folder = found in ("per-tensor", "dcp") or (found == "safetensors" and suffix != ".safetensors")
    if suffix in OTHER_FILES.split() and in_folder:
        wanted = f'use {", ".join(SUFFIXES)}, none for a folder, or format="pth"'
        raise UsageError(f"{destination}: {suffix} files are not written here; {wanted}")
    return found, in_folder


def _views(opened: Opened[GPTModel], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every parameter by our name, mapped, or loaded where that cannot be.

    Raises CheckpointError where one is missing or does not fit.
    """
    plan = opened.plan(dtype=dtype)
    if not all(source.is_local for source in plan.manifest.files):
        with warnings.catch_warnings():  # of the same once more
            warnings.simplefilter("ignore")
            return dict(opened.load("cpu", "stream", dtype=dtype).state_dict())
    check_masks(opened.found.masks)
    mapped = map_tensors(plan.spans.values())
    return {name: t.placement.of(mapped[t.span.name]) for t in plan.targets for name in t.names}


def _target_config(found: GPTConfig, to: str, views: Mapping[str, Tensor]) -> GPTConfig:
    """The config in which a target holds this model. Raises UsageError where it cannot."""
    target = TARGETS[to]
    if found.n_classes and not target.classifier_head:
        raise UsageError(f"{to} is written as a language model only, and this one is a classifier; use book")
    if found.head_bias and not found.n_classes:
        raise UsageError(f"{to} has no bias in its output head, this model has one; keep it in its own file")
    config = target.fields(found)
    if config.tied_head and not found.tied_head and not _are_equal(views[HEAD], views[EMBEDDING]):
        raise UsageError(f"{to} ties its output head to the token embedding; this model does not")
    if target.activation not in (None, found.activation):
        both = f"{to} computes {target.activation}, this model {found.activation}"
        if to != "nanogpt":  # whose own loader of GPT-2's weights computes them so, too
            raise UsageError(f"{both}; choose another target")
        warnings.warn(f"{both}: its logits will differ there", stacklevel=2)
    return config


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two mapped tensors are equal, looking at a piece of each at a time."""
    pairs = zip(one.split(ROWS), other.split(ROWS), strict=True)
    return all(torch.equal(in_memory(a), in_memory(b)) for a, b in pairs)


def _without_head_bias(views: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same classifier with a head that has no bias: the last norm's shift gives the logits what it gave.

    Equal up to rounding. Raises UsageError where it is not, since rows of the head depend on each other.
    """
    taken = (in_memory(views[name]).double() for name in (HEAD, HEAD_BIAS, SHIFT))
    like, (head, bias, shift) = views[SHIFT], taken
    moved = (shift + torch.linalg.pinv(head) @ bias).to(like.dtype)
    lacks = (head @ (moved.double() - shift) - bias).abs().max()
    if lacks > 32 * torch.finfo(like.dtype).eps * (head.abs() @ shift.abs() + bias.abs()).max():
        raise UsageError("huggingface's classifiers have no bias, which this one cannot do without; use book")
    return views | {SHIFT: moved}


def _stored(
    to: str, format: str, config: GPTConfig, views: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[TensorToWrite]:
    """The tensors of the target's file: the inverse of its rows. Biases that the source lacks are zeros."""
    target, like = TARGETS[to], views[EMBEDDING].dtype
    wanted = sketch(lambda: GPTModel(config)).module.state_dict()
    absent = wanted.keys() - views.keys()
    zeros = {name: torch.zeros(wanted[name].shape, dtype=like, device="cpu") for name in absent}
    views, stored = {**views, **zeros}, {}
    if HEAD_BIAS in views.keys() - wanted.keys():
        views = _without_head_bias(views)
    # Of names without a head, as gpt2's own are, some programs read no others; transformers reads both.
    prefix = "" if config.tied_head and not target.tied_head_in else target.prefix
    for theirs, group in WRITTEN[to].places(config.n_layers).items():
        (ours, placement), *_ = group
        if ours in wanted:
            parts = [placement.unplace(views[part]) for part, placement in group]
            own_head = target.classifier_head if config.n_classes else theirs
            name = own_head if ours == HEAD else prefix + theirs
            axis = placement.rows_axis % parts[0].dim() if len(parts) > 1 else 0
            is_wide = target.has_wide_vectors and (parts[0].dim() == 1 or ours == POSITIONS)
            stored[ours] = writing.join(name, parts, axis=axis, dtype=torch.float32 if is_wide else dtype)
    if config.tied_head and format not in target.tied_head_in:
        del stored[HEAD]
    elif config.tied_head and format == "pth":
        stored[HEAD] = replace(stored[HEAD], shares=stored[EMBEDDING].name)
    yield from stored.values()
    if target.mask:  # the book's buffer: 1 where a token must not see
        size = config.context_length
        mask = torch.ones(size, size, dtype=torch.float32, device="cpu").triu(1).to(dtype or like)
        yield from (writing.join(target.mask.format(i=i), [mask]) for i in range(config.n_layers))


def _beside(job: Conversion, source: Place) -> dict[str, bytes]:
    """The tokenizer's files, which go where the weights go, and in a folder its config.json."""
    if not job.in_folder:
        return tokenizer_files(source)
    is_hub = job.to == "huggingface"
    files = hub_files(source, job.config.vocab_size) if is_hub else tokenizer_files(source, in_folder=True)
    ((dtype, _),) = Counter(tensor.dtype for tensor in job.tensors).most_common(1)
    fields = TARGETS[job.to].folder_config(job.config, dtype)
    words = job.config.as_dict(job.purpose)
    if job.format in ("per-tensor", "dcp"):
        fields = words
    elif GENERATION in files:
        said = json_object(GENERATION, files[GENERATION])
        fields |= {name: said.get(name) for name in ("bos_token_id", "eos_token_id")}
    fields |= {word: words[word] for word in ("id2label", PURPOSE) if word in words}
    if is_hub and job.config.n_classes:
        fields.setdefault("id2label", {str(row): f"LABEL_{row}" for row in range(job.config.n_classes)})
        fields = _of_a_classifier(fields)
        settings = json_object(SETTINGS[1], files.get(SETTINGS[1], b"{}"))
        said = {"model_max_length": job.purpose.seq_len or job.config.context_length}
        said |= {"pad_token": settings["eos_token"]} if "eos_token" in settings else {}
        files |= {SETTINGS[1]: json.dumps(settings | said).encode()} if settings else {}
    return files | {"config.json": f"{json.dumps(fields, indent=2)}\n".encode()}


def plan_conversion(
    source: Source | Opened[GPTModel], destination: Source, **options: Unpack[ConvertOptions]
) -> Conversion:
    """Decide all that `convert` will write, and refuse what it cannot, before a byte is written.

    Reads headers and masks; for a target that ties a head that the source does not, also head and embedding.
    Raises as `convert`.
    """
    check_names(options, ConvertOptions)
    to, dtype, size = options.get("to", "book"), options.get("dtype"), options.get("max_shard_size")
    if to not in TARGETS:
        raise UsageError(f"unknown target {to!r}; choose from {', '.join(TARGETS)}")
    destination = Path(destination)
    format, in_folder = _format_of(destination, options.get("format"))
    if (to == "gguf") is not (format == "gguf"):
        raise UsageError(f'{destination}: llama.cpp reads .gguf files, and to="gguf" (--to gguf) writes them')
    max_shard_bytes = parse_size(size) if size is not None else None
    if max_shard_bytes and not (in_folder and format == "safetensors"):
        raise UsageError(f"{destination}: only a folder of safetensors has shards; name a folder")
    if isinstance(source, Opened) and options.get("config") is not None:
        raise UsageError(f"{source.path}: is open already; pass config to open_model")
    opened = source if isinstance(source, Opened) else open_model(source, config=options.get("config"))
    opened.warn()
    manifest = opened.reading.manifest
    if opened.reading.adapters:
        merge = "GPTModel.from_checkpoint(…).save_checkpoint(…), with the book's lora_alpha=…"
        raise UsageError(f"{manifest.path}: holds LoRA layers; merge them first: {merge}")
    if in_folder:
        writing.require_new_folder(destination)
    followed, sources = writing.destination_of(destination), [file.path for file in manifest.files]
    local = [path for path in (manifest.path, *sources) if isinstance(path, Path)]
    if followed.exists() and any(map(followed.samefile, local)):
        raise UsageError(f"{destination}: is the source itself; choose another place")
    views = _views(opened, dtype)
    config = _target_config(opened.config, to, views)
    tensors = tuple(_stored(to, format, config, views, dtype))
    rest = (to, format, in_folder, config, tensors, max_shard_bytes, opened.purpose)
    job = Conversion(manifest, destination, opened.reading.dialect, *rest)
    beside = Path(source) if not isinstance(source, Opened) and Path(source).exists() else opened.path
    if to == "gguf":
        return replace(job, inside=gguf_fields(beside, config.vocab_size))
    return replace(job, beside=_beside(job, beside))


# ---- writing -----------------------------------------------------------------------------------------------

Writer = Callable[[Conversion, Sequence[TensorToWrite], Path, Wrote], None]  # to a path that is not there


def _write_pth(job: Conversion, tensors: Sequence[TensorToWrite], path: Path, wrote: Wrote) -> None:
    arrange = partial(TARGETS[job.to].arrange, job.config)
    fill_torch_zip(path, tensors, wrote, job.config.as_dict(job.purpose), arrange)


def _write_safetensors(job: Conversion, tensors: Sequence[TensorToWrite], path: Path, wrote: Wrote) -> None:
    if job.in_folder:
        fill_safetensors_folder(path, tensors, wrote, job.max_shard_bytes)
    else:
        fill_safetensors(path, tensors, wrote, job.config.as_dict(job.purpose))


WRITERS: dict[str, Writer] = {
    "pth": _write_pth,
    "safetensors": _write_safetensors,
    "per-tensor": lambda job, tensors, path, wrote: fill_tensor_folder(path, tensors, wrote),
    "dcp": lambda job, tensors, path, wrote: fill_dcp(path, tensors, wrote),
    "gguf": lambda job, tensors, path, wrote: fill_gguf(path, tensors, wrote, "gpt2", _gguf_fields(job)),
}


def _hashed(tensor: TensorToWrite, digests: dict[str, bytes]) -> TensorToWrite:
    """The tensor; once its last chunk has been taken, its hash is in `digests`."""

    def chunks() -> Iterator[memoryview]:
        seen = hashlib.sha256()
        for chunk in tensor.chunks():
            seen.update(chunk)
            yield chunk
        digests[tensor.name] = seen.digest()

    return replace(tensor, chunks=chunks)


def digest(tensor: TensorToWrite) -> bytes:
    """SHA-256 of its bytes."""
    seen = hashlib.sha256()
    for chunk in tensor.chunks():
        seen.update(chunk)
    return seen.digest()


def verify(job: Conversion, path: Path, digests: Mapping[str, bytes]) -> None:
    """Read back what was written and compare names, dtypes, shapes and every byte's hash.

    From the disk, where the system can be told to forget its copy. Raises CheckpointError that names the
    tensors that differ.
    """
    manifest = read_back(path) if job.format == "gguf" else open_checkpoint(path)
    for source in manifest.files:
        source.forget()
    spans = {name.removeprefix(manifest.container_of(name)): span for name, span in manifest.tensors.items()}
    wanted, mapped = {tensor.name: tensor for tensor in job.tensors}, map_tensors(spans.values())
    wrong = list(spans.keys() ^ wanted.keys())
    for name in spans.keys() & wanted.keys():
        span, tensor = spans[name], wanted[name]
        same = (span.dtype, span.shape, span.is_contiguous) == (tensor.dtype, tensor.shape, True)
        found = digest(writing.join(name, [mapped[span.name]]))
        if not same or found != digests[tensor.shares or name]:
            wrong.append(name)
    if wrong:
        what = f"read back, {len(wrong)} tensor(s) differ from what was written; the disk or memory is faulty"
        raise CheckpointError(job.destination, what + listed(sorted(wrong)))


def run_conversion(job: Conversion, *, verified: bool = True, progress: Progress | None = None) -> Path:
    """Write what was planned, and read it back to prove it unless told not to. Raises as `convert`."""
    writing.require_space(job.destination, job.nbytes)
    digests = dict[str, bytes]()
    tensors = [_hashed(tensor, digests) if verified else tensor for tensor in job.tensors]
    with writing.replacing(job.destination, job.nbytes) as temporary:
        wrote = writing.counting(progress or (lambda done, total: None), tensors)
        WRITERS[job.format](job, tensors, temporary, wrote)
        for name, content in job.beside.items() if job.in_folder else ():
            (temporary / name).write_bytes(content)
        job.source.check_unchanged()
        if verified:
            verify(job, temporary, digests)
    if not job.in_folder and not job.inside:
        write_beside(job.destination, job.beside)
    return job.destination


def convert(
    source: Source | Opened[GPTModel],
    destination: Source,
    *,
    verify: bool = True,
    progress: Progress | None = None,
    **options: Unpack[ConvertOptions],
) -> Path:
    """Write any checkpoint that loads here, by its path or opened, as another program reads it; return where.

    `ConvertOptions` says what can be chosen. Files that are not folders carry the config in themselves;
    biases that a target has and the source lacks are zeros.

    Maps the source (one that lies elsewhere is loaded) and holds two chunks of 8 MiB in memory. The
    destination appears whole or not at all, an old file stays until then; with `verify` only after every
    tensor was read back from the disk and its hash compared. `progress` is called with (bytes done, bytes in
    all).

    Raises CheckpointError for a source that is damaged or incomplete and for a result that is not what was
    written, UsageError for a wrong argument, what the target cannot say, or another process that writes
    there, DiskFullError; all but the second before anything is written.
    """
    return run_conversion(plan_conversion(source, destination, **options), verified=verify, progress=progress)


def save_per_tensor(model_or_path: nn.Module | Source, folder: Source) -> Path:
    """Write `<name>.pt` for every tensor of a model or checkpoint, for strategy="per_tensor".

    Maps a checkpoint and holds two chunks in memory. The folder must not exist, and appears whole or not at
    all. Tied tensors are written once. Raises UsageError, CheckpointError.
    """
    folder = Path(folder)
    writing.require_new_folder(folder)
    if isinstance(model_or_path, nn.Module):
        state: Mapping[str, Tensor] = model_or_path.state_dict()
    else:
        manifest = open_checkpoint(place_of(model_or_path))
        state = map_tensors(manifest.tensors.values())
        manifest.check_unchanged()  # since its headers were read; what is read from now on says so itself
    tensors = writing.tensors_of(state)
    with writing.replacing(folder, writing.stored_bytes(tensors)) as temporary:
        fill_tensor_folder(temporary, tensors, lambda nbytes: None)
    return folder
