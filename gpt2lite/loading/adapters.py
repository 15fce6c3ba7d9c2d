"""Low-rank additions (LoRA), merged into the weights that they add to."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpt2lite.dialects import Adapter, Placement
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.plan import LoadPlan
from gpt2lite.loading.skeleton import saved_tensors

WORKING_BYTES = 1 << 20  # of a sum, computed rows at a time
# Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".


@torch.no_grad()
def merge_adapters(plan: LoadPlan, module: nn.Module) -> None:
    """weight += scale × (b @ a) for each, in float32 at least.

    Costs WORKING_BYTES on the device; a mapped weight becomes anonymous memory. Equal to computing both paths
    up to rounding.
    """
    tensors = saved_tensors(module)
    for adapter in plan.reading.adapters:
        assert adapter.scale is not None, "with_lora_alpha comes before a load"
        a, b = (_factor(plan, placement) for placement in (adapter.a, adapter.b))
        rows = max(WORKING_BYTES // (a.shape[1] * a.itemsize), 1)
        for weight, b_part in zip(tensors[adapter.weight].split(rows), b.split(rows), strict=True):
            weight.add_(b_part @ a, alpha=adapter.scale)


def _factor(plan: LoadPlan, placement: Placement) -> Tensor:
    stored = placement.read(plan.manifest.tensors[placement.source])
    return stored.to(plan.device, torch.promote_types(stored.dtype, torch.float32))


def with_adapters(plan: LoadPlan, forecast: Forecast) -> Forecast:
    """The forecast of a load that ends in merging; the sum is the larger where it is not known which."""
    if not plan.reading.adapters:
        return forecast
    weights = {name: target for target in plan.targets for name in target.names}
    merged = [weights[adapter.weight] for adapter in plan.reading.adapters]
    on_cpu, working = plan.device.type == "cpu", WORKING_BYTES
    copied = min(sum(target.nbytes for target in merged), forecast.stays_mapped)
    factors = max(_factor_bytes(plan, adapter) for adapter in plan.reading.adapters)
    host = forecast.stays_host + copied + factors + (working if on_cpu else 0)
    device = forecast.stays_device + factors + working
    return replace(
        forecast,
        peak_host_anonymous=max(forecast.peak_host_anonymous, host),
        peak_device=forecast.peak_device if on_cpu else max(forecast.peak_device, device),
        stays_host=forecast.stays_host + copied,
        stays_mapped=forecast.stays_mapped - copied,
    )


def _factor_bytes(plan: LoadPlan, adapter: Adapter) -> int:
    shapes = (plan.manifest.tensors[factor.source].shape for factor in (adapter.a, adapter.b))
    return sum(8 * math.prod(shape) for shape in shapes)  # as read, and in float32
