"""Cleaning on Spark: every rule leaves the very bytes that it leaves on DuckDB.

PySpark is installed from its lock into a folder of the tests' own, as it is for none but those who ask for it.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = 600
# An hour that clocks in Europe skip: a time without a zone has it.
DST_GAP = "2026-03-29 02:30:00"
RULES = (
    {"rule": "trim", "column": "name"},
    {"rule": "unicode", "column": "name", "form": "NFKC"},
    {"rule": "case", "column": "name", "to": "title"},
    {"rule": "replace", "column": "name", "pattern": r"(?P<a>\w)-(\w)", "by": r"\2 \1 $1 \\1"},
    {"rule": "replace", "column": "name", "pattern": r"[[:alpha:]]x$", "by": ""},
    {"rule": "match", "column": "name", "pattern": r"[^0-9]*", "action": "missing"},
    {"rule": "case", "column": "shout", "to": "upper"},
    {"rule": "synonyms", "column": "city", "replace": {"NYC": "new york"}},
    {"rule": "case", "column": "city", "to": "lower"},
    {"rule": "spelling", "column": "city"},
    {"rule": "spelling", "column": "town"},
    {"rule": "allowed", "column": "city", "values": ["new york", "münchen", "北京", "lyon"], "action": "missing"},
    {"rule": "parse_number", "column": "price", "decimal": ",", "thousands": ".", "action": "missing"},
    {"rule": "parse_date", "column": "day", "formats": ["%Y-%m-%d", "%d/%m/%Y"], "action": "missing"},
    {"rule": "parse_date", "column": "at", "formats": ["%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M:%S.%f"], "into": "seconds",
     "action": "missing"},
    {"rule": "parse_date", "column": "short", "formats": ["%Y-%m-%dT%H:%M:%S", "%-d.%-m.%Y"], "action": "missing"},
    {"rule": "parse_unit", "column": "weight", "units": {"kg": 1, "lb": 0.4536}, "default": "kg"},
    {"rule": "flag_missing", "column": "price", "into": "no_price"},
    {"rule": "fill", "column": "price", "by": "median"},
    {"rule": "outliers", "column": "price", "width": 5.0, "action": "clip"},
    {"rule": "range", "column": "number", "min": -1e17, "max": 1e17},
    {"rule": "fill", "column": "number", "by": "mean"},
    {"rule": "dependency", "determinant": ["zip"], "dependent": ["city"], "source": "source"},
    {"rule": "dependency", "determinant": ["zip"], "dependent": ["state", "rate"]},
    {"rule": "fill", "column": "city", "value": "lyon"},
    {"rule": "condition", "where": "price >= 0 and length(name) < 60"},
    {"rule": "sql", "column": "number", "expression": "number / nullif(weight, 0) + coalesce(no_price, 0)"},
    {"rule": "drop_missing", "column": "text"},
    {"rule": "drop_duplicates", "columns": ["text", "number"]},
    {"rule": "near_duplicates", "column": "text"},
    {"rule": "allowed_labels"},
)
WRITTEN = ("data.parquet", "repairs.parquet", "quarantine.parquet", "report.json")


def table() -> dict[str, list[object]]:
    draw = random.Random(7)
    cities = ["New York", "NYC", "münchen", "munchen", "北京", "Lyon", "Lyom", None, "atlantis"]
    zips = {f"{place:05}": draw.choice(["new york", "lyon"]) for place in range(40)}

    def row(number: int) -> dict[str, object]:
        code = draw.choice(list(zips))
        words = " ".join(draw.choices(["alpha", "beta", "gamma", "delta", "über", "ok"], k=12))
        return {
            "name": draw.choice([" ada lovelace ", "GRACE-HOPPER", "ﬁn é", "x9", None, "o'neill", "  ", "ǆ abc"]),
            "city": draw.choice(cities) if draw.random() < 0.3 else zips[code],
            # One letter of four is another; of its bytes two would be.
            "town": "koln" if number % 20 == 0 else "köln",
            "price": draw.choice(["1.234,50", "12,5", "7", "n/a", "1,2,3", "", "1e3", "-3,25", "99.999,0"]),
            "day": draw.choice(["2026-11-27", "27/11/2026", "31/02/2026", "2024-02-29", "soon", None]),
            "at": draw.choice(["2026-11-27 04:05:06", "1969-12-31 23:59:58.5", "2016-12-31 23:59:60", DST_GAP]),
            "short": draw.choice(["2026-11-27T04:05:06", "0999-01-02T00:00:00", "3.4.2026", "31.2.2026"]),
            "shout": draw.choice(["straße", "ΟΔΟΣ", "İstanbul", "ŉ ﬁ", "ǆ"]),
            "rate": draw.choice([1e7, 1.5]) if draw.random() < 0.1 else float(int(code[-2:]) * 1e6),
            "weight": draw.choice(["5 lb", "2.5kg", "3", "1 stone" if number == 3 else "4 kg"]),
            "number": draw.choice([0.1, 1e16, 1e-7, 123456789.125, float("nan"), None, -0.0, 2e18, 5.0, 1 / 3]),
            "zip": code,
            "state": draw.choice(["aa", "bb"]) if draw.random() < 0.2 else f"s{code[-1]}",
            "source": draw.choice(["one", "two", "three"]),
            "text": None if number % 50 == 0 else draw.choice([words, words, words, "the same words, again, again"]),
            "label": draw.choice(["yes", "no", "no", "maybe" if number % 97 == 0 else "yes"]),
        }

    rows = [row(number) for number in range(ROWS)]
    return {name: [one[name] for one in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
    """``request_of(*rules)``: a request to clean the table."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pydantic import TypeAdapter

    from tasks.spec.clean import CleanRule
    from tasks.spec.data import Split
    from tasks.spec.feature import TextFeature
    from tasks.spec.label import Label
    from tasks.spec.requests import CleanRequest
    from tasks.spec.value import RoomRef
    from tasks.store.manifest import write_manifest

    raw = tmp_path_factory.mktemp("raw")
    columns = table()
    kinds = {name: pa.float64() if name in ("number", "rate") else pa.string() for name in columns}
    written = pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
    pq.write_table(written, raw / "raw.parquet", row_group_size=250)
    ref = RoomRef(uri=str(raw), digest_sha256=write_manifest(raw))

    def make(*rules: dict[str, object]) -> CleanRequest:
        return CleanRequest(
            workload="w", raw=ref, feature=TextFeature(kind="text", column="text"),
            label=Label(column="label", classes=("yes", "no")),
            rules=tuple(TypeAdapter(CleanRule).validate_python(rule) for rule in rules), split=Split(),
            keep=("city", "number", "at"),
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def pyspark(tmp_path_factory):
    """PySpark, where this process and its workers find it."""
    if not shutil.which("java"):
        pytest.skip("no Java: Spark can't run")
    folder = tmp_path_factory.mktemp("pyspark")
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--require-hashes", "--quiet", "--target", folder]
    command = [sys.executable, "-m", "pip", "install", *options, "-r", ROOT / "locks" / "spark.lock"]
    subprocess.run(command, check=True, timeout=300)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    shutil.rmtree(folder)


def cleaned(request, room: Path, master: str = "") -> dict[str, bytes]:
    from tasks.data.clean import clean
    from tasks.data.engine import Runs

    clean(request, room, Runs(spark_master=master))
    assert sorted(path.name for path in room.iterdir()) == sorted(WRITTEN)
    return {name: (room / name).read_bytes() for name in WRITTEN}


def test_without_pyspark_one_line_says_how_it_is_installed(request_of, tmp_path, monkeypatch):
    """Before all others, which import it."""
    from tasks import steps
    from tasks.site import Site
    from tasks.spec.errors import BadRequest
    from tasks.spec.settings import resolve

    monkeypatch.setitem(sys.modules, "pyspark", None)
    site = Site(resolve({"DRYDOCK_HOME": str(tmp_path), "DRYDOCK_SPARK_MASTER": "local[*]"}))
    with pytest.raises(BadRequest, match=r"spark_master = 'local\[\*\]' needs PySpark; install it: .*spark.lock"):
        steps.clean(request_of(), tmp_path / "room", site)
    assert os.listdir(tmp_path / "room") == []


@pytest.mark.timeout(600)
def test_every_rule_leaves_the_same_bytes_on_both_engines(request_of, pyspark, tmp_path, monkeypatch):
    import json

    import pyarrow.parquet as pq

    from tasks.data import dependency

    # Of 20, each of which Spark plans for a second.
    monkeypatch.setattr(dependency, "ROUNDS", 3)
    request = request_of(*RULES)
    duck = cleaned(request, tmp_path / "duck")
    spark = cleaned(request, tmp_path / "spark", "local[2]")
    for name in ("repairs", "quarantine", "data"):
        tables = [pq.read_table(tmp_path / engine / f"{name}.parquet") for engine in ("duck", "spark")]
        # Their words, since a NaN equals nothing.
        found = [[str(row) for row in one.to_pylist()] for one in tables]
        assert sorted(set(found[1]) - set(found[0])) == [], name
        assert found[0] == found[1], name
    assert duck == spark
    report = json.loads(duck["report.json"])["rules"]
    met = {one["rule"] for one in report if one["changed_cells"] + one["dropped_rows"]}
    assert {rule["rule"] for rule in RULES} - met <= {"flag_missing"}, "a rule that met nothing shows nothing"
    javas = [child for child in psutil.Process().children(recursive=True) if child.name() == "java"]
    assert javas == [], "a session's Java is left"


@pytest.mark.timeout(300)
def test_what_spark_cannot_run_is_one_line(request_of, pyspark, tmp_path, monkeypatch):
    from sqlglot import exp, parse_one

    from tasks.data.engine import Runs, engine
    from tasks.spec.errors import BadRequest

    harm = "length(reflect('java.lang.System', 'getProperty', 'user.home'))"
    with pytest.raises(BadRequest, match=r"data.clean: reflect in an SQL expression is not known on Spark; use DuckDB"):
        cleaned(request_of({"rule": "sql", "column": "rate", "expression": harm}), tmp_path / "room", "local[1]")
    assert os.listdir(tmp_path / "room") == []
    with engine(tmp_path / "room", tmp_path, Runs(spark_master="local[1]")) as running:
        texts = {"log(p0)": "log in an SQL", "1 / p0": r"nullif\(DIVISOR, 0\)", "p0::int": "cast in an"}
        for text, words in texts.items():
            tree = exp.cast(exp.paren(parse_one(text, read="duckdb")), "DOUBLE")
            with pytest.raises(BadRequest, match=words):
                running.define("expression0", ("float64",), "float64", tree)
        with pytest.raises(BadRequest, match="rule parse_date: %z is not known on Spark"):
            running.time(None, ("%Y%z",), None)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(BadRequest, match=r"spark_master = 'local\[1\]' needs Java 17 or newer; install it"):
        cleaned(request_of(), tmp_path / "room", "local[1]")


@pytest.mark.timeout(300)
def test_a_java_that_dies_is_tried_again_and_the_next_step_has_its_own(request_of, pyspark, tmp_path):
    from tasks.data.engine import Runs, engine
    from tasks.spec.errors import TryAgain

    def killed() -> None:
        with engine(tmp_path, tmp_path, Runs(spark_master="local[1]")) as running:
            (java,) = [child for child in psutil.Process().children(recursive=True) if child.name() == "java"]
            java.kill()
            running.run("SELECT 1")

    with pytest.raises(TryAgain, match=r"cleaning on local\[1\]"):
        killed()
    cleaned(request_of({"rule": "trim", "column": "name"}), tmp_path / "room", "local[1]")
