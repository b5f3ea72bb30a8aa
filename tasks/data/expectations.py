"""Validate a cleaned table with Great Expectations: the generated suite, and the suites that users edit.

The only importer of great_expectations. Each run works on a private context in a temporary folder, since GX
rewrites its own configuration and two runs in one context race.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.suite import expectations, frame
from tasks.data.table import empty_room, read_table
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.requests import ValidateDataRequest, ValidateDataResult
from tasks.spec.value import sha256_of
from tasks.store.files import sha256_file, write_json
from tasks.store.room import open_room

if TYPE_CHECKING:
    import pandas as pd

# GX 1.24.1 answers these with a numpy.bool, which its own result store can't write.
UNSTORABLE = {"expect_column_quantile_values_to_be_between": "expect_column_median_to_be_between"}
DOCS = "uncommitted/data_docs/local_site"
# With a capital, which no workload's name has: a user's suite can never stand in for the generated one.
GENERATED = "Generated"


def suite_files(suites: Path, workload: str) -> tuple[Path, ...]:
    """Return a workload's own suites: ``<workload>.json``, ``<workload>.*.json`` and ``<workload>_*.json``.

    A workload's name holds no dot and no underscore, so none takes another's file for its own.
    """
    patterns = (f"{workload}.json", f"{workload}.*.json", f"{workload}_*.json")
    return tuple(sorted({path for pattern in patterns for path in suites.glob(pattern)}))


def suites_sha256(suites: Path, workload: str) -> str:
    """Return one digest of the suites that users edit for a workload; no suite has a digest too."""
    return sha256_of({path.name: sha256_file(path) for path in suite_files(suites, workload)})


def validate_data(request: ValidateDataRequest, room: Path, suites: Path) -> ValidateDataResult:
    """Write ``validation.json`` and ``docs/`` (data docs, ``index.html``) into ``room``.

    Data that fails its expectations is a result with ``success`` false, never an exception.

    Raises:
        BadRequest: a user's suite can't be read, or names an expectation that GX doesn't know.
        IntegrityLost: the cleaned room changed, or a suite did since the request was made.
    """
    table = read_table(open_room(request.clean) / "data.parquet")
    if suites_sha256(suites, request.workload) != request.suites_sha256:
        changed = f"a suite of {request.workload} changed since the run was planned"
        raise IntegrityLost(f"{suites}: {changed}; start a new run")
    demands = {GENERATED: expectations(request)} | {
        path.stem: _read_suite(path) for path in suite_files(suites, request.workload)
    }
    empty_room(room)
    with tempfile.TemporaryDirectory(prefix="drydock-gx-") as context:
        found = _run(Path(context), demands, frame(request, table))
        shutil.copytree(Path(context) / DOCS, room / "docs")
    result = _result(demands, found)
    facts = {"success": result.success, "failed": list(result.failed), "suites": found}
    write_json(room / "validation.json", facts)
    return result


def _read_suite(path: Path) -> list[dict[str, Any]]:
    """The expectations of a suite file in GX's own format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["expectations"]
        items = [{"type": str(item["type"]), "kwargs": dict(item["kwargs"]), **_kept(item)} for item in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"is no suite in Great Expectations' format ({type(error).__name__}: {error})"
        raise BadRequest(f"{path}: {found}; see great_expectations/README.md") from None
    if not items:
        raise BadRequest(f"{path}: expectations = [], must hold at least one; or remove the file")
    for item in items:
        if other := UNSTORABLE.get(item["type"]):
            raise BadRequest(f"{path}: {item['type']} can't be stored by this version of GX; use {other}")
    return items


def _kept(item: dict[str, Any]) -> dict[str, Any]:
    """What else of an expectation counts; its id belongs to another context."""
    return {name: item[name] for name in ("meta", "severity") if item.get(name) is not None}


def _run(folder: Path, demands: dict[str, list[dict[str, Any]]], data: pd.DataFrame) -> dict[str, Any]:
    """Run one checkpoint over all suites and return its results by suite, as plain data."""
    # Read by GX at import: no usage statistics leave this machine.
    os.environ["GX_ANALYTICS_ENABLED"] = "False"
    import great_expectations as gx

    context = gx.get_context(mode="file", context_root_dir=str(folder))
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    context.variables.save()
    asset = context.data_sources.add_pandas("cleaned").add_dataframe_asset("data")
    batch = asset.add_batch_definition_whole_dataframe("all rows")
    definitions = [
        context.validation_definitions.add(
            gx.ValidationDefinition(name=name, data=batch, suite=_add_suite(context, name, items))
        )
        for name, items in demands.items()
    ]
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="data",
            validation_definitions=definitions,
            result_format={"result_format": "SUMMARY"},
            actions=[gx.checkpoint.UpdateDataDocsAction(name="docs")],
        )
    )
    done = checkpoint.run(batch_parameters={"dataframe": data})
    found = {result.suite_name: result.to_json_dict() for result in done.run_results.values()}
    return {name: found[name] for name in demands}


def _add_suite(context: Any, name: str, items: list[dict[str, Any]]) -> Any:
    import great_expectations as gx
    from great_expectations.exceptions import GreatExpectationsError
    from great_expectations.expectations.registry import get_expectation_impl

    try:
        for item in items:
            # GX leaves an unknown expectation out of a suite with a line in its log: a pass by not looking.
            get_expectation_impl(item["type"])
        return context.suites.add(gx.ExpectationSuite(name=name, expectations=items))
    except (GreatExpectationsError, ValueError, TypeError) as error:
        raise BadRequest(f"suite {name}.json: {' '.join(str(error).split())[:200]}") from None


def _result(demands: dict[str, list[dict[str, Any]]], found: dict[str, Any]) -> ValidateDataResult:
    """Success is every expectation met, and as many evaluated as were demanded."""
    results = [(name, item) for name, suite in found.items() for item in suite["results"]]
    failed = tuple(f"{name}: {_line(item)}" for name, item in results if item["success"] is not True)
    demanded = sum(len(items) for items in demands.values())
    if len(results) != demanded:
        failed += (f"{len(results)} expectations were evaluated, must be {demanded}",)
    names = tuple(demands)
    return ValidateDataResult(success=not failed, evaluated=len(results), failed=failed, suites=names)


def _line(item: dict[str, Any]) -> str:
    """One failed expectation as a line: what was expected of which column, what was found."""
    config, result = item["expectation_config"], item["result"]
    kwargs = {name: value for name, value in config["kwargs"].items() if name not in ("batch_id", "column")}
    shown = ", ".join(f"{name} = {value}" for name, value in kwargs.items())
    column = config["kwargs"].get("column", "the table")
    return f"{config['type']} on {column} ({shown}): found {_found(item, result)}"[:400]


def _found(item: dict[str, Any], result: dict[str, Any]) -> str:
    if "element_count" in result and "unexpected_count" in result:
        sample = result.get("partial_unexpected_list", [])[:3]
        return f"{result['unexpected_count']} of {result['element_count']} values off, such as {sample}"
    if result.get("observed_value") is not None:
        return str(result["observed_value"])
    causes = [cause for cause in (item.get("exception_info") or {}).values() if isinstance(cause, dict)]
    if causes:
        return str(causes[0].get("exception_message"))
    # Expectations on sets answer with what is missing and what is too many.
    return ", ".join(f"{name} {value}" for name, value in result.items() if value) or "no answer"
