"""Section ``compress``: which candidates are made of one training, and which of those that pass is taken.

A variant is a name (``int8``) or an object with its kind and options (``{kind: pruned, ratio: 0.5, then: int8}``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator

from tasks.spec.train import Recipe
from tasks.spec.value import Value, register_tags

Objective = Literal["quality", "latency", "size", "energy"]
Form = Literal["safetensors", "torch-export"]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")]
# How the graph's numbers are stored. These need no more options, so a variant that trains names one to follow.
Stored = Literal["fp32", "int8", "int8-static", "fp16", "bf16", "int4"]


# One recipe, or several to take one of.
Student = Annotated[
    Annotated[Recipe, Tag("one")] | Annotated[tuple[Recipe, ...], Tag("several"), Field(min_length=2, max_length=8)],
    Discriminator(lambda found: "several" if isinstance(found, list | tuple) else "one"),
]
register_tags("one", "several")


class _Variant(Value):
    kind: str
    name: VariantName | None = Field(default=None, description="of the candidate; default: its kind")

    @property
    def label(self) -> str:
        """The candidate's name."""
        more = [getattr(self, "of", "units"), getattr(self, "then", "fp32")]
        return self.name or "-".join([self.kind, *(what for what in more if what not in ("units", "fp32"))])

    @property
    def stored(self) -> Stored:
        """How its graph's numbers are stored."""
        return getattr(self, "then", self.kind)  # type: ignore[return-value]


class Fp32(_Variant):
    """The trained network as it is."""

    kind: Literal["fp32"]


class DynamicInt8(_Variant):
    """Weights as int8, activations quantised at run time; falls back to fp32 where that is faster."""

    kind: Literal["int8"]


class StaticInt8(_Variant):
    """Weights and activations as int8, with ranges seen on training rows; layers that lose too much, or are slower so,
    stay float."""

    kind: Literal["int8-static"]
    calibration_rows: int = Field(default=256, ge=1)
    max_loss: float = Field(
        default=0.01, ge=0, le=1, description="mean change of the probabilities, on validation rows, at most"
    )


class Fp16(_Variant):
    """Weights as float16: half the size; on a CPU no faster."""

    kind: Literal["fp16"]


class Bf16(_Variant):
    """Weights as bfloat16, which keeps the range of float32: half the size; computed as float32."""

    kind: Literal["bf16"]


class Int4(_Variant):
    """Weights of matrix products as int4 in blocks, activations float (ONNX Runtime's MatMulNBits)."""

    kind: Literal["int4"]
    block_size: Literal[16, 32, 64, 128] = 32


class Pruned(_Variant):
    """Whole hidden units or channels are removed by their L2 norm, or an encoder's heads or layers by what they do,
    and what is left is trained on."""

    kind: Literal["pruned"]
    of: Literal["units", "heads", "layers"] = Field(default="units", description="what goes")
    ratio: float = Field(default=0.5, gt=0, lt=1, description="of each hidden layer's units, its heads, or the layers")
    epochs: int = Field(default=3, ge=1, description="of training on, at most")
    then: Stored = "fp32"


class Sparse(_Variant):
    """Single weights are set to zero: a compressed file is smaller, the network is no faster."""

    kind: Literal["sparse"]
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    ratio: float = Field(default=0.5, gt=0, lt=1, description="of the weights, where unstructured")
    then: Stored = "fp32"


class Distilled(_Variant):
    """A smaller network learns the trained one's answers (Hinton 2015, arXiv:1503.02531). Of several students all are
    trained, and one is taken by the objective, on the validation split: of those whose accuracy is within ``worse`` of
    the best one's."""

    kind: Literal["distilled"]
    student: Student
    worse: float = Field(
        default=0.01, ge=0, le=1, description="by how much the student that is taken may be below the best one"
    )
    weight: float = Field(default=0.7, gt=0, le=1, description="of the teacher's answers against the labels")
    epochs: int | None = Field(default=None, ge=1, description="default: as train.stopping.max_epochs says")
    then: Stored = "fp32"

    @property
    def students(self) -> tuple[Recipe, ...]:
        return self.student if isinstance(self.student, tuple) else (self.student,)


KINDS = (Fp32, DynamicInt8, StaticInt8, Fp16, Bf16, Int4, Pruned, Sparse, Distilled)
NAMES = Literal["fp32", "int8", "int8-static", "fp16", "bf16", "int4", "pruned", "sparse"]


def _kind_of(found: Any) -> str:
    """What the union is told apart by: a name alone, or the object's kind."""
    if isinstance(found, dict):
        return str(found.get("kind"))
    return getattr(found, "kind", "a name")


def _named(found: Any) -> Any:
    """A name is short for a variant of that kind with the usual options."""
    if not isinstance(found, str):
        return found
    return next(kind for kind in KINDS if found in get_args(kind.model_fields["kind"].annotation))(kind=found)


Variant = Annotated[
    Annotated[NAMES, Tag("a name")]
    | Annotated[Fp32, Tag("fp32")]
    | Annotated[DynamicInt8, Tag("int8")]
    | Annotated[StaticInt8, Tag("int8-static")]
    | Annotated[Fp16, Tag("fp16")]
    | Annotated[Bf16, Tag("bf16")]
    | Annotated[Int4, Tag("int4")]
    | Annotated[Pruned, Tag("pruned")]
    | Annotated[Sparse, Tag("sparse")]
    | Annotated[Distilled, Tag("distilled")],
    Discriminator(_kind_of),
    AfterValidator(_named),
]
register_tags("a name", "fp32", "int8", "int8-static", "fp16", "bf16", "int4", "pruned", "sparse", "distilled")


class Compress(Value):
    variants: tuple[Variant, ...] = Field(
        default=(Fp32(kind="fp32"), DynamicInt8(kind="int8")), max_length=16
    )
    objective: Objective = Field(default="size", description="which passing candidate is taken")
    also: tuple[Form, ...] = Field(
        default=(), description="forms of the taken network, before it is quantised, that MLflow keeps with the run"
    )

    @field_validator("variants")
    @classmethod
    def _distinct(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if not variants:
            raise ValueError("[], must hold one variant or more")
        names = [variant.label for variant in variants]
        if len(set(names)) != len(names):
            raise ValueError(f"{names}, must be distinct; give one a name of its own")
        return variants

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(variant.label for variant in self.variants)
