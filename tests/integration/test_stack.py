"""The compose stack at work: built from this tree, brought up, and taken from a source to a live prediction. Every
container that it ran is held against the CIS rules."""

from __future__ import annotations

import datetime as dt
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ports import free_ports

from tasks.command.secrets import FOLDER, write_secrets
from tasks.orchestrate.api import AirflowApi
from tasks.site import Site
from tasks.spec.settings import resolve

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DRYDOCK_TEST_DATA") or ROOT.parent / "shared" / "data")
IMAGES = ("airflow", "server", "trainer", "envoy", "postgres", "prometheus", "seaweedfs", "valkey")
PORTS = ("AIRFLOW", "MLFLOW", "GATEWAY", "PROMETHEUS")
sys.path.append(str(ROOT / "images"))
import cis  # noqa: E402


class Stack:
    """The stack of one project, with everything that its daemon was seen to run."""

    def __init__(self, home: Path, workloads: Path, ports: list[int]) -> None:
        self.home, self.workloads, self.project = home, workloads, f"drydock{secrets.token_hex(3)}"
        self.ports = dict(zip(PORTS, ports, strict=True))
        self.seen: dict[str, dict[str, Any]] = {}
        self.before: list[dict[str, Any]] = []
        self.stop = threading.Event()
        own = {"DRYDOCK_HOME": str(home), "DRYDOCK_WORKLOADS": str(workloads), "COMPOSE_PROJECT_NAME": self.project}
        own |= {f"DRYDOCK_{name}_PORT": str(port) for name, port in self.ports.items()}
        self.environment = os.environ | own
        at = {"airflow_at": self.url("AIRFLOW"), "airflow_password": str(home / FOLDER / "airflow-password")}
        self.api = AirflowApi(Site(resolve({}, home=str(home / "client"), **at)))

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def compose(self, *arguments: str, check: bool = True) -> str:
        command = ["docker-compose", "--file", str(ROOT / "docker-compose.yaml"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def containers(self) -> list[dict[str, Any]]:
        names = docker("ps", "--all", "--quiet", f"--filter=label={cis_project(self.project)}").split()
        done = subprocess.run(["docker", "inspect", *names], capture_output=True, text=True, check=False)
        return json.loads(done.stdout or "[]")  # one may go between the two looks

    def watch(self) -> None:
        while not self.stop.wait(0.3):
            self.seen |= {one["Id"]: one for one in self.containers()}

    def await_healthy(self) -> None:
        until = time.monotonic() + 300
        while True:
            states = {cis.service(one): (one["State"].get("Health") or {}).get("Status") for one in self.containers()}
            watched = [state for name, state in states.items() if name not in ("prepare", "jobs-own")]
            if len(watched) > 10 and set(watched) == {"healthy"}:
                return
            assert time.monotonic() < until, (states, self.compose("logs", "--tail=30", check=False)[-6000:])
            time.sleep(1)

    def finish(self, dag: str, run_id: str, seconds: float = 600) -> None:
        """Wait until a run has ended well; tell the log of its first task that did not."""
        until = time.monotonic() + seconds
        while (state := self.api.run(dag, run_id)["state"]) in ("queued", "running"):
            assert time.monotonic() < until, [(t["task_id"], t["state"]) for t in self.api.tasks(dag, run_id)]
            time.sleep(1)
        if state != "success":
            failed = [task for task in self.api.tasks(dag, run_id) if task["state"] == "failed"]
            raise AssertionError((dag, state, [self.api.task_log(dag, run_id, task)[-3000:] for task in failed[:1]]))

    def retrain(self, workload: str, params: dict[str, Any]) -> str:
        """Run the retrain DAG to its end; return the id of the release that the new version's asset triggered."""
        dag, release = f"retrain_{workload}", f"release_{workload}"
        self.api.wait_for_dag(dag, 120)
        self.finish(dag, self.api.trigger(dag, params))
        until = time.monotonic() + 60
        while not (runs := self.api.runs(release)):
            assert time.monotonic() < until, f"{release} was not triggered"
            time.sleep(1)
        return runs[0]["dag_run_id"]

    def await_gang(self, run_id: str) -> dict[str, Any]:
        """Wait until the gang of a run has learnt something; return its container. ``before``: what ran until then."""
        self.before = list(self.seen.values())
        known, until = {one["Id"] for one in self.before}, time.monotonic() + 400
        while True:
            new = [one for one in self.seen.values() if one["Id"] not in known and "-gang-" in one["Name"]]
            if new and "epoch 2:" in docker("logs", new[0]["Id"]):
                return new[0]
            failed = [task for task in self.api.tasks("retrain_slow", run_id) if task["state"] == "failed"]
            assert not failed, self.api.task_log("retrain_slow", run_id, failed[0])[-3000:]
            assert time.monotonic() < until, "no gang trains"
            time.sleep(0.3)

    def await_promoted(self, workload: str, run_id: str) -> None:
        until, dag = time.monotonic() + 200, f"release_{workload}"
        while True:
            states = {task["task_id"]: task["state"] for task in self.api.tasks(dag, run_id)}
            if states.get("promote") == "success":
                return
            failed = [task for task in self.api.tasks(dag, run_id) if task["state"] == "failed"]
            assert not failed, self.api.task_log(dag, run_id, failed[0])[-3000:]
            assert time.monotonic() < until, states
            time.sleep(0.5)

    def predict(self, workload: str, row: list[float]) -> httpx.Response:
        tensor = {"name": "input", "shape": [1, len(row)], "datatype": "FP32", "data": row}
        url = f"{self.url('GATEWAY')}/v2/models/{workload}/infer"
        return httpx.post(url, json={"inputs": [tensor]}, timeout=10, trust_env=False)


def cis_project(project: str) -> str:
    return f"com.docker.compose.project={project}"


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=120)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def stack(build_images, images_home, tmp_path_factory) -> Iterator[Stack]:
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not installed")
    build_images(*(f"drydock/{name}" for name in IMAGES))
    home = tmp_path_factory.mktemp("stack")
    home.chmod(0o755)
    shutil.copytree(ROOT / "workloads", home / "workloads")
    slow(home / "workloads")
    write_secrets(home)
    shutil.copyfile(images_home / "images.json", home / "images.json")
    found = Stack(home, home / "workloads", free_ports(len(PORTS)))
    watcher = threading.Thread(target=found.watch, daemon=True)
    try:
        found.compose("up", "--detach")
        watcher.start()
        found.await_healthy()
        yield found
    finally:
        found.stop.set()
        found.compose("down", "--volumes", "--remove-orphans", "--timeout=5", check=False)
        left = docker("ps", "--all", "--quiet", f"--filter=label={cis_project(found.project)}")
        assert left == ""


def of_step(stack: Stack, step: str) -> list[dict[str, Any]]:
    return [one for one in stack.seen.values() if one["Config"]["Labels"].get("drydock.step") == step]


def test_digits_goes_live_in_containers(stack):
    """The DAGs as they are: steps, the gang and the replica are containers, and an answer comes through the gateway."""
    release = stack.retrain("digits", {"max_epochs": 12})
    stack.await_promoted("digits", release)
    answer = stack.predict("digits", [0.0] * 64)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-drydock-passport"]
    names = {digest: name for name, digest in json.loads((stack.home / "images.json").read_text()).items()}
    ran = {(one["Config"]["Labels"].get("drydock.step"), names.get(one["Image"])) for one in stack.seen.values()}
    assert {("ingest", "drydock/airflow"), ("train", "drydock/trainer"), ("compress", "drydock/trainer")} <= ran
    assert any(name == "drydock/server" for _, name in ran)
    # The gang has neither the platform's network nor its state.
    gang = next(one for one in of_step(stack, "train") if names[one["Image"]] == "drydock/trainer")
    assert [mount["Destination"] for mount in gang["Mounts"]] == ["/work"]
    left = [one for one in stack.containers() if one["Config"]["Labels"].get("drydock.step")]
    assert left == []


def test_the_ledger_is_in_postgresql(stack):
    script = (
        "from tasks.site import Site; ledger = Site().ledger;"
        "print(ledger.chain.url.get_backend_name(), ledger.champion('digits').version)"
    )
    assert stack.compose("exec", "-T", "reconciler", "python", "-c", script).split() == ["postgresql", "1"]


def test_prometheus_finds_the_replica(stack):
    def up() -> list[str]:
        answer = httpx.get(f"{stack.url('PROMETHEUS')}/api/v1/targets", timeout=5, trust_env=False).json()
        found = answer["data"]["activeTargets"]
        return [one["health"] for one in found if one["labels"]["job"] == "replicas"]

    until = time.monotonic() + 60
    while up() != ["up"]:
        assert time.monotonic() < until, up()
        time.sleep(1)


def test_no_dag_code_reaches_the_socket(stack):
    script = "import os, glob; print(glob.glob('/run/docker*') + glob.glob('/var/run/docker*'), os.getuid())"
    for service in ("airflow-scheduler", "airflow-triggerer", "airflow-dag-processor", "reconciler"):
        assert stack.compose("exec", "-T", service, "python", "-c", script).strip() == "[] 10001"


SLOW = {"max_epochs": 500, "patience_epochs": 500}


def slow(workloads: Path) -> None:
    """Make a workload of the digits that trains for a minute."""
    text = (workloads / "digits" / "workload.yaml").read_text().replace("name: digits\n", "name: slow\n", 1)
    (workloads / "slow").mkdir()
    lines = [line if "stopping:" not in line else f"  stopping: {json.dumps(SLOW)}" for line in text.splitlines()]
    (workloads / "slow" / "workload.yaml").write_text("\n".join(lines))


def test_a_scheduler_that_is_killed_finds_its_containers_again(stack):
    """Its task processes die with it; the next ones adopt what runs: the same containers, no second training."""
    dag = "retrain_slow"
    stack.api.wait_for_dag(dag, 120)
    run_id = stack.api.trigger(dag, {"max_epochs": 300})
    gang = stack.await_gang(run_id)
    killed_at = time.time()
    scheduler = next(one for one in stack.containers() if cis.service(one) == "airflow-scheduler")
    os.kill(scheduler["State"]["Pid"], signal.SIGKILL)  # init of the container, so all its processes
    stack.finish(dag, run_id)
    gangs = {one["Id"] for one in of_step(stack, "train") if "-gang-" in one["Name"]}
    assert gangs - {found["Id"] for found in stack.before} == {gang["Id"]}
    path = f"/dags/{dag}/dagRuns/{run_id}/taskInstances/train/tries"
    tries = [one["start_date"] for one in stack.api.call("GET", path)["task_instances"]]
    assert len(tries) > 1, "the task was not interrupted"
    seconds = [dt.datetime.fromisoformat(start).timestamp() - killed_at for start in tries]
    assert min(since for since in seconds if since > 0) < 60


def test_a_run_that_is_cancelled_in_airflow_leaves_no_container(stack):
    dag = "retrain_slow"
    run_id = stack.api.trigger(dag, {"seed": 8})
    stack.await_gang(run_id)
    stack.api.call("PATCH", f"/dags/{dag}/dagRuns/{run_id}", {"state": "failed"})
    until = time.monotonic() + 60
    while left := [one["Name"] for one in stack.containers() if one["Config"]["Labels"].get("drydock.step")]:
        assert time.monotonic() < until, left
        time.sleep(0.5)
    assert "gang" not in docker("volume", "ls", "--quiet", "--filter=label=drydock.site")


def test_the_stack_goes_on_with_celery(stack):
    """A worker beside the scheduler takes the tasks from now on; what was live stays so."""
    stack.environment |= {"DRYDOCK_EXECUTOR": "CeleryExecutor", "COMPOSE_PROFILES": "celery"}
    stack.compose("up", "--detach")
    stack.await_healthy()
    assert stack.predict("digits", [0.0] * 64).status_code == 200


def test_mnist_waits_for_a_person_and_goes_live(stack):
    source = DATA / "mnist" / "train.parquet"
    if not source.is_file():
        pytest.skip(f"MNIST is not at {source}; set DRYDOCK_TEST_DATA")
    import pyarrow.parquet as pq

    shutil.copyfile(source, stack.workloads / "mnist" / "data.parquet")
    release = stack.retrain("mnist", {"max_epochs": 6})
    worker = next(one for one in stack.containers() if cis.service(one) == "airflow-worker")
    (run,) = stack.api.runs("retrain_mnist")
    tasks = stack.api.tasks("retrain_mnist", run["dag_run_id"])
    assert {task["hostname"] for task in tasks if task["hostname"]} == {worker["Config"]["Hostname"]}
    train = next(task for task in tasks if task["task_id"] == "train")
    assert "epoch 6:" in stack.api.task_log("retrain_mnist", run["dag_run_id"], train)
    until = time.monotonic() + 60
    while not (waiting := stack.api.waiting_reviews()):
        assert time.monotonic() < until, "nothing waits for a review"
        time.sleep(1)
    stack.api.answer_review(waiting[0], "Approve", "looks right")
    stack.await_promoted("mnist", release)
    table = pq.read_table(source).slice(0, 1)
    row = [float(value) for value in table.column("pixels")[0].as_py()]
    answer = stack.predict("mnist", row)
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
    assert str(outputs["label"][0]) == str(table.column("label")[0].as_py())


def test_every_container_keeps_the_cis_rules(stack):
    """4.1 and section 5 over all that ran: the services, and each step, gang and replica."""
    kinds = {cis.service(one) for one in stack.seen.values()}
    assert {"jobs", "jobs-own", "gateway", "mlflow", "postgres", "reconciler", "valkey", "airflow-worker"} <= kinds
    assert sorted({line for one in stack.seen.values() for line in cis.warnings(one)}) == []
