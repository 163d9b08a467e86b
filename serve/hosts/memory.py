"""What a serving process asks of the system's memory."""

from __future__ import annotations

import os

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""For the environment of a process that serves: torch then allocates large tensors in huge pages, where the system
leaves that to programs (Linux's ``madvise``). Generating text is bound by reading weights, and in pages of 4 KiB each
of them is looked up anew: 2 to 5 % of the time (``benchmarks/serve/against_transformers.py``)."""


def use_huge_pages() -> None:
    """In this process, unless the environment says otherwise; works before its first tensor, later it does nothing."""
    for name, value in HUGE_PAGES.items():
        os.environ.setdefault(name, value)
