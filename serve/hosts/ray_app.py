"""Ray Serve applications: the deployments of both layouts, and the builder that ``serve deploy`` calls.

The only module that imports Ray. It does without ``from __future__ import annotations``, because Ray looks at the
builder's annotation to see that its argument is a model to validate.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe.errors import UserError
from serve.client import (
    EngineClient,
    EngineError,
    EngineRequest,
    EngineUnavailableError,
    QueueFullError,
    RequestAbortedError,
)
from serve.hosts.ray_client import EngineHandle, Fleet, RayHandleClient, ReplicaClient, ReplicaLostError
from serve.hosts.ray_engine import REASON, EngineHost
from serve.hosts.ray_merge import ReplicaReport
from serve.hosts.ray_options import RayOptions
from serve.http.app import build_app
from serve.http.guard import REQUEST_ID_HEADER

LOG = logging.getLogger("moeyard.serve.ray")
SERVER, INGRESS = "Server", "Ingress"
# Where Serve keeps its actors, as its log says.
SERVE_NAMESPACE = "serve"
OBJECT_STORE_BYTES = 128 * 2**20
KEEP_ALIVE_S = 75


class RayStartError(UserError):
    """Ray, or what should run on it, does not start; the text says why."""


@contextlib.contextmanager
def as_engine_errors() -> Iterator[None]:
    """What Ray raises for a request, as errors that the HTTP layer has answers for."""
    try:
        yield
    except BackPressureError as error:
        raise QueueFullError("requests", error.args[1], error.retry_after_s or 1.0) from None
    except DeploymentUnavailableError:
        raise EngineUnavailableError("No engine is running.") from None
    except RequestCancelledError:
        raise RequestAbortedError("The request was cancelled.") from None
    except RayActorError as error:
        LOG.warning("an engine replica died: %s", str(error).splitlines()[0])
        raise ReplicaLostError("The engine that worked on this request has died. Please retry.") from None
    except (RayServeException, RayError) as error:
        LOG.exception("an engine replica failed")
        raise EngineUnavailableError(f"The engine failed ({type(error).__name__}).") from None


class _Items:
    """:class:`serve.hosts.ray_client.RemoteItems` over a response generator of Ray's."""

    def __init__(self, response: DeploymentResponseGenerator) -> None:
        self._response = response

    def __aiter__(self) -> AsyncIterator[object]:
        return self

    async def __anext__(self) -> object:
        with as_engine_errors():
            return await self._response.__anext__()

    def cancel(self) -> None:
        self._response.cancel()


class RayEngineHandle:
    """:class:`serve.hosts.ray_client.EngineHandle` over a deployment handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._stream = handle.options(method_name="generate", stream=True)
        name = ray.get_runtime_context().get_actor_name() or ""
        self._caller = name if name and _caller_lives(name) else ""

    def stream(self, request: EngineRequest) -> _Items:
        return _Items(cast(DeploymentResponseGenerator, self._stream.remote(request, self._caller)))

    async def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> object:
        name, args = ("report", ()) if method == "report" else ("control", (method, *args))
        response = cast(DeploymentResponse, self._handle.options(method_name=name).remote(*args, **kwargs))
        try:
            with as_engine_errors():
                async with asyncio.timeout(None if timeout_s == float("inf") else timeout_s):
                    return await response
        except (TimeoutError, asyncio.CancelledError):
            response.cancel()
            raise

    async def broadcast(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[object]:
        return await self._on_all("control", method, *args, timeout_s=timeout_s, **kwargs)

    async def reports(self, timeout_s: float) -> list[ReplicaReport]:
        results = await self._on_all("report", timeout_s=timeout_s)
        return [result for result in results if isinstance(result, ReplicaReport)]

    async def _on_all(self, name: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[object]:
        response = self._handle.broadcast(name, *args, **kwargs)
        try:
            with as_engine_errors():
                results = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except EngineUnavailableError:
            return []
        return [item for item in results if not isinstance(item, Exception) or isinstance(item, EngineError)]


def _caller_lives(name: str) -> bool:
    """Whether the replica whose actor has that name is still there."""
    try:
        ray.get_actor(name, SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _show_logs(options: RayOptions, *, started: bool) -> None:
    """Inside a replica, where Ray collects stderr: our own lines, which no handler shows otherwise.

    Nothing is shown of a start: Ray logs, with all causes, why one fails, and whoever starts it is told.
    """
    logger = logging.getLogger("moeyard")
    logger.handlers = [logging.StreamHandler(sys.stderr) if started else logging.NullHandler()]
    logger.setLevel(logging.WARNING)
    logging.getLogger("moeyard.serve.ray").setLevel(logging.INFO)
    logging.getLogger("moeyard.serve.access").setLevel(logging.INFO if options.access_log else logging.WARNING)


class _OneRequestId:
    """ASGI middleware: the proxy stamps answers with the request's id too, and clients would read it twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unstamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID_HEADER]
            await send(message)

        await self._app(scope, receive, send_unstamped)


def _http_app(client: EngineClient, options: RayOptions) -> FastAPI:
    application = build_app(client, options.server_settings())
    application.add_middleware(_OneRequestId)
    return application


class _EngineReplica:
    """What every deployment with an engine can be asked by other processes; see EngineHost."""

    def __init__(self, model_id: str, model_dir: Path, options: RayOptions) -> None:
        self._model_id, self._options = model_id, options
        tag = ray_serve.get_replica_context().replica_tag
        self._host = EngineHost(model_id, model_dir, options, replica_id=tag, caller_lives=_caller_lives)

    async def start(self) -> None:
        """Awaited in constructors, because of a failing application lifespan Ray does not tell why."""
        _show_logs(self._options, started=False)
        await self._host.start()
        _show_logs(self._options, started=True)

    async def check_health(self) -> None:
        await self._host.check_health()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        await self._host.reconfigure(config)

    async def report(self) -> ReplicaReport:
        return await self._host.report()

    async def control(self, method: str, *args: Any, **kwargs: Any) -> object:
        return await self._host.control(method, *args, **kwargs)


class Server(_EngineReplica):
    """Layout A: engine and HTTP application in one replica."""

    async def __init__(self, model_id: str, model_dir: Path, options: RayOptions) -> None:  # type: ignore[misc]
        super().__init__(model_id, model_dir, options)
        await self.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        options, fleet = self._options, None
        if not options.fixed_single:
            own = ray_serve.get_deployment_handle(ray_serve.get_replica_context().deployment)
            wait_s = options.admission_timeout_s
            fleet = Fleet(self._model_id, RayEngineHandle(own), admission_timeout_s=wait_s)
        batch_s, batch_tokens = options.batch_ms / 1e3, options.batch_tokens
        client = ReplicaClient(self._host.client, fleet, batch_s=batch_s, batch_tokens=batch_tokens)
        return _http_app(client, options)


class Engine(_EngineReplica):
    """Layout B: an engine that answers other replicas."""

    async def __init__(self, model_id: str, model_dir: Path, options: RayOptions) -> None:  # type: ignore[misc]
        super().__init__(model_id, model_dir, options)
        await self.start()

    async def generate(self, request: EngineRequest, caller: str) -> AsyncGenerator[object, None]:
        async with contextlib.aclosing(self._host.generate(request, caller)) as items:
            async for item in items:
                yield item

    async def __del__(self) -> None:
        await self._host.stop()


class Ingress:
    """Layout B: the HTTP application over all models' engines."""

    async def __init__(self, engines: Mapping[str, DeploymentHandle], options: RayOptions) -> None:  # type: ignore[misc]
        _show_logs(options, started=True)
        self._options = options
        rests = options.max_replicas is not None and options.min_replicas == 0
        self._client = RayHandleClient(
            {
                name: Fleet(name, RayEngineHandle(handle), admission_timeout_s=options.admission_timeout_s, rests=rests)
                for name, handle in engines.items()
            }
        )
        await self._client.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return _http_app(self._client, self._options)


def app(args: RayOptions) -> ray_serve.Application:
    """The application that the options describe; for ``serve run``, ``serve build`` and ``serve deploy``.

    Raises:
        UserError: no usable model at a path.
    """
    options = args.with_environment()
    paths = options.paths()
    if options.layout == "A":
        ((name, path),) = paths.items()
        server = ray_serve.deployment(name=SERVER, **options.engine_deployment(path))(ray_serve.ingress()(Server))
        return server.bind(name, path, options)
    engines = {}
    for name, path in paths.items():
        settings = options.engine_deployment(path)
        engine = ray_serve.deployment(name=options.engine_name(name), **settings)(Engine)
        engines[name] = engine.bind(name, path, options)
    ingress = ray_serve.deployment(name=INGRESS, **options.ingress_deployment())(ray_serve.ingress()(Ingress))
    return ingress.bind(engines, options)


def engine_handles(options: RayOptions, app_name: str) -> dict[str, EngineHandle]:
    """The engine replicas of a running application, by model name."""
    names = list(options.paths())
    deployments = [SERVER] if options.layout == "A" else [options.engine_name(name) for name in names]
    return {
        name: RayEngineHandle(ray_serve.get_deployment_handle(deployment, app_name))
        for name, deployment in zip(names, deployments, strict=True)
    }


@contextlib.contextmanager
def local_ray(app_name: str, cpus: float, *, show_logs: bool) -> Iterator[str]:
    """A Ray for the time of the block, and what to call it: that of RAY_ADDRESS, else one that is started here.

    In the end the application is deleted, and what was started is shut down, Serve and Ray alike. A Ray that happens
    to run on this machine is somebody's, so it is not looked for.

    Raises:
        RayStartError: Ray does not start, is not there, or already runs Serve.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to others about what runs here
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": show_logs, "logging_level": logging.ERROR}
    cores = math.ceil(max(cpus, os.cpu_count() or 1))
    try:
        if address:
            _check_answers(address)
            ray.init(address=address, **quiet)
        else:
            memory: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES}  # tokens do not pass through it
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **memory, **quiet)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise RayStartError(f"Ray does not start: {_first_line(error)}") from error
    try:
        if address and (ray_serve.status().proxies or ray_serve.status().applications):
            raise RayStartError(f"Serve already runs on the Ray at {address}; give it the model with: serve deploy")
        try:
            yield f"the one at {address}" if address else f"local, {cores} CPUs"
        finally:
            with _silence(), contextlib.suppress(RayError, RayServeException, TimeoutError):
                ray_serve.delete(app_name)
                if not ray_serve.status().applications:  # else somebody has given this Serve another one
                    ray_serve.shutdown()
    finally:
        with _silence():
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises OSError when nothing listens there: Ray would try for a minute and then end the process."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Ray's parts report each other missing while they end; what it prints comes from a thread, so this reaches it."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def deploy(options: RayOptions, app_name: str, host: str, port: int) -> dict[str, EngineHandle]:
    """Run the application and wait until it answers; the handles of its engines.

    Raises:
        RayStartError: a replica does not start; its own reason, in one line.
    """
    logs = {"log_level": "CRITICAL", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    http = {"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S}
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options=http, logging_config=logs)
        ray_serve.run(app(options), name=app_name, route_prefix="/", logging_config=logs)
    except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
        application = ray_serve.status().applications.get(app_name)
        messages = [one.message for one in application.deployments.values()] if application else []
        raise RayStartError(start_failure("\n".join([*messages, str(error)]))) from error
    return engine_handles(options, app_name)


def start_failure(report: str) -> str:
    """The reason of a replica that does not start, out of several tracebacks, one inside the other."""
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    for line in lines:
        if REASON in line:
            return line[line.index(REASON) + len(REASON) :].strip().rstrip("'\"")
    return f"the server does not start on Ray: {lines[-1] if lines else 'no reason is given'}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
