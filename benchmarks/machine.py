"""What the machine itself can do, for a ratio to stand beside: kept apart from what is measured with it."""

from __future__ import annotations

import mmap


def warm_memory(nbytes: int) -> None:
    """Touch memory and free it, just before something is timed that will take as much.

    A virtual machine may give pages that were free for some seconds back to its host; taking them again then
    costs ten times more than anything that is measured here (seen: 0.4 against 4 GB/s). Whoever ran a moment
    after another had freed its memory would win.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, nbytes, mmap.PAGESIZE):
            memory[at] = 1
