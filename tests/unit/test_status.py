"""What ``status`` says of a workload that needs a person, and the names that no command knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tasks.cli import cli
from tasks.command.status import status_of, status_text
from tasks.release.model import Version
from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.settings import resolve
from tasks.store.events import record_event

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "workloads" / "digits", tmp_path / "workloads" / "digits")
    for name, value in {"HOME": tmp_path, "ROOT": ROOT, "WORKLOADS": tmp_path / "workloads"}.items():
        monkeypatch.setenv(f"DRYDOCK_{name}", str(value))
    return tmp_path


def said(home):
    return status_text(status_of(Site(resolve())))


def test_a_failure_stays_with_its_workload_however_many_events_follow(home):
    record_event(home, "failure", "retrain_digits.ingest: d.csv: is empty", workload="digits")
    for number in range(30):
        record_event(home, "failure", f"retrain_other.train: {number}", workload="other")
    assert "retrain_digits.ingest: d.csv: is empty" in said(home).partition("LAST EVENTS")[0]
    record_event(home, "promotion", "digits: version 1 serves", workload="digits")
    assert "d.csv: is empty" not in said(home)


@pytest.mark.parametrize("command", [["history", "nope"], ["rollback", "nope", "--reason", "a test"]])
def test_a_name_that_nothing_knows_is_a_bad_request(home, command):
    found = CliRunner().invoke(cli, command)
    assert isinstance(found.exception, BadRequest) or found.exit_code == 30
    assert "nope" in str(found.exception) + found.output


def test_a_ledger_in_another_database_is_looked_at_too(home, tmp_path, monkeypatch):
    """As in the compose stack: there is no ledger.db in the home."""
    (tmp_path / "url").write_text(f"sqlite:///{tmp_path / 'elsewhere.db'}")
    assert not Site(resolve()).has_ledger
    monkeypatch.setenv("DRYDOCK_LEDGER_DATABASE", str(tmp_path / "url"))
    site = Site(resolve())
    site.ledger.open_intent(
        "digits", "promote", Version(version="7", digest_sha256="a" * 64), None, actor="rita", reason="", intent_id="p"
    )
    site.ledger.commit("p")
    assert not (site.home / "ledger.db").exists()
    found = next(one for one in status_of(site)["workloads"] if one["workload"] == "digits")
    assert found["champion"] == "7"
