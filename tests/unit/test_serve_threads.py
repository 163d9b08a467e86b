"""Loading a model leaves no compute threads behind: the engine's team is the only one of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe import ModelConfig, MoEConfig, Transformer
from moe.checkpoint import save_model
from moe.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, os, sys
from pathlib import Path
import torch
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings

def tasks():
    return len(os.listdir("/proc/self/task"))

first, second = map(Path, sys.argv[1:])
before = tasks()
engine = load_engine(first, model_id="m", settings=EngineSettings(threads=1))
assert torch.get_num_threads() == 2
print("loaded", tasks() - before)
before = tasks()
engine._weights.load(str(second))
print("loaded again", tasks() - before)
torch.ones(2**20).add_(1)
print("computed", tasks() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_loading_starts_no_team_of_threads(tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=8, hidden_dim=128)
    tokenizer = Tokenizer.bytes()
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, dim=256, num_layers=2, num_heads=2, moe=moe))
    for name in ("one", "two"):
        save_model(tmp_path / name, model, tokenizer)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "one"), str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # The last line shows that a team would have been seen.
    assert result.stdout.splitlines() == ["loaded 0", "loaded again 0", "computed 1"]
