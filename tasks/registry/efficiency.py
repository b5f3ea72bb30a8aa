"""What a training cost, and how well it used what it had: pure, from the lines of its history and declared factors.

Where the hardware counts joules they are taken; else they are estimated from processor seconds at a declared power,
and every place that shows them says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

JOULES_PER_KWH = 3.6e6


class Factors(NamedTuple):
    """Declared in the settings: the power of a busy core, the grid's CO2, the price of energy."""

    core_watts: float
    co2_grams_per_kwh: float
    price_per_kwh: float


class Energy(NamedTuple):
    """``source``: nvml, rapl, or the estimate in words."""

    joules: float
    source: str


def energy_of(line: dict[str, float], factors: Factors) -> Energy:
    """Return what an epoch took."""
    for source in ("nvml", "rapl"):
        if f"joules_{source}" in line:
            return Energy(line[f"joules_{source}"], source)
    watts = factors.core_watts
    return Energy(line["cpu_seconds"] * watts, f"estimate: processor seconds at {watts:g} W a core")


def costs_of(lines: list[dict[str, float]], factors: Factors) -> dict[str, float]:
    """Return a training's totals: energy_kwh, co2_grams, energy_cost, samples_per_joule."""
    joules = sum(energy_of(line, factors).joules for line in lines)
    samples = sum(line["samples_per_second"] * line["seconds"] for line in lines)
    kwh = joules / JOULES_PER_KWH
    return {
        "energy_kwh": kwh,
        "co2_grams": kwh * factors.co2_grams_per_kwh,
        "energy_cost": kwh * factors.price_per_kwh,
        "samples_per_joule": samples / joules if joules else 0.0,
    }


def efficiency_table(lines: list[dict[str, float]], factors: Factors) -> dict[str, list[Any]]:
    """Return the table of a run as MLflow shows one: ``columns`` and ``data``. Rates are means over its epochs, each
    weighted by its time."""
    seconds = sum(line["seconds"] for line in lines)

    def mean(name: str) -> float:
        return sum(line[name] * line["seconds"] for line in lines) / seconds

    costs = costs_of(lines, factors)
    source = energy_of(lines[-1], factors).source
    wire = sum(line["wire_bytes"] for line in lines)
    rows = [
        ["compute", "busy share of the ranks' cores", round(mean("cpu_busy_ratio"), 4), "ratio"],
        ["compute", "model's operations of the measured matrix-product peak (MFU)", round(mean("mfu"), 4), "ratio"],
        ["compute", "rows", round(mean("samples_per_second"), 1), "1/s"],
        ["storage", "time spent waiting for data", round(mean("data_wait_ratio"), 4), "ratio"],
        ["network", "sent by all ranks for gradients and weights", round(wire / seconds / 1e6, 3), "MB/s"],
        ["memory", "peak of all ranks", round(max(line["memory_bytes"] for line in lines) / 1e6, 1), "MB"],
        ["energy", source, round(costs["energy_kwh"] * JOULES_PER_KWH, 1), "J"],
        ["energy", "rows for a joule", round(costs["samples_per_joule"], 2), "1/J"],
        ["energy", f"CO2 at {factors.co2_grams_per_kwh:g} g/kWh", round(costs["co2_grams"], 5), "g"],
        ["energy", f"cost at {factors.price_per_kwh:g} a kWh", round(costs["energy_cost"], 7), "money"],
    ]
    return {"columns": ["of", "what", "value", "unit"], "data": rows}
