"""Requests and results of the steps: the small JSON that travels between them. Data lies in rooms.

A request holds everything that its result depends on, so that the key of a step is the digest of its
request and of the step's code. It holds only the sections it needs: a changed ``serve`` section keys no
training anew.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.spec.augment import Augment
from tasks.spec.clean import CleanRule
from tasks.spec.compress import Form, Objective, Variant, VariantName
from tasks.spec.data import Split
from tasks.spec.evaluate import Evaluate
from tasks.spec.feature import Feature
from tasks.spec.label import Target
from tasks.spec.privacy import WATCH, Anonymity, Privacy, Receipt
from tasks.spec.rules import Rule, Verdict
from tasks.spec.search import Search
from tasks.spec.source import ColumnType, Source
from tasks.spec.train import Train
from tasks.spec.validation import Expectations, LabelRules
from tasks.spec.value import RoomRef, Value


class SourceFile(Value):
    """One file of a source, resolved: ``name`` is the absolute path, the address, or a bundled set's name and
    version; of a query, ``sha256`` is the digest of its rows."""

    name: str
    sha256: str
    bytes: int = Field(ge=0)


class IngestRequest(Value):
    """Read the source into one Parquet table with the declared columns and types."""

    workload: str
    source: Source
    files: tuple[SourceFile, ...] = Field(min_length=1)
    feature: Feature
    label: Target
    split_column: str | None = None
    columns: dict[str, ColumnType] = Field(default={}, description="further columns, or other types than usual")
    made_columns: tuple[str, ...] = Field(default=(), description="features that cleaning makes")
    bad_rows: Literal["refuse", "quarantine"] = "refuse"
    privacy: Privacy = WATCH
    privacy_key_id: str | None = Field(default=None, description="which key hashes; never the key")


class IngestResult(Value):
    """``raw.parquet``: feature, label, split and further columns; ``quarantine.parquet``: rows that could not be
    read (file, row, reason, content), where the workload puts them there."""

    room: RoomRef | None = None
    rows: int
    columns: tuple[str, ...]
    quarantined_rows: int = 0
    encodings: dict[str, str] = Field(default={}, description="of each text file, as it was declared or detected")
    sources: tuple[str, ...] = Field(default=(), description="SHA-256 of each file that was read")
    privacy: Receipt = Receipt()


class CleanRequest(Value):
    workload: str
    raw: RoomRef
    feature: Feature
    label: Target
    rules: tuple[CleanRule, ...]
    split: Split
    keep: tuple[str, ...] = Field(default=(), description="further columns that stay beside the features")
    corrections: RoomRef | None = Field(default=None, description="labels that people corrected, applied last")


class CleanResult(Value):
    """``data.parquet``: row_id, features, kept columns, ``label`` (text), ``split``; ``repairs.parquet``: every
    changed cell and dropped row (row_id, column, before, after, rule); ``quarantine.parquet``: dropped rows as they
    were read, with row_id, rule, column and reason; ``report.json``: counts by rule."""

    room: RoomRef | None = None
    rows_in: int
    rows_out: int
    changed_cells: int
    dropped_rows: int
    rows_by_split: dict[str, int]


class Previous(Value):
    """The last accepted revision, to compare with: its tag, and the digest of the facts that the tag holds."""

    revision: str
    facts_sha256: str


class ValidateDataRequest(Value):
    workload: str
    raw: RoomRef
    clean: RoomRef
    rows_in: int
    dropped_rows: int
    feature: Feature
    label: Target
    split: Split
    expectations: Expectations
    suites_sha256: str = Field(description="digest of the suites that users edit in great_expectations/")
    sources: tuple[str, ...] = Field(default=(), description="SHA-256 of each source file")
    previous: Previous | None = None
    anonymity: Anonymity | None = None
    columns: tuple[str, ...] = Field(default=(), description="further columns of the raw table")
    keep: tuple[str, ...] = Field(default=(), description="those of the cleaned one")
    today: str | None = Field(default=None, description="the day (UTC) of the run, where the newest row's age counts")
    made_columns: tuple[str, ...] = Field(default=(), description="features that cleaning made")


class ValidateDataResult(Value):
    """``docs/``: Great Expectations' data docs (index.html); ``validation.json``: its results;
    ``quarantine.parquet``: row_id and reason of rows taken out; ``profile.json``: the distribution of each column,
    and its shift against the last accepted revision."""

    room: RoomRef | None = None
    success: bool
    evaluated: int
    failed: tuple[str, ...] = Field(description="one line for each expectation that stops the run")
    warned: tuple[str, ...] = Field(default=(), description="one line for each that is only told")
    quarantined: int = Field(default=0, description="rows taken out of the data set")
    sampled: bool = Field(default=False, description="a large table, of which expectations saw a part")
    suites: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One phrase for a card: how many were evaluated, and what became of the rest."""
        counts = {"not met": len(self.failed), "warnings": len(self.warned), "rows in quarantine": self.quarantined}
        found = [f"{count} {what}" for what, count in counts.items() if count or what == "not met"]
        return ", ".join([f"{self.evaluated} evaluated", *found])


class ValidateLabelsRequest(Value):
    workload: str
    clean: RoomRef
    feature: Feature
    label: Target
    rules: LabelRules
    corrections: RoomRef | None = Field(default=None, description="a label that a person confirmed is queued no more")


class ValidateLabelsResult(Value):
    """``suspects.parquet``: rows whose label is likely wrong (row_id, label, suggested, quality), worst first;
    ``conflicts.parquet``: rows of equal features under different labels; ``queue.csv`` and ``queue.html``: both
    for people to answer; ``report.json``."""

    room: RoomRef | None = None
    verdict: Verdict
    class_counts: dict[str, int]
    conflicts: int
    leaked: int
    suspects: int
    noise_ratio: float | None = Field(description="none: a number was not audited for it")


class VersionRequest(Value):
    workload: str
    feature: Feature
    clean: RoomRef
    validate_data: RoomRef
    validate_labels: RoomRef
    corrections: RoomRef | None = None
    sources: tuple[str, ...] = ()
    privacy: Receipt = Receipt()
    augment: Augment | None = None


class VersionResult(Value):
    """``data.parquet``: the cleaned rows without those in quarantine, as the store gave them back, held against
    their digest; ``privacy.json``: the receipt of what became of personal data."""

    room: RoomRef | None = None
    revision: str = Field(description="the Git tag in the dataset repository: <workload>-<first 12 of the digest>")
    data_sha256: str
    rows_by_split: dict[str, int]
    class_counts: dict[str, int]
    augmented_rows: int = Field(default=0, description="changed copies of training rows, counted here alone")


class TrainRequest(Value):
    workload: str
    dataset: RoomRef
    revision: str
    feature: Feature
    label: Target
    train: Train
    model_py_sha256: str | None = Field(default=None, description="the digest of the workload's own model.py")
    encoder_sha256: str | None = Field(default=None, description="the digest of a pretrained encoder's files")


class TrialRequest(Value):
    """One trial of a search: ``train`` is the training that it changes."""

    workload: str
    number: int = Field(ge=0)
    search: Search
    train: TrainRequest


class TrialResult(Value):
    """What a trial's values came to. ``train``: the section with these values, whose training is the train step's."""

    room: RoomRef | None = None
    number: int
    state: Literal["complete", "pruned", "failed"]
    values: dict[str, int | float | str | bool]
    train: Train
    validation_loss: float | None = None
    cost: float | None = Field(default=None, description="less is better: by train.stopping.metric")
    why: str = ""


class TrainResult(Value):
    """``weights.safetensors``, ``tokenizer.json`` for texts, ``model.py`` for own models, ``encoder/config.json`` for
    pretrained ones, ``history.jsonl``, ``progress.jsonl``."""

    room: RoomRef | None = None
    run_id: str = Field(description="the run in MLflow")
    epochs: int
    best_epoch: int
    validation_loss: float
    best_cost: float = Field(description="what the best epoch was taken by: its loss, or the negative of a metric")
    train_seconds: float
    parameters: int
    restarts: int = 0


class CompressRequest(Value):
    workload: str
    variant: Variant
    trained: RoomRef
    dataset: RoomRef
    feature: Feature
    label: Target
    train: Train
    also: tuple[Form, ...] = ()
    objective: Objective | None = Field(default=None, description="by which one of several students is taken")


class CompressResult(Value):
    """``package/``: a model package with its manifest, unsigned as yet; ``network/``: the further forms that were asked
    for; ``compression.json``: this result."""

    room: RoomRef | None = None
    variant: VariantName
    package_sha256: str
    model_bytes: int
    parity_max_difference: float = Field(description="largest difference of probabilities to its torch network")
    agreement: float = Field(default=1.0, description="share of validation rows on which it says what fp32 says")
    speed_ratio: float = Field(default=1.0, description="its float graph's time for one row by its own, one thread")
    note: str = Field(default="", description="what was given up on the way: layers left float, a fall-back")


class EvaluateRequest(Value):
    """Measure one package on the holdout. Pure, so a champion that is a candidate again costs nothing."""

    workload: str
    package_uri: str
    package_sha256: str
    dataset: RoomRef
    label: Target
    evaluate: Evaluate = Evaluate()
    core_watts: float = Field(default=10, gt=0, description="as in the settings: for estimates of energy")
    price_per_kwh: float = Field(default=0.25, ge=0, description="as in the settings")


class EvaluateResult(Value):
    """``measurements.json``: metrics overall and by class with intervals, latency, size;
    ``predictions.parquet``: row_id, label, prediction, probabilities (of tagged words lists of
    them); ``report.html`` and its pictures: ``confusion.png`` and ``calibration.png`` (of numbers ``numbers.png``, of
    texts ``texts.png``), ``slices.png``."""

    room: RoomRef | None = None
    package_sha256: str
    accuracy: float | None = Field(default=None, description="of classes")
    macro_f1: float | None = Field(default=None, description="of classes")
    entity_f1: float | None = Field(default=None, description="where words are tagged")
    rmse: float | None = Field(default=None, description="of numbers")
    perplexity: float | None = Field(default=None, description="of texts whose next piece is told")
    p50_ms: float
    p99_ms: float
    model_bytes: int
    samples: int


class Candidate(Value):
    variant: VariantName
    kind: str = Field(description="the variant's, which may have another name")
    package_sha256: str
    package_uri: str
    evaluation: RoomRef
    note: str = Field(default="", description="what its compression gave up")


class JudgeRequest(Value):
    workload: str
    run_id: str
    rules: tuple[Rule, ...]
    objective: Objective
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    champion: RoomRef | None = Field(default=None, description="the champion's evaluation on the same holdout")
    validate_data: RoomRef
    validate_labels: RoomRef


class Judged(Value):
    variant: VariantName
    package_sha256: str
    verdict: Verdict
    chosen: bool = False
    why: str = Field(default="", description="why it was taken, or was not")
    note: str = Field(default="", description="how it was compressed: what was given up")


class JudgeResult(Value):
    """``verdict.json``; ``report.html``: all candidates beside the champion."""

    room: RoomRef | None = None
    verdict: Literal["pass", "fail", "error", "inconclusive"]
    chosen: Candidate | None
    judged: tuple[Judged, ...]
    summary: str


class RegisterRequest(Value):
    """Sign the chosen package and register it: one version for each package; judged anew, with the new evidence."""

    workload: str
    description: str
    run_id: str
    revision: str
    summary: str
    review_required: bool
    asked_by: tuple[str, ...] = Field(default=(), description="the people who asked for the run, as they are known")
    code_sha256: str = Field(description="digest of the sources that made and judged it")
    rules: tuple[Rule, ...] = Field(description="those by which it was judged")
    dataset: RoomRef
    chosen: Candidate
    judged: RoomRef
    validate_data: RoomRef
    validate_labels: RoomRef


class RegisterResult(Value):
    room: RoomRef | None = None
    version: str = Field(description="the version's number in MLflow's registry")
    package_sha256: str
    evidence_sha256: str = Field(description="the evidence pack that an approval binds to")
    created: bool = Field(description="false where this package was registered before")
