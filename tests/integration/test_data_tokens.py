"""Words with a tag each, from a file to a revision: read, cleaned, audited, corrected, encoded."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.clean import clean
from tasks.data.corrections import merge
from tasks.data.expectations import suites_sha256, validate_data
from tasks.data.ingest import ingest, resolve
from tasks.data.labels import validate_labels
from tasks.data.revisions import show
from tasks.data.version import version
from tasks.spec.clean import Allowed, DropDuplicates
from tasks.spec.data import Split
from tasks.spec.errors import BadRequest
from tasks.spec.feature import TokensFeature, columns_to_rows, encode
from tasks.spec.label import Label
from tasks.spec.requests import (
    CleanRequest,
    IngestRequest,
    ValidateDataRequest,
    ValidateLabelsRequest,
    VersionRequest,
)
from tasks.spec.source import FilesSource
from tasks.spec.tokens import NO_TAG, encode_tags
from tasks.spec.validation import Expectations, LabelRules
from tasks.spec.value import RoomRef
from tasks.store.manifest import write_manifest

pytestmark = pytest.mark.timeout(180)
FEATURE = TokensFeature(kind="tokens", max_tokens=32)
LABEL = Label(column="tags", classes=("O", "PER", "LOC"))
PEOPLE, PLACES = ("Ann", "Bob", "Eve", "Joe", "Kim"), ("Rome", "Oslo", "Bern", "Lima", "Cork")


WRONG = set(range(20, 400, 20))


def sentences(rows: int = 400) -> list[dict]:
    """``Ann 3 went to Rome .``: who is a PER, where is a LOC; some tags are wrong."""
    draw, found = np.random.default_rng(0), []
    for number in range(rows):
        who, where = draw.choice(PEOPLE), draw.choice(PLACES)
        words = [who, str(number), "went", "to", where, "."]
        tags = ["PER", "O", "O", "O", "LOC", "O"]
        if number in WRONG:
            tags[4] = "O"
        found.append({"tokens": words, "tags": tags, "split": ("train", "train", "dev", "test")[number % 4]})
    return found


def ref(room: Path) -> RoomRef:
    return RoomRef(uri=str(room), digest_sha256=write_manifest(room))


def read(folder: Path, rows: list[dict], name: str = "d.jsonl", **more):
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    source = FilesSource(kind="files", path=name)
    files = resolve(source, folder)
    facts = {"workload": "w", "source": source, "files": files, "feature": FEATURE, "label": LABEL}
    result = ingest(IngestRequest(**facts, split_column="split", **more), folder / "raw")
    return result, pq.read_table(folder / "raw" / "raw.parquet")


def test_lists_and_texts_are_read_to_one_form(tmp_path):
    rows = [{"tokens": ["EU", "rejects"], "tags": ["LOC", "O"], "split": "train"}]
    for name in ("d.jsonl", "d.parquet"):
        _, table = read(tmp_path, rows, name)
        assert table.select(["tokens", "tags"]).to_pylist() == [{"tokens": "EU rejects", "tags": "LOC O"}]
    _, table = read(tmp_path, [{"tokens": " EU   rejects ", "tags": "LOC O", "split": "train"}])
    assert table.column("tokens").to_pylist() == ["EU rejects"]


@pytest.mark.parametrize(
    ("words", "tags", "found"),
    [
        (["a", "b"], ["O"], "'tags', row 1: found 1, must be 2 tags"),
        (["a", "b c"], ["O", "O"], "'tokens', row 1: found 'b c'"),
        (["a", ""], ["O", "O"], "found ''"),
        (["a", None], ["O", "O"], "found None"),
        (["a", "b"], ["O", "O", "O"], "must be 2 tags"),
    ],
)
def test_a_row_whose_words_and_tags_dont_fit_is_refused_or_kept_aside(tmp_path, words, tags, found):
    rows = [{"tokens": words, "tags": tags, "split": "train"}]
    with pytest.raises(BadRequest) as error:
        read(tmp_path, rows)
    assert found in str(error.value)
    good = {"tokens": ["a"], "tags": ["O"], "split": "train"}
    result, _ = read(tmp_path, [*rows, good], bad_rows="quarantine")
    assert (result.rows, result.quarantined_rows) == (1, 1)


def test_from_a_file_to_a_corrected_revision(tmp_path):
    rows = [*sentences(), {"tokens": ["odd"], "tags": ["ORG"], "split": "train"}]
    _ingested, _ = read(tmp_path, rows)
    asked = CleanRequest(
        workload="w", raw=ref(tmp_path / "raw"), feature=FEATURE, label=LABEL, split=Split(column="split"),
        rules=(Allowed(rule="allowed_labels"), DropDuplicates(rule="drop_duplicates")),
    )  # fmt: skip
    cleaned = clean(asked, tmp_path / "clean")
    assert (cleaned.rows_out, cleaned.dropped_rows) == (400, 1)
    assert cleaned.rows_by_split == {"train": 200, "validation": 100, "holdout": 100}
    rooms = {"clean": ref(tmp_path / "clean")}
    (tmp_path / "suites").mkdir()
    validated = validate_data(
        ValidateDataRequest(
            workload="w", raw=ref(tmp_path / "raw"), clean=rooms["clean"], rows_in=401, dropped_rows=1, feature=FEATURE,
            label=LABEL, split=asked.split, expectations=Expectations(),
            suites_sha256=suites_sha256(tmp_path / "suites", "w"),
        ),
        tmp_path / "data", tmp_path / "suites",
    )  # fmt: skip
    assert validated.success, validated.failed
    assert not validated.warned
    judge = ValidateLabelsRequest(workload="w", clean=rooms["clean"], feature=FEATURE, label=LABEL, rules=LabelRules())
    labels = validate_labels(judge, tmp_path / "labels")
    assert labels.verdict.verdict == "pass", labels.verdict.summary
    assert labels.class_counts == {"O": 1619, "PER": 400, "LOC": 381}
    queue = list(csv.DictReader((tmp_path / "labels" / "queue.csv").open()))
    found = {int(row["row_id"]) for row in queue if row["suggested"] == "PER O O O LOC O"}
    assert found <= WRONG
    assert len(found) >= 15
    assert ": O -&gt; LOC" in (tmp_path / "labels" / "queue.html").read_text()
    refs = rooms | {"validate_data": ref(tmp_path / "data"), "validate_labels": ref(tmp_path / "labels")}
    made = version(VersionRequest(workload="w", feature=FEATURE, **refs), tmp_path / "version", tmp_path / "datasets")
    assert made.class_counts == {"LOC": 381, "O": 1619, "PER": 400}
    assert show(tmp_path / "datasets", made.revision)["rows"] == 400

    for row in queue:
        row["answer"] = row["suggested"] if int(row["row_id"]) in found else row["label"]
    answered = tmp_path / "answers.csv"
    with answered.open("w") as stream:
        writer = csv.DictWriter(stream, queue[0])
        writer.writeheader()
        writer.writerows(queue)
    merged = merge(tmp_path / "kept", "w", answered, LABEL.names, "ann", "2026-11-26T12:00:00+00:00", is_tagged=True)
    assert merged.changed == len(found)
    again = clean(asked.model_copy(update={"corrections": merged.room}), tmp_path / "again")
    assert again.changed_cells == len(found)
    corrected = pq.read_table(tmp_path / "again" / "data.parquet")
    assert corrected.column("label").to_pylist().count("PER O O O O O") == len(WRONG) - len(found)
    answered.write_text(answered.read_text().replace("PER O O O LOC O", "PER O"))
    with pytest.raises(BadRequest, match="as many as the label has"):
        merge(tmp_path / "kept", "w", answered, LABEL.names, "ann", "2026-11-26T12:00:01+00:00", is_tagged=True)


def test_a_tag_stands_at_its_words_first_piece():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[PAD]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["went to"] * 9, trainer)
    table = pa.table({"tokens": ["Bob went to Lima", "x " * 40 + "x"]})
    rows = columns_to_rows(table, FEATURE)
    x = encode(FEATURE, rows, tokenizer)
    y = encode_tags(FEATURE, rows, [[1, 0, 0, 2], [0] * 41], tokenizer)
    assert x.shape == y.shape == (2, 32)
    assert [code for code in y[0] if code != NO_TAG] == [1, 0, 0, 2]
    assert (y[x == 0] == NO_TAG).all()
    pieces = tokenizer.encode(rows[0], is_pretokenized=True)
    first = next(place for place, word in enumerate(pieces.word_ids) if word == 3)
    assert y[0, first] == 2
    assert encode(FEATURE, rows[:1], tokenizer, pad_to_longest=True).shape == (1, len(pieces.ids))
    for bad in ([["a b"]], [[""]], [[]], [" "], [3], [["x" * 10_001]]):
        with pytest.raises(BadRequest):
            encode(FEATURE, bad, tokenizer)
