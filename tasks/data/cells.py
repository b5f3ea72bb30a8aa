"""Rules on single cells: each is an expression over its own row, so all of them are one pass over the table."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tasks.data.convert import MISSING
from tasks.data.expression import expression
from tasks.data.worktable import NUMBERS, TEXTS, WHOLE_ROW, WorkTable, missing, num_words
from tasks.spec import clean as c
from tasks.spec.errors import BadRequest

# What Python's str.strip() takes for white space.
SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)
TIME_DIRECTIVE = re.compile(r"%-?[HIMSpfcXTsg]")
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"


def trim(rule: c.Trim, work: WorkTable) -> None:
    work.change(rule.rule, rule.column, work.engine.strip(work.demand(rule, TEXTS), SPACES))


def case(rule: c.Case, work: WorkTable) -> None:
    text = work.demand(rule, TEXTS)
    title = _by_text(work, "to_title", str.title)
    new = title(text) if rule.to == "title" else work.engine.case(text, rule.to)
    work.change(rule.rule, rule.column, new)


def unicode_form(rule: c.UnicodeForm, work: WorkTable) -> None:
    import unicodedata

    # Not Arrow's own: its NFC leaves e and an accent two characters (25.0).
    normal = _by_text(work, f"to_{rule.form.lower()}", lambda text: unicodedata.normalize(rule.form, text))
    work.change(rule.rule, rule.column, normal(work.demand(rule, TEXTS)))


def replace(rule: c.Replace, work: WorkTable) -> None:
    new = work.engine.replace(work.demand(rule, TEXTS), rule.pattern, rule.by)
    work.change(rule.rule, rule.column, new)


def match(rule: c.Match, work: WorkTable) -> None:
    text = work.demand(rule, TEXTS)
    _act(rule, work, ~work.engine.search(text, rf"\A(?:{rule.pattern})\z") & ~missing(text))


def synonyms(rule: c.Synonyms, work: WorkTable) -> None:
    text = work.demand(rule, TEXTS)
    work.change(rule.rule, rule.column, text.substitute(dict(rule.replace), else_=text))


def allowed_values(rule: c.AllowedValues, work: WorkTable) -> None:
    text = work.demand(rule, TEXTS)
    _act(rule, work, ~text.isin(list(rule.values)) & ~missing(text))


def parse_number(rule: c.ParseNumber, work: WorkTable) -> None:
    text = _value(work, work.demand(rule, TEXTS))
    if rule.thousands:
        mark, point = re.escape(rule.thousands), re.escape(rule.decimal)
        # Only where every group has three digits: 1,5 is no fifteen.
        grouped = rf"\A[+-]?\d{{1,3}}(?:{mark}\d{{3}})+(?:{point}\d*)?\z"
        text = text.re_search(grouped).ifelse(text.replace(rule.thousands, ""), text)
    if rule.decimal == ",":
        text = text.contains(".").ifelse("?", text.replace(",", "."))
    _parsed(rule, work, _float(text))


def parse_date(rule: c.ParseDate, work: WorkTable) -> None:
    timed = any(TIME_DIRECTIVE.search(form) for form in rule.formats)
    shape = "%Y-%m-%dT%H:%M:%S" if timed else "%Y-%m-%d"
    text = _value(work, work.demand(rule, TEXTS))
    _parsed(rule, work, work.engine.time(text, rule.formats, None if rule.into == "seconds" else shape))


def parse_unit(rule: c.ParseUnit, work: WorkTable) -> None:
    import ibis

    text = _value(work, work.demand(rule, TEXTS))
    # Without \s and the dot, which mean something else to Java.
    pattern = rf"\A({NUMBER})[\t\n\f\r ]*([^\n]*)\z"
    unit = text.re_extract(pattern, 2)
    known = dict(rule.units) | ({"": rule.units[rule.default]} if rule.default else {})
    factor = unit.substitute(known, else_=ibis.null("float64")).cast("float64")
    _parsed(rule, work, _float(text.re_extract(pattern, 1)) * factor)


def drop_missing(rule: c.DropMissing, work: WorkTable) -> None:
    work.drop(rule.rule, rule.column, missing(work[rule.column]))


def flag_missing(rule: c.FlagMissing, work: WorkTable) -> None:
    work.add(rule.into, missing(work[rule.column]).cast("int8").cast("float64"))


def bounded(rule: c.Range | c.Outliers, work: WorkTable, low: float | None, high: float | None) -> None:
    """Keep numbers from ``low`` to ``high``. A missing number is not out of range."""
    number = work[rule.column]
    kept = number if low is None else (number < low).ifelse(low, number)
    kept = kept if high is None else (kept > high).ifelse(high, kept)
    if rule.action == "clip":
        work.change(rule.rule, rule.column, kept)
    else:
        _act(rule, work, kept != number)


def in_range(rule: c.Range, work: WorkTable) -> None:
    work.demand(rule, NUMBERS)
    bounded(rule, work, rule.min, rule.max)


def condition(rule: c.Condition, work: WorkTable) -> None:
    import ibis

    broken = ~expression(work, rule.rule, rule.where, "boolean")
    work.drop(rule.rule, WHOLE_ROW, broken, ibis.literal(f"not {rule.where}"))


def sql(rule: c.Sql, work: WorkTable) -> None:
    kind = work.kind(rule.column)
    if kind not in (TEXTS, NUMBERS):
        work.demand(rule, TEXTS)
    new = expression(work, rule.rule, rule.expression, "float64" if kind == NUMBERS else "string")
    # No model reads an infinite number, and NaN is one more way to be missing.
    work.change(rule.rule, rule.column, _finite(new) if kind == NUMBERS else new)


def fill_value(rule: c.Fill, work: WorkTable, value: Any) -> None:
    column = work[rule.column]
    kind = TEXTS if isinstance(value, str) else NUMBERS
    work.demand(rule, kind, f"value = {value!r}")
    work.change(rule.rule, rule.column, missing(column).ifelse(value, column))


def allowed_labels(names: tuple[str, ...], column: str, work: WorkTable, words: str | None = None) -> None:
    label = work[column]
    if words is None:
        bad = ~label.isin(list(names))
    else:
        bad = ~work.engine.search(label, tags_pattern(names)) | (num_words(label) != num_words(work[words]))
    work.drop("allowed_labels", column, bad | label.isnull())


def tags_pattern(names: tuple[str, ...]) -> str:
    """Return the pattern (RE2) of a label that is one or more allowed tags."""
    tag = f"(?:{'|'.join(map(re.escape, names))})"
    return rf"^{tag}(?: {tag})*$"


def _act(rule: Any, work: WorkTable, bad: Any) -> None:
    """Drop the rows, or empty the cells, that break a rule."""
    column = work[rule.column]
    if rule.action == "drop":
        work.drop(rule.rule, rule.column, bad)
    else:
        work.change(rule.rule, rule.column, bad.ifelse(None, column))


def _parsed(rule: Any, work: WorkTable, new: Any) -> None:
    """Set a column to what was read from its texts; what had a text and gave nothing is acted on."""
    before = work[rule.column]
    bad = new.isnull() & _value(work, before).notnull()
    if rule.action == "missing":
        work.change(rule.rule, rule.column, new)
        return
    work.table = work.table.mutate(read=new)
    work.drop(rule.rule, rule.column, bad, work.as_text(before))
    work.change(rule.rule, rule.column, work.table["read"])


def _value(work: WorkTable, text: Any) -> Any:
    """A text without the white space around it; null where it says that it is missing."""
    stripped = work.engine.strip(text, SPACES)
    return stripped.lower().isin(["", *MISSING]).ifelse(None, stripped)


def _float(text: Any) -> Any:
    """Finite numbers; null for any other text (the engine's own cast would also take 1_000 and 0x10)."""
    return _finite(text.re_search(rf"\A{NUMBER}\z").ifelse(text, None).try_cast("float64"))


def _finite(number: Any) -> Any:
    return (number.isnan() | number.isinf()).ifelse(None, number)


def _by_text(work: WorkTable, name: str, call: Callable[[str], str]) -> Any:
    """A function on single texts that the engine lacks, as one on columns."""
    import pyarrow as pa

    def over(texts: Any) -> Any:
        return pa.array([None if text is None else call(text) for text in texts.to_pylist()], pa.string())

    return work.engine.function(over, name, ("string",), "string")


def check_pattern(rule: str, pattern: str) -> None:
    """Refuse a regular expression that Python knows and the engine (RE2) does not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""]), pattern)
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:120]
        found = f"{pattern!r} can't be used: {reason}"
        raise BadRequest(f"data.clean: rule {rule}: {found}; RE2 has no look-around") from None
