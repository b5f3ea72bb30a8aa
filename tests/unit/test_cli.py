"""The command's contract: exit codes and one line on stderr, in a state folder where nothing runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.cli import cli, main
from tasks.release.model import Version
from tasks.site import Site

ROOT = Path(__file__).parents[2]
VERBS = {
    *("up", "down", "test", "new", "validate", "status", "logs", "run", "step", "review"),
    *("release", "rollback", "history", "data", "bench", "keys", "edge"),
}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def drydock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: exit code, stdout, stderr."""
    shutil.copytree(ROOT / "workloads", tmp_path / "workloads")
    monkeypatch.setenv("DRYDOCK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DRYDOCK_WORKLOADS", str(tmp_path / "workloads"))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["drydock", *arguments])
        code = main()
        return (code, *capsys.readouterr())

    return run


def test_the_verbs_are_those_of_the_contract() -> None:
    assert set(cli.commands) == VERBS


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help(drydock: Command, verb: str) -> None:
    code, out, err = drydock(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fly",), "fly"),
        (("validate", "nothing"), "found digits, mnist, sms-spam"),
        (("run", "digits", "--param", "seed"), "must be NAME=VALUE"),
        (("run", "digits", "--local", "--param", "speed=3"), "speed is not known"),
        (("run", "digits", "--local", "--param", "ranks=three"), "train.ranks"),
        (("step", "sail", "request.json"), "request.json"),
        (("logs", "nobody"), "services"),
        (("new", "Bad Name"), "lower-case"),
        (("new", "digits"), "is there already"),
        (("new", "talk", "--label", "next"), "--label next: needs --feature text"),
        (("bench", "nothing"), "orchestration"),
        (("rollback", "digits"), "--reason"),
        (("review", "digits", "--approve", "1", "--reject", "1"), "one of them"),
        (("history", "digits", "--passport", "x"), "<package digest>.<ULID>"),
        (("history", "digits", "--at", "yesterday"), "ISO 8601"),
        (("data", "show", "digits-none"), "none yet"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_30(drydock: Command, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = drydock(*arguments)
    assert code == 30
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_a_wrong_setting_names_itself(drydock: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRYDOCK_MLFLOW_PORT", "none")
    code, _, err = drydock("status")
    assert code == 30
    assert "DRYDOCK_MLFLOW_PORT" in err


def test_status_and_down_work_where_nothing_runs(drydock: Command) -> None:
    code, out, _ = drydock("status")
    assert code == 0
    assert "./drydock up starts it" in out
    assert drydock("down")[0] == 0
    code, out, _ = drydock("status", "--json")
    assert json.loads(out)["services"] == {}


def test_status_tells_a_wrong_workload_file(drydock: Command, tmp_path: Path) -> None:
    path = tmp_path / "workloads" / "mnist" / "workload.yaml"
    path.write_text(path.read_text().replace("kind: mlp", "kind: resnet-9000"))
    assert "resnet-9000" in drydock("status")[1]
    code, _, err = drydock("validate")
    assert code == 30
    assert "workloads/mnist/workload.yaml: train.recipe" in err


def test_validate_prints_the_effective_file(drydock: Command) -> None:
    code, out, _ = drydock("validate", "digits", "--json")
    assert code == 0
    effective = json.loads(out)["digits"]
    assert effective["serve"]["replicas"] == 1
    assert effective["train"]["recipe"]["hidden"] == [128, 64]


KINDS = [("--feature", kind) for kind in ("text", "image", "tokens", "ids")]


@pytest.mark.parametrize("options", [(), *KINDS, ("--feature", "text", "--label", "next"), ("--own-model",)])
def test_a_new_workload_validates_as_it_is(drydock: Command, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert drydock("new", "parcels", *options)[0] == 0
    assert drydock("validate", "parcels")[0] == 0
    assert (tmp_path / "workloads" / "parcels" / "model.py").exists() == ("--own-model" in options)


def test_purge_refuses_a_folder_that_is_not_ours(drydock: Command, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").write_text("keep me")
    code, _, err = drydock("down", "--purge")
    assert code == 30
    assert "no state of ours" in err
    assert (tmp_path / "home" / "precious").exists()


def test_purge_takes_what_a_refused_command_left(drydock: Command, tmp_path: Path) -> None:
    (tmp_path / "home" / "locks").mkdir(parents=True)
    assert drydock("down", "--purge")[0] == 0
    assert not (tmp_path / "home").exists()


def test_a_wrong_file_hides_no_champion(drydock: Command, tmp_path: Path) -> None:
    assert drydock("new", "parcels")[0] == 0
    ledger = Site().ledger
    target = Version(version="7", digest_sha256="a" * 64)
    ledger.open_intent("parcels", "promote", target, None, actor="rita", reason="first", intent_id="i")
    ledger.commit("i")
    with (tmp_path / "workloads" / "parcels" / "workload.yaml").open("a") as file:
        file.write("trian: {}\n")
    code, out, _ = drydock("status")
    assert code == 0
    assert "parcels                  champion: version 7" in out
    assert "its file is wrong: workloads/parcels/workload.yaml: trian" in out


def test_a_state_of_another_schema_is_refused_with_the_way_out(drydock: Command, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "state.json").write_text('{"schema": 99}')
    code, _, err = drydock("up")
    assert code == 30
    assert "schema 99" in err
    assert "DRYDOCK_HOME" in err


def test_validate_tells_of_each_file_and_fails_where_one_is_wrong(drydock: Command, tmp_path: Path) -> None:
    for name, wrong in (("digits", "train:\n  epochs: 3"), ("mnist", "trian: 3\ntrain:")):
        path = tmp_path / "workloads" / name / "workload.yaml"
        path.write_text(path.read_text().replace("train:", wrong, 1))
    code, out, err = drydock("validate")
    assert code == 30
    digits, mnist, spam = out.splitlines()
    assert digits.startswith("digits: workloads/digits/workload.yaml: train.epochs = 3, is not a known field")
    assert mnist.startswith("mnist: workloads/mnist/workload.yaml: trian = 3, ")
    assert "must be one of train, " in mnist
    assert spam == "sms-spam: right"
    assert err.startswith("error: 2 of 3 workload files can't be taken: workloads/digits/workload.yaml: train.epochs")
    assert err.count("\n") == 1
    assert "workloads/mnist/workload.yaml: trian" in err
