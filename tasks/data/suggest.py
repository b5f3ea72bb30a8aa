"""Cleaning rules that a table itself suggests, each with its support: for a person to read, and to paste.

Nothing is learnt beyond the table: white space, texts that are numbers or dates, equal rows, far numbers, rare
spellings beside frequent ones, and functional dependencies (``tasks.data.discover``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tasks.data.discover import Dependent, Sample, discover
from tasks.data.duck import duck
from tasks.data.rawrows import RawRows
from tasks.spec.clean import CleanRule

MEMORY_BYTES = 256 << 20
# Texts are numbers or dates where nearly all are.
MOST = 0.97
DATES = ("%Y-%m-%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S")
# Spellings: of columns of few values, in words rather than codes.
MAX_VALUES, MIN_LETTERS, MAX_RARE = 300, 4, 0.1
FAR = 10.0


class Suggestion(NamedTuple):
    """A rule as a workload file has it; the share of ``rows`` that bear it out, and what was seen."""

    rule: CleanRule
    support: float
    rows: int
    why: str


def suggest(path: Path, scratch: Path, protected: tuple[str, ...] = ()) -> list[Suggestion]:
    """Return rules for a Parquet file of texts and numbers, in the order in which they should be applied.

    ``protected`` columns (label, split) are never repaired, nor do they decide on others. The same file gives the
    same rules.
    """
    with duck(scratch, [path.parent], MEMORY_BYTES) as running:
        sample = Sample(running, path, RawRows(path).schema)
        numbers = {field.name for field in RawRows(path).schema if str(field.type) == "double"}
        open_to = [name for name in sample.names if name not in protected]
        texts = [name for name in open_to if name not in numbers]
        found = [item for name in texts for item in _of_text(sample, name)]
        parsed = {item.rule.column for item in found if item.rule.rule.startswith("parse")}  # type: ignore[union-attr]
        found += [item for name in texts if name not in parsed for item in _spelling(sample, name)]
        found += [item for name in open_to if name in numbers for item in _far(sample, name)]
        shown = [item for item in discover(sample) if not {*item.determinant, item.dependent} & set(protected)]
        is_whole = len(sample.names) == len(RawRows(path).schema)
        return found + dependencies(shown, sample.names) + (_twins(sample) if is_whole else [])


def fragment(found: list[Suggestion], what: str) -> str:
    """Return suggestions as YAML that can be pasted into the data section of a workload file."""
    import yaml

    if not found:
        return f"# {what}: nothing to suggest"
    lines = [f"# Found in {what}. Read them, keep what is true, and paste it into data.", "clean:"]
    for item in found:
        rule = {"rule": item.rule.rule} | item.rule.model_dump(mode="json", exclude_defaults=True)
        dumped = yaml.safe_dump(rule, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
        lines += [f"  # {item.support:.1%} of {item.rows} rows: {item.why}", f"  - {dumped.strip()}"]
    return "\n".join(lines)


def dependencies(found: list[Dependent], names: list[str]) -> list[Suggestion]:
    """Return dependencies as few rules: columns that give each other are one thing under several names.

    The name with the most support is its key: first the others set it right, then it sets the others right, and
    whatever else follows from it.
    """
    known = {(item.determinant[0], item.dependent): item for item in found if len(item.determinant) == 1}
    groups = _groups(known, names)
    key_of = {name: _key(group, known) for group in groups for name in group}
    rules = [
        _dependency([known[name, key]])
        for group in groups
        for key in [key_of[group[0]]]
        for name in sorted(group, key=lambda name: -known[name, key].support if name != key else 0)
        if name != key
    ]
    by_key: dict[str, list[Dependent]] = {}
    for name in names:
        inner = known.get((key_of[name], name)) if name in key_of and key_of[name] != name else None
        outer = [item for (one, two), item in known.items() if two == name and key_of.get(one, one) == one]
        best = inner or max(outer, key=lambda item: (item.support, item.rows), default=None)
        # What gives a key of its own group is left to the group.
        if best and key_of.get(name) != name:
            by_key.setdefault(best.determinant[0], []).append(best)
    rules += [_dependency(items) for items in by_key.values()]
    return rules + [_dependency([item]) for item in found if len(item.determinant) > 1]


def _groups(known: dict[tuple[str, str], Dependent], names: list[str]) -> list[list[str]]:
    """Columns of which each gives every other, greedily, in the table's order."""
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            if all((name, other) in known and (other, name) in known for other in group):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def _key(group: list[str], known: dict[tuple[str, str], Dependent]) -> str:
    def support(name: str) -> float:
        return sum(known[name, other].support + known[other, name].support for other in group if other != name)

    return max(group, key=support)


def _dependency(items: list[Dependent]) -> Suggestion:
    determinant, dependent = list(items[0].determinant), [item.dependent for item in items]
    support, rows = min(item.support for item in items), min(item.rows for item in items)
    why = f"{' and '.join(determinant)} {'give' if len(determinant) > 1 else 'gives'} {', '.join(dependent)}"
    return _suggestion(support, rows, why, rule="dependency", determinant=determinant, dependent=dependent)


def _of_text(sample: Sample, name: str) -> list[Suggestion]:
    """White space, and texts that say numbers or dates."""
    column = sample.column(name)
    dates = ", ".join(f"count(try_strptime({column}, '{form}'))" for form in DATES)
    numbers = f"count(*) FILTER (WHERE regexp_full_match({column}, '[+-]?(\\d+(\\.\\d*)?|\\.\\d+)([eE][+-]?\\d+)?'))"
    zeros = f"count(*) FILTER (WHERE regexp_full_match({column}, '0\\d+'))"
    # Some texts have them rightly: only where the same text stands there with single spaces too.
    single = f"regexp_replace({column}, ' {{2,}}', ' ', 'g')"
    padded = f"count(*) FILTER (WHERE {column} <> {single} AND {single} IN (SELECT {column} FROM sample))"
    query = f"SELECT count({column}), {numbers}, {zeros}, {padded}, {dates} FROM sample"
    there, number, zero, spaced, *by_form = sample.run(query)[0]
    if not there:
        return []
    # A zip code or a telephone number has leading zeros: it is a name, not a number.
    if number >= MOST * there and not zero and sample.distinct[name] > MAX_VALUES:
        why = f"{number} of {there} texts are numbers"
        return [_suggestion(number / there, there, why, rule="parse_number", column=name, action="missing")]
    best = max(range(len(DATES)), key=lambda place: by_form[place])
    # What is of the form that parse_date gives needs no parsing.
    if by_form[best] >= MOST * there and DATES[best] != "%Y-%m-%d":
        forms, why = [DATES[best]], f"{by_form[best]} of {there} texts are dates of one form"
        return [_suggestion(by_form[best] / there, there, why, rule="parse_date", column=name, formats=forms,
                            action="missing")]  # fmt: skip
    if 0 < spaced <= MAX_RARE * there:
        why = f"{spaced} of {there} texts have several spaces in a row"
        return [_suggestion(1 - spaced / there, there, why, rule="replace", column=name, pattern=" {2,}", by=" ")]
    return []


def _spelling(sample: Sample, name: str) -> list[Suggestion]:
    """Rare values near to a frequent one, as the rule ``spelling`` sees them."""
    if not 1 < sample.distinct[name] <= MAX_VALUES:
        return []
    column = sample.column(name)
    counts = f"(SELECT {column} AS v, count(*) AS n FROM sample WHERE {column} IS NOT NULL GROUP BY {column})"
    words = f"avg((length(v) >= {MIN_LETTERS} AND NOT regexp_matches(v, '[0-9]'))::INT)"
    there, is_words = sample.run(f"SELECT sum(n), {words} FROM {counts}")[0]
    near = "levenshtein(a.v, b.v) <= 0.25 * greatest(length(a.v), length(b.v))"
    rare = f"SELECT DISTINCT a.v, a.n FROM {counts} a JOIN {counts} b ON b.n >= 5 * a.n AND {near}"
    wrong = int(sample.run(f"SELECT coalesce(sum(n), 0) FROM ({rare})")[0][0])
    if not wrong or is_words < 0.9 or wrong > MAX_RARE * there:
        return []
    why = f"{wrong} of {there} texts are rare spellings near to a frequent one"
    return [_suggestion(1 - wrong / there, int(there), why, rule="spelling", column=name)]


def _far(sample: Sample, name: str) -> list[Suggestion]:
    """Numbers far from all others."""
    number = f"{sample.column(name)}::DOUBLE"
    low, high = sample.run(f"SELECT quantile_disc({number}, 0.25), quantile_disc({number}, 0.75) FROM sample")[0]
    if low is None or high <= low:
        return []
    reach = FAR * (high - low)
    off = f"count(*) FILTER (WHERE {number} < {low - reach!r} OR {number} > {high + reach!r})"
    there, far = sample.run(f"SELECT count({number}), {off} FROM sample")[0]
    if not 0 < far <= 0.01 * there:
        return []
    why = f"{far} of {there} numbers are beyond {FAR:g} interquartile ranges"
    return [_suggestion(1 - far / there, there, why, rule="outliers", column=name, width=FAR, action="missing")]


def _twins(sample: Sample) -> list[Suggestion]:
    columns = ", ".join(sample.column(name) for name in sample.names)
    (distinct,) = sample.run(f"SELECT count(*) FROM (SELECT DISTINCT {columns} FROM sample)")[0]
    if distinct == sample.rows:
        return []
    why = f"{sample.rows - distinct} rows are equal to an earlier one"
    return [_suggestion(distinct / sample.rows, sample.rows, why, rule="drop_duplicates", columns=sample.names)]


def _suggestion(support: float, rows: int, why: str, **rule: Any) -> Suggestion:
    from tasks.spec.value import Value

    class One(Value):
        rule: CleanRule

    return Suggestion(One.parse({"rule": rule}, "a suggestion").rule, round(float(support), 4), int(rows), why)
