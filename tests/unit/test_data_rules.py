"""Each cleaning rule on a small table: what is left, and what the log says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tasks.data.clean import clean
from tasks.data.engine import SCRATCH, Runs
from tasks.data.minhash import bands, similarity
from tasks.spec.clean import CleanRule
from tasks.spec.data import Data, Split
from tasks.spec.errors import BadRequest
from tasks.spec.feature import TableFeature, TextFeature
from tasks.spec.label import Label
from tasks.spec.requests import CleanRequest
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(60)
RULE = TypeAdapter(CleanRule)
DAYS = ["2026-01-31", "2026-02-01"]
OPEN = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rule(**said):
    return RULE.validate_json(json.dumps(said), strict=True)


def run(folder: Path, columns: dict, *said: dict, feature=None):
    """Clean a table of texts (t) and numbers (n); return the columns after it, the log, and the quarantine."""
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    rows = len(next(iter(columns.values())))
    columns = {"t": ["q"] * rows, "y": ["x"] * rows} | columns
    kinds = {"n": pa.float64(), "m": pa.float64()}
    arrays = {name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), raw / "raw.parquet")
    request = CleanRequest(
        workload="w",
        raw=RoomRef(uri=str(raw), digest_sha256=write_manifest(raw)),
        feature=feature or TextFeature(kind="text", column="t"),
        label=Label(column="y", classes=("x", "z")),
        rules=tuple(rule(**item) for item in said),
        split=Split(),
    )
    clean(request, folder / "room")
    tables = [pq.read_table(folder / "room" / f"{name}.parquet") for name in ("data", "repairs", "quarantine")]
    return tables[0].to_pydict(), tables[1].to_pylist(), tables[2].to_pylist()


def texts(folder: Path, values: list, *said: dict) -> list:
    """A text column after rules on it, and only its rows that are left."""
    return run(folder, {"t": values}, *[{"column": "t"} | item for item in said])[0]["t"]


def numbers(folder: Path, values: list, *said: dict) -> list:
    """A number column after rules on it, and only its rows that are left."""
    feature = TableFeature(kind="table", columns=("n",))
    return run(folder, {"n": values}, *[{"column": "n"} | item for item in said], feature=feature)[0]["n"]


def parsed(folder: Path, values: list[str], said: dict) -> list:
    """A text column that a rule turns into numbers."""
    feature = TableFeature(kind="table", columns=("s",))
    return run(folder, {"s": values}, {"column": "s"} | said, feature=feature)[0]["s"]


@pytest.mark.parametrize(
    ("said", "before", "after"),
    [
        ({"rule": "trim"}, [" a\t", "\u3000b\xa0", "", None], ["a", "b", "", None]),
        ({"rule": "case", "to": "lower"}, ["ÄB", None], ["äb", None]),
        ({"rule": "case", "to": "upper"}, ["äb"], ["ÄB"]),
        ({"rule": "case", "to": "title"}, ["new yORK"], ["New York"]),
        ({"rule": "unicode"}, ["e\u0301"], ["é"]),
        ({"rule": "unicode", "form": "NFKC"}, ["ﬁ Ａ"], ["fi A"]),
        ({"rule": "replace", "pattern": r"(\d+)-(\d+)", "by": r"\2/\1"}, ["1-2 3-4", "x"], ["2/1 4/3", "x"]),
        ({"rule": "match", "pattern": "[ab]+"}, ["ab", "abc", None, "b\n"], ["ab", None]),
        ({"rule": "match", "pattern": "[ab]+", "action": "missing"}, ["ab", "abc"], ["ab", None]),
        ({"rule": "synonyms", "replace": {"a": "b", "b": "c"}}, ["a", "b", "d"], ["b", "c", "d"]),
        ({"rule": "allowed", "values": ["a", "b"]}, ["a", "c", None], ["a", None]),
        ({"rule": "spelling"}, ["jefferson"] * 9 + ["jxffxrson", "elmore"], ["jefferson"] * 10 + ["elmore"]),
        ({"rule": "spelling"}, ["aaaaa"] * 9 + ["aaaab"] * 9 + ["aaaac"], ["aaaaa"] * 9 + ["aaaab"] * 9 + ["aaaac"]),
        ({"rule": "fill", "by": "mode"}, ["a", "b", "b", None, ""], ["a", "b", "b", "b", "b"]),
        ({"rule": "near_duplicates"}, ["a long text", "A long text ", "another"], ["a long text", "another"]),
        ({"rule": "sql", "expression": "concat(t, '!', y)"}, ["a"], ["a!x"]),
        ({"rule": "parse_date", "formats": ["%Y-%m-%d", "%d.%m.%Y"]}, ["2026-01-31", "1.2.2026"], DAYS),
        ({"rule": "parse_date", "formats": ["%d %H:%M"], "action": "missing"}, ["x"], [None]),
    ],
)  # fmt: skip
def test_rules_on_texts(tmp_path, said, before, after):
    assert texts(tmp_path, before, said) == after


@pytest.mark.parametrize("bad", ["0000-00-00", "2026-02-30", "10000-01-01", "2026-13-01", "26-1-1x", "today"])
def test_a_date_that_is_none_is_acted_on(tmp_path, bad):
    said = {"rule": "parse_date", "formats": ["%Y-%m-%d"]}
    assert texts(tmp_path, ["2026-01-31", bad], said) == ["2026-01-31"]
    said |= {"into": "seconds", "action": "missing"}
    assert parsed(tmp_path, ["1970-01-02", bad], said) == [86400, None]


def test_a_leap_second_is_no_time_and_an_hour_that_clocks_skip_is_one(tmp_path):
    said = {"rule": "parse_date", "formats": ["%Y-%m-%d %H:%M:%S"], "into": "seconds", "action": "missing"}
    times = ["2016-12-31 23:59:59", "2016-12-31 23:59:60", "2017-01-01 00:00:00", "2026-03-29 02:30:00"]
    assert parsed(tmp_path, times, said) == [1483228799, None, 1483228800, 1774751400]


@pytest.mark.parametrize(
    ("said", "before", "after"),
    [
        ({}, ["1.5", "-2", "1e3", " 7 ", "nan", ""], [1.5, -2, 1000, 7, None, None]),
        ({"action": "missing"}, ["0x10", "1_000", "1,5", "inf", "1e999", "1.2.3", "1"], [None] * 6 + [1]),
        ({"decimal": ",", "thousands": "."}, ["1.234.567,5", "1,5", "12"], [1234567.5, 1.5, 12]),
        ({"decimal": ",", "thousands": ".", "action": "missing"}, ["1.5", "12.34"], [None, None]),
        ({"thousands": ","}, ["1,234", "1234.5"], [1234, 1234.5]),
        ({"thousands": ",", "action": "missing"}, ["1,5", "1,2345"], [None, None]),
    ],
)
def test_numbers_are_parsed_strictly(tmp_path, said, before, after):
    assert parsed(tmp_path, before, {"rule": "parse_number"} | said) == after


def test_units_are_brought_to_one(tmp_path):
    said = {"rule": "parse_unit", "units": {"kg": 1, "g": 0.001, "lb": 0.4536}, "default": "kg", "action": "missing"}
    assert parsed(tmp_path, ["2 kg", "500g", "1 lb", "3", "4 st"], said) == [2, 0.5, 0.4536, 3, None]


@pytest.mark.parametrize(
    ("said", "after"),
    [
        ({"rule": "range", "min": 0, "max": 9, "action": "missing"}, [1, 2, 3, 4, None, None]),
        ({"rule": "outliers", "width": 1.5}, [1, 2, 3, 4, None]),
        ({"rule": "outliers", "width": 1.5, "action": "clip"}, [1, 2, 3, 4, None, 8.5]),
        ({"rule": "fill", "by": "mean"}, [1, 2, 3, 4, 22, 100]),
        ({"rule": "fill", "by": "median"}, [1, 2, 3, 4, 3, 100]),
        ({"rule": "sql", "expression": "n / 0"}, [None] * 6),
        ({"rule": "sql", "expression": "coalesce(n, -1) * 2"}, [2, 4, 6, 8, -2, 200]),
    ],
)
def test_rules_on_numbers(tmp_path, said, after):
    assert numbers(tmp_path, [1, 2, 3, 4, None, 100], said) == after


def test_missing_values_are_flagged_before_they_are_filled(tmp_path):
    feature = TableFeature(kind="table", columns=("n", "n_was_missing"))
    flag = {"rule": "flag_missing", "column": "n", "into": "n_was_missing"}
    fill = {"rule": "fill", "column": "n", "value": 0}
    data, log, _ = run(tmp_path, {"n": [1, None]}, flag, fill, feature=feature)
    assert (data["n"], data["n_was_missing"]) == ([1, 0], [0, 1])
    assert [(item["rule"], item["row_id"]) for item in log] == [("fill", "1")]


def test_a_dependency_is_repaired_by_majority_and_fills_what_is_missing(tmp_path):
    zips = ["1", "1", "1", "1", "2", "2", None, "3", "3"]
    cities = ["A", "A", "B", None, "C", "D", "E", "F", ""]
    said = {"rule": "dependency", "determinant": ["zip"], "dependent": ["t", "n"]}
    numbers_ = [1, 1, 1, 2, 5, 5, 6, 7, 7]
    data, log, _ = run(tmp_path, {"zip": zips, "t": cities, "n": numbers_}, said)
    assert data["t"] == ["A", "A", "A", "A", "C", "D", "E", "F", "F"]
    found = [(item["row_id"], item["column"], item["before"], item["after"]) for item in log]
    assert found == [("2", "t", "B", "A"), ("3", "t", None, "A"), ("8", "t", "", "F"), ("3", "n", "2", "1")]


def test_parts_of_a_determinant_are_not_run_together(tmp_path):
    said = {"rule": "dependency", "determinant": ["a", "b"], "dependent": ["t"]}
    data, _, _ = run(tmp_path, {"a": ["x", "x", "xy"], "b": ["yz", "yz", "z"], "t": ["1", "1", "2"]}, said)
    assert data["t"] == ["1", "1", "2"]


def test_sources_are_weighed_by_how_often_they_are_right(tmp_path):
    """Three copiers of one wrong site outvote two good ones on some cells; what they say of others gives them away."""
    draw = np.random.default_rng(0)
    rows = {"key": [], "who": [], "t": []}
    for cell in range(80):
        copied = cell % 4 == 0
        for who in ("good1", "good2", "good3", "bad1", "bad2", "bad3"):
            if who == "good3" and copied:
                continue
            is_bad = who.startswith("bad")
            wrong = (is_bad and copied) or draw.random() < (0.6 if is_bad else 0.03)
            rows["key"].append(f"k{cell}")
            rows["who"].append(who)
            rows["t"].append(f"w{cell}-{0 if copied else draw.integers(5)}" if wrong else f"v{cell}")
    said = {"rule": "dependency", "determinant": ["key"], "dependent": ["t"]}
    truth = [f"v{key[1:]}" for key in rows["key"]]

    def share(**more) -> float:
        data, _, _ = run(tmp_path, rows, said | more)
        return sum(a == b for a, b in zip(data["t"], truth, strict=True)) / len(truth)

    assert share() < 0.85
    assert share(source="who") > 0.95
    assert share(source="who", trusted=["good1"]) > 0.9


def test_conditions_drop_what_is_false_and_keep_what_is_not_known(tmp_path):
    said = {"rule": "condition", "where": "n <= m"}
    data, log, aside = run(tmp_path, {"n": [1, 3, None], "m": [2, 2, 2], "t": ["a", "b", "c"]}, said)
    assert data["t"] == ["a", "c"]
    assert [(item["column"], item["before"]) for item in log] == [("*", "not n <= m")]
    why = {"row_id": "1", "rule": "condition", "column": "*", "reason": "not n <= m"}
    assert aside == [why | {"t": "b", "y": "x", "n": 3.0, "m": 2.0}]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"rule": "condition", "where": "nope > 1"}, "column 'nope' is not there, must be one of t, y, n"),
        ({"rule": "condition", "where": "n >"}, "no SQL expression"),
        ({"rule": "condition", "where": "1=1; drop table raw"}, "must be one SQL expression"),
        ({"rule": "condition", "where": "n in (select 1)"}, "without a query"),
        ({"rule": "sql", "column": "t", "expression": "(select content from read_text('/etc/hostname'))"}, "a query"),
        ({"rule": "sql", "column": "t", "expression": "getenv('HOME')"}, "correct the rule"),
        ({"rule": "sql", "column": "n", "expression": "nothing_like_it(n)"}, "correct the rule"),
        ({"rule": "replace", "column": "t", "pattern": "(?=x)", "by": ""}, "no look-around"),
        ({"rule": "spelling", "column": "n"}, "needs texts, the column holds numbers"),
        ({"rule": "outliers", "column": "t"}, "needs numbers, the column holds texts"),
        ({"rule": "fill", "column": "t", "by": "mean"}, "by = mean needs numbers"),
    ],
)
def test_a_rule_that_can_not_be_run_is_a_bad_request(tmp_path, said, words):
    with pytest.raises(BadRequest, match=words):
        run(tmp_path, {"n": [1.0]}, said)
    assert not (tmp_path / "room" / SCRATCH).exists()


@pytest.mark.parametrize(
    "said",
    [
        {"rule": "fill", "column": "t"},
        {"rule": "match", "column": "t", "pattern": "("},
        {"rule": "parse_number", "column": "t", "decimal": ",", "thousands": ","},
        {"rule": "parse_unit", "column": "t", "units": {"kg": 1}, "default": "g"},
        {"rule": "dependency", "determinant": ["a"], "dependent": ["a"]},
        {"rule": "dependency", "determinant": ["a"], "dependent": ["b"], "trusted": ["c"]},
    ],
)
def test_a_rule_that_contradicts_itself_is_refused(said):
    with pytest.raises(ValidationError):
        rule(**said)


def test_the_workload_knows_what_is_read_and_what_is_made():
    said = {
        "source": {"kind": "files", "path": "d.csv"},
        "feature": {"kind": "table", "columns": ["price", "was"]},
        "label": {"classes": ["x", "y"]},
        "columns": {"zip": "text"},
        "clean": [
            {"rule": "flag_missing", "column": "price", "into": "was"},
            {"rule": "parse_number", "column": "price"},
            {"rule": "dependency", "determinant": ["zip"], "dependent": ["price"]},
        ],
    }
    data = Data.parse(said, "w")
    assert data.read_columns == {"zip": "text", "price": "text"}
    assert data.made_columns == ("was",)
    for change, words in {
        '"zip": "text"': "clean.2.column = 'zip', must be one of",
        '"into": "was"': "name another",
    }.items():
        broken = json.loads(json.dumps(said).replace(change, '"into": "zip"' if "into" in change else '"zap": "text"'))
        with pytest.raises(BadRequest, match=words):
            Data.parse(broken, "w")


def test_names_that_mean_something_elsewhere_are_names(tmp_path):
    odd = ("row", "dropped", "before0", "a b", 'q"u', "A", "a", "; DROP TABLE raw", "c0")
    feature = TableFeature(kind="table", columns=odd)
    raw = {name: pa.array([float(place), None]) for place, name in enumerate(odd)}
    folder = tmp_path / "raw"
    folder.mkdir()
    pq.write_table(pa.table(raw | {"y": ["x", "x"]}), folder / "raw.parquet")
    said = tuple(rule(rule="fill", column=name, value=9.0) for name in odd)
    request = CleanRequest(
        workload="w", raw=RoomRef(uri=str(folder), digest_sha256=write_manifest(folder)), feature=feature,
        label=Label(column="y", classes=("x", "z")), rules=(*said, rule(rule="condition", where='"A" < "a"')),
        split=Split(),
    )  # fmt: skip
    clean(request, tmp_path / "room")
    data = pq.read_table(tmp_path / "room" / "data.parquet").to_pylist()
    assert [row[name] for row in data for name in odd] == [float(place) for place in range(len(odd))]


def test_the_same_request_gives_the_same_bytes_whatever_the_memory(tmp_path):
    draw = np.random.default_rng(0)
    rows = 300_000
    zips = draw.integers(0, 500, rows).astype(str)
    city = np.where(draw.random(rows) < 0.01, "odd", zips)
    columns = {"t": pa.array(city), "y": pa.array(["x"] * rows), "n": pa.array(np.round(draw.normal(size=rows), 2))}
    raw = tmp_path / "raw"
    raw.mkdir()
    pq.write_table(pa.table(columns | {"zip": zips}), raw / "raw.parquet", row_group_size=50_000)
    said = [
        {"rule": "dependency", "determinant": ["zip"], "dependent": ["t"]},
        {"rule": "outliers", "column": "n"},
        {"rule": "fill", "column": "n", "by": "mean"},
        {"rule": "drop_duplicates", "columns": ["zip", "n"]},
    ]
    request = CleanRequest(
        workload="w", raw=RoomRef(uri=str(raw), digest_sha256=write_manifest(raw)),
        feature=TextFeature(kind="text", column="t"), label=Label(column="y", classes=("x", "z")),
        rules=tuple(rule(**item) for item in said), split=Split(),
    )  # fmt: skip
    found = []
    for memory in (128 << 20, 512 << 20):
        result = clean(request, tmp_path / "room", Runs(memory))
        written = [tmp_path / "room" / f"{name}.parquet" for name in ("data", "repairs", "quarantine")]
        found.append([path.read_bytes() for path in written])
        assert result.rows_in == rows == result.rows_out + result.dropped_rows
    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["random() * n", "now()", "current_date", "uuid()", "get_current_timestamp()"])
def test_an_expression_that_differs_each_time_is_refused(tmp_path, text):
    with pytest.raises(BadRequest, match="differs each time, must be left out"):
        run(tmp_path, {"t": ["a"], "n": [1.0]}, {"rule": "condition", "where": f"({text}) IS NOT NULL"})


WORDS = st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", " a", "A", "ab", ""])), min_size=1, max_size=12)


@OPEN
@given(values=WORDS)
def test_the_log_leads_from_what_was_read_to_what_is_left(tmp_path, values):
    said = [{"rule": "trim"}, {"rule": "case", "to": "lower"}, {"rule": "synonyms", "replace": {"ab": "b"}}]
    said = [{"column": "t"} | item for item in said]
    data, log, aside = run(tmp_path, {"t": [*values, "z"]}, *said, {"rule": "drop_duplicates"})
    cells = dict(enumerate([*values, "z"]))
    for item in log:
        row = int(item["row_id"])
        if item["column"] == "t":
            assert cells[row] == item["before"]
            cells[row] = item["after"]
    assert [cells[int(row)] for row in data["row_id"]] == data["t"]
    assert {int(row) for row in data["row_id"]} | {int(row["row_id"]) for row in aside} == set(cells)
    assert all(row["t"] == [*values, "z"][int(row["row_id"])] for row in aside)
    assert len(set(data["t"])) == len(data["t"])


@given(text=st.text(min_size=1), other=st.text(min_size=1))
def test_similarity_is_symmetric_and_one_for_equals(text, other):
    assert similarity(text, text) == 1
    assert similarity(text, other) == similarity(other, text) <= 1
    assert bands(text) == bands(text.upper().lower()) or text.lower() != text.upper().lower()
