"""``drydock data``: dataset revisions, and the labels that people correct."""

from __future__ import annotations

import datetime as dt
import tempfile
from pathlib import Path
from typing import Any

import click

from tasks.command.terminal import give, json_option, user
from tasks.site import Site
from tasks.spec.load import load_workload

# What a row may be but there or not: its label, its split.
CHANGES = ("relabelled", "moved")


@click.group()
def data() -> None:
    """Dataset revisions, and answers to the relabel queue."""


@data.command("list")
@click.argument("workload", required=False)
@json_option
def data_list(workload: str | None, as_json: bool) -> None:
    """List the dataset revisions."""
    from tasks.data.revisions import revisions

    found = revisions(Site().datasets, workload)
    lines = [f"{row['revision']:<40} {row['at'][:19]}  {row['data_sha256'][:16]}" for row in found]
    give(found, as_json, "\n".join(lines) or "no revision yet")


@data.command("show")
@click.argument("revision")
@json_option
def data_show(revision: str, as_json: bool) -> None:
    """Show a revision: schema, rows, splits, classes, validation, label noise, lineage."""
    import yaml

    from tasks.data.revisions import show

    found = show(Site().datasets, revision)
    give(found, as_json, yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120).rstrip())


@data.command("diff")
@click.argument("before")
@click.argument("after")
@json_option
def data_diff(before: str, after: str, as_json: bool) -> None:
    """Compare two revisions: schema, rows, what was added, removed and relabelled, and each column's shift."""
    from tasks.data.revisions import diff

    site = Site()
    found = diff(site.datasets, before, after, site.dataset_remote)
    give(found, as_json, "\n".join(_diff_lines(found)))


def _diff_lines(found: dict[str, Any]) -> list[str]:
    types = found["schema"].items()
    lines = [f"schema: {name:<28} {was or 'none':>12} -> {now or 'none'}" for name, (was, now) in types]
    for kind, what in (("rows_by_split", "split"), ("class_counts", "class")):
        lines += [f"{what + ':':<7} {name:<28} {was:>12} -> {now}" for name, (was, now) in found[kind].items()]
    for kind, some in found["rows"].items():
        first = "; ".join(f"row {row['row_id']}: {row['before']} -> {row['after']}" for row in some["first"])
        lines.append(f"rows:   {kind:<28} {some['count']:>12}" + (f"  ({first})" if kind in CHANGES and first else ""))
    return lines + [f"shift:  {name:<28} {value:>12.4f}" for name, value in found["shift"].items()]


@data.command("get")
@click.argument("revision")
@click.argument("folder", type=click.Path(path_type=Path))
def data_get(revision: str, folder: Path) -> None:
    """Write a revision to a new folder: data, facts, report and a manifest, held against the revision's digest."""
    from tasks.data.revisions import get

    site = Site()
    click.echo(get(site.datasets, revision, folder, site.dataset_remote))


@data.command("suggest")
@click.argument("workload")
@json_option
def data_suggest(workload: str, as_json: bool) -> None:
    """Suggest cleaning rules and dependencies that WORKLOAD's source shows, as YAML to read and paste."""
    from tasks.data.suggest import fragment, suggest
    from tasks.plan import request_for
    from tasks.steps import run_step
    from tasks.store.room import open_room

    site = Site()
    described = load_workload(site.workloads, workload)
    read: Any = run_step("ingest", request_for("ingest", described, {}, site), site)
    label, feature = described.data.label, described.data.feature
    people = label.annotators.columns if label.annotators else ()
    # Words and their tags change together or not at all.
    words = feature.columns if feature.kind == "tokens" else ()
    left = (label.column, *people, *described.data.split.columns, *words)
    with tempfile.TemporaryDirectory(prefix="drydock-suggest-") as scratch:
        found = suggest(open_room(read.room) / "raw.parquet", Path(scratch), left)
    told = [{"rule": s.rule.model_dump(mode="json"), "support": s.support, "rows": s.rows, "why": s.why} for s in found]
    give(told, as_json, fragment(found, f"{workload}: {read.rows} rows"))


@data.command("relabel")
@click.argument("workload")
@click.argument("answers", type=click.Path(path_type=Path))
@json_option
def data_relabel(workload: str, answers: Path, as_json: bool) -> None:
    """Merge an answered relabel queue (CSV) back: the next retrain of WORKLOAD applies it."""
    from tasks.data.corrections import merge

    site = Site()
    described = load_workload(site.workloads, workload).data
    at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    found = merge(
        site.corrections, workload, answers, described.label.names, user(), at, described.feature.kind == "tokens"
    )
    text = f"{workload}: {found.changed} labels changed, {found.dropped} rows dropped, {found.confirmed} confirmed"
    text += f", {found.unanswered} not answered; kept for {user()}, ./drydock run {workload} applies them"
    facts = found._asdict() | {"room": found.room.model_dump() if found.room else None, "who": user(), "at": at}
    give(facts, as_json, text)


@data.command("label")
@click.argument("workload")
@click.argument("labels", type=click.Path(path_type=Path))
@json_option
def data_label(workload: str, labels: Path, as_json: bool) -> None:
    """Join later labels (CSV or Parquet: passport, label, row) to served predictions; measure what serves again."""
    from tasks.truth import label_predictions

    found = label_predictions(Site(), workload, labels, user())
    lines = [f"{workload}: {found.joined} labels joined, {found.unmatched} of no logged prediction"]
    for m in found.measured:
        interval = "" if m.low is None else f" ({m.low:.4g} to {m.high:.4g})"
        lines.append(f"  {m.metric:<10} {m.slice:<14} {m.value:.4g}{interval}, n = {m.samples}")
    if found.verdict:
        lines.append(f"version {found.version} by its gate: {found.verdict.verdict}: {found.verdict.summary}")
    give(found.model_dump(mode="json"), as_json, "\n".join(lines))
