"""Joules as the hardware counts them: NVML for a GPU, RAPL for processors where its files may be read.

Where neither can be read nothing is claimed here; the platform then estimates from processor seconds, and says so.
RAPL counts a whole machine, so one rank of it reads.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

RAPL = Path("/sys/class/powercap")


class Energy:
    """A counter of joules since some moment. ``source``: ``nvml``, ``rapl``, or empty: nothing can be read."""

    def __init__(self, local_rank: int, device: str) -> None:
        self.source = ""
        self._read: Callable[[], float] = lambda: 0.0
        if device == "cuda" and (read := _nvml(local_rank)):
            self.source, self._read = "nvml", read
        elif device == "cpu" and (rapl := _rapl()):
            self.source, self._read = "rapl", rapl if local_rank == 0 else self._read

    def joules(self) -> float:
        return self._read()


def _rapl() -> Callable[[], float] | None:
    """Return a reader of the processors' packages; their counters begin anew at a maximum, which is undone."""
    domains = sorted(RAPL.glob("intel-rapl:[0-9]*"))
    packages = [folder for folder in domains if folder.name.count(":") == 1]
    try:
        before = {folder: int((folder / "energy_uj").read_text()) for folder in packages}
        ranges = {folder: int((folder / "max_energy_range_uj").read_text()) for folder in packages}
    except (OSError, ValueError):
        return None
    if not packages:
        return None
    total = dict.fromkeys(packages, 0)

    def read() -> float:
        for folder in packages:
            now = int((folder / "energy_uj").read_text())
            total[folder] += (now - before[folder]) % (ranges[folder] + 1)
            before[folder] = now
        return sum(total.values()) / 1e6

    return read


def _nvml(index: int) -> Callable[[], float] | None:
    """Return a reader of one GPU's own counter (Volta and newer), in joules."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        handle, found = ctypes.c_void_p(), ctypes.c_ulonglong()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            return None
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(found)):
            return None

        def read() -> float:
            library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(found))
            return found.value / 1e3

        return read
    return None
