"""Tells people: an event in the log that ``drydock status`` shows, and the notifiers that the workload names."""

from __future__ import annotations

from typing import Any

from airflow.sdk.bases.notifier import BaseNotifier

from tasks.notify import notify
from tasks.spec.errors import heard


class DrydockNotifier(BaseNotifier):
    """Called by Airflow when a task failed for good."""

    def __init__(self, workload: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.workload = workload

    def notify(self, context: Any) -> None:
        from tasks.site import Site

        ti = context["ti"]
        workload = self.workload or dict(context.get("params") or {}).get("workload")
        cause = " ".join(str(context.get("exception") or "it was stopped").split())
        cause = str(heard(cause) or cause)  # a person needs no name of a class
        notify(
            Site(),
            workload,
            "failure",
            f"{ti.dag_id}.{ti.task_id}: {cause}",
            run_id=ti.run_id,
            attempt=ti.try_number,
        )
