"""Section ``gate``: rules, and the evidence they are held against: data only. To judge is ``tasks.gate``'s work."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from tasks.spec.value import Value

# Measured on the rows that candidate and champion both answered; where there is no champion, not applicable.
PAIRED = ("accuracy_gain", "entity_f1_gain", "rmse_gain", "bits_gain", "mcnemar_p", "champion_agreement")


class Rule(Value):
    """One demand on one metric: an absolute limit, or a limit on the loss against the champion.

    ``slice`` is ``overall``, one slice's name (``class:7``), or a pattern with a star (``class:*``: each).
    ``bound`` says what is compared: the point estimate, the interval's worse end, or the whole interval, which
    fails above ``fail_above``, passes at or below ``max``, and else is not yet decided.
    """

    metric: str = Field(min_length=1)
    slice: str = "overall"
    min: float | None = None
    max: float | None = None
    against: Literal["champion"] | None = None
    max_drop: float | None = Field(default=None, description="champion minus candidate at most (higher is better)")
    max_rise: float | None = Field(default=None, description="candidate minus champion at most (lower is better)")
    fail_above: float | None = Field(default=None, description="bound: interval fails above it; default: max")
    min_samples: int = Field(default=1, ge=1)
    bound: Literal["point", "worse", "interval"] = "point"
    severity: Literal["stop", "watch"] = "stop"

    @model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        absolute = self.min is not None or self.max is not None
        relative = self.max_drop is not None or self.max_rise is not None
        if absolute == relative:
            raise ValueError(f"a rule on {self.metric!r} needs either min/max or max_drop/max_rise, not both or none")
        if relative and self.against is None:
            raise ValueError(f"max_drop and max_rise of a rule on {self.metric!r} need against: champion")
        if absolute and self.against is not None:
            raise ValueError(f"against: champion of a rule on {self.metric!r} needs max_drop or max_rise, not min/max")
        if relative and self.bound != "point":
            raise ValueError(f"bound: {self.bound} of a rule on {self.metric!r} needs min or max, not a champion")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min = {self.min:g} of a rule on {self.metric!r}, must be at most max = {self.max:g}")
        if self.bound == "interval" and (self.max is None or self.min is not None):
            raise ValueError(f"bound: interval of a rule on {self.metric!r} needs max alone")
        if self.fail_above is not None and self.bound != "interval":
            raise ValueError(f"fail_above of a rule on {self.metric!r} needs bound: interval")
        return self


class Gate(Value):
    """A gate without rules is an error, so the default set is never empty."""

    rules: tuple[Rule, ...] = Field(
        default=(
            Rule(metric="accuracy", min=0.8, min_samples=100),
            Rule(metric="accuracy", max_drop=0.01, against="champion"),
        ),
        min_length=1,
    )


class Measurement(Value):
    """One number with what supports it. ``low`` and ``high`` are the 95 % interval where one is known.

    What was measured may be no number; the judge then says error.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    metric: str
    value: float
    slice: str = "overall"
    samples: int = Field(ge=0)
    low: float | None = None
    high: float | None = None
    note: str = Field(default="", description="how it was measured, where that matters")


class Evidence(Value):
    """All measurements of one subject, and of the champion on the same rows where there is one."""

    subject: tuple[Measurement, ...]
    champion: tuple[Measurement, ...] | None = None


class Reason(Value):
    """Why a rule said what it said: always with the number found and the limit."""

    rule: Rule
    verdict: Literal["pass", "fail", "error", "inconclusive", "not applicable"]
    text: str


class Verdict(Value):
    verdict: Literal["pass", "fail", "error", "inconclusive"]
    reasons: tuple[Reason, ...]

    @property
    def summary(self) -> str:
        """One line: the first reason that decided."""
        decisive = [reason.text for reason in self.reasons if reason.verdict == self.verdict]
        return "; ".join(decisive[:3]) or self.verdict
