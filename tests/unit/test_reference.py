"""The page of what a workload file may say: as the models say it, and complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tasks.spec.reference import reference

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "workload.md").read_text()


def test_the_page_is_what_the_models_say():
    assert reference() == PAGE, "python -m tasks.spec.reference > docs/workload.md"


def keys(value):
    if isinstance(value, dict):
        # Under ``replace`` stand the data's own words.
        within = {key for name, item in value.items() if name != "replace" for key in keys(item)}
        return {str(key) for key in value} | within
    return {key for item in value for key in keys(item)} if isinstance(value, list) else set()


@pytest.mark.parametrize("name", ["digits", "mnist", "sms-spam"])
def test_every_field_of_our_own_workloads_is_on_it(name):
    used = keys(yaml.safe_load((ROOT / "workloads" / name / "workload.yaml").read_text()))
    assert used <= set(re.findall(r"^[|] `([^`]+)`", PAGE, re.MULTILINE))


def test_every_row_of_its_tables_has_four_cells():
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(rows) > 300
    assert {len(re.findall(r"(?<!\\)[|]", row)) for row in rows} == {5}
