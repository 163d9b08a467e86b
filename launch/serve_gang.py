"""A served model whose experts are spread over processes of this machine: starts them and puts an engine before them.

Rank 0 is this process: it has the HTTP server, the scheduler, the cache, attention and gates, and its share of the
experts. Ranks 1 to W - 1 are expert workers (:mod:`launch.expert_worker`), children of this process.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch.expert_worker import SPEC_KEY, GangSpec, ready_key
from moe.checkpoint import read_model_config
from moe.errors import ConfigError, UserError
from moe.ops.packed_experts import PackedExperts
from parallel.gang_link import GangError, GangLink
from parallel.placement import even_owners
from parallel.serving_gang import ServingGang
from serve.engine.engine import AsyncEngine
from serve.engine.expert_gang import GangKeeper, RebalancePolicy
from serve.engine.load import load_engine
from serve.engine.settings import EngineSettings
from serve.engine.threads import without_a_team

START_S = 120.0
"""How long workers may take to start, once rank 0 has loaded the model."""
END_S = 2.0
"""How long workers that were told to stop may take, before they are killed."""


class Workers:
    """The processes of ranks 1 to W - 1.

    Args:
        world_size: W.
        port: of the store in which all meet.
        threads: compute threads of each.
    """

    def __init__(self, world_size: int, port: int, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._errors = {rank: tempfile.TemporaryFile() for rank in range(1, world_size)}  # noqa: SIM115
        for rank, errors in self._errors.items():
            command = [sys.executable, "-m", "launch.expert_worker", f"--rank={rank}", f"--port={port}"]
            self._processes[rank] = subprocess.Popen(
                [*command, f"--parent={os.getpid()}"], stdin=subprocess.DEVNULL, stderr=errors, env=environment
            )
        atexit.register(self._kill)

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def fate(self, rank: int) -> str | None:
        """How the rank's process has ended, as the end of a sentence about it; None while it runs."""
        code = self._processes[rank].poll()
        if code is None:
            return None
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        errors = self._errors[rank]
        errors.seek(0)
        lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
        return f"ended with exit code {code}" + (f": {said[-1].strip()}" if said else "")

    def end(self, *, told: bool) -> None:
        """See that all of them end. ``told``: they have been told to, and need a moment."""
        deadline = time.monotonic() + (END_S if told else 0.0)
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # also ends one that is stopped
                process.wait()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        self.end(told=False)


def load_gang_engine(
    model_dir: Path,
    *,
    model_id: str,
    settings: EngineSettings | None = None,
    world_size: int,
    extra_experts: int = 1,
    timeout_s: float = 30.0,
    policy: RebalancePolicy | None = None,
) -> AsyncEngine:
    """Loads the model and puts an engine around it, its experts on ``world_size`` processes; not started yet.

    The processes end with the engine's ``stop``, or with this process.

    Args:
        model_dir, model_id, settings: as for :func:`serve.engine.load.load_engine`; but if nothing is said about
            threads, all ranks share this machine's cores.
        world_size: W, this process included; 1 is an engine without workers.
        extra_experts: most copies of hot experts on one rank in one layer.
        timeout_s: how long a worker may take to answer before the engine is given up.
        policy: when experts are moved.

    Raises:
        ConfigError: a number out of range, or a model without experts.
        UserError: a worker did not start; says why. Also what ``load_engine`` raises.
    """
    settings = settings or EngineSettings()
    problems = [
        f"{name}: must be {what}, got {value:g}"
        for name, value, least, what in (
            ("expert_parallel", world_size, 1, "at least 1"),
            ("extra_experts", extra_experts, 0, "at least 0"),
            ("timeout_s", timeout_s, 0.1, "at least 0.1"),
        )
        if value < least
    ]
    if problems:
        raise ConfigError(problems)
    if world_size == 1:
        return load_engine(model_dir, model_id=model_id, settings=settings)
    _check_model(model_dir, world_size)
    threads = settings.threads
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // world_size)
    settings = replace(settings, threads=threads)
    store = _store()
    # Workers import what they need while this process loads the model.
    workers = Workers(world_size, store.port, threads)
    try:
        engine = load_engine(model_dir, model_id=model_id, settings=settings)
        gang = _gang(engine, model_dir, settings, store, workers, world_size, extra_experts, timeout_s)
        engine.keeper = GangKeeper(gang, policy)
        with without_a_team():
            gang.attach(engine.core.runner.model)
    except BaseException:
        workers.end(told=False)
        raise
    return engine


def _check_model(model_dir: Path, world_size: int) -> None:
    """Before any process is started.

    Raises:
        ConfigError: the model has no experts, or fewer than there are processes.
        CheckpointError: no model there.
    """
    config, _ = read_model_config(model_dir)
    if not config.moe_layer_indices():
        raise ConfigError(["expert_parallel: the model has no experts to spread"])
    if world_size > config.moe.num_experts:
        raise ConfigError(
            [f"expert_parallel: at most {config.moe.num_experts}, the model's experts per layer; got {world_size}"]
        )


def _store() -> dist.TCPStore:
    """A store on a free port of loopback alone."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        None,
        True,
        timedelta(seconds=START_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _gang(
    engine: AsyncEngine,
    model_dir: Path,
    settings: EngineSettings,
    store: dist.TCPStore,
    workers: Workers,
    world_size: int,
    extra_experts: int,
    timeout_s: float,
) -> ServingGang:
    model = engine.core.runner.model
    config, layers = model.config, model.moe_layers()
    owner_LE = even_owners(len(layers), config.moe.num_experts, world_size)
    spec = GangSpec(
        model_dir=str(model_dir.resolve()),
        fingerprint=engine.info.weights_version,
        blocks=[index for index, _ in layers],
        dim=config.dim,
        hidden_dim=config.moe.hidden_dim,
        dtype=str(model.embed.weight.dtype).removeprefix("torch."),
        packed=isinstance(layers[0][1].experts, PackedExperts),
        native=layers[0][1].experts.op_choice()[0] == "native",
        batch_invariant=settings.batch_invariant,
        device=torch.device(settings.device).type,
        threads=settings.threads or 1,
        owner_LE=owner_LE.tolist(),
        world_size=world_size,
        connect_s=START_S,
    )
    store.set(SPEC_KEY, spec.to_json())
    _wait_until_ready(store, workers, range(1, world_size))
    device = model.embed.weight.device
    try:
        link = GangLink(store, 0, world_size, device, timeout_s=timeout_s, connect_s=START_S)
    except RuntimeError as error:
        raise UserError(f"the expert workers cannot be reached: {' '.join(str(error).split())}") from error
    gang = ServingGang(link, workers, owner_LE, extra_experts=extra_experts)
    try:
        gang.check()
    except GangError as error:
        raise UserError(f"cannot start the expert workers: {error}") from error
    return gang


def _wait_until_ready(store: dist.TCPStore, workers: Workers, ranks: range) -> None:
    deadline = time.monotonic() + START_S
    missing = list(ranks)
    while missing:
        for rank in missing:
            fate = workers.fate(rank)
            if fate is not None:
                raise UserError(f"cannot start the expert workers: expert rank {rank} {fate}")
        missing = [rank for rank in missing if not store.check([ready_key(rank)])]
        if missing and time.monotonic() > deadline:
            raise UserError(
                f"cannot start the expert workers: expert rank {missing[0]} is not ready after {START_S:g} s"
            )
        time.sleep(0.02)
