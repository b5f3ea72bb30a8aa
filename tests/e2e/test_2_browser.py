"""The pages that users see, in a real browser: the trigger form, the run, the registry's version."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]


@pytest.fixture(scope="module")
def page(stack: Any) -> Iterator[Any]:
    """A page that is logged in to Airflow."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.set_default_timeout(30_000)
        opened.goto(stack.airflow)
        opened.locator("input[name=username]").fill("admin")
        opened.locator("input[name=password]").fill(stack.password)
        opened.get_by_role("button", name="Sign in").click()
        opened.get_by_role("link", name="Dags").first.wait_for()
        yield opened
        browser.close()


def test_the_trigger_form_is_typed_and_starts_a_run(stack: Any, page: Any) -> None:
    api = stack.api()
    before = {run["dag_run_id"] for run in api.runs("retrain_digits", 50)}
    page.goto(f"{stack.airflow}/dags/retrain_digits")
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog")
    # One section is open at a time.
    for section, fields in (
        ("Size and data", ("max_epochs", "batch_size", "ranks", "seed", "objective")),
        ("Gate and review (may only tighten)", ("min_accuracy", "review")),
    ):
        form.get_by_role("button", name=section).click()
        for field in fields:
            # A field that must be filled has a star behind its name.
            form.get_by_text(re.compile(rf"^{field}\s*\*?$")).first.wait_for()
    form.get_by_role("button", name="Trigger").click()
    form.wait_for(state="hidden")
    started = {run["dag_run_id"] for run in api.runs("retrain_digits", 50)} - before
    assert len(started) == 1
    run_id = started.pop()
    page.goto(f"{stack.airflow}/dags/retrain_digits/runs/{run_id}")
    page.get_by_role("link", name="plan").first.wait_for()


def test_the_dag_tells_what_it_does(stack: Any, page: Any) -> None:
    docs = stack.api().call("GET", "/dags/retrain_digits/details")["doc_md"]
    assert "The gate" in docs
    page.goto(f"{stack.airflow}/dags/retrain_digits")
    page.get_by_text("retrain_digits").first.wait_for()


def test_the_version_has_its_card_in_the_registry(stack: Any, page: Any) -> None:
    page.goto(f"{stack.mlflow}/#/models/digits/versions/1")
    for told in ("On the holdout", "By class", "The candidates", "dataset revision"):
        page.get_by_text(told).first.wait_for()
    assert page.get_by_text("drydock.package_sha256").first.is_visible()


def test_the_run_has_curves_and_reports(stack: Any, page: Any) -> None:
    from tasks.registry.client import connect

    client = connect(stack.mlflow)
    run_id = client.get_model_version("digits", "1").run_id
    assert len(client.get_metric_history(run_id, "validation_loss")) > 3
    experiment = client.get_run(run_id).info.experiment_id
    page.goto(f"{stack.mlflow}/#/experiments/{experiment}/runs/{run_id}/artifacts/evaluation/report.html")
    frame = page.frame_locator("iframe").first
    frame.get_by_text("Candidates on the holdout").wait_for()
    assert frame.get_by_text("What each rule said").is_visible()


def test_the_delivery_page_shows_what_serves_and_rolls_back(stack: Any, page: Any) -> None:
    before = stack.json("status")["workloads"]
    serving = next(w for w in before if w["workload"] == "digits")["champion"]
    page.goto(f"{stack.airflow}/plugin/drydock")
    frame = page.frame_locator("iframe").first
    card = frame.locator("#workload-digits")
    card.get_by_text(f"champion: version {serving}").wait_for()
    card.get_by_role("button", name="Roll back…").click()
    frame.locator("#dialog-reason").fill("the page works")
    frame.locator("#dialog-sure").check()
    frame.locator("#dialog-go").click()
    frame.locator("#dialog-outcome").get_by_text("done").wait_for()
    last = [row for row in stack.json("history", "digits") if row["kind"] == "commit"][-1]
    assert (last["action"], last["reason"]) == ("rollback", "the page works")
    assert last["version"] != serving
