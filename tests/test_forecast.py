"""What a load is foretold to take, and the loads that are refused for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gpt2lite import GPTConfig, GPTModel
from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, contiguous_stride
from gpt2lite.dialects import read_dialect
from gpt2lite.loading import forecasts, make_plan

MIB = 1 << 20
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def articles_manifest(config: GPTConfig, format: str) -> Manifest:
    """The article's checkpoint as its headers describe it, masks and all, with no file behind it."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in GPTModel(config).state_dict().items()}
    size = config.context_length
    shapes |= {f"trf_blocks.{i}.att.mask": (size, size) for i in range(config.n_layers)}
    spans, offset = {}, 0
    for name, shape in shapes.items():
        path = Path("model.pth") if format == "torch_zip" else Path(f"{name}.pt")
        spans[name] = TensorSpan(name, torch.float32, shape, contiguous_stride(shape), path, offset)
        offset += spans[name].nbytes
    sizes: dict[Path, tuple[int, ...]] = {}
    for span in spans.values():
        sizes[span.path] = (*sizes.get(span.path, ()), span.nbytes)
    return Manifest(Path("model.pth"), format, spans, {}, {}, sizes)


@pytest.mark.parametrize("strategy", ["baseline", "sequential", "meta", "mmap", "per_tensor", "stream"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_forecast_for_gpt2_xl_is_what_was_measured(strategy: str, device: str):
    """On an H100, and on two cores: figures that `gpt2lite bench` kept."""
    kept = {"cuda": "bench-cuda-h100-gpt2-xl.json", "cpu": "bench-cpu-gpt2-xl.json"}[device]
    results = json.loads((RESULTS / kept).read_text())["results"]
    measured = next(result for result in results if result["strategy"] == strategy)
    config = GPTConfig.of(GPTConfig.named("gpt2-xl").as_dict() | {"tied_head": False})
    manifest = articles_manifest(config, "tensor_folder" if strategy == "per_tensor" else "torch_zip")
    plan = make_plan(read_dialect(manifest), lambda: GPTModel(config), torch.device(device))
    found = forecasts(plan)[strategy]
    assert found.peak_device == pytest.approx(measured["peak_device"], rel=0.01)
    tolerance = max(24 * MIB, 0.03 * measured["peak_host_anonymous"])
    assert abs(found.peak_host_anonymous - measured["peak_host_anonymous"]) <= tolerance
    print(
        strategy,
        found.peak_device - measured["peak_device"],
        found.peak_host_anonymous - measured["peak_host_anonymous"],
    )
