"""Rules that look at many rows at once: what a column shows, and which rows are alike.

Each is computed when its turn comes; only what it found (cells to set, rows to drop) is kept.
"""

from __future__ import annotations

from typing import Any

from tasks.data.cells import bounded, fill_value
from tasks.data.engine import ROW, Engine
from tasks.data.minhash import add_functions
from tasks.data.worktable import IMAGES, NUMBERS, TEXTS, WorkTable, missing
from tasks.spec import clean as c
from tasks.spec.errors import BadRequest

# Pairs of distinct values are compared.
MAX_SPELLINGS = 5_000


def fill(rule: c.Fill, work: WorkTable) -> None:
    """Fill by a value, or by what the rows that are left show."""
    if rule.value is not None:
        fill_value(rule, work, rule.value)
        return
    if work.kind(rule.column) == IMAGES or (rule.by != "mode" and work.kind(rule.column) != NUMBERS):
        work.demand(rule, NUMBERS, f"by = {rule.by} needs numbers")
    known = _known(work, rule.column)
    value = {"mean": _mean, "median": _median, "mode": _mode}[rule.by or "mode"](work.engine, known)
    if value is None:
        raise BadRequest(f"data.clean: rule fill on {rule.column!r}: every value is missing, nothing shows a {rule.by}")
    fill_value(rule, work, value)


def outliers(rule: c.Outliers, work: WorkTable) -> None:
    """Keep numbers near the quartiles of the rows that are left."""
    work.demand(rule, NUMBERS)
    known = _known(work, rule.column)
    low, high = _at(work.engine, known, 0.25), _at(work.engine, known, 0.75)
    if low is None or high is None:
        return
    reach = rule.width * (high - low)
    bounded(rule, work, low - reach, high + reach)


def spelling(rule: c.Spelling, work: WorkTable) -> None:
    """Bring rare spellings to the one frequent value that they are nearest to."""
    import ibis

    text = work.demand(rule, TEXTS)
    counts = work.engine.keep(_known(work, rule.column).group_by("value").agg(n=ibis._.count()))
    if (distinct := work.engine.value(counts.count())) > MAX_SPELLINGS:
        found = f"has {distinct} distinct values, must be {MAX_SPELLINGS} or fewer"
        raise BadRequest(f"data.clean: rule spelling on {rule.column!r}: the column {found}; use synonyms")
    often = counts.select(meant="value", often="n")
    near = work.engine.edits(counts.value, often.meant) <= ibis.greatest(
        counts.value.length(), often.meant.length()
    ) * ibis.literal(rule.max_ratio)
    pairs = counts.join(often, [often.often >= counts.n * rule.times, near])
    pairs = pairs.mutate(distance=work.engine.edits(pairs.value, pairs.meant))
    near_first = pairs.order_by("value", "distance", "meant").select("value", "meant", "distance")
    rows = work.engine.table(near_first).to_pylist()
    nearest: dict[str, list[tuple[int, str]]] = {}
    for row in rows:
        nearest.setdefault(row["value"], []).append((row["distance"], row["meant"]))
    # As near to two values it may be either: it stays.
    meant = {value: near[0][1] for value, near in nearest.items() if len(near) == 1 or near[0][0] < near[1][0]}
    work.change(rule.rule, rule.column, text.substitute(meant, else_=text) if meant else text)


def duplicates(columns: tuple[str, ...], work: WorkTable) -> None:
    """Keep the first of rows that are equal in the columns; missing is equal to missing."""
    import ibis

    rows = work.alive(*columns)
    places = [work.place(name) for name in columns]
    # Two zeros are one number.
    rows = rows.mutate(**{p: rows[p] + 0.0 for p in places if rows[p].type().is_floating()})
    digest = ibis.literal(0, "int64")
    for place in places:
        digest = work.engine.digest(digest, rows[place])
    rows = rows.mutate(digest=digest)
    # Few rows have a twin: only those are compared in full, so the rest costs a number each.
    often = work.engine.keep(rows.group_by("digest").agg(n=ibis._.count()).filter(ibis._.n > 1).select("digest"))
    twins = work.engine.keep(rows.semi_join(often, "digest"))
    window = ibis.window(group_by=[twins[place] for place in places], order_by=twins[ROW])
    first = twins.mutate(kept=twins[ROW].first().over(window))
    lost = first.filter(first["kept"] != first[ROW])
    # What the dropped row is equal to says more than its own long features.
    why = ibis.literal("equal to row ") + lost["kept"].cast("string")
    work.drop_found("drop_duplicates", lost.select(ROW, why=why))


def near_duplicates(rule: c.NearDuplicates, work: WorkTable) -> None:
    """Keep the first of rows whose texts share most of their trigrams."""
    import ibis

    work.demand(rule, TEXTS)
    bands, similarity = add_functions(work.engine)
    rows = work.engine.keep(_known(work, rule.column, with_row=True))
    banded = rows.select(ROW, band=bands(rows["value"]).unnest())
    firsts = banded.group_by("band").agg(first=banded[ROW].min(), n=banded.count())
    pairs = banded.join(firsts.filter(firsts["n"] > 1), "band")
    pairs = pairs.filter(pairs["first"] != pairs[ROW]).select(ROW, "first").distinct()
    other = rows.select(first=rows[ROW], other=rows["value"])
    compared = pairs.join(rows, ROW).join(other, "first")
    alike = compared.filter(similarity(compared["value"], compared["other"]) >= rule.similarity)
    lost = alike.group_by(ROW).agg(first=alike["first"].min())
    why = ibis.literal("like row ") + lost["first"].cast("string")
    work.drop_found(rule.rule, lost.select(ROW, why=why))


def _known(work: WorkTable, column: str, with_row: bool = False) -> Any:
    """The values of a column that are not missing, in the rows that are left."""
    rows = work.alive(column)
    value = rows[work.place(column)]
    return rows.filter(~missing(value)).select(*([ROW] if with_row else []), value=value)


def _mean(engine: Engine, known: Any) -> float | None:
    found = engine.value(known["value"].mean())
    # A sum's last digits depend on the order in which cores add; the same request must give the same bytes.
    return None if found is None else float(f"{found:.12g}")


def _median(engine: Engine, known: Any) -> float | None:
    return _at(engine, known, 0.5)


def _at(engine: Engine, known: Any, ratio: float) -> float | None:
    """The value that ``ratio`` of the values are at or below: exact, and by a sort that needs no memory."""
    rows = engine.value(known.count())
    place = max(0, int(rows * ratio + 0.5) - 1)
    return engine.value(known.order_by("value").limit(1, offset=place))


def _mode(engine: Engine, known: Any) -> Any:
    import ibis

    counts = known.group_by("value").agg(n=ibis._.count())
    return engine.value(counts.order_by(ibis.desc("n"), "value").limit(1).select("value"))
