"""Routing: who is at home is found from features and few labels, and impostors gain nothing."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_info, threadpool_limits

from gdviz.data.videos import VideoSet
from gdviz.student.routing import local_prior, novelty, route
from gdviz.teachers.bank import Bank, Readout

TEACHERS, CLASSES, PER, LABELLED = 3, 4, 120, 12


def world(seed: int = 0, homes: bool = True, constant: bool = False) -> tuple[Bank, torch.Tensor]:
    """Three specialists of three domains: each is right, and its clips are usual, at home only."""
    rng = torch.Generator().manual_seed(seed)
    domain = torch.arange(TEACHERS).repeat(PER)
    count = len(domain)
    truth = torch.randint(CLASSES, (count,), generator=rng)
    readouts, logits = [], []
    look = 3 * torch.randn(TEACHERS, 6, generator=rng)
    for k in range(TEACHERS):
        mix = torch.randn(6, 8, generator=rng)
        clips = (look[domain] + torch.randn(count, 6, generator=rng)) @ mix
        own = (look[k] + torch.randn(150, 6, generator=rng)) @ mix
        said = torch.where(domain == k, truth, torch.randint(CLASSES, (count,), generator=rng))
        noise = torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(100 + k))
        z = 3.0 * torch.nn.functional.one_hot(said, CLASSES) + noise
        if constant and k == 2:
            z, clips, own = torch.zeros_like(z), torch.zeros_like(clips), torch.zeros_like(own)
        logits.append(z)
        fold = torch.full((count,), -1)
        readout = Readout.from_means(z, clips, fold)
        readouts.append(Readout(readout.parts, home=own if homes else None))
    labels = torch.where(torch.arange(count) < LABELLED * TEACHERS, truth, -1)
    names = tuple(f"t{k}" for k in range(TEACHERS))
    fold = torch.where(labels >= 0, 0, -1)
    return Bank(names, tuple(readouts), torch.stack(logits, 1), labels, fold), domain


def at_home(bank: Bank, domain: torch.Tensor) -> float:
    weights = next(iter(route(bank, torch.arange(len(domain)), 6)))
    assert torch.allclose(weights.sum(1), torch.ones(len(domain)), atol=1e-5)
    return weights.gather(1, domain[:, None]).mean().item()


def test_the_weight_is_on_the_teacher_at_home():
    assert at_home(*world()) > 0.8


def test_labels_alone_tell_it_too_where_no_home_is_known():
    assert at_home(*world(homes=False)) > 0.55  # a third is chance


def test_a_constant_teacher_gets_next_to_nothing():
    bank, domain = world(constant=True)
    weights = next(iter(route(bank, torch.arange(len(domain)), 6)))
    assert weights[domain != 2, 2].mean() < 0.15
    assert weights[domain == 0, 0].mean() > 0.7


def test_the_order_of_teachers_does_not_matter():
    bank, domain = world(1)
    turned = Bank(
        bank.teachers[::-1], bank.readouts[::-1], bank.logits.flip(1), bank.labels, bank.fold
    )
    rows = torch.arange(len(domain))
    first, second = (next(iter(route(b, rows, 6))) for b in (bank, turned))
    assert (first - second.flip(1)).abs().mean() < 0.05  # axes and starts are numerical


def test_novelty_of_home_clips_is_about_zero_and_grows_with_distance():
    home = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    near = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    assert novelty(near, home).mean().abs() < 0.15
    assert (novelty(near + 6, home) > 0.8).all()
    assert novelty(near, torch.zeros(10, 5)).isnan().all()


def test_a_local_prior_is_by_hand():
    """One component, two teachers, two labelled clips; the second teacher says the wrong class."""
    probs = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.2, 0.8], [0.8, 0.2]]])
    labels = torch.tensor([0, 1])
    prior = local_prior(torch.ones(2, 1), probs, labels).exp()
    # Gains of the first teacher: .9 - .5 and .8 - .5, of the second -.4 and -.3, clipped to 0.
    assert prior[0].tolist() == pytest.approx([0.8 + 0.1, 0.1])


def test_without_labels_the_prior_is_uniform():
    probs = torch.full((3, 4, 2), 0.5)
    prior = local_prior(torch.ones(3, 2), probs, torch.full((3,), -1)).exp()
    assert torch.allclose(prior, torch.full((2, 4), 0.25))


def test_impostors_join_a_bank_and_say_what_they_should():
    bank, _ = world()
    more = bank.with_impostors()
    assert more.teachers[-2:] == ("constant", "liar")
    assert not more.logits[:, -2].any() and not more.features_at(torch.arange(4))[-2].any()
    assert torch.equal(more.logits[:, -1].argmax(-1), (more.logits[:, 2].argmax(-1) + 1) % CLASSES)


def test_a_set_in_memory_has_no_audit():
    videos = VideoSet.from_arrays(np.zeros((2, 3, 4, 4, 3), np.uint8), [0, 0], ["train", "test"])
    assert videos.audit == {}


def test_mixtures_are_fitted_on_one_thread_wherever_more_are_allowed(monkeypatch):
    """Sums of several threads differ in the last digit, and so would students elsewhere."""
    seen, real = [], GaussianMixture.fit

    def spy(self, *rest):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return real(self, *rest)

    monkeypatch.setattr(GaussianMixture, "fit", spy)
    bank, domain = world()
    with threadpool_limits(2):
        next(iter(route(bank, torch.arange(len(domain)), 3)))
        assert {pool["num_threads"] for pool in threadpool_info()} != {1}
    assert set(seen) == {1}
