"""The engine's numbers and its trace of a step against their definitions, on two ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from gates import Mode
from moe.transformer import ForwardContext, next_token_loss
from parallel import chrome_trace
from parallel.chrome_trace import TraceEvent
from parallel.config import ParallelConfig
from parallel.engine import ExpertEngine
from parallel.engine_metrics import EngineMetrics
from parallel.placement import Placement
from parallel.topology import Topology
from tests.expert_training import LENGTH, ROWS, Case, batch, build
from tests.harness import run_distributed

pytestmark = pytest.mark.distributed

WORLD, LAYERS, EXPERTS, DIM, ITEM = 2, 3, 5, 16, 8
CHUNK_BYTES = 3 * DIM * 8 * ITEM
STEPS = 2


@dataclass
class Seen:
    """What one rank saw, and what it was told of it; P micro-batches of all steps."""

    metrics: EngineMetrics
    again: EngineMetrics | None
    count_PLE: np.ndarray
    computed_PL: np.ndarray
    step_count_LWE: list[np.ndarray]
    holders_SLEW: np.ndarray
    owner_LE: np.ndarray
    events: list[TraceEvent]


def observe(topology: Topology, mode: str, micro: int, recompute: str = "none") -> Seen:
    """Some training steps with random copies, each followed by an evaluation, which must not count."""
    model = build(Case(mode, recompute=recompute))
    engine = ExpertEngine(model, topology, ParallelConfig(mode=mode, link_mbit=1000))
    optimizer = torch.optim.SGD(engine.parameters(), lr=1e-3)
    rng = np.random.default_rng(3)
    rows = ROWS // topology.world_size
    counts, computed, step_counts, holders, events = [], [], [], [], []
    for step in range(STEPS):
        if step == STEPS - 1:
            engine.begin_trace()
        engine.begin_step()
        if mode.startswith("fssdp"):
            for index, copies in enumerate(engine.layers):
                more = rng.random((EXPERTS, WORLD)) < 0.6
                engine.planned[index] = Placement(copies.sharding.owner_E, copies.sharding.holders_EW | more)
        holders.append([placement.holders_EW for placement in engine.planned])
        ids = batch(step)[topology.rank * rows : (topology.rank + 1) * rows]
        for first in range(0, rows, micro):
            engine.forward_begins(first + micro >= rows)
            before = [experts.computed_rows for experts in engine.experts]
            output = model(ids[first : first + micro, :-1], context=ForwardContext(step=step, mode=Mode.TRAIN))
            computed.append([e.computed_rows - b for e, b in zip(engine.experts, before, strict=True)])
            counts.append([layer.output.plan.load_E.tolist() for layer in output.routing])
            nats, _ = next_token_loss(output.logits_BTV, ids[first : first + micro, 1:])
            engine.backward(nats / (ROWS * LENGTH))
        engine.finish()
        step_counts.append(engine.meter.count_LWE)
        engine.end_step(np.ones((LAYERS, EXPERTS), dtype=np.int64), optimizer)
        if step == STEPS - 1:
            events = engine.take_trace()
        with engine.inference(), torch.no_grad():
            model(ids, context=ForwardContext(mode=Mode.EVAL))
    metrics = engine.meter.take()
    again = engine.meter.take()
    engine.close()
    assert metrics is not None
    arrays = np.array(counts), np.array(computed), step_counts, np.array(holders), engine.owner_LE
    return Seen(metrics, again, *arrays, events)


def check(seen: list[Seen], mode: str, micro: int) -> None:
    """Everything that the first rank was told, from what both saw."""
    metrics = seen[0].metrics
    passes = len(seen[0].count_PLE) // STEPS
    count_PLWE = np.stack([s.count_PLE for s in seen], axis=2)
    holders_SLEW, owner_LE = seen[0].holders_SLEW, seen[0].owner_LE
    assert (metrics.steps, seen[0].again) == (STEPS, None)
    for step, counted_LWE in enumerate(seen[0].step_count_LWE):
        assert np.array_equal(counted_LWE, count_PLWE[step * passes : (step + 1) * passes].sum(0))

    load_PLE = count_PLWE.sum(2)
    owned_PLW = np.stack([np.where(owner_LE == rank, load_PLE, 0).sum(-1) for rank in range(WORLD)], axis=-1)
    computed_PLW = np.stack([s.computed_PL for s in seen], axis=-1)
    assert np.array_equal(computed_PLW.sum(-1), load_PLE.sum(-1))
    for told_L, rows_PLW in ((metrics.imbalance_before_L, owned_PLW), (metrics.imbalance_after_L, computed_PLW)):
        assert told_L == pytest.approx((rows_PLW.max(-1) / rows_PLW.mean(-1)).mean(0), rel=1e-12)
    copies_SLW = holders_SLEW.sum(2) - np.stack([(owner_LE == rank).sum(1) for rank in range(WORLD)], axis=-1)
    assert metrics.copies_L == pytest.approx(copies_SLW.sum(-1).mean(0))

    away_PLWE = ~np.repeat(holders_SLEW, passes, axis=0).swapaxes(2, 3)
    # A row travels to its expert and back, and so do its gradients; with two ranks there is only one way to go.
    rows_bytes = 4 * int((count_PLWE * away_PLWE).sum()) * DIM * ITEM
    counts_bytes = len(count_PLWE) * LAYERS * WORLD * EXPERTS * 8
    forward_SL = copies_SLW.sum(-1) * CHUNK_BYTES
    if mode == "fssdp-rm":  # gathered in every pass, and again for backward, but for the last layer; reduced each time
        gathered = passes * (2 * forward_SL.sum() - forward_SL[:, -1].sum())
        reduced = passes * forward_SL.sum()
    else:
        gathered = reduced = forward_SL.sum()
    wanted = {"spAG": gathered, "spRS": reduced, "tokens": rows_bytes, "counts": counts_bytes, "owners": 0}
    assert metrics.sent_bytes == pytest.approx({kind: total / STEPS for kind, total in wanted.items()})

    least, most = [], []  # gradients that are on their way home count, and how long that takes is not known
    for copies_L in copies_SLW.swapaxes(1, 2).reshape(-1, LAYERS):  # of each step and rank
        if mode == "fssdp-rm":
            least.append(copies_L.max())
            most.append(copies_L.sum() + copies_L.max())
        else:  # copies of all layers; over several micro-batches, their gradients too
            least.append(copies_L.sum() * (2 if passes > 1 else 1))
            most.append(2 * copies_L.sum())
    assert max(least) * CHUNK_BYTES <= metrics.copy_peak_bytes <= max(most) * CHUNK_BYTES
    assert metrics.tokens_waited_s > 0
    assert (metrics.copies_hidden_s + metrics.copies_exposed_s > 0) == (copies_SLW.sum() > 0)
    assert all(s.metrics == metrics for s in seen)


def observe_all(topology: Topology, cases: list[tuple[str, int, str]]) -> list[Seen]:
    """One case after another in the same processes; traces keep what a tiny model does in microseconds."""
    chrome_trace.SHORTEST_S = 5e-7
    return [observe(topology, *case) for case in cases]


def test_pain_12_numbers_are_what_their_definitions_say() -> None:
    cases = [("ep", 3), ("fssdp-keep", 6), ("fssdp-keep", 3), ("fssdp-rm", 3)]
    by_rank = run_distributed(observe_all, WORLD, [(mode, micro, "none") for mode, micro in cases])
    for seen, (mode, micro) in zip(zip(*by_rank, strict=True), cases, strict=True):
        check(list(seen), mode, micro)


def track(events: list[TraceEvent], name: str) -> list[TraceEvent]:
    return [event for event in events if event.track == name]


def test_a_traced_step_shows_every_phase_of_every_layer() -> None:
    by_rank = run_distributed(observe_all, WORLD, [("fssdp-rm", ROWS // WORLD, how) for how in ("none", "block")])
    for seen, recompute in zip(zip(*by_rank, strict=True), ("none", "block"), strict=True):
        check_trace(list(seen), recompute)


def check_trace(seen: list[Seen], recompute: str) -> None:
    """A step of fssdp-rm with one micro-batch."""
    for rank, one in enumerate(seen):
        step = track(one.events, "step")
        names = [event.name for event in step]
        forward = [
            f"layer {layer} {phase}"
            for layer in range(LAYERS)
            for phase in ("attention, gate", "counts", "dispatch", "experts", "combine")
        ]
        backward = [
            f"layer {layer} {phase}"
            for layer in reversed(range(LAYERS))
            for phase in ("gradient of combine", "experts backward", "gradient of dispatch", "attention backward")
        ]
        shown = [name for name in names if name in {*forward, *backward}]
        assert shown == forward + backward
        assert {"head, loss", "optimizer"} <= set(names)
        assert ("layer 1 combine again" in names) == (recompute == "block")
        for event, following in pairwise(step):
            assert event.end_s <= following.begin_s + 1e-9, "a rank does one thing at a time"
        told = sum(event.end_s - event.begin_s for event in step)
        assert told > 0.98 * (step[-1].end_s - step[0].begin_s), "and no time is left untold"
        holders_LEW = one.holders_SLEW[-1]
        copied_L = holders_LEW.sum((1, 2)) - EXPERTS
        copies = track(one.events, "copies")
        gathered = [event.name for event in copies if event.name.startswith("spAG")]
        # Down and up again, the last layer only once; a layer without copies sends nothing.
        order = [0, 1, 2, 1, 0]
        assert gathered == [f"spAG layer {layer}" for layer in order if copied_L[layer]], rank
    sent = {
        name: sum(event.sent_bytes or 0 for one in seen for event in track(one.events, name))
        for name in ("step", "copies")
    }
    holders_LEW = seen[0].holders_SLEW[-1]
    copies_L = holders_LEW.sum((1, 2)) - EXPERTS
    assert sent["copies"] == (3 * copies_L.sum() - copies_L[-1]) * CHUNK_BYTES
    count_LWE = seen[0].step_count_LWE[-1]
    passes = 1 if recompute == "none" else 2  # each has counts, dispatch and combine; gradients travel once
    rows_bytes = int((count_LWE * ~holders_LEW.swapaxes(1, 2)).sum()) * DIM * ITEM
    assert sent["step"] == (2 * passes + 2) * rows_bytes + passes * LAYERS * WORLD * EXPERTS * 8
