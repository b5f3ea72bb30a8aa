"""One suite for every engine: what the job and the service protocol promise, whatever runs underneath."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tasks.engines import ENGINES, engine
from tasks.engines.protocol import Job, JobState, JobStatus, Service
from tasks.spec.errors import BadRequest

# The first test of an engine in containers may have to make the base image: a minute or two.
pytestmark = pytest.mark.timeout(300)

# Each job carries its own script, which the process engine's shell and the fake's behaviour both follow.
SCRIPT = 'printf %b "$PRINTS"; while [ "$EXITS" = never ]; do sleep 0.05; done; exit "$EXITS"'


@pytest.fixture(scope="module", params=["process", "docker", "remote", "swarm", "fake"])
def subject(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    if request.param in ("docker", "remote", "swarm"):
        request.getfixturevalue("allow_images")(home, "drydock/base")
    if request.param == "remote":
        with request.getfixturevalue("job_service")(home) as served:
            yield engine("remote", home / "client", url=served.url, token=str(served.token))
        return
    if request.param == "swarm":
        with request.getfixturevalue("swarm_of")("drydock/base") as hosts, pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_HOST", hosts[0].address)
            built = engine("swarm", home)
            yield built
            built.remove_all()
            until = time.monotonic() + 20
            while any(host.docker("ps", "--all", "--quiet") for host in hosts):
                assert time.monotonic() < until, "containers are left on a host"
                time.sleep(0.2)
        return
    built = engine(request.param, home)
    if request.param == "process":
        built.supervisor.start()
        yield built
        built.supervisor.stop()
    elif request.param == "docker":
        yield built
        built.remove_all()
    else:
        built.behaviour = lambda job: _play(built, job)
        yield built


def _play(fake, job: Job) -> int | None:
    fake.write(f"job-{job.key}", job.environment["PRINTS"].replace("\\n", "\n"))
    return None if job.environment["EXITS"] == "never" else int(job.environment["EXITS"])


@pytest.fixture
def job(request, tmp_path):
    name = request.node.originalname.removeprefix("test_").replace("_", "-")[:60]

    def build(exits: str = "0", prints: str = "", key: str = name) -> Job:
        environment = {"EXITS": exits, "PRINTS": prints}
        command, folder = ("sh", "-c", SCRIPT), str(tmp_path / key)
        return Job(key=key, command=command, environment=environment, folder=folder, image="drydock/base")

    return build


@pytest.fixture
def service(request, subject, tmp_path):
    name = request.node.originalname.removeprefix("test_").replace("_", "-")[:40]

    def build(replicas: int = 1) -> Service:
        command = ("sh", "-c", "while :; do sleep 0.05; done", "server", "{port}")
        labels = {"workload": "digits", "note": 'it\'s 100 % "quoted"; # ok\n'}
        facts = {"folder": str(tmp_path), "labels": labels, "image": "drydock/base"}
        return Service(name=name, command=command, replicas=replicas, **facts)

    yield build
    subject.stop(name)


def _ended(subject, handle: str) -> JobStatus:
    deadline = time.monotonic() + 20
    while (status := subject.poll(handle)).state is JobState.RUNNING:
        assert time.monotonic() < deadline, f"{handle} still runs"
        time.sleep(0.02)
    return status


def _printed(subject, handle: str) -> None:
    deadline = time.monotonic() + 20
    while not _log(subject, handle):
        assert time.monotonic() < deadline, f"{handle} prints nothing"
        time.sleep(0.02)


def _log(subject, handle: str) -> str:
    text, offset = subject.logs(handle)
    while (more := subject.logs(handle, offset))[0]:
        text, offset = text + more[0], more[1]
    return text


def test_render_is_pure(subject, job):
    assert subject.render(job()) == subject.render(job())
    assert subject.poll(f"job-{job().key}").state is JobState.MISSING


def test_a_job_succeeds(subject, job):
    assert _ended(subject, subject.submit(job())) == JobStatus(state=JobState.SUCCEEDED, exit_code=0)


def test_a_job_fails_with_its_code(subject, job):
    assert _ended(subject, subject.submit(job("30"))) == JobStatus(state=JobState.FAILED, exit_code=30)


def test_an_unknown_job_is_missing(subject):
    assert subject.poll("job-nobody") == JobStatus(state=JobState.MISSING)
    assert subject.poll("../../etc/passwd").state is JobState.MISSING
    assert subject.logs("job-nobody", 7) == ("", 7)
    assert subject.logs("../../etc/passwd") == ("", 0)


def test_the_log_goes_on_from_an_offset(subject, job):
    handle = subject.submit(job(prints="drydock: Größe 7"))
    _ended(subject, handle)
    text, offset = subject.logs(handle)
    assert (text, offset) == ("drydock: Größe 7", len(text.encode()))
    assert subject.logs(handle, 9) == ("Größe 7", offset)
    assert subject.logs(handle, offset) == ("", offset)


def test_a_running_job_is_adopted(subject, job):
    handle = subject.submit(job("never", prints="once\\n"))
    assert subject.poll(handle) == JobStatus(state=JobState.RUNNING)
    assert subject.submit(job("never", prints="once\\n")) == handle
    _printed(subject, handle)
    subject.cancel(handle)
    assert _log(subject, handle) == "once\n"


def test_a_succeeded_job_is_adopted(subject, job):
    handle = subject.submit(job(prints="once"))
    _ended(subject, handle)
    assert subject.submit(job(prints="once")) == handle
    assert _ended(subject, handle).state is JobState.SUCCEEDED
    assert _log(subject, handle) == "once"


def test_a_failed_job_is_started_again(subject, job):
    handle = subject.submit(job("20", prints="first "))
    assert _ended(subject, handle).state is JobState.FAILED
    assert subject.submit(job("0", prints="second")) == handle
    assert _ended(subject, handle) == JobStatus(state=JobState.SUCCEEDED, exit_code=0)
    assert _log(subject, handle) == "first second"


def test_cancel_ends_a_job_and_may_be_repeated(subject, job):
    handle = subject.submit(job("never"))
    for _ in range(2):
        subject.cancel(handle)
        assert subject.poll(handle).state is JobState.MISSING
    subject.cancel("job-nobody")


def test_a_cancelled_job_can_be_submitted_again(subject, job):
    subject.cancel(subject.submit(job("never")))
    assert _ended(subject, subject.submit(job("0"))).state is JobState.SUCCEEDED


def test_forget_drops_an_ended_job_and_keeps_its_log(subject, job):
    handle = subject.submit(job(prints="kept"))
    _ended(subject, handle)
    for _ in range(2):
        subject.forget(handle)
        assert subject.poll(handle).state is JobState.MISSING
    assert _log(subject, handle) == "kept"


def test_forget_refuses_a_running_job(subject, job):
    handle = subject.submit(job("never"))
    with pytest.raises(BadRequest, match="cancel it first"):
        subject.forget(handle)
    subject.cancel(handle)


def test_poll_may_be_called_from_threads(subject, job):
    handle = subject.submit(job("never"))
    states: list[JobState] = []
    threads = [threading.Thread(target=lambda: states.append(subject.poll(handle).state)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == [JobState.RUNNING] * 8
    subject.cancel(handle)


def test_a_service_starts_its_replicas(subject, service):
    found = subject.start(service(2))
    assert [(replica.service, replica.index) for replica in found] == [
        (service().name, 0),
        (service().name, 1),
    ]
    assert all(replica.running for replica in found)
    assert len({replica.port for replica in found}) == 2
    assert all(replica.labels == service().labels for replica in found)
    assert found[0].url == f"http://127.0.0.1:{found[0].port}"


def test_start_leaves_running_replicas_alone(subject, service):
    assert subject.start(service(2)) == subject.start(service(2)) == subject.replicas(service().name)


def test_start_adjusts_the_number_of_replicas(subject, service):
    one = subject.start(service(1))
    three = subject.start(service(3))
    assert three[:1] == one
    assert [replica.index for replica in three] == [0, 1, 2]
    assert subject.start(service(2)) == three[:2]


def test_stop_removes_a_service_and_may_be_repeated(subject, service):
    subject.start(service(2))
    for _ in range(2):
        subject.stop(service().name)
        assert subject.replicas(service().name) == ()


def test_drained_replicas_are_none_at_once_and_can_be_started_again(subject, service):
    subject.start(service(2))
    for _ in range(2):
        subject.drain(service().name)
        assert subject.replicas(service().name) == ()
    assert [replica.running for replica in subject.start(service(2))] == [True, True]


def test_what_is_drained_and_still_answers_is_not_waited_for(subject, service):
    """A server that has a long request: told to end, it takes its time, and new ones are wanted now."""
    slow = "trap 'sleep 5; exit' TERM; while :; do sleep 0.05; done"
    lasting = service(1).model_copy(update={"command": ("sh", "-c", slow, "server", "{port}")})
    subject.start(lasting)
    time.sleep(0.3)
    subject.drain(lasting.name)
    began = time.monotonic()
    assert [replica.running for replica in subject.start(lasting)] == [True]
    assert time.monotonic() - began < 4


def test_an_unknown_service_has_no_replicas(subject):
    assert subject.replicas("nobody") == ()
    subject.stop("nobody")


def test_services_with_like_names_are_kept_apart(subject, service, tmp_path):
    other = service().model_copy(update={"name": f"{service().name}-1"})
    subject.start(service(2))
    subject.start(other)
    assert {replica.service for replica in subject.replicas()} >= {service().name, other.name}
    subject.stop(other.name)
    assert len(subject.replicas(service().name)) == 2
    assert subject.replicas(other.name) == ()


def test_an_unknown_engine_is_refused_with_the_known_ones():
    known = r"\['docker', 'fake', 'process', 'remote', 'swarm'\]"
    with pytest.raises(BadRequest, match=f"engine = 'slurm', must be one of {known}"):
        engine("slurm", Path("/nowhere"))


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_every_engine_has_both_protocols(name, tmp_path):
    built = engine(name, tmp_path)
    for method in ("render", "submit", "poll", "logs", "cancel", "start", "replicas", "drain", "stop", "forget"):
        assert callable(getattr(built, method))
