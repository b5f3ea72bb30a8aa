"""``drydock review``: the versions that wait for a person, and the person's decision."""

from __future__ import annotations

from tasks.notify import notify
from tasks.orchestrate.api import AirflowApi
from tasks.registry import versions
from tasks.review import Question, decide, question, record_refusal
from tasks.site import Site
from tasks.spec.errors import BadRequest, Refused
from tasks.spec.load import load_workload


def waiting(site: Site, workload: str) -> list[Question]:
    """Return the questions of a workload that nobody has answered."""
    load_workload(site.workloads, workload)
    found = [question(workload, v.version, site) for v in versions.list_versions(site.mlflow, workload)]
    return [q for q in found if q.required and not (q.serves or q.approved or q.rejected)]


def decide_version(site: Site, workload: str, version: str, approve: bool, reason: str, who: str) -> None:
    """Decide one version: the ledger keeps it, and the release that waits in Airflow goes on.

    Raises:
        BadRequest: no reason, or no such version. Refused: the two-person rule.
    """
    if not reason.strip():
        raise BadRequest("--reason is empty, must say why; it is kept in the ledger")
    rules = load_workload(site.workloads, workload).review
    asked = question(workload, version, site)
    if rules.two_person and approve:
        why = f"{workload}: review.two_person wants a login; approve in Airflow under Required Actions"
        record_refusal(workload, asked.version, who, why, site)
        raise Refused(why)
    decide(asked, approve, who, reason, site, rules=rules)
    notify(site, workload, "approval" if approve else "rejection", f"{asked.title} {who}: {reason}")
    api = AirflowApi(site)
    for detail in api.waiting_reviews():
        if detail["subject"] == asked.title:
            api.answer_review(detail, "Approve" if approve else "Reject", reason)
