"""``release_<workload>``: from a registered version to the one that serves. Wiring only."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset, Param

from tasks.orchestrate.catalogue import declared, release_docs
from tasks.orchestrate.notifier import DrydockNotifier
from tasks.orchestrate.release import BakeOperator, ReleaseOperator, RolloutOperator
from tasks.orchestrate.review import ReviewOperator

for workload in declared():
    name = workload.name
    with DAG(
        f"release_{name}",
        description=f"Review a version of {name}, roll it out and promote it",
        schedule=[Asset(f"model_{name}", uri=f"drydock://models/{name}", group="model")],
        # A release that bakes or waits for a person must not hold up the next one; the ledger serialises what
        # changes traffic, and refuses a switch whose champion is no longer the one that was reviewed.
        max_active_runs=16,
        params={
            "version": Param(None, type=["null", "string"], description="empty: the version of the asset's event"),
            "reason": Param(None, type=["null", "string"], description="kept in the ledger"),
        },
        tags=["release", name],
        doc_md=release_docs(workload),
        default_args={
            "retries": 3,
            "retry_delay": timedelta(seconds=2),
            "retry_exponential_backoff": 2.0,
            "priority_weight": 100 + workload.priority,
            "on_failure_callback": DrydockNotifier(workload=name),
        },
    ) as dag:
        review = ReviewOperator(
            task_id="review",
            workload=name,
            response_timeout=timedelta(days=workload.review.days),
        )
        preflight, start, ready, promote, retire = (
            ReleaseOperator(task_id=action, action=action, workload=name)
            for action in ("preflight", "start", "ready", "promote", "retire")
        )
        shadow, canary = (RolloutOperator(task_id=stage, stage=stage, workload=name) for stage in ("shadow", "canary"))
        bake = BakeOperator(task_id="bake", workload=name, seconds=workload.rollout.bake_seconds)

        review >> preflight >> start >> ready >> shadow >> canary >> promote >> bake >> retire
