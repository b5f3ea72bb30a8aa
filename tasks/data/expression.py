"""Custom SQL in a workload file: one expression over the declared columns, and nothing else."""

from __future__ import annotations

from typing import Any

from tasks.data.engine import builtin
from tasks.data.worktable import WorkTable
from tasks.spec.errors import BadRequest

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
    # A macro gives the expression a name that the table's own expression can call.
    macro = f"expression{len(work.entries)}"
    body = f"CAST(({renamed.sql('duckdb')}) AS {TYPES[kind]})"
    work.engine.run(f"CREATE OR REPLACE TEMP MACRO {macro}({', '.join(places.values())}) AS {body}")
    columns = [work[name] for name in names]
    return builtin(macro, tuple(column.type() for column in columns), kind)(*columns)


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
    return tree
