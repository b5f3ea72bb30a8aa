"""``python -m tasks.reconciler``: keeps gateway and registry as the ledger says, and hears MLflow's tags.

Supervised; at most one works for a site (a lock). Whoever died in a switch, it is finished or undone within
seconds.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading

from tasks.delivery import parts, ready_endpoints
from tasks.registry import versions
from tasks.release.reconcile import run
from tasks.site import Site
from tasks.spec.errors import DrydockError
from tasks.spec.load import load_workload, workload_names
from tasks.store.events import record_event
from tasks.store.files import exclusive

LISTEN_SECONDS = 5.0
ACCESS_LOG_BYTES = 64 << 20


def main() -> int:
    site, stop = Site(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with exclusive(site.home / "locks" / "reconciler.lock"):
        listener = threading.Thread(target=_listen, args=(site, stop), daemon=True)
        listener.start()
        run(parts(site), site.home, lambda workload, target: ready_endpoints(workload, target, site), stop)
    return 0


def _listen(site: Site, stop: threading.Event) -> None:
    """Hear the tag ``review`` that a person may set on a version in MLflow's page; keep the access log bounded."""
    while not stop.wait(LISTEN_SECONDS):
        with contextlib.suppress(DrydockError, OSError):
            site.gateway.rotate_log(ACCESS_LOG_BYTES)
        for workload in workload_names(site.workloads):
            try:
                hear_tags(workload, site)
            except (DrydockError, OSError) as error:
                sys.stderr.write(f"{workload}: {error}\n")


def hear_tags(workload: str, site: Site) -> None:
    """Answer a waiting review by the version's tag, where the workload accepts an approval without an author.

    The tag is a request: its value is ``approved`` or ``rejected``. It is taken off once it was heard.
    """
    for version in versions.list_versions(site.mlflow, workload):
        request = version.tags.get(versions.REQUEST_TAG, "").lower()
        if request not in ("approved", "rejected"):
            continue
        if not load_workload(site.workloads, workload).review.accept_unnamed:
            message = f"{workload} version {version.version}: a tag in MLflow names no author, review.accept_unnamed "
            record_event(site.home, "refusal", message + "is false; answer in Airflow or by ./drydock review")
        elif not answer_waiting(workload, version.version, request == "approved", "by a tag in MLflow", site):
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
