"""Words with a tag each: taken apart into pieces for a graph, and what it says put together by word again.

    B rows   W words of all rows   T pieces   K tags
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.spec.errors import BadRequest

if TYPE_CHECKING:
    import numpy as np

    from tasks.spec.feature import TokensFeature

# The target of a piece that has no tag of its own, as torch's losses leave it out.
NO_TAG = -100
# Read in place of a word of which a tokenizer leaves nothing (a lone accent, a control character).
STAND_IN = "."


def words_of(feature: TokensFeature, rows: Any) -> list[list[str]]:
    """Return the words of rows, each a list of words, or a text with white space between them.

    Raises:
        BadRequest: a row without words, a word that is empty or holds white space, or too many characters.
    """
    found = [row.split() if isinstance(row, str) else row for row in rows]
    for row, words in zip(rows, found, strict=True):
        if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
            raise BadRequest(f"tokens input: found {str(row)[:40]!r}, must be one word or more")
        if odd := [word for word in words if not word or word != "".join(word.split())]:
            raise BadRequest(f"tokens input: found the word {odd[0][:40]!r}, must not be empty or hold white space")
        if (length := sum(map(len, words))) > feature.max_chars:
            raise BadRequest(f"tokens input: found {length} characters, must be {feature.max_chars} or fewer")
    return [list(words) for words in found]


def pieces(rows: list[list[str]], tokenizer: Any) -> list[Any]:
    """Return the tokenizer's encodings of B lists of words; each word has a piece in them.

    Raises:
        BadRequest: the tokenizer makes nothing of a word.
    """
    found = tokenizer.encode_batch(rows, is_pretokenized=True)
    for number, (words, encoding) in enumerate(zip(rows, found, strict=True)):
        if lost := set(range(len(words))) - set(encoding.word_ids):
            read = [STAND_IN if place in lost else word for place, word in enumerate(words)]
            found[number] = tokenizer.encode(read, is_pretokenized=True)
            if set(range(len(words))) - set(found[number].word_ids):
                raise BadRequest(f"tokens input: the tokenizer makes nothing of the word {words[min(lost)][:40]!r}")
    return found


def first_pieces(feature: TokensFeature, encoding: Any) -> dict[int, int]:
    """Return the place of each word's first piece, by the word's index; a word that was cut off has none."""
    places: dict[int, int] = {}
    for place, word in enumerate(encoding.word_ids[: feature.max_tokens]):
        if word is not None:
            places.setdefault(word, place)
    return places


def encode_tags(feature: TokensFeature, rows: list[list[str]], tags: Sequence[Any], tokenizer: Any) -> np.ndarray:
    """Return the tags' codes where ``encode`` has their words' first pieces, int64 [B, T]; NO_TAG elsewhere."""
    import numpy as np

    found = pieces(words_of(feature, rows), tokenizer)
    out = np.full((len(found), feature.max_tokens), NO_TAG, dtype=np.int64)
    for row, (encoding, codes) in enumerate(zip(found, tags, strict=True)):
        for word, place in first_pieces(feature, encoding).items():
            out[row, place] = codes[word]
    return out


def ask_words(
    feature: TokensFeature,
    rows: list[list[str]],
    tokenizer: Any,
    run: Callable[[Any], Any],
    pad_to_longest: bool = False,
) -> np.ndarray:
    """Return what a graph says of each word, float32 [W, K], row by row. ``run``: pieces int64 [B, T] -> [B, K, T].

    A row of more pieces than the graph reads is asked in parts, so that every word has an answer.
    """
    import numpy as np

    from tasks.spec.feature import padded

    said: dict[tuple[int, int], Any] = {}
    waiting = [(row, 0) for row in range(len(rows))]
    while waiting:
        found = pieces([rows[row][start:] for row, start in waiting], tokenizer)
        answers, rest = run(padded(feature, found, pad_to_longest)), []
        for (row, start), encoding, answer in zip(waiting, found, answers, strict=True):
            places = first_pieces(feature, encoding)
            said |= {(row, start + word): answer[:, place] for word, place in places.items()}
            if start + len(places) < len(rows[row]):
                rest.append((row, start + len(places)))
        waiting = rest
    return np.stack([said[row, word] for row, words in enumerate(rows) for word in range(len(words))])
