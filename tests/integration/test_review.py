"""Reviews against a real registry and ledger: a decision binds to what was shown, and holds at the switch."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.delivery import Order, check_approved
from tasks.registry import versions
from tasks.review import decide, question, record_registration
from tasks.spec.errors import BadRequest, Refused
from tasks.spec.requests import RegisterResult
from tasks.spec.review import Review

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
        decide(asked, True, who, "I made it myself", demanded, trigger_of="tom", rules=rules)
    row = demanded.ledger.history("digits")[-1]
    assert (row.action, row.actor) == ("decision refused", who)
    assert told in row.reason


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
        with pytest.raises(Refused, match=f"must be {'f' * 12}"):
            decide(asked, True, "eve", "trust me", demanded)
        assert question("digits", registered.version, demanded).approved == ""
    finally:
        versions.set_version_tag(demanded.mlflow, "digits", registered.version, tag, registered.evidence_sha256)
    assert "eve" in {row.actor for row in demanded.ledger.history("digits") if row.action == "decision refused"}


def test_a_version_whose_upload_was_cut_cannot_be_approved(
    demanded: Any, registered: RegisterResult, tmp_path_factory: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    asked = question("digits", registered.version, demanded)
    monkeypatch.setattr(demanded, "packages", tmp_path / "none at hand")
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
