"""The ``train`` section of a workload: which network, on how many ranks, and how it learns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tasks.spec.parallel import DIVIDING, check_divides
from tasks.spec.recipe import Recipe
from tasks.spec.value import Value

Parallel = Literal["ddp", "fsdp", "tensor", "pipeline", "parameter-server", "auto"]
Gradients = Literal["fp32", "fp16", "bf16", "powersgd", "auto"]


class Schedule(Value):
    """How the learning rate moves: up from 0 over the warm-up, then as ``kind`` says down to ``final_ratio`` of it."""

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1, description="of all steps that max_epochs allows")
    final_ratio: float = Field(default=0.0, ge=0, le=1, description="what is left at the end; constant: unused")


class Optimiser(Value):
    name: Literal["adam", "adamw", "sgd", "adagrad"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd alone")
    schedule: Schedule = Schedule()
    clip_norm: float | None = Field(default=None, gt=0, description="gradients of a larger norm are scaled down to it")

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> Optimiser:
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum = {self.momentum}, must be 0 where name is {self.name!r}; or name: sgd")
        return self


class Stopping(Value):
    """Early stopping on the validation split; the weights of the best epoch are kept."""

    metric: Literal["loss", "accuracy", "entity_f1"] = Field(
        default="loss", description="what makes an epoch the best: the least loss, or the highest score"
    )
    max_epochs: int = Field(default=30, ge=1)
    patience_epochs: int = Field(default=5, ge=1)


class Checkpoints(Value):
    """When training is saved, so that it can go on; an end of an epoch counts as a step does."""

    every_epochs: int = Field(default=1, ge=1)
    every_steps: int | None = Field(default=None, ge=1, description="within an epoch too; none: at its end only")
    keep: int = Field(default=2, ge=1, le=100, description="the newest so many")


class Pipeline(Value):
    """How a batch passes through stages that lie on different ranks."""

    schedule: Literal["1f1b", "gpipe"] = Field(
        default="1f1b",
        description="gpipe: all of a batch's parts forwards, then all backwards; 1f1b: in turns, which holds fewer",
    )
    micro_batches: int = Field(default=4, ge=1, description="into how many parts a batch is divided")


class Server(Value):
    """How far ranks that train against a parameter server may drift apart."""

    staleness: int = Field(
        default=4, ge=0, description="how many updates a rank may be ahead of the slowest before it waits"
    )


class Resources(Value):
    """What one rank asks of its node."""

    cpus: float = Field(default=1, gt=0)
    memory_bytes: int = Field(default=2 * 2**30, ge=2**26)
    gpus: int = Field(default=0, ge=0)


class Train(Value):
    recipe: Recipe
    parallel: Parallel = Field(
        default="ddp",
        description="ddp: a whole network a rank; fsdp: each holds a part; tensor: each computes a part of a layer; "
        "pipeline: each has some of the layers; parameter-server: rank 0 holds the weights and takes updates as they "
        "come; auto: what is measured to be the fastest of one rank, ddp and fsdp",
    )
    gradients: Gradients = Field(
        default="fp32",
        description="how ddp's ranks send them: fp16 and bf16 halve the bytes, powersgd sends a hundredth; auto: what "
        "is measured to be the fastest",
    )
    copies: int = Field(
        default=1,
        ge=1,
        description="of a network that tensor or pipeline divide: each among as many ranks, with rows of its own",
    )
    pipeline: Pipeline = Pipeline()
    parameter_server: Server = Server()
    nodes: int = Field(default=1, ge=1)
    ranks: int = Field(default=2, ge=1, description="processes on each node")
    batch_size: int = Field(default=64, ge=1, description="global: divided among ranks that have rows of their own")
    accumulate: int = Field(default=1, ge=1, description="into how many parts each rank divides its share of a batch")
    optimiser: Optimiser = Optimiser()
    class_weights: Literal["none", "balanced", "adjusted"] = Field(
        default="none",
        description="balanced: a row counts the more the rarer its class is; adjusted: what is rare is learnt with the "
        "more margin, which holds where a network knows its training rows by heart",
    )
    similar_lengths: bool = Field(
        default=False, description="a batch's texts are of similar length, so less is padding; its rows less random"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = Field(default=False, description="by torch.compile, which needs a C++ compiler on the CPU")
    deterministic: bool = Field(
        default=True,
        description="the same weights bit for bit, but not by a parameter server; false may be faster on a GPU",
    )
    stopping: Stopping = Stopping()
    checkpoints: Checkpoints = Checkpoints()
    hang_seconds: int = Field(
        default=10, ge=1, description="a rank is killed that makes no step for so long, and for ten of its longest"
    )
    seed: int = 0
    resources: Resources = Resources()

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    @property
    def divided_among(self) -> int:
        """How many ranks share a copy of the network, where it is divided."""
        return self.world_size // self.copies

    @property
    def readers(self) -> int:
        """How many ranks, or groups of them, read rows of their own."""
        return self.copies if self.parallel in DIVIDING else self.world_size

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        parts = self.readers * self.accumulate
        words = f"{'copies' if self.parallel in DIVIDING else 'nodes x ranks'} x accumulate"
        if self.parallel == "pipeline":
            parts, words = parts * self.pipeline.micro_batches, f"{words} x pipeline.micro_batches"
        if self.batch_size % parts:
            raise ValueError(f"batch_size = {self.batch_size}, must be a multiple of {words} = {parts}")
        return self

    @model_validator(mode="after")
    def _is_divided_as_it_can_be(self) -> Train:
        if self.copies > 1 and self.parallel not in DIVIDING:
            raise ValueError(f"copies = {self.copies}, must be 1 where parallel is {self.parallel!r}")
        if self.parallel in DIVIDING:
            if self.copies > 1 and (self.divided_among < 2 or self.world_size % self.copies):
                raise ValueError(
                    f"copies = {self.copies}, must divide nodes x ranks = {self.world_size} into groups of 2 or more"
                )
            check_divides(self.parallel, self.recipe, self.divided_among)
            if self.compile:
                raise ValueError(f"compile = true, must be false where parallel is {self.parallel!r}")
        return self

    @model_validator(mode="after")
    def _pipeline_is_of_pipeline(self) -> Train:
        found, least = self.pipeline, self.divided_among
        if found != Pipeline() and self.parallel != "pipeline":
            raise ValueError(f"pipeline is given, must be left out where parallel is {self.parallel!r}")
        if self.parameter_server != Server() and self.parallel != "parameter-server":
            raise ValueError(f"parameter_server is given, must be left out where parallel is {self.parallel!r}")
        if self.parallel == "pipeline" and found.schedule == "1f1b" and found.micro_batches < least:
            raise ValueError(
                f"pipeline.micro_batches = {found.micro_batches}, must be at least nodes x ranks / copies = {least} "
                "where pipeline.schedule is '1f1b'; or schedule: gpipe"
            )
        return self

    @model_validator(mode="after")
    def _gradients_are_of_ddp(self) -> Train:
        if self.gradients != "fp32" and self.parallel not in ("ddp", "auto"):
            raise ValueError(
                f"gradients = {self.gradients!r}, must be fp32 where parallel is {self.parallel!r}; or parallel: ddp"
            )
        return self

    @model_validator(mode="after")
    def _compiles_what_it_can(self) -> Train:
        if self.compile and "auto" in (self.parallel, self.gradients):
            raise ValueError("compile = true, must be false where something is auto: each candidate would be compiled")
        return self
