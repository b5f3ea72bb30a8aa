"""What evaluation measures: each metric once, with where it is measured and what its value may be.

A gate's rules are held against this when a workload file is read, and ``tasks.evaluate`` measures nothing that it
does not name, so a rule that is taken has its measurement.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from tasks.spec.entities import kinds_of
from tasks.spec.errors import DrydockError
from tasks.spec.evaluate import Evaluate
from tasks.spec.feature import Feature
from tasks.spec.fields import closest_first
from tasks.spec.label import Target
from tasks.spec.rules import Measurement, Rule

# Where: on all rows; on a class; a declared slice; a group of a column's values; the column; changed inputs.
Place = Literal["overall", "class", "slice", "value", "group", "perturbed"]
INFINITE = float("inf")


OVERALL: tuple[Place, ...] = ("overall",)


class Metric(NamedTuple):
    """Where a metric is measured on rows of one class each, where on tagged words (none: there too), where on numbers,
    and where on texts whose next piece is told (none: as on numbers); the least and the most it can be; whether it
    compares two models by itself, is of items that are ranked for a user, or is by piece, of which two models may have
    others."""

    places: tuple[Place, ...] = OVERALL
    tagged: tuple[Place, ...] | None = None
    number: tuple[Place, ...] = ()
    next: tuple[Place, ...] | None = None
    least: float = 0.0
    most: float = INFINITE
    compares: bool = False
    ranks: bool = False
    by_piece: bool = False

    def places_of(self, feature: Feature, label: Target) -> tuple[Place, ...]:
        if self.ranks and feature.kind != "ids":
            return ()
        if label.kind == "next" and self.next is not None:
            return self.next
        if label.kind != "class":
            return self.number
        return self.tagged if self.tagged is not None and feature.kind == "tokens" else self.places


METRICS = {
    "accuracy": Metric(("overall", "slice", "value", "perturbed"), most=1),
    "macro_f1": Metric(("overall", "slice"), tagged=("overall",), most=1),
    "precision": Metric((), tagged=("class",), most=1),
    "recall": Metric(("class",), most=1),
    "f1": Metric(("class",), most=1),
    "entity_precision": Metric((), tagged=("overall",), most=1),
    "entity_recall": Metric((), tagged=("overall",), most=1),
    "entity_f1": Metric((), tagged=("overall", "slice", "value", "perturbed"), most=1),
    "rmse": Metric((), number=("overall", "slice", "value", "perturbed"), next=()),
    "mae": Metric((), number=("overall", "slice", "value", "perturbed"), next=()),
    "ndcg_at_10": Metric((), number=OVERALL, most=1, ranks=True),
    "recall_at_10": Metric((), number=OVERALL, most=1, ranks=True),
    "perplexity": Metric((), next=("overall", "slice", "value"), least=1, by_piece=True),
    "bits_per_character": Metric((), next=("overall", "slice", "value")),
    "auroc": Metric(tagged=(), most=1),
    "calibration_error": Metric(most=1),
    "log_loss": Metric(),
    "accuracy_gap": Metric(("group",), tagged=(), most=1),
    "selection_gap": Metric(("group",), tagged=(), most=1),
    "recall_gap": Metric(("group",), tagged=(), most=1),
    "entity_f1_gap": Metric((), tagged=("group",), most=1),
    "rmse_gap": Metric((), number=("group",), next=()),
    "bits_per_character_gap": Metric((), next=("group",)),
    "out_of_range": Metric(number=OVERALL, most=1),
    "p50_ms": Metric(number=OVERALL),
    "p99_ms": Metric(number=OVERALL),
    "rows_per_second": Metric(number=OVERALL),
    "joules_per_1000": Metric(number=OVERALL),
    "cost_per_million": Metric(number=OVERALL),
    "model_bytes": Metric(number=OVERALL),
    "memory_bytes": Metric(number=OVERALL),
    "open_ms": Metric(number=OVERALL),
    "accuracy_gain": Metric(tagged=(), least=-1, most=1, compares=True),
    "entity_f1_gain": Metric((), tagged=("overall",), least=-1, most=1, compares=True),
    "rmse_gain": Metric((), number=OVERALL, next=(), least=-INFINITE, compares=True),
    "bits_gain": Metric((), next=OVERALL, least=-INFINITE, compares=True),
    "mcnemar_p": Metric(tagged=(), most=1, compares=True),
    "champion_agreement": Metric(most=1, compares=True),
    "agreement": Metric(most=1, compares=True),
}
# How inputs are changed for ``perturbed:NAME``, by the feature's kind; ``tasks.evaluate.robust`` does it.
PERTURBED = {
    "image": ("noise", "blur", "shift"),
    "text": ("typos", "upper-case"),
    "tokens": ("typos", "lower-case"),
    "table": ("noise", "missing"),
    "ids": ("unknown-user", "unknown-item"),
}


def perturbations(feature: Feature, label: Target, evaluate: Evaluate) -> tuple[str, ...]:
    """Return the names of the ways in which a workload's inputs are changed. Where the next piece of texts is told,
    none: a text with a slip is less likely, and a model that says so is right.

    Raises:
        ValueError: one that is declared does not fit the feature.
    """
    fitting = () if label.kind == "next" else PERTURBED[feature.kind]
    for name in evaluate.perturb or ():
        if name not in fitting:
            known = closest_first(name, fitting) or "left out where the next piece is told"
            raise ValueError(f"evaluate.perturb = {name!r}, must be {'one of ' if fitting else ''}{known}")
    return fitting if evaluate.perturb is None else evaluate.perturb


def declared(measured: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
    """Return what was measured.

    Raises:
        DrydockError: a metric that ``METRICS`` doesn't name, which no rule could be on.
    """
    if unknown := sorted({m.metric for m in measured} - set(METRICS)):
        raise DrydockError(f"{unknown[0]} is measured, and tasks/spec/metrics.py has no such metric")
    return measured


def slices_of(metric: Metric, feature: Feature, label: Target, evaluate: Evaluate) -> list[str]:
    """Return the names of the slices on which a workload's metric is measured; ``COLUMN=*`` stands for its values."""
    classes = kinds_of(label.names) if feature.kind == "tokens" else label.names
    by_place: dict[Place, list[str]] = {
        "overall": ["overall"],
        "class": [f"class:{name}" for name in classes],
        "slice": [f"slice:{item.name}" for item in evaluate.slices],
        "value": [f"{column}=*" for column in evaluate.groups],
        "group": [f"group:{column}" for column in evaluate.groups],
        "perturbed": [f"perturbed:{name}" for name in perturbations(feature, label, evaluate)],
    }
    return [name for place in metric.places_of(feature, label) for name in by_place[place]]


def wrong_with(rule: Rule, feature: Feature, label: Target, evaluate: Evaluate) -> str | None:
    """Return what makes a rule impossible, as ``field = found, what is allowed``; none: it can be judged."""
    known = {name: metric for name, metric in METRICS.items() if metric.places_of(feature, label)}
    metric = known.get(rule.metric)
    if metric is None:
        return f"metric = {rule.metric!r}, must be one of {closest_first(rule.metric, known)}"
    slices = slices_of(metric, feature, label, evaluate)
    if not slices:
        where = " or ".join(metric.places_of(feature, label))
        return f"metric = {rule.metric!r} is measured by {where}, and section evaluate declares none"
    if not any(_is_on(rule.slice, name) for name in slices):
        told = closest_first(rule.slice, slices)
        return f"slice = {rule.slice!r}, must be one of those that {rule.metric} is measured on: {told}"
    if metric.compares and rule.against is not None:
        return f"against = {rule.against!r}, must be left out: {rule.metric} compares by itself, and takes min or max"
    if metric.by_piece and rule.against is not None:
        return f"against = {rule.against!r}: two models may read other pieces; take bits_per_character or bits_gain"
    return _beyond(rule, metric)


def _is_on(asked: str, name: str) -> bool:
    """Whether a rule's slice, which may be a pattern, is or holds a slice that is measured."""
    column, mark, _ = asked.partition("=")
    if mark and name.endswith("=*"):
        return fnmatchcase(name.removesuffix("=*"), column)
    return fnmatchcase(name, asked)


def _beyond(rule: Rule, metric: Metric) -> str | None:
    """The first limit that the metric's value can't be on either side of."""
    for name in ("min", "max"):
        limit = getattr(rule, name)
        if limit is not None and not metric.least <= limit <= metric.most:
            return f"{name} = {limit:g}, must be {_range(metric.least, metric.most)} for {rule.metric}"
    width = metric.most - metric.least
    for name in ("max_drop", "max_rise"):
        limit = getattr(rule, name)
        if limit is not None and abs(limit) > width:
            return f"{name} = {limit:g}, must be {_range(-width, width)} for {rule.metric}"
    return None


def _range(least: float, most: float) -> str:
    if least == -INFINITE:
        return "any number"
    return f"{least:g} or more" if most == INFINITE else f"from {least:g} to {most:g}"
