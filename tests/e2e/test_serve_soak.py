"""One minute of the soak (make soak runs thirty): rude traffic leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


def test_pain_9_a_minute_of_rude_traffic_leaks_nothing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/serve/soak.py"), "--minutes", "1", "--clients", "16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "200:" in result.stdout
    assert "429:" in result.stdout
    assert "leaves later" in result.stdout
