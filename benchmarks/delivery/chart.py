"""The picture of a bad canary: shares of the traffic and failures, tenth by tenth of a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from delivery.candidates import Outcome
from delivery.platform import Answer

BIN_SECONDS = 0.1
BEFORE_SECONDS, AFTER_SECONDS = 2.0, 4.0


def chart(outcome: Outcome, path: Path) -> Path:
    """Draw it and return the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    own = [answer.done for answer in outcome.of_candidate]
    zero = min(own, default=outcome.began)
    last = max(own, default=zero)
    edges = _edges(-BEFORE_SECONDS, last - zero + AFTER_SECONDS)
    count = lambda wanted: _counts(outcome.answers, wanted, zero, edges)  # noqa: E731
    candidate, everything = count(lambda a: a.version == outcome.version.version), count(lambda a: True)
    shares = [100 * own / all_ if all_ else 0.0 for own, all_ in zip(candidate, everything, strict=True)]
    failures = count(lambda a: not a.good)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    upper.step(edges[:-1], shares, where="post")
    upper.set_ylabel("% of answers that are\nthe candidate's")
    upper.set_title(f"a candidate that answers all requests with errors: {sum(failures)} seen by clients")
    lower.bar(edges[:-1], failures, BIN_SECONDS, align="edge", color="tab:red")
    lower.set_ylabel(f"failures in {BIN_SECONDS:g} s")
    lower.set_xlabel("seconds since its first answer to a client")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _edges(first: float, last: float) -> list[float]:
    return [first + BIN_SECONDS * n for n in range(int((last - first) / BIN_SECONDS) + 2)]


def _counts(
    answers: Sequence[Answer], wanted: Callable[[Answer], bool], zero: float, edges: Sequence[float]
) -> list[int]:
    counts = [0] * (len(edges) - 1)
    for answer in answers:
        place = int((answer.done - zero - edges[0]) / BIN_SECONDS)
        if 0 <= place < len(counts) and wanted(answer):
            counts[place] += 1
    return counts
