"""The stack as a user meets it, in the order in which a user would: up, predict, retrain, roll back, break, down.

The tests share one stack and run in file order; each leaves a live champion behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tasks.engines.supervisor import Supervisor
from tasks.spec.errors import TryAgain

pytestmark = [pytest.mark.timeout(420)]
BLANK = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}]}


class Load:
    """Constant traffic through the gateway; every answer is counted by code and version."""

    def __init__(self, stack: Any) -> None:
        self.url = f"{stack.gateway}/v2/models/digits/infer"
        self.counts: Counter[tuple[int, str]] = Counter()
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(2)]

    def _run(self) -> None:
        with httpx.Client(trust_env=False, timeout=10) as client:
            while not self.stopping.wait(0.01):
                try:
                    answer = client.post(self.url, json=BLANK)
                    key = (answer.status_code, answer.headers.get("x-drydock-version", ""))
                except httpx.HTTPError as error:
                    key = (0, type(error).__name__)
                self.counts[key] += 1

    @property
    def failed(self) -> dict[tuple[int, str], int]:
        return {key: count for key, count in self.counts.items() if key[0] != 200}


@contextlib.contextmanager
def load(stack: Any) -> Iterator[Load]:
    running = Load(stack)
    for thread in running.threads:
        thread.start()
    try:
        yield running
    finally:
        running.stopping.set()
        for thread in running.threads:
            thread.join(15)


def wait_until(condition: Any, seconds: float, what: str) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s")


def champion(stack: Any) -> str | None:
    found = next(w for w in stack.json("status")["workloads"] if w["workload"] == "digits")
    return found["champion"]


def running(stack: Any, part: str) -> list[Any]:
    """The stack's processes with ``part`` in their command line."""
    return [process for process in stack.processes() if part in _command_line(process)]


def programs(stack: Any) -> dict[str, int]:
    """The ids of what runs for good, by name. One that has ended has the id 0, which is no process of the stack."""
    found = Supervisor(stack.home).infos().items()
    return {name: info.pid for name, info in found if info.pid and not name.startswith("job-")}


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # ended since it was listed
        return ""


def parked(api: Any) -> list[dict[str, Any]]:
    """The reviews that wait, and hold neither a worker slot nor the triggerer."""
    return [d for d in api.waiting_reviews() if d["task_instance"]["state"] == "awaiting_input"]


def finish(api: Any, dag_id: str, run_id: str, seconds: float = 240) -> str:
    return wait_until(
        lambda: (state := api.run(dag_id, run_id)["state"]) in ("success", "failed") and state, seconds, dag_id
    )


def states(api: Any, dag_id: str, run_id: str) -> dict[str, str]:
    return {task["task_id"]: task["state"] for task in api.tasks(dag_id, run_id)}


def test_a_taken_port_is_named(stack: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(stack.environment["DRYDOCK_MLFLOW_PORT"])))
        taken.listen()
        done = stack.drydock("up", expect=30)
    assert "mlflow_port" in done.stderr
    assert "DRYDOCK_MLFLOW_PORT" in done.stderr
    assert stack.processes() == []


def test_up_takes_the_default_workload_to_a_live_model(stack: Any) -> None:
    out = stack.drydock("up", timeout=400).stdout
    for told in ("retrain_digits", "train", "promote", "answers a sample", "passport", stack.airflow, stack.password):
        assert told in out
    answer = stack.predict("digits", BLANK)
    assert answer.status_code == 200
    assert re.fullmatch(r"[0-9a-f]{64}\.[0-9A-HJKMNP-TV-Z]{26}", answer.headers["x-drydock-passport"])
    assert champion(stack) == "1"


def test_up_again_starts_nothing_twice(stack: Any) -> None:
    before = programs(stack)
    started = time.monotonic()
    stack.drydock("up")
    assert time.monotonic() - started < 20
    assert programs(stack) == before
    kinds = [row["kind"] for row in stack.json("history", "digits")]
    assert [kind for kind in kinds if kind != "event"] == ["intent", "commit"]


def test_an_answer_leads_back_to_its_origin(stack: Any) -> None:
    passport = stack.predict("digits", BLANK).headers["x-drydock-passport"]
    origin = stack.json("history", "digits", "--passport", passport)
    assert origin["version"] == "1"
    assert origin["package_sha256"] == passport.partition(".")[0]
    assert origin["dataset_revision"].startswith("digits-")
    assert origin["dataset_revision"] in stack.drydock("data", "list").stdout


def test_assets_carry_their_digests_and_the_pool_its_size(stack: Any) -> None:
    api = stack.api()
    facts = [event["extra"] for event in api.call("GET", "/assets/events")["asset_events"]]
    served = next(row for row in stack.json("history", "digits") if row["kind"] == "commit")
    assert any(fact.get("package_sha256") == served["digest_sha256"] and fact["version"] == "1" for fact in facts)
    assert any(fact.get("revision", "").startswith("digits-") and len(fact["data_sha256"]) == 64 for fact in facts)
    pool = api.call("GET", "/pools/training")
    assert pool["slots"] >= 2
    assert pool["include_deferred"] is True


def test_an_unchanged_run_is_recognised_step_by_step(stack: Any) -> None:
    rooms = {path: path.stat().st_mtime_ns for path in (stack.home / "rooms").glob("*/*/manifest.json")}
    assert stack.json("run", "digits")["version"] == "1"
    again = {path: path.stat().st_mtime_ns for path in (stack.home / "rooms").glob("*/*/manifest.json")}
    assert again == rooms


def test_a_new_version_is_released_and_rolled_back_under_load(stack: Any) -> None:
    api = stack.api()
    with load(stack) as traffic:
        run_id = api.trigger("retrain_digits", {"seed": 1})
        assert finish(api, "retrain_digits", run_id) == "success"
        wait_until(lambda: champion(stack) == "2", 120, "version 2 serves")
        time.sleep(1)
        stack.drydock("rollback", "digits", "--reason", "the test says so")
        time.sleep(1)
    assert champion(stack) == "1"
    assert traffic.failed == {}
    assert {version for _, version in traffic.counts} == {"1", "2"}
    assert sum(traffic.counts.values()) > 200
    stages = [row["detail"]["stage"] for row in stack.json("history", "digits") if row["action"] == "rollout"]
    assert stages[-6:] == ["begin", "shadow", "canary-5", "canary-25", "canary-50", "end"]
    last = stack.json("history", "digits")[-1]
    assert (last["action"], last["version"], last["actor"], last["reason"]) == (
        "rollback",
        "1",
        "rita",
        "the test says so",
    )
    assert stack.events("rollback")


def test_what_was_rolled_back_does_not_come_back_by_itself(stack: Any) -> None:
    api = stack.api()
    before = {run["dag_run_id"] for run in api.runs("release_digits", 50)}
    assert stack.json("run", "digits", "--param", "seed=1")["version"] == "2"
    asked = wait_until(
        lambda: [run for run in api.runs("release_digits", 50) if run["dag_run_id"] not in before], 30, "a release"
    )[0]["dag_run_id"]
    assert finish(api, "release_digits", asked, 60) == "success"
    assert set(states(api, "release_digits", asked).values()) == {"skipped"}
    assert champion(stack) == "1"


def test_the_rollback_dag_goes_to_any_version(stack: Any) -> None:
    api = stack.api()
    run_id = api.trigger("rollback", {"workload": "digits", "to": "2", "reason": "forward by name"})
    assert finish(api, "rollback", run_id, 60) == "success"
    assert champion(stack) == "2"
    assert "--- rollback: success" in stack.drydock("logs", run_id).stdout
    assert "version 2 serves already" in stack.drydock("release", "digits", "2").stdout
    refused = stack.drydock("rollback", "digits", "--to", "77", "--reason", "x", expect=30)
    assert "77" in refused.stderr
    assert champion(stack) == "2"


def test_a_task_that_is_killed_finds_its_job_again(stack: Any) -> None:
    api = stack.api()
    run_id = api.trigger("retrain_digits", {"seed": 2})
    gang = wait_until(lambda: running(stack, "tasks.train.gang"), 120, "the ranks run")
    task = next(t for t in api.tasks("retrain_digits", run_id) if t["task_id"] == "train")
    os.kill(int(task["pid"]), signal.SIGKILL)
    assert finish(api, "retrain_digits", run_id) == "success"
    train = next(t for t in api.tasks("retrain_digits", run_id) if t["task_id"] == "train")
    assert train["try_number"] >= 2
    newest = max((stack.home / "jobs").glob("train-*/job.log"), key=lambda path: path.stat().st_mtime)
    # One gang only: its first epoch was printed once.
    assert newest.read_text().count("epoch 1:") == 1
    assert not any(process.is_running() for process in gang)
    registered = api.xcom("retrain_digits", run_id, "register")["version"]
    wait_until(lambda: champion(stack) == registered, 120, "its version serves")


def test_a_gate_refusal_fails_at_once_and_the_champion_serves_on(stack: Any) -> None:
    api, before = stack.api(), champion(stack)
    run_id = api.trigger("retrain_digits", {"seed": 2, "min_accuracy": 1.0})
    assert finish(api, "retrain_digits", run_id) == "failed"
    found = {task["task_id"]: task for task in api.tasks("retrain_digits", run_id)}
    assert found["judge"]["state"] == "failed"
    assert found["judge"]["try_number"] == 1
    assert found["register"]["state"] == "upstream_failed"
    assert "must be at least 1" in api.task_log("retrain_digits", run_id, found["judge"])
    assert any("must be at least 1" in event["message"] for event in stack.events("failure"))
    assert "must be at least 1" in stack.drydock("status").stdout
    assert stack.predict("digits", BLANK).status_code == 200
    assert champion(stack) == before


def test_a_person_reviews_by_the_command(stack: Any) -> None:
    api = stack.api()
    run_id = api.trigger("retrain_digits", {"seed": 3, "review": True})
    assert finish(api, "retrain_digits", run_id) == "success"
    registered = api.xcom("retrain_digits", run_id, "register")["version"]
    detail = wait_until(lambda: parked(api), 60, "a review waits, without a worker")[0]
    assert f"version {registered}" in detail["subject"]
    assert champion(stack) != registered
    assert registered in stack.drydock("review", "digits").stdout
    stack.drydock("review", "digits", "--approve", registered, "--reason", "looks right")
    wait_until(lambda: champion(stack) == registered, 120, "the approved version serves")
    approval = next(row for row in stack.json("history", "digits") if row["kind"] == "approval")
    assert (approval["actor"], approval["reason"]) == ("rita", "looks right")


def test_a_tag_in_mlflow_reviews_where_the_workload_accepts_it(stack: Any) -> None:
    from tasks.registry.client import connect

    path = stack.workloads / "digits" / "workload.yaml"
    declared = path.read_text()
    api, client = stack.api(), connect(stack.mlflow)
    run_id = api.trigger("retrain_digits", {"seed": 4, "review": True})
    assert finish(api, "retrain_digits", run_id) == "success"
    registered = api.xcom("retrain_digits", run_id, "register")["version"]
    wait_until(lambda: parked(api), 60, "a review waits")
    client.set_model_version_tag("digits", registered, "review", "approved")
    wait_until(lambda: stack.events("refusal"), 30, "the unnamed approval is refused")
    assert champion(stack) != registered
    path.write_text(declared.replace("{required: false}", "{required: false, accept_unnamed: true}"))
    client.set_model_version_tag("digits", registered, "review", "approved")
    wait_until(lambda: champion(stack) == registered, 120, "the version approved by its tag serves")


def test_bad_input_is_one_line_everywhere(stack: Any) -> None:
    folder = stack.workloads / "spam-two"
    stack.drydock("new", "spam-two", "--feature", "text")
    api = stack.api()
    api.wait_for_dag("retrain_spam-two")
    run_id = api.trigger("retrain_spam-two", {})
    assert finish(api, "retrain_spam-two", run_id, 90) == "failed"
    tasks = {task["task_id"]: task for task in api.tasks("retrain_spam-two", run_id)}
    assert tasks["ingest"]["state"] == "failed"
    assert tasks["ingest"]["try_number"] == 1
    assert "data.csv" in api.task_log("retrain_spam-two", run_id, tasks["ingest"])
    assert any("data.csv" in event["message"] for event in stack.events("failure"))
    text = (folder / "workload.yaml").read_text()
    (folder / "workload.yaml").write_text(text.replace("kind: text-cnn", "kind: resnet"))
    assert "resnet" in stack.drydock("validate", "spam-two", expect=30).stderr
    assert "resnet" in stack.drydock("status").stdout
    (folder / "workload.yaml").unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_run_goes_on_after_a_full_disk_and_after_an_outage_of_mlflow(stack: Any) -> None:
    api, before = stack.api(), champion(stack)
    small = stack.home / "jobs"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "drydock-test", str(small)], check=True)
    try:
        run_id = api.trigger("retrain_digits", {"seed": 5})
        assert finish(api, "retrain_digits", run_id) == "failed"
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    failed = next(task for task in api.tasks("retrain_digits", run_id) if task["state"] == "failed")
    assert failed["try_number"] == 4, "it may pass, so it is tried again"
    for told in (
        api.task_log("retrain_digits", run_id, failed),
        stack.events("failure")[-1]["message"],
        stack.drydock("status").stdout,
    ):
        assert "the disk is full at " in told
    assert "TryAgain" not in stack.drydock("status").stdout
    assert stack.predict("digits", BLANK).status_code == 200

    Supervisor(stack.home).remove("mlflow")
    api.call("POST", f"/dags/retrain_digits/dagRuns/{run_id}/clear", {"dry_run": False, "only_failed": True})

    def waits() -> Any:
        return [task for task in api.tasks("retrain_digits", run_id) if task["state"] == "up_for_retry"]

    (task,) = wait_until(waits, 90, "what needs MLflow waits for it")
    assert "MLflow" in api.task_log("retrain_digits", run_id, task)
    assert stack.predict("digits", BLANK).status_code == 200
    stack.drydock("up")
    assert finish(api, "retrain_digits", run_id) == "success"
    registered = api.xcom("retrain_digits", run_id, "register")["version"]
    wait_until(lambda: champion(stack) == registered != before, 120, "its version serves")


def test_a_component_that_dies_is_restarted(stack: Any) -> None:
    """All of them at once: each comes back, and what served serves."""
    api, before = stack.api(), programs(stack)
    assert {"airflow-scheduler", "airflow-api-server", "gateway", "mlflow", "reconciler"} < set(before)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    def again() -> bool:
        now = programs(stack)  # a version that is retired meanwhile need not
        return all(now.get(name, pid) != pid for name, pid in before.items() if not name.startswith("svc-"))

    wait_until(again, 60, "each runs again")
    wait_until(lambda: _healthy(stack, api), 90, "Airflow is healthy again")
    wait_until(lambda: _answers(stack), 30, "the champion answers again")
    assert champion(stack) is not None


def _healthy(stack: Any, api: Any) -> bool:
    with contextlib.suppress(TryAgain):
        said = [*api.health().values(), *stack.json("status")["services"].values()]
        return set(said) <= {"healthy", "running"}
    return False


def _answers(stack: Any) -> bool:
    try:
        return stack.predict("digits", BLANK).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_hand_moved_alias_is_put_back(stack: Any) -> None:
    from tasks.registry.client import connect

    client, serving = connect(stack.mlflow), champion(stack)
    other = "1" if serving != "1" else "2"
    client.set_registered_model_alias("digits", "champion", other)
    wait_until(lambda: client.get_registered_model("digits").aliases["champion"] == serving, 20, "the alias is back")
    wait_until(lambda: any("champion" in e["message"] for e in stack.events("alias")), 5, "an event tells it")
