"""What predictions cost in joules and money: by the processor's own counter (RAPL) where it can be read, else estimated
from CPU seconds at a declared power. Which of the two it was stands in the measurement's note."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tasks.spec.rules import Measurement

# One counter a package, in microjoules, which wraps at max_energy_range_uj (Linux, Documentation/power/powercap).
COUNTERS = Path("/sys/class/powercap")
JOULES_A_KWH = 3.6e6


def energy(
    ask: Callable[[], object], rows: int, core_watts: float, price_per_kwh: float
) -> tuple[Measurement, Measurement]:
    """Measure ``ask``, which asks for one row, ``rows`` times: joules for a thousand predictions, and what the energy
    of a million costs in the currency of the price."""
    before, cpu = _microjoules(), time.process_time()
    for _ in range(rows):
        ask()
    cpu, after = time.process_time() - cpu, _microjoules()
    if before and after and all(after[path] >= value for path, value in before.items()):
        joules, note = sum(after[path] - value for path, value in before.items()) / 1e6, "RAPL, all of the machine"
    else:
        joules, note = core_watts * cpu, f"estimate: CPU seconds at {core_watts:g} W"
    money, told = 1e6 * joules / rows / JOULES_A_KWH * price_per_kwh, f"{note}; {price_per_kwh:g} a kWh, energy alone"
    return (
        Measurement(metric="joules_per_1000", value=1000 * joules / rows, samples=rows, note=note),
        Measurement(metric="cost_per_million", value=money, samples=rows, note=told),
    )


def _microjoules() -> dict[Path, int]:
    """The counters of all processor packages; none that may be read: empty."""
    found = {}
    for path in COUNTERS.glob("intel-rapl:[0-9]*/energy_uj"):
        if path.parent.name.count(":") > 1:
            continue  # a part of a package, which counts it again
        try:
            found[path] = int(path.read_text())
        except (OSError, ValueError):
            return {}
    return found
