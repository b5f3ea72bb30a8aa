"""Numbers as labels and ids as features: what is measured of them, what a workload may say, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from tasks.evaluate.numeric import NumberAnswers, ndcg, recall
from tasks.spec.errors import BadRequest
from tasks.spec.evaluate import Evaluate, Slice
from tasks.spec.feature import IdsFeature, TableFeature, encode
from tasks.spec.ids import KnownIds
from tasks.spec.label import NumberLabel
from tasks.spec.metrics import declared, wrong_with
from tasks.spec.rules import Rule
from tasks.spec.workload import Workload

pytestmark = pytest.mark.timeout(30)
LABEL = NumberLabel(kind="number", column="rating", min=0.5, max=5)
IDS = IdsFeature(kind="ids", user="userId", item="movieId")
FILES = {"name": "r.csv", "bytes": 1, "sha256": "0" * 64}
FILE = """
name: films
data:
  source: {kind: files, path: ratings.parquet}
  feature: {kind: ids, user: userId, item: movieId}
  label: {kind: number, column: rating, min: 0.5, max: 5}
train: {recipe: {kind: factors}, ranks: 1}
gate: {rules: [{metric: rmse, max: 0.9}]}
"""


def answers(users: int = 40, items: int = 12) -> NumberAnswers:
    draw = np.random.default_rng(0)
    true = np.round(2 * draw.uniform(0.5, 5, users * items)) / 2
    whose = np.repeat([f"u{k}" for k in range(users)], items)
    return NumberAnswers(true, np.clip(true + draw.normal(size=len(true)), 0.5, 5), LABEL, whose)


def test_errors_are_what_their_names_say_and_intervals_hold_them():
    found = answers()
    by_name = {m.metric: m for m in found.measure()}
    error = found.said - found.true
    assert by_name["rmse"].value == pytest.approx(np.sqrt(np.mean(error**2)))
    assert by_name["mae"].value == pytest.approx(np.mean(np.abs(error)))
    assert all(m.low < m.value < m.high for m in by_name.values())
    assert (by_name["rmse"].samples, by_name["ndcg_at_10"].samples) == (480, 40)
    perfect = {m.metric: m.value for m in found._replace(said=found.true).measure()}
    assert (perfect["rmse"], perfect["ndcg_at_10"]) == (0, 1)
    whole, half = by_name["rmse"], found.measure_part("slice:half", np.arange(480) < 240)
    assert half[0].samples == 240
    assert half[0].value != whole.value


def test_users_are_drawn_whole_so_those_who_err_together_widen_the_interval():
    draw = np.random.default_rng(0)
    off = np.repeat(np.abs(draw.normal(size=50)), 40)
    alone = NumberAnswers(np.full(2000, 2.0), 2 + off, LABEL)
    grouped = alone._replace(users=np.repeat(np.arange(50), 40))
    width = [(m := one.measure()[0]).high - m.low for one in (alone, grouped)]
    assert width[1] > 3 * width[0]


def test_a_part_without_rows_has_no_samples():
    assert [m.samples for m in answers().measure_part("slice:none", np.zeros(480, bool))] == [0, 0]


@pytest.mark.parametrize(
    ("gains", "said", "expected"),
    [
        ([3, 2, 0], [9, 8, 7], 1.0),
        ([0, 1], [9, 8], 1 / np.log2(3)),
        ([3, 0, 1], [1, 2, 3], (1 + 3 / 2) / (3 + 1 / np.log2(3))),
        ([1, 0], [5, 5], 1.0),
        ([0, 0, 0], [1, 2, 3], None),
        ([4], [1], None),
        ([0] * 10 + [1], list(range(11, 0, -1)), 0.0),
    ],
)
def test_ndcg_by_hand(gains, said, expected):
    found = ndcg(np.array(gains, float), np.array(said, float))
    assert found == (None if expected is None else pytest.approx(expected))


def test_recall_by_hand():
    wanted = np.array([True] * 2 + [False] * 9 + [True])
    assert recall(wanted, np.arange(12.0)) == pytest.approx(1 / 3)
    assert recall(wanted, -np.arange(12.0)) == pytest.approx(2 / 3)
    assert recall(wanted[:10], np.arange(10.0)) is None
    assert recall(np.zeros(12, bool), np.arange(12.0)) is None


def test_where_few_items_leave_nothing_to_rank_there_are_no_samples():
    by_name = {m.metric: m for m in answers(items=1).measure()}
    assert (by_name["ndcg_at_10"].samples, by_name["recall_at_10"].samples) == (0, 0)


def test_what_is_measured_can_be_ruled_on_and_what_is_of_classes_can_not():
    sliced = Evaluate(slices=(Slice(name="half", where="true"),))
    found = answers()
    for m in declared((*found.measure(), *found.measure_part("slice:half", np.ones(480, bool)))):
        assert wrong_with(Rule(metric=m.metric, slice=m.slice, max=m.value), IDS, LABEL, sliced) is None
    table = TableFeature(kind="table", columns=("x", "y"))
    for metric, feature in (("accuracy", IDS), ("agreement", IDS), ("ndcg_at_10", table)):
        assert wrong_with(Rule(metric=metric, min=0.1), feature, LABEL, sliced).startswith(f"metric = '{metric}'")
    assert wrong_with(Rule(metric="rmse_gain", min=-0.1), IDS, LABEL, sliced) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max: 5}", "max: 0.5}", "data.label: min = 0.5, must be below max = 0.5"),
        ("column: rating", "column: label", "data.label: column = 'label', must be another name"),
        ("kind: number", "kind: text", "kind must be class, number or next"),
        ("kind: number, column: rating, min: 0.5, max: 5", "classes: [1, 2]", "must be number where data.feature.kind"),
        ("item: movieId", "item: userId", "must be two columns"),
        ("kind: factors", "kind: mlp", "must be one that reads data.feature.kind = 'ids': factors"),
        ("ranks: 1", "ranks: 1, class_weights: balanced", "are for classes"),
        ("ranks: 1", "ranks: 1, stopping: {metric: accuracy}", "must be loss: a number is learnt"),
        ("metric: rmse", "metric: accuracy", "metric = 'accuracy', must be one of rmse, "),
        ("gate:", "evaluate: {relevant: 6}\ngate:", "evaluate.relevant = 6, must be from 0.5 to 5"),
        ("gate:", "compress: {variants: [fp32, {kind: pruned}]}\ngate:", "'pruned' is for classes"),
        ("train:", "  split: {stratified: true}\ntrain:", "split.stratified = true: a number is of no class"),
    ],
)
def test_what_a_workload_of_numbers_may_not_say(old, new, message):
    assert Workload.parse(yaml.safe_load(FILE), "films").data.label == LABEL
    with pytest.raises(BadRequest, match=f"^films: .*{message.replace('.', '[.]')}"):
        Workload.parse(yaml.safe_load(FILE.replace(old, new, 1)), "films")


def test_ids_have_codes_and_the_unknown_one():
    known = KnownIds.of_rows([["7", "x"], ["12", "y"], ["7", "z"]])
    assert known.columns == (("12", "7"), ("x", "y", "z"))
    again = KnownIds.parse(known.to_str(), "ids.json")
    assert encode(IDS, [[7, "z"], ["12", "no"], ["nobody", "x"]], again).tolist() == [[2, 3], [1, 0], [0, 1]]
    for odd in ([1.5, "x"], [True, "x"], ["", "x"], [None, "x"], ["a" * 257, "x"], ["x"], "xy"):
        with pytest.raises(BadRequest):
            encode(IDS, [odd], again)


@pytest.mark.parametrize("text", ["{}", "[[]]", '[["a"], [1]]', '[["a", "a"], ["b"]]', "no"])
def test_what_is_no_list_of_ids_is_refused(text):
    with pytest.raises(BadRequest, match=r"^ids[.]json: "):
        KnownIds.parse(text, "ids.json")


@pytest.mark.parametrize(
    ("users", "ratings", "message"),
    [
        (["a", "b"] * 6, [1.0, 6.0] * 6, "data.parquet: rating = 6, must be from 0.5 to 5; see data.label"),
        (["a", "b"] * 6, [1.0, None] * 6, "data.parquet: rating = nan, must be from 0.5 to 5; see data.label"),
        (["a"] * 12, [1.0, 2.0] * 6, "data.parquet: the train split has 1 userId, must be 2 or more"),
    ],
)
def test_a_training_is_refused_that_can_teach_nothing(tmp_path, users, ratings, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.spec.requests import TrainRequest
    from tasks.train.prepare import prepare

    columns = {"userId": users, "movieId": ["x", "y", "z"] * 4, "label": pa.array(ratings, pa.float64())}
    pq.write_table(pa.table(columns | {"split": ["train"] * 8 + ["validation"] * 4}), tmp_path / "data.parquet")
    request = {"workload": "films", "dataset": {"uri": "x", "digest_sha256": "0"}, "revision": "films-000000000000"}
    request |= {"feature": IDS.model_dump(mode="json"), "label": LABEL.model_dump(mode="json")}
    request |= {"train": {"recipe": {"kind": "factors"}, "ranks": 1}}
    with pytest.raises(BadRequest) as error:
        prepare(tmp_path / "data.parquet", TrainRequest.parse(json.loads(json.dumps(request)), "train"), tmp_path)
    assert str(error.value) == message


def test_late_truth_of_numbers_is_measured_and_held_to_the_range():
    from tasks.truth import _wrong, measure_numbers

    found = {m.metric: m.value for m in measure_numbers([("3.5", "4"), ("2", "0.5")], LABEL)}
    assert found == {"rmse": pytest.approx((0.25 / 2 + 2.25 / 2) ** 0.5), "mae": 1}
    assert measure_numbers([], LABEL) == ()
    assert _wrong("4.5", LABEL, False) is None
    for odd in ("6", "nan", "good"):
        assert _wrong(odd, LABEL, False) == f"'{odd}' must be a number from 0.5 to 5"


def test_a_rating_that_is_no_number_is_told_by_file_column_and_row():
    import pyarrow as pa

    from tasks.data.columns import schema_of, typed
    from tasks.data.convert import Place
    from tasks.spec.requests import IngestRequest

    request = {"workload": "films", "source": {"kind": "files", "path": "r.csv"}, "files": [FILES]}
    request |= {"feature": IDS.model_dump(mode="json"), "label": LABEL.model_dump(mode="json")}
    asked = IngestRequest.parse(request, "ingest")
    columns = {"userId": pa.array([1, 2], pa.int32()), "movieId": ["x", "y"], "rating": ["4.5", "good"]}
    batch = pa.RecordBatch.from_pydict(columns)
    with pytest.raises(BadRequest, match=r"rating.*good.*must be a number"):
        typed(asked, batch, schema_of(asked), Place("r.csv", 0))
    fine = pa.RecordBatch.from_pydict(columns | {"rating": ["4.5", " 3 "]})
    assert typed(asked, fine, schema_of(asked), Place("r.csv", 0)).to_pylist() == [
        {"userId": "1", "movieId": "x", "rating": 4.5},
        {"userId": "2", "movieId": "y", "rating": 3.0},
    ]
