"""The CIS Docker Benchmark 1.6 over containers as ``docker inspect`` tells them: 4.1 and what of section 5 shows there.

``warnings(inspected)`` names the number of each rule that a container breaks; ``EXCEPTIONS`` is the whole list of those
that we accept, with the reason. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Inspected = dict[str, Any]
SENSITIVE = ("/", "/boot", "/dev", "/etc", "/lib", "/proc", "/sys", "/usr")
SOCKET = "docker.sock"


def host(one: Inspected, name: str) -> Any:
    return one["HostConfig"].get(name)


def sources(one: Inspected) -> list[str]:
    return [mount.get("Source", "") for mount in one["Mounts"] if mount["Type"] == "bind"]


def published(one: Inspected) -> list[dict[str, str]]:
    return [at for found in (host(one, "PortBindings") or {}).values() for at in found or []]


def options(one: Inspected) -> list[str]:
    return host(one, "SecurityOpt") or []


# Number -> (what must hold, whether it does).
RULES: dict[str, tuple[str, Callable[[Inspected], bool]]] = {
    "4.1": ("a user of its own", lambda c: c["Config"]["User"].split(":")[0] not in ("", "0", "root")),
    "4.6": ("a health check in the image or the service", lambda c: bool(c["Config"].get("Healthcheck"))),
    "5.2": ("AppArmor, where the host has it", lambda c: c.get("AppArmorProfile") != "unconfined"),
    "5.3": ("SELinux options, where the host has it", lambda c: "label=disable" not in options(c)),
    "5.4": ("no capability", lambda c: host(c, "CapDrop") == ["ALL"] and not host(c, "CapAdd")),
    "5.5": ("not privileged", lambda c: not host(c, "Privileged")),
    "5.6": ("no sensitive folder of the host", lambda c: not set(sources(c)) & set(SENSITIVE)),
    "5.7": ("no sshd", lambda c: "sshd" not in " ".join([c["Path"], *c["Args"]])),
    "5.8": ("no privileged port published", lambda c: all(int(at["HostPort"]) >= 1024 for at in published(c))),
    "5.10": ("a network of its own", lambda c: host(c, "NetworkMode") != "host"),
    "5.11": ("a limit of memory", lambda c: bool(host(c, "Memory"))),
    "5.12": ("a share of the processor", lambda c: bool(host(c, "NanoCpus") or host(c, "CpuShares"))),
    "5.13": ("a read-only root", lambda c: host(c, "ReadonlyRootfs") is True),
    "5.14": ("published on one address", lambda c: all(at["HostIp"] not in ("", "0.0.0.0") for at in published(c))),
    "5.15": ("not restarted for ever on failure", lambda c: host(c, "RestartPolicy")["Name"] != "always"),
    "5.16": ("its own processes", lambda c: host(c, "PidMode") != "host"),
    "5.17": ("its own memory to share", lambda c: host(c, "IpcMode") != "host"),
    "5.18": ("no device of the host", lambda c: not host(c, "Devices")),
    "5.20": ("no shared propagation", lambda c: all(mount.get("Propagation") != "shared" for mount in c["Mounts"])),
    "5.21": ("its own host name", lambda c: host(c, "UTSMode") != "host"),
    "5.22": ("the default seccomp profile", lambda c: "seccomp=unconfined" not in options(c)),
    "5.25": ("a cgroup of Docker's", lambda c: not host(c, "CgroupParent")),
    "5.26": ("no new privileges", lambda c: any(one.startswith("no-new-privileges") for one in options(c))),
    "5.27": ("its health seen", lambda c: bool(c["State"].get("Health"))),
    "5.29": ("a limit of processes", lambda c: (host(c, "PidsLimit") or 0) > 0),
    "5.30": ("not on docker0", lambda c: host(c, "NetworkMode") not in ("default", "bridge")),
    "5.31": ("its own users", lambda c: host(c, "UsernsMode") != "host"),
    "5.32": ("no Docker socket", lambda c: not any(SOCKET in source for source in sources(c))),
}

# (service, number) -> why. `jobs-own`: the containers that the job service starts.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("jobs", "4.1"): "the socket is root's; it has no capability, a read-only root and no way out",
    ("jobs", "5.32"): "it is the one holder of the socket; what it may be asked is tasks/engines/orders.py",
    ("jobs-own", "4.6"): "a step or a rank ends; who started it asks for its state, and ranks have a watchdog",
    ("jobs-own", "5.27"): "likewise",
    ("prepare", "4.6"): "it ends, and the others wait for its exit code",
    ("prepare", "5.27"): "likewise",
}


def service(one: Inspected) -> str:
    """Return the service that a container belongs to."""
    return str(one["Config"]["Labels"].get("com.docker.compose.service") or one["Name"])


def warnings(one: Inspected) -> list[str]:
    """Return what a container breaks, but for the exceptions: ``jobs: 5.5 not privileged``."""
    name = service(one)
    broken = [number for number, (_, holds) in RULES.items() if not holds(one)]
    return [f"{name}: {number} {RULES[number][0]}" for number in broken if (name, number) not in EXCEPTIONS]
