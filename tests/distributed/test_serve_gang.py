"""A served model whose experts are spread over processes against the same model in one process, and what happens when
a process dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gates import parse_gate_config
from launch.serve_gang import load_gang_engine
from moe.checkpoint import save_model
from moe.config import ModelConfig, MoEConfig
from moe.errors import ConfigError, UserError
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer
from parallel.gang_experts import num_stacked
from parallel.gang_link import GangError
from serve.client import EngineDeadError, EngineRequest, SamplingOptions, TokenChunk
from serve.engine.engine import AsyncEngine
from serve.engine.expert_gang import RebalancePolicy
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings

pytestmark = pytest.mark.distributed

EXPERTS = 8
TOKENIZER = Tokenizer.bytes()
PROMPTS = ("Grüße", "a", "STOP here. " * 4, "the fox", "zzzz zz", "0123456789" * 3)
SETTINGS = EngineSettings(max_sequences=8, threads=1)
BY_HAND = RebalancePolicy(every_steps=0)


def made(seed: int, *, hot: bool = False) -> Transformer:
    """Three blocks, one of them dense. ``hot``: expert 0 is in every token's choice of the first MoE layer."""
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        dim=48,
        num_layers=3,
        num_dense_layers=1,
        num_heads=2,
        max_seq_len=256,
        moe=MoEConfig(num_experts=EXPERTS, hidden_dim=80),
    )
    model = Transformer(config, parse_gate_config({"name": "topk", "k": 2, "balance": "bias"}))
    model.init_weights(seed)
    with torch.no_grad():
        for _, layer in model.moe_layers():
            for weight in layer.experts.parameters():
                weight.mul_(20)  # so that text depends on experts, and does not end in one letter
        if hot:
            _, first = model.moe_layers()[0]
            dict(first.gate.named_buffers())["selection_bias"][0] = 10.0
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "one", made(0), TOKENIZER, max_shard_bytes=100_000)
    save_model(folder / "two", made(1), TOKENIZER)
    save_model(folder / "hot", made(2, hot=True), TOKENIZER)
    return folder


class Loop:
    """An event loop in a thread, so that engines outlive a test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_s), self.loop).result(timeout_s + 5)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


Start = Callable[..., AsyncEngine]


@pytest.fixture
def start(models: Path, loop: Loop) -> Iterator[Start]:
    """Starts engines; whatever a test did to them, none of their processes is left afterwards."""
    engines: list[AsyncEngine] = []

    def started(
        name: str = "one", world_size: int = 1, settings: EngineSettings = SETTINGS, **options: Any
    ) -> AsyncEngine:
        if world_size == 1:
            engine = load_engine(models / name, model_id="m", settings=settings)
        else:
            options = {"policy": BY_HAND, **options}
            engine = load_gang_engine(models / name, model_id="m", settings=settings, world_size=world_size, **options)
        engines.append(engine)
        loop.run(engine.start())
        return engine

    yield started
    for engine in engines:
        loop.run(engine.stop())
        for pid in pids_of(engine).values():
            assert gone(pid), f"process {pid} is left"


def pids_of(engine: AsyncEngine) -> dict[int, int]:
    if engine.keeper is None:
        return {}
    return engine.keeper.gang._workers.pids  # type: ignore[attr-defined, no-any-return]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def ask(prompt: str, name: str = "r", **options: Any) -> EngineRequest:
    sampling = SamplingOptions(**{"temperature": 0.0, "max_tokens": 24, "logprobs": 1, "ignore_eos": True, **options})
    return EngineRequest(name, "m", (prompt,), sampling)


async def read(engine: AsyncEngine, request: EngineRequest) -> list[TokenChunk]:
    return [chunk async for chunk in await engine.generate(request)]


async def read_all(engine: AsyncEngine, **options: Any) -> list[list[TokenChunk]]:
    jobs = (read(engine, ask(prompt, f"r{i}", **options)) for i, prompt in enumerate(PROMPTS))
    return list(await asyncio.gather(*jobs))


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def logprobs_of(chunks: list[TokenChunk]) -> list[float]:
    return [scores.chosen.logprob for chunk in chunks for scores in chunk.logprobs or ()]


def assert_same(answers: list[list[TokenChunk]], wanted: list[list[TokenChunk]], tolerance: float = 1e-5) -> None:
    for answer, want in zip(answers, wanted, strict=True):
        assert tokens_of(answer) == tokens_of(want)
        assert len(set(tokens_of(want))) > 3, "the text does not say anything"
        got, expected = torch.tensor(logprobs_of(answer)), torch.tensor(logprobs_of(want))
        assert len(got) == len(tokens_of(want))
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def describe(engine: AsyncEngine) -> dict[str, Any]:
    assert engine.keeper is not None
    return dict(engine.keeper.gang.describe())


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "native"), [(2, None), (2, False), (3, None)])
def test_tokens_and_logprobs_are_those_of_one_process(
    models: Path, start: Start, loop: Loop, world_size: int, native: bool | None
) -> None:
    settings = replace(SETTINGS, native=native)
    single = start(settings=settings)
    wanted = loop.run(read_all(single))
    gang = start(world_size=world_size, settings=settings)
    assert_same(loop.run(read_all(gang)), wanted)
    rows = torch.tensor(describe(gang)["rows"])
    assert (rows > 0).all(), "some rank had nothing to do, so nothing is proved"

    # One request alone makes the same passes in both, so each expert gets the same rows: the same bits.
    alone = loop.run(read(single, ask("the fox", max_tokens=60)))
    assert_same([loop.run(read(gang, ask("the fox", max_tokens=60)))], [alone], 0.0)
    # Rank 0 keeps only what it owns.
    for _, layer in gang.core.runner.model.moe_layers():
        assert num_stacked(layer.experts.owned) == -(-EXPERTS // world_size)  # type: ignore[arg-type]

    # Other weights: those of the directory from then on, prompts that were cached included.
    other = start("two")
    loop.run(gang.swap_weights("m", str(models / "two")))
    wanted_other = loop.run(read_all(other))
    assert_same(loop.run(read_all(gang)), wanted_other)
    assert gang.info.weights_version == other.info.weights_version
    assert [tokens_of(a) for a in wanted_other] != [tokens_of(a) for a in wanted]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_hot_expert_is_copied_and_ranks_become_level(models: Path, start: Start, loop: Loop, world_size: int) -> None:
    wanted = loop.run(read_all(start("hot")))
    gang = start("hot", world_size)
    assert_same(loop.run(read_all(gang)), wanted)
    before = describe(gang)
    summary = loop.run(gang.rebalance_experts())
    assert summary["changed"]
    assert summary["copied"] > 0
    placed = describe(gang)
    assert len(placed["holders"][0][0]) > 1, "expert 0 of the first layer gets a row of every token"
    for layer in placed["holders"]:
        held_W = [sum(rank in ranks for ranks in layer) for rank in range(world_size)]
        assert max(held_W) <= -(-EXPERTS // world_size) + 1
    assert_same(loop.run(read_all(gang)), wanted)
    assert describe(gang)["imbalance"] < before["imbalance"] - 0.05
    assert not loop.run(gang.rebalance_experts())["changed"], "the same loads, the same placement"

    # Weights that come later reach the copies, too.
    other = start("two")
    loop.run(gang.swap_weights("m", str(models / "two")))
    assert_same(loop.run(read_all(gang)), loop.run(read_all(other)))
    assert len(describe(gang)["holders"][0][0]) > 1


def test_moving_experts_between_passes_changes_no_token(start: Start, loop: Loop) -> None:
    wanted = loop.run(read_all(start("hot")))
    gang = start("hot", 3, policy=RebalancePolicy(every_steps=4, threshold=1.0, min_tokens=0))
    assert_same(loop.run(read_all(gang)), wanted)
    assert_same(loop.run(read_all(gang)), wanted)
    assert describe(gang)["rebalances"] > 1


def test_batch_invariant_mode_is_the_same_bits_whatever_the_copies(start: Start, loop: Loop) -> None:
    settings = EngineSettings(max_sequences=8, threads=1, batch_invariant=True)
    wanted = loop.run(read_all(start("hot", settings=settings)))
    gang = start("hot", 2, settings)
    assert_same(loop.run(read_all(gang)), wanted, 0.0)
    assert loop.run(gang.rebalance_experts())["changed"]
    assert_same(loop.run(read_all(gang)), wanted, 0.0)


def test_a_rank_without_room_leaves_everything_as_it_was(
    start: Start, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = loop.run(read_all(start("hot")))
    gang = start("hot", 2)
    monkeypatch.setattr("parallel.gang_link.INLINE_BYTES", 80)  # every body travels by itself
    assert_same(loop.run(read_all(gang)), wanted)
    before = describe(gang)["holders"]

    def no_room(*_: object) -> None:
        raise MemoryError("no room for copies")

    member = gang.keeper.gang._member  # type: ignore[union-attr, attr-defined]
    for stage in ("prepare", "build"):
        with monkeypatch.context() as patch:
            patch.setattr(member, stage, no_room)
            summary = loop.run(gang.rebalance_experts())
        assert summary["refused"] == "rank 0: no room for copies"
        assert not summary["changed"]
        assert describe(gang)["holders"] == before
        assert_same(loop.run(read_all(gang)), wanted)
    assert loop.run(gang.rebalance_experts())["changed"]
    assert_same(loop.run(read_all(gang)), wanted)


# --- what goes wrong --------------------------------------------------------------------------------------------------


async def _dies(engine: AsyncEngine, within_s: float) -> str:
    begin_s = time.monotonic()
    while (health := await engine.health()).status != "dead":
        assert time.monotonic() - begin_s < within_s, "nobody noticed"
        await asyncio.sleep(0.02)
    with pytest.raises(EngineDeadError):
        await engine.generate(ask("late", "late"))
    return health.detail


def test_a_worker_killed_while_idle_ends_the_engine(start: Start, loop: Loop) -> None:
    gang = start(world_size=3)
    os.kill(pids_of(gang)[1], signal.SIGKILL)
    loop.run(_dies(gang, 5.0))
    assert str(gang._failure) == "expert rank 1 was killed by SIGKILL"


def test_a_worker_killed_in_a_pass_ends_every_request(start: Start, loop: Loop) -> None:
    gang = start(world_size=3)

    async def work() -> None:
        streams = [await gang.generate(ask(prompt, f"r{i}", max_tokens=200)) for i, prompt in enumerate(PROMPTS)]
        for stream in streams:
            await anext(stream)
        os.kill(pids_of(gang)[1], signal.SIGKILL)
        begin_s = time.monotonic()
        for stream in streams:
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
        assert time.monotonic() - begin_s < 5
        await _dies(gang, 1.0)

    loop.run(work())
    assert str(gang._failure) == "expert rank 1 was killed by SIGKILL"


def test_a_worker_killed_while_experts_move_ends_the_engine(start: Start, loop: Loop) -> None:
    gang = start("hot", 3)
    loop.run(read_all(gang))
    before = describe(gang)["holders"]
    member = gang.keeper.gang._member  # type: ignore[union-attr, attr-defined]
    move = member.move

    def killing(layer: int) -> None:
        os.kill(pids_of(gang)[1], signal.SIGKILL)
        move(layer)

    member.move = killing
    with pytest.raises(GangError, match="expert rank 1 was killed by SIGKILL"):
        loop.run(gang.rebalance_experts())
    loop.run(_dies(gang, 5.0))
    assert describe(gang)["holders"] == before


def test_a_worker_that_hangs_is_given_up_after_the_time_out(start: Start, loop: Loop) -> None:
    gang = start(world_size=2, timeout_s=1.0)
    pid = pids_of(gang)[1]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineDeadError):
        loop.run(read(gang, ask("hello")))
    loop.run(_dies(gang, 5.0))
    assert str(gang._failure) == "expert rank 1 has not answered for 1 s"


RANK_0 = """
import asyncio, sys
from pathlib import Path
from launch.serve_gang import load_gang_engine
from serve.engine.settings import EngineSettings

async def run():
    engine = load_gang_engine(Path(sys.argv[1]), model_id="m", settings=EngineSettings(threads=1), world_size=3)
    await engine.start()
    print(*engine.keeper.gang._workers.pids.values(), flush=True)
    await asyncio.sleep(100)

asyncio.run(run())
"""


def test_workers_end_when_rank_0_is_killed(models: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RANK_0, str(models / "one")], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        pids = [int(pid) for pid in first.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(gone, pids))
        first.kill()
    deadline = time.monotonic() + 5
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)


def test_what_cannot_start_says_so_in_one_line(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expert_parallel: must be at least 1, got 0"):
        load_gang_engine(models / "one", model_id="m", world_size=0)
    with pytest.raises(ConfigError, match=f"expert_parallel: at most {EXPERTS}, the model's experts per layer; got 9"):
        load_gang_engine(models / "one", model_id="m", world_size=EXPERTS + 1)
    monkeypatch.setattr("launch.serve_gang.even_owners", lambda *_: torch.full((2, EXPERTS), 7).numpy())
    with pytest.raises(UserError) as raised:
        load_gang_engine(models / "one", model_id="m", world_size=2)
    assert str(raised.value).startswith("cannot start the expert workers: expert rank 1 ended with exit code 1: ")
    assert "\n" not in str(raised.value)
