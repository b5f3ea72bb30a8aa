"""Validate labels: allowed classes, balance, conflicts, leakage, likely errors. The gate's judge decides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.noise import Noise, audit
from tasks.data.table import empty_room, read_table, row_digests, write_table
from tasks.gate.judge import judge
from tasks.spec.requests import ValidateLabelsRequest, ValidateLabelsResult
from tasks.spec.rules import Evidence, Measurement, Rule
from tasks.store.files import write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.workload import LabelRules


class Found(NamedTuple):
    """What was measured on B rows. Masks are bool [B]; ``codes`` int64 [B], -1 where a label is no class."""

    codes: np.ndarray
    class_counts: dict[str, int]
    conflicting: np.ndarray
    leaked: np.ndarray
    digests: np.ndarray
    noise: Noise


def validate_labels(request: ValidateLabelsRequest, room: Path) -> ValidateLabelsResult:
    """Write ``suspects.parquet`` (worst first), ``conflicts.parquet`` and ``report.json`` into ``room``.

    Labels that break a rule are a verdict, never an exception; the same request gives the same result.

    Raises:
        IntegrityLost: the cleaned room changed.
    """
    table = read_table(open_room(request.clean) / "data.parquet")
    found = _measure(request, table)
    evidence = Evidence(subject=measurements(found))
    verdict = judge(rules(request.rules), evidence)
    empty_room(room)
    write_table(room / "suspects.parquet", _suspects(table, found, request.label.names))
    write_table(room / "conflicts.parquet", _conflicts(table, found))
    result = ValidateLabelsResult(
        verdict=verdict,
        class_counts=found.class_counts,
        conflicts=int(found.conflicting.sum()),
        leaked=int(found.leaked.sum()),
        suspects=len(found.noise.rows),
        noise_ratio=found.noise.ratio,
    )
    sizes = {"rows": table.num_rows, "audited_rows": found.noise.samples}
    measured = {"measurements": [item.model_dump(mode="json") for item in evidence.subject]}
    write_json(room / "report.json", result.model_dump(mode="json", exclude={"room"}) | sizes | measured)
    return result


def rules(limits: LabelRules) -> tuple[Rule, ...]:
    """Return the workload's label rules as the judge takes them. A class without a row always fails."""
    return (
        Rule(metric="class_rows", slice="class:*", min=1),
        Rule(metric="unknown_label_ratio", max=0),
        Rule(metric="class_ratio", slice="class:*", min=limits.min_class_ratio),
        Rule(metric="conflict_ratio", max=limits.max_conflict_ratio),
        Rule(metric="leaked_ratio", max=limits.max_leaked_ratio),
        Rule(metric="noise_ratio", max=limits.max_noise_ratio),
    )


def measurements(found: Found) -> tuple[Measurement, ...]:
    """Return the evidence: ratios of all rows; the noise ratio is an estimate over the audited rows.

    Where the audit could not be made the noise ratio has 0 samples, which the judge calls inconclusive.
    """
    rows, noise = len(found.codes), found.noise

    def share(count: int) -> float:
        return int(count) / max(rows, 1)

    by_class = [
        Measurement(metric=metric, slice=f"class:{name}", value=value, samples=rows)
        for name, count in found.class_counts.items()
        for metric, value in (("class_rows", count), ("class_ratio", share(count)))
    ]
    return (
        *by_class,
        Measurement(metric="unknown_label_ratio", value=share((found.codes < 0).sum()), samples=rows),
        Measurement(metric="conflict_ratio", value=share(found.conflicting.sum()), samples=rows),
        Measurement(metric="leaked_ratio", value=share(found.leaked.sum()), samples=rows),
        Measurement(
            metric="noise_ratio", value=noise.ratio, samples=noise.samples, low=noise.low, high=noise.high
        ),
    )


def _measure(request: ValidateLabelsRequest, table: pa.Table) -> Found:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    names = request.label.names
    index = pc.index_in(table.column("label"), value_set=pa.array(names, pa.string()))
    codes = np.asarray(pc.fill_null(index, -1).combine_chunks(), dtype=np.int64)
    digests = row_digests(table, request.feature)
    return Found(
        codes=codes,
        class_counts={name: int((codes == code).sum()) for code, name in enumerate(names)},
        conflicting=conflicting(digests, table.column("label").to_pylist()),
        leaked=leaked(digests, np.array(table.column("split").to_pylist())),
        digests=digests,
        noise=audit(table, request.feature, codes, request.rules.max_audited_rows),
    )


def conflicting(digests: np.ndarray, labels: list[str | None]) -> np.ndarray:
    """Return which rows have a twin, equal in features, under another label: bool [B]."""
    import numpy as np

    _, group = np.unique(digests, return_inverse=True)
    _, code = np.unique(np.array([label or "" for label in labels], dtype=str), return_inverse=True)
    pairs = np.unique(np.stack([group, code], axis=1), axis=0)
    labels_of_group = np.bincount(pairs[:, 0], minlength=group.max(initial=-1) + 1)
    return labels_of_group[group] > 1


def leaked(digests: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Return which holdout rows are, by their features, in train or validation too: bool [B]."""
    import numpy as np

    holdout = splits == "holdout"
    return holdout & np.isin(digests, digests[~holdout])


def _suspects(table: pa.Table, found: Found, names: tuple[str, ...]) -> pa.Table:
    import pyarrow as pa

    noise = found.noise
    rows = table.select(["row_id", "label"]).take(pa.array(noise.rows, pa.int64()))
    suggested = pa.array([names[code] for code in noise.suggested], pa.string())
    quality = pa.array(noise.quality, pa.float64())
    return rows.append_column("suggested", suggested).append_column("quality", quality)


def _conflicts(table: pa.Table, found: Found) -> pa.Table:
    """The rows in conflict, twins side by side: ``group`` is the same for equal features."""
    import numpy as np
    import pyarrow as pa

    rows = np.flatnonzero(found.conflicting)
    rows = rows[np.argsort(found.digests[rows], kind="stable")]
    group: Any = [digest.decode()[:16] for digest in found.digests[rows]]
    picked = table.select(["row_id", "label", "split"]).take(pa.array(rows, pa.int64()))
    return picked.append_column("group", pa.array(group, pa.string()))
