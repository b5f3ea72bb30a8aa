"""What a workload file says about personal data: what is looked for, what becomes of it, and the receipt of that."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from tasks.spec.value import Value

Kind = Literal["email", "phone", "name", "card", "iban", "ip", "address", "ssn", "resident_id"]
# keep: told in the receipt, and left; drop: cut out; mask: [email]; hash: a keyed digest; generalise: what is coarse.
Action = Literal["keep", "refuse", "drop", "mask", "hash", "generalise"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class PrivateColumn(Value):
    """A column that holds personal data in every cell, whatever a scan would find there."""

    kind: Kind | Literal["other"] = "other"
    action: Literal["drop", "mask", "hash", "generalise"] = "mask"
    first: int | None = Field(default=None, ge=1, description="generalise a text: so many of its first characters stay")
    width: float | None = Field(default=None, gt=0, description="generalise a number: down to a multiple of this")

    @model_validator(mode="after")
    def _generalises_one_way(self) -> PrivateColumn:
        given = [name for name in ("first", "width") if getattr(self, name) is not None]
        if self.action == "generalise" and len(given) != 1:
            raise ValueError("action = 'generalise' needs first (of a text) or width (of a number), one of them")
        if self.action != "generalise" and given:
            raise ValueError(f"{given[0]} needs action = 'generalise', not {self.action!r}")
        return self


class Anonymity(Value):
    """No one can be told from at least ``k`` - 1 others by these columns (Sweeney 2002).

    The check is ``anonymity`` of ``data.expectations.severity``: ``stop`` refuses, ``quarantine`` takes out the rows
    of smaller groups.
    """

    columns: tuple[str, ...] = Field(min_length=1)
    k: int = Field(default=5, ge=2)


class Privacy(Value):
    """Columns that are personal as a whole, and what is looked for in all other columns of texts.

    Applied while the source is read, so no room of a step ever holds what was dropped, masked or hashed.
    """

    kinds: tuple[Kind, ...] = KINDS
    otherwise: Action = Field(default="mask", description="what becomes of kinds that actions does not name")
    actions: dict[Kind, Action] = {}
    columns: dict[str, PrivateColumn] = {}
    regions: tuple[Annotated[str, Field(pattern=r"^[A-Z]{2}$")], ...] = Field(
        default=("US", "GB", "CN"), description="whose telephone numbers are known without a country code"
    )
    anonymity: Anonymity | None = None

    def action_of(self, kind: Kind) -> Action:
        """Return what becomes of a kind that is found in a text."""
        return self.actions.get(kind, self.otherwise)

    @property
    def is_active(self) -> bool:
        """Whether anything is done beyond looking: then values are kept out of messages and of quarantines too."""
        return bool(self.columns) or any(self.action_of(kind) != "keep" for kind in self.kinds)

    @property
    def hashes(self) -> bool:
        """Whether a key is needed."""
        by_kind = [self.action_of(kind) for kind in self.kinds]
        return "hash" in [*by_kind, *(column.action for column in self.columns.values())]

    @model_validator(mode="after")
    def _actions_are_looked_for(self) -> Privacy:
        for kind in self.actions:
            if kind not in self.kinds:
                raise ValueError(f"actions.{kind}: is not looked for; add {kind!r} to kinds")
        return self


# A workload that says nothing of privacy is scanned, and told what was found.
WATCH = Privacy(otherwise="keep")


class Finding(Value):
    """What was found in a column, and what was done. Counts only: a value is never told."""

    column: str
    kind: Kind | Literal["other"]
    action: Action
    cells: int = Field(ge=0)
    found: int = Field(ge=0, description="in these cells; a text may hold several")


class Receipt(Value):
    """What was found and done, beside what was looked at. It travels with the dataset revision."""

    rows: int = Field(default=0, ge=0)
    scanned_rows: int = Field(default=0, ge=0, description="fewer than rows where nothing was to be done but to tell")
    scanned_columns: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    findings: tuple[Finding, ...] = ()
    suspected: tuple[str, ...] = Field(default=(), description="columns left as they are, by their names personal")
    key_id: str | None = Field(default=None, description="which key hashed; the key itself stays in its folder")

    @property
    def summary(self) -> str:
        """One phrase for a card."""
        if not self.findings:
            return "nothing found" if self.scanned_columns else "no column of texts"
        return ", ".join(f"{f.column}: {f.found} {f.kind} {TOLD[f.action]}" for f in self.findings)


def together(receipts: list[Receipt]) -> Receipt:
    """Return the receipt of several files as one."""
    if not receipts:
        return Receipt()
    found: dict[tuple[str, str, str], list[int]] = {}
    for item in (item for receipt in receipts for item in receipt.findings):
        counts = found.setdefault((item.column, item.kind, item.action), [0, 0])
        counts[0] += item.cells
        counts[1] += item.found
    findings = tuple(
        Finding.model_validate({"column": c, "kind": k, "action": a, "cells": cells, "found": number})
        for (c, k, a), (cells, number) in sorted(found.items())
    )
    return receipts[0].model_copy(
        update={
            "rows": sum(receipt.rows for receipt in receipts),
            "scanned_rows": sum(receipt.scanned_rows for receipt in receipts),
            "scanned_columns": tuple(dict.fromkeys(name for r in receipts for name in r.scanned_columns)),
            "suspected": tuple(dict.fromkeys(name for r in receipts for name in r.suspected)),
            "findings": findings,
        }
    )


TOLD: dict[str, str] = {
    "keep": "left as found",
    "refuse": "refused",
    "drop": "dropped",
    "mask": "masked",
    "hash": "hashed",
    "generalise": "generalised",
}
