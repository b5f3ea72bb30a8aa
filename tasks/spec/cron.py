"""Cron lines, as far as Airflow must be able to build a schedule from them: one wrong line in one workload's file
would otherwise take the DAGs of every other workload away."""

from __future__ import annotations

import re

PRESETS = ("@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly")
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
# Lowest and highest number of each field, and the names that stand for numbers.
FIELDS = (
    (0, 59, {}),
    (0, 23, {}),
    (1, 31, {}),
    (1, 12, {name: number for number, name in enumerate(MONTHS, 1)}),
    (0, 7, {name: number for number, name in enumerate(DAYS)}),
)
ITEM = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?", re.ASCII)


def is_cron(line: str) -> bool:
    """Whether ``line`` is a preset, or five fields of numbers, names, ranges, steps and lists (POSIX crontab)."""
    if line in PRESETS:
        return True
    parts = line.split()
    return len(parts) == len(FIELDS) and all(map(_is_field, parts, FIELDS))


def _is_field(text: str, field: tuple[int, int, dict[str, int]]) -> bool:
    return all(_is_item(item, *field) for item in text.lower().split(","))


def _is_item(text: str, lowest: int, highest: int, names: dict[str, int]) -> bool:
    match = ITEM.fullmatch(text)
    if match is None or (match.group(3) and not int(match.group(3))):
        return False
    ends = [names.get(end, int(end) if end.isdigit() else -1) for end in match.groups()[:2] if end is not None]
    return ends == sorted(ends) and all(lowest <= end <= highest for end in ends)
