"""Freed memory stays with the process that will use it again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

PROGRAM = """
import resource, torch
from launch.memory import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory()
weight = torch.ones(64, 64, requires_grad=True)
x = torch.ones(8192, 64)
def step():  # backward runs on a thread of its own, which has its own heap
    y = x
    for _ in range(4):
        y = torch.tanh(y @ weight)
    y.sum().backward()
for _ in range(15):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


PAGES = 10 * 8 * 512
"""Of the activations of 10 steps: 8 tensors of 2 MiB each."""


def page_faults(**variables: str) -> tuple[bool, int]:
    """Whether memory is kept, and how many pages 10 steps fetched anew."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**known, **variables}, timeout=60)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc: run it on a Linux that has it")
def test_steps_use_the_memory_of_those_before() -> None:
    kept, faults = page_faults()
    assert kept
    assert faults < PAGES / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc: run it on a Linux that has it")
def test_the_users_own_choice_counts() -> None:
    # Heaps that are trimmed at once: most pages are fetched anew, so the test above can fail.
    kept, faults = page_faults(MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536")
    assert not kept
    assert faults > PAGES / 2
