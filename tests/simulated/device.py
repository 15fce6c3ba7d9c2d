"""The simulated device "simgpu", two of it: `register()` builds it, and makes it this process's accelerator.

Only in a process of its own: a backend can be registered once, and then `torch.accelerator` is this one.
"""

from __future__ import annotations

import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

KIND = "simgpu"
NEVER = 2**63 - 1
SOURCE = Path(__file__).with_name("device.cpp")


class CurrentDevice(torch.accelerator.device_index):
    """`torch.simgpu.device(which)`, as torch.load uses it."""

    def __init__(self, which: Any) -> None:
        super().__init__(which.index if isinstance(which, torch.device) else which)


class Properties:
    """What `get_device_properties` returns."""

    is_integrated = False


def build() -> Any:
    """The extension, compiled once for this version of torch. Raises RuntimeError where no compiler is."""
    flags = ["-O1", "-g0", "-std=c++20", "-w"]
    return load("gpt2lite_simulated", [str(SOURCE)], extra_cflags=flags)


def register() -> Any:
    """The extension: `delay(over_bus, within)`, `limit(device, nbytes)`, `fail_in(device, n)`, `counts()`."""
    torch.utils.rename_privateuse1_backend(KIND)
    extension = build()
    module = types.ModuleType(f"torch.{KIND}")
    own = {
        "device": CurrentDevice,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 2,
        "current_device": torch._C._accelerator_getDeviceIndex,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": lambda seed: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_device_properties": lambda device=None: Properties,
    }
    vars(module).update(own)
    torch._register_device_module(KIND, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return extension


def counted(extension: Any, before: dict[str, int]) -> Counter[str]:
    """What the device has done since its counts were `before`."""
    return Counter(extension.counts()) - Counter(before)
