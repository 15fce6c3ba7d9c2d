"""One read, watched: its errors, its time, its memory, and whether it did what no reader may."""

from __future__ import annotations

import gc
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2lite import CheckpointError, GPT2LiteError

# Of CPU. What we promise is 2 s, which benchmarks/fuzz.py holds on a quiet machine; on one that is busy the
# same work has taken two and a half times as long, so that a test only tells what grows out of hand.
MOST_SECONDS, SECONDS_PER_BYTE = 10.0, 1e-6
MIB = 1 << 20
# Events of Python's own audit: processes, connections, and whatever changes a file.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
FORBIDDEN += ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")
_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watched is None:
        return
    writes = event == "open" and isinstance(arguments[1], str) and {*"wax+"} & {*str(arguments[1])}
    if writes or event in FORBIDDEN:
        _watched.append(f"{event} {arguments!r:.100}")


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is done meanwhile that no reader may do."""
    global _watched
    _watched = found = []
    try:
        yield found
    finally:
        _watched = None


def _memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:")}


def faults(read: Callable[[Path], object], folder: Path, nbytes: int) -> list[str]:
    """What is wrong with how a folder is read, whose mutated file has so many bytes; none if all is well."""
    found = []
    reset = Path("/proc/self/clear_refs")
    gc.collect(0)
    if reset.exists():
        reset.write_text("5")  # the peak begins anew
    before = _memory()["VmRSS:"] if reset.exists() else 0
    began = time.process_time()
    with watched() as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(folder)
        except CheckpointError as error:
            if len(str(error)) > 8000:
                found.append(f"a message of {len(str(error))} characters")
            if not str(error).replace("\n", "").replace("\t", "").isprintable():
                found.append(f"raw control characters in {str(error)!r:.300}")
        except GPT2LiteError as error:
            if type(error).__name__ == "UsageError" and "no tokenizer" not in str(error):
                found.append(f"UsageError: {str(error)[:200]}")
        except BaseException:  # what is raised is what is looked for
            found.append(traceback.format_exc())
    seconds = time.process_time() - began
    if seconds > MOST_SECONDS + nbytes * SECONDS_PER_BYTE:
        found.append(f"{seconds:.1f} s")
    peak = _memory()["VmHWM:"] - before if reset.exists() else 0
    if peak > 64 * MIB + 4 * nbytes:
        found.append(f"{peak >> 20} MiB of memory for {nbytes} bytes")
    if done:
        found.append(f"did {done}")
    return found
