"""History for people: the ledger's rows, what served at a time, and the time inside a passport."""

from __future__ import annotations

import datetime as dt
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.history import _answer, history_text, origin_of, served_at, ulid_time
from tasks.release.model import Version
from tasks.serve.passport import Ulids
from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.settings import resolve

pytestmark = pytest.mark.timeout(60)
DIGEST = hashlib.sha256(b"package").hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(resolve({"DRYDOCK_HOME": str(tmp_path / "home")}))


def promote(site: Site, number: int, reason: str = "better") -> None:
    ledger = site.ledger
    champion = ledger.champion("digits")
    version = Version(version=str(number), digest_sha256=hashlib.sha256(str(number).encode()).hexdigest())
    name = f"promote-{number}"
    ledger.open_intent(
        "digits", "promote", version, champion and champion.version, actor="rita", reason=reason, intent_id=name
    )
    ledger.commit(name)


def test_the_rows_are_lines_that_say_who_when_and_why(site):
    promote(site, 1)
    promote(site, 2, "smaller")
    rows = [row.model_dump(mode="json") for row in site.ledger.history("digits")]
    site.ledger.verify()
    lines = history_text("digits", rows).splitlines()
    assert "verify" in lines[0]
    assert len(lines) == 1 + len(rows)
    assert "version 2" in lines[-1]
    assert "(before: 1)" in lines[-1]
    assert "rita: smaller" in lines[-1]
    assert not any(line != line.rstrip() for line in lines)


def test_no_rows_is_a_line_too():
    assert len(history_text("digits", []).splitlines()) == 1


def test_what_served_at_a_time(site):
    before = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=5)
    promote(site, 1)
    middle = dt.datetime.now(dt.UTC)
    promote(site, 2)
    later = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=5)
    assert served_at(site, "digits", middle.isoformat())["version"] == "1"
    assert served_at(site, "digits", later.replace(tzinfo=None).isoformat())["version"] == "2"
    with pytest.raises(BadRequest, match="digits: nothing served at"):
        served_at(site, "digits", before.isoformat())


@pytest.mark.parametrize("text", ["yesterday", "", "2026-13-01", "12:00"])
def test_what_is_no_time_is_refused(site, text):
    with pytest.raises(BadRequest, match="must be an ISO 8601 time"):
        served_at(site, "digits", text)


def test_a_passport_carries_its_time():
    before = dt.datetime.now(dt.UTC)
    found = ulid_time(Ulids()())
    assert abs((found - before).total_seconds()) < 5


@given(st.text("0123456789ABCDEFGHJKMNPQRSTVWXYZ", min_size=26, max_size=26))
def test_any_ulid_has_a_time_or_is_refused(text):
    if text[0] in "01234567" and text[:2] < "75":
        assert ulid_time(text).year < 10_000
    elif text[0] not in "01234567":
        with pytest.raises(BadRequest, match=text):
            ulid_time(text)


@pytest.mark.parametrize(
    "passport",
    [
        *("", "x", DIGEST, f"{DIGEST}.", f"{DIGEST}.01", f"{DIGEST[:-1]}.{'0' * 26}", f"{DIGEST[:-1]}'.{'0' * 26}"),
        *(f"{DIGEST}.{'U' * 26}", f"{DIGEST}.{'Z' * 26}"),
    ],
)
def test_what_is_no_passport_is_refused_before_anything_is_asked(site, passport):
    with pytest.raises(BadRequest, match=r"--passport"):
        origin_of(site, "digits", passport)


@pytest.mark.parametrize(("probability", "told"), [(0.9123, "3.5 (0.912)"), (None, "3.5")])
def test_an_answer_is_told_with_its_probability_where_it_has_one(site, monkeypatch, probability, told):
    """A number that was answered has none."""
    rows = [{"label": "3.5", "probability": probability}]
    monkeypatch.setattr("tasks.history.find_prediction", lambda folder, passport: rows)
    assert _answer(site, "digits", f"{DIGEST}.x") == told
