"""``rollback``: back to the previous version of a workload, or to any version of its history. Wiring only."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from tasks.orchestrate.catalogue import names, rollback_docs
from tasks.orchestrate.notifier import DrydockNotifier
from tasks.orchestrate.release import ReleaseOperator

if workloads := names():
    with DAG(
        "rollback",
        description="Back to the previous version, or to any",
        schedule=None,
        params={
            "workload": Param(type="string", enum=workloads),
            "to": Param(None, type=["null", "string"], description="a version's number; empty: the previous one"),
            "reason": Param(type="string", minLength=3, description="kept in the ledger"),
        },
        tags=["rollback"],
        doc_md=rollback_docs(),
        default_args={
            "retries": 3,
            "retry_delay": timedelta(seconds=1),
            "retry_exponential_backoff": 2.0,
            "priority_weight": 1000,
            "on_failure_callback": DrydockNotifier(),
        },
    ) as dag:
        ReleaseOperator(task_id="rollback", action="rollback")
