"""Custom SQL in a workload file: one expression over the declared columns, and nothing else."""

from __future__ import annotations

from typing import Any

from tasks.data.worktable import WorkTable
from tasks.spec.errors import BadRequest

# Functions whose value is another each time, by sqlglot's names and DuckDB's.
UNSTEADY = {
    "rand", "randn", "random", "uuid", "gen_random_uuid", "uuidv4", "uuidv7", "setseed", "nextval", "currval",
    "now", "today", "current_date", "current_time", "current_timestamp", "current_datetime", "current_localtimestamp",
    "current_localtime", "localtime", "localtimestamp", "get_current_time", "get_current_timestamp",
    "transaction_timestamp", "txid_current", "age",
}  # fmt: skip
TYPES = {"boolean": "BOOLEAN", "float64": "DOUBLE", "string": "VARCHAR"}


def expression(work: WorkTable, rule: str, text: str, kind: str) -> Any:
    """Return an SQL expression (DuckDB's dialect) over the table's columns as a column of ``kind``.

    Raises:
        BadRequest: no single expression, a subquery, or a column that is not there.
    """
    from sqlglot import exp

    tree = _parsed(rule, text)
    names = list(dict.fromkeys(column.name for column in tree.find_all(exp.Column)))
    for name in names:
        if name not in work.names:
            there = ", ".join(work.names[:20])
            raise BadRequest(f"data.clean: rule {rule}: column {name!r} is not there, must be one of {there}")
    places = {name: f"p{place}" for place, name in enumerate(names)}
    renamed = tree.transform(lambda node: exp.column(places[node.name]) if isinstance(node, exp.Column) else node)
    # Given a name, the table's own expression can call it.
    columns = [work[name] for name in names]
    body = exp.cast(exp.paren(renamed), TYPES[kind])
    called = work.engine.define(f"expression{len(work.entries)}", tuple(c.type() for c in columns), kind, body)
    return called(*columns)


def _parsed(rule: str, text: str) -> Any:
    import sqlglot
    from sqlglot import exp

    try:
        trees = sqlglot.parse(text, read="duckdb")
    except sqlglot.errors.SqlglotError as error:
        reason = " ".join(str(error).split())[:120]
        raise BadRequest(f"data.clean: rule {rule}: {text!r} is no SQL expression: {reason}") from None
    tree = trees[0] if len(trees) == 1 else None
    if tree is None or isinstance(tree, exp.Command | exp.DDL | exp.DML | exp.Query) or tree.find(exp.Query):
        raise BadRequest(f"data.clean: rule {rule}: {text!r} must be one SQL expression, without a query in it")
    for call in tree.find_all(exp.Func):
        name = (call.name if isinstance(call, exp.Anonymous) else call.sql_name()).lower()
        if name in UNSTEADY:
            # The table is computed more than once: its rows would not be those of the log.
            raise BadRequest(f"data.clean: rule {rule}: {text!r}: {name} differs each time, must be left out")
    return tree
