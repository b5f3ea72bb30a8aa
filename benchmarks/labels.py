"""Does the label audit find wrong labels? MNIST with seeded symmetric noise, and published probabilities.

Noise: of 20 000 seeded training images a tenth gets another class, each other class as likely; the audit is the one
that validates labels (``tasks.data.noise.audit``), with the platform's own small model. Reference: cleanlab itself on
the out-of-sample probabilities that its authors published for the test set (Northcutt et al. 2021).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tasks.site import Site
from tasks.spec.feature import ImageFeature

ROWS, NOISE, SEED = 20_000, 0.10, 7
FEATURE = ImageFeature(kind="image", height=28, width=28)


def bench(site: Site) -> list[dict[str, Any]]:
    """Measure; return the rows, none (with the reason on stderr) where MNIST is not at hand."""
    folder = Path(os.environ.get("DRYDOCK_TEST_DATA") or site.root.parent / "shared" / "data") / "mnist"
    if not (folder / "train.parquet").is_file():
        print(f"skipped: {folder}/train.parquet is not there; set DRYDOCK_TEST_DATA to its folder", file=sys.stderr)
        return []
    return [*_seeded_noise(folder), *_published(folder), *_tags(folder.with_name("wnut17"))]


def _tags(folder: Path) -> list[dict[str, Any]]:
    """A tenth of the entities' tags, and as many of the other words', moved to another tag."""
    import numpy as np
    import pyarrow.parquet as pq

    from tasks.data.tagging import audit_tags

    if not (folder / "wnut17.parquet").is_file():
        return []
    table = pq.read_table(folder / "wnut17.parquet", filters=[("split", "==", "train")])
    words, tags = table.column("tokens").to_pylist(), table.column("tags").to_pylist()
    names = tuple(sorted({tag for row in tags for tag in row}))
    draw, wrong, given = np.random.default_rng(SEED), set(), [list(row) for row in tags]
    entities = sum(tag != "O" for row in tags for tag in row)
    plain_ratio = NOISE * entities / max(1, sum(map(len, tags)) - entities)
    for number, row in enumerate(given):
        for place, tag in enumerate(row):
            if draw.random() < (NOISE if tag != "O" else plain_ratio):
                row[place] = str(draw.choice([name for name in names if name != tag]))
                wrong.add((number, place))
    found = audit_tags(words, given, names)
    suspects = {
        (row, place)
        for row, meant in zip(found.noise.rows.tolist(), found.suggested, strict=True)
        for place, tag in enumerate(meant.split(" "))
        if tag != given[row][place]
    }
    precision = len(suspects & wrong) / max(1, len(suspects))
    return [
        _row("tags of WNUT-17, a tenth of the entities' moved: precision", precision),
        _row("the same: recall", len(suspects & wrong) / max(1, len(wrong))),
    ]


def _seeded_noise(folder: Path) -> list[dict[str, Any]]:
    import numpy as np

    from tasks.data.noise import audit

    table, truth = _images(folder / "train.parquet")
    given, wrong = flipped(truth, NOISE, SEED)
    began = time.monotonic()
    found = audit(table, FEATURE, given, len(given))
    seconds = time.monotonic() - began
    right = float(np.mean(found.suggested[wrong[found.rows]] == truth[found.rows][wrong[found.rows]]))
    return [
        _row("precision, 10 % noise on MNIST", float(wrong[found.rows].mean()), at_least=0.90),
        _row("recall, 10 % noise on MNIST", float(wrong[found.rows].sum() / wrong.sum()), at_least=0.90),
        _row("wrong labels found whose true class is suggested", right),
        _row("estimated noise ratio (true: see the next row)", found.ratio),
        _row("true noise ratio", float(wrong.mean())),
        _row(f"seconds for {len(given)} images", seconds),
    ]


def _published(folder: Path) -> list[dict[str, Any]]:
    import numpy as np
    import pyarrow.parquet as pq
    from cleanlab.filter import find_label_issues

    from tasks.data.noise import confident

    table = pq.read_table(folder / "test_pred_probs.parquet").sort_by("id")
    probabilities = np.column_stack([table.column(f"p{k}") for k in range(10)])
    labels = np.asarray(pq.read_table(folder / "test.parquet", columns=["id", "label"]).sort_by("id").column("label"))
    labels = labels.astype(np.int64)
    ours = set(confident(labels, probabilities).found.tolist())
    theirs = set(np.flatnonzero(find_label_issues(labels, probabilities)).tolist())
    judged = pq.read_table(folder / "test_label_errors.parquet").to_pandas()
    errors = set(judged[judged["is_error"]]["id"])
    return [
        _row("candidates on the published probabilities", len(ours)),
        _row("candidates that cleanlab's own differ in", len(ours ^ theirs), at_most=0),
        _row(f"of {len(errors)} errors confirmed by people, among them", len(ours & errors)),
    ]


def flipped(truth: Any, ratio: float, seed: int) -> tuple[Any, Any]:
    """Return labels with a share moved to another class, each as likely, and which were: int [B], bool [B]."""
    import numpy as np

    random = np.random.default_rng(seed)
    wrong = random.random(len(truth)) < ratio
    shifted = (truth + random.integers(1, 10, len(truth))) % 10
    return np.where(wrong, shifted, truth), wrong


def _images(path: Path) -> tuple[Any, Any]:
    """ROWS seeded images as a cleaned table has them, and their labels."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    chosen = np.sort(np.random.default_rng(SEED).choice(table.num_rows, ROWS, replace=False))
    table = table.take(chosen)
    flat = np.frombuffer(b"".join(table.column("pixels").to_pylist()), np.uint8)
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(flat), FEATURE.shape[0])
    return pa.table({"pixels": pixels}), np.asarray(table.column("label")).astype(np.int64)


def _row(name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    ok = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"name": name, "value": value, "limit": at_least if at_least is not None else at_most, "ok": ok}
