"""Waits for a job in the triggerer, so that a training of days takes no worker slot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from tasks.engines.protocol import JobState
from tasks.site import Site
from tasks.spec.errors import TryAgain


class JobTrigger(BaseTrigger):
    """Fires with the job's status once it has ended or is missing."""

    def __init__(self, handle: str, poll_seconds: float = 1.0) -> None:
        super().__init__()
        self.handle, self.poll_seconds = handle, poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "tasks.orchestrate.trigger.JobTrigger", {"handle": self.handle, "poll_seconds": self.poll_seconds}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        engine = Site().engine
        while True:
            try:
                status = await asyncio.to_thread(engine.poll, self.handle)
            except TryAgain as error:
                # The supervisor restarts: the job is looked for again, and missing is then its own answer.
                self.log.warning("%s", error)
            else:
                if status.state is not JobState.RUNNING:
                    yield TriggerEvent({"handle": self.handle, "status": status.model_dump(mode="json")})
                    return
            await asyncio.sleep(self.poll_seconds)

    async def on_kill(self) -> None:
        await asyncio.to_thread(Site().engine.cancel, self.handle)
