"""The relabel queue: what people should look at, worst first, as a CSV and as one page that needs no network.

Both are answered by a class or ``!drop`` in the column ``answer``; ``drydock data relabel`` merges the answers back.
The page saves the same CSV.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.corrections import DROP
from tasks.data.page import render
from tasks.data.picture import data_uri
from tasks.data.table import images
from tasks.data.tagging import differing
from tasks.store.files import write_whole

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.data.rawrows import RawRows
    from tasks.spec.requests import ValidateLabelsRequest

COLUMNS = ("row_key", "row_id", "split", "label", "suggested", "quality", "reason", "content", "answer")
# A page with more pictures is slow to open; the CSV has them all.
SHOWN = 300
MAX_CHARS = 400


class Item(NamedTuple):
    """One row to look at: its index in the table, the features' digest, and why it is here."""

    row: int
    row_key: str
    suggested: str
    quality: float | None
    reason: str


def write_queue(room: Path, request: ValidateLabelsRequest, table: RawRows, items: list[Item]) -> None:
    """Write ``queue.csv`` with all items and ``queue.html`` with the first SHOWN of them."""
    import numpy as np

    places = np.array([item.row for item in items], np.int64)
    features = [] if request.feature.kind == "image" else list(request.feature.columns)
    picked = table.take(places, ["row_id", "split", "label", *features])
    items = [item._replace(row=place) for place, item in enumerate(items)]
    rows = [_row(request, picked, item) for item in items]
    write_whole(room / "queue.csv", _csv(rows))
    shown_rows = table.take(places[:SHOWN], list(request.feature.columns))
    shown = [_shown(request, shown_rows, item, row) for item, row in zip(items[:SHOWN], rows[:SHOWN], strict=True)]
    page = render(
        "queue.html.j2",
        workload=request.workload,
        columns=COLUMNS,
        total=len(rows),
        items=shown,
    )
    write_whole(room / "queue.html", page)


def _row(request: ValidateLabelsRequest, table: pa.Table, item: Item) -> dict[str, str]:
    cells = {name: table.column(name)[item.row].as_py() or "" for name in ("row_id", "split", "label")}
    quality = "" if item.quality is None else f"{item.quality:.4f}"
    content = "" if request.feature.kind == "image" else _guarded(_content(request, table, item))
    facts = {"row_key": item.row_key, "suggested": item.suggested, "quality": quality, "reason": item.reason}
    return {name: str(({**cells, **facts, "content": content, "answer": ""})[name]) for name in COLUMNS}


def _content(request: ValidateLabelsRequest, table: pa.Table, item: Item) -> str:
    """What a person judges by: the text, or the numbers of a table's row."""
    cells = {name: table.column(name)[item.row].as_py() for name in request.feature.columns}
    if request.feature.holds == "texts":
        text = str(cells[request.feature.columns[0]] or "")
        return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
    return ", ".join(f"{name} = {'missing' if v is None else format(v, '.6g')}" for name, v in cells.items())


def _shown(request: ValidateLabelsRequest, table: pa.Table, item: Item, row: dict[str, str]) -> dict[str, Any]:
    feature = request.feature
    facts = {"row": row, "picture": "", "text": "", "differs": "", "choices": [*request.label.names, DROP]}
    if feature.kind == "tokens":
        words = str(table.column(feature.column)[item.row].as_py())
        differs = differing(words, row["label"], row["suggested"])
        choices = list(dict.fromkeys([row["label"], *([row["suggested"]] if row["suggested"] else []), DROP]))
        return facts | {"text": _content(request, table, item), "differs": differs, "choices": choices}
    if feature.kind != "image":
        return facts | {"text": _content(request, table, item)}
    pixels = images(table.column(feature.column).slice(item.row, 1), feature.shape[0])
    return facts | {"picture": data_uri(pixels[0], feature)}


def _csv(rows: list[dict[str, str]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _guarded(content: str) -> str:
    """A spreadsheet takes such a text for a formula and runs it; the content is for reading only."""
    return f"'{content}" if content[:1] in ("=", "+", "-", "@", "\t", "\r") else content
