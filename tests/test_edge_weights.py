"""Edge weights: right minimiser, right teachers, no gradient, and a floor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from gdviz.graphs import weights as wt
from gdviz.graphs.costs import zero_one_cost
from gdviz.knowledge import Knowledge, ground_cost


@pytest.fixture(scope="module")
def cast():
    """Four teachers: accuracy about .92 and .72, a constant one, a good one on permuted labels."""
    g = torch.Generator().manual_seed(0)
    classes, clips = 6, 240
    labels = torch.randint(classes, (clips,), generator=g)

    def teacher(accuracy, truth):
        right = torch.rand(clips, generator=g) < accuracy
        said = torch.where(right, truth, torch.randint(classes, (clips,), generator=g))
        noise = 0.3 * torch.randn(clips, classes, generator=g)
        return torch.softmax(3 * torch.eye(classes)[said] + noise, -1)

    constant = torch.softmax(3 * torch.eye(classes)[0], -1).expand(clips, classes)
    wrong = teacher(0.92, (labels + 1) % classes)
    probs = torch.stack([teacher(0.9, labels), teacher(0.66, labels), constant, wrong], dim=1)
    return probs, torch.where(torch.arange(clips) < 60, labels, -1)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.floats(0.1, 5), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_closed_form_is_the_minimiser(c, eta, seed):
    c, prior = np.array(c), np.random.default_rng(seed).dirichlet(np.full(len(c), 5.0))

    def objective(z):
        w = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return w @ c + eta * np.sum(w * np.log(np.maximum(w, 1e-300) / prior))

    w = wt.closed_form(torch.tensor(c), eta=eta, log_prior=torch.tensor(prior).log(), floor=0.0)
    best = objective(w.log().numpy())
    assert best <= minimize(objective, np.zeros(len(c)), method="Nelder-Mead", options={"maxiter": 3000}).fun + 1e-9
    assert best == pytest.approx(-eta * np.log(np.sum(prior * np.exp(-c / eta))), abs=1e-9)


def test_floor_and_effective_number():
    w = wt.closed_form(torch.tensor([0.0, 1e3, 1e3, 1e3]), eta=1.0, floor=0.2)
    torch.testing.assert_close(w, torch.tensor([0.85, 0.05, 0.05, 0.05]))
    assert float(wt.effective_number(torch.tensor([1.0, 0, 0]))) == pytest.approx(1)
    assert float(wt.effective_number(torch.full((5,), 0.2))) == pytest.approx(5)
    for bad in ({"eta": 0.0}, {"eta": 1.0, "floor": 1.5}):
        with pytest.raises(ValueError, match=r"eta|floor"):
            wt.closed_form(torch.zeros(3), **bad)


def test_evidence_formula_on_one_hot_teachers():
    """With 0/1 cost and one-hot outputs both terms are counts of disagreement."""
    probs = torch.eye(3)[torch.tensor([[0, 0], [0, 1], [1, 2]])]  # (3, 2, 3)
    c = wt.evidence(probs, torch.tensor([0, 0, -1]), zero_one_cost(3), alpha=0.25)
    expected = torch.tensor([[0, 0], [0.75, 0.25 + 0.75], [0.75, 0.75]])
    torch.testing.assert_close(c, expected, atol=1e-3, rtol=0)


def test_evidence_uses_the_ground_cost():
    cost = torch.tensor([[0, 0.5, 1.5], [0.5, 0, 1.0], [1.5, 1.0, 0]])
    probs = torch.eye(3)[None]  # one clip, three teachers that say 0, 1 and 2
    torch.testing.assert_close(wt.evidence(probs, torch.tensor([0]), cost, alpha=1.0), cost[:1])


@pytest.mark.parametrize("policy", [wt.entropic, wt.gated])
def test_useless_teachers_get_low_weight_on_unlabelled_clips(cast, policy):
    probs, labels = cast
    w = policy(probs, labels)
    unlabelled = w[labels < 0].mean(0)
    assert w.shape == (240, 4) and torch.allclose(w.sum(1), torch.ones(240), atol=1e-5)
    assert unlabelled[0] > unlabelled[1] > unlabelled[2:].max()
    assert unlabelled[2:].max() < 0.15
    assert w.min() >= 0.05 / 4 - 1e-6
    mixture = (w[..., None] * probs).sum(1)
    better = (mixture - probs.mean(1)).gather(1, labels.clamp(min=0)[:, None])[labels >= 0]
    assert better.mean() > 0.1


def test_labels_speak_through_the_prior_alone(cast):
    """Two teachers that contradict each other: only the labels can tell them apart."""
    probs, labels = cast
    two = probs[:, [0, 3]]
    assert wt.entropic(two, labels)[labels < 0].mean(0)[0] > 0.8
    silent = wt.entropic(two, torch.full_like(labels, -1)).mean(0)
    assert abs(float(silent[0] - silent[1])) < 0.1


def test_entropy_based_is_fooled_by_a_sure_teacher():
    sure = torch.tensor([0.98, 0.01, 0.01]).expand(5, 3)
    w = wt.entropy_based(torch.stack([sure, torch.full((5, 3), 1 / 3)], 1), torch.zeros(5, dtype=torch.long))
    assert (w[:, 0] > 0.6).all() and torch.allclose(w.sum(1), torch.ones(5))


@pytest.mark.parametrize("policy", [wt.uniform, wt.entropic, wt.gated, wt.entropy_based])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_teacher_no_labels_no_gradient(policy, dtype):
    probs = torch.softmax(torch.randn(4, 1, 3, dtype=dtype), -1).requires_grad_()
    w = policy(probs, torch.full((4,), -1))
    torch.testing.assert_close(w, torch.ones(4, 1, dtype=dtype))
    assert not w.requires_grad


@pytest.mark.parametrize("policy", [wt.uniform, wt.entropic, wt.gated, wt.entropy_based])
def test_policies_permute_with_teachers_and_clips(cast, policy):
    probs, labels = cast[0][40:80], cast[1][40:80]
    w = policy(probs, labels)
    teachers, clips = torch.tensor([2, 0, 3, 1]), torch.randperm(40)
    torch.testing.assert_close(policy(probs[:, teachers], labels), w[:, teachers], atol=2e-3, rtol=0)
    torch.testing.assert_close(policy(probs[clips], labels[clips]), w[clips], atol=2e-3, rtol=0)


def test_gate_stays_at_a_strong_prior_and_is_frozen(cast):
    probs, labels = cast
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
    gate = wt.fit_gate(probs, labels, log_prior=prior.log(), rho=1e3, floor=0.0)
    torch.testing.assert_close(gate(probs[labels >= 0]).mean(0), prior, atol=0.01, rtol=0)
    assert not any(p.requires_grad for p in gate.parameters())
    other = wt.Gate(torch.zeros(4))
    other.load_state_dict(gate.state_dict())
    torch.testing.assert_close(other.bias, gate.bias)


def test_pair_weights_follow_the_labels():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (80,), generator=g)
    good = torch.eye(4)[labels] + 0.3 * torch.randn(80, 4, generator=g)
    noise = torch.randn(80, 50, generator=g)
    grams = torch.stack([x @ x.T for x in (good, noise, good[torch.randperm(80, generator=g)])])
    v = wt.pair_weights(grams, labels, eta=0.1)
    assert v[0] > 0.9 and v[1:].max() < 0.05 and float(v.sum()) == pytest.approx(1)
    unlabelled = torch.where(torch.arange(80) < 40, labels, -1)
    torch.testing.assert_close(wt.pair_weights(grams, unlabelled), wt.pair_weights(grams[:, :40, :40], labels[:40]))


@pytest.mark.parametrize("labels", [torch.full((6,), -1), torch.zeros(6, dtype=torch.long), torch.tensor([0, 1, 2, -1, -1, -1])])
def test_pair_weights_without_evidence_keep_the_prior(labels):
    grams = torch.randn(3, 6, 6).abs()
    prior = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(wt.pair_weights(grams + grams.mT, labels, log_prior=prior.log(), floor=0.0), prior)


def test_a_constant_teacher_has_no_say_in_the_ground_cost():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(5)
    good = 3 * torch.eye(4)[labels] + torch.randn(20, 4)
    constant = torch.zeros(20, 4)

    def cost_of(*teachers):
        names = tuple(map(str, range(len(teachers))))
        return ground_cost(Knowledge(names, torch.stack(teachers, 1), [], [], labels, torch.zeros(20)), 0.0)

    torch.testing.assert_close(cost_of(good, constant), cost_of(good))
    torch.testing.assert_close(cost_of(constant), zero_one_cost(4))
