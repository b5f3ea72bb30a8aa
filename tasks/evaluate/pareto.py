"""Which candidates no other beats, and by which metric. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Point = tuple[str, float, float]  # name, cost (less is better), quality (more is better)


def front(points: Sequence[Point]) -> set[str]:
    """Return the names of the points that no other is at least as good as in both, and better in one."""
    return {
        name
        for name, cost, quality in points
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for _, c, q in points)
    }


def quality_of(metrics: Collection[str]) -> str:
    """Return which of the measured metrics says how good a model is."""
    return next((name for name in ("entity_f1", "rmse", "perplexity") if name in metrics), "accuracy")


def better_up(metric: str) -> int:
    """Return 1 where more of a quality is better, -1 where less is: an error."""
    return -1 if metric in ("rmse", "perplexity") else 1
