"""Whether one changed byte is always refused, and what it costs to know.

Flips: one random byte of a random file of a signed package or of a checkpoint, 200 times; each is opened as a server
or a resumed training would. Cost: hashing and verifying of all that a training on MNIST reads and writes, by its time.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from compressing.data import images, mnist_rows, publish
from inference.rows import at_least, at_most

from tasks.compress.compress import compress
from tasks.serve.package import open_package
from tasks.site import Site
from tasks.spec.errors import DrydockError
from tasks.spec.requests import CompressRequest, TrainRequest
from tasks.store.manifest import verify, write_manifest
from tasks.store.room import Room, open_room
from tasks.store.sign import make_key, sign_folder
from tasks.train import checkpoint
from tasks.train.fit import fit

FLIPS = 200


def bench(site: Site) -> list[dict[str, Any]]:
    """Flip and time; return the rows.

    Raises:
        BadRequest: MNIST is not there (``DRYDOCK_TEST_DATA`` names its folder).
    """
    with tempfile.TemporaryDirectory(prefix="drydock-bench-") as base:
        return _measure(Path(base), site)


def _measure(base: Path, site: Site) -> list[dict[str, Any]]:
    dataset = publish(base / "mnist", *mnist_rows(site))
    request = TrainRequest.parse(asked(dataset), "the benchmark's request")
    room, kept = Room(base / "trained", "mnist"), base / "kept"
    kept.mkdir()
    started = time.perf_counter()
    done = fit(request, room.begin(), None, lambda line: _keep(room.path / "checkpoints", kept))
    train_seconds = time.perf_counter() - started
    trained = room.publish({"run_id": "none"} | done)
    made = base / "made"
    made.mkdir()
    data = {name: getattr(request, name).model_dump(mode="json") for name in ("dataset", "feature", "label", "train")}
    data |= {"workload": "mnist", "variant": "fp32", "trained": trained.model_dump()}
    digest = compress(CompressRequest.parse(data, "bench"), made, lambda *_: None).package_sha256
    make_key(base / "keys")
    sign_folder(made / "package", base / "keys")
    newest = max(kept.iterdir())
    seconds = _hashing(dataset, trained, newest, made / "package", done["epochs"])
    refused = sum(flip(base, newest, made / "package", digest, turn) for turn in range(FLIPS))
    return [
        at_least(f"of {FLIPS} flipped bytes, refused", refused, FLIPS),
        at_most("hashing and verifying, percent of the training stage", 100 * seconds / train_seconds, 2.0),
        at_most("the training stage, s", train_seconds, None),
        at_most("hashing and verifying, s", seconds, None),
    ]


def asked(dataset: Any) -> dict[str, Any]:
    recipe = {"kind": "mlp", "hidden": [512, 256, 128], "dropout": 0.2}
    train = {"recipe": recipe, "ranks": 2, "batch_size": 256, "stopping": {"max_epochs": 10, "patience_epochs": 3}}
    return {"workload": "mnist", "dataset": dataset.model_dump(), "revision": "mnist-bench", "train": train} | images()


def _keep(checkpoints: Path, kept: Path) -> None:
    """Training tidies its checkpoints away: one whole copy is kept for the flips."""
    if any(kept.iterdir()):
        return
    for path in checkpoints.glob("epoch-*"):
        try:
            shutil.copytree(path, kept / path.name)
            verify(kept / path.name)
            return
        except (OSError, shutil.Error, DrydockError):  # it was replaced meanwhile
            shutil.rmtree(kept / path.name, ignore_errors=True)


def _hashing(dataset: Any, trained: Any, newest: Path, package: Path, epochs: int) -> float:
    """Seconds to verify what the training read, and to hash what it wrote: each checkpoint, its room, its package."""
    started = time.perf_counter()
    open_room(dataset)
    # Each epoch's checkpoint is hashed once, when it is written.
    for _ in range(int(epochs)):
        write_manifest(newest)
    write_manifest(Path(trained.uri))
    verify(package)
    return time.perf_counter() - started


def flip(base: Path, saved: Path, package: Path, digest: str, seed: int) -> bool:
    """Change one byte of a copy and open it; return whether it was refused."""
    draw, copy = random.Random(seed), base / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved, copy / "checkpoints" / saved.name)
    shutil.copytree(package, copy / "package")
    path = draw.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
    with path.open("r+b") as stream:
        place = draw.randrange(os.path.getsize(path))
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << draw.randrange(8))]))
    if "checkpoints" in path.parts:
        return checkpoint.load_newest(copy / "checkpoints", contextlib.nullcontext)[0] is None
    try:
        open_package(copy / "package", digest, base / "keys")
    except DrydockError:
        return True
    return False
