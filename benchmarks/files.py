"""A folder of very many small images: from the files to a dataset revision, beside ``dvc add`` on files like them.

Each image is one of the scikit-learn digits with noise of its own, as a PNG. A revision holds them packed, in one
Parquet file; the reference leaves them as files, as DVC has them by itself, on fewer of them.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.site import Site
from tasks.spec.settings import resolve

FILES, REFERENCE_FILES = 100_000, 10_000
WORKLOAD = """
name: many
data:
  source: {{kind: folders, path: "{folder}"}}
  feature: {{kind: image, height: 8, width: 8, max_value: 255}}
  label: {{classes: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]}}
  labels: {{max_audited_rows: 2000}}
train: {{recipe: {{kind: mlp}}}}
gate: {{rules: [{{metric: accuracy, min: 0.5}}]}}
"""
STEPS = ("ingest", "clean", "validate_data", "validate_labels", "version")


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows. ``DRYDOCK_BENCH_FILES`` says how many files."""
    files = int(os.environ.get("DRYDOCK_BENCH_FILES", FILES))
    with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base:
        say(f"writing {files} files")
        written = write_images(Path(base) / "images", files)
        seconds = steps(Path(base), say)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        reference = added(Path(base) / "plain", min(files, REFERENCE_FILES))
    ours = sum(seconds[name] for name in STEPS)
    rows = [("files", files), ("seconds to write them", written)]
    rows += [(f"{name}, s", value) for name, value in seconds.items()]
    rows += [("all steps, ms a file", 1000 * ours / files), ("peak memory, MiB, this process with its imports", peak)]
    rows += [("dvc add of the files as they are, ms a file", reference)]
    rows += [("ours in speed beside it, reading, cleaning and validation included", reference / (1000 * ours / files))]
    return [{"name": name, "value": value, "limit": None, "ok": True} for name, value in rows]


def write_images(folder: Path, files: int) -> float:
    """Write so many distinct images as ``folder/<class>/<number>.png``; return the seconds."""
    import io

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    began = time.monotonic()
    digits, draw = load_digits(), np.random.default_rng(0)
    for name in range(10):
        (folder / str(name)).mkdir(parents=True)
    for number in range(files):
        place = number % len(digits.target)
        pixels = np.clip(digits.images[place] * 15 + draw.integers(0, 16, (8, 8)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        (folder / str(digits.target[place]) / f"{number:07}.png").write_bytes(stream.getvalue())
    return time.monotonic() - began


def steps(base: Path, say: Any) -> dict[str, float]:
    """Take the images to a revision; return each step's seconds, and a plan's: the first and one more."""
    from tasks.plan import request_for
    from tasks.spec.load import load_workload
    from tasks.steps import run_step

    folder = base / "workloads" / "many"
    folder.mkdir(parents=True)
    (folder / "workload.yaml").write_text(WORKLOAD.format(folder=base / "images"))
    site = Site(resolve({"DRYDOCK_HOME": str(base / "home"), "DRYDOCK_WORKLOADS": str(folder.parent)}))
    workload, done, seconds = load_workload(site.workloads, "many"), {}, {}
    for name in ("a plan: every file read", "a plan again: every file looked at"):
        began = time.monotonic()
        request_for("ingest", workload, {}, site)
        seconds[name] = time.monotonic() - began
    for step in STEPS:
        began = time.monotonic()
        done[step] = run_step(step, request_for(step, workload, done, site), site).model_dump(mode="json")
        seconds[step] = time.monotonic() - began
        say(f"{step}: {seconds[step]:.1f} s")
    return seconds


def added(folder: Path, files: int) -> float:
    """Return the milliseconds a file that DVC takes to add a folder of so many."""
    write_images(folder / "images", files)
    dvc, quiet = Path(sys.executable).with_name("dvc"), {"check": True, "capture_output": True, "cwd": folder}
    subprocess.run([dvc, "init", "--no-scm"], **quiet)
    began = time.monotonic()
    subprocess.run([dvc, "add", "images"], **quiet)
    return 1000 * (time.monotonic() - began) / files


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
