"""``python -m tasks.reconciler``: keeps gateway and registry as the ledger says, drives rollouts, hears MLflow's tags.

Supervised; at most one works for a site (a lock). Whoever died in a change, it is finished or undone within
seconds; a rollout goes on from its file.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import signal
import sys
import threading
from collections.abc import Callable

from tasks import replicas
from tasks.data.predictions import pack_predictions
from tasks.delivery import parts, tag_version
from tasks.notify import notify
from tasks.registry import versions
from tasks.release.controller import Hands
from tasks.release.controller import run as drive
from tasks.release.reconcile import run
from tasks.release.rollout import RolloutState
from tasks.release.series import Series
from tasks.review import record_refusal
from tasks.site import Site
from tasks.spec.errors import BadRequest, DrydockError, TryAgain
from tasks.spec.load import load_workload, workload_names
from tasks.spec.settings import resolve
from tasks.store.events import record_event
from tasks.store.files import exclusive
from tasks.store.space import warning

LISTEN_SECONDS = 5.0
ACCESS_LOG_BYTES = 64 << 20


def main() -> int:
    # Some of its requests are made under a workload's lease, for which a rollback waits.
    site, stop = Site(resolve(mlflow_seconds=5)), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with exclusive(site.home / "locks" / "reconciler.lock"):
        for work in (_listen, _drive):
            threading.Thread(target=work, args=(site, stop), daemon=True).start()
        ready = lambda workload, target: replicas.ready_endpoints(workload, target, site)  # noqa: E731
        run(parts(site), site.home, ready, stop)
    return 0


def _drive(site: Site, stop: threading.Event) -> None:
    drive(hands(site), site.home, stop)


def hands(site: Site) -> Hands:
    """What the rollouts of a site act through."""
    return Hands(
        parts=parts(site),
        rollouts=site.rollouts,
        endpoints=_at(replicas.ready_endpoints, site),
        answers=_at(replicas.answers, site),
        rows=_at(replicas.holdout_requests, site),
        gateway_url=site.settings.gateway_url,
        gateway_ca=site.settings.gateway_ca,
        stop=_at(replicas.stop_replicas, site),
        tell=lambda state: tell(state, site),
    )


def _at(ask: Callable, site: Site) -> Callable:
    return lambda workload, version: ask(workload, version, site)


def tell(state: RolloutState, site: Site) -> None:
    """Write how a rollout ended beside its version, and notify. Raises TryAgain where MLflow is down."""
    outcome = f"{state.outcome}: {state.why}" if state.why else str(state.outcome)
    tag_version(state.workload, state.candidate, outcome, site)
    if state.phase != "promoted":
        message = f"{state.workload}: rollout of version {state.candidate.version}: {state.why}"
        notify(site, state.workload, "failure", message)


def _listen(site: Site, stop: threading.Event) -> None:
    """Every few seconds: record the traffic, hear tags, renew the gateway's keys, keep its log bounded."""
    series, low = Series(site.home), False
    while not stop.wait(LISTEN_SECONDS):
        with contextlib.suppress(DrydockError, OSError):
            _sample(site, series)
            site.gateway.rotate_log(ACCESS_LOG_BYTES)
        _renew_keys(site)
        low = warn_of_the_disk(site, low)
        for workload in workload_names(site.workloads):
            try:
                hear_tags(workload, site)
                _pack(workload, site)
            except (DrydockError, OSError) as error:
                sys.stderr.write(f"{workload}: {error}\n")


def warn_of_the_disk(site: Site, told: bool) -> bool:
    """Notify once when the disk gets low, before everything stands still; return whether it is."""
    message = warning(site.home)
    if message and not told:
        notify(site, None, "failure", message)
    return bool(message)


def _renew_keys(site: Site) -> None:
    try:
        if site.gateway.reload_keys():
            record_event(site.home, "route", "the gateway asks for the API keys as they are in their file now")
    except BadRequest as error:
        record_event(site.home, "failure", f"{error}; the keys so far stay in force")
    except TryAgain as error:
        sys.stderr.write(f"{error}\n")


def _sample(site: Site, series: Series) -> None:
    shares = {}
    for route in site.gateway.current().routes.values():
        total = sum(backend.weight for backend in route.backends) or 1
        shares |= {backend.service: backend.weight / total for backend in route.backends}
    series.record(site.gateway.stats(), shares, dt.datetime.now(dt.UTC))


def _pack(workload: str, site: Site) -> None:
    folder = site.home / "predictions" / workload
    if folder.is_dir():
        days = load_workload(site.workloads, workload).serve.log.days
        pack_predictions(folder, days, dt.datetime.now(dt.UTC))


def hear_tags(workload: str, site: Site) -> None:
    """Answer a waiting review by the version's tag, where the workload accepts an approval without an author.

    The tag is a request: its value is ``approved`` or ``rejected``. It is taken off once it was heard.
    """
    for version in versions.list_versions(site.mlflow, workload):
        request = version.tags.get(versions.REQUEST_TAG, "").lower()
        if request not in ("approved", "rejected"):
            continue
        if not load_workload(site.workloads, workload).review.accept_unnamed:
            why = f"{workload} version {version.version}: a tag in MLflow names no author, review.accept_unnamed "
            why += "is false; answer in Airflow or by ./drydock review"
            # First: a tag that can't be taken off would be refused again and again.
            versions.delete_version_tag(site.mlflow, workload, version.version, versions.REQUEST_TAG)
            record_event(site.home, "refusal", why)
            record_refusal(workload, version, "a tag in MLflow", why, site)
            continue
        if not answer_waiting(workload, version.version, request == "approved", "by a tag in MLflow", site):
            continue
        versions.delete_version_tag(site.mlflow, workload, version.version, versions.REQUEST_TAG)


def answer_waiting(workload: str, version: str, approve: bool, reason: str, site: Site) -> bool:
    """Answer the review that waits in Airflow for this version; return whether there was one."""
    from tasks.orchestrate.api import AirflowApi

    api = AirflowApi(site)
    for detail in api.waiting_reviews():
        if detail["subject"].startswith(f"Release {workload} version {version} "):
            api.answer_review(detail, "Approve" if approve else "Reject", reason)
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
