"""The checker of the CIS rules: it warns of what it must, so that its silence says something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "images"))
import cis

GOOD: dict[str, Any] = {
    "Name": "/x",
    "Path": "python",
    "Args": [],
    "AppArmorProfile": "",
    "State": {"Health": {"Status": "healthy"}},
    "Config": {"User": "10001:10001", "Healthcheck": {"Test": ["CMD", "true"]}, "Labels": {}},
    "Mounts": [{"Type": "volume", "Source": "/v", "Propagation": ""}],
    "HostConfig": {
        "CapDrop": ["ALL"],
        "Memory": 1,
        "NanoCpus": 1,
        "ReadonlyRootfs": True,
        "RestartPolicy": {"Name": "unless-stopped"},
        "SecurityOpt": ["no-new-privileges:true"],
        "PidsLimit": 1,
        "NetworkMode": "own",
        "PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]},
    },
}


def test_a_good_container_breaks_nothing():
    assert cis.warnings(GOOD) == []


@pytest.mark.parametrize(
    ("number", "change"),
    [
        ("4.1", {"Config": GOOD["Config"] | {"User": "0:0"}}),
        ("4.6", {"Config": GOOD["Config"] | {"Healthcheck": None}}),
        ("5.4", {"CapDrop": None}),
        ("5.4", {"CapAdd": ["SYS_ADMIN"]}),
        ("5.5", {"Privileged": True}),
        ("5.6", {"Mounts": [{"Type": "bind", "Source": "/etc"}]}),
        ("5.7", {"Path": "/usr/sbin/sshd"}),
        ("5.8", {"PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "80"}]}}),
        ("5.10", {"NetworkMode": "host"}),
        ("5.11", {"Memory": 0}),
        ("5.12", {"NanoCpus": 0}),
        ("5.13", {"ReadonlyRootfs": False}),
        ("5.14", {"PortBindings": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}]}}),
        ("5.15", {"RestartPolicy": {"Name": "always"}}),
        ("5.16", {"PidMode": "host"}),
        ("5.17", {"IpcMode": "host"}),
        ("5.18", {"Devices": [{"PathOnHost": "/dev/sda"}]}),
        ("5.20", {"Mounts": [{"Type": "bind", "Source": "/x", "Propagation": "shared"}]}),
        ("5.21", {"UTSMode": "host"}),
        ("5.22", {"SecurityOpt": ["no-new-privileges:true", "seccomp=unconfined"]}),
        ("5.26", {"SecurityOpt": []}),
        ("5.27", {"State": {}}),
        ("5.29", {"PidsLimit": None}),
        ("5.30", {"NetworkMode": "bridge"}),
        ("5.31", {"UsernsMode": "host"}),
        ("5.32", {"Mounts": [{"Type": "bind", "Source": "/var/run/docker.sock"}]}),
    ],
)
def test_a_broken_rule_is_named(number, change):
    top = {name: value for name, value in change.items() if name in GOOD}
    host = {name: value for name, value in change.items() if name not in GOOD}
    found = cis.warnings(GOOD | top | {"HostConfig": GOOD["HostConfig"] | host})
    assert [line.split()[1] for line in found] == [number]


def test_each_exception_has_its_reason():
    assert all(number in cis.RULES and len(why) > 5 for (_, number), why in cis.EXCEPTIONS.items())
