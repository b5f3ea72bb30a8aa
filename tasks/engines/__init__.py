"""Where steps and servers run. Two protocols, job and service; one contract suite for every back end."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from tasks.spec.errors import BadRequest

# Import paths, not classes: a back end's libraries load only where that back end is asked for.
ENGINES = {
    "process": "tasks.engines.process:ProcessEngine",
    "docker": "tasks.engines.docker:DockerEngine",
    "remote": "tasks.engines.remote:RemoteEngine",
    "swarm": "tasks.engines.swarm:SwarmEngine",
    "fake": "tasks.engines.fake:FakeEngine",
}


def engine(name: str, home: Path, **facts: Any) -> Any:
    """Return the back end of that name for a state folder; it answers to ``JobEngine`` and ``ServiceEngine``.
    ``facts``: what one of them needs beside the folder, such as the job service's URL.

    Raises:
        BadRequest: an unknown name; the message lists the known ones.
    """
    if name not in ENGINES:
        raise BadRequest(f"engine = {name!r}, must be one of {sorted(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(import_module(module), attribute)(home, **facts)
