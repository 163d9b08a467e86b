"""Whatever is computed beside it, a request's tokens are those of moe.generate: every gate, every way to compute."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from gates import GateInput, GateOutput, Mode, gate_names
from moe import ModelConfig, MoEConfig, Transformer
from moe.errors import UserError
from moe.generate import SamplingParams, generate
from moe.ops.native import choose_native_ops
from moe.tokenizer import Tokenizer
from moe.transformer import ForwardContext, next_token_loss
from serve.client import TokenChunk
from serve.engine.invariance import layers_that_mix_tokens, require_invariant_products
from serve.engine.load import serving_gate_names
from tests.engine_driver import Driver, Reader

pytestmark = pytest.mark.unit

GATES = [name for name in gate_names() if name not in ("soft", "replay")]  # a causal LM refuses them
TOKENIZER = Tokenizer.bytes()
CONTEXT = 64
PROMPTS = [tuple(range(5, 5 + length)) for length in (1, 3, 9, 14)] + [(5, 6, 7, 8, 9, 10, 11, 12, 13, 100, 101)]
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks": {"step_tokens": 5, "sequences": 3},
    "one after another": {"sequences": 1},
    "pre-empted": {"num_blocks": 17, "sequences": 5},
    "without prefix cache": {"prefix_cache": False},
    "batch-invariant": {"batch_invariant": True, "step_tokens": 11},
    "packed experts": {"native": False},
    "native ops": {"native": True},
    "native ops, batch-invariant": {"native": True, "batch_invariant": True, "step_tokens": 11},
}


def driver_of(model: Transformer, way: dict[str, Any]) -> Driver:
    found = choose_native_ops()
    if way.get("native") and found.ops is None:
        pytest.skip(f"{found.reason}: install g++ and leave MOEYARD_NATIVE unset to run this")
    return Driver(model, TOKENIZER, **way)


@cache
def model_with(gate: str) -> Transformer:
    """A few steps of training: gates with state have some."""
    torch.set_num_threads(1)
    moe = MoEConfig(num_experts=8, hidden_dim=16)
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=CONTEXT, moe=moe
    )
    model = Transformer(config, {"name": gate, "search": 2} if gate == "local_search" else gate)
    model.init_weights(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    ids_BS = torch.randint(3, 100, (4, 25), generator=torch.Generator().manual_seed(1))
    for step in range(4):
        for _, made in model.gates():
            made.begin_step(step, 4)
        context = ForwardContext(step=step, mode=Mode.TRAIN, rng=torch.Generator().manual_seed(step))
        output = model(ids_BS[:, :-1], context=context)
        nats, tokens = next_token_loss(output.logits_BTV, ids_BS[:, 1:])
        optimizer.zero_grad()
        (nats / tokens + output.aux_loss()).backward()
        optimizer.step()
        for (_, made), layer in zip(model.gates(), output.routing, strict=True):
            made.end_step(layer.output.plan.offered_E, layer.output.signals)
    return model.eval()


@cache
def expected(gate: str, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    params = SamplingParams(max_tokens=12, temperature=0.0)
    steps = list(generate(model_with(gate), prompt, params))
    return tuple(step.token for step in steps), tuple(step.logprob for step in steps)


def logprobs(reader: Reader) -> list[float]:
    chunks: list[TokenChunk] = reader.chunks
    return [entry.chosen.logprob or 0.0 for chunk in chunks for entry in chunk.logprobs]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate", GATES)
def test_greedy_tokens_and_logprobs_equal_moe_generate(gate: str, way: str) -> None:
    driver = driver_of(model_with(gate), WAYS[way])
    readers = [driver.ask(prompt, max_tokens=12, logprobs=0) for prompt in PROMPTS]
    driver.run()
    for prompt, reader in zip(PROMPTS, readers, strict=True):
        tokens, scores = expected(gate, prompt)
        assert tuple(reader.tokens()) == tokens
        assert logprobs(reader) == pytest.approx(scores, abs=1e-4)
    assert driver.core.pool.num_used == 0
    if way == "pre-empted":
        assert driver.core.scheduler.preemptions > 0
    if way == "one after another":
        assert driver.core.pool.hits > 0
        again = driver.ask(PROMPTS[3], max_tokens=12)
        driver.run()
        assert tuple(again.tokens()) == expected(gate, PROMPTS[3])[0]
        assert again.chunks[-1].usage.cached_tokens == 12  # three blocks of four; the 14th token is always computed


def sampled(driver: Driver, prompt: tuple[int, ...], seed: int) -> Reader:
    return driver.ask(prompt, max_tokens=16, temperature=1.5, top_p=0.95, seed=seed, logprobs=1)


@pytest.mark.parametrize("native", [None, True])
@pytest.mark.parametrize("gate", ["topk", "sparse_ot", "top_p"])
def test_pain_12_batch_invariant_mode_gives_the_same_bits_whatever_the_neighbours(
    gate: str, native: bool | None
) -> None:
    """Tokens and log-probabilities are equal, not close: alone, in company, in chunks, pre-empted, from the cache."""
    model, way = model_with(gate), {"batch_invariant": True, "native": native}
    alone = driver_of(model, way)
    reader = sampled(alone, PROMPTS[3], 7)
    alone.run()
    wanted = (reader.tokens(), logprobs(reader))
    crowded = driver_of(model, {**way, "num_blocks": 24, "sequences": 6, "step_tokens": 13})
    for round_ in range(3):
        for number, prompt in enumerate(PROMPTS):
            sampled(crowded, prompt, round_ * 10 + number)
        found = sampled(crowded, PROMPTS[3], 7)
        crowded.run()
        assert (found.tokens(), logprobs(found)) == wanted
    assert crowded.core.scheduler.preemptions > 0
    assert crowded.core.pool.hits > 0


def test_samples_of_a_request_are_those_of_single_requests() -> None:
    driver = Driver(model_with("topk"), TOKENIZER)
    many = driver.ask(PROMPTS[2], PROMPTS[3], n=3, max_tokens=10, temperature=1.0, seed=40)
    driver.run()
    for index in range(6):
        prompt, sample = divmod(index, 3)
        one = driver.ask(PROMPTS[2 + prompt], max_tokens=10, temperature=1.0, seed=40 + sample)
        driver.run()
        assert one.tokens() == many.tokens(index)
    assert len({tuple(many.tokens(index)) for index in range(6)}) > 3
    usage = many.chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (9 + 14, 60)


def test_prompt_logprobs_are_a_plain_forward_passs_however_the_prompt_is_cut() -> None:
    model = model_with("topk")
    with torch.no_grad():
        context = ForwardContext(mode=Mode.PREFILL)
        logprob_TV = torch.log_softmax(model(torch.tensor([PROMPTS[3]]), context=context).logits_BTV[0], -1)
    wanted = [float(logprob_TV[i, token]) for i, token in enumerate(PROMPTS[3][1:])]
    for way in WAYS.values():
        driver = driver_of(model, way)
        warm = driver.ask(PROMPTS[3], max_tokens=4)
        others = [driver.ask(prompt, max_tokens=20) for prompt in PROMPTS]
        reader = driver.ask(PROMPTS[3], max_tokens=3, prompt_logprobs=2, return_prompt=True)
        scored = driver.ask(PROMPTS[3], max_tokens=0, prompt_logprobs=0, return_prompt=True)
        driver.run()
        assert len(warm.tokens()) == 4
        assert all(len(other.tokens()) == 20 for other in others)
        for echo in (reader.chunks[0].prompt, scored.chunks[0].prompt):
            assert echo is not None
            assert echo.token_ids == PROMPTS[3]
            assert echo.logprobs[0].chosen.logprob is None
            assert [entry.chosen.logprob for entry in echo.logprobs[1:]] == pytest.approx(wanted, abs=1e-4)
        assert (len(scored.chunks), scored.chunks[0].finish_reason) == (1, "length")
        assert all(chunk.prompt is None for chunk in reader.chunks[1:])


def test_routing_of_tokens_is_that_of_the_position_that_predicted_them() -> None:
    model = model_with("topk")
    driver = Driver(model, TOKENIZER, step_tokens=9)
    driver.ask(PROMPTS[2], max_tokens=8)
    reader = driver.ask(PROMPTS[4], max_tokens=6, return_routing=True)
    driver.run()
    routing = [entry for chunk in reader.chunks for entry in chunk.routing]
    ids = [*PROMPTS[4], *reader.tokens()]
    with torch.no_grad():
        layers = model(torch.tensor([ids]), context=ForwardContext(mode=Mode.PREFILL)).routing
    assert len(routing) == 6
    for number, entry in enumerate(routing):
        position = len(PROMPTS[4]) - 1 + number
        for layer, experts, weights in zip(layers, entry.experts, entry.weights, strict=True):
            plan = layer.output.plan
            start, stop = plan.row_ptr_T1[position : position + 2].tolist()
            assert list(experts) == plan.expert_N[start:stop].tolist()
            assert weights == pytest.approx(plan.weight_N[start:stop].tolist(), abs=1e-4)


def test_embeddings_are_the_mean_of_normalised_states_however_they_are_computed() -> None:
    model = model_with("topk")
    wanted = []
    for prompt in PROMPTS:
        with torch.no_grad():
            x_1TD, _ = model.hidden_states(torch.tensor([prompt]), context=ForwardContext(mode=Mode.PREFILL))
            mean_D = model.norm(x_1TD[0]).mean(0)
        wanted.append((mean_D / mean_D.norm()).tolist())
    for way in WAYS.values():
        driver = driver_of(model, way)
        others = [driver.ask(prompt, max_tokens=20) for prompt in PROMPTS]
        reader = driver.embed(*PROMPTS)
        driver.run()
        assert all(len(other.tokens()) == 20 for other in others)
        (answer,) = reader.items
        assert answer.prompt_tokens == sum(map(len, PROMPTS))
        for found, vector in zip(answer.vectors, wanted, strict=True):
            assert found == pytest.approx(vector, abs=1e-4)


def test_pain_11_other_weights_take_over_running_requests_without_anything_stale() -> None:
    old, new = model_with("topk"), model_with("sparse_ot")  # same shape; the gate does not matter here
    driver = Driver(old, TOKENIZER)
    reader = driver.ask(PROMPTS[3], max_tokens=12)
    driver.run(until=lambda: len(reader.tokens()) == 5)
    driver.core.use_weights(new, "w2")
    driver.core.check()
    driver.run()
    kept = expected("topk", PROMPTS[3])[0][:5]
    assert tuple(reader.tokens()[:5]) == kept
    rest = [step.token for step in generate(new, [*PROMPTS[3], *kept], SamplingParams(max_tokens=7, temperature=0.0))]
    assert reader.tokens()[5:] == rest
    fresh = driver.ask(PROMPTS[3], max_tokens=12)
    driver.run()
    assert tuple(fresh.tokens()) == expected("sparse_ot", PROMPTS[3])[0]


@pytest.mark.parametrize("moment", ["waiting", "prefilling", "decoding", "pre-empted"])
def test_pain_7_and_9_an_abort_in_any_state_frees_everything_and_harms_nobody(moment: str) -> None:
    tight = {"num_blocks": 16, "sequences": 3} if moment == "pre-empted" else {"sequences": 2, "step_tokens": 4}
    driver = Driver(model_with("topk"), TOKENIZER, **tight)
    bystander = driver.ask(PROMPTS[2], max_tokens=12)
    victim = driver.ask(PROMPTS[3], max_tokens=40, n=2, seed=1)
    core = driver.core
    if moment == "waiting":
        driver.ask(PROMPTS[0], max_tokens=3)
        core.abort("r2")
    elif moment == "prefilling":
        driver.run(until=lambda: any(0 < s.computed < 14 for s in core.scheduler.running if s.id[0] == "r2"))
        driver.abort("r2")
    elif moment == "decoding":
        driver.run(until=lambda: len(victim.tokens()) > 2)
        driver.abort("r2")
    else:
        driver.run(until=lambda: core.scheduler.preemptions > 0)
        driver.abort("r2")
    core.check()
    driver.abort("r2")  # again: nothing
    driver.run()
    assert tuple(bystander.tokens()) == expected("topk", PROMPTS[2])[0]
    assert core.pool.num_used == 0
    assert core.finished["abort"] == 1


def test_priorities_overtake_in_the_queue() -> None:
    driver = Driver(model_with("topk"), TOKENIZER, sequences=1)
    order = []
    readers = {name: driver.ask(PROMPTS[1], max_tokens=2, priority=p) for name, p in (("a", 1), ("b", 1), ("c", -1))}
    while not driver.core.idle:
        driver.step()
        order += [name for name, reader in readers.items() if reader.over and name not in order]
    assert order == ["c", "a", "b"]


def test_scores_that_are_not_numbers_fail_their_request_only() -> None:
    model = model_with("topk")
    driver = Driver(model, TOKENIZER)
    fine = driver.ask(PROMPTS[2], max_tokens=12)
    driver.step()
    broken = driver.ask(PROMPTS[3], max_tokens=12, n=2)
    original = model.scores

    def damaged(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        scores = original(x, dtype)
        scores[1:] = float("nan")
        return scores

    model.scores = damaged  # type: ignore[method-assign]
    try:
        driver.step()
    finally:
        model.scores = original  # type: ignore[method-assign]
    driver.run()
    assert tuple(fine.tokens()) == expected("topk", PROMPTS[2])[0]
    with pytest.raises(Exception, match="weights are damaged"):
        _ = broken.chunks
    assert driver.core.finished == {"length": 1, "error": 1}


@pytest.mark.parametrize("gate", GATES)
def test_few_gates_round_otherwise_beside_other_tokens_and_those_are_exact_when_asked_alone(gate: str) -> None:
    model = copy.deepcopy(model_with(gate))
    mixing = layers_that_mix_tokens(model)
    assert len(serving_gate_names(model)) == 2
    assert {layer.gate.config.name for _, layer in mixing} <= {"comet"}
    for _, layer in mixing:
        layer.route_alone = True
    wanted: list[int] | None = None
    for company in range(3):
        driver = Driver(model, TOKENIZER, batch_invariant=True, step_tokens=7 + company, sequences=4)
        for prompt in PROMPTS[:company]:
            driver.ask(prompt, max_tokens=6)
        reader = driver.ask(PROMPTS[3], max_tokens=6, logprobs=0)
        driver.run()
        found = (reader.tokens(), logprobs(reader))
        wanted = wanted or found  # type: ignore[assignment]
        assert found == wanted


def test_a_gate_that_looks_at_other_tokens_is_found() -> None:
    model = copy.deepcopy(model_with("topk"))
    gate = model.gates()[1][1]
    route = gate.route

    def by_rank(inp: GateInput) -> GateOutput:
        """Routes by how a token compares with the others of its batch."""
        return route(replace(inp, x_TD=inp.x_TD - inp.x_TD.mean(0)))

    gate.route = by_rank  # type: ignore[method-assign]
    assert [index for index, _ in layers_that_mix_tokens(model)] == [1]


def test_batch_invariant_mode_is_refused_where_a_product_depends_on_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    require_invariant_products(model_with("topk"))  # this machine's do not
    monkeypatch.setattr("serve.engine.invariance.tile_is_invariant", lambda *_: False)
    with pytest.raises(UserError, match=r"batch-invariant mode is not possible here: .* 16 x 16 product in float32"):
        require_invariant_products(model_with("topk"))
