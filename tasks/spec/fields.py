"""Which fields may stand at a place of a file: what a message about an unknown one names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

Models = list[type[BaseModel]]


def fields_at(model: type[BaseModel], place: Sequence[str | int]) -> tuple[str, ...]:
    """Return the names of the fields that a mapping may have at a place (pydantic's ``loc``) within a model."""
    here: Models = [model]
    for part in place:
        here = _inside(here, part)
    return tuple(dict.fromkeys(name for kind in here for name in kind.model_fields))


def closest_first(found: str, known: Iterable[str]) -> str:
    """Return the known names with commas between them; those that are spelled like what was found come first."""
    names = list(dict.fromkeys(known))
    near = get_close_matches(found, names, n=3, cutoff=0.6) if names else []
    return ", ".join(dict.fromkeys([*near, *names]))


def _inside(here: Models, part: str | int) -> Models:
    """The models one part deeper: what a union's tag picks, a field's own; an item's place or key changes nothing."""
    if picked := [kind for kind in here if part in _tags(kind)]:
        return picked
    fields = [kind.model_fields[part] for kind in here if part in kind.model_fields]
    return [model for field in fields for model in _models(field.annotation)] or here


def _tags(kind: type[BaseModel]) -> set[Any]:
    """By what a union names one of its models: the values of its literal field, or its class."""
    told = [field for field in kind.model_fields.values() if get_origin(field.annotation) is Literal]
    return {kind.__name__, *(value for field in told if field.is_required() for value in get_args(field.annotation))}


def _models(annotation: Any) -> Models:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
