"""The plugin: Drydock's page inside Airflow. Every component of Airflow loads this file, so it imports nothing heavy.

Airflow finds it by a file in its plugins folder that imports it from here (see ``tasks.stack``).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin

from tasks.orchestrate.one_writer import OneWriter
from tasks.orchestrate.same_origin import SameOrigin

# As Airflow's own configuration names it; other databases lock rows, and are left their concurrency.
IS_SQLITE = conf.get("database", "sql_alchemy_conn").startswith("sqlite")


class DrydockPlugin(AirflowPlugin):
    """A page in the navigation, the data behind it, and a guard against cross-site posts for all of Airflow."""

    name = "drydock"
    # Relative: Airflow may live under a path.
    external_views = [
        {
            "name": "Drydock",
            "href": "drydock/",
            "destination": "nav",
            "url_route": "drydock",
            "icon": "drydock/icon.svg",
            "nav_top_level": True,
        }
    ]
    fastapi_root_middlewares = [
        *([{"name": "Drydock: one writer", "middleware": OneWriter}] if IS_SQLITE else []),
        # The last one sees a request first.
        {"name": "Drydock: same origin", "middleware": SameOrigin},
    ]

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Only the API server asks for it, and only there the app is built."""
        from tasks.orchestrate.page import build_app

        return [{"app": build_app(), "url_prefix": "/drydock", "name": "Drydock"}]
