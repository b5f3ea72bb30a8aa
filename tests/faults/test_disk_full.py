"""A full disk in the state folder: one clear line, nothing half-written, and the same command goes on later."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.command.status import status_of, status_text
from tasks.local import run_local
from tasks.plan import request_for
from tasks.reconciler import warn_of_the_disk
from tasks.release.model import Version
from tasks.site import Site
from tasks.spec.errors import TryAgain, from_os
from tasks.spec.load import load_workload
from tasks.spec.settings import resolve
from tasks.store.events import read_events, record_event
from tasks.store.files import copy_folder, write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; only root may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "drydock-test", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.timeout(60)
def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    requests = tmp_path_factory.mktemp("requests")
    environment = {"DRYDOCK_HOME": str(small_disk), "DRYDOCK_ROOT": str(ROOT)}
    site = Site(resolve(environment))
    request = request_for("ingest", load_workload(site.workloads, "digits"), {}, site)
    assert request is not None
    write_json(requests / "request.json", request.model_dump(mode="json"))
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * 245_000)
    command = [sys.executable, "-P", "-m", "tasks", "step", "ingest", str(requests / "request.json")]

    full = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert full.returncode == 20, full.stderr
    assert full.stderr.strip().count("\n") == 0
    assert "disk is full" in full.stderr
    assert "disk is full" in (requests / "error.json").read_text()
    assert list(small_disk.glob("rooms/*/[!.]*")) == []

    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (requests / "error.json").exists()
    assert len(list(small_disk.glob("rooms/ingest/[!.]*/manifest.json"))) == 1


@pytest.mark.timeout(30)
def test_a_copy_and_an_event_on_a_full_disk(small_disk: Path, tmp_path_factory: pytest.TempPathFactory, capsys) -> None:
    """A copy of many files says what one of them met; an event that finds no room is told on stderr, and goes on."""
    source = tmp_path_factory.mktemp("source")
    for name in ("a", "b", "c"):
        (source / name).write_bytes(os.urandom(200_000))
    with pytest.raises(OSError, match="No space left") as caught:
        copy_folder(source, small_disk / "copy")
    assert "disk is full" in str(from_os(caught.value))
    assert record_event(small_disk, "failure", "what happened")["message"] == "what happened"
    assert "what happened" in capsys.readouterr().err
    assert read_events(small_disk) == []
    told = status_text(status_of(Site(resolve({"DRYDOCK_HOME": str(small_disk), "DRYDOCK_ROOT": str(ROOT)}))))
    assert "make room before the next run" in told


@pytest.mark.timeout(30)
def test_a_run_does_not_begin_on_a_full_disk(small_disk: Path) -> None:
    site = Site(resolve({"DRYDOCK_HOME": str(small_disk / "home"), "DRYDOCK_ROOT": str(ROOT)}))
    with pytest.raises(TryAgain, match=r"the disk is full: 0.3 MB are free at .*, a run needs 67"):
        run_local(load_workload(site.workloads, "digits"), site, print)
    assert list(small_disk.iterdir()) == []


@pytest.mark.timeout(30)
def test_a_disk_that_gets_low_is_told_once(small_disk: Path) -> None:
    site = Site(resolve({"DRYDOCK_HOME": str(small_disk), "DRYDOCK_ROOT": str(ROOT)}))
    assert warn_of_the_disk(site, told=warn_of_the_disk(site, told=False))
    (event,) = read_events(small_disk)
    assert (event["kind"], event["workload"]) == ("failure", None)
    assert event["message"].startswith("0.3 MB are free at")


@pytest.mark.timeout(30)
def test_a_full_disk_hides_no_champion(small_disk: Path) -> None:
    site = Site(resolve({"DRYDOCK_HOME": str(small_disk), "DRYDOCK_ROOT": str(ROOT)}))
    first, second = (Version(version=number, digest_sha256=number * 64) for number in "12")
    site.ledger.open_intent("digits", "promote", first, None, "rita", "", "a")
    site.ledger.commit("a")
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    with pytest.raises(TryAgain, match="the disk is full at ledger"):
        site.ledger.open_intent("digits", "promote", second, "1", "rita", "because " * 999, "b")
    again = Site(site.settings)
    (digits,) = (found for found in status_of(again)["workloads"] if found["workload"] == "digits")
    assert (digits["champion"], digits["problem"]) == ("1", "")
    again.ledger.verify()

    filler.unlink()
    again.ledger.open_intent("digits", "promote", second, "1", "rita", "", "c")
    again.ledger.commit("c")
    assert again.ledger.champion("digits") == second
