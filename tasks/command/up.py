"""``drydock up`` and what it shares with ``run`` and ``release``: runs of DAGs, followed to their end."""

from __future__ import annotations

import time
from typing import Any

from tasks import stack
from tasks.command.follow import Say, follow
from tasks.command.terminal import user
from tasks.delivery import answer_golden
from tasks.orchestrate.api import AirflowApi
from tasks.orchestrate.asked import ASKED_BY
from tasks.orchestrate.environment import USER, password
from tasks.orchestrate.pools import SLOT, sizes
from tasks.site import Site
from tasks.spec.changes import changed
from tasks.spec.errors import Refused, TryAgain
from tasks.spec.load import load_workload, workload_names
from tasks.store.space import require_space

RELEASE_SECONDS = 60


def bring_up(site: Site, name: str | None, say: Say) -> None:
    """Start the services; take the workload to a live model if it has no champion; ask it once, and tell all.

    Raises:
        DrydockError: one line on what failed and where its log is. BadRequest: the workload's file is wrong; the
            services run then.
    """
    if name is not None and name not in workload_names(site.workloads):
        load_workload(site.workloads, name)  # says which there are
    stack.up(site, say)
    api = AirflowApi(site)
    for pool, slots in sizes(site.settings).items():
        api.set_pool(pool, slots, SLOT[pool])
    if name is not None:
        load_workload(site.workloads, name)  # a wrong file keeps no service down
        if site.ledger.champion(name) is None:
            say(f"{name} has no champion: its retrain DAG runs now")
            before = {run["dag_run_id"] for run in api.runs(f"release_{name}", 100)}
            retrain(site, name, {}, say)
            follow_release(api, site, name, before, say)
        show_answer(site, name, say)
    say("up")
    for line in addresses(site, name):
        say(line)


def retrain(site: Site, name: str, params: dict[str, Any], say: Say) -> dict[str, Any]:
    """Trigger the retrain DAG, follow it to its end, and return the registered version.

    Raises:
        BadRequest: a parameter that the workload can't take; nothing was triggered.
        TryAgain: the disk is full; nothing was triggered either.
        DrydockError: the run failed.
    """
    changed(load_workload(site.workloads, name), params)
    require_space(site.home)
    api, dag_id = AirflowApi(site), f"retrain_{name}"
    api.wait_for_dag(dag_id)
    run_id = api.trigger(dag_id, params | {ASKED_BY: user()})
    say(f"{dag_id}: {site.settings.airflow_url}/dags/{dag_id}/runs/{run_id}")
    follow(api, dag_id, run_id, say)
    return api.xcom(dag_id, run_id, "register")


def release_version(site: Site, name: str, version: str, reason: str, say: Say) -> None:
    """Trigger the release DAG for a version and follow it until it is promoted."""
    load_workload(site.workloads, name)
    api, dag_id = AirflowApi(site), f"release_{name}"
    api.wait_for_dag(dag_id)
    run_id = api.trigger(dag_id, {"version": version, "reason": reason, ASKED_BY: user()})
    say(f"{dag_id}: {site.settings.airflow_url}/dags/{dag_id}/runs/{run_id}")
    if follow(api, dag_id, run_id, say, until=frozenset({"promote"})) == "reached":
        say(f"{name}: version {version} serves")
        return
    champion = site.ledger.champion(name)
    if champion is None or champion.version != version:
        raise Refused(f"{name}: version {version} was not released; see ./drydock history {name}")
    say(f"{name}: version {version} serves already; nothing was left to do")


def follow_release(api: AirflowApi, site: Site, name: str, before: set[str], say: Say) -> None:
    """Follow the release that the version's asset triggered (none of those ``before``) until it is promoted.

    Raises:
        Refused: it ended without a champion.
    """
    dag_id, until = f"release_{name}", time.monotonic() + RELEASE_SECONDS
    while not (runs := [run for run in api.runs(dag_id, 100) if run["dag_run_id"] not in before]):
        if time.monotonic() > until:
            raise TryAgain(f"{dag_id}: was not triggered within {RELEASE_SECONDS} s; see ./drydock logs")
        time.sleep(0.3)
    say(f"{dag_id}: triggered by the version's asset")
    if load_workload(site.workloads, name).review.required:
        say(f"a person must approve it: {site.settings.airflow_url}/required_actions, or ./drydock review {name}")
        return
    follow(api, dag_id, runs[0]["dag_run_id"], say, until=frozenset({"promote"}))
    if site.ledger.champion(name) is None:
        raise Refused(f"{dag_id}: ended without a champion; its review task says why")


def show_answer(site: Site, name: str, say: Say) -> None:
    """Ask the champion through the gateway and tell its answer."""
    champion = site.ledger.champion(name)
    if champion is None:
        return
    from tasks.serve.protocol import OUTPUTS

    answer = answer_golden(name, site)
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    told = ", ".join(f"{output} {data[0]:.4g}" for output, data in outputs.items() if output not in OUTPUTS)
    told = told or f"{outputs['label'][0]!r}, probability {max(outputs['probabilities']):.3f}"
    say(f"{name} version {champion.version} answers a sample: {told}")
    say(f"passport {answer.headers['x-drydock-passport']}")


def addresses(site: Site, name: str | None) -> list[str]:
    """Return what a new user wants to know now."""
    settings, workload = site.settings, name or "digits"
    return [
        f"Airflow   {settings.airflow_url}   user {USER}, password {password(site.home)}",
        f"MLflow    {settings.mlflow_url}",
        f"Gateway   {settings.gateway_url}/v2/models/{workload}",
        "Try next",
        "  ./drydock status                              what runs, what serves, what happened last",
        f"  ./drydock run {workload} --param seed=1".ljust(48) + "retrain; its version is released by itself",
        f"  ./drydock rollback {workload} --reason 'a try'".ljust(48) + "back to the version before",
        f"  ./drydock history {workload}".ljust(48) + "what served when, and why",
        "  ./drydock new mine".ljust(48) + "a model of your own",
    ]
