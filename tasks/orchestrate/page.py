"""The page inside Airflow: its files and the data behind them. Read-only; the API server alone imports it.

Nothing here answers without a user who may read the runs of ``rollback``; a workload's data needs the right to
read the runs of its ``release_`` DAG. The rollback itself is Airflow's own API: the page triggers the DAG as
the user who is logged in, with that user's rights.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.base import BaseHTTPMiddleware

from tasks.orchestrate.picture import names, picture
from tasks.release.series import Series
from tasks.site import Site
from tasks.spec.errors import DrydockError, TryAgain

ROLLBACK = "rollback"
FILES = Path(__file__).parent / "static"
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    # Everything of our own and nothing inline; framed by Airflow's own page only.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Frame-Options": "SAMEORIGIN",
    "X-Content-Type-Options": "nosniff",
    # Airflow tells by it that a person triggered a run, and not a program.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MAX_SECONDS = 7 * 24 * 3600


def build_app() -> FastAPI:
    """Return the app that Airflow mounts under ``/drydock``. Every route needs the user, for none can forget it."""
    app = FastAPI(
        title="Drydock",
        dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.RUN, ROLLBACK))],
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_middleware(BaseHTTPMiddleware, dispatch=_add_headers)
    app.add_exception_handler(DrydockError, _told)
    app.get("/")(lambda: _file("page.html"))
    for name in ("page.css", "page.js", "charts.js", "rollback.js", "icon.svg"):
        app.get(f"/{name}")(functools.partial(_file, name))
    app.get("/api/workloads")(workloads)
    app.get("/api/workloads/{workload}")(workload_picture)
    app.get("/api/workloads/{workload}/series")(workload_series)
    return app


def readable(workload: str, request: Request, user: GetUserDep) -> str:
    """Return the workload's name where it is one and the user may read its releases."""
    if workload not in names(_site()):
        raise HTTPException(404, f"{workload}: no such workload")
    _require("GET", f"release_{workload}", request, user)
    return workload


Readable = Annotated[str, Depends(readable)]


def workloads(request: Request, user: GetUserDep) -> dict[str, Any]:
    """The workloads that the user may read, and whether the user may roll back."""
    found = [name for name in names(_site()) if _may("GET", f"release_{name}", request, user)]
    return {"workloads": found, "user": user.get_name(), "may_roll_back": _may("POST", ROLLBACK, request, user)}


def workload_picture(workload: Readable) -> dict[str, Any]:
    """What serves, what is under way, what served before."""
    return picture(_site(), workload)


def workload_series(workload: Readable, seconds: Annotated[int, Query(ge=60, le=MAX_SECONDS)] = 900) -> dict[str, Any]:
    """The curves' points of the last ``seconds``."""
    return {"points": [point.model_dump() for point in Series(_site().home).read(workload, seconds)]}


def _require(method: Any, dag_id: str, request: Request, user: Any) -> None:
    requires_access_dag(method, DagAccessEntity.RUN, dag_id)(request, user)


def _may(method: str, dag_id: str, request: Request, user: Any) -> bool:
    try:
        _require(method, dag_id, request, user)
    except HTTPException:
        return False
    return True


@functools.cache
def _site() -> Site:
    """One for the process: the ledger is set up, under its lock, once."""
    return Site()


def _file(name: str) -> Response:
    return Response((FILES / name).read_bytes(), media_type=KINDS[name.rpartition(".")[2]])


async def _add_headers(request: Request, call_next: Any) -> Response:
    response = await call_next(request)
    response.headers.update(HEADERS)
    return response


async def _told(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=503 if isinstance(error, TryAgain) else 500)
