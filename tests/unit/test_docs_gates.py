"""The tutorial of docs/gates.md does what it says, and its table names every gate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gates import GateInput, Mode, gate_names, registry
from moe import ModelConfig, MoEConfig, Transformer
from moe.transformer import next_token_loss

pytestmark = pytest.mark.unit

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "gates.md").read_text()


def test_the_table_names_every_gate() -> None:
    table = TEXT.split("**Loads stay even**")[0]
    assert set(gate_names()) == set(re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\| (`.*?) \|", table))))


def test_the_tutorials_gate_runs_trains_and_replays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_GATES", dict(registry._GATES))
    names: dict[str, Any] = {"__name__": "tutorial"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/gates.md", "exec", dont_inherit=True), names)
    assert "torch.Size([4, 16, 32])" in capsys.readouterr().out
    layer, x_TD = names["layer"], torch.randn(9, 32)
    plan = layer.gate(GateInput(x_TD)).plan
    nearest_TK = torch.cdist(x_TD, layer.gate.weight).topk(2, largest=False).indices
    assert plan.expert_N.view(9, 2).sort(1).values.tolist() == nearest_TK.sort(1).values.tolist()
    again = layer.gate(GateInput(x_TD, mode=Mode.TRAIN, replay=plan.detach())).plan
    assert torch.equal(again.expert_N, plan.expert_N)
    config = ModelConfig(
        vocab_size=16, dim=16, num_layers=1, num_heads=2, max_seq_len=8, moe=MoEConfig(num_experts=4, hidden_dim=8)
    )
    model = Transformer(config, {"name": "nearest"})
    model.init_weights(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids_BS = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        nats, tokens = next_token_loss(model(ids_BS[:, :-1]).logits_BTV, ids_BS[:, 1:])
        optimizer.zero_grad()
        (nats / tokens).backward()
        optimizer.step()
        losses.append(float(nats.detach() / tokens))
    assert losses[-1] < losses[0] - 0.2
