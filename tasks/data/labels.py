"""Validate labels: allowed classes, balance, conflicts, leakage, likely errors. The gate's judge decides.

What a person should look at goes to the relabel queue (``tasks.data.queue``); a label that a person has confirmed
(``tasks.data.corrections``) is no suspect any more, and is taken off the estimated noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.corrections import confirmed, read
from tasks.data.near import near_copies
from tasks.data.noise import Noise, audit, wilson
from tasks.data.numeric import validate_numbers
from tasks.data.queue import Item, write_queue
from tasks.data.table import empty_room, read_table, row_digests, write_table
from tasks.data.tagging import TagNoise, audit_tags
from tasks.data.truth import Annotations, annotations
from tasks.data.twins import conflicting, leaked
from tasks.gate.judge import judge
from tasks.spec.requests import ValidateLabelsRequest, ValidateLabelsResult
from tasks.spec.rules import Evidence, Measurement, Rule
from tasks.store.files import write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tasks.spec.validation import LabelRules


class Found(NamedTuple):
    """What was measured on B rows. Masks are bool [B]; ``codes`` int64 [L], -1 where a label is no class: of the B
    rows, or of all words where each has a tag. ``suggested`` and ``counts`` [S]: the label that each suspect row may
    have, and how many labels of it are suspected (of words, it may be several)."""

    codes: np.ndarray
    class_counts: dict[str, int]
    conflicting: np.ndarray
    leaked: np.ndarray
    near: np.ndarray
    digests: np.ndarray
    noise: Noise
    suggested: list[str] = []
    counts: np.ndarray | tuple[int, ...] = ()


def validate_labels(request: ValidateLabelsRequest, room: Path) -> ValidateLabelsResult:
    """Write ``suspects.parquet`` (worst first), ``conflicts.parquet``, ``queue.csv``, ``queue.html`` and
    ``report.json`` into ``room``.

    Labels that break a rule are a verdict, never an exception; the same request gives the same result.

    Raises:
        IntegrityLost: the cleaned room changed.
    """
    if request.label.kind == "number":
        return validate_numbers(request, room)
    table = read_table(open_room(request.clean) / "data.parquet")
    right = confirmed(read(request.corrections))
    found = _measure(request, table)
    found = without_confirmed(found, table.column("label").to_pylist(), right)
    said = annotations(open_room(request.clean))
    evidence = Evidence(subject=(*measurements(found), *said.measurements))
    verdict = judge(rules(request.rules), evidence)
    empty_room(room)
    write_table(room / "suspects.parquet", _suspects(table, found))
    write_table(room / "conflicts.parquet", _conflicts(table, found))
    write_queue(room, request, table, [*_queue(table, found, right), *_disputed(table, found, said, right)])
    result = ValidateLabelsResult(
        verdict=verdict,
        class_counts=found.class_counts,
        conflicts=int(found.conflicting.sum()),
        leaked=int(found.leaked.sum()),
        suspects=len(found.noise.rows),
        noise_ratio=found.noise.ratio,
    )
    sizes = {"rows": table.num_rows, "audited_rows": found.noise.samples, "annotators": said.facts}
    measured = {"measurements": [item.model_dump(mode="json") for item in evidence.subject]}
    write_json(room / "report.json", result.model_dump(mode="json", exclude={"room"}) | sizes | measured)
    return result


def rules(limits: LabelRules) -> tuple[Rule, ...]:
    """Return the workload's label rules as the judge takes them. A class without a row always fails."""
    optional = (
        ("near_leaked_ratio", "overall", limits.max_near_leaked_ratio),
        ("class_noise_ratio", "class:*", limits.max_class_noise_ratio),
    )
    agreed = [Rule(metric="annotator_agreement", min=limits.min_agreement)] if limits.min_agreement is not None else []
    return (
        Rule(metric="class_rows", slice="class:*", min=1),
        Rule(metric="unknown_label_ratio", max=0),
        Rule(metric="class_ratio", slice="class:*", min=limits.min_class_ratio),
        Rule(metric="conflict_ratio", max=limits.max_conflict_ratio),
        Rule(metric="leaked_ratio", max=limits.max_leaked_ratio),
        Rule(metric="noise_ratio", max=limits.max_noise_ratio),
        *agreed,
        *(Rule(metric=metric, slice=part, max=limit) for metric, part, limit in optional if limit is not None),
    )


def measurements(found: Found) -> tuple[Measurement, ...]:
    """Return the evidence: ratios of all rows; the noise ratio is an estimate over the audited rows.

    Where the audit could not be made the noise ratio has 0 samples, which the judge calls inconclusive.
    """
    rows, labels, noise = len(found.digests), len(found.codes), found.noise
    unknown = int((found.codes < 0).sum())

    def share(count: int) -> float:
        return int(count) / max(rows, 1)

    by_class = [
        Measurement(metric=metric, slice=f"class:{name}", value=value, samples=labels)
        for name, count in found.class_counts.items()
        for metric, value in (("class_rows", count), ("class_ratio", int(count) / max(labels, 1)))
    ]
    names = list(found.class_counts)
    by_class += [
        Measurement(metric="class_noise_ratio", slice=f"class:{names[code]}", value=ratio, samples=count)
        for code, (ratio, count) in noise.by_class.items()
    ]
    return (
        *by_class,
        Measurement(metric="unknown_label_ratio", value=unknown / max(labels, 1), samples=labels),
        Measurement(metric="conflict_ratio", value=share(found.conflicting.sum()), samples=rows),
        Measurement(metric="leaked_ratio", value=share(found.leaked.sum()), samples=rows),
        Measurement(metric="near_leaked_ratio", value=share(found.near.sum()), samples=rows),
        Measurement(
            metric="noise_ratio", value=noise.ratio, samples=noise.samples, low=noise.low, high=noise.high
        ),
    )


def _measure(request: ValidateLabelsRequest, table: pa.Table) -> Found:
    import numpy as np

    names = request.label.names
    codes = _codes(request, table)
    audited = _audited(request, table, codes)
    digests = row_digests(table, request.feature)
    splits = np.array(table.column("split").to_pylist())
    return Found(
        codes=codes,
        class_counts={name: int((codes == code).sum()) for code, name in enumerate(names)},
        conflicting=conflicting(digests, table.column("label").to_pylist()),
        leaked=leaked(digests, splits),
        near=near_copies(table, request.feature, splits, request.rules.max_audited_rows),
        digests=digests,
        noise=audited.noise,
        suggested=audited.suggested,
        counts=audited.counts,
    )


def _codes(request: ValidateLabelsRequest, table: pa.Table) -> np.ndarray:
    """The class index of each row's label, or of each word's tag, in order; -1 where it is no class."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = table.column("label")
    if request.feature.kind == "tokens":
        labels = pc.list_flatten(pc.split_pattern(labels, " "))
    index = pc.index_in(labels, value_set=pa.array(request.label.names, pa.string()))
    return np.asarray(pc.fill_null(index, -1).combine_chunks(), dtype=np.int64)


def _audited(request: ValidateLabelsRequest, table: pa.Table, codes: np.ndarray) -> TagNoise:
    import numpy as np

    names, most = request.label.names, request.rules.max_audited_rows
    if request.feature.kind == "tokens":
        sides = (table.column(name).to_pylist() for name in (request.feature.column, "label"))
        sentences, tags = ([text.split(" ") if text else [] for text in side] for side in sides)
        return audit_tags(sentences, tags, names, most)
    noise = audit(table, request.feature, codes, most)
    return TagNoise(noise, [names[code] for code in noise.suggested], np.ones(len(noise.rows), np.int64))


def without_confirmed(found: Found, labels: list[str | None], right: set[tuple[str, str]]) -> Found:
    """Return the audit without the suspects whose label a person has confirmed: those are known to be no errors."""
    import numpy as np

    noise = found.noise
    known = [(found.digests[row].decode(), labels[row]) in right for row in noise.rows]
    if not any(known):
        return found
    mask = np.array(known)
    ratio = max(0.0, noise.ratio - float(np.asarray(found.counts)[mask].sum()) / noise.samples)
    low, high = wilson(ratio, noise.samples)
    by_class = noise.by_class
    if len(found.codes) == len(found.digests):  # Of words, which tags of a row were suspected is not kept.
        codes = found.codes[noise.rows[mask]]
        by_class = {
            code: (max(0.0, value - float((codes == code).sum()) / max(count, 1)), count)
            for code, (value, count) in noise.by_class.items()
        }
    counts = np.asarray(found.counts)
    kept = {name: getattr(noise, name)[~mask] for name in ("rows", "suggested", "quality")}
    noise = noise._replace(ratio=ratio, low=low, high=high, by_class=by_class, **kept)
    left = [label for label, is_known in zip(found.suggested, known, strict=True) if not is_known]
    return found._replace(noise=noise, suggested=left, counts=counts[~mask])


def _queue(table: pa.Table, found: Found, right: set[tuple[str, str]]) -> list[Item]:
    """What people should look at: suspects, worst first; then rows in conflict, twins side by side."""
    import numpy as np

    noise, keys = found.noise, [digest.decode() for digest in found.digests]
    suspected = "the model disagrees"
    items = [
        Item(int(row), keys[row], suggested, float(quality), suspected)
        for row, suggested, quality in zip(noise.rows, found.suggested, noise.quality, strict=True)
    ]
    seen, labels = set(noise.rows.tolist()), table.column("label").to_pylist()
    rest = [row for row in np.flatnonzero(found.conflicting) if row not in seen]
    rest = sorted((row for row in rest if (keys[row], labels[row]) not in right), key=lambda row: keys[row])
    return items + [Item(int(row), keys[row], "", None, "equal rows have different labels") for row in rest]


def _disputed(table: pa.Table, found: Found, said: Annotations, right: set[tuple[str, str]]) -> list[Item]:
    """Rows that their annotators leave in doubt, the least certain first, apart from those queued already."""
    seen = {int(row) for row in found.noise.rows}
    places = {row_id: place for place, row_id in enumerate(table.column("row_id").to_pylist())}
    labels, items = table.column("label").to_pylist(), []
    for line in said.disputed:
        place = places.get(line["row_id"])
        if place is None or place in seen or (found.digests[place].decode(), labels[place]) in right:
            continue
        reason = f"annotators disagree: {line['said']}"
        items.append(Item(place, found.digests[place].decode(), "", line["certainty"], reason))
    return items


def _suspects(table: pa.Table, found: Found) -> pa.Table:
    import pyarrow as pa

    noise = found.noise
    rows = table.select(["row_id", "label"]).take(pa.array(noise.rows, pa.int64()))
    suggested = pa.array(found.suggested, pa.string())
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
