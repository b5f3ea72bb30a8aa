"""``drydock bench``: one question a file in ``benchmarks/``, each a function ``bench(site) -> rows``."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from tasks.site import Site
from tasks.spec.errors import BadRequest


def bench_names(site: Site) -> list[str]:
    """Return the names of the benchmarks there are."""
    return sorted(path.stem for path in (site.root / "benchmarks").glob("[a-z]*.py"))


def run_bench(site: Site, name: str) -> dict[str, Any]:
    """Run one benchmark; return ``{"bench", "rows": [{"name", "value", "limit", "ok"}]}``.

    Raises:
        BadRequest: no such benchmark; the message lists those there are.
    """
    if name not in bench_names(site):
        raise BadRequest(f"bench {name!r} is not there, must be one of {', '.join(bench_names(site)) or 'none'}")
    path = site.root / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"drydock_bench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # What a benchmark is made of lies in folders beside it; last, so that what is installed wins.
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return {"bench": name, "rows": module.bench(site)}


def table(found: dict[str, Any]) -> str:
    """Return the rows as a table for a person."""
    lines = [f"{found['bench']}", f"  {'name':<58} {'value':>10} {'limit':>10}"]
    for row in found["rows"]:
        limit = "" if row["limit"] is None else f"{row['limit']:.4g}"
        mark = "" if row["ok"] else "  MISSED"
        lines.append(f"  {row['name']:<58} {row['value']:>10.4g} {limit:>10}{mark}")
    return "\n".join(lines)
