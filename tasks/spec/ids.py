"""The ids that a model knows: who and what stood in the training split. Any other is code 0, which stands for all of
them.

    B rows
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np

UNKNOWN = 0
# What a client calls the two, whatever the columns of the source are called.
ROLES = ("user", "item")
MAX_CHARS = 256


class KnownIds:
    """``columns``: the known ids of each column, in the order of their codes, which begin at 1."""

    def __init__(self, columns: Sequence[Sequence[str]]) -> None:
        self.columns = tuple(tuple(column) for column in columns)
        self._codes = [{known: code for code, known in enumerate(column, start=1)} for column in self.columns]

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[str]]) -> KnownIds:
        """Return those of some rows, in the order of the alphabet."""
        found: tuple[set[str], ...] = ()
        for row in rows:
            found = found or tuple(set() for _ in row)
            for known, value in zip(found, row, strict=True):
                known.add(value)
        return cls([sorted(known) for known in found])

    @classmethod
    def parse(cls, text: str, where: str) -> KnownIds:
        """Read what ``to_str`` wrote.

        Raises:
            BadRequest: it is no list of two lists of distinct texts.
        """
        try:
            columns = json.loads(text)
        except ValueError:
            columns = None
        lists = isinstance(columns, list) and len(columns) == 2 and all(isinstance(item, list) for item in columns)
        if not lists or any(not isinstance(value, str) for column in columns for value in column):
            raise BadRequest(f"{where}: must be a list of two lists of ids")
        if any(len(set(column)) != len(column) for column in columns):
            raise BadRequest(f"{where}: an id is there twice, must be once")
        return cls(columns)

    def to_str(self) -> str:
        return json.dumps(self.columns, ensure_ascii=False)

    def codes(self, rows: Sequence[Sequence[str]]) -> np.ndarray:
        """Return the codes of B rows of ids, int64 [B, 2]."""
        import numpy as np

        users, items = self._codes
        return np.array([[users.get(user, UNKNOWN), items.get(item, UNKNOWN)] for user, item in rows], np.int64)


def ids_of(rows: Any) -> list[list[str]]:
    """Return rows of two ids each, as texts: a whole number is the text of its digits.

    Raises:
        BadRequest: a row that is no pair, or an id that is no whole number and no text of 1 to 256 characters.
    """
    found = []
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != len(ROLES):
            raise BadRequest(f"ids input: found {str(row)[:40]!r}, must be {' and '.join(ROLES)}")
        found.append([_id_of(role, value) for role, value in zip(ROLES, row, strict=True)])
    return found


def _id_of(name: str, value: Any) -> str:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_CHARS:
        allowed = f"must be a whole number or a text of 1 to {MAX_CHARS} characters"
        raise BadRequest(f"{name} = {str(value)[:40]!r}, {allowed}")
    return text
