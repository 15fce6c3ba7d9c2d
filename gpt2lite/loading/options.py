"""What a load may be told, said once: the keyword arguments of everything that loads or forecasts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from gpt2lite.config import GPTConfig
from gpt2lite.errors import UsageError, did_you_mean
from gpt2lite.loading.schedule import Tuning
from gpt2lite.parallel import Divide

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class LoadOptions(TypedDict, total=False):
    """How to load. What is left out is as the file and the machine have it.

    dtype: cast the weights to this floating-point type; None keeps the file's. quantize: "int8" makes
    matrices but for positions int8 with one scale per row, as they stream: a quarter of fp32's memory, at a
    cost in perplexity that `gpt2lite evaluate` tells. Such a model generates, and neither trains nor saves.
    max_host_memory, max_device_memory: bytes, or "512MiB": caps on what the load adds at its peak; the host's
    stays below the cap plus 24 MiB or 3 %. tuning: how bytes are read where the machine's own choice will not
    do. progress: called with (bytes done, bytes in all).
    offload: where blocks stay that do not fit: "disk", "host" (beside a GPU) or "auto", host before disk;
    they come in one by one whenever the model computes. None leaves out nothing, and refuses what does not
    fit. Such a model generates, and is neither trained nor saved.
    mesh: a DeviceMesh of this process and others, whose `mesh_dim_names` say how they share the model: "fsdp"
    by rows (FSDP2; without names, too), "tp" by layers, ("fsdp", "tp") both, "ddp" not at all. Each rank
    reads its own part. parallelize: called with (module on meta, mesh) instead, to divide it otherwise.
    """

    dtype: torch.dtype | None
    quantize: str | None
    max_host_memory: int | str | None
    max_device_memory: int | str | None
    tuning: Tuning | None
    progress: Progress | None
    offload: str | None
    mesh: DeviceMesh | None
    parallelize: Divide | None


class OpenOptions(TypedDict, total=False):
    """What no file says, and where the Hub's client looks.

    config: a part of the config, such as {"n_heads": 12}, or all of it; what the file says must agree.
    lora_alpha: what the book's LoRA layers were made with; they are merged on the way.
    revision, token, cache_dir, local_files_only: of a model on the Hub, see `gpt2lite.hub.fetch`.
    cache: False reads a model on the Hub where it lies; nothing is written to disk.
    """

    config: GPTConfig | Mapping[str, object] | None
    lora_alpha: float | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    cache: bool


class Options(OpenOptions, LoadOptions, total=False):
    """Everything that opening and loading may be told."""


HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


def check_names(options: Mapping[str, Any], known: Any = Options) -> None:
    """Raise TypeError for an unknown keyword, suggesting the nearest known one."""
    names = sorted(known.__optional_keys__)
    for name in options.keys() - set(names):
        hint = did_you_mean(name, names)
        if "config" in names and name in GPTConfig.__dataclass_fields__:
            hint = f"; it belongs in config={{{name!r}: …}}"
        raise TypeError(f"unexpected keyword argument {name!r}{hint}")


def check_values(options: LoadOptions) -> None:
    """Raise UsageError for a dtype that holds no weights, or a tuning that is none."""
    dtype, tuning = options.get("dtype"), options.get("tuning")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    if not isinstance(tuning, Tuning | None):
        raise UsageError(f"tuning must be a gpt2lite.Tuning, got {type(tuning).__name__}")


def split(options: Options) -> tuple[OpenOptions, LoadOptions]:
    """What opening may be told, and what loading may."""
    opening = {name: value for name, value in options.items() if name in OpenOptions.__optional_keys__}
    loading = {name: value for name, value in options.items() if name not in opening}
    return opening, loading  # type: ignore[return-value]
