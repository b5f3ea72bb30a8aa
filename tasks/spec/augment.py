"""Augmentation: how copies of training rows are changed, so that a model learns what does not matter.

    images   shift, rotate, noise
    texts    drop_words, swap_words
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tasks.spec.value import Value, register_tags


class Shift(Value):
    """Move an image by up to so many pixels each way; what comes in is 0."""

    kind: Literal["shift"]
    pixels: int = Field(ge=1, le=1024)


class Rotate(Value):
    """Turn an image by up to so many degrees either way, about its middle."""

    kind: Literal["rotate"]
    degrees: float = Field(gt=0, le=180)


class Noise(Value):
    """Add normal noise to each pixel; its deviation is a share of the feature's ``max_value``."""

    kind: Literal["noise"]
    deviation: float = Field(gt=0, le=1)


class DropWords(Value):
    """Leave out each word of a text with this probability; one word stays."""

    kind: Literal["drop_words"]
    ratio: float = Field(default=0.1, gt=0, lt=1)


class SwapWords(Value):
    """Change so many words of a text with their neighbours."""

    kind: Literal["swap_words"]
    times: int = Field(default=1, ge=1, le=100)


Change = Annotated[Shift | Rotate | Noise | DropWords | SwapWords, Field(discriminator="kind")]
register_tags("shift", "rotate", "noise", "drop_words", "swap_words")
OF_TEXTS = (DropWords, SwapWords)


class Augment(Value):
    """Copies of the rows of the training split, and of no other; a copy goes through all changes, in their order."""

    changes: tuple[Change, ...] = Field(min_length=1)
    copies: int = Field(default=1, ge=1, le=20)
    seed: int = 0
