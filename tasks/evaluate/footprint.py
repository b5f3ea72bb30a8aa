"""What it takes to open a package, as a server does: memory and time."""

from __future__ import annotations

import time
from pathlib import Path

from tasks.serve.package import Package, open_package
from tasks.spec.errors import DrydockError
from tasks.spec.rules import Measurement


def open_measured(folder: Path, digest_sha256: str) -> tuple[Package, tuple[Measurement, ...]]:
    """Open a package and answer its golden sample; return it with ``memory_bytes`` (resident, above the bare
    libraries) and ``open_ms``.

    Raises:
        IntegrityLost: as ``open_package``.
    """
    import numpy  # noqa: F401 - loaded by every server, whatever it serves
    import onnxruntime  # noqa: F401

    before, started = resident_bytes(), time.perf_counter()
    package = open_package(folder, digest_sha256, None)
    package.check_golden()
    opened_ms = 1e3 * (time.perf_counter() - started)
    # Never below the file's own size: pages that the process had freed before are taken first, and don't count.
    grown = max(resident_bytes() - before, (folder / "model.onnx").stat().st_size)
    return package, (
        Measurement(metric="memory_bytes", value=float(grown), samples=1),
        Measurement(metric="open_ms", value=opened_ms, samples=1),
    )


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise DrydockError("/proc/self/status: has no VmRSS")
