"""The page at ``/``: one static file, under a policy that lets the browser run it and nothing else."""

from __future__ import annotations

import base64
import re
from functools import cache
from hashlib import sha256
from importlib import resources

from fastapi import Response

# What the page may not do at all is not listed: everything falls back to 'none'.
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def page_response() -> Response:
    """The page. It is the same for every server: it asks for models and loads itself, with the reader's key."""
    text, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # A page from before an update would speak to a server from after it.
        "Cache-Control": "no-cache",
    }
    return Response(text, media_type="text/html", headers=headers)


@cache
def _page() -> tuple[str, str]:
    text = resources.files("serve.http").joinpath("page.html").read_text(encoding="utf-8")
    return text, _POLICY.format(script=_hashes(text, "script"), style=_hashes(text, "style"))


def _hashes(text: str, tag: str) -> str:
    """Sources that allow exactly the file's own inline elements of this kind."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(sha256(block.encode()).digest()).decode()}'" for block in blocks)
