"""What a container is asked of the daemon: the whole request, without a daemon."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from tasks.engines import archive
from tasks.engines.container import render_gang, render_replica
from tasks.engines.container_logs import Gathered, entries
from tasks.engines.docker import DockerEngine
from tasks.engines.images import allowed_images, digest_of_image
from tasks.engines.protocol import Job, Limits, Service
from tasks.spec.errors import BadRequest, IntegrityLost

IMAGE = "sha256:" + "a" * 64


def job(**more) -> Job:
    facts = {
        "key": "train-1",
        "command": ("python3", "-m", "gang", "--node={node}", "{first}:29400"),
        "environment": {"B": "{node}", "A": "1"},
        "folder": "/somewhere",
        "labels": {"workload": "digits"},
        "nodes": 2,
        "attempt": 3,
        "image": "drydock/trainer",
        "limits": Limits(cpus=1.5, memory_bytes=2**30, shm_bytes=2**26, pids=64),
    }
    return Job(**facts | more)


def test_a_gang_is_one_network_one_volume_and_a_container_a_node():
    gang = render_gang(job(), IMAGE, "site1")
    labels = {"drydock.site": "site1", "drydock.job": "train-1"}
    name = "drydock-site1-train-1"
    assert gang.network == {
        "Name": name, "Driver": "bridge", "Internal": True, "CheckDuplicate": True, "Labels": labels,
    }  # fmt: skip
    assert gang.volume == {"Name": name, "Labels": labels}
    assert sorted(gang.containers) == [f"{name}-3-0", f"{name}-3-1"]
    assert gang.containers[f"{name}-3-1"] == {
        "Image": IMAGE,
        "Hostname": "node-1",
        "User": "10001:10001",
        "WorkingDir": "/work/room",
        "Entrypoint": [],
        "Cmd": ["python3", "-m", "gang", "--node=1", "node-0:29400"],
        "Env": ["A=1", "B=1", "NVIDIA_VISIBLE_DEVICES=void"],
        "Labels": labels
        | {"drydock.workload": "digits", "drydock.rank": "1", "drydock.attempt": "3", "drydock.nodes": "2"},
        "StopTimeout": 10,
        "HostConfig": {
            "Memory": 2**30,
            "MemorySwap": 2**30,
            "NanoCpus": 1_500_000_000,
            "PidsLimit": 64,
            "ShmSize": 2**26,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": "rw,nosuid,nodev,size=268435456"},
            "Init": True,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "64m", "max-file": "2"}},
            "NetworkMode": name,
            "Mounts": [{"Type": "volume", "Source": name, "Target": "/work"}],
            "RestartPolicy": {"Name": "no"},
        },
        "NetworkingConfig": {"EndpointsConfig": {name: {"Aliases": ["node-1"]}}},
    }


def test_each_node_gets_its_own_leased_devices():
    gang = render_gang(job(limits=Limits(gpus=2)), IMAGE, "site1", ("GPU-a", "GPU-b", "GPU-c", "GPU-d"))
    asked = [request["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] for request in gang.containers.values()]
    assert asked == [["GPU-a", "GPU-b"], ["GPU-c", "GPU-d"]]


def test_gpus_that_are_not_leased_are_asked_for_by_number():
    for request in render_gang(job(limits=Limits(gpus=2)), IMAGE, "site1").containers.values():
        wanted = {"Driver": "nvidia", "Capabilities": [["gpu"]], "Count": 2}
        assert request["HostConfig"]["DeviceRequests"] == [wanted]


def test_no_container_holds_the_socket_or_a_right():
    service = Service(name="digits-1", command=("serve", "{port}"), folder="/x", mounts={"/package": "/home/p"})
    requests = list(render_gang(job(), IMAGE, "s").containers.values())
    for request in (*requests, render_replica(service, 0, 20001, IMAGE, "s", "n")):
        host, text = request["HostConfig"], json.dumps(request)
        assert "docker.sock" not in text
        rights = {"Privileged", "CapAdd", "PidMode", "IpcMode", "Devices", "Binds", "Runtime", "UsernsMode"}
        assert not rights & set(host)
        assert host["ReadonlyRootfs"] is True
        assert request["Image"].startswith("sha256:")
        assert all(mount["Type"] == "volume" or mount["ReadOnly"] for mount in host["Mounts"])


def test_a_replica_is_published_on_the_loopback_alone():
    service = Service(name="digits-1", command=("serve", "--port={port}"), folder="/x", labels={"workload": "digits"})
    request = render_replica(service, 1, 20001, IMAGE, "site1", "serving")
    assert request["HostConfig"]["PortBindings"] == {"20001/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}]}
    assert request["Cmd"] == ["serve", "--port=20001"]
    assert json.loads(request["Labels"]["drydock.facts"]) == {"workload": "digits"}


@pytest.mark.parametrize("key", ["x" * 200, "../x", "", "A", "a b"])
def test_a_key_that_names_no_container_is_refused(key):
    with pytest.raises(BadRequest, match="key = "):
        Job.parse({"key": key, "command": ["true"], "folder": "/x"}, "job")


def test_a_gang_of_several_nodes_needs_an_image():
    with pytest.raises(BadRequest, match="nodes = 2, must be 1 without an image"):
        Job.parse({"key": "a", "command": ["true"], "folder": "/x", "nodes": 2}, "job")


def test_an_image_is_named_from_the_list_and_stands_for_a_digest(tmp_path):
    with pytest.raises(BadRequest, match=r"image = 'drydock/trainer', must be on .*none yet: run images/build"):
        digest_of_image("drydock/trainer", tmp_path)
    (tmp_path / "images.json").write_text(json.dumps({"drydock/trainer": IMAGE}))
    assert digest_of_image("drydock/trainer", tmp_path) == IMAGE
    for name in (None, "drydock/trainer:latest", "debian", IMAGE):
        with pytest.raises(BadRequest, match=r"must be on the list of allowed images \(drydock/trainer\)"):
            DockerEngine(tmp_path).render(job(image=name, nodes=1))


@pytest.mark.parametrize("text", ["{", '["a"]', '{"a": "latest"}', '{"a": 7}'])
def test_a_list_of_images_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "images.json").write_text(text)
    with pytest.raises(IntegrityLost, match=r"images\.json: .*run images/build again"):
        allowed_images(tmp_path)


# --- rooms as tar streams ---


def made(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "arrays").mkdir(parents=True)
    (source / "arrays" / "x.npy").write_bytes(bytes(range(256)) * 9000)
    (source / "train.json").write_text("{}")
    (source / ".working").write_text("not yet")
    (source / "link").symlink_to("/etc/passwd")
    return source


def test_a_room_goes_over_and_comes_back(tmp_path):
    source = made(tmp_path)
    with archive.pack(source, "room", 10001) as stream, tarfile.open(fileobj=stream) as packed:
        names = {entry.name: entry for entry in packed}
        files = {"room", "room/arrays", "room/arrays/x.npy", "room/train.json"}
        assert set(names) == files, "neither work in progress nor a link"
        assert {entry.uid for entry in names.values()} == {10001}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as back:
        back.add(source / "arrays", "arrays")
    content = stream.getvalue()
    archive.unpack((content[i : i + 1000] for i in range(0, len(content), 1000)), tmp_path / "back")
    assert (tmp_path / "back" / "x.npy").read_bytes() == (source / "arrays" / "x.npy").read_bytes()
    with pytest.raises(IntegrityLost):
        archive.unpack([content[:5000]], tmp_path / "cut")
    assert sorted(os.listdir(tmp_path)) == ["back", "source"], "complete, or not at all"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_what_comes_back_and_is_no_plain_file_is_not_taken(tmp_path, kind):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as back:
        entry = tarfile.TarInfo("weights")
        entry.type, entry.linkname = kind, "/etc/passwd"
        back.addfile(entry)
    with pytest.raises(IntegrityLost, match="which is no plain file"):
        archive.unpack([stream.getvalue()], tmp_path / "weights")


def test_what_went_while_it_was_packed_is_not_there(tmp_path):
    """The daemon answers with an archive of nothing where a file is replaced under its hands."""
    stream = io.BytesIO()
    tarfile.open(fileobj=stream, mode="w").close()
    assert archive.unpack([stream.getvalue()], tmp_path / "history.jsonl") is False
    assert os.listdir(tmp_path) == []


def test_what_would_leave_the_folder_is_not_taken(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as back:
        entry = tarfile.TarInfo("../outside")
        entry.size = 1
        back.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(IntegrityLost):
        archive.unpack([stream.getvalue()], tmp_path / "room" / "weights")
    assert not (tmp_path / "room" / "outside").exists()


# --- logs ---


def test_lines_of_several_nodes_come_once_in_the_order_of_their_time(tmp_path):
    log = Gathered(tmp_path / "logs", "job-1")
    log.begin(tmp_path / "job.log")
    prefixes = {"a": b"[node 0] ", "b": b"[node 1] "}
    first = {"a": [("2026-01-01T00:00:01.1Z", b"one\n")], "b": [("2026-01-01T00:00:01.05Z", b"two\n")]}
    padded = {name: list(entries(f"{time} ".encode() + line for time, line in lines)) for name, lines in first.items()}
    for _ in range(2):
        log.gather(padded, prefixes)
    text, offset = log.read(0)
    assert text == "[node 1] two\n[node 0] one\n"
    log.gather({"a": [*padded["a"], ("2026-01-01T00:00:02.000000000", b"three\n")]}, prefixes)
    assert log.read(offset)[0] == "[node 0] three\n"
