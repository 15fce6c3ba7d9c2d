"""What must hold on a device with streams. Each is run for itself, and again with every fault of faults.py.

By `test_devices.py`, in a process whose accelerator is the simulated device.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import device
import torch

from gpt2lite import STRATEGIES, GPTConfig, GPTModel, InsufficientMemoryError, Tuning, forecast
from gpt2lite.devices import allocated, empty_cache, peak_allocated, peak_reserved, restart_peak
from gpt2lite.generation import engines

SIM = device.register()
FIRST, SECOND = torch.device(device.KIND, 0), torch.device(device.KIND, 1)
TINY = GPTConfig(vocab_size=101, context_length=32, emb_dim=48, n_heads=4, n_layers=3)
LARGE = GPTConfig(vocab_size=7001, context_length=64, emb_dim=384, n_heads=4, n_layers=2)
DEEP = GPTConfig(vocab_size=101, context_length=32, emb_dim=96, n_heads=4, n_layers=20)
SMALL = Tuning(readers=3, chunk_bytes=4096, ring_bytes=1 << 14)
HALF = (None, torch.bfloat16)
MIB = 1 << 20
FOLDER = Path(tempfile.mkdtemp(prefix="gpt2lite-simulated-"))

warnings.filterwarnings("ignore", message=".*(fallback|not currently supported).*")


@cache
def saved(config: GPTConfig = TINY) -> Path:
    """A checkpoint in which no two values are alike, and positions decide."""
    generator = torch.Generator().manual_seed(0)
    model = GPTModel(config)
    for name, parameter in model.named_parameters():
        spread = 2.0 if name.endswith("emb.weight") else 0.3
        parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.1, spread, generator=generator)
    return model.save_checkpoint(FOLDER / f"{config.emb_dim}.pth")


@cache
def right(dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """What a load must give."""
    return GPTModel.from_checkpoint(saved(), dtype=dtype).state_dict()


def assert_right(model: GPTModel, dtype: torch.dtype | None = None) -> None:
    wanted, found = right(dtype), {name: value.cpu() for name, value in model.state_dict().items()}
    wrong = [name for name in wanted if not torch.equal(wanted[name], found[name])]
    assert not wrong, wrong


@contextmanager
def late(over_bus: int, within: int) -> Iterator[None]:
    """Copies begin so many microseconds late."""
    SIM.delay(over_bus, within)
    try:
        yield
    finally:
        SIM.delay(0, 0)


@contextmanager
def granted(nbytes: int, on: torch.device = FIRST) -> Iterator[None]:
    """The device has no more memory than that."""
    empty_cache(on)
    SIM.limit(on.index, nbytes)
    try:
        yield
    finally:
        SIM.limit(on.index, device.NEVER)
        SIM.fail_in(on.index, -1)


def streamed(on: torch.device, **options: Any) -> GPTModel:
    return GPTModel.from_checkpoint(saved(), on, "stream", tuning=SMALL, **options)


# ---- loading -----------------------------------------------------------------------------------------------


def check_late_copies_over_the_bus_change_no_bit() -> None:
    for dtype in HALF:
        with late(3000, 0):
            model = streamed(FIRST, dtype=dtype)
        assert_right(model, dtype)


def check_late_copies_within_the_device_change_no_bit() -> None:
    with late(0, 2000):
        model = streamed(FIRST)
    assert_right(model)


def check_blocks_that_come_in_as_it_computes_are_right() -> None:
    ids = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(0)).to(FIRST)
    whole = GPTModel.from_checkpoint(saved(DEEP), FIRST)
    for place in ("disk", "host"):
        options: dict[str, Any] = {"offload": place, "max_device_memory": "8MiB"}
        options["tuning"] = Tuning(readers=3, chunk_bytes=1 << 16, ring_bytes=1 << 19)
        before = allocated(FIRST)
        model = GPTModel.from_checkpoint(saved(DEEP), FIRST, **options)
        took, kept = allocated(FIRST) - before, len([*model.trf_blocks.children()])
        assert kept < DEEP.n_layers - 2, kept
        with torch.no_grad(), late(300, 300):
            for _ in range(2):
                assert torch.equal(model(ids).cpu(), whole(ids).cpu()), place
        wanted = whole.generate([[1, 2, 3]], 8, engine="torch")
        assert torch.equal(model.generate([[1, 2, 3]], 8)[0].cpu(), wanted[0].cpu()), place
        stays = forecast(saved(DEEP), FIRST, **options)["stream"].stays_device
        assert abs(took - stays) <= 0.01 * stays, (place, took, stays)
        del model


def check_another_stream_finds_what_was_loaded() -> None:
    with late(0, 2000):
        model = streamed(FIRST)
        with torch.Stream(FIRST):
            assert_right(model)


def check_the_second_device_is_as_good_as_the_first() -> None:
    with late(3000, 500):
        model = streamed(SECOND)
    assert_right(model)
    assert {p.device for p in model.parameters()} == {SECOND}
    assert torch.accelerator.current_device_index() == 0


def check_every_strategy_gives_the_same_bits() -> None:
    for strategy in STRATEGIES:
        if strategy != "per_tensor":
            with late(500, 500):
                model = GPTModel.from_checkpoint(saved(), SECOND, strategy, dtype=torch.float16)
            assert_right(model, torch.float16)


def check_slots_are_page_locked_once_and_used_again() -> None:
    before = SIM.counts()
    streamed(FIRST)
    first = device.counted(SIM, before)
    streamed(FIRST)
    both = device.counted(SIM, before)
    assert SIM.counts()["pinned_bytes"] >= 4096
    assert both["pinned_bytes"] == first["pinned_bytes"] <= SMALL.ring_bytes
    assert both["bytes_to_device"] == 2 * first["bytes_to_device"]
    assert not both["spins"]
    assert not both["pageable"]


def check_a_model_is_saved_as_its_stream_leaves_it() -> None:
    model = streamed(FIRST)
    flipped = [(parameter.data, parameter.data.flip(0)) for parameter in model.parameters()]
    with late(0, 3000), torch.Stream(FIRST):
        for parameter, value in flipped:
            parameter.copy_(value)
        path = model.save_checkpoint(FOLDER / "flipped.pth")
    found = GPTModel.from_checkpoint(path).state_dict()
    for name, value in right().items():
        assert torch.equal(found[name], value.flip(0)), name


# ---- memory ------------------------------------------------------------------------------------------------


def check_forecasts_are_what_the_allocator_counts() -> None:
    for strategy, dtypes in {"sequential": (None,), "meta": (None,), "mmap": HALF, "stream": HALF}.items():
        for dtype in dtypes:
            gc.collect()
            restart_peak(SECOND)
            before = allocated(SECOND)
            predicted = forecast(saved(LARGE), SECOND, dtype=dtype)[strategy]
            model = GPTModel.from_checkpoint(saved(LARGE), SECOND, strategy, dtype=dtype)
            found = peak_allocated(SECOND) - before, peak_reserved(SECOND)
            del model
            wanted = predicted.peak_device, predicted.peak_reserved
            for figure, forecasted in zip(found, wanted, strict=True):
                assert abs(figure - forecasted) <= 0.01 * figure, (strategy, dtype, found, wanted)


def check_what_is_admitted_fits() -> None:
    """The reserved bytes of the forecast are enough, and a segment less is refused before it begins."""
    for strategy in ("meta", "mmap", "stream"):
        need = forecast(saved(LARGE), SECOND)[strategy].peak_reserved
        gc.collect()
        empty_cache(SECOND)
        spare = 32 * MIB  # which a budget leaves alone
        with granted(need + spare, SECOND):
            GPTModel.from_checkpoint(saved(LARGE), SECOND, strategy)
        gc.collect()
        with granted(need + spare - 2 * MIB, SECOND):
            try:
                GPTModel.from_checkpoint(saved(LARGE), SECOND, strategy)
            except InsufficientMemoryError as error:
                assert "nothing was allocated" in str(error), error  # noqa: PT017
            else:
                # with less, the allocator gives back what it keeps, and the load may still fit
                assert peak_reserved(SECOND) <= need + spare - 2 * MIB


def check_memory_that_runs_out_leaves_nothing_and_another_strategy_takes_over() -> None:
    gc.collect()
    held = allocated(FIRST)
    with granted(device.NEVER):
        SIM.fail_in(0, 5)
        try:
            GPTModel.from_checkpoint(saved(), FIRST, "stream")
        except InsufficientMemoryError as error:
            kept = error  # noqa: F841  # what it held would be counted
            assert all([error.needed["device"], error.available["device"]]), error.needed  # noqa: PT017
            assert allocated(FIRST) == held
        else:
            raise AssertionError("memory did not run out")
        SIM.fail_in(0, 5)
        assert_right(GPTModel.from_checkpoint(saved(), FIRST))


def check_generation_that_runs_out_of_memory_leaves_nothing() -> None:
    model = streamed(FIRST)
    gc.collect()
    held = allocated(FIRST)
    for engine, allocations in (("torch", 300), ("cuda_graph", 900)):
        with granted(device.NEVER):
            SIM.fail_in(0, allocations)
            try:
                model.generate([[1, 2, 3]] * 4, 28, engine=engine)
            except InsufficientMemoryError as error:
                kept = error  # noqa: F841
                assert "while generating" in str(error), error  # noqa: PT017
                gc.collect()
                assert allocated(FIRST) - held <= 8192, allocated(FIRST) - held  # the ids
            else:
                raise AssertionError("memory did not run out")
    assert len(model.generate([[1, 2, 3]], 8)[0]) == 11


# ---- generation --------------------------------------------------------------------------------------------


def assert_graph_writes_torchs_tokens(
    on: torch.device, prompts: list[list[int]], n: int, **options: Any
) -> None:
    wanted = GPTModel.from_checkpoint(saved()).generate(prompts, n, engine="torch", **options)
    found = streamed(on).generate(prompts, n, engine="cuda_graph", **options)
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]


def check_a_recorded_graph_writes_torchs_tokens() -> None:
    before = SIM.counts()
    with late(300, 300):
        assert_graph_writes_torchs_tokens(FIRST, [[1], [5, 6, 7, 8]], 20)
    did = device.counted(SIM, before)
    assert (did["recordings"], did["replays"]) == (1, 19)


def check_a_graph_belongs_to_its_models_device() -> None:
    assert_graph_writes_torchs_tokens(SECOND, [[1, 2]], 20)


def check_a_graph_goes_on_past_the_context() -> None:
    for window in (1, 3):
        before = SIM.counts()
        assert_graph_writes_torchs_tokens(FIRST, [[1], [5, 6, 7, 8]], 40, window=window)
        assert device.counted(SIM, before)["recordings"] == 1


def check_two_threads_generate_at_once() -> None:
    wanted = [row.tolist() for row in GPTModel.from_checkpoint(saved()).generate([[1]], 20, engine="torch")]
    models, found = [streamed(FIRST), streamed(SECOND)], list[Any]()

    def write(model: GPTModel) -> None:
        found.append([row.tolist() for row in model.generate([[1]], 20, engine="cuda_graph")])

    threads = [Thread(target=write, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 2


def check_recording_takes_no_more_than_is_asked_for() -> None:
    model = streamed(FIRST)
    gc.collect()
    restart_peak(FIRST)
    torch_alone = peak_reserved(FIRST)
    model.generate([[1, 2]] * 4, 24, engine="torch")
    torch_alone = peak_reserved(FIRST) - torch_alone
    gc.collect()
    restart_peak(FIRST)
    before = peak_reserved(FIRST)
    streams = SIM.counts()["streams"]
    for _ in range(3):
        model.generate([[1, 2]] * 4, 24, engine="cuda_graph")
    took = peak_reserved(FIRST) - before - torch_alone
    assert took <= engines.graph_bytes(model, 4) - engines.WORKSPACE_BYTES, took
    assert SIM.counts()["streams"] <= streams + 1  # each would have a workspace of its own


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_").replace("_", " "): function
    for name, function in globals().items()
    if name.startswith("check_")
}


def main() -> None:
    """Run all, or those whose names hold a word; the last line is a JSON object: what failed, and how."""
    failed = {}
    for name, check in CHECKS.items():
        if any(word not in name for word in sys.argv[1:]):
            continue
        try:
            check()
        except Exception:
            failed[name] = traceback.format_exc()
        print("FAILED" if name in failed else "ok", name)
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
