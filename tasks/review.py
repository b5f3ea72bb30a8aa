"""What a reviewer is asked, and what the answer binds to."""

from __future__ import annotations

from typing import Any

from tasks.delivery import served_version
from tasks.registry import versions
from tasks.release.model import Version as Served
from tasks.site import Site
from tasks.spec.errors import BadRequest, IntegrityLost, Refused
from tasks.spec.load import load_workload
from tasks.spec.requests import RegisterResult
from tasks.spec.review import Review
from tasks.spec.value import Value

REGISTERED = "registered"


class Question(Value):
    """One version that may be released, with what is known about it."""

    workload: str
    version: versions.Version
    title: str
    body: str
    required: bool
    serves: bool
    served_before: bool = False
    champion: str | None = None
    approved: str = ""
    rejected: str = ""
    approvers: tuple[str, ...] = ()


def question(workload: str, version: str | None, site: Site) -> Question:
    """Return the question about one version.

    Raises:
        BadRequest: no version is named, or it is not registered.
    """
    if version is None:
        known = ", ".join(v.version for v in versions.list_versions(site.mlflow, workload)) or "none"
        raise BadRequest(f"{workload}: no version is named; registered: {known}")
    found = versions.get(site.mlflow, workload, version)
    rules = load_workload(site.workloads, workload).review
    target = served_version(found)
    # MLflow's tags can be edited by anyone: a decision counts for the package that it was made on.
    decision = site.ledger.decision(workload, target)
    if decision and decision.kind == "approval" and decision.detail["evidence_sha256"] != found.evidence_sha256:
        decision = None
    champion = site.ledger.champion(workload)
    told = f"{decision.actor}, {decision.at}: {decision.reason}" if decision else ""
    return Question(
        workload=workload,
        version=found,
        title=f"Release {workload} version {version} ({found.tags.get('drydock.variant', '?')})?",
        body=_body(found, champion, site),
        required=rules.required or review_demanded(workload, target, site),
        served_before=any(r.kind == "commit" and r.target == target for r in site.ledger.history(workload)),
        champion=champion.version if champion else None,
        serves=champion is not None and champion.version == version,
        approved=told if decision and decision.kind == "approval" else "",
        rejected=told if decision and decision.kind == "rejection" else "",
        approvers=rules.approvers,
    )


def record_registration(
    workload: str, result: RegisterResult, review_required: bool, site: Site, asked_by: tuple[str, ...] = ()
) -> None:
    """Write into the ledger what was registered, who asked for it, and whether its run demanded a review; once each."""
    demanded = {"package_sha256": result.package_sha256, "version": result.version}
    demanded |= {"evidence_sha256": result.evidence_sha256, "review_required": review_required}
    demanded |= {"asked_by": list(asked_by)}
    if demanded not in _registrations(workload, result.package_sha256, site):
        site.ledger.record_event(workload, REGISTERED, "drydock", f"version {result.version} was registered", demanded)


def review_demanded(workload: str, target: Served, site: Site) -> bool:
    """Whether any run that registered this package demanded a review."""
    return any(demand.get("review_required") for demand in _registrations(workload, target.digest_sha256, site))


def makers(workload: str, target: Served, site: Site) -> frozenset[str]:
    """Return who asked for the runs that registered this package, as Airflow and ``./drydock run`` know them."""
    told = _registrations(workload, target.digest_sha256, site)
    return frozenset(name for each in told for name in each.get("asked_by", ()))


def _registrations(workload: str, package_sha256: str, site: Site) -> list[dict[str, Any]]:
    rows = [row.detail for row in site.ledger.history(workload) if row.action == REGISTERED]
    return [told for told in rows if told["package_sha256"] == package_sha256]


def decide(
    asked: Question,
    approve: bool,
    who: str,
    reason: str,
    site: Site,
    askers: tuple[str, ...] = (),
    rules: Review | None = None,
    shown: str | None = None,
) -> None:
    """Write the decision into the ledger, bound to the evidence that was shown. One that is refused is in it too.

    ``askers`` are those who asked for the release; who asked for the training, the ledger knows.

    Raises:
        Refused: under the two-person rule, where the one who asked for the training or the release approves; one who
            is no approver; an approval of evidence that is no longer the version's, or of a package that is not
            whole where the registry keeps it.
    """
    if why := _refusal(asked, approve, who, site, askers, rules, shown):
        record_refusal(asked.workload, asked.version, who, why, site)
        raise Refused(why)
    served = served_version(asked.version)
    record = site.ledger.record_approval if approve else site.ledger.record_rejection
    record(asked.workload, served, asked.version.evidence_sha256, who, reason)
    value = f"{'approved' if approve else 'rejected'} by {who}: {reason}"
    versions.set_version_tag(site.mlflow, asked.workload, asked.version.version, versions.DECISION_TAG, value)


def record_refusal(workload: str, version: versions.Version, who: str, why: str, site: Site) -> None:
    """Write into the ledger that a decision did not count."""
    detail = {"version": version.version, "evidence_sha256": version.evidence_sha256}
    site.ledger.record_event(workload, "decision refused", who, why, detail)


def _refusal(
    asked: Question,
    approve: bool,
    who: str,
    site: Site,
    askers: tuple[str, ...],
    rules: Review | None,
    shown: str | None,
) -> str:
    """Why a decision does not count, or empty. Only an approval needs its evidence: anyone may say no to a doubt."""
    if rules and rules.two_person and approve:
        if who in makers(asked.workload, served_version(asked.version), site):
            return f"{asked.title} {who} asked for its training; the two-person rule wants another approver"
        if who in askers:
            return f"{asked.title} {who} asked for this release; the two-person rule wants another approver"
    if rules and rules.approvers and who not in rules.approvers:
        return f"{asked.workload}: {who} may not decide, must be one of {', '.join(rules.approvers)}"
    if not approve:
        return ""
    if shown is not None and shown != asked.version.evidence_sha256:
        return f"{asked.title} its evidence is {asked.version.evidence_sha256[:12]}, {who} was shown {shown[:12]}"
    try:
        versions.evidence_of(site.mlflow, asked.version)
        versions.check_stored(site.mlflow, asked.version, site.keys)
    except IntegrityLost as error:
        return f"{error}; it can't be approved"
    return ""


def _body(found: versions.Version, champion: Any, site: Site) -> str:
    """The evidence in Markdown: the card's core and where the rest is."""
    page = f"{site.settings.mlflow_url}/#/models/{found.workload}/versions/{found.version}"
    serving = f"version {champion.version}" if champion else "nothing yet"
    return "\n".join(
        [
            f"Serving now: {serving}. [The card of version {found.version} in MLflow]({page})",
            "",
            "| | |",
            "|---|---|",
            f"| verdict | {found.tags.get('drydock.verdict', '?')}: {found.tags.get('drydock.why', '')} |",
            f"| dataset revision | `{found.tags.get('drydock.dataset_revision', '?')}` |",
            f"| package | `{found.package_sha256}` |",
            f"| evidence pack | `{found.evidence_sha256}` |",
        ]
    )
