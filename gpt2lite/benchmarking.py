"""What every way of loading costs here: each strategy in a fresh process, checked against plain torch.

The parent makes what is compared with, then starts `python -m gpt2lite.benchmarking` once for each strategy.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lite.checkpoint.reading import memory_of
from gpt2lite.checkpoint.torch_zip import fill_torch_zip
from gpt2lite.checkpoint.writing import TensorToWrite, require_space, write_whole
from gpt2lite.config import GPTConfig
from gpt2lite.converting import save_per_tensor
from gpt2lite.devices import synchronize
from gpt2lite.errors import GPT2LiteError
from gpt2lite.loading import Progress
from gpt2lite.model import GPTModel, open_model
from gpt2lite.opening import Opened
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


# ---- a checkpoint to measure with --------------------------------------------------------------------------


def _random_chunks(shape: tuple[int, ...], mean: float, seed: int) -> Iterator[memoryview]:
    generator, left = torch.Generator().manual_seed(seed), torch.Size(shape).numel()
    while left:
        chunk = torch.empty(min(left, RANDOM_CHUNK)).normal_(mean, 0.02, generator=generator)
        left -= chunk.numel()
        yield memory_of(chunk)


def _mask_chunks(side: int) -> Iterator[memoryview]:
    yield memory_of(torch.ones(side, side).triu(1))


def write_random_checkpoint(
    config: GPTConfig, path: Path, progress: Progress = lambda done, total: None
) -> None:
    """Write random fp32 weights as the article's `torch.save(model.state_dict(), path)` lays them out.

    The book's names, its 4 MiB mask in every block, an untied head unless the config ties it. Streamed: holds
    16 MiB at a time. Raises OSError before it begins where the disk is too small.
    """
    with torch.device("meta"):
        state = GPTModel(config).state_dict()
    side, tensors = config.context_length, []
    for seed, (name, tensor) in enumerate(state.items()):
        if name.endswith("att.W_query.weight"):
            mask = name.replace("W_query.weight", "mask")
            tensors.append(TensorToWrite(mask, torch.float32, (side, side), partial(_mask_chunks, side)))
        if name != "out_head.weight" or not config.tied_head:
            shape, mean = tuple(tensor.shape), float(name.endswith(".scale"))
            chunks = partial(_random_chunks, shape, mean, seed)
            tensors.append(TensorToWrite(name, torch.float32, shape, chunks))
    require_space(path.parent, sum(tensor.nbytes for tensor in tensors))
    write_whole(fill_torch_zip, path, tensors, progress)


# ---- in the fresh process ----------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's bytes, on whatever device it is."""
    return hashlib.sha256(memory_of(tensor.detach().cpu().contiguous())).hexdigest()


@torch.inference_mode()
def _first_logits(model: GPTModel) -> Tensor:
    prompt = torch.tensor([PROMPT], device=model.tok_emb.weight.device) % model.config.vocab_size
    return model(prompt[:, : model.config.context_length])[0, -1].float().cpu()


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def measure(
    path: str, device: str, strategy: str, dtype: str | None, config: dict[str, Any], reference: str
) -> Measurement:
    """Load once in this process, which must be fresh, and compare with what `write_reference` wrote."""
    with tempfile.TemporaryDirectory() as folder:  # the imports and the device's start are not counted
        tiny = GPTModel(TINY).save_checkpoint(Path(folder) / "tiny.pth")
        source = save_per_tensor(tiny, Path(folder) / "tiny") if strategy == "per_tensor" else tiny
        _first_logits(GPTModel.from_checkpoint(source, device, strategy, config=TINY))
    expected_bytes = open_model(path, config=config).forecast(device, dtype=_dtype(dtype))[strategy]
    with track_memory(device) as until_logits:
        with track_memory(device) as loading:
            began = time.perf_counter()
            model = GPTModel.from_checkpoint(path, device, strategy, config=config, dtype=_dtype(dtype))
            synchronize(torch.device(device))
            loaded = time.perf_counter() - began
        between = time.perf_counter()
        logits = _first_logits(model)
        answered = loaded + time.perf_counter() - between
    expected = torch.load(reference, weights_only=True)
    digests = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    is_half = any(p.element_size() < 4 for p in model.parameters())
    return Measurement(
        strategy=strategy,
        seconds_to_load=loaded,
        seconds_to_logits=answered,
        peak_device=loading.peak_device,
        peak_host_anonymous=loading.peak_host_anonymous,
        peak_host_reclaimable=until_logits.peak_host_reclaimable,
        bitwise_equal=digests == expected["digests"],
        logits_difference=float((logits - expected["logits"]).abs().max()),
        logits_tolerance=HALF_LOGITS_TOLERANCE if is_half else LOGITS_TOLERANCE,
        model_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        method=loading.method,
        forecast=asdict(expected_bytes),
        timeline=[astuple(sample) for sample in until_logits.timeline],
    )


def write_reference(path: str, device: str, dtype: str | None, config: dict[str, Any], output: str) -> None:
    """Plain torch: build the model, read the file whole, `load_state_dict`; keep digests and logits.

    Costs twice the model in host memory.
    """
    model = plain_model(open_model(path, config=config), _dtype(dtype))
    digests = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    torch.save({"digests": digests, "logits": _first_logits(model.to(device))}, output)


JOBS: Mapping[str, Callable[..., Measurement | None]] = {"measure": measure, "reference": write_reference}


def _run_job(job: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Run one of JOBS in a fresh process and return what it measured."""
    command = [sys.executable, "-m", "gpt2lite.benchmarking", json.dumps({"job": job, **arguments})]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode < 0:
        raise GPT2LiteError(f"{job} was killed by signal {-process.returncode}, probably for lack of memory")
    if not process.stdout.strip():
        raise GPT2LiteError(f"{job} failed: {process.stderr.strip().splitlines()[-1]}")
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise GPT2LiteError(answer["error"])
    return answer


# ---- in the parent -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """A strategy that could not run, and why."""

    strategy: str
    reason: str


def _input(opened: Opened[GPTModel], strategy: str, folder: Path) -> Path:
    """What a strategy reads: the checkpoint, or for per_tensor a folder made from it inside `folder`."""
    manifest, path = opened.reading.manifest, opened.path
    if strategy != "per_tensor" or manifest.format == "tensor_folder":
        return path
    require_space(folder, sum(span.nbytes for span in manifest.tensors.values()))
    return save_per_tensor(path, folder / "per_tensor")


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
    common = {"device": device, "dtype": dtype, "config": opened.config.as_dict()}
    with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=folder) as temporary:
        reference = str(Path(temporary) / "reference.pt")
        _run_job("reference", {"path": str(path), "output": reference, **common})
        for strategy in strategies:
            arguments = {"strategy": strategy, "reference": reference, **common}
            try:
                arguments["path"] = str(_input(opened, strategy, Path(temporary)))
                yield Measurement(**_run_job("measure", arguments))
            except (GPT2LiteError, OSError) as error:
                yield Failure(strategy, str(error))


def _main(request: str) -> None:
    arguments = json.loads(request)
    try:
        result = JOBS[arguments.pop("job")](**arguments)
        print(json.dumps(asdict(result) if result else {}))
    except (GPT2LiteError, MemoryError, torch.OutOfMemoryError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))


if __name__ == "__main__":
    _main(sys.argv[1])
