"""Lets one changing request at a time into an API server that keeps its database in SQLite. No import of Airflow.

Airflow writes some rows (its audit log) on the event loop. Where two changing requests meet there, the one that waits
for SQLite's lock holds the loop that the lock's owner needs to go on: all of Airflow stands still for the five seconds
that SQLite waits, and then the waiting request fails with status 500.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tasks.orchestrate.same_origin import SAFE


class OneWriter:
    """ASGI middleware; its requests wait for each other from the time that their bodies are there until they are
    answered, and the answer is sent after that: a slow client delays none."""

    def __init__(self, app: Any) -> None:
        self.app, self._turn = app, asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE:
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())

        async def replayed() -> Any:
            return messages.pop(0) if messages else await receive()

        answer: list[Any] = []

        async def kept(message: Any) -> None:
            answer.append(message)

        async with self._turn:
            await self.app(scope, replayed, kept)
        for message in answer:
            await send(message)
