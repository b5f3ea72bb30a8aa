"""``drydock step``: one step from a request file, as a container runs it; errors are left beside the request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.site import Site
from tasks.spec.errors import BadRequest, DrydockError, from_os
from tasks.steps import parse_request, run_step
from tasks.store.files import copy_folder, write_json


def run_request(name: str, path: Path, out: Path | None, site: Site) -> dict[str, Any]:
    """Run a step and return its result; with ``out`` the finished room is copied there, manifest last.

    Raises:
        DrydockError: as the step says; ``error.json`` beside the request holds exit code and message.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path}: is no readable JSON request: {error}") from None
    (path.parent / "error.json").unlink(missing_ok=True)
    try:
        return _run(name, path, data, out, site)
    except DrydockError as error:
        _leave(path, error)
        raise
    except OSError as error:
        ours = from_os(error)
        _leave(path, ours)
        raise ours from error


def _run(name: str, path: Path, data: Any, out: Path | None, site: Site) -> dict[str, Any]:
    result = run_step(name, parse_request(name, data, str(path)), site).model_dump(mode="json")
    if out is not None:
        if out.exists():
            raise BadRequest(f"{out}: is there already; name a new folder")
        working = out.with_name(f".{out.name}")
        shutil.rmtree(working, ignore_errors=True)
        copy_folder(Path(result["room"]["uri"]), working)
        working.rename(out)
    return result


def _leave(path: Path, error: DrydockError) -> None:
    try:
        write_json(path.parent / "error.json", {"exit_code": error.exit_code, "message": str(error)})
    except OSError:
        # A full disk takes no error file either; the log has the line, and the exit code says the kind.
        return
