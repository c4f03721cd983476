"""Audits: who is at home, how good a mixture is, and what features know of unnamed motions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gdviz.data.videos import VideoSet
from gdviz.experiment.metrics import accuracy, at_home, audit, few_shot, target_accuracy

SPLITS = ["train", "train", "unlabelled", "unlabelled", "test", "test"]
MOTIONS = ("a", "b", "a", "b", "a", "b")
DOMAINS = ("plain", "snow", "plain", "snow", "plain", "snow")


@pytest.fixture
def videos():
    pixels, labels = np.zeros((6, 2, 4, 4, 3), np.uint8), [0, 1, 0, 1, 0, 1]
    made = VideoSet.from_arrays(pixels, labels, SPLITS, label_names=("a", "b"))
    return replace(made, audit={"motion": MOTIONS, "domain": DOMAINS})


def test_teachers_of_one_home_share_it_and_strangers_share_all(videos):
    known = at_home(("x@plain", "y@plain", "z@snow"), videos)
    assert known[0].tolist() == [0.5, 0.5, 0] and known[1].tolist() == [0, 0, 1]
    assert at_home(("x", "y"), videos).tolist() == [[0.5, 0.5]] * 6


def test_a_target_is_judged_on_unlabelled_videos_alone(videos):
    right = torch.eye(2)[[0, 1, 0, 1, 0, 1]]
    probs = torch.stack([right, 1 - right], 1)  # the second teacher is always wrong
    first = torch.tensor([1.0, 0.0]).expand(6, 2)
    assert target_accuracy(videos, probs, first) == 1
    mixed = first.clone()
    mixed[2] = torch.tensor([0.0, 1.0])  # the first unlabelled video listens to the wrong one
    mixed[:2] = mixed[4:] = torch.tensor([0.0, 1.0])  # no others count
    assert target_accuracy(videos, probs, mixed) == 0.5


def test_accuracy_is_told_by_domain(videos):
    logits = torch.eye(2)[[0, 0, 0, 0, 0, 0]]
    found = audit(videos, logits, torch.zeros(6, 3))
    assert found == {"accuracy: plain": 1, "accuracy: snow": 0}
    assert accuracy(logits[4:], videos.labels[4:]) == 0.5


def test_of_a_list_with_videos_to_probe_no_motion_is_known(videos):
    listed = replace(videos, splits=(*SPLITS[:4], "probe", "probe"), audit={})
    assert audit(listed, torch.zeros(6, 2), torch.zeros(6, 3)) == {}


def test_unnamed_motions_are_found_by_their_neighbours():
    rng = torch.Generator().manual_seed(0)
    which = torch.arange(40) % 2
    features = 4 * torch.eye(6)[which] + 0.3 * torch.randn(40, 6, generator=rng)
    pixels = np.zeros((40, 2, 4, 4, 3), np.uint8)
    made = VideoSet.from_arrays(pixels, [0] * 40, ["unlabelled"] * 40)
    motions = tuple("ab"[i] for i in which)
    made = replace(made, splits=("probe",) * 40, audit={"motion": motions})
    found = audit(made, torch.zeros(40, 1), features)
    assert found["unnamed R@1"] == 1 and found["unnamed probe"] > 0.95
    noise = torch.randn(40, 6, generator=rng)
    assert 0.3 < few_shot(noise, which) < 0.7
