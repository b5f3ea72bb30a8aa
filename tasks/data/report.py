"""The data report of a dataset revision: one HTML page with everything inside, the same bytes for the same data.

    C classes   B bins
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data import drawing
from tasks.data.page import render
from tasks.data.picture import data_uri
from tasks.data.profile import BINS, counted
from tasks.data.rawrows import RawRows
from tasks.data.scalars import ROW, VIEW, Scalars, named, opened
from tasks.data.table import SPLITS, images, read_table
from tasks.data.tagging import differing
from tasks.spec.data import OWN_COLUMNS
from tasks.spec.privacy import TOLD
from tasks.store.room import open_room

if TYPE_CHECKING:
    import pandas as pd

    from tasks.spec.requests import VersionRequest

MAX_COLUMNS, MAX_CLASSES, SHIFTS_DRAWN = 60, 10, 6
WORST, BUCKETS, CHARS = 24, 80, 240
# Read from at most so many rows, in order.
IMAGE_ROWS = 20_000


def report(facts: dict[str, Any], request: VersionRequest, data: Path, before: dict[str, Any] | None = None) -> str:
    """Return the page of a revision. ``facts`` are its own, ``before`` those of the last accepted revision."""
    classes = sorted(facts["class_counts"], key=lambda name: -facts["class_counts"][name])
    # A row of words is of no single class, and a number is of none.
    drawn = classes if request.feature.kind != "tokens" and classes else ["all rows"]
    with opened(data, request.feature) as scalars:
        frame = scalars.frame()
        missing = _missing(scalars)
        sampled = len(frame) if scalars.sampled else None
    return render(
        "report.html.j2",
        facts=facts,
        classes=_classes(facts, request, data),
        splits=SPLITS,
        legend=[(name, drawing.colour(place)) for place, name in enumerate(_drawn(drawn))],
        columns=_columns(frame, drawn, facts["profile"]),
        sampled=sampled,
        missing=drawing.missing_map(missing),
        lacking={name: sum(ratios) / len(ratios) for name, ratios in missing.items() if any(ratios)},
        drift=_drift(facts, before),
        worst=_worst(request, data),
        told=TOLD,
        percent=_percent,
        number=drawing.number,
    )


def _percent(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{100 * ratio:.1f} %" if ratio >= 0.01 or ratio == 0 else f"{100 * ratio:.2f} %"


def _drawn(classes: list[str]) -> list[str]:
    """The classes that have a colour of their own; the rest share the last."""
    return classes if len(classes) <= MAX_CLASSES else [*classes[: MAX_CLASSES - 1], "all others"]


def _classes(facts: dict[str, Any], request: VersionRequest, data: Path) -> list[dict[str, Any]]:
    """One line a class: rows, share, estimated noise, and for images the mean image."""
    noise = {m["slice"].removeprefix("class:"): m["value"] for m in facts["labels"].get("measurements", ())
             if m["metric"] == "class_noise_ratio"}  # fmt: skip
    pictures = _mean_images(request, data)
    highest = max(facts["class_counts"].values(), default=1)
    return [
        {
            "name": name,
            "rows": count,
            "ratio": count / max(sum(facts["class_counts"].values()), 1),
            "bar": drawing.meter(count, None, highest),
            "noise": noise.get(name),
            "picture": pictures.get(name, ""),
        }
        for name, count in facts["class_counts"].items()
    ]


def _mean_images(request: VersionRequest, data: Path) -> dict[str, str]:
    import numpy as np

    feature = request.feature
    if feature.kind != "image":
        return {}
    rows = RawRows(data)
    table = rows.read(0, min(rows.rows, IMAGE_ROWS), [feature.column, "label"])
    pixels, labels = images(table.column(feature.column), feature.shape[0]), np.array(table.column("label").to_pylist())
    means = {name: pixels[labels == name].mean(axis=0) for name in np.unique(labels)}
    return {str(name): data_uri(mean, feature) for name, mean in means.items()}


def _columns(frame: pd.DataFrame, classes: list[str], profile: dict[str, Any]) -> list[dict[str, Any]]:
    """One picture a scalar column: its distribution, stacked by class."""
    import numpy as np
    import pandas as pd

    place = {name: min(index, MAX_CLASSES - 1) for index, name in enumerate(classes)}
    codes = frame["label"].map(place).fillna(0).to_numpy(int)
    found = []
    for name in [name for name in frame.columns if name not in OWN_COLUMNS][:MAX_COLUMNS]:
        values = frame[name]
        if not pd.api.types.is_numeric_dtype(values.dtype):
            continue
        numbers = values.to_numpy(float)
        there = np.isfinite(numbers)
        low, high = (numbers[there].min(), numbers[there].max()) if there.any() else (0.0, 0.0)
        edges = np.linspace(low, high, BINS + 1).tolist() if high > low else [low, low + 1]
        counts = [counted(numbers[there & (codes == code)], edges) for code in range(min(len(classes), MAX_CLASSES))]
        facts = {"mean": profile.get(name, {}).get("mean"), "missing": 1 - there.mean() if len(there) else 0.0}
        ends = (drawing.number(float(low)), drawing.number(float(high)))
        # A column of one value has no distribution to draw.
        picture, always = (drawing.histogram(counts, ends), "") if high > low else ("", ends[0])
        found.append({"name": name, "picture": picture, "always": always, **facts})
    return found


def _missing(scalars: Scalars) -> dict[str, list[float]]:
    """The share of missing values of each column in BUCKETS parts of the table, first rows first."""
    names = [name for name in scalars.columns if name not in ("row_id", "split")][:MAX_COLUMNS]
    shares = ", ".join(f"avg(({named(name)} IS NULL)::INT)" for name in names)
    bucket = f"{ROW} * {BUCKETS} // {max(scalars.rows, 1)}"
    rows = scalars.table_of(f"SELECT {bucket} AS bucket, {shares} FROM {VIEW} GROUP BY bucket ORDER BY bucket")
    return {name: [float(row[place + 1]) for row in rows] for place, name in enumerate(names)}


def _drift(facts: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any] | None:
    """Each column's shift against the last accepted revision, largest first, the largest with a picture."""
    history = facts.get("history")
    if not history or before is None:
        return None
    found = {name.removeprefix("shift_"): value for name, value in history.items() if name.startswith("shift_")}
    rows = []
    for place, (name, value) in enumerate(sorted(found.items(), key=lambda pair: -pair[1])):
        one, two = before["profile"].get(name), facts["profile"].get(name)
        drawn = place < SHIFTS_DRAWN and value > 0 and one and two
        picture = _pair(one, two) if drawn else ""
        meter = drawing.meter(value, facts["max_shift"])
        rows.append({"name": name, "shift": value, "meter": meter, "picture": picture})
    return {"revision": before["revision"], "rows": rows, "volume_ratio": history["volume_ratio"],
            "rows_before": before["rows"]}  # fmt: skip


def _pair(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Two profiles of a column over the same bins; numbers in the older one's, by what the newer one holds there."""
    if one["kind"] != two["kind"]:
        return ""
    if one["kind"] == "category":
        names = sorted({*one["counts"], *two["counts"]}, key=_order)[:30]
        return drawing.shares(*(_shares([side["counts"].get(n, 0) for n in names]) for side in (one, two)), names)
    low, high = min(one["edges"][0], two["edges"][0]), max(one["edges"][-1], two["edges"][-1])
    names = [drawing.number(low), drawing.number(high)]
    return drawing.shares(_rebinned(one, low, high), _rebinned(two, low, high), names)


def _order(name: str) -> tuple[float, str]:
    """Numbers by their size, then texts by the alphabet."""
    try:
        return (float(name), "")
    except ValueError:
        return (float("inf"), name)


def _shares(counts: list[float]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def _rebinned(column: dict[str, Any], low: float, high: float) -> list[float]:
    """A number's profile over equal bins: what lies in a bin is taken to be spread evenly in it."""
    import numpy as np

    edges = np.asarray(column["edges"], float)
    if len(edges) < 2 or high <= low:
        return [1.0] + [0.0] * (BINS - 1)
    upto = np.concatenate([[0.0], np.cumsum(column["counts"])])
    at = np.interp(np.linspace(low, high, BINS + 1), edges, upto, left=0.0, right=upto[-1])
    return _shares(np.diff(at).tolist())


def _worst(request: VersionRequest, data: Path) -> list[dict[str, Any]]:
    """The labels that are most likely wrong, with what they label."""
    import numpy as np
    import pyarrow.compute as pc

    suspects = read_table(open_room(request.validate_labels) / "suspects.parquet").slice(0, WORST)
    if not suspects.num_rows:
        return []
    rows = RawRows(data)
    place = pc.index_in(suspects.column("row_id"), value_set=rows.column("row_id").combine_chunks())
    there = suspects.filter(place.is_valid()).to_pylist()
    table = rows.take(np.asarray(place.drop_null().combine_chunks(), np.int64), list(request.feature.columns))
    return [row | _content(request, table, index, row) for index, row in enumerate(there)]


def _content(request: VersionRequest, table: Any, index: int, suspect: dict[str, Any]) -> dict[str, str]:
    feature = request.feature
    if feature.kind == "tokens":
        words = table.column(feature.column)[index].as_py()
        changed = differing(words, suspect["label"], suspect["suggested"])
        return {"picture": "", "text": words[:CHARS], "label": "", "suggested": changed}
    if feature.kind == "image":
        pixels = images(table.column(feature.column).slice(index, 1), feature.shape[0])
        return {"picture": data_uri(pixels[0], feature), "text": ""}
    cells = {name: table.column(name)[index].as_py() for name in feature.columns}
    if feature.holds == "texts":
        return {"picture": "", "text": str(cells[feature.column] or "")[:CHARS]}
    lines = [f"{name} = {drawing.number(value)}" for name, value in cells.items()]
    return {"picture": "", "text": "\n".join(lines)[:CHARS]}
