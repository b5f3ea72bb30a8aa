"""What a model is to say of a row: one of some classes (of words: one for each), a number, or how likely a text is."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from tasks.spec.value import Value, register_tags


class Annotators(Value):
    """Several people's labels of each row, a column for each of them; the label column is then made of these.

    ``dawid-skene`` weighs each annotator by a confusion matrix found with the truth (1979), ``majority`` counts votes.
    """

    columns: tuple[str, ...] = Field(min_length=2)
    truth: Literal["dawid-skene", "majority"] = "dawid-skene"
    min_certainty: float = Field(default=0.9, ge=0, le=1, description="a less certain row is queued for relabelling")

    @model_validator(mode="after")
    def _distinct(self) -> Annotators:
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"columns = {list(self.columns)}, must be distinct")
        return self


class Label(Value):
    """The label column and its allowed classes, in the order of the model's outputs."""

    kind: Literal["class"] = "class"
    column: str = "label"
    annotators: Annotators | None = None
    classes: tuple[str | int, ...] = Field(min_length=2)
    number: ClassVar[None] = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(item) for item in self.classes)

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    @model_validator(mode="after")
    def _distinct(self) -> Label:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"classes = {list(self.classes)}, must be distinct")
        return self


class NumberLabel(Value):
    """A column of numbers from ``min`` to ``max``; an answer is never outside of them, and is given by the column's
    name."""

    kind: Literal["number"]
    column: str = Field(min_length=1)
    min: float
    max: float
    annotators: ClassVar[None] = None
    names: ClassVar[tuple[str, ...]] = ()
    num_outputs: ClassVar[int] = 1

    @property
    def span(self) -> float:
        return self.max - self.min

    @property
    def number(self) -> NumberLabel:
        """The number that is answered."""
        return self

    @model_validator(mode="after")
    def _can_be(self) -> NumberLabel:
        if not self.min < self.max:
            raise ValueError(f"min = {self.min:g}, must be below max = {self.max:g}")
        if self.column in ("label", "probabilities"):
            raise ValueError(f"column = {self.column!r}, must be another name: a number is answered by it")
        return self


class NextLabel(Value):
    """The next piece of a text, at each of its places: no column has it, for the text is its own label. Answered is
    the mean log-probability of a text's pieces, a number. In the data set ``label`` is how many characters it has."""

    kind: Literal["next"]
    column: ClassVar[str] = "characters"
    annotators: ClassVar[None] = None
    names: ClassVar[tuple[str, ...]] = ()
    num_outputs: ClassVar[int] = 1
    # Nats for each piece. Whoever takes all of 200 000 pieces for equally likely says -12.2.
    number: ClassVar[NumberLabel] = NumberLabel(kind="number", column="log_probability", min=-20, max=0)


def _kind_of(found: Any) -> str:
    return (found.get("kind", "class") if isinstance(found, dict) else getattr(found, "kind", "class")) or "class"


Target = Annotated[
    Annotated[Label, Tag("class")] | Annotated[NumberLabel, Tag("number")] | Annotated[NextLabel, Tag("next")],
    Discriminator(_kind_of, custom_error_type="kind", custom_error_message="kind must be class, number or next"),
]
register_tags("class", "number", "next")
