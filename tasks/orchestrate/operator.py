"""The operators of a retrain: one that runs a step as a job, one that pins the run's workload.

A step's job outlives the task that started it: a task that was killed finds it by its key and waits on. Short
jobs are waited for here, long ones in the triggerer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from tasks.engines.protocol import JobState, JobStatus
from tasks.notify import check_secrets
from tasks.orchestrate import jobs
from tasks.orchestrate.asked import ASKED_BY, actor_of, askers_of
from tasks.orchestrate.pools import fits_pool
from tasks.orchestrate.trigger import JobTrigger
from tasks.plan import RETRAIN, request_for
from tasks.site import Site
from tasks.spec.changes import changed
from tasks.spec.errors import DrydockError, from_os, retryable, told
from tasks.spec.load import load_workload
from tasks.spec.value import Value
from tasks.spec.workload import Workload
from tasks.steps import finished, parse_request
from tasks.store.space import require_space

INLINE_SECONDS = 60
POLL_SECONDS = 0.1
PLAN = "plan"
# Steps that are run once for each of several items.
MAPPED = ("trial", "compress", "evaluate")


@contextlib.contextmanager
def as_airflow(passing: type[DrydockError] | tuple[type[DrydockError], ...] = ()) -> Iterator[None]:
    """Turn our errors into Airflow's: one that may pass is retried with back-off, any other fails at once.

    The message begins with the error's kind, so that a reader of the log knows what to do, and who follows the
    run by the command gets the same exit code. ``passing`` is left as it is, for a caller that knows it.
    """
    try:
        yield
    except passing:
        raise
    except OSError as error:
        ours = from_os(error)
        raise AirflowException(told(ours)) from error
    except DrydockError as error:
        kind = AirflowException if retryable(error.exit_code) else AirflowFailException
        raise kind(told(error)) from None


class PlanOperator(BaseOperator):
    """Pins the workload for the run: the file with the trigger form's changes, checked, as this run's XCom."""

    def __init__(self, *, workload: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.workload = workload

    def execute(self, context: Any) -> dict[str, Any]:
        site = Site()
        with as_airflow():
            require_space(site.home)
            params = {name: value for name, value in dict(context["params"]).items() if value is not None}
            params.pop(ASKED_BY, None)
            effective = changed(load_workload(site.workloads, self.workload), params)
            fits_pool(effective, site.settings)
            check_secrets(effective, site)
        self.log.info("by the trigger form: %s", params)
        return effective.model_dump(mode="json")


class StepOperator(BaseOperator):
    """Runs one step of the retrain as an engine's job and returns its result. ``item``: see ``tasks.plan``."""

    def __init__(self, *, step: str, item: Any = None, outlet_facts: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step, self.item, self.outlet_facts = step, item, outlet_facts
        self._handle: str | None = None

    def execute(self, context: Any) -> Any:
        with as_airflow():
            site = Site()
            request = self._request(context, site)
            if request is None:
                raise AirflowSkipException("there is no champion, or none that reads these features and classes")
            if done := finished(self._name, request, site):
                self.log.info("recognised: the same request and code; its result is taken from %s", done.room.uri)
                jobs.forget(self._name, request, site)
                return self._give(context, done)
            self._handle = jobs.submit(self._name, request, site)
            status = self._follow(site)
            if status.state is JobState.RUNNING:
                asked = request.model_dump(mode="json")
                self.defer(trigger=JobTrigger(self._handle), method_name="resume", kwargs={"asked": asked})
            return self._finish(context, request, status, site)

    def resume(self, context: Any, event: dict[str, Any], asked: dict[str, Any]) -> Any:
        """Called when the trigger fired, with the request as it was: a file may have changed since."""
        with as_airflow():
            site = Site()
            request = parse_request(self._name, asked, "the deferred request")
            self._handle = event["handle"]
            self._tell(site, 0)
            return self._finish(context, request, JobStatus.parse(event["status"], "the trigger's event"), site)

    def on_kill(self) -> None:
        if self._handle is not None:
            jobs.cancel(self._handle, Site())

    @property
    def _name(self) -> str:
        return "evaluate" if self.step == "evaluate_champion" else self.step

    def _request(self, context: Any, site: Site) -> Value | None:
        ti = context["ti"]
        workload = Workload.parse(ti.xcom_pull(task_ids=PLAN), "the run's plan")
        return request_for(self.step, workload, ResultsSoFar(ti), site, self.item, askers_of(context))

    def _follow(self, site: Site) -> JobStatus:
        """Wait for the job and pass its log on; give up waiting (not the job) after a while."""
        offset, until = 0, time.monotonic() + INLINE_SECONDS
        while True:
            status = site.engine.poll(self._handle)
            offset = self._tell(site, offset)
            if status.state is not JobState.RUNNING or time.monotonic() > until:
                return status
            time.sleep(POLL_SECONDS)

    def _tell(self, site: Site, offset: int) -> int:
        """Pass what the job printed from ``offset`` on to this task's log; return the new offset."""
        while True:
            text, end = site.engine.logs(self._handle, offset)
            for line in text.splitlines():
                self.log.info("%s", line)
            if end == offset:
                return end
            offset = end

    def _finish(self, context: Any, request: Value, status: JobStatus, site: Site) -> Any:
        try:
            result = jobs.outcome(self._name, request, status, site)
        finally:
            # Its log is in ours by now; a container that failed is left to nobody either.
            jobs.forget(self._name, request, site)
        return self._give(context, result)

    def _give(self, context: Any, result: Value) -> Any:
        """Return the result as XCom, its facts on the assets that the task makes."""
        data = result.model_dump(mode="json")
        for outlet in self.outlets:
            facts = {name: data[name] for name in self.outlet_facts}
            context["outlet_events"][outlet].extra = facts | {"triggered_by": actor_of(context)}
        return data


class ResultsSoFar(Mapping[str, Any]):
    """The results of this run's steps by name, each asked of Airflow when it is first looked at; mapped steps as a
    list in the order of their mapping."""

    def __init__(self, ti: Any) -> None:
        self._ti = ti
        upstream = ti.task.get_flat_relative_ids(upstream=True)
        self._steps = [name for name in (*RETRAIN, "trial", "evaluate_champion") if name in upstream]
        self._found: dict[str, Any] = {}

    def __getitem__(self, step: str) -> Any:
        if step not in self._steps:
            raise KeyError(step)
        if step not in self._found:
            given = [value for value in self._ti.xcom_pull(task_ids=[step]) if value is not None]
            self._found[step] = given if step in MAPPED else next(iter(given), None)
        return self._found[step]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)
