"""What a workload file demands of its data and its labels, and what follows where it doesn't get it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.spec.value import Value

Ratio = Annotated[float, Field(ge=0, le=1)]
Severity = Literal["stop", "quarantine", "warn"]
# What the generated suites check, each with a severity of its own.
Check = Literal[
    "raw_columns", "raw_labels", "rows", "columns", "row_id", "label", "classes", "split", "rejected", "missing",
    "pixels", "chars", "numbers", "split_rows", "split_classes", "split_ratio", "schema", "volume", "shift", "repeated",
    "fresh", "anonymity", "newest",
]  # fmt: skip
WARNINGS: tuple[Check, ...] = ("raw_labels", "split_classes", "split_ratio", "repeated")


class Newest(Value):
    """How old the newest row of the source may be on the day of the run: an upstream that stopped shows here."""

    column: str = Field(description="of times, as the source has them; numbers are seconds since 1970 (UTC)")
    max_age_days: float = Field(gt=0)
    format: str | None = Field(default=None, description="of texts (strftime); none: ISO 8601")


class Expectations(Value):
    """What the generated Great Expectations suites demand of the data, and how severe it is where they don't get it.

    ``stop`` refuses the run, ``quarantine`` takes the offending rows out of the data set, ``warn`` is told.
    """

    min_rows: int = Field(default=100, ge=1)
    max_rows: int | None = Field(default=None, ge=1)
    max_rejected_ratio: Ratio = Field(default=0.2, description="rows that cleaning dropped or quarantined, of all rows")
    min_volume_ratio: float = Field(default=0.5, ge=0, description="rows, of those of the last accepted revision")
    max_volume_ratio: float = Field(default=10.0, gt=0)
    max_shift: Ratio = Field(
        default=0.3, description="of any column against the last accepted revision (total variation distance)"
    )
    fresh: bool = Field(default=False, description="each run must bring a file that the last revision did not have")
    newest: Newest | None = None
    severity: dict[Check, Severity] = Field(default={}, description="of a check; the default of most is stop")

    def severity_of(self, check: Check) -> Severity:
        """Return how severe it is where a check fails."""
        return self.severity.get(check, "warn" if check in WARNINGS else "stop")

    @model_validator(mode="after")
    def _quarantine_needs_rows(self) -> Expectations:
        by_row = ("row_id", "label", "classes", "split", "missing", "pixels", "chars", "anonymity")
        for check, severity in self.severity.items():
            if severity == "quarantine" and check not in by_row:
                raise ValueError(f"severity.{check} = 'quarantine', must be stop or warn: it concerns no single row")
        low, high = self.min_volume_ratio, self.max_volume_ratio
        if low > high:
            raise ValueError(f"min_volume_ratio = {low}, must be at most max_volume_ratio = {high}")
        return self


class LabelRules(Value):
    """When label validation refuses. Ratios are of all rows."""

    min_class_ratio: Ratio = Field(default=0.01, description="the rarest class")
    max_conflict_ratio: Ratio = Field(default=0.01, description="equal features under different labels")
    max_leaked_ratio: Ratio = Field(default=0.0, description="rows whose features are in an earlier split too")
    max_near_leaked_ratio: Ratio | None = Field(
        default=None, description="rows with a near copy in an earlier split; none: reported, never refused"
    )
    max_noise_ratio: Ratio = Field(default=0.1, description="estimated wrong labels (confident learning)")
    max_class_noise_ratio: Ratio | None = Field(
        default=None, description="the same of the worst class's own rows; none: reported, never refused"
    )
    min_agreement: float | None = Field(
        default=None, le=1, description="Krippendorff's alpha of the annotators; none: reported, never refused"
    )
    max_audited_rows: int = Field(default=20_000, ge=100, description="a seeded sample of larger sets is audited")
