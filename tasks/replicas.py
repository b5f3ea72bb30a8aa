"""The replicas of a version: started from a verified package, asked how they are, stopped."""

from __future__ import annotations

import http.client
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from tasks.engines.protocol import Limits, Replica, Service
from tasks.registry import versions
from tasks.registry.holdout import load_holdout, request_of
from tasks.release.evidence import REPLAYED
from tasks.release.model import Version, service_name
from tasks.site import Site
from tasks.spec.errors import Refused, TryAgain
from tasks.spec.load import load_workload
from tasks.spec.workload import Serve
from tasks.store.manifest import verify
from tasks.store.sign import verify_folder_signature

POLL_SECONDS = 0.1
# Of a replica that is a container.
IMAGE, MEMORY_BYTES = "drydock/server", 1 << 30
ANSWERS = re.compile(
    r'^drydock_answers_total\{label="((?:[^"\\]|\\.)*)",replayed="(true|false)"\} (\S+)$', re.MULTILINE
)


def start_replicas(workload: str, target: Version, site: Site) -> Any:
    """Verify the target's package, fetched from the registry where it is not at hand, and start its replicas."""
    package = package_at_hand(workload, target, site) or fetch_package(workload, target, site)
    service = service_for(workload, target, str(package), load_workload(site.workloads, workload).serve, site)
    return site.engine.start(service)


def package_at_hand(workload: str, target: Version, site: Site) -> Path | None:
    """Return the folder of the target's package, verified and its signature too; None where it is not here."""
    folder = site.packages / target.digest_sha256
    if not folder.is_dir():
        return None
    verify(folder, target.digest_sha256)
    verify_folder_signature(folder, site.keys)
    return folder


def fetch_package(workload: str, target: Version, site: Site) -> Path:
    registered = versions.get(site.mlflow, workload, target.version)
    if registered.package_sha256 != target.digest_sha256:
        found = registered.package_sha256[:12]
        raise Refused(f"{workload} version {target.version}: holds package {found}, not {target.digest_sha256[:12]}")
    return versions.fetch(site.mlflow, registered, site.packages, site.keys)


def service_for(workload: str, target: Version, package: str, serve: Serve, site: Site) -> Service:
    """Return the service of one version: the command that each replica runs. Pure."""
    options = {
        "--package": package,
        "--digest": target.digest_sha256,
        "--keys": str(site.keys),
        "--port": "{port}",
        # Envoy is the only door, whatever address the gateway listens on.
        "--host": "127.0.0.1",
        "--version": target.version,
        "--max-batch-rows": serve.max_batch_rows,
        "--max-body-bytes": serve.max_body_bytes,
        "--max-queue": serve.max_queue,
        "--max-batch-ms": serve.max_batch_ms,
        "--threads": serve.threads,
        "--cache-bytes": serve.cache_bytes,
        "--log-ratio": serve.log.ratio,
        "--log-per-second": serve.log.max_per_second,
        "--log-days": serve.log.days,
        "--log-folder": str(site.home / "predictions" / workload),
    }
    contained = site.settings.engine != "process"
    # A container is asked from outside of it, and sees of the keys the public one, which lies beside the packages.
    options |= {"--host": "0.0.0.0", "--keys": str(site.packages)} if contained else {}
    arguments = [str(part) for pair in options.items() for part in pair]
    return Service(
        name=service_name(workload, target.digest_sha256),
        command=("python" if contained else sys.executable, "-m", "tasks.serve", *arguments),
        environment={"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(serve.threads)},
        folder=str(site.home / "logs" / service_name(workload, target.digest_sha256)),
        replicas=serve.replicas,
        labels={"workload": workload, "version": target.version, "digest": target.digest_sha256},
        image=IMAGE if contained else None,
        limits=Limits(cpus=serve.threads, memory_bytes=MEMORY_BYTES, pids=128),
    )


def await_ready(workload: str, target: Version, site: Site) -> list[str]:
    """Wait until all replicas answer that they are ready; return their endpoints, host:port."""
    name = service_name(workload, target.digest_sha256)
    seconds = load_workload(site.workloads, workload).rollout.ready_seconds
    until = time.monotonic() + seconds
    while True:
        replicas = site.engine.replicas(name)
        if replicas and all(is_ready(replica.url) for replica in replicas):
            return [f"{replica.host}:{replica.port}" for replica in replicas]
        if time.monotonic() > until:
            raise Refused(f"{name}: not ready after {seconds} s; see ./drydock logs {name}")
        time.sleep(POLL_SECONDS)


def ready_endpoints(workload: str, target: Version, site: Site) -> list[str]:
    """Return the endpoints of all running replicas if one of them is ready, else none (the reconciler asks)."""
    replicas = [r for r in site.engine.replicas(service_name(workload, target.digest_sha256)) if r.running]
    if not any(is_ready(replica.url) for replica in replicas):
        return []
    return [f"{replica.host}:{replica.port}" for replica in replicas]


def is_ready(url: str) -> bool:
    """Whether a replica says that it is ready: it has verified its package and answered the golden sample."""
    # Asked ten times a second during a rollout; plain http.client heeds no proxy and loads no certificates.
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def served_digests(workload: str, site: Site) -> set[str]:
    """Return the package digests of every version that serves or has served."""
    return {row.digest_sha256 for row in site.ledger.history(workload) if row.kind == "commit"}


def retire_replicas(workload: str, champion: Version, site: Site) -> list[str]:
    """Drain and stop the services of versions that served before the champion; return their names.

    The candidate of another release stays: one that never served, or that comes again.
    """
    rollout = site.rollouts.active(workload)
    again = {rollout.candidate.digest_sha256} if rollout else set()
    replaced = served_digests(workload, site) - {champion.digest_sha256} - again
    stopped = []
    for replica in site.engine.replicas():
        labels = replica.labels
        if labels.get("workload") == workload and labels.get("digest") in replaced:
            site.engine.drain(replica.service)
            stopped.append(replica.service)
    return sorted(set(stopped))


def answers(workload: str, target: Version, site: Site) -> dict[str, int]:
    """Return how often the replicas of a version gave each answer, as they count it themselves; answers to replayed
    requests under a name of their own (``evidence.REPLAYED``).

    Raises:
        TryAgain: one of them does not say.
    """
    counts: dict[str, int] = {}
    for replica in site.engine.replicas(service_name(workload, target.digest_sha256)):
        page = _metrics(replica)
        for label, replayed, count in ANSWERS.findall(page):
            name = REPLAYED + label if replayed == "true" else label
            counts[name] = counts.get(name, 0) + int(float(count))
    return counts


def _metrics(replica: Replica) -> str:
    connection = http.client.HTTPConnection(replica.host, replica.port, timeout=2)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(f"{replica.service}: its metrics do not answer: {type(error).__name__}") from None
    finally:
        connection.close()


def holdout_requests(workload: str, target: Version, site: Site) -> list[bytes]:
    """Return the requests that a rollout replays: one for each row of the holdout that was kept with the version.

    Raises:
        TryAgain: they are not at hand, and MLflow can't be reached.
    """
    from tasks.serve.package import PAPER, Signature

    registered = versions.get(site.mlflow, workload, target.version)
    paper = json.loads((site.packages / target.digest_sha256 / PAPER).read_text())
    feature = Signature.parse(paper, PAPER).feature
    rows = load_holdout(site.mlflow, registered, site.packages)
    return [json.dumps(request_of(feature, row)).encode() for row in rows]


def stop_replicas(workload: str, target: Version, site: Site) -> None:
    """Tell all replicas of a version to end; they answer what they have. Idempotent."""
    site.engine.drain(service_name(workload, target.digest_sha256))
