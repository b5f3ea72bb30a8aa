"""The ``drydock`` command. Its verbs are a contract; each ends with an exit code of ``tasks.spec.errors``."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from tasks.command.data import data
from tasks.command.keys import keys
from tasks.command.terminal import give, json_option, user
from tasks.site import Site
from tasks.spec.errors import BadRequest, DrydockError, Refused, TryAgain, from_os
from tasks.spec.load import load_workload, workload_names

STARTED = time.monotonic()


def say(line: str) -> None:
    """Tell progress, with the seconds since the command began."""
    click.echo(f"[{time.monotonic() - STARTED:6.1f} s] {line}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="drydock")
def cli() -> None:
    """Build, inspect, refit, launch and recall models: Airflow says when, MLflow remembers, Envoy routes."""


@cli.command()
@click.argument("workload", default="digits")
@click.option("--services-only", is_flag=True, help="start the services without a run")
@click.option("--secrets-only", is_flag=True, help="start nothing; make the secrets that docker-compose.yaml mounts")
def up(workload: str, services_only: bool, secrets_only: bool) -> None:
    """Start Airflow, MLflow and the gateway; take WORKLOAD to a live model if it has none; ask it once."""
    if secrets_only:
        from tasks.command.secrets import write_secrets

        say(write_secrets(Site().home))
        return
    from tasks.command.up import bring_up

    bring_up(Site(), None if services_only else workload, say)


@cli.command()
@click.option("--purge", is_flag=True, help="forget the state too")
def down(purge: bool) -> None:
    """Stop everything that `up` started."""
    from tasks.stack import down

    down(Site(), purge)
    say("down" + (", the state is forgotten" if purge else ""))


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def test(arguments: tuple[str, ...]) -> NoReturn:
    """Install what the tests need and run them; ARGUMENTS go to pytest."""
    from tasks.command.test import run_tests

    sys.exit(run_tests(Site(), list(arguments)))


@cli.command()
@click.argument("name")
@click.option(
    "--feature",
    type=click.Choice(["table", "image", "text", "tokens", "ids"]),
    default="table",
    help="what the model reads; tokens: words, to be tagged each; ids: a user and an item, to be rated",
)
@click.option("--own-model", is_flag=True, help="bring your own network in model.py")
@click.option("--label", type=click.Choice(["next"]), help="the next piece of a text: a language model")
def new(name: str, feature: str, own_model: bool, label: str | None) -> None:
    """Make the folder of a new workload from a template."""
    from tasks.new import new_workload

    path = new_workload(Site(), name, feature, own_model, label == "next")
    click.echo(f"{path}: edit it, then ./drydock validate {name} and ./drydock run {name}")


@cli.command()
@click.argument("workload", required=False)
@json_option
def validate(workload: str | None, as_json: bool) -> None:
    """Check a workload file (default: all) and print the effective one, with every default."""
    import yaml

    site = Site()
    names = [workload] if workload else workload_names(site.workloads)
    found: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name in names:
        try:
            found[name] = load_workload(site.workloads, name).model_dump(mode="json")
        except BadRequest as error:
            if workload:
                raise
            wrong[name] = str(error)
    if workload:
        return give(found, as_json, yaml.safe_dump(found[workload], sort_keys=False).rstrip())
    give(found, as_json, "\n".join(f"{name}: {wrong.get(name, 'right')}" for name in names))
    if wrong:
        raise BadRequest(f"{len(wrong)} of {len(names)} workload files can't be taken: {'; '.join(wrong.values())}")


@cli.command()
@click.option("--efficiency", is_flag=True, help="what trainings cost and how well they used their machines")
@json_option
def status(efficiency: bool, as_json: bool) -> None:
    """Show services, and per workload champion, candidate, replicas, latency, errors, and what happened last."""
    from tasks.command.status import status_of, status_text

    if efficiency:
        from tasks.command.efficiency import efficiency_of, efficiency_text

        found = efficiency_of(Site())
        return give(found, as_json, efficiency_text(found))
    found = status_of(Site())
    give(found, as_json, status_text(found))


@cli.command()
@click.argument("name", required=False)
@click.option("-n", "lines", default=100, show_default=True, help="how many lines")
def logs(name: str | None, lines: int) -> None:
    """Show the log of a service, a replica or a job, or of a run by Airflow's id (no NAME: list the first three)."""
    from tasks.command.logs import known_logs, read_log

    site = Site()
    if name is None:
        click.echo("\n".join(sorted(known_logs(site))))
        return
    click.echo("\n".join(read_log(site, name).splitlines()[-lines:]))


@cli.command()
@click.argument("workload")
@click.option("--local", is_flag=True, help="run the same steps in this process, without Airflow")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="as in the trigger form; repeatable")
@json_option
def run(workload: str, local: bool, params: tuple[str, ...], as_json: bool) -> None:
    """Retrain WORKLOAD now and follow its tasks."""
    site, asked = Site(), parse_params(params)
    tell = (lambda line: None) if as_json else say
    if local:
        from tasks.local import run_local
        from tasks.spec.changes import changed

        done = run_local(changed(load_workload(site.workloads, workload), asked), site, tell, (user(),))
        result = done["register"]
    else:
        from tasks.command.up import retrain

        result = retrain(site, workload, asked, tell)
    text = f"{workload}: version {result['version']}, package {result['package_sha256'][:12]}"
    if not result["created"]:
        text += "; this package was registered before"
    elif local:
        text += f"; ./drydock release {workload} {result['version']} rolls it out"
    else:
        text += f"; its release follows: ./drydock status, or release_{workload} in Airflow"
    give(result, as_json, text)


def parse_params(params: tuple[str, ...]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; values are JSON where they are (numbers, true, false), else text."""
    found: dict[str, Any] = {}
    for param in params:
        name, equals, text = param.partition("=")
        if not equals:
            raise BadRequest(f"--param {param}: must be NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


@cli.command()
@click.argument("name")
@click.argument("request", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="publish the room here (default: the site's rooms)")
def step(name: str, request: Path, out: Path | None) -> None:
    """Run one step from its request, as a container does; the result is printed as JSON."""
    from tasks.command.step import run_request

    click.echo(json.dumps(run_request(name, request, out, Site())))


@cli.command()
@click.argument("workload")
@click.option("--approve", metavar="VERSION")
@click.option("--reject", metavar="VERSION")
@click.option("--reason", default="")
@json_option
def review(workload: str, approve: str | None, reject: str | None, reason: str, as_json: bool) -> None:
    """Show what waits for a person, with its evidence; or decide it."""
    from tasks.command.review import decide_version, waiting

    site = Site()
    if approve and reject:
        raise BadRequest("--approve and --reject: give one of them")
    if version := approve or reject:
        decide_version(site, workload, version, bool(approve), reason, user())
        click.echo(f"{workload} version {version}: {'approved' if approve else 'rejected'}")
        return
    found = waiting(site, workload)
    lines = [f"{q.title}\n{q.body}\n" for q in found] or [f"{workload}: nothing waits for a review"]
    give([q.model_dump(mode="json") for q in found], as_json, "\n".join(lines))


@cli.command()
@click.argument("workload")
@click.argument("version")
@click.option("--reason", default="released by hand")
def release(workload: str, version: str, reason: str) -> None:
    """Roll VERSION out: its release DAG, followed until it is promoted."""
    from tasks.command.up import release_version

    release_version(Site(), workload, version, reason, say)


def _check_known(site: Site, workload: str) -> None:
    """Refuse a name that is neither a workload's nor in the ledger; a workload that was taken away has its history."""
    if workload not in workload_names(site.workloads) and not site.ledger.history(workload):
        load_workload(site.workloads, workload)


@cli.command()
@click.argument("workload")
@click.option("--to", metavar="VERSION", help="default: the previous one")
@click.option("--reason", required=True)
def rollback(workload: str, to: str | None, reason: str) -> None:
    """Go back to the previous version, or to any that served; needs no Airflow."""
    from tasks.delivery import Order
    from tasks.delivery import rollback as roll_back
    from tasks.spec.settings import resolve

    # With MLflow hung the traffic is back at once, and the command ends soon after.
    site = Site(resolve(mlflow_seconds=5))
    _check_known(site, workload)
    intent_id = f"cli:{user()}:{dt.datetime.now(dt.UTC).isoformat()}"
    order = Order(workload=workload, version=to, actor=user(), reason=reason, intent_id=intent_id)
    intent = roll_back(order, site)
    say(f"{workload}: version {intent['target']['version']} serves")


@cli.command()
@click.argument("workload")
@click.option("--at", metavar="TIME", help="what served then (ISO 8601, with zone)")
@click.option("--passport", metavar="ID", help="from an answer's x-drydock-passport back to its origin")
@json_option
def history(workload: str, at: str | None, passport: str | None, as_json: bool) -> None:
    """The ledger: what served when, who approved it, why it left."""
    from tasks.history import history_text, origin_of, served_at

    site = Site()
    _check_known(site, workload)
    site.ledger.verify()
    if passport:
        found: Any = origin_of(site, workload, passport)
        give(found, as_json, "\n".join(f"{name:<20} {value}" for name, value in found.items()))
    elif at:
        found = served_at(site, workload, at)
        give(found, as_json, f"{workload}: version {found['version']}, package {found['digest_sha256']}")
    else:
        rows = [row.model_dump(mode="json") for row in site.ledger.history(workload)]
        give(rows, as_json, history_text(workload, rows))


@cli.command()
@click.argument("workload")
@click.argument("version")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def edge(workload: str, version: str, folder: Path, as_json: bool) -> None:
    """Write a version's edge bundle: its model with a one-file runner that needs onnxruntime and numpy alone."""
    from tasks.compress.edge import write_bundle
    from tasks.registry import versions

    site = Site()
    found = versions.get(site.mlflow, workload, version)
    digest = write_bundle(versions.fetch(site.mlflow, found, site.packages, site.keys), folder)
    facts = {"folder": str(folder), "variant": found.tags.get("drydock.variant", "?"), "sums_sha256": digest}
    told = f"{folder}: version {version}, stored as {facts['variant']}; SHA256SUMS has digest {digest}"
    give(facts, as_json, told)


cli.add_command(data)
cli.add_command(keys)


@cli.command()
@click.argument("name", required=False)
@json_option
def bench(name: str | None, as_json: bool) -> None:
    """Run a benchmark beside its reference (no NAME: list them); exit 10 where a limit is missed."""
    from tasks.command.bench import bench_names, run_bench, table

    site = Site()
    if name is None:
        click.echo("\n".join(bench_names(site)))
        return
    found = run_bench(site, name)
    click.echo(json.dumps(found) if as_json else table(found))
    if missed := [row["name"] for row in found["rows"] if not row["ok"]]:
        raise Refused(f"bench {name}: missed {', '.join(missed)}")


def main() -> int:
    """Run the command; every error is one line on stderr."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        return _fail(BadRequest(error.format_message()))
    except click.Abort:
        return _fail(TryAgain("stopped; the same command goes on where it was"))
    except DrydockError as error:
        return _fail(error)
    except OSError as error:
        return _fail(from_os(error))
    return 0


def _fail(error: DrydockError) -> int:
    click.echo(f"error: {error}", err=True)
    return error.exit_code
