"""Policies: useless teachers weigh little, no NaN, no gradient; other papers' rules by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from gdviz.student import weighting as rules
from gdviz.student.losses import kd_loss

UNKNOWN = torch.tensor([-1])


@pytest.fixture(scope="module")
def cast():
    """Four teachers: accuracy about .92 and .72, a constant one, a good one on permuted labels."""
    g = torch.Generator().manual_seed(0)
    classes, clips = 6, 240
    labels = torch.randint(classes, (clips,), generator=g)

    def teacher(accuracy, truth):
        right = torch.rand(clips, generator=g) < accuracy
        predicted = torch.where(right, truth, torch.randint(classes, (clips,), generator=g))
        noise = 0.3 * torch.randn(clips, classes, generator=g)
        return torch.softmax(3 * torch.eye(classes)[predicted] + noise, -1)

    constant = torch.softmax(3 * torch.eye(classes)[0], -1).expand(clips, classes)
    wrong = teacher(0.92, (labels + 1) % classes)
    probs = torch.stack([teacher(0.9, labels), teacher(0.66, labels), constant, wrong], dim=1)
    return probs, torch.where(torch.arange(clips) < 60, labels, -1)


def student_of(probs):
    g = torch.Generator().manual_seed(3)
    return torch.softmax(torch.randn(len(probs), probs.shape[2], generator=g), -1).to(probs)


@pytest.mark.parametrize("policy", [rules.entropic, rules.gated])
def test_useless_teachers_get_low_weight_on_unlabelled_clips(cast, policy):
    probs, labels = cast
    w = policy(probs, labels)
    unlabelled = w[labels < 0].mean(0)
    assert unlabelled[0] > unlabelled[1] > unlabelled[2:].max()
    assert unlabelled[2:].max() < 0.15
    assert w.min() >= 0.05 / 4 - 1e-6
    mixture = (w[..., None] * probs).sum(1)
    better = (mixture - probs.mean(1)).gather(1, labels.clamp(min=0)[:, None])[labels >= 0]
    assert better.mean() > 0.1


def test_labels_count_through_the_prior_alone(cast):
    """Two teachers that contradict each other: only the labels can tell them apart."""
    probs, labels = cast
    two = probs[:, [0, 3]]
    assert rules.entropic(two, labels)[labels < 0].mean(0)[0] > 0.8
    silent = rules.entropic(two, torch.full_like(labels, -1)).mean(0)
    assert abs(float(silent[0] - silent[1])) < 0.1


def assert_weights(w):
    assert w.isfinite().all() and w.min() >= 0
    torch.testing.assert_close(w.sum(1), torch.ones_like(w[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", rules.POLICIES)
def test_every_policy(cast, name, dtype):
    """Weights follow a permutation of teachers and clips, and are ones for a single teacher."""
    policy, probs, labels = rules.POLICIES[name], cast[0][40:80].to(dtype), cast[1][40:80]
    student, teachers, clips = student_of(probs), torch.tensor([2, 0, 3, 1]), torch.randperm(40)
    w = policy(probs, labels, student)
    assert w.shape == (40, 4) and w.dtype == dtype
    assert_weights(w)
    moved = policy(probs[:, teachers], labels, student)
    torch.testing.assert_close(moved, w[:, teachers], atol=2e-3, rtol=0)
    moved = policy(probs[clips], labels[clips], student[clips])
    torch.testing.assert_close(moved, w[clips], atol=2e-3, rtol=0)
    for known in (labels, torch.full_like(labels, -1)):
        alone = policy(probs[:, :1].clone().requires_grad_(), known, student)
        torch.testing.assert_close(alone, torch.ones(40, 1, dtype=dtype))
        assert not alone.requires_grad


@pytest.mark.parametrize("name", rules.POLICIES)
def test_no_policy_fails_on_sure_or_vague_teachers(name):
    sure, vague = torch.eye(6)[torch.randint(6, (40, 4))], torch.full((40, 4, 6), 1 / 6)
    labels = torch.arange(40) % 7 - 1
    students = (sure[:, 0], vague[:, 0]) if name in rules.FOLLOW_STUDENT else (None,)
    for probs in (sure, vague, torch.cat([sure[:, :2], vague[:, :2]], 1)):
        for known in (labels, torch.full_like(labels, -1), torch.zeros_like(labels)):
            for q in students:
                assert_weights(rules.POLICIES[name](probs, known, q))


def test_only_those_named_look_at_the_student(cast):
    probs, labels = cast
    for name, policy in rules.POLICIES.items():
        one, other = (policy(probs, labels, probs[:, k]) for k in (0, 1))
        assert torch.equal(one, other) == (name not in rules.FOLLOW_STUDENT), name


def test_entropy_based_is_fooled_by_a_sure_teacher():
    sure = torch.tensor([0.98, 0.01, 0.01]).expand(5, 3)
    probs = torch.stack([sure, torch.full((5, 3), 1 / 3)], 1)
    assert (rules.entropy_based(probs, torch.zeros(5, dtype=torch.long))[:, 0] > 0.6).all()


def test_confidence_aware_by_hand():
    """Probabilities of the label 1/2, 1/4, 1/4: exp(CE) = 2, 4, 4, (1 - .2) / 2, (1 - .4) / 2."""
    quarter = [0.25, 0.75]
    probs = torch.tensor([[[0.5, 0.5], quarter, quarter], [[0.5, 0.5]] * 3, [[0.1, 0.9]] * 3])
    w = rules.confidence_aware(probs, torch.tensor([0, 1, -1]))
    torch.testing.assert_close(w[:2], torch.tensor([[0.4, 0.3, 0.3], [1 / 3] * 3]))
    torch.testing.assert_close(w[2], w[:2].mean(0))  # no label: the mean of those with one


def test_uncertainty_is_where_training_the_log_variances_ends(cast):
    probs, labels = cast
    known = labels >= 0
    index = labels[known][:, None, None].expand(-1, 4, 1)
    ce = -probs[known].gather(2, index).log().mean((0, 2))
    s = torch.zeros(4, requires_grad=True)  # log sigma^2
    optimiser = torch.optim.Adam([s], lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        (ce * (-s).exp() + s / 2).sum().backward()
        optimiser.step()
    expected = torch.softmax(-s.detach(), 0)
    torch.testing.assert_close(rules.uncertainty(probs, labels)[0], expected, atol=1e-4, rtol=0)


def quadratic(q, b, x):
    return x @ q @ x / 2 + b @ x


@pytest.mark.parametrize("upper", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("rank", [1, 3, 6])  # less than the teachers: a flat valley has a floor
def test_the_capped_minimum_against_scipy(upper, rank):
    rng = np.random.default_rng(rank)
    g, b = rng.normal(size=(5, 4, rank)), rng.normal(size=(5, 4)) * (rank > 3)
    q = g @ g.transpose(0, 2, 1)
    w = rules.capped_simplex_minimum(torch.tensor(q), torch.tensor(b), upper).numpy()
    assert w.min() >= -1e-9 and w.max() <= upper + 1e-9 and np.allclose(w.sum(1), 1)
    limits = {"bounds": [(0, upper)] * 4, "options": {"ftol": 1e-14}}
    limits["constraints"] = {"type": "eq", "fun": lambda x: x.sum() - 1}
    for i in range(5):
        value = partial(quadratic, q[i], b[i])
        best = minimize(value, np.full(4, 0.25), **limits).fun
        assert value(w[i]) == pytest.approx(best, abs=1e-6)


def test_gradient_space_is_the_mixture_nearest_to_the_student():
    """The gradients are those of the KD loss, and a grid over all weights finds nothing shorter."""
    g = torch.Generator().manual_seed(0)
    probs = torch.softmax(torch.randn(1, 3, 4, generator=g), -1)
    z = torch.randn(1, 4, generator=g, requires_grad=True)
    one = torch.ones(1, 1)
    losses = [kd_loss(z, probs[:, k : k + 1], one, 1.0) for k in range(3)]
    grads = torch.stack([torch.autograd.grad(loss, z)[0][0] for loss in losses])
    w = rules.gradient_space(probs, UNKNOWN, torch.softmax(z.detach(), -1))[0]
    i, j = torch.meshgrid(torch.arange(61), torch.arange(61), indexing="ij")
    grid = torch.stack([i, j, 100 - i - j], -1).flatten(0, 1)
    grid = grid[(grid[:, 2] >= 0) & (grid[:, 2] <= 60)] / 100
    assert (w @ grads).norm() <= (grid @ grads).norm(dim=1).min() + 1e-6
    assert w.max() <= 0.6 + 1e-6
    # a student half between: gradients -.2 and .1 cancel at 1 : 2, capped
    opposed = torch.tensor([[[0.7, 0.3], [0.4, 0.6]]])
    w = rules.gradient_space(opposed, UNKNOWN, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(w, torch.tensor([[0.4, 0.6]]))


def test_gradient_space_is_solved_for_a_batch_as_in_the_paper(cast):
    probs, labels = cast
    student = student_of(probs)
    w = rules.gradient_space(probs, labels, student)
    assert (w == w[0]).all()
    g = (student[:, None] - probs).mean(0)
    others = torch.distributions.Dirichlet(torch.ones(4)).sample((4000,)).to(g)
    others = others[others.max(1).values <= 0.6]
    assert (w[0] @ g).norm() <= (others @ g).norm(dim=1).min() + 1e-6


def test_gradient_space_keeps_its_digits_within_autocast(cast):
    probs, labels = cast
    with torch.autocast("cpu", torch.bfloat16):
        half = rules.gradient_space(probs, labels, student_of(probs))
    assert torch.equal(half, rules.gradient_space(probs, labels, student_of(probs)))


def test_trained_on_the_loss_collapses_on_the_constant_teacher_and_the_default_does_not(cast):
    """A student that starts vague; half of what a regulariser and a prior leave is still wrong."""
    good, labels = cast[0][:, 0], cast[1]
    probs = torch.stack([good, torch.full((240, 6), 1 / 6)], 1)
    noise = torch.randn(240, 6, generator=torch.Generator().manual_seed(0))
    inputs, found = torch.eye(6)[good.argmax(-1)] + 0.7 * noise, {}
    for name in ("loss", "luo", "entropic"):
        student = torch.zeros(6, 6, requires_grad=True)
        optimiser = torch.optim.Adam([student], lr=0.02)
        for _ in range(100):
            z = inputs @ student
            w = rules.POLICIES[name](probs, labels, torch.softmax(z.detach(), -1))
            optimiser.zero_grad()
            kd_loss(z, probs, w, 1.0).backward()
            optimiser.step()
        found[name] = float(w[:, 1].mean())
    assert found["loss"] == 1.0
    assert found["luo"] > 0.5 > 0.1 > found["entropic"]


def test_graph_distillation_by_hand():
    """KL to a uniform student: log 2 if sure, 0 if vague. w = 1/2 -+ log(2) / 4, then the prior."""
    probs = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    w = rules.graph_distillation(probs, UNKNOWN, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(w, 0.5 + np.log(2) / 8 * torch.tensor([[-1.0, 1.0]]))
