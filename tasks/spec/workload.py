"""A workload: what ``workloads/NAME/workload.yaml`` may say. Every section has defaults that suit a small model.

Contradictions are refused here, beside the fields they concern, and name the field that fixes them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tasks.spec.clean import PARSING, CleanRule
from tasks.spec.compress import Compress
from tasks.spec.cron import PRESETS as CRON_PRESETS
from tasks.spec.cron import is_cron
from tasks.spec.feature import Feature
from tasks.spec.review import Review
from tasks.spec.rules import Gate
from tasks.spec.source import ColumnType, Source
from tasks.spec.train import Train
from tasks.spec.validation import Expectations, LabelRules
from tasks.spec.value import Value

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]


class Label(Value):
    """The label column and its allowed classes, in the order of the model's outputs."""

    column: str = "label"
    classes: tuple[str | int, ...] = Field(min_length=2)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(item) for item in self.classes)

    @model_validator(mode="after")
    def _distinct(self) -> Label:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"classes = {list(self.classes)}, must be distinct")
        return self


class Split(Value):
    """Rows go to a split by a hash of their features, so equal rows never part; or by a column of the source."""

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.15
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0
    column: str | None = Field(default=None, description="holds the names train, validation, holdout (or test)")

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Split:
        if self.validation + self.holdout > 0.9:
            raise ValueError(
                f"holdout = {self.holdout} and validation = {self.validation} leave under 10 % to train on; "
                "their sum must be 0.9 or less"
            )
        return self


class Data(Value):
    """The rows: where they come from, what of them is read, and how they are cleaned, judged and divided."""

    source: Source
    feature: Feature
    label: Label
    columns: dict[str, ColumnType] = Field(default={}, description="further columns, for the cleaning rules to read")
    bad_rows: Literal["refuse", "quarantine"] = Field(
        default="refuse", description="rows that can't be read as their columns' types"
    )
    clean: tuple[CleanRule, ...] = ()
    expectations: Expectations = Expectations()
    labels: LabelRules = LabelRules()
    split: Split = Split()

    @property
    def made_columns(self) -> tuple[str, ...]:
        """The columns that cleaning adds, which the source need not have."""
        return tuple(name for rule in self.clean for name in rule.made_columns)

    @property
    def read_columns(self) -> dict[str, ColumnType]:
        """The types of columns that are not read as feature, label or split would be: what is parsed is text."""
        parsed = {rule.column for rule in self.clean if isinstance(rule, PARSING)}
        return {name: "text" if name in parsed else kind for name, kind in self.columns.items()} | {
            name: "text" for name in self.feature.columns if name in parsed
        }

    @model_validator(mode="after")
    def _label_is_no_feature(self) -> Data:
        if self.label.column in self.feature.columns:
            raise ValueError(f"label.column = {self.label.column!r}, is a feature column too")
        return self

    @model_validator(mode="after")
    def _columns_are_named_once(self) -> Data:
        for name in self.columns:
            if name in (*self.feature.columns, self.label.column, self.split.column):
                raise ValueError(f"columns.{name}: is feature, label or split column already; remove it here")
        for name in self.made_columns:
            if name in (*self.columns, self.label.column, self.split.column):
                raise ValueError(f"clean: column {name!r} is made by a rule and read from the source; name another")
        return self

    @model_validator(mode="after")
    def _rules_name_known_columns(self) -> Data:
        known = {*self.feature.columns, self.label.column, *self.columns}
        known |= {self.split.column} if self.split.column else set()
        for index, rule in enumerate(self.clean):
            known |= set(rule.made_columns)
            for column in rule.named_columns:
                if column not in known:
                    raise ValueError(f"clean.{index}.column = {column!r}, must be one of {sorted(known)}")
        return self


class PredictionLog(Value):
    """What is kept of served answers: passport, time and answer, never the input."""

    ratio: float = Field(default=1.0, ge=0, le=1, description="the share of answers that is logged")
    max_per_second: int = Field(default=100, ge=1, description="beyond it answers are counted and not logged")
    days: int = Field(default=30, ge=1, description="how long they are kept")


class Serve(Value):
    replicas: int = Field(default=1, ge=1, le=64)
    max_batch_rows: int = Field(default=64, ge=1)
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    max_queue: int = Field(default=128, ge=1, description="requests waiting; beyond it the answer is 503")
    max_batch_ms: int = Field(default=50, ge=1, description="requests are batched as far as one batch takes this long")
    threads: int = Field(default=1, ge=1)
    cache_bytes: int = Field(default=0, ge=0, description="memory for answers to inputs seen before; 0: no cache")
    requests_per_second: int | None = Field(
        default=None, ge=1, description="what each client (API key, else address) may ask; beyond it the answer is 429"
    )
    log: PredictionLog = PredictionLog()


class Rollout(Value):
    """How a new version earns the traffic: a shadow first, then shares of it, each judged against the champion.

    A stage passes with evidence enough that the candidate is no worse than the limits, and fails as soon as the
    evidence says that it is. Live requests count; where they are too few, the holdout is replayed.
    """

    shadow_percent: int = Field(default=100, ge=0, le=100, description="of live requests copied to it; 0: no shadow")
    steps: tuple[int, ...] = Field(default=(5, 25, 50), description="percent of the traffic, rising; then it is all")
    step_seconds: int = Field(default=10, ge=1, description="how long a stage waits for live requests to suffice")
    stage_seconds: int = Field(default=120, ge=1, description="how long a stage may take in all; then inconclusive")
    min_requests: int = Field(default=100, ge=10, description="requests that each side must have had in a stage")
    live_only: bool = Field(default=False, description="true: no replay; too few live requests are inconclusive")
    max_error_rise: float = Field(default=0.02, gt=0, le=1, description="of the share of failed requests")
    max_p50_ratio: float = Field(default=1.5, ge=1, description="candidate's median by the champion's")
    max_p99_ratio: float = Field(default=2.0, ge=1, description="candidate's 99th percentile by the champion's")
    latency_slack_ms: float = Field(default=5.0, ge=0, description="a difference up to this never counts as slower")
    max_answer_shift: float = Field(
        default=0.3, gt=0, le=1, description="between the two distributions of answers (total variation distance)"
    )
    promote_seconds: int = Field(default=600, ge=1, description="a candidate that passed is promoted in this time")
    bake_seconds: int = Field(default=60, ge=0, description="how long the previous version stays warm")
    ready_seconds: int = Field(default=60, ge=1, description="how long a new replica may take to be ready")

    @field_validator("steps")
    @classmethod
    def _steps_rise(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)) or any(not 1 <= step <= 99 for step in steps):
            raise ValueError(f"{list(steps)}, must rise from 1 to 99 percent")
        return steps


class WebhookNotifier(Value):
    kind: Literal["webhook"]
    url: str = Field(min_length=1, description="may be or hold a ${secret:NAME}")


class Workload(Value):
    """One model that Drydock builds, releases and watches."""

    name: Name
    description: str = ""
    priority: int = Field(default=1, ge=1, le=1000)
    schedule: str | None = Field(default=None, description="a cron line, in UTC; none: by hand and by assets")
    data: Data
    train: Train
    compress: Compress = Compress()
    gate: Gate = Gate()
    review: Review = Review()
    serve: Serve = Serve()
    rollout: Rollout = Rollout()
    notify: tuple[WebhookNotifier, ...] = ()

    @model_validator(mode="after")
    def _recipe_fits_feature(self) -> Workload:
        recipe, feature = self.train.recipe.kind, self.data.feature.kind
        fitting = {"mlp": {"image", "table"}, "text-cnn": {"text"}}.get(recipe)
        if fitting and feature not in fitting:
            raise ValueError(
                f"train.recipe.kind = {recipe!r}, must be one that reads data.feature.kind = {feature!r}"
            )
        return self

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, schedule: str | None) -> str | None:
        if schedule is not None and not is_cron(schedule):
            raise ValueError(f"{schedule!r}, must be a cron line of five fields, or one of {', '.join(CRON_PRESETS)}")
        return schedule
