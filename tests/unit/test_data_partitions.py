"""Sources of many files: what was parsed before is taken from its part, and the result is the same."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.data import ingest as room
from tasks.data import partitions
from tasks.data.ingest import ingest, resolve
from tasks.data.partitions import Partitions
from tasks.spec.errors import BadRequest
from tasks.spec.feature import TextFeature
from tasks.spec.label import Label
from tasks.spec.privacy import Privacy
from tasks.spec.requests import IngestRequest
from tasks.spec.source import FilesSource

pytestmark = pytest.mark.timeout(60)
SOURCE = FilesSource(kind="files", path="days/*.csv")


@pytest.fixture
def parsed(monkeypatch):
    """The names of the files that were parsed."""
    names: list[str] = []
    real = room._Sink.take

    def take(self, file, reader):
        names.append(Path(file).name)
        return real(self, file, reader)

    monkeypatch.setattr(room._Sink, "take", take)
    return names


def day(folder: Path, name: str, *texts: str) -> None:
    (folder / "days").mkdir(exist_ok=True)
    (folder / "days" / name).write_text("text,label\n" + "".join(f"{text},x\n" for text in texts))


def run(folder: Path, code: str = "1", **more):
    facts = {"bad_rows": "quarantine", "privacy": Privacy(actions={"email": "mask"})} | more
    request = IngestRequest(
        workload="w", source=SOURCE, files=resolve(SOURCE, folder), feature=TextFeature(kind="text"),
        label=Label(classes=("x", "y")), **facts,
    )  # fmt: skip
    result = ingest(request, folder / "room", kept=Partitions(folder / "parts", request, code))
    aside = pq.read_table(folder / "room" / "quarantine.parquet").to_pylist()
    return result, pq.read_table(folder / "room" / "raw.parquet").column("text").to_pylist(), aside


def test_only_new_files_are_parsed_and_nothing_else_differs(tmp_path, parsed):
    day(tmp_path, "1.csv", "a", "ann@example.org", "b,c")
    day(tmp_path, "2.csv", "d")
    first = run(tmp_path)
    assert parsed == ["1.csv", "2.csv"]
    assert run(tmp_path) == first
    assert parsed == ["1.csv", "2.csv"]
    day(tmp_path, "3.csv", "bob@example.org")
    result, texts, aside = run(tmp_path)
    assert parsed == ["1.csv", "2.csv", "3.csv"]
    assert texts == ["a", "[email]", "d", "[email]"]
    assert [(Path(row["file"]).name, row["row"]) for row in aside] == [("1.csv", 3)]
    assert [(f.kind, f.found) for f in result.privacy.findings] == [("email", 2)]
    assert (result.rows, result.quarantined_rows, len(result.encodings)) == (4, 1, 3)
    assert result.privacy.rows == 4


def test_a_changed_file_another_demand_or_other_code_is_parsed_again(tmp_path, parsed, monkeypatch):
    day(tmp_path, "1.csv", "a")
    day(tmp_path, "2.csv", "b")
    run(tmp_path)
    parsed.clear()
    day(tmp_path, "2.csv", "c")
    assert run(tmp_path)[1] == ["a", "c"]
    assert parsed == ["2.csv"]
    run(tmp_path, privacy=Privacy(actions={"email": "drop"}))
    run(tmp_path, code="2")
    assert parsed == ["2.csv", "1.csv", "2.csv", "1.csv", "2.csv"]
    assert len(list((tmp_path / "parts" / "w").iterdir())) == 7
    monkeypatch.setattr(partitions, "KEPT_SECONDS", 0)
    run(tmp_path, code="2")
    assert len(list((tmp_path / "parts" / "w").iterdir())) == 2, "what nobody uses is removed"


def test_a_damaged_part_is_parsed_again_and_a_refused_file_leaves_none(tmp_path, parsed):
    day(tmp_path, "1.csv", "a")
    day(tmp_path, "2.csv", "b")
    first = run(tmp_path)
    part = next((tmp_path / "parts" / "w").iterdir()) / "part.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    parsed.clear()
    assert run(tmp_path) == first
    assert len(parsed) == 1
    day(tmp_path, "2.csv", "b,c")
    with pytest.raises(BadRequest):
        run(tmp_path, bad_rows="refuse")
    assert not [path for path in (tmp_path / "parts" / "w").iterdir() if "2" in path.suffix]


def test_a_file_that_was_renamed_is_not_parsed_again_and_bears_its_new_name(tmp_path, parsed):
    day(tmp_path, "1.csv", "a", "b,c")
    day(tmp_path, "2.csv", "d")
    run(tmp_path)
    (tmp_path / "days" / "1.csv").rename(tmp_path / "days" / "0.csv")
    _, _, aside = run(tmp_path)
    assert parsed == ["1.csv", "2.csv"]
    assert Path(aside[0]["file"]).name == "0.csv"
    assert "0.csv" in aside[0]["reason"]
    assert "1.csv" not in aside[0]["reason"]
