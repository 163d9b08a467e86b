"""Weights of a serving process are in huge pages where the system has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
from pathlib import Path
from serve.hosts.memory import use_huge_pages
use_huge_pages()
import torch
weights = torch.zeros(64 * 2**20, dtype=torch.uint8)
print(Path("/proc/self/smaps_rollup").read_text())
"""


@pytest.mark.skipif(
    not MODES.exists() or "[madvise]" not in MODES.read_text(), reason="needs Linux that lets programs ask for them"
)
@pytest.mark.parametrize(("asked", "expected"), [(None, True), ("0", False)])
def test_large_tensors_are_in_huge_pages_unless_the_environment_says_otherwise(
    asked: str | None, expected: bool
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    if asked is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = asked
    command = [sys.executable, "-c", PROGRAM]
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"AnonHugePages:\s+(\d+) kB", result.stdout)
    assert found is not None
    assert (int(found[1]) >= 32 * 1024) == expected
