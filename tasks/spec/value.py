"""The base of every value that travels between steps: frozen, strict, with a canonical JSON form."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.spec.errors import BadRequest
from tasks.spec.fields import closest_first, fields_at


def canonical_json(data: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, NaN refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_of(data: Any) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


class Value(BaseModel):
    """A frozen value. Unknown fields and wrong types are errors, never guesses.

    A number must be finite: nothing is ever below a limit of NaN, so a rule with one would never fail.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")

    @property
    def fingerprint(self) -> str:
        """The SHA-256 (hex) of the value's canonical JSON."""
        return sha256_of(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Read a value from plain data (from YAML or JSON), strictly.

        Raises:
            BadRequest: one line that names ``where``, the field, the value found and what is allowed.
        """
        try:
            return cls.model_validate_json(json.dumps(data, default=str), strict=True)
        except ValidationError as error:
            raise BadRequest(f"{where}: {explain(error, cls)}") from None


class RoomRef(Value):
    """Where a room is and what it must hold. ``tasks.store.room.open_room`` opens it, verified."""

    uri: str
    digest_sha256: str


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem of a model's validation as ``field = found, what is allowed``."""
    problems = error.errors(include_url=False)
    first = min(problems, key=_rank)
    field = ".".join(str(part) for part in first["loc"] if not _is_tag(part)) or "the file"
    found = _show(first["input"])
    if first["type"] == "extra_forbidden":
        *place, name = first["loc"]
        return f"{field} = {found}, is not a known field, must be one of {closest_first(name, fields_at(model, place))}"
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if first["type"] == "value_error":
        return f"{field}: {message}" if field != "the file" else message
    return f"{field} = {found}, {message[:1].lower()}{message[1:]}"


def _rank(problem: Any) -> int:
    return {"extra_forbidden": 0, "missing": 2}.get(problem["type"], 1)


def _is_tag(part: Any) -> bool:
    """Discriminated unions put their tag into the location; a reader of the file never wrote it as a key."""
    return isinstance(part, str) and (part in _TAGS or part.startswith("function-"))


_TAGS: set[str] = set()


def register_tags(*tags: str) -> None:
    """Name the tags of a discriminated union, so that messages leave them out of the field's path."""
    _TAGS.update(tags)


def _show(found: Any) -> str:
    text = json.dumps(found, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
