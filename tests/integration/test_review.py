"""Reviews against a real registry and ledger: a decision binds to what was shown, and holds at the switch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    DownstreamTasksSkipped,
    ParamValidationError,
)

from tasks.command.review import decide_version
from tasks.delivery import Order, check_approved
from tasks.orchestrate.asked import askers_of
from tasks.orchestrate.review import ReviewOperator
from tasks.registry import versions
from tasks.release.model import Version
from tasks.review import decide, question, record_registration
from tasks.spec.errors import BadRequest, Refused
from tasks.spec.load import load_workload
from tasks.spec.requests import RegisterResult
from tasks.spec.review import Review
from tasks.spec.rules import Gate, Rule

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def registered(digits_run: Any) -> RegisterResult:
    return RegisterResult.model_validate(digits_run.done["register"])


@pytest.fixture
def demanded(digits_run: Any, registered: RegisterResult) -> Any:
    """The digits' version, for which a run demanded a review; undecided again afterwards."""
    record_registration("digits", registered, True, digits_run.site)
    return digits_run.site


def order(version: str) -> Order:
    return Order(workload="digits", version=version, actor="airflow", reason="a test", intent_id="test")


def test_a_demand_of_a_run_is_kept_by_the_ledger_not_by_a_tag(demanded: Any, registered: RegisterResult) -> None:
    asked = question("digits", registered.version, demanded)
    assert asked.required
    assert registered.package_sha256 in asked.body
    rows = len(demanded.ledger.history("digits"))
    record_registration("digits", registered, True, demanded)
    assert len(demanded.ledger.history("digits")) == rows, "the same demand twice is one row"


def test_the_switch_itself_holds_the_decision(demanded: Any, registered: RegisterResult) -> None:
    with pytest.raises(Refused, match="is not approved"):
        check_approved(order(registered.version), demanded)
    asked = question("digits", registered.version, demanded)
    decide(asked, True, "rita", "looks right", demanded)
    check_approved(order(registered.version), demanded)
    assert "rita" in question("digits", registered.version, demanded).approved
    decide(asked, False, "vic", "it does not", demanded)
    with pytest.raises(Refused, match="was rejected: vic"):
        check_approved(order(registered.version), demanded)


def test_an_approval_is_void_for_another_package(demanded: Any, registered: RegisterResult) -> None:
    """MLflow has no login: whoever edits a version's tags must not bring an approval along."""
    decide(question("digits", registered.version, demanded), True, "rita", "looks right", demanded)
    tag = versions.PACKAGE_TAG
    versions.set_version_tag(demanded.mlflow, "digits", registered.version, tag, "0" * 64)
    try:
        assert question("digits", registered.version, demanded).approved == ""
    finally:
        versions.set_version_tag(demanded.mlflow, "digits", registered.version, tag, registered.package_sha256)
    assert question("digits", registered.version, demanded).approved


def test_a_version_that_was_registered_by_hand_is_refused(demanded: Any, registered: RegisterResult) -> None:
    client = demanded.mlflow
    known = client.get_model_version("digits", registered.version)
    by_hand = str(client.create_model_version("digits", known.source, known.run_id).version)
    try:
        with pytest.raises(BadRequest, match="was not registered by Drydock"):
            question("digits", by_hand, demanded)
    finally:
        client.delete_model_version("digits", by_hand)


@pytest.mark.parametrize(
    ("rules", "who", "told"),
    [
        (Review(two_person=True), "tom", "two-person rule"),
        (Review(approvers=("rita",)), "tom", "must be one of rita"),
    ],
)
def test_who_may_not_decide(demanded: Any, registered: RegisterResult, rules: Review, who: str, told: str) -> None:
    asked = question("digits", registered.version, demanded)
    with pytest.raises(Refused, match=told):
        decide(asked, True, who, "I made it myself", demanded, askers=("tom",), rules=rules)
    row = demanded.ledger.history("digits")[-1]
    assert (row.action, row.actor) == ("decision refused", who)
    assert told in row.reason


def test_who_had_it_trained_may_not_approve_it_whoever_releases_it(demanded: Any, registered: RegisterResult) -> None:
    record_registration("digits", registered, True, demanded, ("vic",))
    asked, rules = question("digits", registered.version, demanded), Review(two_person=True)
    with pytest.raises(Refused, match="vic asked for its training"):
        decide(asked, True, "vic", "released by rita", demanded, askers=("rita",), rules=rules)
    assert demanded.ledger.history("digits")[-1].actor == "vic"
    decide(asked, False, "vic", "anyone may doubt it", demanded, askers=("rita",), rules=rules)
    decide(asked, True, "wim", "looks right", demanded, askers=("rita",), rules=rules)


def test_under_two_person_an_approval_by_the_command_is_refused_and_kept(
    demanded: Any, registered: RegisterResult, monkeypatch: Any
) -> None:
    described = load_workload(demanded.workloads, "digits")
    described = described.model_copy(update={"review": Review(two_person=True)})
    monkeypatch.setattr("tasks.command.review.load_workload", lambda *_: described)
    with pytest.raises(Refused, match="wants a login"):
        decide_version(demanded, "digits", registered.version, True, "looks right", "root")
    row = demanded.ledger.history("digits")[-1]
    assert (row.action, row.actor) == ("decision refused", "root")


def last_decision(site: Any, registered: RegisterResult) -> Any:
    return site.ledger.decision(
        "digits", Version(version=registered.version, digest_sha256=registered.package_sha256)
    )


@pytest.fixture
def airflow(demanded: Any, registered: RegisterResult, monkeypatch: Any) -> Any:
    """The review task as Airflow resumes it: a function of the event, for a release that tom asked for by hand."""
    monkeypatch.setattr("tasks.orchestrate.review.Site", lambda: demanded)
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr("tasks.orchestrate.review.notify", lambda site, *said: told.append(said))
    with DAG("release_digits", schedule=None):
        task = ReviewOperator(task_id="review", workload="digits", response_timeout=timedelta(days=14))
        task >> BaseOperator(task_id="preflight")
    shown = SimpleNamespace(
        xcom_pull=lambda task_ids, key: registered.evidence_sha256, xcom_push=lambda **_: None, map_index=-1
    )
    run = SimpleNamespace(triggering_user_name="admin", conf={"asked_by": "tom"})
    context = {"params": {"version": registered.version}, "ti": shown, "dag_run": run, "task": task}
    return SimpleNamespace(resume=lambda event: task.execute_complete(context, event), told=told)


def answer(who: str, reason: str | None) -> dict[str, Any]:
    params = {} if reason is None else {"reason": reason}
    at = datetime.now(UTC)
    return {
        "chosen_options": ["Approve"],
        "params_input": params,
        "responded_at": at,
        "responded_by_user": {"id": who, "name": who},
    }


@pytest.mark.parametrize("reason", [None, "", "  ", "ok"])
def test_an_answer_without_a_reason_is_asked_for_again(demanded: Any, airflow: Any, reason: str | None) -> None:
    rows = len(demanded.ledger.history("digits"))
    with pytest.raises((AirflowException, ParamValidationError)) as caught:
        airflow.resume(answer("rita", reason))
    assert not isinstance(caught.value, AirflowFailException), "a failure would not be tried again"
    assert len(demanded.ledger.history("digits")) == rows


def test_an_answer_in_airflow_is_the_decision_of_who_gave_it(
    demanded: Any, registered: RegisterResult, airflow: Any
) -> None:
    decide(question("digits", registered.version, demanded), False, "vic", "I doubt it", demanded)
    done = airflow.resume(answer("rita", "looks right"))
    assert (done["by"], done["reason"]) == ("rita", "looks right")
    decision = last_decision(demanded, registered)
    assert (decision.kind, decision.actor, decision.reason) == ("approval", "rita", "looks right")
    assert airflow.told[-1][:2] == ("digits", "approval")


def test_a_rejection_in_airflow_is_kept_and_skips_the_rest_of_the_release(
    demanded: Any, registered: RegisterResult, airflow: Any
) -> None:
    decide(question("digits", registered.version, demanded), True, "rita", "looks right", demanded)
    with pytest.raises(DownstreamTasksSkipped) as skipped:
        airflow.resume(answer("vic", "wrong labels") | {"chosen_options": ["Reject"]})
    assert list(skipped.value.tasks) == ["preflight"]
    decision = last_decision(demanded, registered)
    assert (decision.kind, decision.actor, decision.reason) == ("rejection", "vic", "wrong labels")
    assert airflow.told[-1][:2] == ("digits", "rejection")


def test_what_was_rejected_stays_so_when_it_is_judged_anew(
    demanded: Any, registered: RegisterResult, monkeypatch: Any
) -> None:
    asked = question("digits", registered.version, demanded)
    decide(asked, False, "vic", "wrong labels", demanded)
    anew = asked.version.model_copy(update={"evidence_sha256": "d" * 64})
    monkeypatch.setattr(versions, "get", lambda *_: anew)
    assert "vic" in question("digits", registered.version, demanded).rejected
    monkeypatch.undo()
    decide(asked, True, "rita", "they were right", demanded)
    monkeypatch.setattr(versions, "get", lambda *_: anew)
    again = question("digits", registered.version, demanded)
    assert (again.rejected, again.approved) == ("", ""), "an approval is of its evidence alone"


def test_nobody_answers(airflow: Any) -> None:
    with pytest.raises(AirflowFailException, match="nobody answered within 14 days"):
        airflow.resume({"error": "no response", "error_type": "timeout"})


def test_those_who_asked_are_airflows_user_and_whose_command_it_was() -> None:
    asked = [("admin", {"asked_by": "tom"}), ("rita", None), (None, {})]
    runs = [SimpleNamespace(triggering_user_name=name, conf=conf) for name, conf in asked]
    assert [askers_of({"dag_run": run}) for run in runs] == [("admin", "tom"), ("rita",), ()]


def test_an_approval_is_void_when_the_gate_changes(
    demanded: Any, registered: RegisterResult, monkeypatch: Any
) -> None:
    decide(question("digits", registered.version, demanded), True, "rita", "looks right", demanded)
    described = load_workload(demanded.workloads, "digits")
    softer = Gate(rules=described.gate.rules[:1])
    monkeypatch.setattr("tasks.delivery.load_workload", lambda *_: described.model_copy(update={"gate": softer}))
    check_approved(order(registered.version), demanded)  # It was judged by this, and by more.
    harder = Gate(rules=(*described.gate.rules, Rule(metric="macro_f1", min=0.99)))
    monkeypatch.setattr("tasks.delivery.load_workload", lambda *_: described.model_copy(update={"gate": harder}))
    with pytest.raises(Refused, match=r"judged and approved by other gate rules.*drydock run digits judges it anew"):
        check_approved(order(registered.version), demanded)
    monkeypatch.undo()
    check_approved(order(registered.version), demanded)


def test_an_answer_counts_for_the_evidence_that_was_shown_alone(demanded: Any, registered: RegisterResult) -> None:
    asked = question("digits", registered.version, demanded)
    with pytest.raises(Refused, match="rita was shown 000000000000"):
        decide(asked, True, "rita", "replayed", demanded, shown="0" * 64)
    assert demanded.ledger.history("digits")[-1].action == "decision refused"
    decide(asked, True, "rita", "looks right", demanded, shown=registered.evidence_sha256)


def test_an_approval_of_evidence_that_was_edited_is_refused_and_kept(demanded: Any, registered: RegisterResult) -> None:
    """A forged digest in MLflow's tag, or another pack under the run, is not what the gate judged."""
    tag = versions.EVIDENCE_TAG
    versions.set_version_tag(demanded.mlflow, "digits", registered.version, tag, "f" * 64)
    try:
        asked = question("digits", registered.version, demanded)
        with pytest.raises(Refused, match=f"has no evidence {'f' * 12}"):
            decide(asked, True, "eve", "trust me", demanded)
        assert question("digits", registered.version, demanded).approved == ""
    finally:
        versions.set_version_tag(demanded.mlflow, "digits", registered.version, tag, registered.evidence_sha256)
    assert "eve" in {row.actor for row in demanded.ledger.history("digits") if row.action == "decision refused"}


def test_a_version_whose_upload_was_cut_cannot_be_approved(
    demanded: Any, registered: RegisterResult, tmp_path_factory: Any
) -> None:
    """Though the whole one lies at hand, where registration left it."""
    asked = question("digits", registered.version, demanded)
    stored = "mlflow-home[0-9]*/mlflow/artifacts/*"
    pattern = f"{stored}/{asked.version.run_id}/artifacts/model-*/package/model.onnx"
    (model,) = tmp_path_factory.getbasetemp().glob(pattern)
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(Refused, match=r"model\.onnx has digest another size.*; it can't be approved"):
            decide(asked, True, "rita", "looks right", demanded)
    finally:
        model.write_bytes(whole)
    decide(asked, True, "rita", "looks right", demanded)


def test_no_version_and_no_such_version_list_those_there_are(demanded: Any, registered: RegisterResult) -> None:
    for version in (None, "77"):
        with pytest.raises(BadRequest, match=f"registered: .*{registered.version}"):
            question("digits", version, demanded)
