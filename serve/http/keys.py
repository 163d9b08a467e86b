"""Who is let in: ordinary keys for everything, another one for /admin, none for health probes and the page."""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.types import Scope

from serve.http.settings import ServerSettings
from serve.protocol.errors import ApiError

# Everything else needs a key when keys are set, unknown paths included. The page is the same file for every server,
# and has to be there for its reader to type a key into it.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})


class KeyRing:
    """Compares bearer tokens in time that depends neither on the keys nor on which one matches.

    Args:
        keys: what is accepted; none: everybody is let in.
        what: what the keys are called in messages.
    """

    def __init__(self, keys: tuple[str, ...], what: str = "API key") -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._what = what

    def refuses(self, authorization: str | None) -> ApiError | None:
        """Why this header does not let its sender in; None when it does."""
        if not self._digests:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return _unauthorized(f"You didn't provide an {self._what}: send `Authorization: Bearer YOUR_KEY`.")
        # ASGI headers are bytes read as latin-1; this gives the bytes back.
        digest = sha256(token.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return None if any(matches) else _unauthorized(f"Incorrect {self._what} provided.")


class Gate:
    """Decides by path which keys open it."""

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = KeyRing(settings.api_keys)
        self._admin = None if settings.admin_key is None else KeyRing((settings.admin_key,), "admin key")

    def refuses(self, scope: Scope, authorization: str | None) -> ApiError | None:
        """Why this request goes no further. One that may administrate is marked so in its state."""
        path = route_path(scope)
        if path == "/admin" or path.startswith("/admin/"):
            if self._admin is None:
                return _no_admin("This server was started without an admin key, so everything under /admin is closed.")
            refusal = self._admin.refuses(authorization)
            scope["state"]["admin"] = refusal is None
            return refusal
        return None if path in OPEN_PATHS else self._keys.refuses(authorization)


def require_admin(scope: Scope) -> None:
    """For the handlers: should a path ever mean one thing to the gate and another to the router, nothing opens.

    Raises:
        ApiError: 403 when the gate has not seen an admin key.
    """
    if scope["state"].get("admin") is not True:
        raise _no_admin("This needs the admin key.")


def route_path(scope: Scope) -> str:
    """The path as the router sees it: without the prefix that the application is mounted under."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    if not prefix or not path.startswith(prefix):
        return path
    rest = path[len(prefix) :]
    return rest if not rest or rest.startswith("/") else path


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _no_admin(message: str) -> ApiError:
    return ApiError(403, message, type="permission_error", code="admin_key_required")
