"""The JSON of a request, read strictly; the data of its tensors stays with the parser."""

from __future__ import annotations

import json
from typing import Any

import simdjson

from tasks.serve.tensors import show
from tasks.spec.errors import BadRequest

REQUEST_FIELDS = frozenset(("id", "parameters", "inputs", "outputs"))
INPUT_FIELDS = frozenset(("name", "shape", "datatype", "parameters", "data"))
# Not turned into Python's lists.
BIG_FIELDS = frozenset(("inputs", "data"))
PARSED = (simdjson.Array, simdjson.Object)
MOST_INPUTS = 2


def read_json(text: bytes) -> dict[str, Any]:
    """Read a request strictly: UTF-8, known fields, no duplicate keys, no NaN, a bounded depth. The data of a tensor
    stays the parser's own array; a parser of its own for each request, so that none is used again too soon."""
    try:
        body = simdjson.Parser().parse(text)
    except UnicodeDecodeError:
        raise BadRequest("the body is no JSON: it is not UTF-8") from None
    except (ValueError, RuntimeError) as error:  # RuntimeError: a whole number beyond 64 bits
        raise BadRequest(f"the body is no JSON: {_reason(error)}") from None
    if not isinstance(body, simdjson.Object):
        raise BadRequest(f"the body is {show(body)}, must be a JSON object")
    request = _fields(body, "the request", REQUEST_FIELDS)
    inputs = request.get("inputs")
    if isinstance(inputs, simdjson.Array) and len(inputs) <= MOST_INPUTS:
        request["inputs"] = [
            _fields(found, "an input", INPUT_FIELDS) if isinstance(found, simdjson.Object) else None for found in inputs
        ]
    elif isinstance(inputs, simdjson.Array):
        request["inputs"] = [None] * len(inputs)
    return request


def _fields(data: simdjson.Object, what: str, known: frozenset[str]) -> dict[str, Any]:
    """Return an object's known fields; what they hold is plain but for tensors' data and the list of inputs."""
    names = list(data.keys())
    if not known.issuperset(names):
        extra = min(set(names) - known)
        raise BadRequest(f"{what} has field {show(extra)}, must be one of {', '.join(sorted(known))}")
    fields = {}
    for name in names:
        value = data[name]
        fields[name] = _plain(value) if isinstance(value, PARSED) and name not in BIG_FIELDS else value
    if len(fields) != len(names):
        raise BadRequest("the body has a key twice in one object, must be once")
    return fields


def _plain(value: Any) -> Any:
    """Return small JSON as Python has it, read again where a key could be there twice."""
    text = value.mini
    if b"{" not in text:
        return value.as_list()
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _reason(error: Exception) -> str:
    """Say what simdjson found without its own names: ``NUMBER_ERROR: Problem while parsing a number``."""
    text = str(error).partition(": ")[2] or str(error)
    return f"{text[:1].lower()}{text[1:120]}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise BadRequest("the body has a key twice in one object, must be once")
    return data
