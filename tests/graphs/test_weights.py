"""Edge weights from evidence: the right minimiser, nothing for a constant teacher, a floor."""

import numpy as np
import pytest
import torch
from graph_cases import normal, simplex
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from gdviz.graphs.costs import zero_one_cost
from gdviz.graphs.weights import (
    Gate,
    closed_form,
    effective_number,
    evidence,
    fit_gate,
    pair_alignment,
    teacher_prior,
)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.floats(0.1, 5), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_closed_form_is_the_minimiser(c, eta, seed):
    c, prior = np.array(c), np.random.default_rng(seed).dirichlet(np.full(len(c), 5.0))

    def objective(z):
        w = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return w @ c + eta * np.sum(w * np.log(np.maximum(w, 1e-300) / prior))

    w = closed_form(torch.tensor(c), eta=eta, log_prior=torch.tensor(prior).log(), floor=0.0)
    best, options = objective(w.log().numpy()), {"maxiter": 3000}
    found = minimize(objective, np.zeros(len(c)), method="Nelder-Mead", options=options)
    assert best <= found.fun + 1e-9
    assert best == pytest.approx(-eta * np.log(np.sum(prior * np.exp(-c / eta))), abs=1e-9)


def test_floor_and_effective_number():
    w = closed_form(torch.tensor([0.0, 1e3, 1e3, 1e3]), eta=1.0, floor=0.2)
    torch.testing.assert_close(w, torch.tensor([0.85, 0.05, 0.05, 0.05]))
    assert float(effective_number(torch.tensor([1.0, 0, 0]))) == pytest.approx(1)
    assert float(effective_number(torch.full((5,), 0.2))) == pytest.approx(5)
    for bad in ({"eta": 0.0}, {"eta": 1.0, "floor": 1.5}):
        with pytest.raises(ValueError, match=r"eta|floor"):
            closed_form(torch.zeros(3), **bad)


def test_evidence_by_its_definition():
    """Cost to the label and to the others' belief, each beyond the mean one, for any cost."""
    probs, cost = simplex(9, 3, 4), normal(4, 4, seed=1).abs()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, -1, -1, -1])
    prior, known = teacher_prior(probs, labels, cost).exp(), labels >= 0
    truth, found = torch.eye(4).double()[labels], evidence(probs, labels, cost, alpha=0.3)
    for k in range(3):
        rest = [j for j in range(3) if j != k]
        others = sum(prior[j] * probs[:, j] for j in rest) / prior[rest].sum()
        near, far = ((t - t[known].mean(0)) @ cost.T for t in (truth, others))
        expected = (probs[:, k] * (0.3 * known[:, None] * near + 0.7 * far)).sum(1)
        torch.testing.assert_close(found[:, k], expected)
    alone = evidence(probs[:, :1], torch.full_like(labels, -1), cost)
    assert torch.equal(alone, torch.zeros(9, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="alpha"):
        evidence(probs, labels, cost, alpha=1.5)


def test_a_constant_teacher_tells_nothing_whatever_it_predicts():
    """Nor does a vague one gain from lying near everyone, as it would by its distance to them."""
    labels, cost = torch.arange(40) % 4, zero_one_cost(4)
    weak = torch.softmax(0.5 * torch.eye(4)[labels] + 0.1 * normal(40, 4).float(), -1)
    for constant in (torch.full((4,), 0.25), torch.tensor([0.97, 0.01, 0.01, 0.01])):
        probs = torch.stack([weak, weak.roll(4, 0), constant.expand(40, 4)], 1)
        c = evidence(probs, labels, cost).mean(0)
        assert c[2].abs() < 1e-6 and c[:2].max() < -0.05
        prior = teacher_prior(probs, labels, cost).exp()
        assert float(prior[2]) == pytest.approx(0.05 / 3)


def test_the_prior_is_in_proportion_to_skill_however_weak_the_teachers_are():
    """Accuracy above chance of one-hot teachers, beyond a standard error; strong and weak alike."""
    labels, g, cost = torch.arange(20_000) % 5, torch.Generator().manual_seed(0), zero_one_cost(5)

    def teacher(skill):
        guess = torch.randint(5, (20_000,), generator=g)
        right = torch.rand(20_000, generator=g) < skill
        return torch.eye(5)[torch.where(right, labels, guess)]

    for scale in (1.0, 0.3):
        probs = torch.stack([teacher(0.9 * scale), teacher(0.3 * scale), teacher(0.0)], 1)
        expected = 0.95 * torch.tensor([0.75, 0.25, 0.0]) + 0.05 / 3
        prior = teacher_prior(probs, labels, cost).exp()
        torch.testing.assert_close(prior, expected, atol=0.03, rtol=0)
    nothing = torch.stack([teacher(0.0)[:1].expand(20_000, 5)] * 2, 1)
    for known in (labels, torch.full_like(labels, -1), torch.zeros_like(labels)):
        assert teacher_prior(nothing, known, cost).exp().tolist() == pytest.approx([0.5, 0.5])


def gate_cases():
    labels = torch.where(torch.arange(120) < 60, torch.arange(120) % 5, -1)
    good = torch.softmax(3 * torch.eye(5)[torch.arange(120) % 5] + 0.5 * normal(120, 5), -1)
    return torch.stack([good, simplex(120, 5, seed=1), simplex(120, 5, seed=2)], 1).float(), labels


def test_gate_turns_to_the_teacher_that_is_right_unless_its_prior_holds_it():
    probs, labels = gate_cases()
    prior = torch.tensor([0.2, 0.3, 0.5])
    for rho, expected in ((1e3, prior), (0.0, torch.tensor([1.0, 0.0, 0.0]))):
        gates = fit_gate(probs, labels, prior.log(), rho=rho, steps=200, floor=0.0)
        torch.testing.assert_close(next(gates)(probs), prior.expand(120, 3))
        known = next(gates)(probs)[labels >= 0]
        torch.testing.assert_close(known.mean(0), expected, atol=0.03, rtol=0)


def test_gate_ends_where_its_loss_is_least_and_can_be_stored():
    probs, labels = gate_cases()
    prior, known = torch.tensor([0.2, 0.3, 0.5]), labels >= 0
    right = probs[known].gather(2, labels[known][:, None, None].expand(-1, 3, 1)).squeeze(2)

    def slope(gate):
        w = gate(probs[known])
        divergence = (w.mean(0) * (w.mean(0) / prior).log()).sum()
        loss = -(w * right).sum(1).log().mean() + 0.5 * divergence
        return torch.cat(torch.autograd.grad(loss, list(gate.parameters()))).norm()

    options = {"rho": 0.5, "steps": 1000, "floor": 0.05}
    gates = fit_gate(probs, labels, prior.log(), **options)
    assert slope(next(gates)) > 0.1 > 1e-3 > slope(next(gates))
    gate, other = next(gates), Gate(torch.zeros(3))
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(probs), gate(probs))
    silent = fit_gate(probs, torch.full_like(labels, -1), prior.log(), **options)
    assert torch.equal(next(silent)(probs), next(silent)(probs))


def test_pair_alignment_follows_the_labels():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (80,), generator=g)
    good = torch.eye(4)[labels] + 0.3 * torch.randn(80, 4, generator=g)
    noise = torch.randn(80, 50, generator=g)
    grams = torch.stack([x @ x.T for x in (good, noise, good[torch.randperm(80, generator=g)])])
    v = pair_alignment(grams, labels)
    assert v[0] > 0.5 and v[1:].abs().max() < 0.1
    few = torch.where(torch.arange(80) < 40, labels, -1)
    expected = pair_alignment(grams[:, :40, :40], labels[:40])
    torch.testing.assert_close(pair_alignment(grams, few), expected)
    three = torch.where(torch.arange(80) < 3, labels, -1)
    for silent in (torch.full((80,), -1), three, torch.zeros_like(labels)):
        assert torch.equal(pair_alignment(grams, silent), torch.zeros(3))
