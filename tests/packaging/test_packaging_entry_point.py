"""A gate of another distribution: listed, shown, configured and built by its name, without a line of ours about it.

The distribution is a module and a ``.dist-info`` folder in a directory on PYTHONPATH, which is what pip leaves behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

Run = Callable[..., subprocess.CompletedProcess[str]]
MOEYARD = str(Path(sys.executable).with_name("moeyard"))

MODULE = '''
"""Nearest: the k experts whose centres are nearest to a token. From nowhere in particular."""

from typing import Literal

import torch
from pydantic import Field

from gates import Gate, GateConfig, GateInput, GateOutput, RoutingPlan, register_gate


class NearestConfig(GateConfig):
    """Options of the nearest gate."""

    name: Literal["nearest_of_tests"] = "nearest_of_tests"
    k: int = Field(1, ge=1, description="centres that a token visits")

    def experts_per_token(self, num_experts: int) -> float:
        return float(self.k)


@register_gate("nearest_of_tests")
class NearestGate(Gate):
    """The experts whose centres are nearest."""

    config_type = NearestConfig

    def __init__(self, config: NearestConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.weight = torch.nn.Parameter(torch.empty(num_experts, dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        torch.nn.init.normal_(self.weight, generator=generator)

    def route(self, inp: GateInput) -> GateOutput:
        score_TE = -torch.cdist(inp.x_TD, self.weight.to(inp.x_TD.dtype))
        plan = inp.replay
        if plan is None:
            chosen_TK = score_TE.topk(self.config.k).indices
            plan = RoutingPlan.from_topk(chosen_TK, score_TE.detach().gather(1, chosen_TK), self.num_experts)
        return GateOutput(plan.with_weight(plan.softmax_rows(plan.pick(score_TE))), logits_TE=score_TE)
'''

BUILD = """
import json, sys, torch
from gates import build_gate, gate_names
from moe import MoELayer

before = "gate_from_afar" in sys.modules
torch.manual_seed(0)
layer = MoELayer(16, 32, num_experts=6, gate={"name": "nearest_of_tests", "k": 2})
layer.gate.reset_parameters(torch.Generator().manual_seed(0))
x = torch.randn(3, 5, 16, requires_grad=True)
out = layer(x)
out.y.square().sum().backward()
centres = layer.gate.weight.detach()
nearest = (x.detach().view(-1, 1, 16) - centres).norm(dim=-1).argsort(1)[:, :2]
print(json.dumps({
    "before": before,
    "module": type(layer.gate).__module__,
    "shape": list(out.y.shape),
    "experts": out.routing.plan.expert_N.view(-1, 2).tolist(),
    "nearest": nearest.tolist(),
    "learns": bool(layer.gate.weight.grad.abs().sum() > 0),
    "reaches": bool(x.grad.abs().sum() > 0),
    "listed": "nearest_of_tests" in gate_names(),
}))
"""


def install(folder: Path, module: str, target: str = "gate_from_afar") -> None:
    """What ``pip install`` leaves of a distribution with one module and one entry point."""
    (folder / "gate_from_afar.py").write_text(module, encoding="utf-8")
    info = folder / "gate_from_afar-1.2.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: gate-from-afar\nVersion: 1.2\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    entry_points = f"[moeyard.gates]\nnearest_of_tests = {target}\n"
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    (info / "RECORD").write_text("", encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Python in an environment in which the distribution is installed, away from the clone."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(*arguments: str, path: Path | None = tmp_path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": "" if path is None else str(path), "COLUMNS": "100"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
        )

    return call


def test_it_is_listed_and_shown(run: Run, tmp_path: Path) -> None:
    install(tmp_path, MODULE)
    listed = run(MOEYARD, "gates", "list")
    assert listed.returncode == 0, listed.stderr
    (line,) = (line for line in listed.stdout.splitlines() if line.startswith("nearest_of_tests"))
    assert "topk" in listed.stdout
    assert "The experts whose centres are nearest" in line or "Nearest: the k experts" in line

    as_json = run(MOEYARD, "gates", "list", "--json")
    assert "nearest_of_tests" in json.loads(as_json.stdout)

    shown = run(MOEYARD, "gates", "show", "nearest_of_tests")
    assert shown.returncode == 0, shown.stderr
    assert "gate nearest_of_tests" in shown.stdout
    assert "From nowhere in particular." in shown.stdout, "the module's docstring"
    assert "gate.k" in shown.stdout
    assert "centres that a token visits" in shown.stdout


def test_a_layer_is_built_with_it_and_learns(run: Run, tmp_path: Path) -> None:
    install(tmp_path, MODULE)
    built = run("-c", BUILD)
    assert built.returncode == 0, built.stderr
    found = json.loads(built.stdout)
    assert found["before"] is False, "importing gates alone loads nobody else's module"
    assert found["module"] == "gate_from_afar"
    assert found["shape"] == [3, 5, 16]
    assert found["experts"] == found["nearest"]
    assert found["learns"]
    assert found["reaches"]
    assert found["listed"]


def test_a_training_config_takes_its_options(run: Run, tmp_path: Path) -> None:
    install(tmp_path, MODULE)
    shown = run(MOEYARD, "config", "show", "gate.name=nearest_of_tests", "gate.k=3")
    assert shown.returncode == 0, shown.stderr
    assert "nearest_of_tests" in shown.stdout
    assert "k: 3" in shown.stdout
    refused = run(MOEYARD, "config", "show", "gate.name=nearest_of_tests", "gate.kk=3")
    assert refused.returncode != 0
    assert "gate.kk" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_nothing_is_left_of_it_where_it_is_not_installed(run: Run, tmp_path: Path) -> None:
    install(tmp_path, MODULE)
    without = run(MOEYARD, "gates", "show", "nearest_of_tests", path=None)
    assert without.returncode != 0
    assert "unknown gate 'nearest_of_tests'" in without.stderr
    assert "Traceback" not in without.stderr


def test_a_name_that_is_taken_stays_whose_it_was_and_says_so(run: Run, tmp_path: Path) -> None:
    install(tmp_path, MODULE.replace("nearest_of_tests", "topk"))
    clash = run("-c", "import gates; print(type(gates.build_gate('topk', 4, 2)).__module__)")
    assert clash.stdout.split() == ["gates.topk"]
    assert "gate-from-afar" in clash.stderr
    assert "gate 'topk' is already registered by gates.topk.TopKGate" in clash.stderr


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("import a_package_that_nobody_has\n", "gate_from_afar"),
        ("raise RuntimeError('built for another version')\n", "gate_from_afar"),
        (MODULE, "gate_from_afar:no_such_attribute"),
    ],
    ids=["import", "error", "attribute"],
)
def test_a_broken_distribution_is_named(run: Run, tmp_path: Path, module: str, target: str) -> None:
    """The user did not write it, and must learn what to uninstall; a traceback through importlib does not say."""
    install(tmp_path, module, target)
    listed = run(MOEYARD, "gates", "list")
    assert "gate-from-afar" in listed.stderr
    assert "Traceback" not in listed.stderr
