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
from tasks.data.rawrows import RawRows
from tasks.data.table import empty_room, sample, write_table
from tasks.data.tagging import TagNoise, audit_tags
from tasks.data.truth import Annotations, annotations
from tasks.data.twins import conflicting, digests_of, leaked
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
    if request.label.kind != "class":
        return validate_numbers(request, room)
    rows = RawRows(open_room(request.clean) / "data.parquet")
    right = confirmed(read(request.corrections))
    found = _measure(request, rows)
    found = without_confirmed(found, rows.column("label").to_pylist(), right)
    said = annotations(open_room(request.clean))
    evidence = Evidence(subject=(*measurements(found), *said.measurements))
    verdict = judge(rules(request.rules), evidence)
    empty_room(room)
    write_table(room / "suspects.parquet", _suspects(rows, found))
    write_table(room / "conflicts.parquet", _conflicts(rows, found))
    write_queue(room, request, rows, [*_queue(rows, found, right), *_disputed(rows, found, said, right)])
    result = ValidateLabelsResult(
        verdict=verdict,
        class_counts=found.class_counts,
        conflicts=int(found.conflicting.sum()),
        leaked=int(found.leaked.sum()),
        suspects=len(found.noise.rows),
        noise_ratio=found.noise.ratio,
    )
    sizes = {"rows": rows.rows, "audited_rows": found.noise.samples, "annotators": said.facts}
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


def _measure(request: ValidateLabelsRequest, rows: RawRows) -> Found:
    import numpy as np

    names, labels = request.label.names, rows.column("label")
    codes = _codes(request, labels)
    digests, missing = digests_of(rows, request.feature)
    audited = _audited(request, rows, np.where(missing, -1, codes) if len(codes) == len(missing) else codes)
    splits = np.array(rows.column("split").to_pylist())
    return Found(
        codes=codes,
        class_counts={name: int((codes == code).sum()) for code, name in enumerate(names)},
        conflicting=conflicting(digests, labels.to_pylist()),
        leaked=leaked(digests, splits),
        near=near_copies(rows, request.feature, splits, request.rules.max_audited_rows),
        digests=digests,
        noise=audited.noise,
        suggested=audited.suggested,
        counts=audited.counts,
    )


def _codes(request: ValidateLabelsRequest, labels: pa.ChunkedArray) -> np.ndarray:
    """The class index of each row's label, or of each word's tag, in order; -1 where it is no class."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if request.feature.kind == "tokens":
        labels = pc.list_flatten(pc.split_pattern(labels, " "))
    index = pc.index_in(labels, value_set=pa.array(request.label.names, pa.string()))
    return np.asarray(pc.fill_null(index, -1).combine_chunks(), dtype=np.int64)


def _audited(request: ValidateLabelsRequest, rows: RawRows, codes: np.ndarray) -> TagNoise:
    import numpy as np

    names, most = request.label.names, request.rules.max_audited_rows
    if request.feature.kind == "tokens":
        picked = sample(np.arange(rows.rows), most)
        table = rows.take(picked, [request.feature.column, "label"])
        sentences, tags = ([text.split(" ") if text else [] for text in side.to_pylist()] for side in table.columns)
        found = audit_tags(sentences, tags, names)
        return found._replace(noise=found.noise._replace(rows=picked[found.noise.rows]))
    noise = audit(rows, request.feature, codes, most)
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


def _queue(rows: RawRows, found: Found, right: set[tuple[str, str]]) -> list[Item]:
    """What people should look at: suspects, worst first; then rows in conflict, twins side by side."""
    import numpy as np

    noise, keys = found.noise, [digest.decode() for digest in found.digests]
    suspected = "the model disagrees"
    items = [
        Item(int(row), keys[row], suggested, float(quality), suspected)
        for row, suggested, quality in zip(noise.rows, found.suggested, noise.quality, strict=True)
    ]
    seen, labels = set(noise.rows.tolist()), rows.column("label").to_pylist()
    rest = [row for row in np.flatnonzero(found.conflicting) if row not in seen]
    rest = sorted((row for row in rest if (keys[row], labels[row]) not in right), key=lambda row: keys[row])
    return items + [Item(int(row), keys[row], "", None, "equal rows have different labels") for row in rest]


def _disputed(rows: RawRows, found: Found, said: Annotations, right: set[tuple[str, str]]) -> list[Item]:
    """Rows that their annotators leave in doubt, the least certain first, apart from those queued already."""
    seen = {int(row) for row in found.noise.rows}
    places = {row_id: place for place, row_id in enumerate(rows.column("row_id").to_pylist())}
    labels, items = rows.column("label").to_pylist(), []
    for line in said.disputed:
        place = places.get(line["row_id"])
        if place is None or place in seen or (found.digests[place].decode(), labels[place]) in right:
            continue
        reason = f"annotators disagree: {line['said']}"
        items.append(Item(place, found.digests[place].decode(), "", line["certainty"], reason))
    return items


def _suspects(rows: RawRows, found: Found) -> pa.Table:
    import pyarrow as pa

    noise = found.noise
    picked = rows.take(noise.rows, ["row_id", "label"])
    suggested = pa.array(found.suggested, pa.string())
    quality = pa.array(noise.quality, pa.float64())
    return picked.append_column("suggested", suggested).append_column("quality", quality)


def _conflicts(rows: RawRows, found: Found) -> pa.Table:
    """The rows in conflict, twins side by side: ``group`` is the same for equal features."""
    import numpy as np
    import pyarrow as pa

    places = np.flatnonzero(found.conflicting)
    places = places[np.argsort(found.digests[places], kind="stable")]
    group: Any = [digest.decode()[:16] for digest in found.digests[places]]
    picked = rows.take(places, ["row_id", "label", "split"])
    return picked.append_column("group", pa.array(group, pa.string()))
