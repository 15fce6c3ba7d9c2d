"""The only file that names a kind of device: what there is, what is free, what was used, streams, waiting.

Everything is asked of `torch.accelerator`, so that CUDA, ROCm, XPU and MPS are one path; what a device lacks
is a capability here. Bytes throughout.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from gpt2lite.errors import InsufficientMemoryError, UsageError, is_out_of_memory

CPU = torch.device("cpu")
_SEEDING = threading.Lock()
IMPORTED_IN = os.getpid()


@contextmanager
def one_thread_after_fork() -> Iterator[None]:
    """In a forked process torch computes in one thread: OpenMP would wait for ever for those it lacks."""
    count = torch.get_num_threads()
    is_forked = os.getpid() != IMPORTED_IN and count > 1
    if is_forked:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if is_forked:
            torch.set_num_threads(count)


def free_accelerator() -> torch.device | None:
    """The first accelerator with most of its memory free, None where there is none. Starts those it asks."""
    here = accelerators()
    return next((each for each in here if 2 * (free_memory(each) or 0) > total_memory(each)), None)


def name_device(device: str | torch.device) -> torch.device:
    """`device` as torch means it, whether or not this machine has one. Raises UsageError for no device.

    "auto" is an accelerator that is here and mostly free, else the CPU.
    """
    if device == "auto":
        return free_accelerator() or CPU
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"unknown device {device!r}; try auto, cpu, cuda or cuda:0") from None
    if found.type == "meta":
        raise UsageError("a model on the meta device holds no weights; try cpu or cuda")
    return found


def _count(kind: str) -> int:
    """How many devices of a kind torch can use here. Initialises none."""
    return sum(found.type == kind for found in accelerators())


def is_here(device: torch.device) -> bool:
    """Whether this is an accelerator that torch can use in this process."""
    return (device.index or 0) < _count(device.type)


def resolve_device(device: str | torch.device) -> torch.device:
    """`device` as its tensors name it. Raises UsageError where this machine has no such device."""
    found = name_device(device)
    if found.type == "cuda" and not is_here(found):
        count = _count("cuda")
        have = f"only {count} CUDA device(s)" if count else "no CUDA device that torch can use"
        raise UsageError(f"{device} was asked for, but this machine has {have}. Use cpu instead.")
    try:
        return torch.empty(1, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error) or "out of memory" in str(error):
            raise InsufficientMemoryError(f"{device} has no memory left for even one number") from None
        raise UsageError(f"{device} was asked for, but torch cannot use it here. Use cpu instead.") from None


# ---- memory ------------------------------------------------------------------------------------------------


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device, None where that cannot be known.

    What the driver has free and what torch's allocator holds unused, within this process's own fraction.
    """
    if not is_here(device):
        return None
    try:
        free, total = torch.accelerator.get_memory_info(device)
    except (RuntimeError, AttributeError):  # a backend that cannot tell
        return None
    reserved = torch.accelerator.memory_reserved(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device) if device.type == "cuda" else 1.0
    granted = int(total * fraction) - reserved
    return max(min(free, granted), 0) + reserved - torch.accelerator.memory_allocated(device)


def total_memory(device: torch.device) -> int:
    """Bytes that a device has."""
    return int(torch.accelerator.get_memory_info(device)[1])


def allocated(device: torch.device) -> int:
    """Bytes of tensors that this process has on a device; 0 on the CPU, where torch does not count."""
    return torch.accelerator.memory_allocated(device) if is_here(device) else 0


def peak_allocated(device: torch.device) -> int:
    """The most that `allocated` was since `restart_peak`."""
    return torch.accelerator.max_memory_allocated(device) if is_here(device) else 0


def restart_peak(device: torch.device) -> None:
    """Give cached memory back to the device and count its peak anew; nothing on the CPU."""
    if is_here(device):
        synchronize(device)
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def caches_in_blocks(device: torch.device) -> bool:
    """Whether memory there comes from torch's caching allocator, in the blocks that `CachingPool` models."""
    return device.type == "cuda"


# ---- streams -----------------------------------------------------------------------------------------------


def copies_async(device: torch.device) -> bool:
    """Whether copies to this kind of device can go on while this thread does: streams, pinned memory."""
    return device.type not in ("cpu", "meta", "mps")


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given; nothing on the CPU."""
    if is_here(device):
        torch.accelerator.synchronize(device)


def on_stream(stream: torch.Stream | None) -> AbstractContextManager[object]:
    """Inside, work for the device goes to this stream; None: where it would go anyway."""
    return nullcontext() if stream is None else stream


def current_stream(device: torch.device) -> torch.Stream | None:
    """Where work for a device goes from this thread; None where it has no streams."""
    return torch.accelerator.current_stream(device) if copies_async(device) and is_here(device) else None


def caller_stream() -> torch.Stream | None:
    """This thread's stream on the current device, for another thread to continue on.

    None where no accelerator was used yet: asking would start one.
    """
    kind = torch.accelerator.current_accelerator()
    if kind is None or not getattr(torch, kind.type).is_initialized():
        return None
    return current_stream(torch.device(kind.type, torch.accelerator.current_device_index()))


def has_graphs(device: torch.device) -> bool:
    """Whether work on a device can be recorded once and replayed."""
    return device.type == "cuda" and is_here(device)


def record(device: torch.device, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record `work` on a device; returns what replays it, and its result, which every replay fills anew.

    It runs twice before, so that libraries allocate their workspaces outside of the graph, on the stream that
    records. Both must belong to that device: the current one's would record an empty graph.
    """
    graph = torch.cuda.CUDAGraph()
    with current_device(device):
        side, current = torch.cuda.Stream(device), torch.accelerator.current_stream(device)
        side.wait_stream(current)
        with on_stream(side):
            work()
            work()
        current.wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            result = work()
    return graph.replay, result


# ---- arithmetic --------------------------------------------------------------------------------------------


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself; cards before compute capability 8.0 emulate it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """What is drawn on a device depends on the seed alone; afterwards its generator is where it was.

    No other generator is touched. One thread at a time, because the generator is the process's.
    """
    rng = torch.get_device_module(device) if is_here(device) else torch.random
    set_seed = rng.manual_seed if is_here(device) else torch.default_generator.manual_seed
    with _SEEDING, current_device(device):
        before = rng.get_rng_state()
        set_seed(seed)
        try:
            yield
        finally:
            rng.set_rng_state(before)


def name_of(device: torch.device) -> str:
    """What the hardware is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def accelerators() -> list[torch.device]:
    """All that torch can use here. Initialises none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found else 0
    return [torch.device(found.type, index) for index in range(count)]  # type: ignore[union-attr]


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one of this thread for a while; nothing on the CPU."""
    return torch.accelerator.device_index(device.index) if is_here(device) else nullcontext()
