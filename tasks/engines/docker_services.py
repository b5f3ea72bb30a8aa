"""Services on a Docker daemon: each replica a container that the daemon restarts, published on 127.0.0.1."""

from __future__ import annotations

import json
from typing import Any

from tasks.engines.container import LABEL, render_replica, render_replica_inside
from tasks.engines.docker_client import ALIVE, Daemon, each, tolerating_missing, translated
from tasks.engines.images import digest_of_image
from tasks.engines.ports import HOST, choose_port, is_free
from tasks.engines.protocol import Replica, Service


class DockerServices(Daemon):
    """The service protocol. All raise TryAgain where the daemon does not answer."""

    def start(self, service: Service) -> tuple[Replica, ...]:
        """Start the replicas that don't run, end those beyond the count, and return the rest."""
        image = digest_of_image(service.image, self.home)
        with self.lock(f"service-{service.name}"), translated(f"service {service.name}"):
            network = self._serving_network()
            known = {int(one["Labels"][f"{LABEL}.index"]): one for one in self._replicas(service.name)}
            self.remove([one for index, one in known.items() if index >= service.replicas])
            for index in range(service.replicas):
                if index not in known or known[index]["State"] not in ("running", "restarting"):
                    self._start_replica(service, index, known.get(index), image, network)
            return self.replicas(service.name)

    def replicas(self, name: str | None = None) -> tuple[Replica, ...]:
        """Return the replicas of one service, or of all, by service and index."""
        with translated("services"):
            found = [_replica(one) for one in self._replicas(name)]
        return tuple(sorted(found, key=lambda replica: (replica.service, replica.index)))

    def drain(self, name: str) -> None:
        """Tell all replicas to end and return: they answer what they have, and are no replicas any more. Those that
        ended since an earlier drain are cleared away. Idempotent."""
        with self.lock(f"service-{name}"), translated(f"service {name}"):
            for one in self._replicas(name):
                with tolerating_missing():
                    self.api.update_container(one["Id"], restart_policy={"Name": "no"})
                    self.api.rename(one["Id"], f"{LABEL}-{self.site}-draining-{one['Id'][:12]}")
                    self.api.kill(one["Id"], "SIGTERM")
        self.clear_drained()

    def clear_drained(self) -> None:
        """Remove the replicas that were told to end and have ended. Idempotent."""
        with translated("services"):
            self.remove([one for one in self._draining() if one["State"] not in ALIVE])

    def stop(self, name: str) -> None:
        """End all replicas at once (SIGTERM, SIGKILL after 10 s) and remove the service. Idempotent."""
        with self.lock(f"service-{name}"), translated(f"service {name}"):
            label = f"{LABEL}.service"
            found = [*self._replicas(name), *(one for one in self._draining() if one["Labels"][label] == name)]
            each(found, lambda one: self.stop_container(one["Id"]))
            self.remove(found)

    def _replicas(self, name: str | None) -> list[dict[str, Any]]:
        label = f"{LABEL}.service" + (f"={name}" if name else "")
        return [one for one in self.list(label) if not _is_draining(one)]

    def _draining(self) -> list[dict[str, Any]]:
        return [one for one in self.list(f"{LABEL}.service") if _is_draining(one)]

    def _start_replica(
        self, service: Service, index: int, known: dict[str, Any] | None, image: str, network: str
    ) -> None:
        name = f"{LABEL}-{self.site}-svc-{service.name}-{index}"
        if self.places:
            self.remove([known] if known else [])
            request = render_replica_inside(service, index, image, self.places)
            self.api.start(self.api.create_container_from_config(request, name)["Id"])
            return
        # The port is taken once the container exists, so two starters choose one after the other.
        with self.lock("ports"):
            before = int(known["Labels"][f"{LABEL}.port"]) if known else None
            taken = {replica.port for replica in self.replicas()}
            self.remove([known] if known else [])
            port = before if before and is_free(before) else choose_port(taken)
            request = render_replica(service, index, port, image, self.site, network)
            self.api.start(self.api.create_container_from_config(request, name)["Id"])

    def _serving_network(self) -> str:
        if self.places:
            return self.places.network
        name = f"{LABEL}-{self.site}-serving"
        if not self.api.networks(names=[name]):
            self.api.create_network(name, driver="bridge", labels={f"{LABEL}.site": self.site})
        return name


def _replica(one: dict[str, Any]) -> Replica:
    labels = one["Labels"]
    return Replica(
        service=labels[f"{LABEL}.service"],
        index=int(labels[f"{LABEL}.index"]),
        host=labels.get(f"{LABEL}.host", HOST),
        port=int(labels[f"{LABEL}.port"]),
        running=one["State"] == "running",
        labels=json.loads(labels[f"{LABEL}.facts"]),
    )


def _is_draining(one: dict[str, Any]) -> bool:
    return any("-draining-" in name for name in one["Names"])
