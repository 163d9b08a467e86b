"""The doctor's two-rank test with real processes: good, misnamed network, one rank dead, too slow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launch.doctor import Finding, two_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_two_ranks_talk() -> None:
    found = only(two_ranks(90))
    assert found.status == "ok", found
    assert found.text.startswith("two processes added, exchanged and gathered on ")
    assert found.mend == ""


def test_an_interface_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    found = only(two_ranks(90))
    assert found.status == "fail"
    assert "nosuch0" in found.text
    assert found.mend == "GLOO_SOCKET_IFNAME is 'nosuch0': is that a network interface of this machine?"


def sitecustomize(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run ``code`` at the start of every Python process."""
    (folder / "sitecustomize.py").write_text(code, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_is_named_long_before_the_other_gives_up(
    dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        f"import os, sys\nif os.environ.get('RANK') == '{dead}':\n    print('no luck', file=sys.stderr, flush=True)\n"
    )
    sitecustomize(tmp_path, monkeypatch, code + "    os._exit(7)\n")
    start = time.monotonic()
    found = only(two_ranks(90))
    assert time.monotonic() - start < 45
    assert (found.status, found.text) == ("fail", f"rank {dead} ended with 7: no luck")
    assert found.mend.startswith("on one machine: export GLOO_SOCKET_IFNAME=lo")


def test_a_torch_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libc10.so is missing')\n", "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = only(two_ranks(60))
    assert found.status == "fail"
    assert found.text.endswith("ended with 1: ImportError: libc10.so is missing")
    assert "import torch, parallel.topology" in found.mend


def test_no_answer_in_time() -> None:
    start = time.monotonic()
    found = only(two_ranks(0.2))
    assert time.monotonic() - start < 20
    assert (found.status, found.text) == ("fail", "no answer within 0.2 s")
    assert "GLOO_SOCKET_IFNAME" in found.mend


def test_a_rank_with_much_to_say_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys\nif 'RANK' in os.environ:\n    print('x' * 500_000, file=sys.stderr)\n    os._exit(3)\n"
    sitecustomize(tmp_path, monkeypatch, code)
    found = only(two_ranks(60))
    assert found.text.startswith(("rank 0 ended with 3: xxx", "rank 1 ended with 3: xxx"))
    assert len(found.text) < 500
