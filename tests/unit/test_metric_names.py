"""Whatever evaluation measures is declared, and is where the declaration says: a rule that is taken can be judged."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tasks.evaluate.metrics import measure
from tasks.evaluate.robust import PERTURBATIONS
from tasks.evaluate.slices import gap_between, gaps
from tasks.evaluate.tagged import TagAnswers
from tasks.spec.errors import DrydockError
from tasks.spec.evaluate import Evaluate, Slice
from tasks.spec.feature import TableFeature, TokensFeature
from tasks.spec.label import Label
from tasks.spec.metrics import METRICS, PERTURBED, declared, slices_of, wrong_with
from tasks.spec.rules import PAIRED, Measurement, Rule

pytestmark = pytest.mark.timeout(30)
ROOT = Path(__file__).parents[2]
FEATURE = TableFeature(kind="table", columns=("width", "sex"))
LABEL = Label(classes=("no", "yes"))
EVALUATE = Evaluate(slices=(Slice(name="wide", where="width > 3"),), groups=("sex",))


def measured() -> tuple[Measurement, ...]:
    draw = np.random.default_rng(0)
    true, probabilities = draw.integers(0, 2, 60), draw.dirichlet((1, 1), 60)
    values = np.array(["a", "b"] * 30)
    return (
        *measure(true, probabilities, LABEL.names),
        *gaps("sex", values, true, probabilities.argmax(axis=1), 2),
    )


def test_what_is_measured_is_declared_with_its_slice_and_within_its_range():
    for found in declared(measured()):
        rule = Rule(metric=found.metric, slice=found.slice, min=found.value)
        assert wrong_with(rule, FEATURE, LABEL, EVALUATE) is None, found


def test_so_it_is_where_words_are_tagged():
    words, tags = TokensFeature(kind="tokens"), Label(classes=("O", "B-PER", "I-PER", "B-LOC"))
    draw = np.random.default_rng(0)
    true = [draw.integers(0, 4, 5) for _ in range(40)]
    answers = TagAnswers(true, draw.dirichlet((1,) * 4, 200), tags.names)
    part = answers.measure_part("slice:wide", np.ones(40, dtype=bool))
    grouped = gap_between("sex", np.array(["a", "b"] * 20), answers)
    assert {m.metric for m in grouped} == {"accuracy", "entity_f1", "entity_f1_gap"}
    for found in declared((*answers.measure(), *part, *grouped)):
        rule = Rule(metric=found.metric, slice=found.slice, min=found.value)
        assert wrong_with(rule, words, tags, EVALUATE) is None, found
    for metric in ("auroc", "mcnemar_p", "accuracy_gap"):
        wrong = str(wrong_with(Rule(metric=metric, min=0.1), words, tags, EVALUATE))
        assert wrong.startswith(f"metric = '{metric}', must be one of")
    wrong = wrong_with(Rule(metric="recall", slice="class:B-PER", min=0.1), words, tags, EVALUATE)
    assert wrong == "slice = 'class:B-PER', must be one of those that recall is measured on: class:PER, class:LOC"


def test_no_room_that_measures_names_another_metric():
    sources = [path.read_text() for path in (ROOT / "tasks" / "evaluate").glob("*.py")]
    literal = re.compile(r'(?:metric=|_bootstrapped\(|_agreement\()"(\w+)"')
    named = {name for source in sources for name in literal.findall(source)}
    assert {"accuracy", "auroc", "champion_agreement", "model_bytes", "open_ms"} <= named <= set(METRICS)


def test_a_metric_that_nothing_declares_is_a_fault_of_ours():
    with pytest.raises(DrydockError, match="wit is measured"):
        declared((Measurement(metric="wit", value=1, samples=1),))


def test_the_names_that_others_know_are_those_of_the_declaration():
    assert {kind: tuple(changes) for kind, changes in PERTURBATIONS.items()} == PERTURBED
    assert set(PAIRED) == {name for name, metric in METRICS.items() if metric.compares} - {"agreement"}


def test_a_declared_slice_group_and_perturbation_can_be_named():
    for name in ("overall", "slice:wide", "slice:*", "sex=male", "sex=*", "perturbed:noise", "perturbed:*"):
        assert wrong_with(Rule(metric="accuracy", slice=name, min=0.5), FEATURE, LABEL, EVALUATE) is None, name
    still = Evaluate(perturb=())
    assert slices_of(METRICS["accuracy"], FEATURE, LABEL, still) == ["overall"]
    wrong = wrong_with(Rule(metric="accuracy", slice="perturbed:noise", min=0.5), FEATURE, LABEL, still)
    assert wrong == "slice = 'perturbed:noise', must be one of those that accuracy is measured on: overall"
    one = Evaluate(perturb=("missing",))
    assert slices_of(METRICS["accuracy"], FEATURE, LABEL, one) == ["overall", "perturbed:missing"]
