"""A search through the real steps: its trials train, and the best one is the training that goes on."""

from __future__ import annotations

import pytest

from tasks.plan import request_for, retrain_of
from tasks.spec.changes import changed
from tasks.spec.load import load_workload
from tasks.spec.workload import Workload
from tasks.steps import run_step

pytestmark = pytest.mark.timeout(400)
SPACE = {"optimiser.learning_rate": {"low": 0.0005, "high": 0.02, "log": True}}
SPACE |= {"recipe.dropout": {"choices": [0.0, 0.2]}}


def test_the_best_trial_goes_on_down_the_pipeline(site):
    shipped = changed(load_workload(site.workloads, "digits"), {"max_epochs": 2, "ranks": 1})
    data = shipped.model_dump(mode="json") | {"search": {"trials": 2, "space": SPACE}}
    workload = Workload.parse(data, "the test")
    steps = retrain_of(workload)
    assert steps[steps.index("train") - 1] == "trial"
    done = {}
    for step in steps[: steps.index("train") + 1]:
        items = range(2) if step == "trial" else [None]
        found = [run_step(step, request_for(step, workload, done, site, item), site) for item in items]
        results = [one.model_dump(mode="json") for one in found]
        done[step] = results if step == "trial" else results[0]
    losses = [trial["validation_loss"] for trial in done["trial"]]
    assert done["train"]["validation_loss"] == min(losses)
    # The step recognises the trial's own training: two runs in MLflow, and two rooms.
    assert len(list((site.rooms / "train").glob("[!.]*"))) == 2
    experiment = site.mlflow.get_experiment_by_name("digits").experiment_id
    runs = site.mlflow.search_runs([experiment], f"tags.`drydock.dataset_revision` = '{done['version']['revision']}'")
    rates = {run.data.params["optimiser.learning_rate"] for run in runs}
    assert {str(trial["values"]["optimiser.learning_rate"]) for trial in done["trial"]} <= rates
    asked = request_for("compress", workload, done, site, "fp32")
    best = done["trial"][losses.index(min(losses))]["values"]
    assert asked.train.optimiser.learning_rate == best["optimiser.learning_rate"]
    assert list((site.home / "searches").glob("digits-*.journal"))
