"""``drydock data suggest`` as a user runs it: what it prints can be pasted, and repairs what it saw."""

from __future__ import annotations

import json

import pytest
import yaml
from click.testing import CliRunner

from tasks.cli import cli
from tasks.plan import request_for
from tasks.site import Site
from tasks.spec.load import load_workload
from tasks.spec.settings import resolve
from tasks.steps import run_step

pytestmark = pytest.mark.timeout(120)
COUNTRIES = {"Kiel": "Germany", "Lyon": "France", "Oslo": "Norway"}
WORKLOAD = """
name: boats
description: Boats by their length.
data:
  source: {kind: files, path: boats.csv}
  feature: {kind: table, columns: [length]}
  columns: {port: text, country: text, built: text}
  label: {column: label, classes: [x, y]}
train:
  recipe: {kind: mlp}
gate:
  rules:
    - {metric: accuracy, min: 0.5, min_samples: 20}
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "workloads" / "boats"
    folder.mkdir(parents=True)
    lines = ["length,port,country,built,label"]
    for number in range(300):
        port = list(COUNTRIES)[number % 3]
        country = "Spain" if number == 7 else COUNTRIES[port]
        lines.append(f"{number / 10},{port},{country},0{1 + number % 9}.03.2020,{'xy'[number % 2]}")
    (folder / "boats.csv").write_text("\n".join(lines) + "\n")
    (folder / "workload.yaml").write_text(WORKLOAD)
    found = {"DRYDOCK_HOME": str(tmp_path / "home"), "DRYDOCK_WORKLOADS": str(tmp_path / "workloads")}
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return Site(resolve(found))


def test_what_is_suggested_can_be_pasted_and_repairs_the_data(site):
    said = CliRunner().invoke(cli, ["data", "suggest", "boats"])
    assert said.exit_code == 0, said.output
    assert "99.7% of 300 rows: port gives country" in said.output
    file = site.workload_folder("boats") / "workload.yaml"
    described = yaml.safe_load(file.read_text())
    described["data"] |= yaml.safe_load(said.output)
    file.write_text(yaml.safe_dump(described))
    workload, done = load_workload(site.workloads, "boats"), {}
    for step in ("ingest", "clean"):
        done[step] = run_step(step, request_for(step, workload, done, site), site).model_dump(mode="json")
    assert done["clean"]["changed_cells"] == 301, "300 dates in one form, and the one country that was wrong"


def test_suggestions_as_json_carry_their_support(site):
    said = CliRunner().invoke(cli, ["data", "suggest", "boats", "--json"])
    found = {item["rule"]["rule"]: item for item in json.loads(said.output)}
    assert found["parse_date"]["support"] == 1
    assert found["parse_date"]["rows"] == 300
    assert found["dependency"]["support"] > 0.99


def test_a_workload_that_is_not_there_is_refused(site):
    said = CliRunner().invoke(cli, ["data", "suggest", "nope"])
    assert said.exit_code != 0
    assert "nope" in str(said.exception) + said.output
