"""Texts whose next piece is told: plain text as a source, what a network is asked, what is measured and refused."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import yaml

from tasks.data.encoding import detect
from tasks.data.plaintext import ROW_BYTES, PlainText
from tasks.evaluate.perplexed import TextAnswers, bits_gain
from tasks.spec.errors import BadRequest
from tasks.spec.evaluate import Evaluate, Slice
from tasks.spec.feature import TextFeature, encode
from tasks.spec.label import NextLabel
from tasks.spec.metrics import declared, wrong_with
from tasks.spec.pieces import counted, lengths, targets
from tasks.spec.recipe import Gpt
from tasks.spec.rules import Rule
from tasks.spec.workload import Workload
from tasks.train.gpt import GptNet, LogProbability
from tasks.train.loss import tagging
from tasks.train.prepare import fit_tokenizer
from tasks.train.score import Pieces

pytestmark = pytest.mark.timeout(30)
LABEL = NextLabel(kind="next")
FEATURE = TextFeature(kind="text", max_tokens=6, vocabulary=300)
RECIPE = Gpt(kind="gpt", width=16, heads=2, layers=2, feedforward=32, dropout=0.0)
FILE = """
name: talk
data:
  source: {kind: files, path: talk.txt}
  feature: {kind: text, max_tokens: 32, vocabulary: 400}
  label: {kind: next}
train: {recipe: {kind: gpt}, ranks: 1}
gate: {rules: [{metric: perplexity, max: 90}]}
"""
# A text of full width, one of a single piece, one of none, and one with a padding within.
X = np.array([[5, 6, 7, 8, 9, 4], [3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [7, 0, 8, 0, 0, 0]])


@pytest.fixture(scope="module")
def network() -> GptNet:
    torch.manual_seed(0)
    return GptNet(RECIPE, FEATURE).eval()


def plain(text: str | bytes, row: str = "line") -> PlainText:
    return PlainText("t.txt", io.BytesIO(text.encode() if isinstance(text, str) else text), row)


def texts_of(reader: PlainText) -> list[str]:
    return [text for batch in reader.batches(["text"]) for text in batch.column(0).to_pylist()]


def test_rows_of_plain_text_are_lines_or_paragraphs():
    text = "\ufeffone\r\n two \n\n\t\nthree"
    assert plain(text).header() == ["text"]
    assert texts_of(plain(text)) == ["one", "two", "three"]
    assert texts_of(plain(text, "paragraph")) == ["one two", "three"]


def test_many_rows_come_in_batches():
    reader = plain("a line of words\n" * 40_000)
    assert [batch.num_rows for batch in reader.batches(["text"])] == [16_384, 16_384, 7_232]


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ("\n \n\t\n", "line", "holds no text but white space"),
        ("x" * (ROW_BYTES + 2), "line", "a line has more than"),
        ("word word word\n" * (ROW_BYTES // 14 + 9), "paragraph", "a paragraph has more than"),
    ],
)
def test_what_is_no_text_of_rows_is_refused(text, row, message):
    with pytest.raises(BadRequest, match=f"^t.txt: {message}"):
        plain(text, row).header()


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(BadRequest, match=r"^t\.txt: holds a NUL character"):
        detect("t.txt", io.BytesIO(b"\x7fELF\x02\x01\x01\x00\x00\x00" * 9), None)


def test_each_place_is_asked_for_its_piece_and_the_one_behind_the_last_for_the_end():
    assert lengths(X).tolist() == [6, 1, 0, 3]
    assert targets(X).tolist() == [
        [5, 6, 7, 8, 9, 4],
        [3, 0, -100, -100, -100, -100],
        [0, -100, -100, -100, -100, -100],
        [7, 0, 8, 0, -100, -100],
    ]


def test_pieces_and_characters_are_counted_as_they_are_read():
    tokenizer = fit_tokenizer(FEATURE, ["We tell what comes next"] * 3, keep_case=True)
    texts = ["We tell", "x", "zq" * 40]
    pieces, characters = counted(FEATURE, texts, tokenizer)
    asked = (targets(encode(FEATURE, texts, tokenizer)) >= 0).sum(axis=1)
    assert pieces.tolist() == asked.tolist()
    assert characters[:2].tolist() == [7, 1]
    # A long text is cut: so many characters are read as six pieces of it stand for.
    assert pieces[2] == 6
    assert 0 < characters[2] <= 6
    assert tokenizer.decode(tokenizer.encode("We tell").ids).strip() == "We tell"


def test_no_place_sees_what_comes_behind_it(network):
    x = torch.from_numpy(X[:1])
    with torch.no_grad():
        before, changed = network(x), network(torch.cat([x[:, :3], x[:, 3:] + 9], dim=1))
    assert before.shape == (1, 300, 6)
    assert torch.allclose(before[:, :, :4], changed[:, :, :4], atol=1e-6)
    assert not torch.allclose(before[:, :, 4:], changed[:, :, 4:], atol=1e-3)


def test_a_text_is_as_likely_as_its_pieces_whatever_it_is_padded_to(network):
    tells = LogProbability(network)
    with torch.no_grad():
        each = torch.log_softmax(network(torch.from_numpy(X)), dim=1)
        said = tells(torch.from_numpy(X))
        narrow = tells(torch.from_numpy(X[1:3, :1]))
    wanted = targets(X)
    by_hand = [
        np.mean([float(each[row, wanted[row, place], place]) for place in range(6) if wanted[row, place] >= 0])
        for row in range(4)
    ]
    assert said[:, 0].tolist() == pytest.approx(by_hand, abs=1e-5)
    assert narrow[:, 0].tolist() == pytest.approx(by_hand[1:3], abs=1e-5)


def test_parts_of_a_batch_have_the_loss_of_the_whole_and_perplexity_is_of_all_pieces(network):
    y = torch.from_numpy(targets(X))
    loss, score = tagging(0.0, None, 2.5), Pieces()
    with torch.no_grad():
        logits = network(torch.from_numpy(X))
        whole = float(loss(logits, y))
        parts = [float(loss(logits[k : k + 2], y[k : k + 2])) for k in (0, 2)]
        counts = score.counts(logits[:1], y[:1]) + score.counts(logits[1:], y[1:])
    assert np.mean(parts) == pytest.approx(whole, rel=1e-6)
    found = score.metrics(counts.tolist())
    assert found["perplexity"] == pytest.approx(math.exp(whole * 4 * 2.5 / 13), rel=1e-5)
    assert 0 <= found["accuracy"] <= 1
    assert score.metrics([1e6, 0.0, 1.0])["perplexity"] < math.inf


def answers() -> TextAnswers:
    draw = np.random.default_rng(0)
    pieces = draw.integers(2, 40, 500).astype(float)
    return TextAnswers(pieces * draw.normal(3, 0.5, 500), pieces, 4 * pieces)


def test_perplexity_and_bits_are_what_their_names_say_and_intervals_hold_them():
    found = answers()
    perplexity, bits = found.measure()
    assert perplexity.value == pytest.approx(math.exp(found.nats.sum() / found.pieces.sum()))
    assert bits.value == pytest.approx(found.nats.sum() / math.log(2) / found.characters.sum())
    assert all(m.low < m.value < m.high and m.samples == 500 for m in (perplexity, bits))
    assert [m.samples for m in found.measure_part("slice:none", np.zeros(500, bool))] == [0, 0]
    mean = np.array([[-2.0], [-3.0]])
    assert found.instead(np.array([3, 5]), mean).nats.tolist() == [2 * found.pieces[3], 3 * found.pieces[5]]


def test_a_model_gains_nothing_on_itself_and_bits_on_a_worse_one():
    mine = answers().columns()["prediction"]
    worse = [said | {"bits": 1.1 * said["bits"]} for said in mine]
    assert bits_gain(mine, mine).value == 0
    gain = bits_gain(mine, worse)
    assert gain.value == pytest.approx(0.1 * answers().measure()[1].value)
    assert 0 < gain.low < gain.value < gain.high


def test_what_is_measured_can_be_ruled_on():
    feature, sliced = TextFeature(kind="text"), Evaluate(slices=(Slice(name="long", where="label > 80"),))
    every = np.ones(500, bool)
    for m in declared((*answers().measure(), *answers().measure_part("slice:long", every))):
        assert wrong_with(Rule(metric=m.metric, slice=m.slice, max=m.value), feature, LABEL, sliced) is None
    for metric in ("accuracy", "rmse", "agreement", "rmse_gain", "ndcg_at_10"):
        assert wrong_with(Rule(metric=metric, min=0.1), feature, LABEL, sliced).startswith(f"metric = '{metric}'")
    for metric in ("p99_ms", "model_bytes", "out_of_range", "bits_gain"):
        assert wrong_with(Rule(metric=metric, min=0), feature, LABEL, sliced) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: next", "classes: [a, b]", "train.recipe.kind = 'gpt' with data.label.kind = 'class': gpt needs"),
        ("kind: gpt", "kind: text-cnn", "train.recipe.kind = 'text-cnn' with data.label.kind = 'next': gpt needs"),
        ("kind: text, max_tokens: 32, vocabulary: 400", "kind: tokens", "label.kind = 'next', must be class or number"),
        ("kind: next", "kind: next, column: text", "column"),
        ("kind: gpt", "kind: gpt, heads: 3", "heads = 3, must divide width = 128"),
        ("ranks: 1", "ranks: 2, parallel: tensor", "parallel = 'tensor', must be ddp, fsdp or auto"),
        ("ranks: 1", "ranks: 2, parallel: pipeline", "parallel = 'pipeline', must be ddp, fsdp or auto"),
        ("ranks: 1", "ranks: 1, class_weights: balanced", "is for classes; must be left out"),
        ("ranks: 1", "ranks: 1, stopping: {metric: accuracy}", "must be loss: where it is least, so is perplexity"),
        ("max: 90", "against: champion, max_rise: 1", "two models may read other pieces; take bits_per_character"),
        ("max: 90", "max: 0.5", "max = 0.5, must be 1 or more for perplexity"),
        ("metric: perplexity", "metric: accuracy", "metric = 'accuracy', must be one of"),
        ("gate:", "evaluate: {relevant: 3}\ngate:", "evaluate.relevant: must be left out"),
        ("gate:", "evaluate: {perturb: [typos]}\ngate:", "evaluate.perturb = 'typos', must be left out where the next"),
        ("gate:", "compress: {variants: [{kind: pruned}]}\ngate:", "'pruned' can't be of a language model; use int4"),
        ("gate:", "compress: {variants: [int8-static]}\ngate:", "'int8-static' can't be of a language model"),
        ("train:", "  split: {stratified: true}\ntrain:", "split.stratified = true: a text is of no class"),
        ("train:", "  clean: [{rule: allowed_labels}]\ntrain:", "clean: 'allowed_labels' is for classes"),
        ("train:", "  clean: [{rule: drop_missing, column: characters}]\ntrain:", "must be one of ['text']"),
        ("train:", "  augment: {changes: [{kind: swap_words}]}\ntrain:", "augment: changed copies would be learnt"),
        ("path: talk.txt", "path: talk.txt, row: page", "row"),
    ],
)  # fmt: skip
def test_what_a_workload_of_texts_may_not_say(old, new, message):
    assert Workload.parse(yaml.safe_load(FILE), "talk").data.label == LABEL
    with pytest.raises(BadRequest) as error:
        Workload.parse(yaml.safe_load(FILE.replace(old, new, 1)), "talk")
    assert str(error.value).startswith("talk: ")
    assert message in str(error.value)


def test_late_labels_of_texts_are_refused(tmp_path, monkeypatch):
    from tasks.site import Site
    from tasks.truth import label_predictions

    monkeypatch.setenv("DRYDOCK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DRYDOCK_WORKLOADS", str(tmp_path / "workloads"))
    folder = tmp_path / "workloads" / "talk"
    folder.mkdir(parents=True)
    (folder / "workload.yaml").write_text(FILE)
    with pytest.raises(BadRequest, match="talk: a text is its own label"):
        label_predictions(Site(), "talk", tmp_path / "late.csv", "rita")
