"""Late ground truth: what served answers should have been, joined by passport, and what that says of the live version.

    <home>/truth/<workload>.parquet    passport, row, label (predicted), truth; one line a served row, the last one told
"""

from __future__ import annotations

from pathlib import Path

from tasks.gate.judge import judge
from tasks.site import Site
from tasks.spec.errors import BadRequest
from tasks.spec.label import NumberLabel, Target
from tasks.spec.load import load_workload
from tasks.spec.rules import Evidence, Measurement, Rule, Verdict
from tasks.spec.value import Value
from tasks.store.files import exclusive

COLUMNS = ("passport", "row", "label", "truth")
# Of the gate's rules those count that late labels can answer.
ANSWERED = (
    "accuracy", "macro_f1", "precision", "recall", "f1", "entity_f1", "entity_precision", "entity_recall", "rmse",
    "mae",
)  # fmt: skip


class Told(Value):
    """What came of a file of labels: how many were joined, and the live version measured on all that is known."""

    workload: str
    joined: int
    unmatched: int
    version: str | None
    measured: tuple[Measurement, ...]
    verdict: Verdict | None


def label_predictions(site: Site, workload: str, path: Path, who: str) -> Told:
    """Join later labels to served predictions and measure the live version again; the ledger keeps the outcome.

    ``path`` is a CSV or Parquet file with the columns ``passport``, ``label`` and, for answers of several rows,
    ``row``. The same file again changes nothing.

    Raises:
        BadRequest: the file can't be read, lacks a column, or names a class that the workload does not have.
    """
    declared = load_workload(site.workloads, workload)
    label, is_tagged = declared.data.label, declared.data.feature.kind == "tokens"
    if label.kind == "next":
        raise BadRequest(f"{workload}: a text is its own label (data.label.kind = 'next'), so none comes later")
    labels = _read(path, label, is_tagged)
    served = _served(site.home / "predictions" / workload)
    joined = {key: (served[key], truth) for key, truth in labels.items() if key in served}
    with exclusive(site.home / "locks" / f"truth-{workload}.lock"):
        known = _kept(site.home / "truth" / f"{workload}.parquet", joined)
    champion = site.ledger.champion(workload)
    digest = champion.digest_sha256 if champion else ""
    rows = [pair for (passport, _), pair in known.items() if passport.partition(".")[0] == digest]
    if label.kind == "number":
        measured = measure_numbers(rows, label)
    else:
        measured = (measure_tagged if is_tagged else measure_served)(rows, label.names)
    rules = [rule for rule in declared.gate.rules if _answerable(rule)]
    verdict = judge(rules, Evidence(subject=measured)) if measured and rules else None
    told = Told(
        workload=workload,
        joined=len(joined),
        unmatched=len(labels) - len(joined),
        version=champion.version if champion else None,
        measured=measured,
        verdict=verdict,
    )
    _record(site, told, who)
    return told


def _answerable(rule: Rule) -> bool:
    """Whether late labels can answer a rule: they tell nothing of declared slices, groups and perturbations."""
    is_told = rule.slice == "overall" or rule.slice.startswith("class:")
    return is_told and rule.metric in ANSWERED and rule.against is None


def measure_served(rows: list[tuple[str, str]], classes: tuple[str, ...]) -> tuple[Measurement, ...]:
    """Measure (predicted, true) pairs of class names: accuracy, macro F1, and recall and F1 by class."""
    import numpy as np

    from tasks.evaluate.metrics import measure

    rows = [pair for pair in rows if pair[0] in classes and pair[1] in classes]
    if not rows:
        return ()
    predicted, true = (np.array([classes.index(pair[side]) for pair in rows]) for side in (0, 1))
    # The log keeps the answer and its probability, not the whole distribution: what needs that is left out.
    found = measure(true, np.eye(len(classes))[predicted], classes)
    return tuple(m for m in found if m.metric in ANSWERED)


def measure_tagged(rows: list[tuple[str, str]], classes: tuple[str, ...]) -> tuple[Measurement, ...]:
    """Measure (predicted, true) pairs of tags with a space between two, as many in both: tags and entities."""
    import numpy as np

    from tasks.evaluate.tagged import TagAnswers

    split = [[side.split() for side in pair] for pair in rows]
    split = [pair for pair in split if len(pair[0]) == len(pair[1]) and {*pair[0], *pair[1]} <= {*classes}]
    if not split:
        return ()
    said, true = ([np.array([classes.index(tag) for tag in pair[side]]) for pair in split] for side in (0, 1))
    found = TagAnswers(true, np.eye(len(classes))[np.concatenate(said)], classes).measure()
    return tuple(m for m in found if m.metric in ANSWERED)


def measure_numbers(rows: list[tuple[str, str]], label: NumberLabel) -> tuple[Measurement, ...]:
    """Measure (predicted, true) pairs of numbers in digits: RMSE and MAE."""
    import numpy as np

    from tasks.evaluate.numeric import NumberAnswers

    if not rows:
        return ()
    said, true = (np.array([float(pair[side]) for pair in rows]) for side in (0, 1))
    return NumberAnswers(true, said, label).measure()


def _record(site: Site, told: Told, who: str) -> None:
    from tasks.evaluate.pareto import quality_of

    main = quality_of({m.metric for m in told.measured})
    found = next((m for m in told.measured if (m.metric, m.slice) == (main, "overall")), None)
    if found is None:
        text = f"{told.joined} late labels joined; none is of the live version"
    else:
        verdict = told.verdict.verdict if told.verdict else "no rule"
        text = f"{told.joined} late labels: version {told.version} has {main} {found.value:.4g} "
        text += f"({found.low:.4g} to {found.high:.4g}, n = {found.samples}): {verdict}"
    detail = {"joined": told.joined, "unmatched": told.unmatched}
    site.ledger.record_event(told.workload, "late labels", who, text, detail)


def _read(path: Path, label: Target, is_tagged: bool) -> dict[tuple[str, int], str]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    if not path.is_file():
        raise BadRequest(f"{path}: is not there")
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pa.csv.read_csv(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadRequest(f"{path}: can't be read as CSV or Parquet: {str(error).splitlines()[0]}") from None
    for name in ("passport", "label"):
        if name not in table.column_names:
            raise BadRequest(f"{path}: has no column {name!r}, has {', '.join(table.column_names)}")
    numbers = table.column("row").to_pylist() if "row" in table.column_names else [0] * table.num_rows
    found = {}
    told = zip(table.column("passport").to_pylist(), numbers, table.column("label").to_pylist(), strict=True)
    for passport, row, truth in told:
        if wrong := _wrong(str(truth), label, is_tagged):
            raise BadRequest(f"{path}: label {wrong}")
        found[str(passport), int(row or 0)] = str(truth)
    return found


def _wrong(truth: str, label: Target, is_tagged: bool) -> str | None:
    """What a true label is and must be, where it can't be one; none: it can."""
    if label.kind == "number":
        try:
            fits = label.min <= float(truth) <= label.max
        except ValueError:
            fits = False
        return None if fits else f"{truth!r} must be a number from {label.min:g} to {label.max:g}"
    names = truth.split() if is_tagged else [truth]
    wrong = [name for name in names if name not in label.names] or ([""] if not names else [])
    return f"{wrong[0]!r} is no class, must be one of {', '.join(label.names)}" if wrong else None


def _served(folder: Path) -> dict[tuple[str, int], str]:
    """What was answered, by passport and row; replays of kept rows are no one's question."""
    from tasks.data.predictions import all_predictions

    return {(line["passport"], line["row"]): line["label"] for line in all_predictions(folder) if not line["replayed"]}


def _kept(path: Path, joined: dict[tuple[str, int], tuple[str, str]]) -> dict[tuple[str, int], tuple[str, str]]:
    """Merge into what is kept, write it whole, return all of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {}
    if path.exists():
        for line in pq.read_table(path).to_pylist():
            known[line["passport"], line["row"]] = (line["label"], line["truth"])
    known |= joined
    lines = [dict(zip(COLUMNS, (*key, *pair), strict=True)) for key, pair in sorted(known.items())]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        working = path.with_suffix(".writing")
        pq.write_table(pa.Table.from_pylist(lines), working, compression="zstd")
        working.replace(path)
    return known
