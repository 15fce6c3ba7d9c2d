"""What every way of loading costs here: each strategy in a fresh process, checked against plain torch.

The parent starts `python -m gpt2lite.benchmarking` for plain torch and for each strategy, and compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lite.checkpoint.source import memory_of
from gpt2lite.checkpoint.torch_zip import fill_torch_zip
from gpt2lite.checkpoint.writing import TensorToWrite, join, require_space, write_whole
from gpt2lite.config import GPTConfig
from gpt2lite.converting import save_per_tensor
from gpt2lite.devices import synchronize
from gpt2lite.errors import GPT2LiteError
from gpt2lite.loading.options import Progress
from gpt2lite.loading.skeleton import digest
from gpt2lite.model import GPTModel, forecast, open_model
from gpt2lite.tracking import track_memory
from gpt2lite.verification import PROMPT, plain_model

LOGITS_TOLERANCE = 1e-4
HALF_LOGITS_TOLERANCE = 0.05  # where 16-bit weights are multiplied in another order
RANDOM_CHUNK = 1 << 22  # elements drawn at a time
TINY = GPTConfig(vocab_size=64, context_length=16, emb_dim=16, n_heads=2, n_layers=2)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One strategy's figures: seconds from the start of the load, bytes above what the imports took.

    Peaks are of the load; `peak_host_reclaimable` also covers the first logits, when mapped weights are read.
    """

    strategy: str
    seconds_to_load: float
    seconds_to_logits: float
    peak_device: int
    peak_host_anonymous: int
    peak_host_reclaimable: int
    bitwise_equal: bool
    logits_difference: float
    logits_tolerance: float
    model_bytes: int
    method: str
    forecast: dict[str, int]
    timeline: list[tuple[float, int, int]]

    @property
    def logits_equal(self) -> bool:
        """Whether the logits are those of the reference, within the tolerance."""
        return self.logits_difference <= self.logits_tolerance


@dataclass(frozen=True, slots=True)
class Failure:
    """A strategy that could not run, and why."""

    strategy: str
    reason: str


# ---- a checkpoint to measure with --------------------------------------------------------------------------


def _random_chunks(shape: tuple[int, ...], mean: float, seed: int) -> Iterator[memoryview]:
    generator, left = torch.Generator().manual_seed(seed), torch.Size(shape).numel()
    while left:
        chunk = torch.empty(min(left, RANDOM_CHUNK)).normal_(mean, 0.02, generator=generator)
        left -= chunk.numel()
        yield memory_of(chunk)


def write_random_checkpoint(
    config: GPTConfig, path: Path, progress: Progress = lambda done, total: None
) -> None:
    """Write random fp32 weights as the article's `torch.save(model.state_dict(), path)` lays them out.

    The book's names, its 4 MiB mask in every block, an untied head unless the config ties it. Streamed: holds
    16 MiB and a mask. Raises DiskFullError before it begins where the disk is too small.
    """
    with torch.device("meta"):
        state = GPTModel(config).state_dict()
    mask, tensors = torch.ones(config.context_length, config.context_length).triu(1), []
    for seed, (name, tensor) in enumerate(state.items()):
        if name.endswith("att.W_query.weight"):
            tensors.append(join(name.replace("W_query.weight", "mask"), [mask]))
        if name != "out_head.weight" or not config.tied_head:
            shape, mean = tuple(tensor.shape), float(name.endswith(".scale"))
            chunks = partial(_random_chunks, shape, mean, seed)
            tensors.append(TensorToWrite(name, torch.float32, shape, chunks))
    require_space(path.parent, sum(tensor.nbytes for tensor in tensors))
    write_whole(fill_torch_zip, path, tensors, progress)


# ---- in the fresh process ----------------------------------------------------------------------------------


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


@torch.inference_mode()
def _last_logits(model: GPTModel) -> Tensor:
    prompt = torch.tensor([PROMPT], device=model.tok_emb.weight.device) % model.config.vocab_size
    return model(prompt[:, : model.config.context_length])[0, -1].float().cpu()


def _answers(model: GPTModel) -> dict[str, Any]:
    """What all loads of one checkpoint must agree on: the bytes of every parameter, as hashes, and logits."""
    digests = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    return {"digests": digests, "logits": _last_logits(model).tolist()}


def _load_plainly(path: str, device: str, dtype: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """Plain torch: read the file whole, `load_state_dict`. Costs twice the model in host memory."""
    return _answers(plain_model(open_model(path, config=config), _dtype(dtype)).to(device))


def _measure(
    path: str, device: str, dtype: str | None, config: dict[str, Any], strategy: str
) -> dict[str, Any]:
    """Load once in this process, which must be fresh: the fields of a `Measurement`, and the answers."""
    with tempfile.TemporaryDirectory() as folder:  # the imports and the device's start are not counted
        tiny = GPTModel(TINY).save_checkpoint(Path(folder) / "tiny.pth")
        source = save_per_tensor(tiny, Path(folder) / "tiny") if strategy == "per_tensor" else tiny
        _last_logits(GPTModel.from_checkpoint(source, device, strategy, config=TINY))
    predicted = forecast(path, device, config=config, dtype=_dtype(dtype))[strategy]
    with track_memory(device) as until_logits:
        with track_memory(device) as loading:
            began = time.perf_counter()
            model = GPTModel.from_checkpoint(path, device, strategy, config=config, dtype=_dtype(dtype))
            synchronize(torch.device(device))
            loaded = time.perf_counter() - began
        between = time.perf_counter()
        _last_logits(model)
        answered = loaded + time.perf_counter() - between
    is_half = any(p.element_size() < 4 for p in model.parameters())
    return _answers(model) | {
        "strategy": strategy,
        "seconds_to_load": loaded,
        "seconds_to_logits": answered,
        "peak_device": loading.peak_device,
        "peak_host_anonymous": loading.peak_host_anonymous,
        "peak_host_reclaimable": until_logits.peak_host_reclaimable,
        "logits_tolerance": HALF_LOGITS_TOLERANCE if is_half else LOGITS_TOLERANCE,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "method": loading.method,
        "forecast": asdict(predicted),
        "timeline": [astuple(sample) for sample in until_logits.timeline],
    }


def _main(request: str) -> None:
    arguments = json.loads(request)
    try:
        answer = (_measure if "strategy" in arguments else _load_plainly)(**arguments)
    except (GPT2LiteError, MemoryError, torch.OutOfMemoryError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


# ---- in the parent -----------------------------------------------------------------------------------------


def _in_fresh_process(**arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpt2lite.benchmarking", json.dumps(arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode < 0:
        raise GPT2LiteError(f"killed by signal {-process.returncode}, probably out of memory")
    if process.returncode:
        raise GPT2LiteError(f"it failed: {process.stderr.strip().splitlines()[-1]}")
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise GPT2LiteError(answer["error"])
    return answer


def compare_strategies(
    path: Path,
    device: str,
    strategies: Iterable[str],
    *,
    folder: Path | None = None,
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[Measurement | Failure]:
    """Yield one result per strategy as it is measured; temporary files go to `folder`.

    Raises CheckpointError first, for a checkpoint that does not fit the model.
    """
    opened = open_model(path, config=config)
    opened.forecast(device, dtype=_dtype(dtype))
    manifest = opened.reading.manifest
    given = {"device": device, "dtype": dtype, "config": opened.config.as_dict()}
    right = _in_fresh_process(path=str(path), **given)
    for strategy in strategies:
        with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=folder) as temporary:
            try:
                source = path
                if strategy == "per_tensor" and manifest.format != "tensor_folder":
                    require_space(Path(temporary), sum(span.nbytes for span in manifest.tensors.values()))
                    source = save_per_tensor(path, Path(temporary) / "per_tensor")
                found = _in_fresh_process(path=str(source), strategy=strategy, **given)
            except (GPT2LiteError, OSError) as error:
                yield Failure(strategy, str(error))
                continue
        is_equal = found.pop("digests") == right["digests"]
        difference = (torch.tensor(found.pop("logits")) - torch.tensor(right["logits"])).abs().max()
        yield Measurement(bitwise_equal=is_equal, logits_difference=float(difference), **found)


if __name__ == "__main__":
    _main(sys.argv[1])
