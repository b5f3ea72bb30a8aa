"""What is made small where classes are rare: the mean over the classes, of rows and of tags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tasks.spec.feature import TextFeature, TokensFeature
from tasks.spec.label import Label
from tasks.spec.train import Train
from tasks.train.loss import adjusted, cross_entropy, log_shares, loss_of, tagging

pytestmark = pytest.mark.timeout(30)

# Nine rows in ten are of class 0; class 2 has none.
RARE = np.array([0] * 90 + [1] * 10)


def loss_in(folder, y: np.ndarray, feature: TextFeature | TokensFeature, **asked: object):
    (folder / "arrays").mkdir(exist_ok=True)
    np.save(folder / "arrays" / "train.y.npy", y)
    train = Train.parse({"recipe": {"kind": "transformer"}, **asked}, "train")
    return loss_of(train, feature, Label(classes=("a", "b", "c")), folder)


def test_shares_are_those_of_the_rows_and_a_class_without_any_is_as_one_of_a_single_row():
    assert torch.exp(log_shares(RARE, 2)).tolist() == pytest.approx([0.9, 0.1])
    assert torch.exp(log_shares(np.array([[0, 1, -100], [0, -100, -100]]), 2)).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert torch.exp(log_shares(RARE, 3)).tolist() == pytest.approx([90 / 101, 10 / 101, 1 / 101])


def test_a_network_that_sees_nothing_says_every_class_alike_where_it_is_adjusted():
    """The best constant answer is the classes' shares by the plain loss, and even by the adjusted one."""
    y = torch.from_numpy(RARE)
    for loss, expected in ((cross_entropy(0.0), 0.9), (adjusted(cross_entropy(0.0), log_shares(RARE, 2)), 0.5)):
        logits = nn.Parameter(torch.zeros(2))
        optimiser = torch.optim.SGD([logits], lr=2.0)
        for _ in range(200):
            optimiser.zero_grad()
            loss(logits.expand(100, 2), y).backward()
            optimiser.step()
        assert logits.softmax(0)[0].item() == pytest.approx(expected, abs=0.01)


def test_what_is_asked_for_is_what_is_learnt_of_rows_and_of_tags(tmp_path):
    torch.manual_seed(0)
    y, shares = torch.from_numpy(RARE), log_shares(RARE, 3)
    logits, text, tokens = torch.randn(100, 3), TextFeature(kind="text"), TokensFeature(kind="tokens")
    found = loss_in(tmp_path, RARE, text, class_weights="adjusted")
    assert found(logits, y).item() == pytest.approx(cross_entropy(0.0)(logits + shares, y).item())
    tagged, of_words = RARE.reshape(20, 5), logits.reshape(20, 5, 3).transpose(1, 2)
    found = loss_in(tmp_path, tagged, tokens, class_weights="adjusted")
    expected = tagging(0.0, None, 5.0)(of_words + shares[:, None], y.reshape(20, 5))
    assert found(of_words, y.reshape(20, 5)).item() == pytest.approx(expected.item())


def test_smoothed_targets_leave_the_right_class_the_answer_however_rare_the_others_are(tmp_path):
    """A network that knows its rows: each has logits of its own, which are greatest at its class."""
    y = np.repeat(np.array([0, 1]), [990, 10])
    found = loss_in(tmp_path, y, TextFeature(kind="text"), class_weights="adjusted", label_smoothing=0.1)
    logits, target = nn.Parameter(torch.zeros(2, 3)), torch.tensor([0, 1])
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(500):
        optimiser.zero_grad()
        found(logits, target).backward()
        optimiser.step()
    assert logits.argmax(dim=1).tolist() == [0, 1]
    assert (logits[0, 0] - logits[0, 1]).item() > 1, "and by a margin"


def test_a_student_is_not_adjusted_again(tmp_path):
    teacher = np.random.default_rng(0).dirichlet(np.ones(3), 100).astype(np.float32)
    logits, target = torch.log(torch.from_numpy(teacher)).requires_grad_(), torch.from_numpy(teacher)
    loss_in(tmp_path, teacher, TextFeature(kind="text"), class_weights="adjusted")(logits, target).backward()
    assert logits.grad.abs().max() < 1e-6, "what the teacher says is what is to be said"
