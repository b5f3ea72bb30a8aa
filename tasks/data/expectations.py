"""Validate a table with Great Expectations at four stages: as read, cleaned, split, and beside the last revision.

The only importer of great_expectations. Each run works on a private context in a temporary folder, since GX
rewrites its own configuration and two runs in one context race. ``tasks.data.scalars`` says how a table too large
for memory is validated.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.conditions import broken_rows, count_broken
from tasks.data.docs import write_docs
from tasks.data.history import compared, newest_frame, split_frame
from tasks.data.profile import profile_of
from tasks.data.revisions import facts_of
from tasks.data.scalars import Scalars, opened, quoted
from tasks.data.suite import REJECTED, generated
from tasks.data.table import empty_room, write_table
from tasks.data.user_suites import Suite, read_suite, suite_files, suites_sha256
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.requests import ValidateDataRequest, ValidateDataResult
from tasks.store.files import write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    import pandas as pd

DOCS = "uncommitted/data_docs/local_site"
# With a capital, which no workload's name has: a user's suite can never stand in for the generated one.
GENERATED = "Generated"
# Of a large table, how many rows that break an expectation are shown to it beside the sample.
SHOWN_BROKEN = 100
ROW_COUNTS = ("expect_table_row_count_to_be_between", "expect_table_row_count_to_equal")


class Checked(NamedTuple):
    """One expectation and what was found: its suite, severity, whether it was met, and a line for people."""

    suite: str
    severity: str
    met: bool
    line: str


def validate_data(
    request: ValidateDataRequest, room: Path, suites: Path, repository: Path | None = None
) -> ValidateDataResult:
    """Write ``validation.json``, ``docs/`` (data docs), ``quarantine.parquet`` and ``profile.json`` into ``room``.

    Data that fails its expectations is a result with ``success`` false, never an exception.

    Raises:
        BadRequest: a user's suite can't be read, or names an expectation that GX doesn't know.
        IntegrityLost: a room changed, or a suite or the last revision's facts did since the request was made.
    """
    raw, clean = open_room(request.raw) / "raw.parquet", open_room(request.clean) / "data.parquet"
    users = _user_suites(request, suites)
    facts = facts_of(repository, request.previous) if repository and request.previous else None
    empty_room(room)
    alike = request.anonymity.columns if request.anonymity else ()
    with opened(raw, request.feature) as before, opened(clean, request.feature, alike) as after:
        frames, history = _frames(request, before, after, facts)
        demands = [Suite(f"{GENERATED}.{stage}", stage, items) for stage, items in generated(request, history).items()]
        demands = [_numbered(suite) for suite in demands + users]
        counts = {suite.name: _counts(suite, after) for suite in demands}
        batches = _batches(demands, frames, after, counts)
        results = _run(batches, room / "docs")
        seen_in_part = {stage: table.rows for stage, table in (("raw", before), ("clean", after)) if table.sampled}
        checked = _checked(demands, results, counts, seen_in_part)
        quarantine = _quarantine(demands, checked, after)
        profile = {"columns": profile_of(frames["clean"]), "history": history, "schema": _schema(clean)}
        write_json(room / "profile.json", profile | {"max_shift": request.expectations.max_shift})
    _write_quarantine(room, quarantine)
    result = _result(request, demands, checked, quarantine, sampled=bool(seen_in_part))
    write_json(room / "validation.json", _report(request, result, results))
    return result


def _user_suites(request: ValidateDataRequest, suites: Path) -> list[Suite]:
    if suites_sha256(suites, request.workload) != request.suites_sha256:
        changed = f"a suite of {request.workload} changed since the run was planned"
        raise IntegrityLost(f"{suites}: {changed}; start a new run")
    return [read_suite(path) for path in suite_files(suites, request.workload)]


def _numbered(suite: Suite) -> Suite:
    """The suite with each expectation's place in its meta, by which its result is found again."""
    items = [item | {"meta": item["meta"] | {"place": place}} for place, item in enumerate(suite.items)]
    return suite._replace(items=items)


def _frames(
    request: ValidateDataRequest, before: Scalars, after: Scalars, facts: dict[str, Any] | None
) -> tuple[dict[str, pd.DataFrame], dict[str, float] | None]:
    """The frame of each stage, and what was compared with the last revision."""
    import pandas as pd

    clean = after.frame()
    clean[REJECTED] = request.dropped_rows / max(request.rows_in, 1)
    frames = {"raw": before.frame(), "clean": clean, "split": split_frame(after, request)}
    if request.expectations.newest is not None:
        frames["newest"] = newest_frame(before, request)
    if facts is None:
        return frames, None
    history = compared(request, _schema(after.path), after.rows, clean, facts)
    return frames | {"history": pd.DataFrame([history])}, history


def _counts(suite: Suite, after: Scalars) -> dict[int, int]:
    """Exact counts of broken rows over a large cleaned table; a small one Great Expectations sees whole."""
    return count_broken(after, suite.items) if suite.stage == "clean" and after.sampled else {}


def _batches(
    demands: list[Suite], frames: dict[str, pd.DataFrame], after: Scalars, counts: dict[str, dict[int, int]]
) -> list[tuple[Suite, pd.DataFrame]]:
    """Which suite is run on which frame. Row counts of a sampled table are held against its true one, apart."""
    import pandas as pd

    batches = []
    for suite in demands:
        frame = frames[suite.stage]
        if suite.stage == "clean" and after.sampled:
            broken = [i for index, count in counts[suite.name].items() if count
                      for i in broken_rows(after, suite.items[index], SHOWN_BROKEN)]  # fmt: skip
            if broken:
                more = after.rows_where(f"row_id IN ({', '.join(map(quoted, broken))})", len(broken))
                frame = pd.concat([frame, more.assign(**{REJECTED: frame[REJECTED].iloc[0]})], ignore_index=True)
        batches.append((suite, frame))
    return batches


def _run(batches: list[tuple[Suite, pd.DataFrame]], docs: Path) -> dict[str, Any]:
    """Run one checkpoint a suite; return GX's results by suite as plain data, and leave the data docs in ``docs``."""
    # Read by GX at import: no usage statistics leave this machine.
    os.environ["GX_ANALYTICS_ENABLED"] = "False"
    import great_expectations as gx

    with tempfile.TemporaryDirectory(prefix="drydock-gx-") as folder:
        context = gx.get_context(mode="file", context_root_dir=folder)
        context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        context.variables.save()
        source = context.data_sources.add_pandas("data")
        found = {suite.name: _run_suite(context, source, suite, frame) for suite, frame in batches}
        # Once for all: as a checkpoint's action it would build the whole site for each.
        context.build_data_docs()
        write_docs(Path(folder) / DOCS, found, docs)
    return found


def _run_suite(context: Any, source: Any, suite: Suite, frame: pd.DataFrame) -> dict[str, Any]:
    import great_expectations as gx

    batch = source.add_dataframe_asset(suite.name).add_batch_definition_whole_dataframe("all rows")
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=suite.name, data=batch, suite=_add_suite(context, suite))
    )
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=suite.name, validation_definitions=[definition], result_format={"result_format": "SUMMARY"}
        )
    )
    (result,) = checkpoint.run(batch_parameters={"dataframe": frame}).run_results.values()
    return result.to_json_dict()


def _add_suite(context: Any, suite: Suite) -> Any:
    import great_expectations as gx
    from great_expectations.exceptions import GreatExpectationsError
    from great_expectations.expectations.registry import get_expectation_impl

    try:
        for item in suite.items:
            # GX leaves an unknown expectation out of a suite with a line in its log: a pass by not looking.
            get_expectation_impl(item["type"])
        return context.suites.add(gx.ExpectationSuite(name=suite.name, expectations=suite.items))
    except (GreatExpectationsError, ValueError, TypeError) as error:
        raise BadRequest(f"suite {suite.name}.json: {' '.join(str(error).split())[:200]}") from None


def _checked(
    demands: list[Suite], results: dict[str, Any], counts: dict[str, dict[int, int]], seen_in_part: dict[str, int]
) -> list[Checked]:
    """What became of each expectation. An exact count stands above what GX saw of a sample."""
    found = []
    for suite in demands:
        for item in results[suite.name]["results"]:
            met, line = _met(item, counts[suite.name], seen_in_part.get(suite.stage))
            found.append(Checked(suite.name, item["expectation_config"]["meta"]["severity"], met, line))
    return found


def _met(item: dict[str, Any], exact: dict[int, int], rows: int | None) -> tuple[bool, str]:
    """Whether an expectation was met, and the line that says what was found. ``rows``: of a table seen in part."""
    config = item["expectation_config"]
    count = exact.get(config["meta"]["place"])
    if count is not None:
        return count == 0, _line(config, f"{count} of {rows} rows off, all rows counted")
    if rows is not None and config["type"] in ROW_COUNTS:
        return _within(config["kwargs"], rows), _line(config, str(rows))
    seen = "" if rows is None else ", in a sample"
    return item["success"] is True, _line(config, _found(item, item["result"]) + seen)


def _within(kwargs: dict[str, Any], rows: int) -> bool:
    low, high = kwargs.get("min_value", kwargs.get("value")), kwargs.get("max_value", kwargs.get("value"))
    return (low is None or rows >= low) and (high is None or rows <= high)


def _quarantine(demands: list[Suite], checked: list[Checked], after: Scalars) -> dict[str, str]:
    """Rows that break an expectation of severity quarantine, each with its reason."""
    broken = {one.suite for one in checked if one.severity == "quarantine" and not one.met}
    found: dict[str, str] = {}
    for suite in demands:
        for item in suite.items if suite.name in broken else ():
            if item["meta"]["severity"] == "quarantine":
                reason = f"{suite.name}: {_line(item, 'this row')}"
                found |= {row_id: reason for row_id in broken_rows(after, item) if row_id not in found}
    return found


def _write_quarantine(room: Path, quarantine: dict[str, str]) -> None:
    import pyarrow as pa

    columns = {"row_id": list(quarantine), "reason": list(quarantine.values())}
    schema = pa.schema([("row_id", pa.string()), ("reason", pa.string())])
    write_table(room / "quarantine.parquet", pa.table(columns, schema=schema))


def _result(
    request: ValidateDataRequest,
    demands: list[Suite],
    checked: list[Checked],
    quarantine: dict[str, str],
    sampled: bool,
) -> ValidateDataResult:
    """Success is every stopping expectation met, and as many evaluated as were demanded."""
    lines = {kind: tuple(f"{one.suite}: {one.line}" for one in checked if one.severity == kind and not one.met)
             for kind in ("stop", "quarantine", "warn")}  # fmt: skip
    failed = lines["stop"]
    demanded = sum(len(suite.items) for suite in demands)
    if len(checked) != demanded:
        failed += (f"{len(checked)} expectations were evaluated, must be {demanded}",)
    rejected = (request.dropped_rows + len(quarantine)) / max(request.rows_in, 1)
    if quarantine and rejected > (limit := request.expectations.max_rejected_ratio):
        failed += (f"quarantine: {rejected:.4g} of the rows are dropped or in quarantine, must be at most {limit}",)
    return ValidateDataResult(
        success=not failed,
        evaluated=len(checked),
        failed=failed,
        warned=lines["quarantine"] + lines["warn"],
        quarantined=len(quarantine),
        sampled=sampled,
        suites=tuple(suite.name for suite in demands),
    )


def _report(request: ValidateDataRequest, result: ValidateDataResult, results: dict[str, Any]) -> dict[str, Any]:
    facts = result.model_dump(mode="json", exclude={"room"})
    compared_with = request.previous.revision if request.previous else None
    return facts | {"compared_with": compared_with, "suites": results}


def _schema(path: Path) -> dict[str, str]:
    import pyarrow.parquet as pq

    return {field.name: str(field.type) for field in pq.read_schema(path)}


def _line(config: dict[str, Any], found: str) -> str:
    """One expectation as a line: what was expected of which column, what was found."""
    kwargs = {name: value for name, value in config["kwargs"].items() if name not in ("batch_id", "column")}
    shown = ", ".join(f"{name} = {value}" for name, value in kwargs.items())
    column = config["kwargs"].get("column", "the table")
    return f"{config['type']} on {column} ({shown}): found {found}"[:400]


def _found(item: dict[str, Any], result: dict[str, Any]) -> str:
    if "element_count" in result and "unexpected_count" in result:
        sample = result.get("partial_unexpected_list", [])[:3]
        return f"{result['unexpected_count']} of {result['element_count']} values off, such as {sample}"
    if (observed := result.get("observed_value")) is not None:
        return f"{observed:.6g}" if isinstance(observed, float) else str(observed)
    causes = [cause for cause in (item.get("exception_info") or {}).values() if isinstance(cause, dict)]
    if causes:
        return str(causes[0].get("exception_message"))
    # Expectations on sets answer with what is missing and what is too many.
    return ", ".join(f"{name} {value}" for name, value in result.items() if value) or "no answer"
