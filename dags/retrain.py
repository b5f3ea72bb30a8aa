"""``retrain_<workload>``: from a source to a registered, signed version. Wiring only."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset

from tasks.orchestrate.catalogue import broken, declared, retrain_docs
from tasks.orchestrate.notifier import DrydockNotifier
from tasks.orchestrate.operator import PlanOperator, StepOperator
from tasks.orchestrate.params import form
from tasks.orchestrate.pools import pool_of, pool_of_students

for workload in declared():
    name = workload.name
    dataset = Asset(f"dataset_{name}", uri=f"drydock://datasets/{name}", group="dataset")
    model = Asset(f"model_{name}", uri=f"drydock://models/{name}", group="model")

    with DAG(
        f"retrain_{name}",
        description=workload.description or f"Retrain {name}",
        schedule=workload.schedule,
        catchup=False,
        max_active_runs=1,
        params=form(workload),
        tags=["retrain", name],
        doc_md=retrain_docs(workload),
        default_args={
            "retries": 3,
            "retry_delay": timedelta(seconds=2),
            "retry_exponential_backoff": 2.0,
            "max_retry_delay": timedelta(minutes=5),
            "priority_weight": workload.priority,
            "on_failure_callback": DrydockNotifier(workload=name),
        },
    ) as dag:
        plan = PlanOperator(task_id="plan", workload=name)
        ingest = StepOperator(task_id="ingest", step="ingest")
        clean = StepOperator(task_id="clean", step="clean")
        validate_data = StepOperator(task_id="validate_data", step="validate_data")
        validate_labels = StepOperator(task_id="validate_labels", step="validate_labels")
        version = StepOperator(
            task_id="version", step="version", outlets=[dataset], outlet_facts=("revision", "data_sha256")
        )
        pool, slots = pool_of(workload.train)
        train = StepOperator(task_id="train", step="train", pool=pool, pool_slots=slots, inlets=[dataset])
        compress = StepOperator.partial(
            task_id="compress", step="compress", **pool_of_students(workload)
        ).expand(item=list(workload.compress.labels))
        evaluate = StepOperator.partial(task_id="evaluate", step="evaluate").expand(item=compress.output)
        evaluate_champion = StepOperator(task_id="evaluate_champion", step="evaluate_champion")
        judge = StepOperator(task_id="judge", step="judge", trigger_rule="none_failed")
        register = StepOperator(
            task_id="register", step="register", outlets=[model], outlet_facts=("version", "package_sha256")
        )

        if workload.search:
            numbers = list(range(workload.search.trials))
            trial = StepOperator.partial(
                task_id="trial", step="trial", pool=pool, pool_slots=slots
            ).expand(item=numbers)
            version >> trial >> train

        plan >> ingest >> clean >> [validate_data, validate_labels] >> version
        version >> train >> compress >> evaluate >> judge >> register
        version >> evaluate_champion >> judge

# A workload whose file is wrong keeps its DAG: its one task says what is wrong.
for dag_name, name, error in broken():
    tags = ["retrain", dag_name, "broken"]
    with DAG(f"retrain_{dag_name}", description=error, schedule=None, tags=tags, doc_md=error):
        PlanOperator(task_id="plan", workload=name, on_failure_callback=DrydockNotifier(workload=name))
