"""Entities among tags: what BIO tags name, and how many of them two lists of tags agree on."""

from __future__ import annotations

from collections.abc import Sequence

OUTSIDE = "O"


def kind_of(tag: str) -> tuple[bool, str]:
    """Return whether a tag begins an entity, and the entity's type; no type: it is outside of all.

    A tag without ``B-`` or ``I-`` is read as ``I-``: neighbours of one type are one entity.
    """
    if tag == OUTSIDE:
        return False, ""
    return (tag[0] == "B", tag[2:]) if tag[:2] in ("B-", "I-") else (False, tag)


def kinds_of(tags: Sequence[str]) -> tuple[str, ...]:
    """Return the types of entities that tags can name, in order."""
    return tuple(dict.fromkeys(kind for tag in tags if (kind := kind_of(tag)[1])))


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities of one row's tags: type, first word, the word after the last.

    An ``I-`` that continues nothing of its type begins an entity, as in CoNLL's own evaluation (Sang and De Meulder
    2003).
    """
    found, kind, start = set(), "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        begins, here = kind_of(tag)
        if kind and (begins or here != kind):
            found.add((kind, start, place))
            kind = ""
        if here and not kind:
            kind, start = here, place
    return found


def matched(true: Sequence[str], said: Sequence[str], kinds: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """Return for each type how many entities of a row were found exactly (type and span), were said, are there."""
    there, named = entities(true), entities(said)
    sides = (there & named, named, there)
    return [tuple(sum(one[0] == kind for one in side) for side in sides) for kind in kinds]  # type: ignore[misc]


def f1(found: float, said: float, there: float) -> float:
    """Return the harmonic mean of precision and recall; 0 where nothing is there and nothing was said."""
    return 2 * found / max(said + there, 1)
