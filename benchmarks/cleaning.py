"""Cleaning beside the literature and beside DuckDB: are wrong cells repaired, and what does declaring rules cost?

Repair is scored as in the papers: precision over every cell written, recall over all wrong cells. The rules are
what a person who knows the columns declares; nothing is learnt from the truth. The tables are looked for under
``DRYDOCK_TEST_DATA`` (default: ``shared/data`` beside the repository); without them their rows are left out.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cleansing.generate import COLUMNS, ROWS, generate
from cleansing.measure import Stage, measured
from cleansing.repairs import FLIGHTS, FLIGHTS_TRUSTED, HOSPITAL, HOSPITAL_SPELLING, repaired

from tasks.data.suggest import suggest
from tasks.site import Site

F1_LIMITS = {"hospital": 0.90, "flights": 0.75}
SUGGESTED_LIMITS = {"hospital": 0.75, "flights": None}
SPEED_LIMIT, MEMORY_LIMIT_MB = 0.5, 1000
TABLES = {
    "hospital": [("its dependencies declared", HOSPITAL, True), ("and spelling", HOSPITAL_SPELLING, False)],
    "flights": [("the source column named", FLIGHTS, True), ("and the airlines trusted", FLIGHTS_TRUSTED, False)],
}


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows."""
    shared = Path(os.environ.get("DRYDOCK_TEST_DATA") or site.root.parent / "shared" / "data")
    with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base:
        return [*repair_rows(shared, Path(base)), *speed_rows(Path(base))]


def repair_rows(shared: Path, base: Path) -> list[dict[str, Any]]:
    """Precision, recall and F1 on each table of known errors that is there."""
    rows = []
    for name, declared in TABLES.items():
        folder = shared / f"dirty_{name}"
        if not (folder / "errors.parquet").is_file():
            say(f"{name}: skipped, {folder} is not there; set DRYDOCK_TEST_DATA")
            continue
        suggested = tuple(item.rule for item in suggest(folder / "dirty.parquet", base / f"{name}-suggested"))
        judged = [(what, rules, F1_LIMITS[name] if is_judged else None) for what, rules, is_judged in declared]
        judged.append(("only the rules that data suggest finds", suggested, SUGGESTED_LIMITS[name]))
        for number, (what, rules, limit) in enumerate(judged):
            score = repaired(folder, rules, base / f"{name}{number}")
            rows.append(at_least(f"{name}, {what}: precision", score.precision, None))
            rows.append(at_least(f"{name}, {what}: recall", score.recall, None))
            rows.append(at_least(f"{name}, {what}: F1", score.f1, limit))
    return rows


def speed_rows(base: Path) -> list[dict[str, Any]]:
    """Clean and validate a large table, ours and the same by hand in DuckDB, each in a process of its own."""
    say(f"generating {ROWS} rows x {COLUMNS} columns")
    raw = generate(base / "raw")
    say("cleaning and validating: ours, by hand, in pandas")
    ours, hand = measured("ours", raw, base / "ours"), measured("hand", raw, base / "hand")
    pandas = measured("pandas", raw, base / "pandas")
    assert ours.facts == hand.facts == pandas.facts, f"ours {ours.facts}, by hand {hand.facts}, pandas {pandas.facts}"
    faster = pandas.validated.seconds / ours.validated.seconds
    return [
        *stage_rows("clean", ours.cleaned, hand.cleaned, None),
        *stage_rows("clean and validate", ours.validated, hand.validated, SPEED_LIMIT),
        at_least("clean and validate: in pandas and GX, s", pandas.validated.seconds, None),
        at_least("clean and validate: speed, of that in pandas", faster, 1.0),
        at_most("clean and validate: in pandas and GX, peak memory, MB", pandas.validated.megabytes, None),
    ]


def stage_rows(name: str, ours: Stage, hand: Stage, limit: float | None) -> list[dict[str, Any]]:
    """What a stage took of both, and the share of the hand-written one's speed."""
    return [
        at_least(f"{name}: ours, s", ours.seconds, None),
        at_least(f"{name}: by hand in DuckDB, s", hand.seconds, None),
        at_least(f"{name}: speed, of that by hand", hand.seconds / ours.seconds, limit),
        at_least(f"{name}: the same by processor time", hand.cpu_seconds / ours.cpu_seconds, None),
        at_most(f"{name}: ours, peak memory, MB", ours.megabytes, MEMORY_LIMIT_MB),
        at_most(f"{name}: by hand, peak memory, MB", hand.megabytes, None),
    ]


def at_least(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "ok": limit is None or value >= limit}


def at_most(name: str, value: float, limit: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "ok": limit is None or value <= limit}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(json.dumps(bench(Site()), indent=2))
