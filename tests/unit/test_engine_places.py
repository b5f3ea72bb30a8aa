"""What a stack's job service gives to others: what is mounted in it and named here, no more. Pure."""

from __future__ import annotations

import pytest

from tasks.engines.container import REPLICA_PORT, render_gang, render_replica_inside, replica_host
from tasks.engines.places import PROJECT, places_of
from tasks.engines.protocol import Job, Service
from tasks.spec.errors import BadRequest

IMAGE = "sha256:" + "a" * 64
OWN = {
    "Config": {"Labels": {PROJECT: "p"}},
    "NetworkSettings": {"Networks": {"p_internal": {}, "p_other": {}}},
    "Mounts": [
        {"Type": "volume", "Name": "p_state", "Source": "/v/state", "Destination": "/state"},
        {"Type": "volume", "Name": "p_packages", "Source": "/v/packages", "Destination": "/state/packages"},
        {"Type": "bind", "Source": "/var/run/docker.sock", "Destination": "/var/run/docker.sock"},
        {"Type": "bind", "Source": "/h/jobs-token", "Destination": "/run/secrets/jobs-token"},
        {"Type": "volume", "Name": "p_jobs", "Source": "/v/jobs", "Destination": "/jobs"},
    ],
}


def test_a_step_gets_state_and_secrets_and_a_replica_packages_alone():
    places = places_of(OWN, "internal")
    assert places.network == "p_internal"
    assert {mount["Target"]: mount["ReadOnly"] for mount in places.of_step} == {
        "/state": False,
        "/state/packages": False,
        "/run/secrets/jobs-token": True,
    }
    assert {mount["Target"]: mount["ReadOnly"] for mount in places.of_replica} == {"/state/packages": True}
    assert places.of_replica[0]["Source"] == "p_packages"


def test_a_job_inside_is_one_container_on_the_stacks_network():
    places = places_of(OWN, "internal")
    job = Job(key="clean-1", command=("true",), folder="/x", image="drydock/airflow", inside=True)
    gang = render_gang(job, IMAGE, places.site, places=places)
    assert (gang.network, gang.volume, len(gang.containers)) == (None, None, 1)
    (request,) = gang.containers.values()
    assert request["HostConfig"]["NetworkMode"] == "p_internal"
    assert request["HostConfig"]["CapDrop"] == ["ALL"]
    assert "docker.sock" not in str(request)
    assert request["Labels"][PROJECT] == "p"


def test_a_replica_inside_is_published_nowhere_and_has_a_short_name():
    places = places_of(OWN, "internal")
    service = Service(name="w" * 79, command=("serve", "{port}"), folder="/x")
    request = render_replica_inside(service, 3, IMAGE, places)
    assert "PortBindings" not in request["HostConfig"]
    assert request["Cmd"] == ["serve", str(REPLICA_PORT)]
    name = replica_host(service.name, 3)
    assert len(name) < 63
    assert request["NetworkingConfig"]["EndpointsConfig"]["p_internal"]["Aliases"] == ["replica", name]
    assert name != replica_host(service.name, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"Mounts": []}, "no volume at /state"),
        ({"NetworkSettings": {"Networks": {"bridge": {}}}}, "no network 'internal'"),
        ({"Config": {"Labels": {}}}, "no network 'internal' of a compose project"),
    ],
)
def test_outside_of_a_stack_there_are_no_places(change, says):
    with pytest.raises(BadRequest, match=says):
        places_of(OWN | change, "internal")
