"""What the triggerer waits for: a job's end, a rollout's stage. A training of days takes no worker slot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from tasks.engines.protocol import JobState
from tasks.orchestrate.jobs import cancel
from tasks.site import Site
from tasks.spec.errors import TryAgain

if TYPE_CHECKING:
    from tasks.release.rollout import RolloutState

# The phases of a rollout that did not end in a promotion.
ENDED = ("returned", "settled")


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
        await asyncio.to_thread(cancel, self.handle, Site())


class RolloutTrigger(BaseTrigger):
    """Fires once a rollout is past a stage, or, where it has not begun, once no other of the workload is active."""

    def __init__(self, workload: str, rollout_id: str, stage: str, poll_seconds: float = 0.5) -> None:
        super().__init__()
        self.workload, self.rollout_id, self.stage, self.poll_seconds = workload, rollout_id, stage, poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("workload", "rollout_id", "stage", "poll_seconds")
        return "tasks.orchestrate.trigger.RolloutTrigger", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        rollouts = Site().rollouts
        while True:
            state = await asyncio.to_thread(rollouts.find, self.workload, self.rollout_id)
            if is_past(state, self.stage) if state else rollouts.active(self.workload) is None:
                yield TriggerEvent({"rollout_id": self.rollout_id})
                return
            await asyncio.sleep(self.poll_seconds)


def is_past(state: RolloutState, stage: str) -> bool:
    """Whether a rollout needs no more waiting for: it has left ``stage`` (shadow, or canary: the last of it)."""
    if state.phase != "running":
        return True
    return stage == "shadow" and state.stages[state.stage] != "shadow"
