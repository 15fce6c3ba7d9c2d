"""48 files × every strategy: the forecast beside what torch's allocator counted, on the simulated device.

    python tests/simulated/forecasts.py [every how many files]

Every dialect, format and dtype, in sizes around the allocator's limits (1, 2, 10 and 20 MiB). Each is loaded
as it is stored, and cast to the next dtype. The last line is JSON: loads, the worst errors as shares of what
was counted, and the loads that are off by more than 1 %.
"""

from __future__ import annotations

import gc
import itertools
import json
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import device
import torch

from gpt2lite import STRATEGIES, GPTConfig, GPTModel, forecast
from gpt2lite.devices import allocated, peak_allocated, peak_reserved, restart_peak

device.register()
BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "forecast_accuracy.py"))
ON = torch.device(device.KIND, 0)
CONFIG = GPTConfig(vocab_size=7001, context_length=64, emb_dim=384, n_heads=4, n_layers=2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def measured(path: str, strategy: str, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes allocated and reserved at the peak of a load, beyond those before."""
    gc.collect()
    restart_peak(ON)
    before = allocated(ON), peak_reserved(ON)
    model = GPTModel.from_checkpoint(path, ON, strategy, config=CONFIG, dtype=dtype)
    del model
    return peak_allocated(ON) - before[0], peak_reserved(ON) - before[1]


def compared(path: str, dtype: torch.dtype | None) -> list[dict[str, Any]]:
    """A load by each strategy that can read a file."""
    predicted, found = forecast(path, ON, config=CONFIG, dtype=dtype), list[dict[str, Any]]()
    for strategy in STRATEGIES:
        if strategy not in predicted:
            continue
        peaks = measured(path, strategy, dtype)
        wanted = predicted[strategy].peak_device, predicted[strategy].peak_reserved
        errors = [said / was - 1 for said, was in zip(wanted, peaks, strict=True)]
        found.append(
            {"strategy": strategy, "cast": str(dtype), "allocated": errors[0], "reserved": errors[1]}
        )
    return found


def main() -> None:
    """Write each file, load it in every way, compare."""
    step, found = int(sys.argv[1]) if len(sys.argv) > 1 else 1, list[dict[str, Any]]()
    kinds = itertools.product(BENCHMARK["WRITTEN"], BENCHMARK["FORMATS"], DTYPES)
    files = list(kinds)
    for number, (dialect, format, dtype) in enumerate(files):
        if number % step:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = BENCHMARK["write"](dialect, format, dtype, CONFIG, Path(folder))
            for cast in (None, DTYPES[(DTYPES.index(dtype) + 1) % 3]):
                about = {"file": f"{dialect}, {format}, {dtype}"}
                found += [about | each for each in compared(path, cast)]
    worst = {what: max((abs(each[what]) for each in found), default=0) for what in ("allocated", "reserved")}
    off = [each for each in found if max(abs(each["allocated"]), abs(each["reserved"])) > 0.01]
    print(json.dumps({"files": len(files[::step]), "loads": len(found), "worst": worst, "off": off}))


if __name__ == "__main__":
    main()
