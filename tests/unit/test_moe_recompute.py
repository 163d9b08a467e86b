"""Activation recompute: the same numbers bit for bit, whatever the gate draws, and no collective in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gates import Mode
from moe import ForwardContext, ModelConfig, MoEConfig, Transformer, next_token_loss

pytestmark = pytest.mark.unit

GATES: dict[str, dict[str, Any]] = {
    "plain": {"k": 2},
    "jitter": {"k": 2, "jitter": 0.3},
    "learned noise": {"k": 2, "noise": "learned", "importance_coef": 0.1, "load_coef": 0.1},
    "fixed noise": {"k": 2, "noise": "fixed", "noise_std": 3.0, "renormalise": False},
    "second choice": {"k": 2, "noise": "second_choice"},
    "random drops": {"k": 2, "capacity_factor": 0.7, "drop_policy": "random", "renormalise_kept": True},
    "bias and groups": {"k": 2, "score": "sigmoid", "balance": "bias", "num_groups": 2},
    "global loss": {"k": 2, "balance_scope": "global", "noise": "fixed"},
}


def config(recompute: str, **options: Any) -> ModelConfig:
    moe = MoEConfig(num_experts=6, hidden_dim=16, num_shared_experts=1)
    base = {"vocab_size": 40, "dim": 16, "num_layers": 3, "num_dense_layers": 1, "qk_norm": True, "num_kv_heads": 2}
    return ModelConfig.model_validate({**base, "moe": moe.model_dump(), "recompute": recompute, **options})


def train(recompute: str, gate: dict[str, Any], valid: bool = False, dtype: torch.dtype | None = None, steps: int = 2):
    """Losses of some SGD steps, loads, final weights and the last gradients; and how often loads were reduced."""
    model = Transformer(config(recompute), {"name": "topk", **gate})
    model.init_weights(0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, loads, phases = [], [], []
    for step in range(steps):
        ids_BT = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(step))
        valid_BT = torch.arange(20) < torch.tensor([[20], [11]]) if valid else None
        phase = ["forward"]

        def reduce_load(load_E: torch.Tensor, phase: list[str] = phase) -> torch.Tensor:
            phases.append(phase[0])
            return 2 * load_E

        context = ForwardContext(
            step, Mode.TRAIN, torch.Generator().manual_seed(100 + step), valid_BT, reduce_load, compute_dtype=dtype
        )
        output = model(ids_BT, context=context)
        nats, count = next_token_loss(output.logits_BTV, ids_BT, valid_BT)
        loss = nats / count + output.aux_loss()
        optimizer.zero_grad()
        phase[0] = "backward"
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        loads += [r.output.plan.load_E.tolist() for r in output.routing]
        loads += [r.output.plan.offered_E.tolist() for r in output.routing]
    grads = {name: param.grad for name, param in model.named_parameters()}
    return losses, loads, model.state_dict(), grads, phases


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("valid", [False, True], ids=["full", "padded"])
def test_pain_10_recompute_trains_identically(name: str, valid: bool) -> None:
    """A second, different top-k in backward: transformers #47467, Automodel #3325, Liger #1255."""
    kept = train("none", GATES[name], valid)
    recomputed = train("block", GATES[name], valid)
    assert recomputed[0] == kept[0]
    assert recomputed[1] == kept[1]
    for mine, reference in zip(recomputed[2:4], kept[2:4], strict=True):
        for key, value in reference.items():
            assert torch.equal(mine[key], value), key
    assert recomputed[4] == kept[4], "loads must be reduced as often, and never in backward"
    assert "backward" not in recomputed[4]
    assert bool(recomputed[4]) == (name == "global loss")


def test_recompute_in_bf16() -> None:
    kept, recomputed = (train(r, GATES["learned noise"], dtype=torch.bfloat16) for r in ("none", "block"))
    assert recomputed[0] == kept[0]


def test_recompute_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def saved_bytes(recompute: str) -> int:
        model = Transformer(config(recompute, num_layers=4))
        ids_BT = torch.zeros(4, 64, dtype=torch.int64)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(ids_BT)
        assert output.logits_BTV.requires_grad
        return sum(sizes.values())

    assert saved_bytes("block") < 0.3 * saved_bytes("none")


def test_no_recompute_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(config("block"))
    calls = []
    for _, gate in model.gates():
        forward = gate.forward
        monkeypatch.setattr(gate, "forward", lambda inp, forward=forward: (calls.append(1), forward(inp))[1])
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert len(calls) == 2
