"""Suggested rules: what a dirty table shows is found, what chance or two truths would show is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tasks.data.clean import cleaned_table
from tasks.data.engine import Runs, engine
from tasks.data.repair import Meaning
from tasks.data.suggest import fragment, suggest
from tasks.spec.data import Data

pytestmark = pytest.mark.timeout(120)
ROWS = 600


def table(**more: object) -> dict[str, object]:
    """Rows of 30 shops, each with a city, in 10 regions; a wrong city and a wrong shop here and there."""
    shop = np.random.default_rng(3).integers(0, 30, ROWS)
    cities = np.array([f"city {'abcdefghij'[code % 10] * 3}" for code in range(30)], dtype=object)[shop]
    names = np.array([f"shop-{code:02d}" for code in range(30)], dtype=object)[shop]
    for place in range(0, ROWS, 40):
        cities[place] = f"cxty {place}"
    return {"shop": names, "city": cities, "noise": [f"n{place}" for place in range(ROWS)], **more}


def suggested(folder: Path, columns: dict[str, object], protected: tuple[str, ...] = ()):
    pq.write_table(pa.table(columns), folder / "raw.parquet")
    return suggest(folder / "raw.parquet", folder / "scratch", protected)


def dependencies(found) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {s.rule.determinant: s.rule.dependent for s in found if s.rule.rule == "dependency"}


def test_a_dependency_is_found_with_its_support_and_repairs_the_table(tmp_path):
    found = suggested(tmp_path, table())
    assert dependencies(found) == {("shop",): ("city",)}
    (one,) = [item for item in found if item.rule.rule == "dependency"]
    assert 0.95 < one.support < 1
    assert one.rows == ROWS
    with engine(tmp_path / "room", tmp_path, Runs(128 << 20)) as running:
        work = cleaned_table(running, tuple(s.rule for s in found), tmp_path / "raw.parquet", Meaning((), "", ()))
        cities = running.table(work.alive("city")).column(work.place("city")).to_pylist()
    assert {city[:4] for city in cities} == {"city"}


def test_two_truths_in_a_group_are_no_dependency(tmp_path):
    columns = table()
    columns["city"] = [f"city {'ab'[row % 2] * 3}" for row in range(ROWS)]
    assert dependencies(suggested(tmp_path, columns)) == {}


def test_a_column_that_is_nearly_constant_follows_from_nothing(tmp_path):
    columns = table(flag=["yes"] * (ROWS - 3) + ["no"] * 3)
    assert dependencies(suggested(tmp_path, columns)) == {("shop",): ("city",)}


def test_two_columns_together_give_what_neither_gives(tmp_path):
    columns = table()
    month = np.arange(ROWS) % 6
    price = [f"{name}/{value}" for name, value in zip(columns["shop"], month, strict=True)]
    found = dependencies(suggested(tmp_path, columns | {"month": month.astype(str), "price": price}))
    assert found[("shop", "month")] == ("price",) or found[("month", "shop")] == ("price",)


def test_columns_that_give_each_other_are_set_right_by_one_of_them(tmp_path):
    columns = table()
    columns["number"] = [str(ord(name[-1]) + 100 * ord(name[-2])) for name in columns["shop"]]
    found = [s.rule for s in suggested(tmp_path, columns) if s.rule.rule == "dependency"]
    assert [(rule.determinant, rule.dependent) for rule in found] == [
        (("number",), ("shop",)),
        (("shop",), ("city", "number")),
    ]


def test_texts_that_are_numbers_or_dates_rare_spellings_far_numbers_and_twins(tmp_path):
    draw = np.random.default_rng(0)
    columns = {
        "amount": [f"{value:.3f}" for value in draw.normal(10, 2, ROWS)],
        "day": [f"{1 + row % 28:02d}.03.2026" for row in range(ROWS)],
        "zip": [f"0{row % 900:04d}" for row in range(ROWS)],
        "kind": ["acute", "chronic"] * (ROWS // 2),
        "size": [*draw.normal(0, 1, ROWS - 1), 1e6],
    }
    columns["kind"][7] = "chronxc"
    found = {s.rule.rule: s for s in suggested(tmp_path, columns)}
    assert found["parse_number"].rule.column == "amount"
    assert found["parse_date"].rule.formats == ("%d.%m.%Y",)
    assert found["spelling"].rule.column == "kind"
    assert found["outliers"].rule.column == "size"
    assert "1 of 600" in found["outliers"].why
    doubled = {name: [*values, values[0]] for name, values in columns.items()}
    assert "drop_duplicates" in {s.rule.rule for s in suggested(tmp_path, doubled)}
    assert "drop_duplicates" not in found


def test_the_label_is_left_alone_and_the_same_file_gives_the_same(tmp_path):
    columns = table()
    columns["label"] = [f"l{name}" for name in columns["shop"]]
    found = suggested(tmp_path, columns, ("label",))
    assert dependencies(found) == {("shop",): ("city",)}
    assert suggested(tmp_path, columns, ("label",)) == found


def test_the_fragment_can_be_pasted(tmp_path):
    text = fragment(suggested(tmp_path, table()), "w: 600 rows")
    data = {
        "source": {"kind": "files", "path": "d.csv"},
        "feature": {"kind": "table", "columns": ["x"]},
        "label": {"classes": ["a", "b"]},
        "columns": {"shop": "text", "city": "text", "noise": "text"},
    }
    assert Data.parse(data | yaml.safe_load(text), "w").clean[-1].rule == "dependency"
    assert "gives city" in text
    assert fragment([], "w: 1 rows").startswith("#")
