"""Personal data: what is found, what becomes of it, and that nothing behind the ingest can hold it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.data.ingest import ingest, resolve
from tasks.data.personal import find, is_iban, is_resident_id, luhn
from tasks.data.privacy import key_id
from tasks.spec.data import Data
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.feature import TableFeature, TextFeature, TokensFeature
from tasks.spec.label import Label
from tasks.spec.privacy import KINDS, WATCH, Privacy
from tasks.spec.requests import IngestRequest
from tasks.spec.source import FilesSource

pytestmark = pytest.mark.timeout(60)
REGIONS = ("US", "GB", "CN")
# Numbers that their makers publish as examples; none is anybody's.
CARD, IBAN, RESIDENT = "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "11010519491231002X"
KEY = bytes(range(32))


def found(text: str) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for item in find(text, KINDS, REGIONS):
        kinds.setdefault(item.kind, []).append(text[item.start : item.end])
    return kinds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail bob.o'neil+x@mail.example.co.uk now", {"email": ["bob.o'neil+x@mail.example.co.uk"]}),
        (f"card {CARD}, exp 12/29", {"card": [CARD]}),
        (f"pay {IBAN} AND go", {"iban": [IBAN]}),
        ("at 10.0.0.1 and 2001:db8::1, 12:30:45", {"ip": ["10.0.0.1", "2001:db8::1"]}),
        ("ssn 123-45-6789", {"ssn": ["123-45-6789"]}),
        ("(212) 555-2368 or +44 20 7946 0958", {"phone": ["(212) 555-2368", "+44 20 7946 0958"]}),
        (f"身份证{RESIDENT}，手机13912345678", {"resident_id": [RESIDENT], "phone": ["13912345678"]}),
        ("在北京市朝阳区建国路88号3号楼502室工作", {"address": ["在北京市朝阳区建国路88号3号楼502室"]}),
        ("联系人：张伟", {"name": ["张伟"]}),
        ("王先生好", {"name": ["王"]}),
        ("Dr. Jane Smith, 10 High Street", {"name": ["Jane Smith"], "address": ["10 High Street"]}),
        ("13912345678, full width １３９１２３４５６７８", {"phone": ["13912345678", "１３９１２３４５６７８"]}),
    ],
)
def test_each_kind_is_found_in_its_english_and_chinese_forms(text, expected):
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",
        "DE89 3704 0044 0532 0130 01",
        "110105194912310021",
        "11010519490231002X",
        "000-12-3456, 666-12-3456, 123-00-4567",
        "order 2345678901 of 2026-11-26 12:30, total 1,234,567.89",
        "300.1.1.1 and std::vector",
        "a @ b, user@, @home",
        "5 of 12 people went to the street",
    ],
)
def test_what_fails_its_checksum_or_form_is_left(text):
    assert found(text) == {}


def test_checksums_know_their_published_examples():
    assert luhn("79927398713")
    assert not luhn("79927398710")
    assert is_iban("GB82WEST12345698765432")
    assert not is_iban("GB82WEST12345698765433")
    assert is_resident_id(RESIDENT)
    assert not is_resident_id("110105194912310029")


def run(folder: Path, privacy: Privacy, rows: list[dict[str, object]], feature=None, columns=None, key=KEY, **more):
    (folder / "d.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    source = FilesSource(kind="files", path="d.jsonl")
    request = IngestRequest(
        workload="w",
        source=source,
        files=resolve(source, folder),
        feature=feature or TextFeature(kind="text"),
        label=more.pop("label", Label(classes=("x", "y"))),
        columns=columns or {},
        privacy=privacy,
        privacy_key_id=key_id(KEY) if privacy.hashes else None,
        **more,
    )
    result = ingest(request, folder / "room", key=key)
    return result, pq.read_table(folder / "room" / "raw.parquet")


ROWS = [
    {"text": "write to Ann@Example.org or ann@example.org", "label": "x", "who": "Ann Lee", "zip": "10115"},
    {"text": f"my card is {CARD}", "label": "y", "who": None, "zip": "10117"},
    {"text": "nothing here", "label": "x", "who": "Ann Lee", "zip": "20095"},
]


def test_each_action_does_what_it_says_and_the_receipt_counts_it(tmp_path):
    privacy = Privacy(
        actions={"email": "hash", "card": "generalise"},
        columns={
            "who": {"kind": "name", "action": "hash"},
            "zip": {"action": "generalise", "first": 3},
        },
    )
    result, table = run(tmp_path, privacy, ROWS, columns={"who": "text", "zip": "text"})
    texts = table.column("text").to_pylist()
    one, two = (word for word in texts[0].split() if word.startswith("["))
    assert one == two
    assert one.startswith("[email:")
    assert "@" not in texts[0]
    assert texts[1:] == ["my card is [card of 16 digits]", "nothing here"]
    who = table.column("who").to_pylist()
    assert who[0] == who[2] != "Ann Lee"
    assert who[1] is None
    assert len(who[0]) == 16
    assert table.column("zip").to_pylist() == ["101", "101", "200"]
    counts = {(f.column, f.kind, f.action): (f.cells, f.found) for f in result.privacy.findings}
    assert counts == {
        ("text", "card", "generalise"): (1, 1),
        ("text", "email", "hash"): (1, 2),
        ("who", "name", "hash"): (2, 2),
        ("zip", "other", "generalise"): (3, 3),
    }
    assert result.privacy.key_id == key_id(KEY)
    assert KEY.hex() not in result.model_dump_json()
    left = json.dumps(table.to_pylist()) + result.model_dump_json()
    assert [secret for secret in ("Ann", "ann@", "Ann@", "4111", "10115") if secret in left] == []


def test_another_key_gives_another_hash_and_a_changed_key_is_told(tmp_path):
    privacy = Privacy(actions={"email": "hash"})
    _, table = run(tmp_path, privacy, ROWS)
    with pytest.raises(IntegrityLost, match="key"):
        run(tmp_path, privacy, ROWS, key=bytes(32))
    assert "[email:" in table.column("text")[0].as_py()


def test_a_workload_that_says_nothing_is_watched_and_left(tmp_path):
    result, table = run(tmp_path, WATCH, ROWS, columns={"who": "text", "zip": "text"})
    assert table.column("text").to_pylist() == [row["text"] for row in ROWS]
    assert {(f.kind, f.action) for f in result.privacy.findings} == {("email", "keep"), ("card", "keep")}
    assert result.privacy.suspected == ()
    assert result.privacy.summary == "text: 1 card left as found, text: 2 email left as found"


def test_what_is_refused_names_the_place_and_never_the_value(tmp_path):
    with pytest.raises(BadRequest) as error:
        run(tmp_path, Privacy(actions={"card": "refuse"}), ROWS)
    assert "column 'text', row 2" in str(error.value)
    assert "card" in str(error.value)
    assert "4111" not in str(error.value)


def test_messages_and_quarantines_withhold_values(tmp_path):
    feature = TableFeature(kind="table", columns=("age",))
    rows = [{"age": "41", "label": "x"}, {"age": "ann@example.org", "label": "y"}]
    with pytest.raises(BadRequest) as error:
        run(tmp_path, Privacy(), rows, feature)
    assert "row 2" in str(error.value)
    assert "example" not in str(error.value)
    result, _ = run(tmp_path, Privacy(), rows, feature, bad_rows="quarantine")
    assert result.quarantined_rows == 1
    aside = pq.read_table(tmp_path / "room" / "quarantine.parquet").to_pylist()[0]
    assert "example" not in json.dumps(aside)
    assert "withh" in aside["content"]


def test_words_that_are_masked_stay_as_many(tmp_path):
    words = ["call", "(212)", "555-2368", "or", "ann@example.org", "!"]
    rows = [{"tokens": words, "tags": ["x"] * 6}]
    label, feature = Label(column="tags", classes=("x", "y")), TokensFeature(kind="tokens")
    for action, phone in (("mask", "[phone]"), ("drop", "[phone]"), ("generalise", "[phone_+1]")):
        _, table = run(tmp_path, Privacy(otherwise=action), rows, feature, label=label)
        text = table.column("tokens")[0].as_py()
        assert text.startswith(f"call {phone} {phone} or [email")
        assert len(text.split(" ")) == 6


def test_numbers_are_generalised_down_to_a_multiple(tmp_path):
    feature = TableFeature(kind="table", columns=("age",))
    rows = [{"age": age, "label": "x"} for age in (39, 40, 49.5, None)]
    privacy = Privacy(columns={"age": {"action": "generalise", "width": 10}})
    result, table = run(tmp_path, privacy, rows, feature)
    assert table.column("age").to_pylist() == [30, 40, 40, None]
    assert result.privacy.findings[0].cells == 3


DATA = {
    "source": {"kind": "files", "path": "d.csv"},
    "feature": {"kind": "table", "columns": ["age"]},
    "label": {"classes": ["x", "y"]},
    "columns": {"who": "text"},
}


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"columns": {"age": {"action": "hash"}}}, "privacy.columns.age: holds numbers"),
        ({"columns": {"age": {"action": "drop"}}}, "the model reads it"),
        ({"columns": {"whom": {}}}, "must be one of ['age', 'who']"),
        ({"columns": {"who": {"action": "generalise"}}}, "needs first (of a text) or width"),
        ({"columns": {"who": {"action": "mask", "first": 2}}}, "first needs action = 'generalise'"),
        ({"columns": {"who": {"action": "generalise", "width": 2}}}, "generalise it by first"),
        ({"actions": {"card": "drop"}, "kinds": ["email"]}, "actions.card: is not looked for"),
        ({"anonymity": {"columns": ["who"]}}, "'who' is not in the data set"),
        ({"actions": {"card": "burn"}}, "must"),
    ],
)
def test_a_contradiction_is_refused_by_its_field(privacy, words):
    with pytest.raises(BadRequest) as error:
        Data.parse(DATA | {"privacy": privacy}, "w")
    assert words in str(error.value) or words == "must"
    assert "\n" not in str(error.value)


def test_ids_that_clients_send_are_not_hidden_from_the_model():
    rated = {"feature": {"kind": "ids", "user": "who", "item": "what"}, "columns": {}}
    rated |= {"label": {"kind": "number", "column": "stars", "min": 1, "max": 5}}
    with pytest.raises(BadRequest, match=r"privacy.columns.who: clients send it as it is, so the model"):
        Data.parse(DATA | rated | {"privacy": {"columns": {"who": {"action": "hash"}}}}, "w")
