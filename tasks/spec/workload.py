"""A workload: what ``workloads/NAME/workload.yaml`` may say. Every section has defaults that suit a small model.

Contradictions are refused here, beside the fields they concern, and name the field that fixes them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from tasks.spec.compress import Compress, Distilled, Pruned, Sparse, StaticInt8
from tasks.spec.cron import PRESETS as CRON_PRESETS
from tasks.spec.cron import is_cron
from tasks.spec.data import Data
from tasks.spec.errors import BadRequest
from tasks.spec.evaluate import Evaluate
from tasks.spec.metrics import perturbations, wrong_with
from tasks.spec.parallel import DIVIDING, check_divides
from tasks.spec.recipe import GIVE_NUMBERS, READS
from tasks.spec.review import Review
from tasks.spec.rules import Gate
from tasks.spec.search import Search, tried
from tasks.spec.train import Train
from tasks.spec.value import Value

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]


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


def _is_address(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.!#$%&'*+/=?^_{}~-]{1,64}@[A-Za-z0-9.-]{1,255}", text):
        raise ValueError(f"{text!r}, must be an e-mail address")
    return text


Address = Annotated[str, AfterValidator(_is_address)]


class WebhookNotifier(Value):
    """Takes the whole event as JSON."""

    kind: Literal["webhook"]
    url: str = Field(min_length=1, description="may be or hold a ${secret:NAME}")


class SlackNotifier(Value):
    """A line in the channel of an incoming webhook, as Slack, Mattermost and Rocket.Chat give them out."""

    kind: Literal["slack"]
    url: str = Field(min_length=1, description="may be or hold a ${secret:NAME}")


class EmailNotifier(Value):
    kind: Literal["email"]
    url: str = Field(
        min_length=1,
        description="smtp(s)://[user:password@]host[:port]; may be or hold a ${secret:NAME}, unescaped",
    )
    sender: Address
    to: tuple[Address, ...] = Field(min_length=1, max_length=50)


Notifier = Annotated[WebhookNotifier | SlackNotifier | EmailNotifier, Field(discriminator="kind")]


class Workload(Value):
    """One model that Drydock builds, releases and watches."""

    name: Name
    description: str = ""
    priority: int = Field(default=1, ge=1, le=1000)
    schedule: str | None = Field(default=None, description="a cron line, in UTC; none: by hand and by assets")
    data: Data
    train: Train
    search: Search | None = Field(default=None, description="trials of other values of train; none: train as it is")
    compress: Compress = Compress()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    review: Review = Review()
    serve: Serve = Serve()
    rollout: Rollout = Rollout()
    notify: tuple[Notifier, ...] = ()

    @model_validator(mode="after")
    def _search_tries_what_train_has(self) -> Workload:
        if self.search is None:
            return self
        try:
            tried(self.train, {name: what.first for name, what in self.search.space.items()})
        except BadRequest as error:
            raise ValueError(str(error)) from None
        scales = sorted({"label_smoothing", "class_weights"} & set(self.search.space))
        if scales and self.train.stopping.metric == "loss":
            wrong = f"search.space.{scales[0]}: losses under other values can't be compared"
            raise ValueError(f"{wrong}; train.stopping.metric must be accuracy or entity_f1")
        return self

    @model_validator(mode="after")
    def _recipe_fits_feature(self) -> Workload:
        recipe, feature = self.train.recipe.kind, self.data.feature.kind
        if feature not in READS[recipe]:
            fitting = ", ".join(name for name, reads in READS.items() if feature in reads)
            raise ValueError(
                f"train.recipe.kind = {recipe!r}, must be one that reads data.feature.kind = {feature!r}: "
                f"{fitting or 'none does yet'}"
            )
        return self

    @model_validator(mode="after")
    def _numbers_have_what_fits(self) -> Workload:
        label, train = self.data.label, self.train
        if label.kind != "number":
            if self.evaluate.relevant is not None:
                raise ValueError("evaluate.relevant: must be left out where data.label is no number")
            return self
        if train.recipe.kind not in GIVE_NUMBERS:
            found = f"train.recipe.kind = {train.recipe.kind!r}, must be one that gives a number"
            raise ValueError(f"{found}: {', '.join(GIVE_NUMBERS)}")
        if train.stopping.metric != "loss":
            raise ValueError(f"train.stopping.metric = {train.stopping.metric!r}, must be loss: a number is learnt")
        if train.class_weights != "none" or train.label_smoothing:
            raise ValueError("train.class_weights and train.label_smoothing: are for classes; must be left out")
        relevant = self.evaluate.relevant
        if relevant is not None and not label.min <= relevant <= label.max:
            raise ValueError(f"evaluate.relevant = {relevant:g}, must be from {label.min:g} to {label.max:g}")
        for variant in self.compress.variants:
            if isinstance(variant, Distilled | Pruned | Sparse):
                raise ValueError(f"compress.variants: {variant.kind!r} is for classes; use int8 or fp16")
        return self

    @model_validator(mode="after")
    def _next_pieces_have_what_fits(self) -> Workload:
        train, is_next = self.train, self.data.label.kind == "next"
        if is_next != (train.recipe.kind == "gpt"):
            found = f"train.recipe.kind = {train.recipe.kind!r} with data.label.kind = {self.data.label.kind!r}"
            raise ValueError(f"{found}: gpt needs the label next, and next needs the recipe gpt")
        if not is_next:
            return self
        if train.stopping.metric != "loss":
            found = f"train.stopping.metric = {train.stopping.metric!r}"
            raise ValueError(f"{found}, must be loss: where it is least, so is perplexity")
        if train.class_weights != "none":
            raise ValueError(f"train.class_weights = {train.class_weights!r}: is for classes; must be left out")
        for variant in self.compress.variants:
            if isinstance(variant, Distilled | Pruned | Sparse | StaticInt8):
                known = "int4, int8, fp16 or bf16"
                raise ValueError(f"compress.variants: {variant.kind!r} can't be of a language model; use {known}")
        return self

    @model_validator(mode="after")
    def _tagged_words_have_what_fits(self) -> Workload:
        if self.data.feature.kind != "tokens":
            if self.train.stopping.metric == "entity_f1":
                raise ValueError("train.stopping.metric = 'entity_f1', must be loss or accuracy: no words are tagged")
            return self
        if self.train.class_weights == "adjusted" and self.train.label_smoothing:
            raise ValueError("train.label_smoothing: must be 0 with class_weights 'adjusted' where words are tagged")
        if odd := [name for name in self.data.label.names if name.split() != [name]]:
            raise ValueError(f"data.label.classes: {odd[0]!r}, a tag must not be empty or hold white space")
        if any(isinstance(variant, Distilled) for variant in self.compress.variants):
            raise ValueError("compress.variants: 'distilled' can't be of a network that tags words; use pruned or int8")
        return self

    @model_validator(mode="after")
    def _what_is_pruned_is_there(self) -> Workload:
        recipe = self.train.recipe.kind
        for place, variant in enumerate(self.compress.variants):
            if isinstance(variant, Pruned) and variant.of != "units" and recipe not in ("transformer", "pretrained"):
                raise ValueError(
                    f"compress.variants.{place}.of = {variant.of!r}, must be units: train.recipe.kind = {recipe!r} "
                    f"has no {variant.of}"
                )
        return self

    @model_validator(mode="after")
    def _students_are_divided_as_their_teacher(self) -> Workload:
        for place, variant in enumerate(self.compress.variants):
            if isinstance(variant, Distilled) and self.train.parallel in DIVIDING:
                try:
                    for student in variant.students:
                        check_divides(self.train.parallel, student, self.train.divided_among)
                except ValueError as error:
                    raise ValueError(f"compress.variants.{place}.student, trained as train says: {error}") from None
        return self

    @model_validator(mode="after")
    def _groups_are_columns(self) -> Workload:
        for name in self.evaluate.groups:
            if name not in (known := (*self.data.feature.columns, *self.data.keep)):
                raise ValueError(f"evaluate.groups = {name!r}, must be a feature's or kept column: {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _perturbations_fit(self) -> Workload:
        perturbations(self.data.feature, self.data.label, self.evaluate)
        return self

    @model_validator(mode="after")
    def _rules_have_their_measurements(self) -> Workload:
        for place, rule in enumerate(self.gate.rules):
            if wrong := wrong_with(rule, self.data.feature, self.data.label, self.evaluate):
                raise ValueError(f"gate.rules.{place}.{wrong}")
            if rule.metric == "agreement" and all(variant.kind != "fp32" for variant in self.compress.variants):
                raise ValueError(f"gate.rules.{place}.metric = 'agreement', needs fp32 in compress.variants")
        return self

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, schedule: str | None) -> str | None:
        if schedule is not None and not is_cron(schedule):
            raise ValueError(f"{schedule!r}, must be a cron line of five fields, or one of {', '.join(CRON_PRESETS)}")
        return schedule
