"""``moeyard serve``: engine and HTTP server in this process, the default host."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from serve.client import ModelInfo

ACCESS_LOGGER = "moeyard.serve.access"


class MissingExtraError(UserError):
    """Serving needs packages that are not installed."""


def require_serve_extra() -> None:
    """Raises :class:`MissingExtraError` with the command that mends it."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"serving needs {', '.join(missing)}: pip install 'moeyard[serve]'")


def choose_threads(threads: int | None) -> tuple[int, str]:
    """Compute threads of the engine, and why.

    Raises:
        UserError: fewer than one was asked for.
    """
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads must be at least 1, got {threads}")
        return threads, "as asked for"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Compute threads spin at barriers while they wait; one core too many and the HTTP loop starves.
    return max(1, cores - 1), f"{cores} cores, one for HTTP" if cores > 1 else "one core"


def serve_model(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    max_queue: int = 64,
    max_queue_tokens: int = 262_144,
    threads: int | None = None,
    name: str | None = None,
    drain_s: float = 30.0,
    access_log: bool = True,
) -> int:
    """Serve a run directory's model, or an exported model directory, until a signal.

    Args:
        path: run directory (its ``model/``) or model directory.
        port: 0 takes any free port; the printed URL has it.
        api_keys: accepted bearer tokens; none: no key is asked for.
        max_queue: requests that may wait; more get 429. max_queue_tokens: the same for their prompt tokens.
        threads: compute threads; None leaves one core to HTTP.
        name: model name that requests use; None takes the run's or folder's name.
        drain_s: time that running requests get after a signal.
        access_log: one line per request on stderr.

    Returns:
        Exit code: 0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        UserError: a missing extra, no model at the path, a damaged model, a taken port: one line each, exit code 1.
    """
    started_s = time.monotonic()
    require_serve_extra()
    from serve.client import EngineDeadError
    from serve.engine.load import load_engine
    from serve.engine.model_files import find_model_dir, model_name
    from serve.engine.settings import EngineSettings
    from serve.hosts.server import EmbeddedServer
    from serve.hosts.sockets import open_listener, url_of
    from serve.http.app import build_app
    from serve.http.settings import ServerSettings
    from serve.protocol.chat_template import ChatTemplate

    if max_queue < 0 or max_queue_tokens < 1:
        raise UserError(
            f"max_queue must be at least 0 and max_queue_tokens at least 1, got {max_queue} and {max_queue_tokens}"
        )
    num_threads, reason = choose_threads(threads)
    model_dir = find_model_dir(Path(path))
    settings = ServerSettings(api_keys=tuple(api_keys), drain_s=drain_s)
    # Connections wait in the backlog from here on; they are answered once the model is there.
    with open_listener(host, port) as listener:
        try:
            engine = load_engine(
                model_dir,
                model_id=name or model_name(model_dir),
                settings=EngineSettings(max_queue=max_queue, max_queue_tokens=max_queue_tokens, threads=num_threads),
            )
        except KeyboardInterrupt:
            return 130

        if engine.info.chat_template is not None:
            ChatTemplate(engine.info.chat_template, engine.info.special_tokens)  # better now than at the first chat
        url = url_of(listener)

        def announce() -> None:
            seconds = time.monotonic() - started_s
            threads_line = f"{num_threads} ({reason})"
            for line in describe(engine.info, url, seconds, threads_line, len(settings.api_keys)):
                print(line, flush=True)
            if not settings.api_keys and not is_loopback(host):
                print(f"warning: anybody who reaches {host}:{port} can use this server; set an API key", flush=True)

        def draining(unfinished: int) -> None:
            if unfinished:
                wait = f"waiting up to {drain_s:g} s for {unfinished} unfinished request(s); Ctrl-C again: end them now"
                print(wait, flush=True)

        app = build_app(engine, settings)
        server = EmbeddedServer(app, engine, drain_s=drain_s, on_ready=announce, on_drain=draining)

        async def run() -> None:
            await engine.start()
            await server.serve(sockets=[listener])

        try:
            with access_lines(access_log):
                asyncio.run(run())
        except EngineDeadError as error:
            raise CheckpointError(f"{model_dir}: the model was loaded but does not run: {error.__cause__}") from error
    print("stopped", flush=True)
    return server.exit_code


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def describe(model: ModelInfo, url: str, seconds: float, threads: str, num_keys: int) -> list[str]:
    """What a newcomer needs on the terminal: where, what, and one command to try."""
    body = json.dumps({"model": model.model_id, "prompt": "Once", "max_tokens": 32})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if num_keys else ""
    experts = f"{model.num_experts} experts in each of {len(model.moe_layers)} MoE layers"
    return [
        f"ready in {seconds:.1f} s: {url}",
        f"  model    {model.model_id} (weights {model.weights_version})",
        f"  params   {model.num_params:,}, {model.active_params:,} active per token; {experts}",
        f"  context  {model.context_length:,} tokens",
        f"  threads  {threads}",
        f"  keys     {f'{num_keys} accepted' if num_keys else 'none asked for'}",
        f"  try      curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
    ]


@contextlib.contextmanager
def access_lines(enabled: bool) -> Iterator[None]:
    """One line per request on stderr while the server runs; the logger is as before afterwards."""
    logger = logging.getLogger(ACCESS_LOGGER)
    if not enabled:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
