"""``moeyard serve MODEL --ray``: a Ray on this machine, a server on it, and the same manners as without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Literal

from pydantic import ValidationError

from moe.errors import ConfigError
from serve.engine.settings import EngineSettings
from serve.hosts.embedded import MissingExtraError, choose_threads, describe, is_loopback, require_serve_extra
from serve.hosts.ray_client import EngineHandle
from serve.hosts.ray_merge import ReplicaReport
from serve.hosts.ray_options import RayOptions
from serve.hosts.sockets import open_listener, url_of
from serve.http.settings import ServerSettings

APP_NAME = "moeyard"
# The first with all that the deployments use: broadcasts to replicas, late-bound applications, surges.
OLDEST_RAY = (2, 60)
REPORT_S = 5.0
# Ray brings the replicas' lines within this time.
LAST_LINES_S = 0.7


def require_ray_extra() -> None:
    """Raises :class:`MissingExtraError` with the command that mends it."""
    mend = "pip install --upgrade 'moeyard[ray]'"
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(f"serving with Ray needs ray[serve]: {mend}")
    version = importlib.metadata.version("ray")
    if tuple(map(int, version.split(".")[:2])) < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise MissingExtraError(f"serving with Ray needs ray[serve] {oldest} or later, found {version}: {mend}")
    require_serve_extra()


def serve_with_ray(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    engine: EngineSettings | None = None,
    settings: ServerSettings | None = None,
    access_log: bool = True,
    layout: Literal["A", "B"] = "A",
    replicas: int = 1,
) -> int:
    """Serve a run directory's model, or an exported model directory, on Ray, until a signal.

    The Ray at RAY_ADDRESS is used if that is set; else one is started, and shut down in the end.

    Args:
        path: run directory (its ``model/``) or model directory.
        port: 0 takes any free port; the printed URL has it.
        name: model name that requests use; None takes the run's or folder's name.
        engine: how the model runs; threads that are None give each replica its share of all cores but one.
        settings: keys and limits of the HTTP side.
        access_log: one line per request on stderr.
        layout: see :class:`serve.hosts.ray_options.RayOptions`.
        replicas: engines with the model.

    Returns:
        Exit code: 0 after SIGTERM, 130 after Ctrl-C; 143 after SIGTERM before it was ready.

    Raises:
        UserError: a missing extra, no model at the path, a damaged model, a taken port, a Ray or a replica that does
            not start: one line each.
    """
    started_s = time.monotonic()
    require_ray_extra()
    engine, settings = engine or EngineSettings(), settings or ServerSettings()
    num_threads, reason = choose_threads(engine.threads)
    if engine.threads is None and replicas > 1:
        num_threads, reason = max(1, num_threads // replicas), "for each replica, of all cores but one"
    options = _options(path, name, replace(engine, threads=num_threads), settings, access_log, layout, replicas)
    options.paths()  # a wrong path is known before anything slow happens, and so is a taken port
    with open_listener(host, port) as listener:
        port, url = int(listener.getsockname()[1]), url_of(listener)

    from serve.hosts.ray_app import deploy, local_ray

    signals = Signals()
    with signals.caught():
        try:
            with local_ray(APP_NAME, options.cpus * replicas, show_logs=access_log) as which:
                handles = deploy(options, APP_NAME, host, port)
                signals.count_only()
                (report, *_) = asyncio.run(_reports(handles))
                seconds = time.monotonic() - started_s
                lines = describe(report.model, url, seconds, f"{num_threads} ({reason})", len(settings.api_keys))
                lines.insert(-1, f"  ray      {which}; layout {layout}, replicas: {replicas}")
                print("\n".join(lines), flush=True)
                if not settings.api_keys and not is_loopback(host):
                    print(f"warning: anybody who reaches {host}:{port} can use this server; set an API key", flush=True)
                signals.wait()
                asyncio.run(_drain(handles, settings.drain_s, signals))
                time.sleep(LAST_LINES_S if access_log else 0)
        except (KeyboardInterrupt, SystemExit):  # a signal while everything was being started
            return signals.exit_code or 128 + signal.SIGTERM
    print("stopped", flush=True)
    return signals.exit_code


def _options(
    path: str | Path,
    name: str | None,
    engine: EngineSettings,
    settings: ServerSettings,
    access_log: bool,
    layout: Literal["A", "B"],
    replicas: int,
) -> RayOptions:
    given = {key: value for key, value in (vars(engine) | vars(settings)).items() if key in RayOptions.model_fields}
    try:
        return RayOptions(
            **given,
            model=str(path),
            name=name,
            layout=layout,
            num_replicas=replicas,
            access_log=access_log,
            start_attempts=1,  # what is wrong on this machine is still wrong a second later
        )
    except ValidationError as error:
        raise ConfigError([f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]) from error


class Signals:
    """SIGINT and SIGTERM: at first they interrupt, so that what was started is ended; later they are counted."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._caught: list[int] = []
        self._counting = False

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; 0 after SIGTERM, which is how services are told to stop."""
        return 130 if signal.SIGINT in self._caught else 0

    @property
    def urgency(self) -> int:
        """0 until the first; 1: drain; 2, Ctrl-C came again: end what runs; 3, and again: leave everything."""
        return min(1, len(self._caught)) + self._caught[1:].count(signal.SIGINT)

    def wait(self) -> None:
        while not self._caught:
            time.sleep(0.1)

    def note(self, number: int, frame: FrameType | None) -> None:
        self._caught.append(number)
        if not self._counting:
            raise KeyboardInterrupt

    def count_only(self) -> None:
        """From now on. Ray has put a handler of its own in place meanwhile."""
        self._counting = True
        for number in self.NUMBERS:
            signal.signal(number, self.note)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """While the block runs; the handlers are as before afterwards."""
        before = {number: signal.signal(number, self.note) for number in self.NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def _reports(handles: Mapping[str, EngineHandle]) -> list[ReplicaReport]:
    return [report for handle in handles.values() for report in await handle.reports(REPORT_S)]


async def _drain(handles: Mapping[str, EngineHandle], drain_s: float, signals: Signals) -> None:
    """Let the engines finish what they have, end the rest with errors that its clients understand, then return."""
    stats = [report.stats for report in await _reports(handles)]
    unfinished = sum(one.num_running + one.num_waiting for one in stats)
    if unfinished:
        wait = f"waiting up to {drain_s:g} s for {unfinished} unfinished request(s); Ctrl-C again: end them now"
        print(wait, flush=True)

    async def stop(drain_s: float) -> None:
        calls = (handle.broadcast("stop", drain_s=drain_s, timeout_s=drain_s + 30) for handle in handles.values())
        await asyncio.gather(*calls, return_exceptions=True)

    tasks = [asyncio.ensure_future(stop(drain_s))]
    while not all(task.done() for task in tasks) and signals.urgency < 3:
        await asyncio.wait(tasks, timeout=0.1)
        if signals.urgency == 2 and len(tasks) == 1:
            tasks.append(asyncio.ensure_future(stop(0.0)))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
