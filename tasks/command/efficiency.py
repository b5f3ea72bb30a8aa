"""``drydock status --efficiency``: what each workload's trainings cost, and how well they used their machines."""

from __future__ import annotations

from typing import Any

from tasks.registry import runs
from tasks.site import Site
from tasks.spec.load import workload_names

SHOWN = {
    "rows/s": "samples_per_second",
    "busy": "cpu_busy_ratio",
    "MFU": "mfu",
    "data wait": "data_wait_ratio",
    "rows/J": "samples_per_joule",
}
TOTALS = {"kWh": "energy_kwh", "CO2 g": "co2_grams", "cost": "energy_cost"}


def efficiency_of(site: Site) -> dict[str, Any]:
    """Return, for each workload that was trained, its last run's figures and the totals of all its runs.

    Raises:
        TryAgain: MLflow is down.
    """
    rows = []
    for name in workload_names(site.workloads):
        found = runs.measured_runs(site.mlflow, name)
        if not found:
            continue
        last = found[0]
        row: dict[str, Any] = {"workload": name, "runs": len(found)}
        row |= {"energy_source": last.tags["drydock.energy_source"]}
        row |= {metric: last.metrics.get(metric, 0.0) for metric in SHOWN.values()}
        rows.append(row | {metric: sum(run.metrics.get(metric, 0.0) for run in found) for metric in TOTALS.values()})
    return {"workloads": rows}


def efficiency_text(found: dict[str, Any]) -> str:
    """Return the report for a person."""
    if not found["workloads"]:
        return "nothing was trained yet"
    head = "".join(f"{title:>11}" for title in ("runs", *SHOWN, *TOTALS))
    lines = [f"{'EFFICIENCY':<20}{head}   energy by"]
    for row in found["workloads"]:
        values = "".join(f"{row[metric]:>11.4g}" for metric in (*SHOWN.values(), *TOTALS.values()))
        lines.append(f"{row['workload']:<20}{row['runs']:>11}{values}   {row['energy_source']}")
    return "\n".join([*lines, "Rates are the last run's, kWh, CO2 and cost those of all runs."])
