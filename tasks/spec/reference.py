"""What a workload file may say, as a page: written from the models that read it, so it is never behind them.

``python -m tasks.spec.reference > docs/workload.md`` writes the page anew; a test holds it to the models. Pure.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

from tasks.spec.workload import Workload

HEAD = """# workload.yaml

Everything that a model's file may say. Fields without a default are needed; an unknown field, a wrong type or a
contradiction is refused with the field, the value and what is allowed. `./drydock validate NAME` checks a file and
prints it with every default. Written by `python -m tasks.spec.reference`; change the models, not this page.
"""
BOUNDS = {
    **{"minimum": ">= {}", "maximum": "<= {}", "exclusiveMinimum": "> {}", "exclusiveMaximum": "< {}"},
    **{"minItems": "{} or more", "maxItems": "{} or fewer", "minLength": "", "maxLength": "", "pattern": "as `{}`"},
}


def reference() -> str:
    """Return the page, Markdown."""
    schema = Workload.model_json_schema()
    parts, seen = [HEAD], set[str]()
    waiting = [("", schema)]
    while waiting:
        path, node = waiting.pop(0)
        parts.append(_section(path, node))
        found = []
        for name, field in node.get("properties", {}).items():
            for ref, label in _refs(field):
                if ref not in seen:
                    seen.add(ref)
                    where = f"{path}.{name}" if path else name
                    found.append((f"{where}{label}", schema["$defs"][ref]))
        # Depth first: a section's own parts follow it.
        waiting = found + waiting
    return "\n".join(parts)


def _section(path: str, node: dict[str, Any]) -> str:
    lines = [f"## `{path}`" if path else "## The file", ""]
    if told := node.get("description"):
        lines += [" ".join(inspect.cleandoc(told).split()), ""]
    lines += ["| field | is | default | |", "|---|---|---|---|"]
    needed = node.get("required", [])
    for name, field in node.get("properties", {}).items():
        default = "needed" if name in needed and "const" not in field else _default(field)
        lines.append(f"| `{name}` | {_escaped(_type(field))} | {default} | {_escaped(field.get('description', ''))} |")
    return "\n".join([*lines, ""])


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if "const" in field or "default" not in field:
        return ""
    if value is None:
        return "none"
    if "$ref" in field or (isinstance(value, dict) and value):
        return "its own defaults"
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def _type(field: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    if "$ref" in field:
        return "a section"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    for key in ("oneOf", "anyOf"):
        if key in field:
            mapping = field.get("discriminator", {}).get("mapping", {})
            named = {ref: name for name, ref in mapping.items()}
            kinds = [f"`{named[o['$ref']]}`" if o.get("$ref") in named else _type(o) for o in field[key]]
            return " or ".join(kind for kind in dict.fromkeys(kinds) if kind != "none")
    kind = field.get("type")
    bounds = [form.format(field[name]) for name, form in BOUNDS.items() if name in field and form]
    if kind == "array":
        items = field.get("items") or {"anyOf": field.get("prefixItems", [])}
        return "; ".join([f"a list of {_type(items)}", *bounds])
    if kind == "object":
        values = field.get("additionalProperties")
        return f"names with {_type(values)} each" if isinstance(values, dict) else "names with values"
    words = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    return "; ".join([words.get(kind or "", "none" if kind == "null" else "any value"), *bounds])


def _refs(field: Any) -> list[tuple[str, str]]:
    """The sections that a field may hold, each with what tells it from the others: ``: cnn``."""
    if not isinstance(field, dict):
        return []
    if "$ref" in field:
        return [(field["$ref"].rpartition("/")[2], "")]
    mapping = field.get("discriminator", {}).get("mapping", {})
    named = {ref.rpartition("/")[2]: f": {name}" for name, ref in mapping.items()}
    found = []
    for key in ("oneOf", "anyOf", "prefixItems"):
        for option in field.get(key, ()):
            found += [(ref, named.get(ref, label)) for ref, label in _refs(option)]
    for key in ("items", "additionalProperties"):
        found += _refs(field.get(key))
    return found


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
