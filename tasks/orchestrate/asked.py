"""Who asked for a run, and for which version: by the form, or by the asset whose event triggered it."""

from __future__ import annotations

from typing import Any

# In a run's configuration: the person at whose command it was triggered.
ASKED_BY = "asked_by"


def version_asked(context: Any) -> str | None:
    """Return the version that the form names, or that the triggering asset's event carries."""
    if version := dict(context["params"]).get("version") or dict(context["params"]).get("to"):
        return str(version)
    # Airflow gives a run all events that came while another one went on: the newest version is meant.
    return max((extra["version"] for extra in _asset_facts(context)), key=int, default=None)


def askers_of(context: Any) -> tuple[str, ...]:
    """Return the people who asked for the run: Airflow's user, and the one at whose command it was triggered.

    A schedule has none.
    """
    run = context["dag_run"]
    names = {getattr(run, "triggering_user_name", None), (getattr(run, "conf", None) or {}).get(ASKED_BY)}
    return tuple(sorted(str(name) for name in names if name))


def actor_of(context: Any) -> str:
    """Return who triggered the run, or the run whose asset triggered it; a schedule is the system's doing."""
    by_asset = [extra.get("triggered_by") for extra in _asset_facts(context) if extra.get("triggered_by")]
    return getattr(context["dag_run"], "triggering_user_name", None) or (by_asset[-1] if by_asset else "airflow")


def _asset_facts(context: Any) -> list[dict[str, Any]]:
    """The facts on the asset events that triggered the run; events made by hand carry none."""
    events = (context.get("triggering_asset_events") or {}).values()
    return [event.extra for group in events for event in group if (event.extra or {}).get("version")]
