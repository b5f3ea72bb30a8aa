"""Recipes: the networks that Drydock can build, each with its sizes, and the workload's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.spec.value import Value, register_tags

Width = Annotated[int, Field(ge=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class Mlp(Value):
    """A multi-layer perceptron: hidden widths, ReLU, dropout."""

    kind: Literal["mlp"]
    hidden: tuple[Width, ...] = (128, 64)
    dropout: Dropout = 0.2


class Cnn(Value):
    """A small convolutional network for images: two convolutions and a pooling for each of ``channels``."""

    kind: Literal["cnn"]
    channels: tuple[Width, ...] = Field(default=(32, 64), min_length=1)
    hidden: int = Field(default=128, ge=1)
    dropout: Dropout = 0.3


class Resnet18(Value):
    """ResNet-18 for small images (He et al. 2015): a 3 x 3 stem, and group norm, which knows no batch."""

    kind: Literal["resnet18"]
    width: int = Field(default=64, ge=8, multiple_of=8, description="channels of the first stage; doubled thrice")
    dropout: Dropout = 0.0


class TextCnn(Value):
    """Embedding, one Conv1D, global max pooling, a dense head (Kim 2014, one width)."""

    kind: Literal["text-cnn"]
    embedding: int = Field(default=64, ge=1)
    channels: int = Field(default=128, ge=1)
    kernel: int = Field(default=5, ge=1)
    dropout: Dropout = 0.3
    token_dropout: Dropout = Field(
        default=0.0, description="the share of a text's pieces that a step does not see, so that no one decides alone"
    )


class _Layers(Value):
    """The sizes of a network of attention and dense layers."""

    width: int = Field(default=128, ge=1)
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=2, ge=1)
    feedforward: int = Field(default=512, ge=1)
    dropout: Dropout = 0.1

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> _Layers:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}, must divide width = {self.width}")
        return self


class Transformer(_Layers):
    """A transformer encoder (Vaswani et al. 2017) from scratch: of a text the mean over its tokens is answered, of
    tagged words each word's first piece."""

    kind: Literal["transformer"]


class Gpt(_Layers):
    """A causal language model (GPT-2's form, Radford et al. 2019) from scratch: each piece of a text is told from those
    before it, and the end from all of them. Pieces are read and said by one table."""

    kind: Literal["gpt"]


class Pretrained(Value):
    """A BERT encoder from a local folder (Hugging Face's form: config.json, model.safetensors, tokenizer.json),
    fine-tuned as a whole, or by LoRA (Hu et al. 2021); the tokenizer travels in the package."""

    kind: Literal["pretrained"]
    folder: str = Field(min_length=1, description="of the encoder; a relative path is one in the workload's folder")
    dropout: Dropout = 0.1
    lora_rank: int = Field(
        default=0, ge=0, description="above 0: only the head and so thin a change of each query and value are learnt"
    )


class Factors(Value):
    """Matrix factorisation with biases (Koren et al. 2009): the mean, what a user and an item add to it, and the
    product of their factors; an unknown one adds nothing. ``optimiser.weight_decay`` keeps the rarely seen near it."""

    kind: Literal["factors"]
    width: int = Field(default=16, ge=1, le=1024, description="factors of each user and item")


class OwnModel(Value):
    """The workload folder's own ``model.py``: ``build(feature, num_classes, **options) -> torch.nn.Module``, and if
    it wants ``loss(logits, target) -> Tensor``, the mean over the rows. Logits are [B, K]; of tagged words [B, K, T],
    and a piece without a tag has the target -100."""

    kind: Literal["model.py"]
    options: dict[str, int | float | str | bool] = {}


Recipe = Annotated[
    Mlp | Cnn | Resnet18 | TextCnn | Transformer | Gpt | Pretrained | Factors | OwnModel, Field(discriminator="kind")
]
register_tags("mlp", "cnn", "resnet18", "text-cnn", "transformer", "gpt", "pretrained", "factors", "model.py")

# Recipe -> the features that it reads.
READS = {
    "mlp": ("image", "table"),
    "cnn": ("image",),
    "resnet18": ("image",),
    "text-cnn": ("text",),
    "transformer": ("text", "tokens"),
    "gpt": ("text",),
    "pretrained": ("text", "tokens"),
    "factors": ("ids",),
    "model.py": ("image", "table", "text", "tokens"),
}
# Those that can learn a number.
GIVE_NUMBERS = ("mlp", "factors")
