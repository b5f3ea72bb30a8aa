"""Where the logs are: services, replicas and jobs, by name."""

from __future__ import annotations

from pathlib import Path

from tasks.site import Site
from tasks.spec.errors import BadRequest


def known_logs(site: Site) -> dict[str, Path]:
    """Return every log by the name that ``drydock logs`` takes."""
    logs = site.home / "logs"
    found = {path.stem: path for path in logs.glob("*.log")}
    found |= {f"{path.parent.name}-{path.stem.split('-')[-1]}": path for path in logs.glob("*/replica-*.log")}
    found |= {path.parent.name: path for path in (site.home / "jobs").glob("*/job.log")}
    if (access := site.home / "gateway" / "access.log").exists():
        found["access"] = access
    return found


def log_path(site: Site, name: str) -> Path:
    """Return one log's path; a service's name means its first replica.

    Raises:
        BadRequest: no such log; the message lists the services' logs.
    """
    known = known_logs(site)
    for candidate in (name, f"{name}-0", f"airflow-{name}"):
        if candidate in known:
            return known[candidate]
    names = ", ".join(sorted(n for n, p in known.items() if p.parent == site.home / "logs")) or "none yet"
    raise BadRequest(f"log {name!r} is not there; services: {names}; ./drydock logs lists all")
