"""One team of compute threads in a process: the engine's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_a_team() -> Iterator[None]:
    """What is computed inside starts no OpenMP threads, for work that threads other than the engine's do with tensors.

    Every thread that computes in parallel gets a team of its own, which it keeps. GNU's OpenMP counts the members of
    all, and once there are more than cores they do not spin at barriers any more but sleep. The many small regions of
    a forward pass then wait for wake-ups: a third of the time of generating on two cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
