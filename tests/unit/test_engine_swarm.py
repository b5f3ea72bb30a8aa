"""A gang as Swarm's own requests and answers, without a Swarm; the depot and its porters, without containers."""

from __future__ import annotations

import http.client
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.engines.depot import TOKEN, Chunks, read_chunks, serve
from tasks.engines.docker_jobs import status_of
from tasks.engines.hosts import Host, Place, place, read_hosts
from tasks.engines.porter import STARVED, Porter, Superseded, run, starved
from tasks.engines.protocol import Job, JobState, Limits
from tasks.engines.swarm import frames, node_of
from tasks.engines.swarm_gang import render_swarm
from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost, TryAgain
from tasks.store.manifest import write_manifest

IMAGE = "sha256:" + "a" * 64


def job(**more: Any) -> Job:
    facts = {"key": "train-1", "command": ("gang", "--node={node}", "{first}:29400"), "folder": "/x", "nodes": 3}
    return Job(**facts | {"image": "drydock/trainer", "room": "/r", "limits": Limits(gpus=2), "attempt": 4} | more)


def test_nodes_are_jobs_on_their_hosts_with_their_gpus():
    places = (Place("one", ("GPU-a", "GPU-b")), Place("two", ("0", "1")), Place("one", ("GPU-c", "GPU-d")))
    gang = render_swarm(job(), IMAGE, "s", places, "t")
    assert gang.network["Internal"] is gang.network["Attachable"] is True
    placed = [request["task_template"]["Placement"]["Constraints"] for request in gang.services.values()]
    assert placed == [["node.id==one"], ["node.id==two"], ["node.id==one"]]
    request = gang.services[f"{gang.network['Name']}-4-1"]
    assert request["mode"] == {"Replicated": {"Replicas": 1}}
    assert request["endpoint_spec"] == {"Mode": "dnsrr"}
    template = request["task_template"]
    assert template["ContainerSpec"]["Command"][3:] == ["gang", "--node=1", "node-4-0:29400"]
    assert template["RestartPolicy"] == {"Condition": "none"}
    assert "NVIDIA_VISIBLE_DEVICES=0,1" in template["ContainerSpec"]["Env"]
    assert request["labels"]["drydock.devices"] == "two/0,two/1"
    assert template["Networks"] == [{"Target": gang.network["Name"], "Aliases": ["node-4-1"]}]


def test_a_node_has_no_right_and_no_path_of_its_host():
    for request in render_swarm(job(), IMAGE, "s", (Place("one"),), "t").services.values():
        template = request["task_template"]
        container = template["ContainerSpec"]
        assert (container["CapabilityDrop"], container["ReadOnly"]) == (["ALL"], True)
        assert container["Privileges"] == {"NoNewPrivileges": True}
        assert container["User"] == "10001:10001"
        assert {mount["Type"] for mount in container["Mounts"]} == {"volume", "tmpfs"}
        assert all("Source" not in mount for mount in container["Mounts"])
        assert {"Pids", "MemoryBytes", "NanoCPUs"} == set(template["Resources"]["Limits"])
        assert "docker.sock" not in json.dumps(request)


def test_a_key_of_any_length_gives_names_that_a_swarm_takes():
    names = set()
    for key in ("k" * 80, "k" * 79):
        gang = render_swarm(job(key=key, attempt=100), IMAGE, "12345678", (Place("one"),) * 100, "t")
        names |= {gang.network["Name"], *gang.services}
    assert len(names) == 202
    assert max(map(len, names)) <= 63


def test_a_job_without_a_room_needs_no_depot():
    gang = render_swarm(job(room=None, nodes=1), IMAGE, "s", (Place("one"),), "t")
    assert gang.depot is None
    (request,) = gang.services.values()
    container = request["task_template"]["ContainerSpec"]
    assert container["Command"][0] == "gang"
    assert not any(TOKEN in pair for pair in container["Env"])


# --- hosts ---


def host(name: str, is_ready: bool = True, memory: int = 2**33, gpus: int = 2, **more: Any) -> Host:
    ids = tuple(f"{name}{number}" for number in range(gpus))
    free = {"free_memory_bytes": memory, "free_gpus": ids} | more
    return Host(name, f"host-{name}", is_ready, memory, ids, **free)


def where(places: Any) -> str:
    return "".join(place.host for place in places)


def test_nodes_go_to_different_hosts_and_to_the_idle_ones_first():
    hosts = [host("a", gpus=4, num_tasks=2), host("b", gpus=4), host("c", gpus=4, num_tasks=1)]
    assert where(place(job(nodes=2), hosts)) == "bc"
    assert place(job(nodes=4), hosts)[::3] == (Place("b", ("b0", "b1")), Place("b", ("b2", "b3")))
    assert where(place(job(nodes=4), hosts)) == "bcab"
    assert where(place(job(nodes=1), [host("a", free_gpus=("a1",)), host("b", num_tasks=9)])) == "b"


def test_what_is_left_of_the_hosts_takes_the_gang_where_it_can():
    hosts = [host("a", gpus=4), host("b", is_ready=False)]
    assert where(place(job(nodes=2), hosts)) == "aa"
    says = r"bytes of memory and 2 GPUs for node 2 of 3, no host has free now \(1 of 2 are down\); it waits its turn"
    with pytest.raises(TryAgain, match=says):
        place(job(nodes=3), hosts)


def test_a_gang_that_the_swarm_can_never_take_is_refused():
    with pytest.raises(BadRequest, match="and 2 GPUs for node 2 of 3, none of the Swarm's 2 hosts has; lower"):
        place(job(nodes=3), [host("a"), host("b", is_ready=False)])
    with pytest.raises(BadRequest, match="17179869184 bytes of memory for node 0 of 1, none"):
        place(job(nodes=1, limits=Limits(memory_bytes=2**34)), [host("a")])


def test_what_tasks_reserved_is_not_free():
    gpus = [{"NamedResourceSpec": {"Kind": "gpu", "Value": name}} for name in ("x", "y", "z")]
    resources = {"MemoryBytes": 100, "GenericResources": [*gpus, {"DiscreteResourceSpec": {"Kind": "ssd", "Value": 7}}]}
    node = {
        "ID": "a",
        "Description": {"Hostname": "host-a", "Resources": resources},
        "Status": {"State": "ready"},
        "Spec": {"Availability": "active"},
    }

    def task(state: str) -> Any:
        held = {"Resources": {"Reservations": {"MemoryBytes": 30}}}
        return {"NodeID": "a", "Status": {"State": state}, "Spec": held, "GenericResources": gpus[:1]}

    tasks = [task("running"), task("complete"), {"Status": {"State": "pending"}, "Spec": {}}]
    assert read_hosts([node], tasks, {"a/y", "b/z"}) == [Host("a", "host-a", True, 100, ("x", "y", "z"), 70, ("z",), 1)]
    node["Spec"] = {"Availability": "drain"}
    assert not read_hosts([node], [], set())[0].is_ready


# --- what a Swarm answers ---

HOSTS = {
    "up": {"Status": {"State": "ready"}, "Description": {"Hostname": "up"}},
    "off": {"Status": {"State": "down"}, "Description": {"Hostname": "off"}},
}


def node(rank: int, state: str, where: str = "up", code: int = 0, error: str = "") -> Any:
    labels = {"drydock.rank": str(rank), "drydock.nodes": "2"}
    service = {"ID": f"s{rank}", "Spec": {"Name": f"s{rank}", "Labels": labels}}
    status = {"State": state, "Timestamp": f"t{rank}", "ContainerStatus": {"ExitCode": code}, "Err": error}
    return node_of(service, {"Status": status} | ({"NodeID": where} if where else {}), HOSTS)


@pytest.mark.parametrize(
    ("found", "state", "code", "says"),
    [
        ([], JobState.MISSING, None, ""),
        ([("running",), ("preparing",)], JobState.RUNNING, None, ""),
        ([("running",), ("pending", "")], JobState.RUNNING, None, ""),
        ([("complete",), ("complete",)], JobState.SUCCEEDED, 0, ""),
        ([("complete",), ("running",)], JobState.RUNNING, None, ""),
        ([("running",), ("failed", "up", 7)], JobState.FAILED, 7, ""),
        ([("running",), ("running", "off")], JobState.FAILED, 137, "host off is down"),
        ([("complete",), ("complete", "off")], JobState.SUCCEEDED, 0, ""),
        ([("running",)], JobState.FAILED, 1, "lost"),
        ([("running",), ("rejected", "up", 0, "No such image")], JobState.FAILED, 137, "No such image"),
        ([("failed", "up", 1), ("failed", "up", STARVED)], JobState.FAILED, 1, "out of memory"),
    ],
)
def test_a_gang_is_as_its_nodes_are(found, state, code, says):
    status = status_of([node(rank, *facts) for rank, facts in enumerate(found)])
    assert (status.state, status.exit_code, status.cause) == (state, code, says)


def test_a_state_that_nobody_knows_is_an_error():
    with pytest.raises(DrydockError, match="service s0: its task is 'dreaming', which is not known"):
        node(0, "dreaming")


def test_a_log_is_read_frame_by_frame():
    content = b"".join(bytes([1, 0, 0, 0]) + len(text).to_bytes(4, "big") + text for text in (b"one", b"", b"three"))
    assert list(frames(content)) == [b"one", b"", b"three"]
    assert list(frames(b"")) == []


# --- depot and porter ---


@pytest.fixture
def depot(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    room = tmp_path / "depot" / "room"
    room.mkdir(parents=True)
    server = serve(room, 0, "token", "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield room, server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def porter(depot, tmp_path) -> Porter:
    return Porter(tmp_path / "node" / "room", "127.0.0.1", depot[1], "token")


def checkpoint(room: Path, epoch: int, content: str = "w") -> Path:
    folder = room / "checkpoints" / f"epoch-{epoch:05d}"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_text(content)
    write_manifest(folder)
    return folder


def test_a_room_is_brought_and_what_is_new_is_taken_back(depot, porter):
    room, _ = depot
    (room / "arrays").mkdir()
    (room / "arrays" / "x").write_text("7" * 3_000_000)
    checkpoint(room, 1)
    porter.bring()
    assert (porter.room / "arrays" / "x").read_text() == "7" * 3_000_000
    porter.take()
    checkpoint(porter.room, 2, "new")
    half = porter.room / "checkpoints" / "epoch-00003"
    half.mkdir()
    (half / "state.safetensors").write_text("half")
    (porter.room / "history.jsonl").write_text("one\n")
    porter.take()
    assert (room / "checkpoints" / "epoch-00002" / "state.safetensors").read_text() == "new"
    assert not (room / "checkpoints" / "epoch-00003").exists(), "it is not whole"
    assert (room / "history.jsonl").read_text() == "one\n"
    with (porter.room / "history.jsonl").open("a") as stream:
        stream.write("two\n")
    porter.take()
    assert (room / "history.jsonl").read_text() == "one\ntwo\n"


def test_a_checkpoint_that_is_dropped_here_is_dropped_there(depot, porter):
    room, _ = depot
    checkpoint(room, 1)
    porter.bring()
    checkpoint(porter.room, 2)
    porter.take()
    for file in (porter.room / "checkpoints" / "epoch-00001").iterdir():
        file.unlink()
    porter.take()
    assert [path.name for path in (room / "checkpoints").iterdir()] == ["epoch-00002"]


def test_an_attempt_with_an_old_token_is_refused_and_ends(depot, porter):
    room, _ = depot
    porter.bring()
    porter.token = "older"
    write = "import time; open('done.json', 'w').write('{}'); time.sleep(60)"
    with pytest.raises(Superseded, match="what this one writes is refused"):
        run(porter, [sys.executable, "-c", write])
    assert list(room.iterdir()) == []


def test_without_the_token_an_old_attempt_would_write(depot, porter, monkeypatch):
    monkeypatch.setattr("tasks.engines.depot.hmac.compare_digest", lambda given, own: True)
    porter.bring()
    porter.token = "older"
    (porter.room / "done.json").write_text("{}")
    porter.take()
    assert (depot[0] / "done.json").exists()


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_a_porter_ends_as_its_command_did(depot, porter, command, code):
    porter.bring()
    assert run(porter, ["sh", "-c", f"echo x >history.jsonl; {command}"]) == code
    assert (depot[0] / "history.jsonl").read_text() == "x\n"


def test_what_the_kernel_killed_for_memory_is_told(tmp_path):
    for name, text in (
        ("memory.events", "low 0\noom 2\noom_kill 0\n"),
        ("memory.oom_control", "under_oom 0\noom_kill 1\n"),
    ):
        (tmp_path / name).write_text(text)
    assert not starved((str(tmp_path / "memory.events"), str(tmp_path / "nothing")))
    assert starved((str(tmp_path / "memory.oom_control"),))


def test_what_was_cut_on_its_way_is_not_taken(depot):
    room, port = depot
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("PUT", "/room/done.json")
    connection.putheader("Authorization", "Bearer token")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    connection.send(b"200\r\nhalf of it")
    connection.sock.shutdown(1)
    assert connection.getresponse().status == 409
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 2, 5, 9])
def test_chunks_that_were_cut_are_noticed(cut):
    stream = io.BytesIO()
    with Chunks(stream.write) as chunks:
        chunks.write(b"0123")
    content = stream.getvalue()
    assert b"".join(read_chunks(io.BytesIO(content))) == b"0123"
    with pytest.raises(IntegrityLost, match="has no end"):
        list(read_chunks(io.BytesIO(content[:cut])))


@pytest.mark.parametrize("path", ["/room/../../etc/x", "/room/", "/other", "/", "/roomy/x"])
def test_nothing_leads_out_of_the_room(depot, path):
    room, port = depot
    for method in ("PUT", "DELETE"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, path, b"", {"Authorization": "Bearer token"})
        assert connection.getresponse().status in (400, 404)
        assert list(room.iterdir()) == []
