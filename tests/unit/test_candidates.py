"""What becomes of a candidate's replicas where its rollout is refused before it begins."""

from __future__ import annotations

import pytest

from tasks.delivery import Order, roll
from tasks.release.model import Version, service_name
from tasks.site import Site
from tasks.spec.errors import Refused
from tasks.spec.settings import resolve

ONE, TWO = (Version(version=n, digest_sha256=n * 64) for n in ("1", "2"))


class Engine:
    """Remembers which services were told to end."""

    def __init__(self) -> None:
        self.drained: list[str] = []

    def drain(self, service: str) -> None:
        self.drained.append(service)


@pytest.fixture
def site(tmp_path):
    found = Site(resolve({}, home=str(tmp_path), root=str(tmp_path), workloads=str(tmp_path)))
    found.engine = Engine()
    return found


def promote(site, version, before):
    intent = f"release:{version.version}"
    site.ledger.open_intent("w", "promote", version, before.version if before else None, "rita", "a release", intent)
    site.ledger.commit(intent)


def order(version, shown):
    facts = {"version": version.version, "package_sha256": version.digest_sha256, "expected_champion": shown}
    return Order(workload="w", actor="rita", reason="a test", intent_id="again", **facts)


def test_a_candidate_that_is_refused_before_its_rollout_leaves_no_replica(site):
    promote(site, ONE, None)
    with pytest.raises(Refused, match="version 1 serves by now, the review was shown nothing"):
        roll(order(TWO, None), site)
    assert site.engine.drained == [service_name("w", TWO.digest_sha256)]


def test_one_that_has_served_stays_warm(site):
    promote(site, ONE, None)
    promote(site, TWO, ONE)
    with pytest.raises(Refused, match="version 2 serves by now, the review was shown nothing"):
        roll(order(ONE, None), site)
    assert site.engine.drained == []
