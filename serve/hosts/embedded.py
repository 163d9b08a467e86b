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
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe.errors import CheckpointError, UserError
from serve.hosts.memory import use_huge_pages

if TYPE_CHECKING:
    from serve.client import ModelInfo
    from serve.engine.engine import AsyncEngine
    from serve.engine.settings import EngineSettings
    from serve.http.settings import ServerSettings

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
    name: str | None = None,
    engine: EngineSettings | None = None,
    settings: ServerSettings | None = None,
    access_log: bool = True,
    load: Callable[..., AsyncEngine] | None = None,
) -> int:
    """Serve a run directory's model, or an exported model directory, until a signal.

    Args:
        path: run directory (its ``model/``) or model directory.
        port: 0 takes any free port; the printed URL has it.
        name: model name that requests use; None takes the run's or folder's name.
        engine: how the model runs; threads that are None leave one core to HTTP.
        settings: keys and limits of the HTTP side.
        access_log: one line per request on stderr.
        load: makes the engine, called as :func:`serve.engine.load.load_engine` is; it then chooses threads, too.

    Returns:
        Exit code: 0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        UserError: a missing extra, no model at the path, a damaged model, a taken port: one line each, exit code 1.
    """
    started_s = time.monotonic()
    require_serve_extra()
    use_huge_pages()
    from serve.client import EngineDeadError
    from serve.engine.load import load_engine
    from serve.engine.model_files import find_model_dir, model_name
    from serve.engine.settings import EngineSettings
    from serve.hosts.server import EmbeddedServer
    from serve.hosts.sockets import open_listener, url_of
    from serve.http.app import build_app
    from serve.http.settings import ServerSettings
    from serve.protocol.chat_template import ChatTemplate

    engine, settings = engine or EngineSettings(), settings or ServerSettings()
    if load is None:
        num_threads, reason = choose_threads(engine.threads)
        engine, load = replace(engine, threads=num_threads), load_engine
        threads_line = f"{num_threads} ({reason})"
    else:
        threads_line = "chosen for all processes together" if engine.threads is None else f"{engine.threads} each"
    model_dir = find_model_dir(Path(path))
    # Connections wait in the backlog from here on; they are answered once the model is there.
    with open_listener(host, port) as listener:
        try:
            client = load(model_dir, model_id=name or model_name(model_dir), settings=engine)
        except KeyboardInterrupt:
            return 130

        if client.info.chat_template is not None:
            ChatTemplate(client.info.chat_template, client.info.special_tokens)  # better now than at the first chat
        url = url_of(listener)

        def announce() -> None:
            seconds = time.monotonic() - started_s
            num_keys, lines = len(settings.api_keys), (client.memory_line(), client.products_line())
            for line in describe(client.info, url, seconds, threads_line, num_keys, *lines):
                print(line, flush=True)
            if not settings.api_keys and not is_loopback(host):
                print(f"warning: anybody who reaches {host}:{port} can use this server; set an API key", flush=True)

        def draining(unfinished: int) -> None:
            if unfinished:
                wait = f"waiting up to {settings.drain_s:g} s for {unfinished} unfinished request(s)"
                print(f"{wait}; Ctrl-C again: end them now", flush=True)

        app = build_app(client, settings)
        server = EmbeddedServer(app, client, drain_s=settings.drain_s, on_ready=announce, on_drain=draining)

        async def run() -> None:
            await client.start()
            await server.serve(sockets=[listener])

        try:
            with access_lines(access_log, timed=settings.access_log_format == "text"):
                asyncio.run(run())
        except EngineDeadError as error:
            raise CheckpointError(f"{model_dir}: the model was loaded but does not run: {error.__cause__}") from error
    print("stopped", flush=True)
    return server.exit_code


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def describe(
    model: ModelInfo, url: str, seconds: float, threads: str, num_keys: int, memory: str = "", products: str = ""
) -> list[str]:
    """What a newcomer needs on the terminal: where, what, and one command to try."""
    body = json.dumps({"model": model.model_id, "prompt": "Once", "max_tokens": 32})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if num_keys else ""
    experts = f"{model.num_experts} experts in each of {len(model.moe_layers)} MoE layers"
    return [
        f"ready in {seconds:.1f} s: {url}",
        f"  model    {model.model_id} (weights {model.weights_version})",
        f"  params   {model.num_params:,}, {model.active_params:,} active per token; {experts}",
        f"  context  {model.context_length:,} tokens",
        *([f"  cache    {memory}"] if memory else []),
        *([f"  products {products}"] if products else []),
        f"  gate     {model.gate}"
        + (", batch-invariant: the same seed, the same text" if model.batch_invariant else ""),
        f"  threads  {threads}",
        f"  keys     {f'{num_keys} accepted' if num_keys else 'none asked for'}",
        f"  page     {url}/",
        f"  try      curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
    ]


@contextlib.contextmanager
def access_lines(enabled: bool, *, timed: bool = True) -> Iterator[None]:
    """One line per request on stderr while the server runs; the logger is as before afterwards.

    Args:
        timed: put the time before each; JSON lines have their own.
    """
    logger = logging.getLogger(ACCESS_LOGGER)
    if not enabled:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s" if timed else "%(message)s", "%H:%M:%S"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
