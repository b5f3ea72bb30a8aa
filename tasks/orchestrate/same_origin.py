"""Refuses what a page of another origin makes a logged-in user's browser send. Pure; no import of Airflow.

Airflow's session is a cookie, which a browser adds whatever page asks. ``SameSite=Lax`` keeps other sites out,
but a site is a host: a page on another port of this machine (MLflow's artifacts, a notebook) is of the same
site. What then holds such a page back is only that Airflow's API takes no body but JSON. This says no itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

SAFE = {"GET", "HEAD", "OPTIONS"}


class SameOrigin:
    """ASGI middleware: 403 for a request that changes something, with no token of its own, from another origin."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = scope["type"] == "http" and is_foreign(scope["method"], _headers(scope))
        await (_refuse(send) if refused else self.app(scope, receive, send))


def is_foreign(method: str, headers: Mapping[str, str]) -> bool:
    """Return whether a browser sent this, on its user's cookie, for a page of another origin.

    Programs send neither header. A page can't forge either, and it can't add a token without being allowed to
    by CORS. Browsers leave ``Sec-Fetch-Site`` out where the address is neither HTTPS nor the local host; then
    ``Origin`` tells, which comes with every request that is not ``SAFE``.
    """
    if method in SAFE or headers.get("authorization", "").lower().startswith("bearer "):
        return False
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def _headers(scope: Any) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _refuse(send: Any) -> None:
    body = json.dumps({"detail": "refused: a page of another origin asked for this"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
