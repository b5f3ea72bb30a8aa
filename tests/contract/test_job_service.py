"""The job service: what its schema can't say can't be had, whoever holds the token."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tasks.engines import engine
from tasks.engines.docker import DockerEngine
from tasks.engines.orders import order_of_job
from tasks.engines.protocol import Job, Limits
from tasks.spec.errors import BadRequest, Refused, TryAgain

pytestmark = pytest.mark.timeout(120)
LIMITS = Limits(memory_bytes=2**27, pids=32)
JOB = Job(key="lawful", command=("sleep", "60"), folder="/x", image="drydock/base", limits=LIMITS)
SERVICE = {"name": "lawful", "command": ["sleep", "60"], "image": "drydock/base", "limits": LIMITS.model_dump()}


@pytest.fixture(scope="module")
def served(job_service, allow_images, tmp_path_factory) -> Iterator[Any]:
    home = tmp_path_factory.mktemp("jobs")
    allow_images(home, "drydock/base")
    with job_service(home) as found:
        yield found


def ask(served: Any, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    bearer = {"Authorization": f"Bearer {served.token.read_text() if token is None else token}"}
    connection.request(method, path, None if body is None else json.dumps(body), bearer)
    answer = connection.getresponse()
    text = answer.read().decode()
    return answer.status, json.loads(text) if text.startswith("{") else text


def own(served: Any) -> list[str]:
    return [one["Id"] for one in served.engine.list()]


ESCAPES = {
    "privileged": {"privileged": True},
    "host bind": {"mounts": {"/host": "/"}},
    "host PID": {"pid_mode": "host"},
    "host network": {"network_mode": "host"},
    "host IPC": {"ipc_mode": "host"},
    "added capability": {"cap_add": ["SYS_ADMIN"]},
    "device": {"devices": ["/dev/sda"]},
    "image by tag": {"image": "drydock/base:0.1.0"},
    "image by digest": {"image": "sha256:" + "a" * 64},
    "image not on the list": {"image": "drydock/trainer"},
    "socket mount": {"mounts": {"/var/run/docker.sock": "/var/run/docker.sock"}},
    "no limits": {"limits": None},
    "no limit of memory": {"limits": {**LIMITS.model_dump(), "memory_bytes": None}},
    "no limit of processes": {"limits": {**LIMITS.model_dump(), "pids": -1}},
    "other runtime": {"runtime": "runsc"},
    "another user": {"user": "0"},
    "own security options": {"security_opt": ["seccomp=unconfined"]},
    "writable root": {"read_only": False},
    "a room of the host": {"room": "/etc"},
    "a folder of the host": {"folder": "/etc"},
    "another site's label": {"labels": {"site": "another"}},
    "another job's label": {"labels": {"job": "another"}},
    "a lease of its own": {"labels": {"devices": "GPU-a"}},
}


@pytest.mark.parametrize("what", ESCAPES)
def test_no_escape(served, what):
    order = order_of_job(JOB).model_dump(mode="json")
    service = {name: value for name, value in (SERVICE | ESCAPES[what]).items() if value is not None}
    asked = {name: value for name, value in (order | ESCAPES[what]).items() if value is not None}
    for method, path, body in (("POST", "/jobs", asked), ("PUT", "/services", service)):
        status, answer = ask(served, method, path, body)
        assert (status, answer["exit_code"]) == (400, 30), answer
        assert "\n" not in answer["message"]
    assert own(served) == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/jobs/job-lawful/exec"),
        ("POST", "/containers/create"),
        ("GET", "/v1.41/containers/json"),
        ("POST", "/v1.41/exec/1/start"),
        ("POST", "/build"),
        ("DELETE", "/jobs/job-lawful"),
    ],
)
def test_the_daemons_own_interface_is_not_there(served, method, path):
    assert ask(served, method, path, {"Cmd": ["sh"]})[0] in (404, 405)


def test_a_container_is_held_whatever_is_asked(served):
    """What runs in the end, as the daemon tells it: the lawful order and nothing more."""
    assert ask(served, "POST", "/jobs", order_of_job(JOB).model_dump(mode="json")) == (200, {"handle": "job-lawful"})
    found = served.engine.api.inspect_container(own(served)[0])
    host = found["HostConfig"]
    assert (host["Privileged"], host["CapAdd"], host["PidMode"], host["Devices"]) == (False, None, "", None)
    assert (host["CapDrop"], host["ReadonlyRootfs"], host["Memory"], host["PidsLimit"]) == (["ALL"], True, 2**27, 32)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert found["Config"]["User"] == "10001:10001"
    assert [mount["Type"] for mount in found["Mounts"]] == ["volume"]
    assert ask(served, "POST", "/jobs/job-lawful/cancel") == (200, {})
    assert own(served) == []


def test_a_job_inside_the_stack_needs_one(served):
    inside = order_of_job(JOB).model_dump(mode="json") | {"inside": True}
    status, answer = ask(served, "POST", "/jobs", inside)
    assert (status, "stands in no stack" in answer["message"]) == (400, True)
    status, answer = ask(served, "POST", "/jobs", inside | {"nodes": 2})
    assert (status, "inside = true, must be false for a gang" in answer["message"]) == (400, True)


@pytest.mark.parametrize("token", ["", "wrong", "ünicode"])
def test_nobody_without_the_token(served, token):
    for method, path in (("POST", "/jobs"), ("GET", "/jobs/job-a"), ("PUT", "/rooms/a"), ("GET", "/services")):
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
        connection.request(method, path, b"{}", {"Authorization": f"Bearer {token}".encode()})
        assert connection.getresponse().status == 401
    assert ask(served, "GET", "/health", token="") == (200, {"healthy": True})


def test_bad_input_is_one_line_and_leaves_nothing(served, tmp_path):
    client = engine("remote", tmp_path, url=served.url, token=str(served.token))
    with pytest.raises(BadRequest, match=r"this machine has \d+; lower train.resources.memory_bytes"):
        client.submit(JOB.model_copy(update={"limits": Limits(memory_bytes=2**50)}))
    with pytest.raises(BadRequest, match="1 GPUs a node, this Docker daemon offers none"):
        client.submit(JOB.model_copy(update={"limits": Limits(gpus=1)}))
    with pytest.raises(BadRequest, match="key = "):
        client.submit(JOB.model_copy(update={"key": "x" * 200}))
    with pytest.raises(BadRequest, match=r"image = 'drydock/none', must be on the list .* \(drydock/base\)"):
        client.submit(JOB.model_copy(update={"image": "drydock/none"}))
    status, answer = ask(served, "POST", "/jobs", {"key": "x" * 200})
    assert (status, "key = " in answer["message"] or "is missing" in answer["message"]) == (400, True)
    assert ask(served, "GET", "/jobs/job-a/files?path=../../etc/passwd")[0] == 400
    assert ask(served, "PUT", "/rooms/..%2fetc", {})[0] in (400, 404)
    assert own(served) == []
    assert [path for path in (served.engine.home / "rooms").glob("*")] == []


def test_an_allowed_image_that_the_daemon_lacks_is_one_line_and_leaves_nothing(docker_daemon, tmp_path):
    (tmp_path / "images.json").write_text(json.dumps({"drydock/base": "sha256:" + "b" * 64}))
    subject = DockerEngine(tmp_path)
    with pytest.raises(BadRequest, match=r"job lawful: its image is not in this Docker daemon; run images/build"):
        subject.submit(JOB.model_copy(update={"folder": str(tmp_path)}))
    label = {"label": f"drydock.site={subject.site}"}
    assert subject.list() == subject.api.networks(filters=label) == []
    assert not subject.api.volumes(filters=label)["Volumes"]


def test_two_jobs_with_one_key_are_one(served, tmp_path):
    client = engine("remote", tmp_path, url=served.url, token=str(served.token))
    try:
        assert client.submit(JOB) == client.submit(JOB) == "job-lawful"
        assert len(own(served)) == 1
    finally:
        client.cancel("job-lawful")


class FakeDevices(DockerEngine):
    """An engine that believes in two GPUs: the daemon is not told of them, the containers bear them."""

    devices = ("GPU-one", "GPU-two")

    def _check(self, job: Job) -> None:
        pass

    def _render(self, job: Job, devices: tuple[str, ...]) -> Any:
        gang = super()._render(job, devices)
        for request in gang.containers.values():
            request["HostConfig"].pop("DeviceRequests", None)
        return gang


def held(subject: Any) -> list[str]:
    return sorted(one["Labels"]["drydock.devices"] for one in subject._holders())


def test_no_two_jobs_share_a_device_whoever_asks_and_whoever_dies(allow_images, tmp_path):
    """Two state folders on one daemon; a lease ends with the container that holds it."""
    for name in ("a", "b"):
        allow_images(tmp_path / name, "drydock/base")
    ours, others = FakeDevices(tmp_path / "a"), FakeDevices(tmp_path / "b")
    one = JOB.model_copy(update={"limits": LIMITS.model_copy(update={"gpus": 1}), "folder": str(tmp_path)})
    try:
        for subject, key in ((ours, "first"), (others, "second")):
            subject.submit(one.model_copy(update={"key": key}))
        assert held(ours) == ["GPU-one", "GPU-two"]
        with pytest.raises(TryAgain, match="1 GPUs, 0 of 2 are free now"):
            ours.submit(one.model_copy(update={"key": "third"}))
        assert [found["Labels"]["drydock.job"] for found in ours.list()] == ["first"]
        ours.api.kill(ours.list()[0]["Id"])  # nobody tells the engine
        while ours.poll("job-first").state == "running":
            pass
        assert others.submit(one.model_copy(update={"key": "third"})) == "job-third"
        assert held(ours) == ["GPU-one", "GPU-two"]
        with pytest.raises(BadRequest, match="3 GPUs, this machine has 2"):
            ours.submit(one.model_copy(update={"key": "large", "limits": LIMITS.model_copy(update={"gpus": 3})}))
    finally:
        ours.remove_all()
        others.remove_all()
    assert held(ours) == []


def test_of_two_state_folders_at_once_one_gets_the_device(allow_images, tmp_path):
    subjects = []
    for number in range(4):
        allow_images(tmp_path / str(number), "drydock/base")
        subjects.append(FakeDevices(tmp_path / str(number)))
    both = JOB.model_copy(update={"limits": LIMITS.model_copy(update={"gpus": 2}), "folder": str(tmp_path)})
    barrier, got = threading.Barrier(4), []

    def submit(subject: FakeDevices) -> None:
        barrier.wait()
        with contextlib.suppress(TryAgain):
            got.append(subject.submit(both))

    threads = [threading.Thread(target=submit, args=(subject,)) for subject in subjects]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) <= 1
        running = [one for one in subjects[0]._holders() if one["State"] == "running"]
        assert len(running) == len(got)
    finally:
        for subject in subjects:
            subject.remove_all()


def test_a_room_goes_there_and_comes_back(served, tmp_path):
    client = engine("remote", tmp_path, url=served.url, token=str(served.token))
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "in").write_text("7")
    script = "cat in > out; ls > list"
    job = JOB.model_copy(update={"command": ("sh", "-c", script), "room": str(tmp_path / "room"), "key": "a-room"})
    handle = client.submit(job)
    while client.poll(handle).state == "running":
        pass
    assert client.fetch(handle, "out", tmp_path / "out") is True
    assert (tmp_path / "out").read_text() == "7"
    assert client.fetch(handle, "nothing", tmp_path / "nothing") is False
    assert not (tmp_path / "nothing").exists()
    assert list((served.engine.home / "rooms").iterdir()) == []
    client.cancel(handle)


def test_no_job_service_and_no_token_are_one_line(served, tmp_path):
    with pytest.raises(TryAgain, match=r"the job service at http://127.0.0.1:9 does not answer"):
        engine("remote", tmp_path, url="http://127.0.0.1:9", token=str(served.token)).poll("job-a")
    with pytest.raises(BadRequest, match="jobs_token = '', must be the file"):
        engine("remote", tmp_path, url=served.url).poll("job-a")
    (tmp_path / "wrong").write_text("wrong")
    with pytest.raises(Refused, match="no token, or a wrong one"):
        engine("remote", tmp_path, url=served.url, token=str(tmp_path / "wrong")).poll("job-a")
