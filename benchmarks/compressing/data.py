"""The real data sets as the version step leaves them: a published room with ``data.parquet``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.value import RoomRef
from tasks.store.room import Room


def shared(site: Site, name: str) -> Path:
    """Return a test data set's file.

    Raises:
        BadRequest: it is not there.
    """
    path = Path(os.environ.get("DRYDOCK_TEST_DATA") or site.root.parent / "shared" / "data") / name
    if not path.exists():
        raise BadRequest(f"{path}: is not there; set DRYDOCK_TEST_DATA to the folder of the test data")
    return path


def publish(base: Path, columns: dict[str, Any], label: list[str], split: list[str]) -> RoomRef:
    room = Room(base, "dataset")
    table = pa.table({"row_id": np.arange(len(label)), **columns, "label": label, "split": split})
    pq.write_table(table, room.begin() / "data.parquet")
    return room.publish({"rows_by_split": {name: split.count(name) for name in sorted(set(split))}})


def splits(n: int, holdout: float = 0.2, validation: float = 0.1) -> list[str]:
    """Return n names of splits, drawn with a fixed seed."""
    drawn = np.random.default_rng(0).random(n)
    named = np.where(drawn < holdout, "holdout", np.where(drawn < holdout + validation, "validation", "train"))
    return named.tolist()


def mnist_rows(site: Site) -> tuple[dict[str, Any], list[str], list[str]]:
    table = pq.read_table(shared(site, "mnist/train.parquet"))
    flat = np.frombuffer(b"".join(table.column("pixels").to_pylist()), dtype=np.uint8)
    pixels = pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, 784, dtype=np.int32), pa.array(flat))
    return {"pixels": pixels}, [str(k) for k in table.column("label").to_pylist()], splits(len(table))


def texts(site: Site, name: str) -> tuple[list[str], list[str], list[str]]:
    """Return texts, labels and splits of ``banking77`` or ``sms_spam``, each text once."""
    if name == "banking77":
        parts = [pq.read_table(shared(site, f"banking77/{part}.parquet")) for part in ("train", "test")]
        found = [(t, i, split) for part, split in zip(parts, ("train", "holdout"), strict=True)
                 for t, i in zip(part.column("text").to_pylist(), part.column("intent").to_pylist(), strict=True)]
        validation = np.random.default_rng(0).random(len(found)) < 0.05
        found = [
            (text, label, "validation" if held and split == "train" else split)
            for (text, label, split), held in zip(found, validation, strict=True)
        ]
    else:
        table = pq.read_table(shared(site, "sms_spam/sms.parquet"))
        pairs = dict(zip(table.column("text").to_pylist(), table.column("label").to_pylist(), strict=True))
        found = [(t, i, split) for (t, i), split in zip(pairs.items(), splits(len(pairs)), strict=True)]
    one, two, three = zip(*found, strict=True)
    return list(one), list(two), list(three)


def images() -> dict[str, Any]:
    """The feature and label sections of MNIST."""
    feature = {"kind": "image", "height": 28, "width": 28}
    return {"feature": feature, "label": {"classes": list(range(10))}}
