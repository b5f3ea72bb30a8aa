"""A gang in containers: one a node, on a network of their own, in a room that is copied there and back.

The launchers inside restart a rank that died (``tasks.train.gang``); here a gang is restarted whose container died:
out of memory, its daemon restarted, its host gone. Each start is a new attempt with a higher fencing token, in the
same room. When this process is killed the containers go on, and the next one finds them by their key.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tasks.engines.protocol import ROOM, Job, JobState, JobStatus, Limits, RoomEngine
from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost, TryAgain
from tasks.spec.requests import TrainRequest
from tasks.spec.train import Train
from tasks.store.files import sha256_file, write_whole
from tasks.store.manifest import verify
from tasks.train.deposit import whole
from tasks.train.fence import NAME as ATTEMPT
from tasks.train.fence import VARIABLE, newest_attempt
from tasks.train.gang import ACCUMULATE
from tasks.train.history import HISTORY, PROGRESS, History

IMAGE = "drydock/trainer"
PORT = 29400
MAX_STARTS = 4
BACKOFF_SECONDS = 1.0
POLL_SECONDS = 0.3
# A daemon that is restarted or updated is away for so long, at most.
DAEMON_SECONDS = 180.0
# A checkpoint is copied here so often, so that the loss of a host costs no more.
MIRROR_SECONDS = 30.0
T = TypeVar("T")
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "HOME": "/tmp"}


class Containers(NamedTuple):
    """Runs a gang on an engine of containers. ``logs``: the folder of its log; ``tell`` hears of every restart, one
    line for a person."""

    engine: RoomEngine
    key: str
    labels: dict[str, str]
    logs: Path
    tell: Callable[[str], None] = print

    def run(self, request: TrainRequest, folder: Path, on_epoch: Callable[[dict[str, float]], None]) -> None:
        """Train in containers until ``folder`` holds done.json and the weights, or an error.json.

        Raises:
            BadRequest: it does not fit into the memory it asks for, or asks for what the engine can't give.
            DrydockError: it failed too often without an epoch between; the last whole checkpoint lies in the folder.
        """
        history, accumulate, failures, submit = History(folder / "history.jsonl", on_epoch), 1, 0, self.engine.submit
        with _cancelled_by_sigterm(self):
            while True:
                job, seen = self._job(request, folder, _next_attempt(folder), accumulate), history.seen
                followed = Followed(self.engine, submit(job), folder, history, request.train.checkpoints.keep)
                status = followed.to_the_end()
                try:
                    brought = patiently(followed.bring_back, status)
                except IntegrityLost:
                    # It ended well, so it would be adopted again and again, and be no better.
                    self.engine.forget(followed.handle)
                    raise
                if brought:
                    return patiently(self.engine.forget, followed.handle)
                patiently(followed.mirror)
                # Counted in a row: a long training may meet any number, as long as it gets an epoch further between.
                failures = 1 if history.seen > seen else failures + 1
                try:
                    accumulate = self._what_next(request.train, status, failures, accumulate, folder)
                except DrydockError:
                    self.engine.forget(followed.handle)
                    raise
                # A daemon that is not there at all is told at once; one that was there is waited for.
                submit = functools.partial(patiently, self.engine.submit)

    def _job(self, request: TrainRequest, folder: Path, attempt: int, accumulate: int) -> Job:
        facts = {"key": self.key, "labels": self.labels, "folder": str(self.logs)}
        return gang_job(request, folder, attempt, accumulate, self.engine.shares_room, **facts)

    def cancel(self) -> None:
        """End the gang wherever it is. Idempotent."""
        self.engine.cancel(f"job-{self.key}")

    def _what_next(self, train: Train, status: JobStatus, failures: int, accumulate: int, folder: Path) -> int:
        """Return into how many parts the next start divides a batch; raise where there is no next start.

        ``failures``: in a row.
        """
        why = status.cause or (f"exit code {status.exit_code}" if status.exit_code is not None else "its node is gone")
        starved = status.cause == "out of memory"
        if starved:
            accumulate = _smaller(train, accumulate)
        if failures == MAX_STARTS:
            raise DrydockError(
                f"training: the gang failed {MAX_STARTS} times, the last time: {why}; {_kept(folder)}; its log is above"
            )
        how = f"with each rank's batch in {accumulate} parts" if starved else "from its last whole checkpoint"
        self.tell(f"training {self.key}: the gang failed ({why}); it starts again {how}")
        time.sleep(BACKOFF_SECONDS * 2 ** (failures - 1))
        return accumulate


def gang_job(
    request: TrainRequest, room: Path, attempt: int, accumulate: int, shares_room: bool = True, **facts: Any
) -> Job:
    """Return the gang as an engine's job; ``facts``: its key, labels, and the folder of its log. Pure.

    Nodes that share no room restart nothing by themselves: rank 0 might come back where its checkpoints are not.
    """
    train, asked = request.train, request.train.resources
    meeting = f"{{first}}:{PORT}" if train.nodes > 1 else f"{ROOM}/rendezvous"
    options = [f"--nodes={train.nodes}", f"--ranks={train.ranks}", f"--rendezvous={meeting}"]
    options += [] if shares_room or train.nodes == 1 else ["--restarts=0"]
    own = {VARIABLE: str(attempt), ACCUMULATE: str(accumulate), "OMP_NUM_THREADS": str(max(1, int(asked.cpus)))}
    memory = train.ranks * asked.memory_bytes
    return Job(
        command=("python", "-m", "tasks.train.gang", *options, ROOM),
        environment=ENVIRONMENT | own,
        nodes=train.nodes,
        attempt=attempt,
        image=IMAGE,
        room=str(room),
        limits=Limits(
            cpus=train.ranks * asked.cpus,
            memory_bytes=memory,
            shm_bytes=min(memory // 4, 2**30),
            gpus=train.ranks * asked.gpus,
        ),
        **facts,
    )


class Followed:
    """One start of the gang as it is followed: its log, its history, its checkpoints."""

    def __init__(self, engine: RoomEngine, handle: str, folder: Path, history: History, keep: int) -> None:
        self.engine, self.handle, self.folder, self.history, self.keep = engine, handle, folder, history, keep
        self.offset, self.mirrored_at = 0, time.monotonic()

    def to_the_end(self) -> JobStatus:
        """Follow until no node runs. A daemon that is away for a while is waited for."""
        while (status := patiently(self.state)).state is JobState.RUNNING:
            time.sleep(POLL_SECONDS)
        return status

    def state(self) -> JobStatus:
        """Return the gang's state, and pass on what it printed until then."""
        status = self.engine.poll(self.handle)
        self.look()
        return status

    def look(self) -> None:
        """Pass on what the gang printed and learnt since the last look."""
        text, self.offset = self.engine.logs(self.handle, self.offset)
        sys.stdout.write(text)
        sys.stdout.flush()
        # Rank 0 prints a line after each one that it adds to its files: where nothing was printed, none is new.
        if text and any([self.engine.fetch(self.handle, name, self.folder / name) for name in (PROGRESS, HISTORY)]):
            self.history.follow()
        if time.monotonic() - self.mirrored_at > MIRROR_SECONDS:
            self.mirror()

    def mirror(self) -> None:
        """Copy the newest whole checkpoint here; those that are here stay until then."""
        self.mirrored_at = time.monotonic()
        # The newest epoch's may be rotten, dropped meanwhile, or never have fitted on the disk.
        for epoch in range(self.history.seen, max(self.history.seen - 3, 0), -1):
            target = self.folder / "checkpoints" / f"epoch-{epoch:05d}"
            if target.exists() or self._bring(f"checkpoints/{target.name}", target):
                for old in whole(target.parent)[self.keep :]:
                    shutil.rmtree(old, ignore_errors=True)
                return

    def _bring(self, path: str, target: Path) -> bool:
        """Fetch a folder with a manifest; return whether it came whole."""
        incoming = self.folder / "incoming" / target.name
        if not self.engine.fetch(self.handle, path, incoming):
            return False
        with contextlib.suppress(IntegrityLost):
            verify(incoming)
            target.parent.mkdir(exist_ok=True)
            incoming.rename(target)
            return True
        return False

    def bring_back(self, status: JobStatus) -> bool:
        """Fetch the result, or the error that a restart can't help; return whether there is one."""
        if self.engine.fetch(self.handle, "error.json", self.folder / "error.json"):
            self.mirror()
            return True
        if status.state is not JobState.SUCCEEDED:
            return False
        for name in ("weights.safetensors", "history.jsonl", "done.json"):  # done.json last: it says that all is there
            if not self.engine.fetch(self.handle, name, self.folder / name):
                raise IntegrityLost(f"{self.handle}: ended well without {name}")
        done = json.loads((self.folder / "done.json").read_text())
        found = sha256_file(self.folder / "weights.safetensors")
        if found != done["weights_sha256"]:
            (self.folder / "done.json").unlink()
            must = done["weights_sha256"][:12]
            raise IntegrityLost(f"{self.handle}: weights have digest {found[:12]}, must be {must}")
        self.history.follow()
        return True


def patiently(ask: Callable[..., T], *arguments: Any) -> T:
    """Ask the engine until it answers. Raises TryAgain where it has not for as long as a daemon's restart takes."""
    until = time.monotonic() + DAEMON_SECONDS
    while True:
        try:
            return ask(*arguments)
        except TryAgain as error:
            if time.monotonic() > until:
                raise
            _say(f"waiting: {error}")
            time.sleep(2)


def _next_attempt(folder: Path) -> int:
    attempt = newest_attempt(folder) + 1
    write_whole(folder / ATTEMPT, str(attempt))
    return attempt


def _smaller(train: Train, accumulate: int) -> int:
    """Halve the micro-batch. Raises BadRequest where a rank's share of a batch is one row already."""
    rows = train.batch_size // train.readers
    if rows // (accumulate * 2) == 0 or rows % (accumulate * 2):
        raise BadRequest(
            f"training is out of memory with {train.resources.memory_bytes} bytes a rank and micro-batches of "
            f"{rows // accumulate} rows; raise train.resources.memory_bytes"
        )
    return accumulate * 2


def _kept(folder: Path) -> str:
    kept = sorted(path.name for path in (folder / "checkpoints").glob("epoch-*"))
    return f"{kept[-1]} is kept in {folder / 'checkpoints'}" if kept else "no checkpoint was whole yet"


@contextlib.contextmanager
def _cancelled_by_sigterm(gang: Containers) -> Iterator[None]:
    """End the containers when this process is told to end; killed outright, it leaves them to its successor."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        gang.cancel()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the step's log is its standard output
