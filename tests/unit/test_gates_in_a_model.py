"""Every gate in a language model: it trains through its name alone, and generates, with state that survives a file."""

from __future__ import annotations

import copy

import pytest
import torch

from gates import Mode, gate_names
from moe import ModelConfig, MoEConfig, Transformer
from moe.generate import SamplingParams, generate
from moe.transformer import ForwardContext, next_token_loss

pytestmark = pytest.mark.unit

GATES = [name for name in gate_names() if name not in ("soft", "replay")]  # refused: see tests/e2e/test_train_gates.py
STEPS = 6


def trained(gate: str, recompute: str = "none", batch: int = 4) -> tuple[Transformer, list[float]]:
    """A tiny model after a few steps on one batch, as the trainer takes them, and its losses."""
    config = ModelConfig(
        vocab_size=32,
        dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=16,
        moe=MoEConfig(num_experts=8, hidden_dim=16),
        recompute=recompute,  # type: ignore[arg-type]
    )
    # Long enough for the permutation to be learned at all.
    model = Transformer(config, {"name": gate, "search": 3} if gate == "local_search" else gate)
    model.init_weights(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids_BS = torch.randint(32, (batch, 13), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(STEPS):
        for _, made in model.gates():
            made.begin_step(step, STEPS)
        context = ForwardContext(step=step, mode=Mode.TRAIN, rng=torch.Generator().manual_seed(step))
        output = model(ids_BS[:, :-1], context=context)
        nats, tokens = next_token_loss(output.logits_BTV, ids_BS[:, 1:])
        optimizer.zero_grad()
        (nats / tokens + output.aux_loss()).backward()
        optimizer.step()
        for (_, made), layer in zip(model.gates(), output.routing, strict=True):
            made.end_step(layer.output.plan.offered_E, layer.output.signals)
        losses.append(float(nats.detach() / tokens))
    return model, losses


@pytest.mark.parametrize("gate", GATES)
def test_training_lowers_the_loss_and_the_model_generates_the_same_however_it_is_fed(gate: str) -> None:
    model, losses = trained(gate)
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    prompt = [3, 1, 4, 1, 5]
    steps = list(generate(model, prompt, SamplingParams(max_tokens=4, temperature=0.0)))
    # Without a cache, all at once: a token's routing must not depend on how many came with it.
    ids = prompt + [step.token for step in steps]
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids[:-1]]), context=ForwardContext(mode=Mode.EVAL)).logits_BTV[0]
    assert logits_TV[len(prompt) - 1 :].argmax(-1).tolist() == ids[len(prompt) :]


@pytest.mark.parametrize("gate", GATES)
def test_gradients_and_state_are_those_without_recomputation(gate: str) -> None:
    plain, losses = trained(gate)
    recomputed, again = trained(gate, "block")
    assert again == pytest.approx(losses, rel=1e-6)
    for (name, tensor), other in zip(plain.state_dict().items(), recomputed.state_dict().values(), strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("gate", GATES)
def test_every_parameter_of_the_gate_learns(gate: str) -> None:
    model, _ = trained(gate)
    fresh = copy.deepcopy(model)
    fresh.init_weights(0)
    after, before = dict(model.gates()), dict(fresh.gates())
    idle = [
        name for name, parameter in after[1].named_parameters() if torch.equal(parameter, before[1].get_parameter(name))
    ]
    assert idle == []
