"""A program's .ini file must come back from supervisord's own parser unchanged."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.engines.daemon import render_config
from tasks.engines.program import INSTANCE, Program, parse_ini, render_ini
from tasks.spec.errors import BadRequest

pytestmark = pytest.mark.timeout(60)

# What the four passes of supervisord's parser trip over, beside any other text.
HARD = st.sampled_from(
    [
        "%",
        "%%",
        "%(here)s",
        "%(ENV_HOME)s",
        "#",
        " #",
        ";",
        " ; x",
        ",",
        "=",
        ":",
        "'",
        '"',
        "\\",
        "\t",
        " ",
        "[",
        "$",
    ]
)
TEXT = st.lists(HARD | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"))).map(
    "".join
)


def _carried(value: str) -> bool:
    return not ("'" in value and '"' in value) and value[:1] not in "'\"" and value[-1:] not in "'\""


VALUE = TEXT.filter(lambda value: value == "" or _carried(value))
NAME = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True)


def _program(**fields) -> Program:
    return Program.parse(
        {"name": "job-x", "command": ["true"], "folder": "/f", "log": "/l/x.log"} | fields, "test"
    )


def _parsed(folder: Path, *programs: Program):
    from supervisor.options import ServerOptions

    (folder / "programs").mkdir(parents=True, exist_ok=True)
    for program in programs:
        (folder / "programs" / f"{program.name}.ini").write_text(render_ini(program, folder))
    config = folder / "supervisord.conf"
    config.write_text(render_config(folder, folder / "s.sock"))
    options = ServerOptions()
    options.realize(args=["-c", str(config)])
    return options


@pytest.mark.parametrize(
    "name", ["plain", "with space", "per%cent %(here)s", "semi ; colon # x", "[br]ack*et?"]
)
def test_a_home_of_any_name_is_included(tmp_path, name):
    folder = tmp_path / name
    options = _parsed(folder, _program(folder=str(folder), log=str(folder / "x.log")))
    assert options.directory == str(folder)
    assert options.logfile == str(folder / "supervisord.log")
    assert options.server_configs[0]["file"] == str(folder / "s.sock")
    (process,) = options.process_group_configs[0].process_configs
    assert (process.directory, process.stdout_logfile) == (str(folder), str(folder / "x.log"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.lists(TEXT, max_size=4),
    environment=st.dictionaries(NAME, VALUE, max_size=3),
    name=TEXT.filter(lambda name: "/" not in name),
)
def test_supervisord_reads_what_was_written(tmp_path, command, environment, name):
    paths = {"folder": f"/f{name}f", "log": f"{tmp_path}/l{name}l"}
    program = _program(command=["run", *command], environment=environment, **paths)
    (process,) = _parsed(tmp_path, program).process_group_configs[0].process_configs
    assert {"folder": process.directory, "log": process.stdout_logfile} == paths
    assert shlex.split(process.command) == ["run", *command]
    assert process.environment == environment | {INSTANCE: str(tmp_path)}


@given(command=st.lists(TEXT, max_size=4), environment=st.dictionaries(NAME, VALUE, max_size=3))
def test_we_read_what_was_written(command, environment):
    program = _program(command=["run", *command], environment=environment)
    assert parse_ini(render_ini(program, Path("/home")), "test") == program


def test_a_job_runs_once_and_a_service_is_restarted(tmp_path):
    log = str(tmp_path / "x.log")
    once = _program(name="once", autorestart=False, log=log)
    stays = _program(name="stays", log=log, stop_seconds=7, priority=3)
    by_name = {
        group.name: group.process_configs[0] for group in _parsed(tmp_path, once, stays).process_group_configs
    }
    assert by_name["once"].autorestart is False
    assert (by_name["once"].startretries, by_name["once"].startsecs) == (0, 0)
    assert by_name["stays"].autorestart is not False
    assert (by_name["stays"].stopwaitsecs, by_name["stays"].priority) == (7, 3)
    assert all(config.stopasgroup and config.killasgroup for config in by_name.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"command": ["a\nb"]}, "command.0 holds a line break"),
        ({"environment": {"A": "x\0"}}, "environment.A holds a line break or NUL"),
        ({"environment": {"A-B": "x"}}, "'A-B' is no name of a variable"),
        ({"environment": {"A": "s3cret'\""}}, "environment.A holds both kinds of quotes"),
        ({"environment": {"A": '"s3cret"'}}, "put the value into a file"),
        ({"folder": "here"}, "folder = 'here', must be an absolute path"),
        ({"name": "a:b"}, "name = "),
    ],
)
def test_what_supervisord_cannot_carry_is_refused(fields, message):
    with pytest.raises(BadRequest, match=message) as refusal:
        _program(**fields)
    assert "s3cret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)
