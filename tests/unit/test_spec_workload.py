"""Workload files: strict, one line on what is wrong, and the same value after writing and reading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.spec.cron import is_cron
from tasks.spec.errors import BadRequest
from tasks.spec.load import load_workload, workload_names
from tasks.spec.metrics import METRICS
from tasks.spec.rules import Evidence, Measurement, Rule
from tasks.spec.value import canonical_json
from tasks.spec.workload import Workload

pytestmark = pytest.mark.timeout(60)
SHIPPED = Path(__file__).parents[2] / "workloads"
SMALL = """\
name: boats
data:
  source: {kind: files, path: boats.csv}
  feature: {kind: table, columns: [width, height]}
  label: {classes: ["no", "yes"]}
train:
  recipe: {kind: mlp}
"""


def write(folder: Path, text: str, name: str = "boats") -> Path:
    (folder / "workloads" / name).mkdir(parents=True)
    (folder / "workloads" / name / "workload.yaml").write_text(text)
    return folder / "workloads"


def refusal(folder: Path, text: str, name: str = "boats") -> str:
    """The one line with which a file is refused."""
    with pytest.raises(BadRequest) as caught:
        load_workload(write(folder, text, name), name)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"workloads/{name}/workload.yaml: ")
    assert len(line) < 400
    return line


def test_a_short_file_is_a_whole_workload(tmp_path):
    workload = load_workload(write(tmp_path, SMALL), "boats")
    assert workload.review.required
    assert workload.gate.rules
    assert workload.data.label.names == ("no", "yes")
    assert workload.train.world_size == 2


@pytest.mark.parametrize("name", workload_names(SHIPPED))
def test_every_shipped_workload_is_right(name):
    workload = load_workload(SHIPPED, name)
    assert workload.description
    assert any(rule.against is None for rule in workload.gate.rules), "a first version needs an absolute rule"


def test_the_shipped_ones_are_found():
    assert {"digits", "mnist", "sms-spam"} <= set(workload_names(SHIPPED))


def test_a_folder_that_a_killed_command_left_is_no_workload(tmp_path):
    assert workload_names(write(tmp_path, SMALL, ".boats.new")) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("recipe: {kind: mlp}", "recipe: {kind: mlp}\n  epochs: 3", ["train.epochs = 3", "known field, must be"]),
        ("kind: mlp", "kind: mlp, widths: [3]", ["train.recipe.widths = [3]", "one of kind, hidden, dropout"]),
        ("{kind: mlp}", "{kind: mlp, hiden: [3]}", ["train.recipe.hiden = [3]", "one of hidden, kind, dropout"]),
        ("{kind: mlp}", "{kind: mlp}\n  optimiser: {lr: 0.1}", ["train.optimiser.lr = 0.1", "learning_rate"]),
        ("train:", "compress: {variants: [{kind: pruned, ration: 1}]}\ntrain:", ["0.ration = 1", "one of ratio, "]),
        (
            "train:",
            "search: {space: {seed: {low: 1, hihg: 2}}}\ntrain:",
            ["search.space.seed.hihg = 2", "one of high, low"],
        ),
        ("{kind: mlp}", '{kind: mlp}\n  batch_size: "64"', ['train.batch_size = "64"', "integer"]),
        ("{kind: mlp}", "{kind: mlp}\n  batch_size: 64.5", ["train.batch_size = 64.5", "integer"]),
        ("{kind: mlp}", "{kind: mlp}\n  ranks: true", ["train.ranks = true", "integer"]),
        ("{kind: mlp}", "{kind: mlp}\n  batch_size: 0", ["train.batch_size = 0", "greater than or equal to 1"]),
        ("{kind: mlp}", "{kind: mlp}\n  batch_size: 65", ["batch_size = 65", "nodes x ranks x accumulate = 2"]),
        (
            "train:\n  recipe: {kind: mlp}",
            "compress: {variants: [{kind: distilled, student: {kind: mlp}}]}\ntrain:\n  parallel: tensor\n"
            "  recipe: {kind: mlp, dropout: 0}",
            ["compress.variants.0.student, trained as train says: recipe.dropout = 0.2, must be 0"],
        ),
        ("{kind: mlp}", "{kind: mpl}", ["train.recipe", "mlp", "text-cnn", "model.py"]),
        *(
            ("{kind: mlp}", f"{{kind: mlp{recipe}}}\n  parallel: tensor{more}", words)
            for recipe, more, words in (
                ("", "", ["recipe.dropout = 0.2", "must be 0 where parallel is 'tensor'; or parallel: ddp"]),
                (", dropout: 0, hidden: [9]", "", ["recipe.hidden[0] = 9", "a multiple of nodes x ranks / copies = 2"]),
                (", dropout: 0, hidden: []", "", ["recipe.hidden = ()", "must have a width"]),
                (", dropout: 0", "\n  gradients: fp16", ["gradients = 'fp16'", "must be fp32", "'tensor'"]),
                (", dropout: 0", "\n  compile: true", ["compile = true", "must be false where parallel is 'tensor'"]),
                (", dropout: 0", "\n  batch_size: 65\n  accumulate: 2", ["must be a multiple of copies x acc"]),
            )
        ),
        ("{kind: mlp}", "{kind: text-cnn}", ["train.recipe.kind = 'text-cnn'", "data.feature.kind = 'table'"]),
        ("  recipe: {kind: mlp}", "  ranks: 1", ["train.recipe is missing"]),
        ('["no", "yes"]', '["no"]', ['data.label.classes = ["no"]', "at least 2"]),
        ('["no", "yes"]', '["no", "no"]', ["classes = ['no', 'no']", "distinct"]),
        ('["no", "yes"]', "[no, yes]", ["data.label.classes"]),  # YAML 1.1 reads them as false and true
        ("[width, height]", "[width, width]", ["columns", "distinct"]),
        ("[width, height]", "[width, label]", ["label.column = 'label'", "feature column too"]),
        ("kind: files", "kind: ftp", ["data.source", "ftp", "files"]),
        ("train:", "serve: {replicas: 65}\ntrain:", ["serve.replicas = 65", "less than or equal to 64"]),
        ("train:", "gate: {rules: []}\ntrain:", ["gate.rules = []", "at least 1"]),
        ("train:", "gate: {rules: [{metric: a}]}\ntrain:", ["'a'", "min/max or max_drop/max_rise"]),
        ("train:", "gate: {rules: [{metric: a, max_drop: 1}]}\ntrain:", ["against: champion"]),
        ("train:", "gate: {rules: [{metric: a, min: .nan}]}\ntrain:", ["gate.rules.0.min", "finite"]),
        ("train:", "gate: {rules: [{metric: a, max: .inf}]}\ntrain:", ["gate.rules.0.max", "finite"]),
        *(
            ("train:", f"gate: {{rules: [{{metric: accuracy, min: .8}}, {{{rule}}}]}}\ntrain:", words)
            for rule, words in (
                ("metric: acuracy, min: .8", ["gate.rules.1.metric = 'acuracy'", "must be one of accuracy, "]),
                ("metric: recall, slice: 'class:zebra', min: .8", ["gate.rules.1.slice = 'class:zebra'", "class:yes"]),
                ("metric: recall, min: .8", ["rules.1.slice = 'overall'", "recall is measured on: class:no"]),
                ("metric: accuracy, slice: 'slice:far', min: .8", ["rules.1.slice = 'slice:far'", "overall"]),
                ("metric: accuracy, slice: 'perturbed:blur', min: .8", ["perturbed:blur'", "perturbed:noise"]),
                ("metric: accuracy, slice: 'sex=male', min: .8", ["rules.1.slice = 'sex=male'"]),
                ("metric: recall_gap, slice: 'group:sex', max: .1", ["by group, and section evaluate declares none"]),
                ("metric: p99_ms, min: .9, max: .1", ["rules.1: min = 0.9", "'p99_ms'", "at most max = 0.1"]),
                ("metric: accuracy, min: 1.5", ["gate.rules.1.min = 1.5, must be from 0 to 1 for accuracy"]),
                ("metric: model_bytes, max: -1", ["gate.rules.1.max = -1, must be 0 or more for model_bytes"]),
                ("metric: accuracy, against: champion, max_drop: 2", ["rules.1.max_drop = 2", "from -1 to 1"]),
                ("metric: mcnemar_p, against: champion, max_drop: .1", ["rules.1.against = 'champion'", "left out"]),
            )
        ),
        (
            "train:",
            "gate: {rules: [{metric: agreement, min: .9}]}\ncompress: {variants: [int8]}\ntrain:",
            ["gate.rules.0.metric = 'agreement'", "needs fp32"],
        ),
        (
            "train:",
            "gate: {rules: [{metric: agreement, min: .9}]}\ncompress: {variants: [{kind: int8, name: fp32}]}\ntrain:",
            ["gate.rules.0.metric = 'agreement'", "needs fp32"],
        ),
        ("{kind: mlp}", "{kind: model.py}", ["train.recipe.kind = 'model.py'", "no model.py beside this file"]),
        (
            "train:",
            "compress: {variants: [{kind: distilled, student: {kind: model.py}}]}\ntrain:",
            ["compress.variants.0.student.kind = 'model.py'", "no model.py"],
        ),
        ("train:", "review: {two_person: true, accept_unnamed: true}\ntrain:", ["accept_unnamed = true"]),
        ("train:", 'schedule: "every day"\ntrain:', ["schedule", "every day", "cron"]),
        ("train:", 'schedule: "a b c d e"\ntrain:', ["schedule", "a b c d e", "cron"]),
        ("train:", 'schedule: "61 * * * *"\ntrain:', ["schedule", "61", "cron"]),
        ("train:", 'schedule: "@sometimes"\ntrain:', ["schedule", "@sometimes", "cron"]),
        ("train:", "compress: {variants: [fp32, fp32]}\ntrain:", ["distinct"]),
        ("train:", "evaluate: {perturb: [blur]}\ntrain:", ["evaluate.perturb = 'blur', must be one of noise, missing"]),
        ("train:", "evaluate: {perturb: [noise, noise]}\ntrain:", ["evaluate.perturb", "distinct"]),
        ("train:", "evaluate: {perturb: true}\ntrain:", ["evaluate.perturb = true"]),
        (
            "train:",
            "evaluate: {perturb: [noise]}\ngate: {rules: [{metric: accuracy, slice: 'perturbed:missing', min: .8}]}\n"
            "train:",
            ["rules.0.slice = 'perturbed:missing'", "accuracy is measured on: perturbed:noise, overall"],
        ),
        ("train:", "evaluate: {groups: [sex]}\ntrain:", ["evaluate.groups = 'sex'", "feature's or kept column"]),
        ("  feature:", "  keep: [sex]\n  feature:", ["data: keep: 'sex'", "must be one of []"]),
        (
            "  feature:",
            "  columns: {sex: text}\n  keep: [sex]\n  privacy: {columns: {sex: {action: drop}}}\n  feature:",
            ["data: keep: 'sex'", "dropped by privacy.columns"],
        ),
        ("  feature:", "  columns: {split: text}\n  keep: [split]\n  feature:", ["data: keep: 'split'", "our own"]),
        ("train:", "compress: {variants: [int3]}\ntrain:", ["compress.variants.0", "int3", "int8"]),
        ("train:", "compress: {variants: [{kind: int3}]}\ntrain:", ["compress.variants.0", "int3", "int8"]),
        ("train:", "compress: {variants: [{kind: pruned, ratio: 1}]}\ntrain:", ["compress.variants.0.ratio = 1"]),
        (
            "train:",
            "compress: {variants: [fp32, {kind: pruned, of: heads}]}\ntrain:",
            ["compress.variants.1.of = 'heads', must be units", "'mlp' has no heads"],
        ),
        ("train:", "compress: {variants: [{kind: distilled}]}\ntrain:", ["compress.variants.0.student is missing"]),
        *(
            ("train:", f"compress: {{variants: [{{kind: distilled, student: {student}}}]}}\ntrain:", words)
            for student, words in (
                ("[{kind: mlp}]", ["compress.variants.0.student = ", "at least 2"]),
                ("[{kind: mlp}, {kind: mpl}]", ["compress.variants.0.student.1", "mpl", "mlp"]),
                ("{kind: mlp, hiden: [3]}", ["compress.variants.0.student.hiden = [3]", "one of hidden, kind"]),
                ("[{kind: mlp}, {kind: mlp, hiden: [3]}]", ["variants.0.student.1.hiden = [3]", "one of hidden, kind"]),
                ("[{kind: mlp}, {kind: model.py}]", ["compress.variants.0.student.kind = 'model.py'", "no model.py"]),
            )
        ),
        ("train:", "compress: {variants: [int8, {kind: int8}]}\ntrain:", ["distinct", "name of its own"]),
        ("name: boats", "name: Boats", ['name = "Boats"', "pattern"]),
        ("name: boats", "name: ships", ["name = 'ships'", "the folder's name 'boats'"]),
        ("name: boats", "name: boats\nname: boats", ["name is written twice"]),
        ("{kind: mlp}", "{kind: mlp, kind: mlp}", ["kind is written twice", "line 7"]),
        ("name: boats", "name: boats\nextra: &a [*a]", ["readable YAML"]),
        ("name: boats", "name: boats\ndescription: 2026-13-45", ["readable YAML"]),
        ("name: boats", "name: !!python/object:os.system boats", ["readable YAML"]),
        ("name: boats", "name: [boats", ["readable YAML"]),
        ("label: {classes", "split: {holdout: 1.4}\n  label: {classes", ["data.split.holdout = 1.4", "less than 1"]),
        ("label: {classes", "split: {holdout: .8}\n  label: {classes", ["holdout = 0.8", "0.9 or less"]),
        (
            "label: {classes",
            "clean: [{rule: trim, column: x}]\n  label: {classes",
            ["clean.0.column = 'x'", "height"],
        ),
        (
            "label: {classes",
            "clean: [{rule: range, column: width, min: .nan}]\n  label: {classes",
            ["data.clean.0.min", "finite"],
        ),
        (
            "label: {classes",
            "clean: [{rule: range, column: width, min: 2, max: 1}]\n  label: {classes",
            ["min = 2", "at most max = 1"],
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, old, new, words):
    assert old in SMALL
    line = refusal(tmp_path, SMALL.replace(old, new, 1))
    for word in words:
        assert word in line


def test_agreement_is_with_the_candidate_of_the_kind_fp32_whatever_its_name(tmp_path):
    rule = "gate: {rules: [{metric: agreement, min: .9}]}"
    named = SMALL.replace("train:", f"{rule}\ncompress: {{variants: [{{kind: fp32, name: whole}}, int8]}}\ntrain:", 1)
    assert load_workload(write(tmp_path, named), "boats").compress.labels == ("whole", "int8")


def test_a_search_over_what_scales_the_loss_is_held_by_a_metric(tmp_path):
    search = "search: {space: {label_smoothing: {choices: [0.0, 0.1]}}}\n"
    message = refusal(tmp_path, SMALL + search)
    assert message.count("search.space.label_smoothing: losses under other values can't be compared") == 1, message


TAGGED = """
name: boats
data:
  source: {kind: files, path: boats.jsonl}
  feature: {kind: tokens}
  label: {column: tags, classes: [O, B-x, I-x]}
train: {recipe: {kind: transformer}, stopping: {metric: entity_f1}}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kind: tokens", "kind: text", ["train.stopping.metric = 'entity_f1'", "must be loss or accuracy"]),
        ("B-x, I-x", "B-x, I x", ["data.label.classes: 'I x'", "white space"]),
        (
            "train:",
            "compress: {variants: [{kind: distilled, student: {kind: transformer}}]}\ntrain:",
            ["compress.variants: 'distilled'", "tags words"],
        ),
        ("kind: transformer", "kind: text-cnn", ["'tokens'", "transformer, pretrained, model.py"]),
    ],
)
def test_what_does_not_fit_tagged_words_is_refused(tmp_path, old, new, words):
    load_workload(write(tmp_path / "right", TAGGED), "boats")
    message = refusal(tmp_path, TAGGED.replace(old, new, 1))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["", "boats", "- a", "null", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert "mapping" in refusal(tmp_path, text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    workloads = write(tmp_path, "")
    (workloads / "boats" / "workload.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(BadRequest, match="readable YAML"):
        load_workload(workloads, "boats")


def test_an_unknown_workload_tells_those_there_are():
    with pytest.raises(BadRequest, match=r"'boats' is not there: found .*digits.*; ./drydock new boats"):
        load_workload(SHIPPED, "boats")


@pytest.mark.parametrize("schedule", ["0 3 * * *", "*/5 0-6 1,15 * mon-fri", "@daily", "0 0 1 JAN 7", None])
def test_schedules_that_cron_knows_are_taken(schedule):
    data = yaml.safe_load(SMALL) | {"schedule": schedule}
    assert Workload.parse(data, "x").schedule == schedule


@example("0 0 1 1 0/00")
@given(st.lists(st.text("0123456789*-/,amonjule@", max_size=5), min_size=5, max_size=5).map(" ".join))
@settings(max_examples=300)
def test_every_schedule_that_is_taken_is_one_for_airflow_too(line):
    from croniter import croniter

    if is_cron(line):
        assert croniter.is_valid(line)


# --- properties ---------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
ABSOLUTE = st.sampled_from(sorted(name for name, metric in METRICS.items() if "overall" in metric.places))
RELATIVE = ABSOLUTE.filter(lambda name: not METRICS[name].compares)
RATIOS = st.floats(0, 1)
RULES = st.one_of(
    st.builds(lambda metric, limits: Rule(metric=metric, min=min(limits), max=max(limits)), ABSOLUTE,
              st.tuples(RATIOS, RATIOS)),
    st.builds(Rule, metric=ABSOLUTE, slice=st.sampled_from(["overall", "*", "o*"]), min=RATIOS),
    st.builds(Rule, metric=RELATIVE, against=st.just("champion"), max_drop=RATIOS, max_rise=st.none() | RATIOS),
)  # fmt: skip


@st.composite
def workloads(draw):
    text = draw(st.booleans())
    ranks, share = draw(st.integers(1, 8)), draw(st.integers(1, 64))
    columns = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    feature = {"kind": "text", "column": columns[0]} if text else {"kind": "table", "columns": columns}
    label = draw(NAMES.filter(lambda name: name not in columns))
    classes = draw(st.lists(st.integers() | NAMES, min_size=2, max_size=5, unique_by=str))
    return {
        "name": draw(st.from_regex(r"[a-z][a-z0-9-]{0,39}", fullmatch=True)),
        "description": draw(st.text(st.characters(codec="utf-8"), max_size=20)),
        "data": {
            "source": {"kind": "files", "path": draw(NAMES)},
            "feature": feature,
            "label": {"column": label, "classes": classes},
            "clean": [{"rule": "drop_missing", "column": label}],
        },
        "train": {
            "recipe": {"kind": "text-cnn" if text else "mlp"},
            "ranks": ranks,
            "batch_size": ranks * share,
            "optimiser": {"learning_rate": draw(st.floats(1e-9, 1e3))},
        },
        "gate": {"rules": [rule.model_dump(mode="json") for rule in draw(st.lists(RULES, min_size=1, max_size=3))]},
    }


@given(data=workloads())
@settings(max_examples=80, deadline=None)
def test_a_workload_is_the_same_after_writing_and_reading(data):
    workload = Workload.parse(data, "x")
    dumped = workload.model_dump(mode="json")
    again = Workload.parse(json.loads(canonical_json(dumped)), "again")
    assert again == workload
    assert again.fingerprint == workload.fingerprint
    assert Workload.parse(yaml.safe_load(yaml.safe_dump(dumped)), "yaml") == workload


@given(data=workloads(), key=st.text(max_size=8))
@settings(max_examples=40, deadline=None)
def test_an_unknown_key_is_refused_wherever_it_is(data, key):
    for section in (data, data["data"], data["train"], data["gate"]["rules"][0]):
        section[f"x{key}"] = 1
        with pytest.raises(BadRequest, match="not a known field"):
            Workload.parse(data, "x")
        del section[f"x{key}"]


@given(value=st.floats(), low=st.none() | st.floats())
def test_a_measurement_keeps_what_was_found_even_where_it_is_no_number(value, low):
    measurement = Measurement(metric="m", value=value, samples=1, low=low)
    again = Measurement.parse(measurement.model_dump(mode="json"), "x")
    assert repr(again) == repr(measurement)
    assert Evidence(subject=(again,)).subject == (again,)


def test_a_value_cannot_be_changed_and_its_digest_is_of_its_content():
    workload = load_workload(SHIPPED, "digits")
    with pytest.raises(ValueError, match="frozen"):
        workload.name = "other"
    other = Workload.parse(workload.model_dump(mode="json") | {"description": "another"}, "x")
    assert workload.fingerprint == load_workload(SHIPPED, "digits").fingerprint != other.fingerprint
