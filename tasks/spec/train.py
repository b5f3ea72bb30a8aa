"""The ``train`` section of a workload: which network, on how many ranks, and how it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.spec.value import Value, register_tags


class Optimiser(Value):
    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class Stopping(Value):
    """Early stopping on the validation split's loss."""

    max_epochs: int = Field(default=30, ge=1)
    patience_epochs: int = Field(default=5, ge=1)


class Mlp(Value):
    """A multi-layer perceptron: hidden widths, ReLU, dropout."""

    kind: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (128, 64)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class TextCnn(Value):
    """Embedding, one Conv1D, global max pooling, a dense head (Kim 2014, one width)."""

    kind: Literal["text-cnn"]
    embedding: int = Field(default=64, ge=1)
    channels: int = Field(default=128, ge=1)
    kernel: int = Field(default=5, ge=1)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3


class OwnModel(Value):
    """The workload folder's own ``model.py``: ``build(feature, num_classes, **options) -> torch.nn.Module``."""

    kind: Literal["model.py"]
    options: dict[str, int | float | str | bool] = {}


Recipe = Annotated[Mlp | TextCnn | OwnModel, Field(discriminator="kind")]
register_tags("mlp", "text-cnn", "model.py")


class Resources(Value):
    """What one rank asks of its node."""

    cpus: float = Field(default=1, gt=0)
    memory_bytes: int = Field(default=2 * 2**30, ge=2**26)
    gpus: int = Field(default=0, ge=0)


class Train(Value):
    recipe: Recipe
    nodes: int = Field(default=1, ge=1)
    ranks: int = Field(default=2, ge=1, description="processes on each node")
    batch_size: int = Field(default=64, ge=1, description="global: divided among the ranks")
    optimiser: Optimiser = Optimiser()
    stopping: Stopping = Stopping()
    checkpoint_every_epochs: int = Field(default=1, ge=1)
    hang_seconds: int = Field(
        default=10, ge=1, description="a rank is killed that makes no step for so long, and for ten of its longest"
    )
    seed: int = 0
    resources: Resources = Resources()

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks

    @model_validator(mode="after")
    def _batch_divides(self) -> Train:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size = {self.batch_size}, must be a multiple of nodes x ranks = {self.world_size}"
            )
        return self
