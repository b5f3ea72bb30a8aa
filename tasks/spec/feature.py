"""What a model reads, and how stored columns become its input array.

``encode`` is the one place where a column becomes an array: training, evaluation and serving call it, so
a model is asked at serving exactly what it was asked in training.

    B rows   H height   W width   C table columns   T tokens (pieces of words)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tasks.spec.errors import BadRequest
from tasks.spec.ids import ids_of
from tasks.spec.tokens import pieces, words_of
from tasks.spec.value import Value, register_tags

if TYPE_CHECKING:
    import numpy as np


# What the stored columns hold, which is what the data steps ask.
Holds = Literal["images", "texts", "numbers", "ids"]


class ImageFeature(Value):
    """Grey images of one size, stored as H*W bytes a row (row-major), 0 to ``max_value``."""

    kind: Literal["image"]
    holds: ClassVar[Holds] = "images"
    column: str = "pixels"
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    max_value: int = Field(default=255, ge=1, le=255)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height * self.width,)


class Texts(Value):
    """What texts have in common: one column, read as at most ``max_tokens`` pieces of a byte-pair tokenizer."""

    holds: ClassVar[Holds] = "texts"
    column: str
    max_tokens: int = Field(ge=4, le=4096)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.max_tokens,)


class TextFeature(Texts):
    """Short texts; a byte-pair tokenizer is fitted on the training split and travels in the package."""

    kind: Literal["text"]
    column: str = "text"
    max_tokens: int = Field(default=64, ge=4, le=4096)
    vocabulary: int = Field(default=4000, ge=257, le=200_000)
    max_chars: int = Field(default=10_000, ge=1, description="longer texts are a bad request")


class TokensFeature(Texts):
    """Words, each with a tag of its own (named entities): a row's label is as many tags, of ``label.classes`` each.

    Both are stored as one text with a space between two words, or two tags. A byte-pair tokenizer takes words apart;
    a word's tag is asked at its first piece (``tasks.spec.tokens``).
    """

    kind: Literal["tokens"]
    column: str = "tokens"
    max_tokens: int = Field(default=128, ge=4, le=4096, description="pieces of words; what is beyond is cut")
    vocabulary: int = Field(default=8000, ge=257, le=200_000)
    max_chars: int = Field(default=10_000, ge=1, description="of all words of a row; more is a bad request")


class TableFeature(Value):
    """Numeric columns; the model's graph standardises them and fills missing values with the training mean."""

    kind: Literal["table"]
    holds: ClassVar[Holds] = "numbers"
    columns: tuple[str, ...] = Field(min_length=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.columns),)

    @model_validator(mode="after")
    def _distinct(self) -> TableFeature:
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"columns = {list(self.columns)}, must be distinct")
        return self


class IdsFeature(Value):
    """Who and what, by id: two columns of texts or whole numbers. The ids of the training split travel in the package;
    any other is unknown, and the model says what it would of anybody, or of anything."""

    kind: Literal["ids"]
    holds: ClassVar[Holds] = "ids"
    user: str = Field(default="user", min_length=1)
    item: str = Field(default="item", min_length=1)

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.user, self.item)

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    @model_validator(mode="after")
    def _distinct(self) -> IdsFeature:
        if self.user == self.item:
            raise ValueError(f"user and item = {self.user!r}, must be two columns")
        return self


Feature = Annotated[
    ImageFeature | TextFeature | TokensFeature | TableFeature | IdsFeature, Field(discriminator="kind")
]
register_tags("image", "text", "tokens", "table", "ids")

# Of features whose encoding is learnt: the file that tells it, in a training's room and in the package.
VOCABULARIES = {"texts": "tokenizer.json", "ids": "ids.json"}


def encode(feature: Feature, rows: Any, tokenizer: Any = None, pad_to_longest: bool = False) -> np.ndarray:
    """Turn rows as a client or a table holds them into the graph's input array.

    image: rows [B, H*W] or [B, H, W] numbers -> float32 [B, H*W] (scaled inside the graph);
    table: rows [B, C] numbers -> float32 [B, C] (NaN is missing); text: B strings -> int64 [B, T],
    with ``pad_to_longest`` T is no more than the longest of these texts needs; tokens: B lists of words, or texts
    with white space between words -> as text; ids: B pairs -> int64 [B, 2], by ``tokenizer``, the known ones.

    Raises:
        BadRequest: wrong width, a value that is no number, or a text longer than ``max_chars``.
    """
    import numpy as np

    if feature.kind == "ids":
        return tokenizer.codes(ids_of(rows))
    if feature.kind == "tokens":
        return padded(feature, pieces(words_of(feature, rows), tokenizer), pad_to_longest)
    if feature.kind == "text":
        return padded(feature, tokenizer.encode_batch(check_texts(feature, rows)), pad_to_longest)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite, and is refused
            array = np.asarray(rows, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"{feature.kind} input: found values that are no numbers") from None
    if not array.ndim or not len(array):
        raise BadRequest(f"{feature.kind} input: found no rows, must be 1 or more")
    array = array.reshape(len(array), -1)
    if array.shape[1] != feature.shape[0]:
        raise BadRequest(f"{feature.kind} input: found rows of {array.shape[1]} values, must be {feature.shape[0]}")
    if feature.kind == "image":
        # Written so that NaN fails it.
        if not (np.minimum.reduce(array, axis=None) >= 0 and np.maximum.reduce(array, axis=None) <= feature.max_value):
            raise BadRequest(f"image input: found values outside 0 to {feature.max_value}")
    elif np.isinf(array).any():
        raise BadRequest(f"{feature.kind} input: found values beyond the range of float32")
    return array


def check_texts(feature: TextFeature, texts: Any) -> list[str]:
    """Return the texts as they may be encoded.

    Raises:
        BadRequest: one is longer than ``max_chars``.
    """
    texts = [str(text) for text in texts]
    longest = max((len(text) for text in texts), default=0)
    if longest > feature.max_chars:
        raise BadRequest(f"text input: found {longest} characters, must be {feature.max_chars} or fewer")
    return texts


def columns_to_rows(table: Any, feature: Feature) -> Any:
    """Return a table's feature columns as rows: a list of texts, of lists of words, of pairs of ids; float32 [B, N]."""
    import numpy as np

    if feature.kind == "ids":
        return [list(row) for row in zip(*(table.column(name).to_pylist() for name in feature.columns), strict=True)]

    if feature.kind == "tokens":
        return [text.split(" ") for text in table.column(feature.column).to_pylist()]
    if feature.kind == "text":
        return table.column(feature.column).to_pylist()
    if feature.kind == "image":
        flat = table.column(feature.column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(table.num_rows, feature.shape[0]).astype(np.float32)
    return np.column_stack([table.column(name).to_numpy() for name in feature.columns]).astype(np.float32)


def padded(feature: TextFeature | TokensFeature, encodings: list[Any], pad_to_longest: bool) -> np.ndarray:
    """B encodings -> int64 [B, T]: cut at T, padded with 0."""
    import numpy as np

    rows = [encoding.ids[: feature.max_tokens] for encoding in encodings]
    # A graph can't be asked for a width of 0, which an empty text would have.
    width = max([1, *map(len, rows)]) if pad_to_longest else feature.max_tokens
    out = np.zeros((len(rows), width), dtype=np.int64)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = ids
    return out
