"""Memory of this process: how much it has used, and that it keeps what it will use again."""

from __future__ import annotations

import ctypes
import os
import platform
import resource

import torch


def peak_memory_gib(device: torch.device) -> float:
    """Peak GiB so far: of the device's allocator on CUDA, of the resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next step, instead of giving it back and fetching it anew.

    A training step on CPU allocates the same tensors again and again. By default glibc returns large ones to the
    system, which then clears every page of them once more: a tenth of a small model's step (docs/benchmarks.md). The
    peak of memory stays what it was. Options of the user count: nothing is done if glibc's own variables are set, or
    another allocator is preloaded.

    Returns:
        Whether it is done; False elsewhere than with glibc on Linux.
    """
    chosen = [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))]
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc" or chosen:
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) == 1 for name, value in _MALLOPT)


# From malloc.h: the largest threshold that it takes, below which memory comes from the heap; and never trim the heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MALLOPT = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1))
