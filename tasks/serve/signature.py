"""What a package's graph reads and answers, and its golden sample: ``signature.json`` and ``golden.json``.

K classes
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tasks.spec.feature import VOCABULARIES, Feature
from tasks.spec.label import NumberLabel, Target
from tasks.spec.value import Value

# What answers are counted by, where they are numbers: so many equal parts of the range.
NUM_PARTS = 10


class Tensor(Value):
    """One input or output of the graph; -1 stands for the batch."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...] = Field(min_length=2, max_length=3)

    @field_validator("shape")
    @classmethod
    def _is_a_batch(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] != -1 or min(shape[1:]) < 1:
            raise ValueError(f"{list(shape)}, must be [-1, a width of 1 or more]")
        return shape


# What a graph that tells the next piece of texts answers beside its number: the likeliest, 0 where it is the end.
NEXT_PIECE = Tensor(name="next_piece", dtype="int64", shape=(-1, 1))


class Signature(Value):
    """What a package's graph reads and answers: ``classes`` are names, in the order of the outputs; or ``number`` says
    which, and its range."""

    format: Literal[1] = 1
    workload: str = Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")
    variant: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")
    feature: Feature
    classes: tuple[str, ...] = ()
    number: NumberLabel | None = None
    graph_input: Tensor
    graph_output: Tensor

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Signature:
        if len(self.classes) < 2 if self.number is None else self.classes:
            raise ValueError(f"classes = {list(self.classes)}, must be 2 or more, or none where number is given")
        asked, answered = sides_of(self.feature, len(self.classes))
        if self.graph_input != asked:
            raise ValueError(f"graph_input = {line(self.graph_input)}, must be {line(asked)}")
        if self.graph_output != answered:
            raise ValueError(f"graph_output = {line(self.graph_output)}, must be {line(answered)}")
        return self

    def is_for(self, label: Target) -> bool:
        """Whether it answers what a workload asks for: the same classes in any order, or the same number."""
        return (label.number == self.number) if label.number else set(self.classes) == set(label.names)

    @property
    def tells_next(self) -> bool:
        """Whether the next piece of texts is what was learnt."""
        return self.feature.kind == "text" and self.number is not None

    @property
    def counted(self) -> tuple[str, ...]:
        """What answers are counted by: classes, or parts of a number's range."""
        if self.number is None:
            return self.classes
        ends = [self.number.min + self.number.span * part / NUM_PARTS for part in range(NUM_PARTS + 1)]
        return tuple(f"{low:.6g} to {high:.6g}" for low, high in itertools.pairwise(ends))


def sides_of(feature: Feature, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return what a graph for a feature reads and answers; without classes it is a number."""
    dtype = "int64" if feature.holds in VOCABULARIES else "float32"
    if not num_classes:
        answer = Tensor(name="number", dtype="float32", shape=(-1, 1))
        return Tensor(name="input", dtype=dtype, shape=(-1, *feature.shape)), answer
    places = feature.shape if feature.kind == "tokens" else ()
    return (
        Tensor(name="input", dtype=dtype, shape=(-1, *feature.shape)),
        Tensor(name="probabilities", dtype="float32", shape=(-1, num_classes, *places)),
    )


class Golden(Value):
    """Rows in client form with the package's own answer, which may be a number each; null is a missing number of a
    table."""

    rows: tuple[str, ...] | tuple[tuple[float | None, ...], ...] | tuple[tuple[str, str], ...] = Field(min_length=1)
    probabilities: tuple[tuple[float, ...], ...] = Field(min_length=1)
    tolerance: float = Field(default=1e-3, ge=0)

    @field_validator("rows", mode="before")
    @classmethod
    def _missing_is_null(cls, rows: Any) -> Any:
        if not isinstance(rows, list | tuple):
            return rows
        # NaN, which JSON can't say, is the one value that differs from itself.
        return tuple(
            tuple(None if value != value else value for value in row) if isinstance(row, list | tuple) else row
            for row in rows
        )


def line(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"
