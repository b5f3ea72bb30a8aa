"""Repair by functional dependencies: rows of one determinant agree, so what most of them say is true for all.

Where the rows say who they come from, the sources are weighed by how often each is right, which is found out
together with what is true (Dong, Berti-Equille and Srivastava, "Integrating conflicting data", PVLDB 2009, their
ACCU without the copying): a vote weighs ln(n A / (1 - A)), A the source's accuracy, n the number of wrong values
about. One accuracy serves all the dependent columns, so a source that is caught in one is doubted in the others.
"""

from __future__ import annotations

from typing import Any

from tasks.data.engine import ROW, Engine
from tasks.data.worktable import IMAGES, WorkTable, missing
from tasks.spec import clean as c
from tasks.spec.errors import BadRequest

ROUNDS = 20
FIRST_ACCURACY = 0.7
# A source with few claims is drawn to the middle, and none is ever beyond doubt.
PRIOR_ACCURACY, PRIOR_CLAIMS = 0.6, 2
LEAST, MOST = 0.02, 0.98
# Beyond these digits the sums depend on the order in which cores add.
DIGITS = 9


def dependency(rule: c.Dependency, work: WorkTable) -> None:
    """Set each dependent column to its one true value within rows of equal determinant."""
    for name in rule.named_columns:
        if work.kind(name) == IMAGES:
            raise BadRequest(f"data.clean: rule dependency on {name!r}: the column holds images")
    truth = _by_source(rule, work) if rule.source else None
    for number, column in enumerate(rule.dependent):
        winners = _by_majority(rule, work, column) if truth is None else truth.filter(truth["number"] == number)
        _patch(rule, work, column, winners)


def _patch(rule: c.Dependency, work: WorkTable, column: str, winners: Any) -> None:
    """Set the cells that differ from their winner: ``key`` and ``meant``, as texts."""
    rows = _keyed(rule, work, column)
    found = rows.join(winners.select("key", "meant"), "key")
    wrong = found.filter(found["value"].isnull() | (found["value"] != found["meant"]))
    work.patch("dependency", column, wrong.select(ROW, value=wrong["meant"]))


def _by_majority(rule: c.Dependency, work: WorkTable, column: str) -> Any:
    """The value that more than half of the rows have, of those that have one."""
    import ibis

    rows = _keyed(rule, work, column)
    counts = rows.filter(rows["value"].notnull()).group_by("key", "value").agg(n=ibis._.count())
    shared = counts.mutate(total=counts["n"].sum().over(group_by="key"))
    return work.engine.keep(shared.filter(shared["n"] * 2 > shared["total"]).select("key", meant="value"))


def _keyed(rule: c.Dependency, work: WorkTable, column: str, *more: str) -> Any:
    """Rows that are left, whose determinant is whole: ``row``, ``key``, ``value`` (a text, null where missing)."""
    import ibis

    rows = work.alive(*rule.determinant, column, *more)
    sides = [rows[work.place(name)] for name in rule.determinant]
    whole = rows.filter(*(~missing(side) for side in sides))
    parts = [work.as_text(whole[work.place(name)]) for name in rule.determinant]
    # Each part with its length before it, so that no two determinants make one key.
    key = parts[0] if len(parts) == 1 else ibis.literal("").join([p.length().cast("string") + ":" + p for p in parts])
    value = whole[work.place(column)]
    others = {name: work.as_text(whole[work.place(name)]) for name in more}
    return whole.select(ROW, key=key, value=work.as_text(missing(value).ifelse(None, value)), **others)


def _by_source(rule: c.Dependency, work: WorkTable) -> Any:
    """The truth that the sources' claims support: ``number`` of the dependent column, ``key``, ``meant``."""
    import ibis

    claims = work.engine.keep(_claims(rule, work))
    allowed = work.engine.keep(_candidates(claims, rule.trusted))
    wrong = _wrong_values(work.engine, claims)
    weight: Any = ibis.literal(_weight(FIRST_ACCURACY, wrong))
    belief = work.engine.keep(_beliefs(claims, allowed, claims.select("source").distinct().mutate(weight=weight)))
    for _ in range(ROUNDS):
        weights = work.engine.keep(_weights(claims, belief, wrong))
        belief = work.engine.keep(_beliefs(claims, allowed, weights))
    best = belief.mutate(
        place=ibis.row_number().over(
            group_by=["number", "key"], order_by=[ibis.desc("belief"), ibis.desc("votes"), "value"]
        )
    )
    return work.engine.keep(best.filter(best["place"] == 0).select("number", "key", meant="value"))


def _claims(rule: c.Dependency, work: WorkTable) -> Any:
    """Who says what about which cell: ``number``, ``key``, ``value``, ``source``, each once."""
    import ibis

    assert rule.source is not None
    parts = []
    for number, column in enumerate(rule.dependent):
        rows = _keyed(rule, work, column, rule.source).rename(source=rule.source)
        rows = rows.filter(rows["value"].notnull() & rows["source"].notnull())
        parts.append(rows.select("key", "value", "source", number=ibis.literal(number, "int32")).distinct())
    return ibis.union(*parts) if len(parts) > 1 else parts[0]


def _candidates(claims: Any, trusted: tuple[str, ...]) -> Any:
    """The values that may win: where a trusted source has spoken, only what trusted ones say."""
    values = claims.select("number", "key", "value").distinct()
    if not trusted:
        return values
    said = claims.filter(claims["source"].isin(list(trusted))).select("number", "key", "value").distinct()
    unsaid = values.anti_join(said.select("number", "key").distinct(), ["number", "key"])
    return unsaid.union(said)


def _wrong_values(engine: Engine, claims: Any) -> float:
    """How many wrong values there are beside a true one, at least 1: the mean over all cells."""
    values = engine.value(claims.select("number", "key", "value").distinct().count())
    cells = engine.value(claims.select("number", "key").distinct().count())
    return max(1.0, values / max(1, cells) - 1)


def _weight(accuracy: float, wrong: float) -> float:
    import math

    return math.log(wrong * accuracy / (1 - accuracy))


def _weights(claims: Any, belief: Any, wrong: float) -> Any:
    """Each source's weight, by the mean belief in what it says."""
    believed = claims.left_join(belief, ["number", "key", "value"])
    told = believed.group_by("source").agg(sum=believed["belief"].fill_null(0.0).sum(), n=believed.count())
    accuracy = (told["sum"] + PRIOR_ACCURACY * PRIOR_CLAIMS) / (told["n"] + PRIOR_CLAIMS)
    accuracy = accuracy.round(DIGITS).clip(LEAST, MOST)
    return told.select("source", weight=(accuracy / (1 - accuracy) * wrong).ln())


def _beliefs(claims: Any, allowed: Any, weights: Any) -> Any:
    """The probability of each value that may win, given the sources' weights."""
    voted = claims.semi_join(allowed, ["number", "key", "value"]).join(weights, "source")
    votes = voted.group_by("number", "key", "value").agg(votes=voted["weight"].sum())
    votes = votes.mutate(votes=votes["votes"].round(DIGITS))
    cell = ["number", "key"]
    raised = votes.mutate(power=(votes["votes"] - votes["votes"].max().over(group_by=cell)).exp())
    share = (raised["power"] / raised["power"].sum().over(group_by=cell)).round(DIGITS)
    return raised.select("number", "key", "value", "votes", belief=share)
