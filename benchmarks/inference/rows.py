"""Rows of a result, and the chart of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference.measure import Seen

CEILING = "ceiling"


def middle(all_of: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in all_of)


def share(seen: Seen, name: str, connections: int, key: str = "rate") -> float:
    """Percent of the ceiling: the median of the rounds' own ratios."""
    pairs = zip(seen[name, connections], seen[CEILING, connections], strict=True)
    return 100 * statistics.median(one[key] / ceiling[key] for one, ceiling in pairs)


def at_least(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "limit": limit, "ok": limit is None or value >= limit}


def at_most(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "limit": limit, "ok": limit is None or value <= limit}


def chart(rows: Sequence[dict[str, Any]], connections: Sequence[int], path: Path) -> Path:
    """Draw the shares of the ceiling by server and connections; return the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, model in zip(axes, ("M", "T"), strict=True):
        marks = [row for row in rows if row["name"].startswith(f"{model}: ") and "% of ceiling at" in row["name"]]
        servers = list(dict.fromkeys(row["name"][3:].split(",")[0] for row in marks))
        for position, server in enumerate(servers):
            values = [row["value"] for row in marks if row["name"][3:].split(",")[0] == server]
            places = [place + 0.8 * (position + 0.5) / len(servers) - 0.4 for place in range(len(connections))]
            axis.bar_label(axis.bar(places, values, 0.75 / len(servers), label=server), fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(connections)), [f"{count} connections" for count in connections])
        axis.set_title({"M": "MLP 784-512-256-128-10", "T": "MiniLM, fp32"}[model])
        axis.set_ylabel("% of the ceiling")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
