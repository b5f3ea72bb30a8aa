"""The review: one place of waiting, three doors (Airflow's form, ``drydock review``, a tag in MLflow).

An approval binds to the digest of the version's evidence pack; the ledger keeps it with its author.
"""

from __future__ import annotations

from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator, HITLOperator
from airflow.sdk import Param, ParamsDict
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from tasks import review
from tasks.notify import notify
from tasks.orchestrate.asked import askers_of, version_asked
from tasks.orchestrate.environment import USER
from tasks.orchestrate.operator import as_airflow
from tasks.site import Site
from tasks.spec.load import load_workload

# Under this key the task keeps the digest of the evidence that its form shows: the answer binds to that.
SHOWN = "evidence_sha256"
REASON_CHARACTERS = 3


def _form() -> ParamsDict:
    """What the form demands beside the choice. Airflow wants a task's own parameters to be right when it starts."""
    reason = Param("", type="string", minLength=REASON_CHARACTERS, description="kept with your name")
    return ParamsDict({"reason": reason})


class ReviewOperator(ApprovalOperator):
    """Asks a person where the workload or the run demands it; goes on at once where the answer is known."""

    def __init__(self, *, workload: str, **kwargs: Any) -> None:
        super().__init__(subject=f"Release {workload}?", **kwargs)
        self.workload = workload

    def execute(self, context: Any) -> Any:
        with as_airflow():
            site = Site()
            asked = review.question(self.workload, version_asked(context), site)
            if why := self._nothing_to_do(asked, by_hand=bool(dict(context["params"]).get("version"))):
                raise AirflowSkipException(f"version {asked.version.version} {why}")
            if asked.approved or not (asked.required or asked.rejected):
                self.log.info("no person is asked: %s", asked.approved or "the workload demands no review")
                return asked.model_dump(mode="json")
            self.subject, self.body = asked.title, asked.body
            # Our own user answers for those who decide by the command; see execute_complete.
            self.assigned_users = [{"id": name, "name": name} for name in (*asked.approvers, USER)]
            if not asked.approvers:
                self.assigned_users = None
            context["ti"].xcom_push(SHOWN, asked.version.evidence_sha256)
            notify(site, self.workload, "review", f"{asked.title} {site.settings.airflow_url}/required_actions")
        self.params = _form()
        return super().execute(context)

    @staticmethod
    def _nothing_to_do(asked: review.Question, by_hand: bool) -> str:
        """Why no release is needed, or empty. What was rejected or rolled back comes again only by hand: an
        unchanged retrain registers the same version once more."""
        if asked.serves:
            return "is the champion already"
        if by_hand:
            return ""
        if asked.rejected:
            return f"was rejected: {asked.rejected}"
        return "served before and was replaced; release it by hand" if asked.served_before else ""

    def execute_complete(self, context: Any, event: dict[str, Any]) -> Any:
        if event.get("error_type") == "timeout":
            raise AirflowFailException(
                f"Refused: nobody answered within {self.response_timeout}; release the version by hand to ask again"
            )
        self.params = _form()
        answered = HITLOperator.execute_complete(self, context, event)
        approved = answered["chosen_options"][0] == self.APPROVE
        who = (answered.get("responded_by_user") or {}).get("name") or "unnamed"
        reason = str(answered["params_input"].get("reason") or "").strip()
        if len(reason) < REASON_CHARACTERS:
            # Airflow tries the task again, a few times, which asks again.
            raise AirflowException(f"Refused: {who} gave no reason; it is kept with the decision. Asked again")
        with as_airflow():
            site = Site()
            asked = review.question(self.workload, version_asked(context), site)
            if not (asked.approved if approved else asked.rejected):
                # Not decided by the command before, so this answer is the decision.
                rules = load_workload(site.workloads, self.workload).review
                shown = context["ti"].xcom_pull(task_ids=self.task_id, key=SHOWN)
                review.decide(asked, approved, who, reason, site, askers_of(context), rules, shown)
                notify(site, self.workload, "approval" if approved else "rejection", f"{asked.title} {who}: {reason}")
        # Last: where the answer is no, this ends the task with what comes after it skipped.
        super().execute_complete(context, event)
        return asked.model_dump(mode="json") | {"answer": answered["chosen_options"][0], "by": who, "reason": reason}
