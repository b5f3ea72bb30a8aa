"""Columns of words, and of a tag for each: lists, or texts with white space between, brought to one form.

The form is a text with one space between two words, so that every rule, expectation and profile of texts holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.data.convert import Place

if TYPE_CHECKING:
    import pyarrow as pa


def to_words(array: pa.Array, column: str, place: Place) -> pa.Array:
    """Return string [B], one space between two words; a null stays one.

    Raises:
        BadRequest: neither lists nor texts, or a word that is missing, empty or holds white space.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.binary_join(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(array)), " ").cast(pa.string())
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise place.error(column, 0, str(kind), "must be a list of words, or a text with spaces between them")
    words = pc.list_flatten(array).cast(pa.string())
    odd = pc.fill_null(pc.match_substring_regex(words, r"^$|[\s\p{Z}]"), True)
    if (index := pc.index(odd, True).as_py()) >= 0:
        row = pc.list_parent_indices(array)[index].as_py()
        raise place.error(column, row, words[index].as_py(), "a word must not be missing, empty or hold white space")
    return pc.binary_join(array.cast(pa.list_(pa.string())), " ")


def check_as_many(words: Any, tags: Any, column: str, place: Place) -> None:
    """Hold that each word has a tag; where either is missing, that is for cleaning to say.

    Raises:
        BadRequest: more tags than words, or fewer.
    """
    import pyarrow.compute as pc

    counts = [pc.add(pc.count_substring(side, " "), 1) for side in (words, tags)]
    row = pc.index(pc.fill_null(pc.not_equal(*counts), False), True).as_py()
    if row >= 0:
        found = counts[1][row].as_py()
        raise place.error(column, row, found, f"must be {counts[0][row].as_py()} tags, one for each word")
