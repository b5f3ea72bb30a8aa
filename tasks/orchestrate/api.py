"""Airflow's REST API (v2), as far as the command needs it."""

from __future__ import annotations

import time
from typing import Any

import httpx

from tasks.orchestrate.environment import USER, password
from tasks.site import Site
from tasks.spec.errors import BadRequest, TryAgain

# A question may be asked again: a server that has just started, or is busy, can be late with an answer.
ASKED, PAUSE_SECONDS = 3, 1.0
COMPONENTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")
ENDED = {"success", "failed"}


class AirflowApi:
    """A client of this site's Airflow, logged in as its user when first needed."""

    def __init__(self, site: Site, timeout_seconds: float = 30) -> None:
        self.site = site
        self.client = httpx.Client(base_url=site.settings.airflow_url, timeout=timeout_seconds, trust_env=False)
        self.token = ""

    def call(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        """Call the API and return its JSON. What changes nothing is asked up to three times.

        Raises:
            TryAgain: Airflow can't be reached or failed. BadRequest: it refused what was asked.
        """
        if not self.token:
            login = {"username": USER, "password": password(self.site.home, self.site.settings.airflow_password)}
            self.token = self._ask("POST", "/auth/token", login, {}, {}).json()["access_token"]
        headers = {"Authorization": f"Bearer {self.token}"}
        send = self._ask if method == "GET" else self._send
        answer = send(method, f"/api/v2{path}", body, params, headers)
        return answer.json() if answer.content else None

    def _ask(self, *question: Any) -> httpx.Response:
        """Send what may be sent again where the answer is late or the server fails."""
        for pause in [PAUSE_SECONDS] * (ASKED - 1):
            try:
                return self._send(*question)
            except TryAgain as error:
                if isinstance(error.__cause__, httpx.ConnectError):
                    raise  # nothing listens there
            time.sleep(pause)
        return self._send(*question)

    def _send(self, method: str, path: str, body: Any, params: Any, headers: Any) -> httpx.Response:
        try:
            answer = self.client.request(method, path, json=body, params=params, headers=headers)
        except httpx.HTTPError as error:
            url = self.site.settings.airflow_url
            raise TryAgain(f"Airflow at {url}: {type(error).__name__}; is it up? ./drydock up starts it") from error
        if answer.is_server_error:
            raise TryAgain(f"Airflow: {method} {path}: answered {answer.status_code}")
        if answer.is_client_error:
            raise BadRequest(f"Airflow: {method} {path}: {answer.status_code}: {_detail(answer)}")
        return answer

    def health(self) -> dict[str, str]:
        """Return each component's status; empty where Airflow does not answer."""
        try:
            answer = self.client.get("/api/v2/monitor/health", timeout=5).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return {name: (answer.get(name) or {}).get("status") or "unknown" for name in COMPONENTS}

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Trigger a run and return its id.

        Raises:
            TryAgain: as ``call``; where the answer was late the run may have begun, and the message says so.
        """
        try:
            return self.call("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"]
        except TryAgain as error:
            if not isinstance(error.__cause__, httpx.ReadTimeout):
                raise
            url = f"{self.site.settings.airflow_url}/dags/{dag_id}/runs"
            doubt = "Airflow did not say in time whether its run began"
            raise TryAgain(f"{dag_id}: {doubt}: look at {url} first") from None

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        return self.call("GET", f"/dags/{dag_id}/dagRuns/{run_id}")

    def runs(self, dag_id: str, limit: int = 5) -> list[dict[str, Any]]:
        """Return the newest runs, newest first; none where the DAG is not there (yet)."""
        try:
            return self.call("GET", f"/dags/{dag_id}/dagRuns", order_by="-run_after", limit=limit)["dag_runs"]
        except BadRequest:
            return []

    def dag_of(self, run_id: str) -> str | None:
        """Return the DAG of a run, None where no DAG has such a run."""
        found = self.call("GET", "/dags/~/dagRuns", run_id_pattern=run_id, limit=100)["dag_runs"]
        return next((run["dag_id"] for run in found if run["dag_run_id"] == run_id), None)

    def tasks(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Return a run's task instances."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        return self.call("GET", path, limit=100)["task_instances"]

    def task_log(self, dag_id: str, run_id: str, task: dict[str, Any]) -> str:
        """Return the text of a task's last attempt."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task['task_id']}/logs/{max(task['try_number'], 1)}"
        content = self.call("GET", path, map_index=task["map_index"], full_content=True)["content"]
        return "\n".join(_log_line(item) for item in content)

    def xcom(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> Any:
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/return_value"
        return self.call("GET", path, map_index=map_index, deserialize=True)["value"]

    def wait_for_dag(self, dag_id: str, seconds: float = 60) -> None:
        """Wait until Airflow has parsed a DAG.

        Raises:
            TryAgain: it has not in time; the message tells Airflow's import errors, if there are any.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                self.call("GET", f"/dags/{dag_id}")
                return
            except BadRequest:
                time.sleep(0.3)
        errors = self.call("GET", "/importErrors")["import_errors"]
        why = errors[0]["stack_trace"].strip().splitlines()[-1] if errors else "no import error is known"
        raise TryAgain(f"Airflow has not parsed the DAG {dag_id}: {why}")

    def waiting_reviews(self) -> list[dict[str, Any]]:
        path = "/dags/~/dagRuns/~/hitlDetails"
        return self.call("GET", path, response_received="false", limit=100)["hitl_details"]

    def answer_review(self, detail: dict[str, Any], option: str, reason: str) -> None:
        task = detail["task_instance"]
        path = f"/dags/{task['dag_id']}/dagRuns/{task['dag_run_id']}/taskInstances/{task['task_id']}/-1/hitlDetails"
        self.call("PATCH", path, {"chosen_options": [option], "params_input": {"reason": reason}})

    def set_pool(self, name: str, slots: int, description: str) -> None:
        """Make a pool, or set its size. Deferred tasks keep their slots: a gang that waits still trains."""
        body = {"slots": slots, "description": description, "include_deferred": True}
        try:
            self.call("PATCH", f"/pools/{name}", {"pool": name} | body)
        except BadRequest:
            self.call("POST", "/pools", {"name": name} | body)


def _log_line(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    at = str(item.get("timestamp") or "")[11:19]
    causes = [f"{cause.get('exc_type')}: {cause.get('exc_value')}" for cause in item.get("error_detail") or ()]
    return " ".join([at, str(item.get("event", "")), *causes]).strip()


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json().get("detail"))[:300]
    except ValueError:
        return answer.text[:300]
