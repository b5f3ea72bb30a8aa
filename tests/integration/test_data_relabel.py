"""The steps of the data room in order: labels corrected by a person give a new dataset revision that says who."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from tasks.cli import cli
from tasks.data.revisions import diff, last_accepted, revisions, show
from tasks.data.table import row_digests
from tasks.data.version import file_of
from tasks.plan import RETRAIN, request_for
from tasks.site import Site
from tasks.spec.load import load_workload
from tasks.spec.settings import resolve
from tasks.steps import run_step

pytestmark = pytest.mark.timeout(180)
DATA_STEPS = RETRAIN[:5]


@pytest.fixture
def environ(tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parents[2] / "workloads", tmp_path / "workloads")
    found = {
        "DRYDOCK_HOME": str(tmp_path / "state"),
        "DRYDOCK_WORKLOADS": str(tmp_path / "workloads"),
        "DRYDOCK_USER": "ann",
        "DRYDOCK_DATASET_REMOTE": str(tmp_path / "remote"),
    }
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    return found


def run_data_steps(site: Site) -> dict:
    workload, done = load_workload(site.workloads, "digits"), {}
    for step in DATA_STEPS:
        done[step] = run_step(step, request_for(step, workload, done, site), site).model_dump(mode="json")
    return done


def test_corrected_labels_give_a_new_revision_with_who_and_when(environ, tmp_path):
    site = Site(resolve(environ))
    first = run_data_steps(site)
    again = run_data_steps(site)
    assert again == first, "an unchanged run is recognised, step by step"
    table = pq.read_table(Path(first["clean"]["room"]["uri"]) / "data.parquet").slice(0, 3)
    keys = [key.decode() for key in row_digests(table, load_workload(site.workloads, "digits").data.feature)]
    labels, ids = table.column("label").to_pylist(), table.column("row_id").to_pylist()
    other = "1" if labels[0] != "1" else "2"
    with (tmp_path / "answers.csv").open("w", newline="") as stream:
        rows = zip(keys, labels, [other, labels[1], ""], strict=True)
        csv.writer(stream).writerows([("row_key", "label", "answer"), *rows])
    said = CliRunner().invoke(cli, ["data", "relabel", "digits", str(tmp_path / "answers.csv")])
    assert said.exit_code == 0, said.output
    assert "1 labels changed, 0 rows dropped, 1 confirmed" in said.output
    second = run_data_steps(site)
    names = [first["version"]["revision"], second["version"]["revision"]]
    assert [row["revision"] for row in revisions(site.datasets)] == names
    found = diff(site.datasets, *names)
    assert {kind: some["count"] for kind, some in found["rows"].items()} == {
        "added": 0, "removed": 0, "relabelled": 1, "moved": 0,
    }  # fmt: skip
    assert found["rows"]["relabelled"]["first"] == [{"row_id": ids[0], "before": labels[0], "after": other}]
    (people,) = show(site.datasets, names[1])["lineage"]["corrections"]
    assert people["who"] == "ann"
    assert (people["changed"], people["confirmed"]) == (1, 1)
    validation = json.loads((Path(second["validate_data"]["room"]["uri"]) / "validation.json").read_text())
    assert validation["compared_with"] == names[0]
    previous = last_accepted(site.datasets, "digits", second["clean"]["room"]["digest_sha256"])
    assert previous is not None
    assert previous.revision == names[0]


def test_the_verbs_print_for_people_and_for_programs(environ, tmp_path):
    done = run_data_steps(Site(resolve(environ)))
    name = done["version"]["revision"]

    def said(*arguments: str) -> str:
        answer = CliRunner().invoke(cli, ["data", *arguments])
        assert answer.exit_code == 0, answer.output
        return answer.output

    assert name in said("list")
    assert json.loads(said("show", name, "--json"))["rows"] == done["clean"]["rows_out"]
    assert "label_noise:" in said("show", name)
    assert json.loads(said("diff", name, name, "--json"))["rows"]["added"]["count"] == 0
    assert "rows:   relabelled" in said("diff", name, name)
    # The bytes come from the remote where the cache is lost.
    shutil.rmtree(Path(environ["DRYDOCK_HOME"]) / "datasets" / ".dvc" / "cache")
    assert said("get", name, str(tmp_path / "copy")).strip() == str(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir())[:2] == ["data.parquet", "dataset.json"]


@pytest.fixture
def page():
    """A page of a real browser that may ask no other host; what its scripts complain of fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    complaints, asked = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        opened.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        yield opened
        browser.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def mislabel(folder):
    """Give the workload the bundled digits from a file, thirty of them under a wrong label."""
    from sklearn.datasets import load_digits

    found = load_digits()
    labels = [(label + 1) % 10 if place % 60 == 0 else label for place, label in enumerate(found.target.tolist())]
    pixels = [row.tolist() for row in found.data.astype("uint8")]
    pq.write_table(pa.table({"pixels": pixels, "label": [str(label) for label in labels]}), folder / "digits.parquet")
    file = folder / "workload.yaml"
    text = file.read_text()
    assert "source: {kind: sklearn, name: digits}" in text
    file.write_text(text.replace("{kind: sklearn, name: digits}", "{kind: files, path: digits.parquet}"))


def test_the_queue_is_answered_in_a_browser_and_the_report_shows_the_revision(environ, tmp_path, page):
    site = Site(resolve(environ))
    mislabel(tmp_path / "workloads" / "digits")
    done = run_data_steps(site)
    page.goto(f"file://{done['validate_labels']['room']['uri']}/queue.html")
    choices = page.locator("select")
    assert choices.count() == done["validate_labels"]["suspects"]
    pictures = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert pictures == [8] * choices.count()
    answers = choices.first.locator("option").evaluate_all("found => found.map(option => option.value)")
    choices.first.select_option(answers[1])
    choices.nth(1).select_option("!drop")
    assert f"2 of {choices.count()} answered" in page.locator("#count").inner_text()
    with page.expect_download() as saved:
        page.locator("#save").click()
    saved.value.save_as(tmp_path / "answers.csv")
    said = CliRunner().invoke(cli, ["data", "relabel", "digits", str(tmp_path / "answers.csv")])
    assert said.exit_code == 0, said.output
    assert "1 rows dropped" in said.output
    (tmp_path / "report.html").write_bytes(file_of(site.datasets, done["version"]["revision"], "report.html"))
    page.goto(f"file://{tmp_path}/report.html")
    assert page.locator("h1").inner_text() == done["version"]["revision"]
    assert page.get_by_text("What cleaning did").is_visible()
    assert page.get_by_text("drop_duplicates").is_visible()
    assert page.locator("svg").count() > 10
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it needs no sideways scroll"
