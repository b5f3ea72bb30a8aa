"""A release on one page: start -> ready -> switch -> bake, and rollback. Each can be asked for again at any point.

    start    the signed package is verified and its replicas run
    ready    each replica has answered its golden sample
    switch   traffic, aliases and ledger move together or not at all
    bake     the version is still the champion and answers; the versions before it are stopped
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from pydantic import Field

from tasks.engines.protocol import Service
from tasks.notify import notify
from tasks.registry import versions
from tasks.release.model import Version, service_name
from tasks.release.switch import Parts
from tasks.release.switch import rollback as roll_back
from tasks.release.switch import switch as switch_to
from tasks.site import Site
from tasks.spec.errors import BadRequest, Refused, TryAgain
from tasks.spec.load import load_workload
from tasks.spec.value import Value
from tasks.spec.workload import Serve
from tasks.store.manifest import verify
from tasks.store.sign import verify_folder_signature

POLL_SECONDS = 0.1


class Order(Value):
    """What is asked: which version (none for a rollback: the previous one), by whom, why, under which intent."""

    workload: str
    version: str | None
    actor: str
    reason: str
    intent_id: str
    package_sha256: str | None = Field(default=None, description="of the version, as reviewed; else the registry's")
    expected_champion: str | None = Field(default=None, description="what served when the release was reviewed")


def start(order: Order, site: Site) -> dict[str, Any]:
    """Start the replicas of a version, or find them running.

    Raises:
        BadRequest: the version is not registered. IntegrityLost: its package is not what was registered.
    """
    target = _target(order, site)
    replicas = start_replicas(order.workload, target, site)
    return {"service": service_name(order.workload, target.digest_sha256), "replicas": [r.url for r in replicas]}


def ready(order: Order, site: Site) -> dict[str, Any]:
    """Wait until every replica of a version is ready.

    Raises:
        Refused: one is not in the workload's time, or never will be; its log is named.
    """
    target = _target(order, site)
    return {"endpoints": await_ready(order.workload, target, site)}


def switch(order: Order, site: Site) -> dict[str, Any]:
    """Make a version the champion.

    Raises:
        Refused: another version serves than when the release was reviewed.
    """
    target = _target(order, site)
    check_approved(order, site)
    # Found running, as a rule; another release's bake may have retired them since.
    start_replicas(order.workload, target, site)
    endpoints = await_ready(order.workload, target, site)
    served = site.ledger.champion(order.workload)
    intent = switch_to(
        parts(site),
        order.workload,
        target,
        endpoints,
        expected_champion=order.expected_champion,
        actor=order.actor,
        intent_id=order.intent_id,
        reason=order.reason,
    )
    if served != target == site.ledger.champion(order.workload):
        before = f"before it version {served.version}" if served else "the first one"
        message = f"{order.workload}: version {target.version} serves ({before}), by {order.actor}"
        notify(site, order.workload, "promotion", message)
    return intent.model_dump(mode="json")


def check_approved(order: Order, site: Site) -> None:
    """Hold the switch itself against the ledger's decision, however the task before it came to its end.

    Raises:
        Refused: the version was rejected, or a review is demanded and nobody approved.
    """
    from tasks.review import question

    asked = question(order.workload, order.version, site)
    if asked.rejected:
        raise Refused(f"{order.workload}: version {order.version} was rejected: {asked.rejected}")
    if asked.required and not asked.approved:
        raise Refused(f"{order.workload}: version {order.version} is not approved; ./drydock review {order.workload}")


def bake(order: Order, site: Site) -> dict[str, Any]:
    """Check the version after its bake time and stop every other of the workload.

    Raises:
        TryAgain: the champion does not answer now.
    """
    target = _target(order, site)
    answer_golden(order.workload, site)
    # Under the lease: a rollback that adopts the warm replicas must not lose them a moment later.
    with site.ledger.lease(order.workload):
        champion = site.ledger.champion(order.workload)
        if champion != target or site.ledger.open_intent_of(order.workload):
            return {"baked": False, "why": f"version {champion.version if champion else 'none'} serves by now"}
        stopped = retire_replicas(order.workload, champion, site)
    return {"baked": True, "stopped": stopped}


def rollback(order: Order, site: Site) -> dict[str, Any]:
    """Go back to the previous version, or to ``order.version``; cold versions are started and verified first."""

    def ensure_serving(target: Version) -> list[str]:
        # Warm: neither the registry nor the workload's file is needed.
        if endpoints := ready_endpoints(order.workload, target, site):
            return endpoints
        start_replicas(order.workload, target, site)
        return await_ready(order.workload, target, site)

    intent = roll_back(
        parts(site),
        order.workload,
        reason=order.reason,
        actor=order.actor,
        intent_id=order.intent_id,
        ensure_serving=ensure_serving,
        to=order.version,
    )
    assert intent.target is not None
    message = f"{order.workload}: back to version {intent.target.version}, by {order.actor}: {order.reason}"
    notify(site, order.workload, "rollback", message)
    return intent.model_dump(mode="json")


ACTIONS: dict[str, Callable[[Order, Site], dict[str, Any]]] = {
    "start": start,
    "ready": ready,
    "switch": switch,
    "bake": bake,
    "rollback": rollback,
}


def served_version(found: versions.Version) -> Version:
    """Return a registered version as the ledger names it.

    Raises:
        BadRequest: it was registered by hand, so there is no package that we signed.
    """
    if not found.package_sha256 or not found.evidence_sha256:
        raise BadRequest(f"{found.workload} version {found.version}: was not registered by Drydock, can't be served")
    return Version(version=found.version, digest_sha256=found.package_sha256)


def parts(site: Site) -> Parts:
    """What a change of what serves moves together."""
    return Parts(ledger=site.ledger, gateway=site.gateway, aliases=versions.Aliases(site.mlflow))


def start_replicas(workload: str, target: Version, site: Site) -> Any:
    """Verify the target's package, fetched from the registry where it is not at hand, and start its replicas."""
    package = package_at_hand(workload, target, site) or fetch_package(workload, target, site)
    service = service_for(workload, target, str(package), load_workload(site.workloads, workload).serve, site)
    return site.engine.start(service)


def package_at_hand(workload: str, target: Version, site: Site) -> Path | None:
    """Return the folder of the target's package, verified and its signature too; None where it is not here."""
    folder = site.packages / target.digest_sha256
    if not folder.is_dir():
        return None
    verify(folder, target.digest_sha256)
    verify_folder_signature(folder, site.keys)
    return folder


def fetch_package(workload: str, target: Version, site: Site) -> Path:
    registered = versions.get(site.mlflow, workload, target.version)
    if registered.package_sha256 != target.digest_sha256:
        found = registered.package_sha256[:12]
        raise Refused(f"{workload} version {target.version}: holds package {found}, not {target.digest_sha256[:12]}")
    return versions.fetch(site.mlflow, registered, site.packages, site.keys)


def service_for(workload: str, target: Version, package: str, serve: Serve, site: Site) -> Service:
    """Return the service of one version: the command that each replica runs. Pure."""
    options = {
        "--package": package,
        "--digest": target.digest_sha256,
        "--keys": str(site.keys),
        "--port": "{port}",
        # Envoy is the only door, whatever address the gateway listens on.
        "--host": "127.0.0.1",
        "--version": target.version,
        "--max-batch-rows": serve.max_batch_rows,
        "--max-body-bytes": serve.max_body_bytes,
        "--max-queue": serve.max_queue,
        "--threads": serve.threads,
        "--log-folder": str(site.home / "predictions" / workload),
    }
    arguments = [str(part) for pair in options.items() for part in pair]
    return Service(
        name=service_name(workload, target.digest_sha256),
        command=(sys.executable, "-m", "tasks.serve", *arguments),
        environment={"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(serve.threads)},
        folder=str(site.home / "logs" / service_name(workload, target.digest_sha256)),
        replicas=serve.replicas,
        labels={"workload": workload, "version": target.version, "digest": target.digest_sha256},
    )


def await_ready(workload: str, target: Version, site: Site) -> list[str]:
    """Wait until all replicas answer that they are ready; return their endpoints, host:port."""
    name = service_name(workload, target.digest_sha256)
    seconds = load_workload(site.workloads, workload).rollout.ready_seconds
    until = time.monotonic() + seconds
    while True:
        replicas = site.engine.replicas(name)
        if replicas and all(is_ready(replica.url) for replica in replicas):
            return [f"{replica.host}:{replica.port}" for replica in replicas]
        if time.monotonic() > until:
            raise Refused(f"{name}: not ready after {seconds} s; see ./drydock logs {name}")
        time.sleep(POLL_SECONDS)


def ready_endpoints(workload: str, target: Version, site: Site) -> list[str]:
    """Return the endpoints of all running replicas if one of them is ready, else none (the reconciler asks)."""
    replicas = [r for r in site.engine.replicas(service_name(workload, target.digest_sha256)) if r.running]
    if not any(is_ready(replica.url) for replica in replicas):
        return []
    return [f"{replica.host}:{replica.port}" for replica in replicas]


def is_ready(url: str) -> bool:
    """Whether a replica says that it is ready: it has verified its package and answered the golden sample."""
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def answer_golden(workload: str, site: Site) -> httpx.Response:
    """Ask the champion for its golden sample, through the gateway as a client would; return the answer.

    Raises:
        TryAgain: there is no answer.
    """
    from tasks.registry.register import example_request
    from tasks.serve.package import open_package

    champion = site.ledger.champion(workload)
    if champion is None:
        raise BadRequest(f"{workload}: has no champion; ./drydock run {workload} makes one")
    package = open_package(site.packages / champion.digest_sha256, champion.digest_sha256, site.keys)
    url = f"{site.settings.gateway_url}/v2/models/{workload}/infer"
    try:
        answer = httpx.post(url, json=example_request(package), timeout=10, trust_env=False)
    except httpx.HTTPError as error:
        raise TryAgain(f"{workload}: the gateway does not answer: {type(error).__name__}") from None
    if answer.status_code != 200:
        raise TryAgain(f"{workload}: the champion answers {answer.status_code}: {answer.text[:200]}")
    return answer


def retire_replicas(workload: str, champion: Version, site: Site) -> list[str]:
    """Drain and stop the services of versions that served before the champion; return their names.

    One that never served is the candidate of another release, and stays.
    """
    served = {row.digest_sha256 for row in site.ledger.history(workload) if row.kind == "commit"}
    replaced = served - {champion.digest_sha256}
    stopped = []
    for replica in site.engine.replicas():
        labels = replica.labels
        if labels.get("workload") == workload and labels.get("digest") in replaced:
            site.engine.stop(replica.service)
            stopped.append(replica.service)
    return sorted(set(stopped))


def _target(order: Order, site: Site) -> Version:
    if order.version is None:
        raise BadRequest(f"{order.workload}: no version is named")
    if order.package_sha256:
        return Version(version=order.version, digest_sha256=order.package_sha256)
    found = versions.get(site.mlflow, order.workload, order.version)
    return served_version(found)
