"""The table that rules work on: one lazy expression that remembers what each rule did to each row.

Nothing is copied from rule to rule. A rule on cells adds an expression; a rule on groups of rows is computed at
once, and what it found (few rows) is joined. So whatever the number of rows, what is held is what was repaired.

Beside its columns the table has ``dropped``, the number of the entry that dropped the row (none: it is alive),
and for each entry ``before<n>`` and ``after<n>``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tasks.data.engine import ROW, Engine
from tasks.spec.errors import BadRequest

DROPPED = "dropped"
# The column of a dropped row where no single one is the cause.
WHOLE_ROW = "*"
TEXTS, NUMBERS, IMAGES = "texts", "numbers", "images"


class Entry(NamedTuple):
    """One rule's work on one column. ``found`` is false where it is known to have found nothing."""

    rule: str
    column: str
    drops: bool
    found: bool


class WorkTable:
    """Columns are named as in the workload; ``work[name]`` is the column as the rules before have left it."""

    def __init__(self, engine: Engine, table: Any, names: list[str], images: str | None) -> None:
        import ibis

        self.engine, self.entries, self._images = engine, list[Entry](), images
        self._places = {name: f"c{place}" for place, name in enumerate(names)}
        numbers = {place: _number(table[place]) for place in self._places.values() if table[place].type().is_floating()}
        self.table = table.mutate(**numbers, **{DROPPED: ibis.null("int32")})

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def place(self, name: str) -> str:
        """Return the column's name within the engine."""
        return self._places[name]

    def __getitem__(self, name: str) -> Any:
        return self.table[self._places[name]]

    def kind(self, name: str) -> str:
        """Return what a column holds: texts, numbers or images."""
        if name == self._images:
            return IMAGES
        return NUMBERS if self[name].type().is_numeric() else TEXTS

    def demand(self, rule: Any, kind: str, why: str = "") -> Any:
        """Return the rule's column, which must hold ``kind``.

        Raises:
            BadRequest: it holds something else.
        """
        if (found := self.kind(rule.column)) != kind:
            reason = why or f"needs {kind}"
            raise BadRequest(f"data.clean: rule {rule.rule} on {rule.column!r}: {reason}, the column holds {found}")
        return self[rule.column]

    def add(self, name: str, values: Any) -> None:
        """Add a column."""
        self._places[name] = f"c{len(self._places)}"
        self.table = self.engine.named(self.table.mutate(**{self._places[name]: values}))

    def change(self, rule: str, column: str, new: Any) -> None:
        """Set a column to an expression over the table."""
        number, place = len(self.entries), self._places[column]
        table = self.table.mutate(**{f"before{number}": self.table[place], f"after{number}": new})
        self.table = self.engine.named(table.mutate(**{place: table[f"after{number}"]}))
        self.entries.append(Entry(rule, column, False, True))

    def drop(self, rule: str, column: str, mask: Any, before: Any = None) -> None:
        """Drop the rows for which ``mask`` holds; null does not. ``before`` says what was found."""
        import ibis

        number = len(self.entries)
        before = self.as_text(self[column]) if before is None else before
        hit = self.table[DROPPED].isnull() & mask.fill_null(False)
        dropped = ibis.ifelse(hit, ibis.literal(number, "int32"), self.table[DROPPED])
        self.table = self.engine.named(self.table.mutate(**{DROPPED: dropped, f"before{number}": before}))
        self.entries.append(Entry(rule, column, True, True))

    def alive(self, *names: str) -> Any:
        """Return the rows that no rule has dropped: ``row`` and the named columns, as the rules have left them."""
        places = [ROW, *(self._places[name] for name in names)]
        return self.table.filter(self.table[DROPPED].isnull()).select(*places)

    def patch(self, rule: str, column: str, found: Any) -> None:
        """Set cells to what ``found`` holds: ``row``, each once, and ``value``."""
        import ibis

        if (table := self._joined(found, "value")) is None:
            self.entries.append(Entry(rule, column, False, False))
            return
        number, place = len(self.entries), self._places[column]
        self.table = table
        value = table[f"value{number}"].cast(table[place].type())
        self.change(rule, column, ibis.ifelse(table[f"row{number}"].notnull(), value, table[place]))

    def drop_found(self, rule: str, found: Any) -> None:
        """Drop the rows of ``found``: ``row``, each once, and ``why``."""
        if (table := self._joined(found, "why")) is None:
            self.entries.append(Entry(rule, WHOLE_ROW, True, False))
            return
        number, self.table = len(self.entries), table
        self.drop(rule, WHOLE_ROW, table[f"row{number}"].notnull(), table[f"why{number}"])

    def as_text(self, column: Any) -> Any:
        """Return cells as a log shows them: whole numbers without ``.0``."""
        if column.type().is_floating():
            return self.engine.as_text(column).re_replace(r"\.0$", "")
        return column.cast("string")

    def settle(self) -> None:
        """Be read several times from here on."""
        self.table = self.engine.settle(self.table)

    def _joined(self, found: Any, value: str) -> Any:
        """The table with what was found beside its rows, or None where nothing was."""
        number = len(self.entries)
        kept = self.engine.keep(found.select(**{f"row{number}": found[ROW], f"{value}{number}": found[value]}))
        if not self.engine.value(kept.count()):
            return None
        return self.table.left_join(kept, self.table[ROW] == kept[f"row{number}"])


def num_words(column: Any) -> Any:
    """Return how many words a text has, with one space between two of them."""
    return column.length() - column.replace(" ", "").length() + 1


def missing(column: Any) -> Any:
    """Return where a column has nothing: null, or an empty text."""
    return column.isnull() | (column == "") if column.type().is_string() else column.isnull()


def _number(column: Any) -> Any:
    """NaN as null: there is one way to be missing."""
    return column.isnan().ifelse(None, column)
