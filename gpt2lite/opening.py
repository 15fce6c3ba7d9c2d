"""A path or a name → `Opened`: all that a checkpoint says, found once, for whoever inspects, plans or loads
it.

Imports no model.py: callers pass the builder.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from gpt2lite import parallel
from gpt2lite.checkpoint import Manifest, TensorSpan, open_checkpoint
from gpt2lite.checkpoint.manifest import contiguous_stride
from gpt2lite.checkpoint.remote import Place, RemotePath
from gpt2lite.checkpoint.source import ByteSource, FileState
from gpt2lite.checkpoint.tf_bundle import index_of
from gpt2lite.config import OFFICIAL_SIZES, GPTConfig, Purpose, official_name
from gpt2lite.devices import name_device, one_thread_after_fork
from gpt2lite.dialects import configs
from gpt2lite.dialects.peft import find_adapter, with_adapter
from gpt2lite.dialects.reading import DIALECTS, Reading, read_dialect, read_names, with_lora_alpha
from gpt2lite.errors import CheckpointError, UsageError
from gpt2lite.loading.choice import forecasts, load, with_offload
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.options import HUB_OPTIONS, LoadOptions, OpenOptions, check_names
from gpt2lite.loading.plan import LoadPlan, make_plan, require_one_dtype
from gpt2lite.loading.skeleton import sketch
from gpt2lite.memory import find_budget
from gpt2lite.tokenizer import Beside

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)
Source = str | os.PathLike[str]
Device = str | torch.device

_lock = Lock()
_pauses: dict[object, bool] = {}  # one per running load: whether the first one found the collector on


def _resume(own: object) -> None:
    """End a pause; may be called again where Ctrl-C came in between."""
    with _lock:
        if _pauses.get(own) and len(_pauses) == 1:
            gc.enable()
        _pauses.pop(own, None)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector; also a decorator. The last thread to leave restores it.

    The pause must last until the objects made meanwhile are gone, otherwise the walk is only put off. Without
    it, reading the headers of gpt2-xl makes the collector walk all of torch's objects: 85 of the 170 ms of
    mapping it.
    """
    own = object()
    try:
        with _lock:
            _pauses[own] = next(iter(_pauses.values()), gc.isenabled())
            gc.disable()
        yield
    finally:
        try:
            _resume(own)
        except KeyboardInterrupt:
            _resume(own)
            raise


@dataclass(frozen=True)
class Opened(Generic[Model]):
    """A checkpoint whose headers have been read: what it holds, the model's config, and what builds the
    model.

    No tensor data is in memory. Look at `config`, ask `forecast`, then `load`; nothing is opened twice.
    `beside.tokenizer` is what makes text of its tokens.
    """

    reading: Reading
    found: configs.Found
    model: Callable[[GPTConfig], Model]
    beside: Beside

    def __repr__(self) -> str:
        return f"Opened({str(self.path)!r}, {', '.join(f'{k}={v!r}' for k, v in self.found.fields.items())})"

    @property
    def path(self) -> Place:
        """The file or folder that was opened, wherever it lies."""
        return self.reading.manifest.path

    @cached_property
    def config(self) -> GPTConfig:
        """The model's config. Raises CheckpointError where the file cannot tell it and the caller did not."""
        return configs.complete(self.reading, self.found)

    @cached_property
    def purpose(self) -> Purpose:
        """What the model was trained for, as far as files say. Raises CheckpointError where they disagree."""
        return configs.purpose_of(self.reading, self.found)

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's labels, one per row of its head; () where no file says them."""
        return self.purpose.labels

    @cached_property
    def sizes(self) -> GPTConfig:
        """The config to plan with: unknown fields that no byte depends on get defaults."""
        fields = configs.UNSAYABLE | dict(self.found.fields)
        return configs.complete(self.reading, replace(self.found, fields=fields))

    def build(self) -> Model:
        """The model with initial values, or without memory under `torch.device("meta")`."""
        return self.model(self.config)

    def plan(self, device: Device = "cpu", **options: Unpack[LoadOptions]) -> LoadPlan:
        """What `load` would do; the device may be absent. Raises as `load`, except for memory."""
        check_names(options, LoadOptions)
        quantize, config = options.get("quantize"), self.sizes
        if quantize not in (None, "int8"):
            raise UsageError(f"quantize must be None or int8, got {quantize!r}")
        require_one_dtype(self.reading, options.get("dtype"), quantized=quantize is not None)
        build, hint = partial(self.model, config), partial(_official_hint, config, self.reading)
        quantizable = (lambda layer: layer != "pos_emb") if quantize else None  # all but positions
        place = name_device(device)
        return make_plan(self.reading, build, place, options, hint=hint, quantizable=quantizable)

    def forecast(self, device: Device = "cpu", **options: Unpack[LoadOptions]) -> dict[str, Forecast]:
        """What each strategy would add to host and device memory, from headers alone, in milliseconds.

        The same bytes that `track_memory` measures around the load, imports warmed: on the host within 3 % or
        24 MiB, on a CUDA device within 1 %. The device need not be there. A strategy that cannot read this
        checkpoint is left out (per_tensor reads folders only). Raises CheckpointError for a file that does
        not fit the model, UsageError for a wrong argument.
        """
        plan = self.plan(device, **options)
        if place := options.get("offload"):
            caps = options.get("max_host_memory"), options.get("max_device_memory")
            plan = with_offload(plan, "auto", place, find_budget(plan.device, *caps))
        return forecasts(plan)

    def warn(self) -> None:
        """Warn of what is ignored in the file, as `load` does."""
        for note in self.found.notes:
            warnings.warn(note, UserWarning, stacklevel=3)

    @collector_paused()
    @one_thread_after_fork()
    def load(self, device: Device = "cpu", strategy: str = "auto", **options: Unpack[LoadOptions]) -> Model:
        """The model, in eval mode; `GPTModel.from_checkpoint` says what strategies and options mean.

        Warns of what it ignored in the file.
        """
        with parallel.together(mesh := options.get("mesh")):
            with_lora_alpha(self.reading, None)  # raises where one is missing
            configs.check_masks(self.found.masks[parallel.turn_of(mesh)])
            # `config` raises where `plan` would take something for granted
            parallel.require_same(mesh, "configs", self.config)
        self.warn()
        said = {"purpose": self.purpose, "beside": self.beside}
        model = load(partial(self.plan, **options), device, strategy, options)
        vars(model).update(said if mesh is None else said | {"device_mesh": mesh})
        return model  # type: ignore[return-value]


def locate(name: Source, options: Mapping[str, Any]) -> Place:
    """An existing path unchanged, an address (`hf://`, `https://` …) as the place that it names.

    Else a model on the Hub: fetched, or with cache=False the place where it lies.
    """
    if type(cache := options.get("cache", True)) is not bool:
        raise UsageError(f"cache must be True or False, got {cache!r}")
    if isinstance(name, RemotePath):
        return name
    path, is_address = Path(name), "://" in os.fspath(name)
    is_there = not is_address and (path.exists() or index_of(path).is_file())
    if is_there and options.get("revision") is None:
        return path
    from gpt2lite import hub  # here, since the client takes half a second to import

    if is_there or not (is_address or not cache):
        return hub.fetch(name, **{key: options[key] for key in HUB_OPTIONS if key in options})
    if options.get("local_files_only"):
        raise UsageError(f"{name}: is read from the network, which local_files_only=True forbids")
    own = {key: options[key] for key in ("revision", "token") if key in options}
    return hub.elsewhere(os.fspath(name), **own)


def place_of(path: Source, options: Mapping[str, Any] = MappingProxyType({})) -> Place:
    """A path as it is, an address as the place that it names; no name of a model."""
    is_address = isinstance(path, RemotePath) or "://" in os.fspath(path)
    return locate(path, options) if is_address else Path(path)


def _locate_base(name: str, options: Mapping[str, Any]) -> Place:
    """What a file names, which can be no address: only the caller says who is asked."""
    if "://" in name:
        raise CheckpointError(f"{name:.80}: an address in a file is not followed; pass a merged model")
    return locate(name, options)


def assumed(model: Callable[[GPTConfig], Model], name: str) -> Opened[Model]:
    """An official size as its file on the Hub is, which need not be there: to plan with, not to load.

    That file is one of safetensors in float32, with stored masks, its head tied to the token embedding.
    Raises UsageError for another name.
    """
    config, dialect, offset = GPTConfig.named(name), DIALECTS["huggingface"], 0
    source = ByteSource(Path(official_name(name)))
    built = sketch(partial(model, config)).module.state_dict()
    shapes = {f"h.{i}.attn.bias": (1, 1, *[config.context_length] * 2) for i in range(config.n_layers)}
    for theirs, rows in dialect.places(config.n_layers).items():
        parts = [placement.unplace(built[ours]) for ours, placement in rows if ours in built]
        if parts and theirs != "lm_head.weight":
            axis = rows[0][1].rows_axis if len(parts) > 1 else 0
            shapes[theirs] = tuple(torch.cat(parts, axis).shape)
    spans: dict[str, TensorSpan] = {}
    for theirs, shape in sorted(shapes.items()):
        span = TensorSpan(theirs, torch.float32, shape, contiguous_stride(shape), source, offset)
        spans[theirs], offset = span, offset + span.nbytes
    files = {source: FileState(offset, 0, 0)}
    reading = read_dialect(Manifest(source.path, "safetensors", spans, files=files))
    found = configs.Found(config.as_dict())
    return Opened(reading, found, model, Beside(source.path, config.vocab_size, {}))


def open_to_plan(model: Callable[[GPTConfig], Model], source: Source, options: OpenOptions) -> Opened[Model]:
    """`open_as` for a path that is there or lies in the Hub's cache; else an official size is `assumed`."""
    name, is_asked = str(source), options.get("config") or options.get("revision") or "cache" in options
    if official_name(name) not in OFFICIAL_SIZES or Path(name).exists() or is_asked:
        return open_as(model, locate(source, options), options)
    try:
        path = locate(source, {**options, "local_files_only": True})
    except CheckpointError:  # nowhere on this machine
        return assumed(model, name)
    return open_as(model, path, options)


@one_thread_after_fork()
def open_as(model: Callable[[GPTConfig], Model], path: Source, options: OpenOptions) -> Opened[Model]:
    """Open what lies at a path. Reads headers, the first block's attention mask, and two rows of equal ones.

    Raises CheckpointNotFoundError; CheckpointError for a file that is damaged, of an unknown kind, wants to
    run code, contradicts itself or computes something else; UsageError for a wrong argument.
    """
    check_names(options, OpenOptions)
    path = place_of(path, options)
    of_base = options if isinstance(path, Path) else {**options, "cache": False}
    adapter = find_adapter(path, lambda name, revision: _locate_base(name, {**of_base, "revision": revision}))
    manifest = open_checkpoint(adapter.base if adapter else path)
    configs.check_model_type(manifest.path)
    reading = read_dialect(manifest)
    if adapter:
        reading = with_adapter(reading, adapter.said, open_checkpoint(adapter.weights))
    if options.get("lora_alpha") is not None:
        reading = with_lora_alpha(reading, options["lora_alpha"])
    found = configs.find_fields(reading, options.get("config"))
    beside = Beside.of(path, found.fields["vocab_size"], adapter.base if adapter else None)
    return Opened(reading, found, model, beside)


@collector_paused()
@one_thread_after_fork()
def load_module(
    build: Callable[[], nn.Module],
    path: Source,
    device: Device = "cpu",
    strategy: str = "auto",
    **options: Unpack[LoadOptions],
) -> nn.Module:
    """Load a checkpoint into any module: `build()` returns one, the names in the file are its own.

    A module with plain tensors, or one that reads values while it is built, is built with all of its memory
    (sequential or baseline). One with hooks or methods of its own for loading gets `load_state_dict`
    (baseline) and keeps the dtypes of its constructor, unless `dtype` casts them. "auto" knows. The options
    and errors are those of `GPTModel.from_checkpoint`. The module comes back in eval mode.
    """
    check_names(options, LoadOptions)
    if options.get("quantize") is not None:
        raise UsageError("quantize is for GPTModel; load_module keeps every layer as it is built")
    with parallel.together(options.get("mesh")):
        reading = read_names(open_checkpoint(place_of(path)), sketch(build).module.state_dict().keys())
    return load(partial(make_plan, reading, build, options=options), device, strategy, options)


def _official_hint(config: GPTConfig, reading: Reading) -> str:
    """ ". Is this gpt2 rather than gpt2-medium?" where the file has the shape of another official size."""
    names = {(n_layers, emb_dim): name for name, (n_layers, emb_dim, _) in OFFICIAL_SIZES.items()}
    found, wanted = names.get(reading.size), names.get((config.n_layers, config.emb_dim))
    return f". Is this {found} rather than {wanted}?" if found and wanted and found != wanted else ""
