"""A release on one page, and rollback. Each action can be asked for again at any point.

    preflight   the package is verified, approved, and what a rollback would go back to is at hand
    start       its replicas run
    ready       each replica has answered its golden sample
    roll        a copy of the traffic, then shares of it, judged against the champion: ``tasks.release.rollout``
    promote     traffic, aliases and ledger move together or not at all
    bake        it is still the champion and answers
    retire      the versions before it are stopped
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tasks.notify import notify
from tasks.registry import versions
from tasks.release.model import Version, service_name
from tasks.release.rollout import RolloutState, begin
from tasks.release.switch import Parts, switch
from tasks.release.switch import rollback as roll_back
from tasks.replicas import (
    await_ready,
    fetch_package,
    package_at_hand,
    ready_endpoints,
    retire_replicas,
    served_digests,
    start_replicas,
    stop_replicas,
)
from tasks.site import Site
from tasks.spec.errors import BadRequest, Refused, TryAgain
from tasks.spec.load import load_workload
from tasks.spec.rules import Rule
from tasks.spec.value import Value

if TYPE_CHECKING:
    import httpx


class ServesAlready(Refused):
    """The version that is to be released is the champion."""


class Order(Value):
    """What is asked: which version (none for a rollback: the previous one), by whom, why, under which intent."""

    workload: str
    version: str | None
    actor: str
    reason: str
    intent_id: str
    package_sha256: str | None = Field(default=None, description="of the version, as reviewed; else the registry's")
    expected_champion: str | None = Field(default=None, description="what served when the release was reviewed")


def preflight(order: Order, site: Site) -> dict[str, Any]:
    """Check what can be checked before anything moves; what is not at hand is fetched.

    Raises:
        BadRequest: the version is not registered.
        IntegrityLost: its package, or the one that a rollback would go back to, is not what was registered.
        Refused: it is not approved, or another version serves than the one that its review was shown.
    """
    target = _target(order, site)
    check_approved(order, site)
    if site.rollouts.find(order.workload, order.intent_id) is None:
        check_champion(order, site)
    champion = site.ledger.champion(order.workload)
    for version in (target, *([champion] if champion else [])):
        if package_at_hand(order.workload, version, site) is None:
            fetch_package(order.workload, version, site)
    return {"package_sha256": target.digest_sha256, "back_to": champion.version if champion else None}


def start(order: Order, site: Site) -> dict[str, Any]:
    """Start the replicas of a version, or find them running.

    Raises:
        BadRequest: the version is not registered. IntegrityLost: its package is not what was registered.
    """
    target = _target(order, site)
    limit = load_workload(site.workloads, order.workload).serve.requests_per_second
    site.gateway.limit(order.workload, limit)
    replicas = start_replicas(order.workload, target, site)
    return {"service": service_name(order.workload, target.digest_sha256), "replicas": [r.url for r in replicas]}


def ready(order: Order, site: Site) -> dict[str, Any]:
    """Wait until every replica of a version is ready.

    Raises:
        Refused: one is not in the workload's time, or never will be; its log is named. It is stopped.
    """
    target = _target(order, site)
    try:
        return {"endpoints": await_ready(order.workload, target, site)}
    except Refused as error:
        with site.ledger.lease(order.workload):
            if target != site.ledger.champion(order.workload):
                stop_replicas(order.workload, target, site)
            site.ledger.record_event(order.workload, "rollout", order.actor, f"version {target.version}: {error}")
        tag_version(order.workload, target, f"refused: {error}", site)
        raise


def tag_version(workload: str, target: Version, outcome: str, site: Site) -> None:
    """Write a rollout's outcome beside the version in MLflow. Raises TryAgain where it is down."""
    versions.set_version_tag(site.mlflow, workload, target.version, versions.ROLLOUT_TAG, outcome[:500])


def roll(order: Order, site: Site) -> RolloutState:
    """Begin the rollout of a version, or return it as it stands; the reconciler drives it.

    Raises:
        RolloutActive: another one of the workload is under way; ask again when it is over.
        Refused: another version serves than the one that the review was shown.
    """
    if known := site.rollouts.find(order.workload, order.intent_id):
        return known
    target = _target(order, site)
    with site.ledger.lease(order.workload):
        try:
            check_champion(order, site)
        except Refused:
            _abandon(order.workload, target, site)
            raise
        # Found running, as a rule; another release of the same version may have stopped them since.
        start_replicas(order.workload, target, site)
        state = begin(
            rollout_id=order.intent_id,
            workload=order.workload,
            candidate=target,
            champion=site.ledger.champion(order.workload),
            actor=order.actor,
            reason=order.reason,
            plan=load_workload(site.workloads, order.workload).rollout,
            now=time.time(),
        )
        return site.rollouts.begin(state)


def _abandon(workload: str, target: Version, site: Site) -> None:
    """Stop the replicas of a candidate whose rollout never begins; those that serve, have served (they may be warm for
    a rollback) or belong to another release's rollout stay."""
    needed = served_digests(workload, site)
    if active := site.rollouts.active(workload):
        needed.add(active.candidate.digest_sha256)
    if target.digest_sha256 not in needed:
        stop_replicas(workload, target, site)


def check_champion(order: Order, site: Site) -> None:
    """Hold what serves against what the review was shown.

    Raises:
        ServesAlready: the version itself serves. Refused: another one than was shown.
    """
    champion = site.ledger.champion(order.workload)
    if champion and champion.version == order.version:
        raise ServesAlready(f"{order.workload}: version {order.version} serves already")
    if (champion.version if champion else None) != order.expected_champion:
        found = f"version {champion.version}" if champion else "nothing"
        shown = f"version {order.expected_champion}" if order.expected_champion else "nothing"
        raise Refused(f"{order.workload}: {found} serves by now, the review was shown {shown}; release it again")


def promote(order: Order, site: Site) -> dict[str, Any]:
    """Make a version that passed its rollout the champion.

    Raises:
        Refused: its rollout has not passed, or another version serves than when the release was reviewed.
    """
    target = _target(order, site)
    check_approved(order, site)
    check_passed(order, site)
    # Found running, as a rule; another release's retirement may have stopped them since.
    start_replicas(order.workload, target, site)
    endpoints = await_ready(order.workload, target, site)
    served = site.ledger.champion(order.workload)
    intent = switch(
        parts(site),
        order.workload,
        target,
        endpoints,
        expected_champion=order.expected_champion,
        actor=order.actor,
        intent_id=order.intent_id,
        reason=order.reason,
        # Once more: a rollback may have ended the rollout while the replicas were waited for, and it wins.
        check=lambda: check_passed(order, site),
    )
    if served != target == site.ledger.champion(order.workload):
        before = f"before it version {served.version}" if served else "the first one"
        message = f"{order.workload}: version {target.version} serves ({before}), by {order.actor}"
        notify(site, order.workload, "promotion", message)
    return intent.model_dump(mode="json")


def check_passed(order: Order, site: Site) -> None:
    """Raises Refused: the version's rollout has not passed, or was ended."""
    rolled = site.rollouts.find(order.workload, order.intent_id)
    if rolled is None or rolled.phase not in ("passed", "promoted"):
        why = f"{rolled.phase}: {rolled.why}" if rolled else "never begun"
        raise Refused(f"{order.workload}: version {order.version} has not passed its rollout ({why})")


def check_approved(order: Order, site: Site) -> None:
    """Hold the switch itself against the ledger's decision, however the task before it came to its end.

    Raises:
        Refused: the version was rejected, or a review is demanded and nobody approved, or the gate has changed since.
        IntegrityLost: the evidence that was approved is not what the registry holds.
    """
    from tasks.review import question

    asked, name = question(order.workload, order.version, site), f"{order.workload}: version {order.version}"
    if asked.rejected:
        raise Refused(f"{name} was rejected: {asked.rejected}")
    if asked.required and not asked.approved:
        raise Refused(f"{name} is not approved; ./drydock review {order.workload}")
    if asked.approved:
        # A run may have added rules of its own; those of the workload's file must be among them.
        evidence = versions.evidence_of(site.mlflow, asked.version)
        rules = {Rule.model_validate(rule) for rule in evidence.get("rules", ())}
        if not rules.issuperset(load_workload(site.workloads, order.workload).gate.rules):
            how = f"./drydock run {order.workload} judges it anew"
            raise Refused(f"{name} was judged and approved by other gate rules than the workload has now; {how}")


def bake(order: Order, site: Site) -> dict[str, Any]:
    """Ask the champion after its bake time, as a client would.

    Raises:
        TryAgain: it does not answer now.
    """
    answer_golden(order.workload, site)
    return {"answers": True}


def retire(order: Order, site: Site) -> dict[str, Any]:
    """Stop what served before, if this version is still the champion."""
    target = _target(order, site)
    # Under the lease: a rollback that adopts the warm replicas must not lose them a moment later.
    with site.ledger.lease(order.workload):
        champion = site.ledger.champion(order.workload)
        if champion != target or site.ledger.open_intent_of(order.workload):
            return {"stopped": [], "why": f"version {champion.version if champion else 'none'} serves by now"}
        return {"stopped": retire_replicas(order.workload, champion, site)}


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
    "preflight": preflight,
    "start": start,
    "ready": ready,
    "promote": promote,
    "bake": bake,
    "retire": retire,
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
    return Parts(site.ledger, site.gateway, _Aliases(site), site.rollouts)


class _Aliases:
    """The registry's aliases. MLflow's client takes a second or two to import: a rollback moves the traffic first."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def set(self, workload: str, alias: str, version: str | None) -> None:
        versions.Aliases(self._site.mlflow).set(workload, alias, version)

    def get(self, workload: str) -> dict[str, str]:
        return versions.Aliases(self._site.mlflow).get(workload)


def answer_golden(workload: str, site: Site) -> httpx.Response:
    """Ask the champion for its golden sample, through the gateway as a client would; return the answer.

    Raises:
        TryAgain: there is no answer.
    """
    import httpx

    from tasks.registry.register import example_request
    from tasks.serve.package import open_package

    champion = site.ledger.champion(workload)
    if champion is None:
        raise BadRequest(f"{workload}: has no champion; ./drydock run {workload} makes one")
    package = open_package(site.packages / champion.digest_sha256, champion.digest_sha256, site.keys)
    url = f"{site.settings.gateway_url}/v2/models/{workload}/infer"
    try:
        with httpx.Client(verify=trusted(site.settings.gateway_ca), timeout=10, trust_env=False) as client:
            answer = client.post(url, json=example_request(package), headers=site.gateway.client_headers())
    except httpx.HTTPError as error:
        raise TryAgain(f"{workload}: the gateway does not answer: {type(error).__name__}") from None
    if answer.status_code != 200:
        raise TryAgain(f"{workload}: the champion answers {answer.status_code}: {answer.text[:200]}")
    return answer


def trusted(ca: str | None) -> ssl.SSLContext | bool:
    """Return what a client of the gateway trusts: its own certificates where it speaks TLS."""
    return ssl.create_default_context(cafile=ca) if ca else True


def _target(order: Order, site: Site) -> Version:
    if order.version is None:
        raise BadRequest(f"{order.workload}: no version is named")
    if order.package_sha256:
        return Version(version=order.version, digest_sha256=order.package_sha256)
    found = versions.get(site.mlflow, order.workload, order.version)
    return served_version(found)
