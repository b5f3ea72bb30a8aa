"""A search's trials: proposed, ended early, adopted after a kill, and the best one taken."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tasks.search import best_of, run_trial, study_of
from tasks.spec.errors import BadRequest, TryAgain
from tasks.spec.requests import TrialRequest
from tasks.spec.search import tried
from tasks.spec.train import Train

pytestmark = pytest.mark.timeout(60)
TRAIN = {"recipe": {"kind": "mlp"}, "ranks": 1}
SPACE = {"optimiser.learning_rate": {"low": 1e-4, "high": 1.0, "log": True}, "batch_size": {"choices": [32, 64]}}
SPACE |= {"stopping.patience_epochs": {"low": 1, "high": 5, "whole": True}}


def request(number: int, **search) -> TrialRequest:
    label = {"classes": [0, 1]}
    asked = {"workload": "w", "dataset": {"uri": "x", "digest_sha256": "d"}, "revision": "w-0", "train": TRAIN}
    asked |= {"feature": {"kind": "table", "columns": ["a"]}, "label": label}
    data = {"workload": "w", "number": number, "search": {"space": SPACE} | search, "train": asked}
    return TrialRequest.parse(data, "the test")


def by_rate(train: Train, heard) -> SimpleNamespace:
    """A training whose loss is the distance of its learning rate from 0.01, by its magnitude."""
    import math

    loss = abs(math.log10(train.optimiser.learning_rate) + 2)
    for epoch in (1, 2, 3):
        heard({"epoch": epoch, "step": epoch, "loss": 9.0})
        heard({"epoch": epoch, "validation_loss": loss + 1 / epoch})
    return SimpleNamespace(validation_loss=loss, best_cost=loss)


def test_trials_are_proposed_and_the_best_one_is_what_goes_on(tmp_path):
    found = []
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        found.append(run_trial(request(number, prune=False), tmp_path / str(number), tmp_path / "studies", by_rate))
    assert {trial.state for trial in found} == {"complete"}
    rates = [trial.values["optimiser.learning_rate"] for trial in found]
    assert all(1e-4 <= rate <= 1 for rate in rates)
    assert len(set(rates)) == 12
    best = best_of([trial.model_dump(mode="json") for trial in found])
    least = min(found, key=lambda trial: trial.validation_loss)
    assert best.optimiser.learning_rate == least.train.optimiser.learning_rate
    assert best.batch_size in (32, 64)
    assert best.stopping.patience_epochs in range(1, 6)
    assert len(study_of(request(0, prune=False), tmp_path / "studies").trials) == 12
    assert len(list((tmp_path / "studies").glob("w-*.journal"))) == 1


def test_trials_are_held_against_each_other_by_the_metric_that_training_stops_by(tmp_path):
    """A rate whose loss is the least has the worst accuracy here, and does not go on."""

    def learn(train: Train, heard) -> SimpleNamespace:
        rate = train.optimiser.learning_rate
        for epoch in (1, 2):
            heard({"epoch": epoch, "validation_loss": 1 / rate, "validation_accuracy": 1 - rate})
        return SimpleNamespace(validation_loss=1 / rate, best_cost=rate - 1)

    found = []
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        asked = request(number, prune=False)
        stopping = asked.train.train.stopping.model_copy(update={"metric": "accuracy"})
        train = asked.train.train.model_copy(update={"stopping": stopping})
        asked = asked.model_copy(update={"train": asked.train.model_copy(update={"train": train})})
        found.append(run_trial(asked, tmp_path / str(number), tmp_path / "studies", learn))
    rates = [trial.values["optimiser.learning_rate"] for trial in found]
    assert best_of([trial.model_dump(mode="json") for trial in found]).optimiser.learning_rate == min(rates)
    told = study_of(asked, tmp_path / "studies").trials
    assert [trial.value for trial in told] == pytest.approx([rate - 1 for rate in rates])
    assert [list(trial.intermediate_values.values())[-1] for trial in told] == pytest.approx([r - 1 for r in rates])


def test_a_trial_that_is_worse_than_most_ends_early_and_one_that_diverges_is_no_more_than_that(tmp_path):
    states = []
    for number in range(16):
        (tmp_path / str(number)).mkdir()
        states.append(run_trial(request(number), tmp_path / str(number), tmp_path / "studies", by_rate))
    pruned = [trial for trial in states if trial.state == "pruned"]
    assert pruned, "none was ended early"
    assert all(trial.number >= 4 and "worse than most at epoch" in trial.why for trial in pruned)

    def diverges(train, heard):
        raise BadRequest("training loss is nan in epoch 1; lower train.optimiser.learning_rate")

    (tmp_path / "diverged").mkdir()
    failed = run_trial(request(17), tmp_path / "diverged", tmp_path / "studies", diverges)
    assert (failed.state, failed.validation_loss) == ("failed", None)
    with pytest.raises(BadRequest, match="none of 1 trials came to its end; the first: training loss is nan"):
        best_of([failed.model_dump(mode="json")])


def test_a_killed_trial_goes_on_with_the_values_it_was_given(tmp_path):
    seen = []

    def killed(train, heard):
        seen.append(train.optimiser.learning_rate)
        raise TryAgain("MLflow is down")

    with pytest.raises(TryAgain):
        run_trial(request(0), tmp_path, tmp_path / "studies", killed)
    done = run_trial(request(0), tmp_path, tmp_path / "studies", by_rate)
    assert done.values["optimiser.learning_rate"] == seen[0]
    assert len(study_of(request(0), tmp_path / "studies").trials) == 1
    # Killed again between its end and its result: the end is told once.
    assert run_trial(request(0), tmp_path, tmp_path / "studies", by_rate) == done


def test_what_can_not_be_tried_is_one_line():
    train = Train.parse(TRAIN, "the test")
    with pytest.raises(BadRequest, match=r"search.space: 'optimiser.speed' is no field of train"):
        tried(train, {"optimiser.speed": 1})
    with pytest.raises(BadRequest, match=r"search.space: optimiser.learning_rate = -1"):
        tried(train, {"optimiser.learning_rate": -1})
