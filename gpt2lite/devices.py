"""The only file that names a kind of device: what there is, what is free, what was used, streams, waiting.

Everything is asked of `torch.accelerator`, so that CUDA, ROCm, XPU and MPS are one path; what a device lacks
is a capability here. Bytes throughout.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from gpt2lite.errors import InsufficientMemoryError, UsageError, is_out_of_memory

CPU = torch.device("cpu")
# What a kind of device lacks. Any other kind has all of it: CUDA (which is ROCm's name, too), XPU, and what
# registers with torch from outside.
LACKS = {
    "cpu": {"streams", "blocks"},
    "meta": {"streams", "blocks"},
    "mps": {"streams", "blocks", "float64"},
}
# What a processor may have that multiplies in a dtype, as torch names it: x86 and ARM.
MULTIPLIES = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
POLL_SECONDS = 5e-5  # between two looks at an event: half of what a slot's copy takes on a fast bus
# A matrix product's workspace, which torch keeps for each stream that multiplied: 32 MiB on the newest cards,
# 8 before. Source: `getChosenWorkspaceSize` of ATen/cuda/CublasHandlePool.cpp.
WORKSPACE_BYTES = 32 << 20
_SEEDING, _RECORDING = threading.Lock(), threading.Lock()
_recording_streams: dict[torch.device, torch.Stream] = {}
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
    """The first accelerator with most of its memory free, None where there is none. Starts those it asks.

    One whose memory cannot be asked for counts as free.
    """
    for each in accelerators():
        free = free_memory(each)
        if free is None or 2 * free > total_memory(each):
            return each
    return None


def _has(device: torch.device, what: str) -> bool:
    return what not in LACKS.get(device.type, ())


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

    What the driver has free, within this process's own fraction, and what torch's allocator can give back to
    it: not the free rests of segments that are in use.
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
    held = torch.accelerator.memory_allocated(device)
    held += torch.accelerator.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    return max(min(free, granted), 0) + reserved - held


def shares_memory(device: torch.device) -> bool:
    """Whether a device's memory is the host's: Apple's, Jetson, GB10, graphics inside the processor."""
    if not is_here(device):
        return device.type == "mps"
    properties = getattr(torch.get_device_module(device), "get_device_properties", lambda device: None)
    return device.type == "mps" or bool(getattr(properties(device), "is_integrated", False))


def total_memory(device: torch.device) -> int:
    """Bytes that a device has."""
    return int(torch.accelerator.get_memory_info(device)[1])


def allocated(device: torch.device) -> int:
    """Bytes of tensors that this process has on a device; 0 on the CPU, where torch does not count."""
    return torch.accelerator.memory_allocated(device) if is_here(device) else 0


def peak_allocated(device: torch.device) -> int:
    """The most that `allocated` was since `restart_peak`."""
    return torch.accelerator.max_memory_allocated(device) if is_here(device) else 0


def peak_reserved(device: torch.device) -> int:
    """The most that torch's allocator had taken of a device since `restart_peak`, used or not."""
    return torch.accelerator.max_memory_reserved(device) if is_here(device) else 0


def reserved(device: torch.device) -> int:
    """Bytes that torch's allocator has taken of a device."""
    return torch.accelerator.memory_reserved(device) if is_here(device) else 0


def counts_peaks(device: torch.device) -> bool:
    """Whether torch's allocator for a device keeps statistics of its own."""
    return is_here(device) and bool(torch.accelerator.memory_stats(device))


def empty_cache(device: torch.device) -> None:
    """Give cached memory back to the device once it has done all it was given; nothing on the CPU."""
    if is_here(device):
        synchronize(device)
        torch.accelerator.empty_cache()


def restart_peak(device: torch.device) -> None:
    """Give cached memory back to the device and count its peak anew; nothing on the CPU."""
    empty_cache(device)
    if is_here(device):
        with suppress(RuntimeError):  # a backend that does not count
            torch.accelerator.reset_peak_memory_stats(device)


def caches_in_blocks(device: torch.device) -> bool:
    """Whether memory there comes from torch's caching allocator, in the blocks that `CachingPool` models."""
    return _has(device, "blocks")


def grows_segments() -> bool:
    """Whether that allocator was told to let segments grow (`expandable_segments:True`)."""
    said = (os.environ.get(f"PYTORCH_{kind}ALLOC_CONF", "") for kind in ("", "CUDA_", "HIP_"))
    return any("expandable_segments:true" in each.lower().replace(" ", "") for each in said)


# ---- streams -----------------------------------------------------------------------------------------------


def copies_async(device: torch.device) -> bool:
    """Whether copies to this kind of device can go on while this thread does: streams, pinned memory."""
    return _has(device, "streams")


def pinned_bytes(nbytes: int) -> int:
    """What page-locked memory of so many bytes takes: torch hands it out as powers of two, and keeps it."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


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

    None where no accelerator was used yet, since asking would start one, and where it has no streams.
    """
    kind = torch.accelerator.current_accelerator()
    if kind is None or not copies_async(kind) or not torch.get_device_module(kind).is_initialized():
        return None
    return current_stream(torch.device(kind.type, torch.accelerator.current_device_index()))


def wait_for(event: torch.Event) -> None:
    """Wait until an event has happened. `event.synchronize()` would keep a processor busy meanwhile."""
    while not event.query():
        time.sleep(POLL_SECONDS)


def has_graphs(device: torch.device) -> bool:
    """Whether work on a device can be recorded once and replayed."""
    if device.type == "cuda" or not is_here(device):
        return is_here(device)
    try:
        return torch.accelerator.Graph() is not None
    except (AttributeError, RuntimeError):  # a torch, or a backend, without them
        return False


@contextmanager
def _recorded_by(device: torch.device, side: torch.Stream) -> Iterator[Callable[[], None]]:
    """Inside, work is recorded; gives what replays it. Other threads may go on using the device."""
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            yield graph.replay
    else:
        general = torch.accelerator.Graph(capture_error_mode="thread_local")
        with on_stream(side), general:
            yield general.replay


def record(device: torch.device, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record `work` on a device; returns what replays it, and its result, which every replay fills anew.

    It runs twice before, so that libraries allocate their workspaces outside of the graph, on the stream that
    records: one for each device, since its workspace stays, and one thread at a time. It must belong to that
    device: the current one's would record an empty graph. A replay belongs to the thread's current stream.
    """
    with _RECORDING, current_device(device), ExitStack() as recording:
        if device not in _recording_streams:
            kind = torch.get_device_module(device)
            _recording_streams[device] = getattr(kind, "Stream", torch.Stream)(device)
        side, current = _recording_streams[device], torch.accelerator.current_stream(device)
        side.wait_stream(current)
        with on_stream(side):
            work()
            work()
        current.wait_stream(side)
        replay = recording.enter_context(_recorded_by(device, side))
        result = work()
    return replay, result


# ---- arithmetic --------------------------------------------------------------------------------------------


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself; cards before compute capability 8.0 emulate it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def emulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CPU has no instructions that multiply in a 16-bit dtype: each number is widened for itself.

    A matrix product in bf16 then takes three times as long as in fp32, in fp16 nine times (Xeon, AVX-512).
    """
    if device.type != "cpu" or dtype not in MULTIPLIES:
        return False
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 may lack it
    return not any(has.get(name) for name in MULTIPLIES[dtype])


def widest_float(device: torch.device) -> torch.dtype:
    """The floating dtype in which long sums are exact enough: float64 where a device has it."""
    return torch.float64 if _has(device, "float64") else torch.float32


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
