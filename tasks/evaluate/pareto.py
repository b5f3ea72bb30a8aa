"""Which candidates no other beats. Pure."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[str, float, float]  # name, cost (less is better), quality (more is better)


def front(points: Sequence[Point]) -> set[str]:
    """Return the names of the points that no other is at least as good as in both, and better in one."""
    return {
        name
        for name, cost, quality in points
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for _, c, q in points)
    }

