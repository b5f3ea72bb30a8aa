"""The operators of a release: its actions, the rollout that the triggerer waits for, and the bake."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException

from tasks.orchestrate.asked import actor_of, version_asked
from tasks.orchestrate.operator import as_airflow
from tasks.orchestrate.trigger import ENDED, RolloutTrigger, is_past
from tasks.site import Site
from tasks.spec.errors import Inconclusive, Refused

if TYPE_CHECKING:
    from tasks.release.rollout import RolloutState

# A replay of the holdout is over sooner than a deferred task is taken up again.
INLINE_SECONDS = 10
POLL_SECONDS = 0.2


@contextlib.contextmanager
def _skipped_if_served() -> Iterator[None]:
    """Where another release of the same version was quicker, the rest of this one is skipped: its end is reached."""
    from tasks.delivery import ServesAlready

    try:
        yield
    except ServesAlready as served:
        raise AirflowSkipException(f"{served}: nothing is left to do") from None


class ReleaseOperator(BaseOperator):
    """Does one action of a release or a rollback: ``tasks.delivery`` by name, with this run as the intent."""

    def __init__(self, *, action: str, workload: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.action, self.workload = action, workload

    def execute(self, context: Any) -> Any:
        return self._act(context)

    def _act(self, context: Any) -> Any:
        from tasks import delivery

        with _skipped_if_served(), as_airflow(passing=delivery.ServesAlready):
            return delivery.ACTIONS[self.action](self._order(context), Site())

    def _order(self, context: Any) -> Any:
        from tasks.delivery import Order

        params = dict(context["params"])
        reviewed = context["ti"].xcom_pull(task_ids="review") or {}
        return Order(
            workload=self.workload or params["workload"],
            version=version_asked(context),
            actor=actor_of(context),
            reason=params.get("reason") or "released by its asset",
            intent_id=f"{context['dag'].dag_id}:{context['run_id']}",
            package_sha256=(reviewed.get("version") or {}).get("package_sha256"),
            expected_champion=reviewed.get("champion"),
        )


class RolloutOperator(ReleaseOperator):
    """Begins the version's rollout, or finds it, and waits until it is past ``stage``; the reconciler drives it.

    Another rollout of the workload is waited for. The waiting is the triggerer's, but for the first seconds.
    """

    def __init__(self, *, stage: str, workload: str, **kwargs: Any) -> None:
        super().__init__(action="roll", workload=workload, **kwargs)
        self.stage = stage

    def execute(self, context: Any) -> Any:
        return self._wait(context)

    def resume(self, context: Any, event: dict[str, Any]) -> Any:
        """Called when the trigger fired; where another rollout was waited for, this one begins now."""
        return self._wait(context)

    def _wait(self, context: Any) -> Any:
        from tasks.delivery import ServesAlready, roll
        from tasks.release.rollouts import RolloutActive

        order, site, until = self._order(context), Site(), time.monotonic() + INLINE_SECONDS
        while time.monotonic() < until:
            try:
                with _skipped_if_served(), as_airflow(passing=(RolloutActive, ServesAlready)):
                    state = roll(order, site)
            except RolloutActive as other:
                self.log.info("waiting: %s", other)
                break
            if is_past(state, self.stage):
                return self._outcome(state)
            time.sleep(POLL_SECONDS)
        self.defer(trigger=RolloutTrigger(self.workload, order.intent_id, self.stage), method_name="resume")

    def _outcome(self, state: RolloutState) -> dict[str, Any]:
        steps = [f"{step.stage}: {step.text}" for step in state.history]
        for step in steps:
            self.log.info("%s", step)
        if state.phase in ENDED:
            with as_airflow():
                raise (Inconclusive if state.outcome == "inconclusive" else Refused)(f"{state.workload}: {state.why}")
        return {"phase": state.phase, "stages": list(state.stages), "history": steps}


class BakeOperator(ReleaseOperator):
    """Waits in the triggerer while the new champion bakes, then asks it once more."""

    def __init__(self, *, workload: str, seconds: int, **kwargs: Any) -> None:
        super().__init__(action="bake", workload=workload, **kwargs)
        self.seconds = seconds

    def execute(self, context: Any) -> Any:
        from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger

        if self.seconds == 0:
            return self._act(context)
        self.defer(trigger=TimeDeltaTrigger(timedelta(seconds=self.seconds)), method_name="baked")

    def baked(self, context: Any, event: Any = None) -> Any:
        """Called when the time is over."""
        return self._act(context)
