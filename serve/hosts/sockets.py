"""The listening socket, opened before anything slow happens, so that a taken port is known at once."""

from __future__ import annotations

import errno
import socket

from moe.errors import UserError


class ListenError(UserError):
    """The address cannot be listened on; the text says why and what to do."""


def open_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any free one.

    Raises:
        ListenError: the port is taken (names a free one), not allowed, or the host is not one of this machine's.
    """
    if not 0 <= port <= 65535:
        raise ListenError(f"port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ListenError(_explain(error, host, port)) from error
    listener.set_inheritable(False)
    return listener


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        free = free_port(host, near=port)
        hint = f"; port {free} is free: --port {free}" if free is not None else ""
        return f"port {port} on {host} is already in use{hint}"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; take one above 1023, such as --port 8000"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine; use 127.0.0.1 (this machine only) or 0.0.0.0 (all networks)"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"


def free_port(host: str, near: int) -> int | None:
    """A port that can be bound now: one of the next twenty, else any."""
    for candidate in [*range(near + 1, min(near + 21, 65536)), 0]:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    return None


def url_of(listener: socket.socket) -> str:
    """The URL to open from this machine; a wildcard address becomes the loopback one."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
