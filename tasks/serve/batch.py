"""Batches without a timer: what is there now is asked together, and a lone request never waits.

A cheap model is asked on the event loop, with everything that was readable in this turn of it. A dear one is asked
in a thread; what comes meanwhile is the next batch. Which of the two is measured at warm-up. A request that is alone
has nothing to wait for while a thread wakes up: where a dear model's answer takes a few milliseconds, it too is asked
on the loop.

    submit ─► queue ─┬─ cheap: at the end of this turn of the loop ─┬─► one batch ─► deliver, each its own rows
                     └─ dear: when the batch before has ended ──────┘
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from tasks.serve.package import Package
from tasks.spec.errors import BadRequest, DrydockError

WARM_UP_CALLS = 3
CHEAP_TURNS = 8  # of max_queue requests each
CHEAP_SECONDS = 1e-3  # for one row; a thread's hand-over costs a tenth of it
# What would hold the loop for longer goes to the thread: a batch of a cheap model, a lone request to a dear one.
INLINE_SECONDS = 5e-3
LONE_SECONDS = 10e-3
# How much the newest batch says about what a row costs.
NEWEST_SHARE = 0.2


class Prediction(NamedTuple):
    """``best``: of each of B rows (or of each of their words) the place of its class (``Package.best``);
    ``probabilities``: float32 [B, K], or numbers [B, 1]."""

    best: list[int]
    probabilities: np.ndarray
    continuations: list[str] | None = None


Outcome = Prediction | DrydockError


class Job(Protocol):
    """Rows that want an answer; ``gone``: nobody waits for it any more; ``more``: by how many pieces texts go on."""

    rows: Any
    more: int
    gone: bool

    def deliver(self, outcome: Outcome) -> None: ...


class Batcher:
    def __init__(self, package: Package, max_rows: int, max_queue: int, max_seconds: float) -> None:
        self.package = package
        self.max_queue, self._max_rows, self._max_seconds = max_queue, max_rows, max_seconds
        self._queue: deque[tuple[Job, int, int]] = deque()  # with number of rows and width
        self._running = 0
        self._flush_asked = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._seconds_per_unit, self.cheap = 1e-9, False  # until it is measured
        self.on_batch: Any = lambda num_rows: None

    @property
    def depth(self) -> int:
        """Requests that wait or run."""
        return len(self._queue) + self._running

    @property
    def full(self) -> bool:
        """Whether ``max_queue`` requests wait. What a cheap model answers in the next few turns does not wait, but is
        held in memory."""
        most = self.max_queue if not self.cheap or self._running else CHEAP_TURNS * self.max_queue
        return len(self._queue) >= most

    def warm_up(self) -> None:
        """Let the runtime allocate, hold the package to its golden sample, and measure what one row costs.

        Raises:
            IntegrityLost: the golden answer differs.
        """
        self.package.check_golden()
        row = self.package.validate(self.package.golden.rows[:1])
        times = []
        for _ in range(WARM_UP_CALLS):
            started = time.perf_counter()
            self.package.answer(row)
            times.append(time.perf_counter() - started)
        self.cheap = min(times) < CHEAP_SECONDS
        self._seconds_per_unit = min(times) / self.package.width(row)

    def submit(self, job: Job) -> None:
        """Queue a job; its ``deliver`` is called on the event loop. The caller asks ``full`` first."""
        # Each piece more is another question.
        self._queue.append((job, len(job.rows), self.package.width(job.rows) * (1 + job.more)))
        if not self._flush_asked:
            self._ask_flush()

    def _ask_flush(self) -> None:
        if self._queue and not self._flush_asked and not self._running:
            self._flush_asked = True
            asyncio.get_running_loop().call_soon(self._flush)

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _flush(self) -> None:
        """Ask the next batch; the loop turns once before the one after it, so that others are heard."""
        self._flush_asked = False
        if self._running or not self._queue:
            return
        jobs, num_rows, units = self._take()
        started, self._running = time.perf_counter(), len(jobs)
        most = INLINE_SECONDS if self.cheap else LONE_SECONDS if len(jobs) == 1 else 0
        if units * self._seconds_per_unit < most:
            outcomes = None
            try:
                outcomes = self._answer(jobs)
            finally:  # whatever was raised, nobody waits in vain
                self._finish(jobs, num_rows, units, started, outcomes)
        else:
            loop = asyncio.get_running_loop()
            future = self._worker.submit(self._answer, jobs)
            future.add_done_callback(
                lambda done: loop.call_soon_threadsafe(self._finish_thread, jobs, num_rows, units, started, done)
            )

    def _take(self) -> tuple[list[Job], int, int]:
        """Take the oldest request, and of those behind it what pads to a similar width, up to the bounds."""
        queue, self._queue = self._queue, deque()
        job, num_rows, width = queue.popleft()
        jobs, widest, max_rows = [job], width, self._max_rows
        max_units = self._max_seconds / self._seconds_per_unit
        for entry in queue:
            job, rows, wide = entry
            total, most = num_rows + rows, wide if wide > widest else widest
            if total <= max_rows and total * most <= max_units and wide <= 2 * width and width <= 2 * wide:
                jobs.append(job)
                num_rows, widest = total, most
            else:
                self._queue.append(entry)
        return jobs, num_rows, num_rows * widest

    def _answer(self, jobs: list[Job]) -> list[Outcome]:
        """Return each job's own outcome; where the graph fails each is asked alone, so only the culprit fails."""
        if len(jobs) == 1:
            return [self._alone(jobs[0])]
        try:
            rows = _join([job.rows for job in jobs])
            answers = self.package.predict(rows)
            told = self._continued(rows, jobs)
        except BadRequest:
            return self._answer_valid(jobs)
        except DrydockError:
            return [self._alone(job) for job in jobs]
        best, outcomes, start = self.package.best(answers), [], 0
        for job in jobs:
            end = start + self.package.num_answers(job.rows)
            outcomes.append(Prediction(best[start:end], answers[start:end], told[start:end] if job.more else None))
            start = end
        return outcomes

    def _answer_valid(self, jobs: list[Job]) -> list[Outcome]:
        """Refuse the jobs with rows that the feature does not allow, and ask for the others as one batch."""
        refusals = {place: error for place, job in enumerate(jobs) if (error := self._problem(job))}
        valid = [job for place, job in enumerate(jobs) if place not in refusals]
        answers = iter(self._answer(valid) if valid else [])
        return [refusals[place] if place in refusals else next(answers) for place in range(len(jobs))]

    def _problem(self, job: Job) -> BadRequest | None:
        try:
            self.package.validate(job.rows)
        except BadRequest as error:
            return error
        return None

    def _alone(self, job: Job) -> Outcome:
        if job.gone:
            return DrydockError("nobody waits for this answer")
        try:
            answer = self.package.predict(job.rows)
            told = self._continued(job.rows, [job])
        except DrydockError as error:
            return error
        return Prediction(self.package.best(answer), answer, told if job.more else None)

    def _continued(self, rows: Any, jobs: list[Job]) -> list[str]:
        """How the rows of all jobs go on, where any job asks for it."""
        if not any(job.more for job in jobs):
            return []
        return self.package.continued(rows, [job.more for job in jobs for _ in job.rows])

    def _finish_thread(
        self, jobs: list[Job], num_rows: int, units: int, started: float, done: Future[list[Outcome]]
    ) -> None:
        error = done.exception()
        self._finish(jobs, num_rows, units, started, None if error else done.result())
        if error:
            raise error

    def _finish(
        self, jobs: list[Job], num_rows: int, units: int, started: float, outcomes: list[Outcome] | None
    ) -> None:
        self._running = 0
        took = (time.perf_counter() - started) / units
        self._seconds_per_unit += NEWEST_SHARE * (took - self._seconds_per_unit)
        self.on_batch(num_rows)
        self._ask_flush()
        outcomes = outcomes or [DrydockError("the model failed; see the server's log")] * len(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.deliver(outcome)


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [row for part in parts for row in part]
