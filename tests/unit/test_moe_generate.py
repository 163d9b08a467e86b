"""Generation: greedy equals the full pass, sampling keeps to its rules, ends are told apart."""

from __future__ import annotations

import math

import pytest
import torch

from gates import Mode
from moe import ModelConfig, MoEConfig, SamplingParams, Transformer
from moe.errors import UserError
from moe.generate import generate, keep_likely, sample_token, token_step

pytestmark = pytest.mark.unit

CONFIG = ModelConfig(
    vocab_size=30, dim=16, num_layers=2, max_seq_len=24, init_std=0.3, moe=MoEConfig(num_experts=4, hidden_dim=16)
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(5)
    return model.eval()


def tokens(model: Transformer, params: SamplingParams, eos_id: int | None = None) -> list[int]:
    return [step.token for step in generate(model, [3, 1, 4], params, eos_id=eos_id)]


@torch.no_grad()
def test_greedy_equals_the_argmax_of_full_passes(model: Transformer) -> None:
    ids = [3, 1, 4]
    steps = list(generate(model, ids, SamplingParams(temperature=0.0, max_tokens=10, top_logprobs=3)))
    for step in steps:
        logprob_V = model(torch.tensor([ids])).logits_BTV[0, -1].log_softmax(-1)
        assert step.token == int(logprob_V.argmax())
        assert step.logprob == pytest.approx(float(logprob_V[step.token]), abs=1e-5)
        assert [token for token, _ in step.top] == logprob_V.topk(3).indices.tolist()
        assert step.top[0] == (step.token, step.logprob)
        ids.append(step.token)
    assert [step.finish for step in steps] == [None] * 9 + ["length"]


def test_seed_decides(model: Transformer) -> None:
    def run(seed: int | None) -> list[int]:
        return tokens(model, SamplingParams(max_tokens=16, seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_generation_leaves_torchs_own_generator_alone(model: Transformer) -> None:
    state = torch.get_rng_state()
    tokens(model, SamplingParams(max_tokens=4))
    tokens(model, SamplingParams(max_tokens=4, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_ends(model: Transformer) -> None:
    greedy = tokens(model, GREEDY)
    third = greedy[2]
    first_seen = greedy.index(third)
    for params, eos_id in ((SamplingParams(temperature=0.0, stop_ids=frozenset({third})), None), (GREEDY, third)):
        steps = list(generate(model, [3, 1, 4], params, eos_id=eos_id))
        assert [step.token for step in steps] == greedy[: first_seen + 1]
        assert steps[-1].finish == "stop"
    assert tokens(model, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True), eos_id=third) == greedy
    # The context of 24 leaves room for 21 more.
    steps = list(generate(model, [3, 1, 4], SamplingParams(temperature=0.0, max_tokens=1000)))
    assert len(steps) == 21
    assert steps[-1].finish == "length"
    assert tokens(model, SamplingParams(max_tokens=0)) == []


def test_gate_modes_and_no_gradients(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    gate = model.blocks[0].moe.gate
    forward = gate.forward
    monkeypatch.setattr(gate, "forward", lambda inp: (modes.append((inp.mode, len(inp.x_TD))), forward(inp))[1])
    steps = generate(model, [3, 1, 4], SamplingParams(max_tokens=3, seed=0))
    next(steps)
    assert torch.is_grad_enabled(), "a half-consumed generator must not switch gradients off for its caller"
    list(steps)
    assert modes == [(Mode.PREFILL, 3), (Mode.DECODE, 1), (Mode.DECODE, 1)]


def test_batch_gate_generates_through_its_surrogate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(CONFIG, {"name": "topk", "capacity_factor": 0.5, "drop_policy": "probs"}).eval()
    model.init_weights(5)
    dropless = Transformer(CONFIG).eval()
    dropless.init_weights(5)
    assert tokens(model, GREEDY) == tokens(dropless, GREEDY)
    monkeypatch.setattr(type(model.blocks[0].moe.gate), "causal_surrogate", lambda self: None)
    with pytest.raises(UserError, match="has no causal surrogate, so this model cannot generate text"):
        tokens(model, GREEDY)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has no tokens; start a text from nothing with the end-of-text token"),
        ([1, 30], "the prompt has token 30, the model's vocabulary ends at 29"),
        ([-1], "the prompt has token -1"),
        ([1] * 24, "the prompt has 24 tokens; the model's context of 24 leaves no room"),
    ],
)
def test_bad_prompts(model: Transformer, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(generate(model, prompt))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be at least 0, got -1.0"),
        ({"top_p": 0.0}, "top_p: must be more than 0 and at most 1, got 0.0"),
        ({"top_k": 0}, "top_k: must be at least 1, or None, got 0"),
        ({"max_tokens": -5}, "max_tokens: must be at least 0, got -5"),
        ({"temperature": math.nan}, "temperature: must be at least 0, got nan"),
    ],
)
def test_bad_rules(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**options)


def test_cuts() -> None:
    logits_V = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))

    def kept(**options: float) -> list[int]:
        return torch.isfinite(keep_likely(logits_V, SamplingParams(**options))).nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=99) == [0, 1, 2, 3]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.41) == [1, 3]
    assert kept(top_p=0.75) == [1, 2, 3]
    assert kept(top_k=1, top_p=0.9) == [1]
    assert kept(top_p=1e-9) == [1], "at least one token is left"
    # Equal scores: exactly k are kept.
    assert torch.isfinite(keep_likely(torch.zeros(6), SamplingParams(top_k=2))).sum() == 2
    scaled = keep_likely(logits_V, SamplingParams(temperature=2.0)).softmax(-1)
    root = torch.tensor([0.1, 0.4, 0.2, 0.3]).sqrt()
    torch.testing.assert_close(scaled, root / root.sum())


def test_sampling_follows_the_probabilities() -> None:
    prob_V = torch.tensor([0.1, 0.4, 0.2, 0.3])
    rng = torch.Generator().manual_seed(0)
    params = SamplingParams()
    draws = torch.tensor([sample_token(prob_V.log(), params, rng) for _ in range(4000)])
    share_V = torch.bincount(draws, minlength=4) / 4000
    assert (share_V - prob_V).abs().max() < 4 * math.sqrt(0.25 / 4000)
    never = torch.tensor([0.0, -math.inf, 0.0])
    assert {sample_token(never, params, rng) for _ in range(50)} == {0, 2}


def test_ties_go_to_the_lowest_id_and_reports_are_of_the_model() -> None:
    logits_V = torch.tensor([1.0, 2.0, 2.0, 0.0])
    assert sample_token(logits_V, SamplingParams(temperature=0.0)) == 1
    step = token_step(logits_V, SamplingParams(temperature=9.0, top_k=1, top_logprobs=99), torch.Generator())
    assert step.logprob == pytest.approx(float(logits_V.log_softmax(-1)[step.token]))
    assert len(step.top) == 4
    with pytest.raises(UserError, match="the model's scores are NaN"):
        sample_token(torch.tensor([1.0, math.nan]), SamplingParams())
