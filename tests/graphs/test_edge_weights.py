"""Edge weights: right minimiser, right teachers, no gradient, and a floor."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from gdviz.graphs import weights as wt
from gdviz.graphs.costs import zero_one_cost
from gdviz.student import weighting as rules
from gdviz.student.losses import kd_loss, multi_teacher_kd_loss
from gdviz.teachers.bank import Knowledge, ground_cost


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
    assert (
        best
        <= minimize(
            objective, np.zeros(len(c)), method="Nelder-Mead", options={"maxiter": 3000}
        ).fun
        + 1e-9
    )
    assert best == pytest.approx(-eta * np.log(np.sum(prior * np.exp(-c / eta))), abs=1e-9)


def test_floor_and_effective_number():
    w = wt.closed_form(torch.tensor([0.0, 1e3, 1e3, 1e3]), eta=1.0, floor=0.2)
    torch.testing.assert_close(w, torch.tensor([0.85, 0.05, 0.05, 0.05]))
    assert float(wt.effective_number(torch.tensor([1.0, 0, 0]))) == pytest.approx(1)
    assert float(wt.effective_number(torch.full((5,), 0.2))) == pytest.approx(5)
    for bad in ({"eta": 0.0}, {"eta": 1.0, "floor": 1.5}):
        with pytest.raises(ValueError, match=r"eta|floor"):
            wt.closed_form(torch.zeros(3), **bad)


def test_evidence_by_its_definition():
    """Cost to the label and to the others' belief, each less that to the mean one; a free choice of cost matters."""
    g = torch.Generator().manual_seed(0)
    probs, cost = (
        torch.softmax(torch.randn(9, 3, 4, generator=g), -1),
        torch.rand(4, 4, generator=g),
    )
    labels = torch.tensor([0, 1, 2, 3, 0, 1, -1, -1, -1])
    prior, known = wt.teacher_prior(probs, labels, cost).exp(), labels >= 0
    truth = torch.eye(4)[labels]
    for k in range(3):
        rest = [j for j in range(3) if j != k]
        others = sum(prior[j] * probs[:, j] for j in rest) / prior[rest].sum()
        near, far = ((t - t[known].mean(0)) @ cost.T for t in (truth, others))
        expected = (probs[:, k] * (0.3 * known[:, None] * near + 0.7 * far)).sum(1)
        torch.testing.assert_close(wt.evidence(probs, labels, cost, alpha=0.3)[:, k], expected)
    with pytest.raises(ValueError, match="alpha"):
        wt.evidence(probs, labels, cost, alpha=1.5)


def test_a_constant_teacher_shows_nothing_whatever_it_says():
    """Nor does a vague one gain from lying near everyone, as it would by its distance to the consensus."""
    labels = torch.arange(40) % 4
    weak = torch.softmax(
        0.5 * torch.eye(4)[labels]
        + 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0)),
        -1,
    )
    for constant in (torch.full((4,), 0.25), torch.tensor([0.97, 0.01, 0.01, 0.01])):
        probs = torch.stack([weak, weak.roll(4, 0), constant.expand(40, 4)], 1)
        c = wt.evidence(probs, labels, zero_one_cost(4)).mean(0)
        assert c[2].abs() < 1e-6 and c[:2].max() < -0.05
        torch.testing.assert_close(
            wt.teacher_prior(probs, labels, zero_one_cost(4)).exp()[2], torch.tensor(0.05 / 3)
        )


def test_the_prior_is_in_proportion_to_skill_however_weak_the_teachers_are():
    """Accuracy above chance of one-hot teachers, less a standard error; the same ratio for strong and for weak ones."""
    labels, g = torch.arange(20_000) % 5, torch.Generator().manual_seed(0)

    def teacher(skill):
        return torch.eye(5)[
            torch.where(
                torch.rand(20_000, generator=g) < skill,
                labels,
                torch.randint(5, (20_000,), generator=g),
            )
        ]

    for scale in (1.0, 0.3):
        prior = wt.teacher_prior(
            torch.stack([teacher(0.9 * scale), teacher(0.3 * scale), teacher(0.0)], 1),
            labels,
            zero_one_cost(5),
        ).exp()
        torch.testing.assert_close(
            prior, 0.95 * torch.tensor([0.75, 0.25, 0.0]) + 0.05 / 3, atol=0.03, rtol=0
        )
    nothing = torch.stack([teacher(0.0)[:1].expand(20_000, 5)] * 2, 1)
    for known in (labels, torch.full_like(labels, -1), torch.zeros_like(labels)):
        torch.testing.assert_close(
            wt.teacher_prior(nothing, known, zero_one_cost(5)).exp(), torch.tensor([0.5, 0.5])
        )


@pytest.mark.parametrize("policy", [rules.entropic, rules.gated])
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
    assert rules.entropic(two, labels)[labels < 0].mean(0)[0] > 0.8
    silent = rules.entropic(two, torch.full_like(labels, -1)).mean(0)
    assert abs(float(silent[0] - silent[1])) < 0.1


def student_of(probs):
    return torch.softmax(
        torch.randn(len(probs), probs.shape[2], generator=torch.Generator().manual_seed(3)), -1
    ).to(probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", rules.POLICIES)
def test_every_policy(cast, name, dtype):
    """Sums to one, follows a permutation of teachers and clips, never a NaN, no gradient, and knows a single teacher."""
    policy, probs, labels = rules.POLICIES[name], cast[0][40:80].to(dtype), cast[1][40:80]
    student, teachers, clips = student_of(probs), torch.tensor([2, 0, 3, 1]), torch.randperm(40)
    w = policy(probs, labels, student)
    assert w.shape == (40, 4) and w.dtype == dtype and w.min() >= 0
    torch.testing.assert_close(w.sum(1), torch.ones(40, dtype=dtype), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        policy(probs[:, teachers], labels, student), w[:, teachers], atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        policy(probs[clips], labels[clips], student[clips]), w[clips], atol=2e-3, rtol=0
    )
    sure, vague = (
        torch.eye(6, dtype=dtype)[torch.randint(6, (40, 4))],
        torch.full((40, 4, 6), 1 / 6, dtype=dtype),
    )
    for extreme in (sure, vague, torch.cat([sure[:, :2], vague[:, :2]], 1)):
        for known in (labels, torch.full_like(labels, -1), torch.zeros_like(labels)):
            for q in (
                (student, sure[:, 0], vague[:, 0]) if name in rules.FOLLOW_STUDENT else (None,)
            ):
                w = policy(extreme, known, q)
                assert w.isfinite().all() and torch.allclose(
                    w.sum(1), torch.ones(40, dtype=dtype), atol=1e-5
                )
    for known in (labels, torch.full_like(labels, -1)):
        alone = policy(probs[:, :1].clone().requires_grad_(), known, student)
        torch.testing.assert_close(alone, torch.ones(40, 1, dtype=dtype))
        assert not alone.requires_grad


def test_only_those_that_say_so_look_at_the_student(cast):
    probs, labels = cast
    for name, policy in rules.POLICIES.items():
        if name in rules.FOLLOW_STUDENT:
            assert not torch.equal(
                policy(probs, labels, probs[:, 0]), policy(probs, labels, probs[:, 1])
            )
        else:
            torch.testing.assert_close(
                policy(probs, labels, student_of(probs)), policy(probs, labels, None)
            )


def test_entropy_based_is_fooled_by_a_sure_teacher():
    sure = torch.tensor([0.98, 0.01, 0.01]).expand(5, 3)
    w = rules.entropy_based(
        torch.stack([sure, torch.full((5, 3), 1 / 3)], 1), torch.zeros(5, dtype=torch.long)
    )
    assert (w[:, 0] > 0.6).all()


def test_confidence_aware_by_hand():
    """Probabilities of the label 1/2, 1/4, 1/4: exp(CE) = 2, 4, 4, so (1 - .2) / 2 and (1 - .4) / 2 twice; it is not NaN alone."""
    probs = torch.tensor(
        [
            [[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]],
            [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]],
            [[0.1, 0.9]] * 3,
        ]
    )
    w = rules.confidence_aware(probs, torch.tensor([0, 1, -1]))
    torch.testing.assert_close(w[:2], torch.tensor([[0.4, 0.3, 0.3], [1 / 3] * 3]))
    torch.testing.assert_close(w[2], w[:2].mean(0))  # no label: the mean of those with one


def test_uncertainty_is_where_training_the_log_variances_ends(cast):
    probs, labels = cast
    known = labels >= 0
    ce = -probs[known].gather(2, labels[known][:, None, None].expand(-1, 4, 1)).log().mean((0, 2))
    s = torch.zeros(4, requires_grad=True)  # log sigma^2
    optimiser = torch.optim.Adam([s], lr=0.05)
    for _ in range(600):
        optimiser.zero_grad()
        (ce * (-s).exp() + s / 2).sum().backward()
        optimiser.step()
    precision = (-s.detach()).exp()
    torch.testing.assert_close(
        rules.uncertainty(probs, labels)[0], precision / precision.sum(), atol=1e-4, rtol=0
    )


def quadratic(q, b, x):
    return x @ q @ x / 2 + b @ x


@pytest.mark.parametrize("upper", [0.4, 0.6, 1.0])
def test_the_capped_minimum_against_scipy(upper):
    rng = np.random.default_rng(0)
    for rank in (
        1,
        3,
        6,
    ):  # fewer directions than teachers: a flat valley, whose floor is still found
        g, b = rng.normal(size=(5, 4, rank)), rng.normal(size=(5, 4)) * (rank > 3)
        q = g @ g.transpose(0, 2, 1)
        w = rules.capped_simplex_minimum(torch.tensor(q), torch.tensor(b), upper).numpy()
        assert w.min() >= -1e-9 and w.max() <= upper + 1e-9 and np.allclose(w.sum(1), 1)
        for i in range(5):
            value = partial(quadratic, q[i], b[i])
            sum_to_one = {"type": "eq", "fun": lambda x: x.sum() - 1}
            best = minimize(
                value,
                np.full(4, 0.25),
                bounds=[(0, upper)] * 4,
                constraints=sum_to_one,
                options={"ftol": 1e-14},
            ).fun
            assert value(w[i]) == pytest.approx(best, abs=1e-6)


def test_gradient_space_is_the_mixture_nearest_to_the_student():
    """The gradients are those of the KD loss, and a grid over all weights finds nothing shorter."""
    g = torch.Generator().manual_seed(0)
    probs, z = (
        torch.softmax(torch.randn(1, 3, 4, generator=g), -1),
        torch.randn(1, 4, generator=g, requires_grad=True),
    )
    grads = [torch.autograd.grad(kd_loss(z, probs[:, k], 1.0), z)[0][0] for k in range(3)]
    w = rules.gradient_space(probs, torch.tensor([-1]), torch.softmax(z.detach(), -1))[0]

    def length(w):
        return float(sum(x * y for x, y in zip(w, grads, strict=True)).norm())

    grid = [
        (i / 100, j / 100, (100 - i - j) / 100)
        for i in range(61)
        for j in range(61)
        if 40 <= i + j <= 100
    ]
    assert length(w) <= min(map(length, grid)) + 1e-6 and w.max() <= 0.6 + 1e-6
    opposed = torch.tensor(
        [[[0.7, 0.3], [0.4, 0.6]]]
    )  # the student half between: gradients -.2 and .1 cancel at 1 : 2, capped
    torch.testing.assert_close(
        rules.gradient_space(opposed, torch.tensor([0]), torch.tensor([[0.5, 0.5]])),
        torch.tensor([[0.4, 0.6]]),
    )


def test_trained_on_the_loss_collapses_on_the_constant_teacher_and_the_default_does_not(cast):
    """A student that starts vague and learns from whom the rule names; half of what a regulariser and a prior leave is still wrong."""
    probs, labels = (
        torch.stack([cast[0][:, 0], torch.full((240, 6), 1 / 6)], 1),
        cast[1],
    )  # a good one, and class frequencies
    inputs = torch.eye(6)[probs[:, 0].argmax(-1)] + 0.7 * torch.randn(
        240, 6, generator=torch.Generator().manual_seed(0)
    )
    found = {}
    for name in ("loss", "luo", "entropic"):
        student = torch.zeros(6, 6, requires_grad=True)
        optimiser = torch.optim.Adam([student], lr=0.02)
        for _ in range(100):
            z = inputs @ student
            w = rules.POLICIES[name](probs, labels, torch.softmax(z.detach(), -1))
            optimiser.zero_grad()
            multi_teacher_kd_loss(z, probs, w, 1.0).backward()
            optimiser.step()
        found[name] = float(w[:, 1].mean())
    assert found["loss"] == 1.0
    assert found["luo"] > 0.5 > 0.1 > found["entropic"]


def test_graph_distillation_by_hand():
    """KL to a uniform student is log 2 for a sure teacher, 0 for a vague one: w = 1/2 -+ log(2) / 4, then the prior added."""
    probs = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    w = rules.graph_distillation(probs, torch.tensor([-1]), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(w, 0.5 + np.log(2) / 8 * torch.tensor([[-1.0, 1.0]]))


def test_gate_stays_at_a_strong_prior_and_can_be_stored(cast):
    probs, labels = cast
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
    gates = wt.fit_gate(probs, labels, prior.log(), rho=1e3, floor=0.0)
    torch.testing.assert_close(next(gates)(probs), prior.expand(240, 4))
    gate = next(gates)
    torch.testing.assert_close(gate(probs[labels >= 0]).mean(0), prior, atol=0.01, rtol=0)
    other = wt.Gate(torch.zeros(4))
    other.load_state_dict(gate.state_dict())
    torch.testing.assert_close(other.bias, gate.bias)


def test_pair_alignment_follows_the_labels():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (80,), generator=g)
    good = torch.eye(4)[labels] + 0.3 * torch.randn(80, 4, generator=g)
    noise = torch.randn(80, 50, generator=g)
    grams = torch.stack([x @ x.T for x in (good, noise, good[torch.randperm(80, generator=g)])])
    v = wt.pair_alignment(grams, labels)
    assert v[0] > 0.5 and v[1:].abs().max() < 0.1
    unlabelled = torch.where(torch.arange(80) < 40, labels, -1)
    torch.testing.assert_close(
        wt.pair_alignment(grams, unlabelled), wt.pair_alignment(grams[:, :40, :40], labels[:40])
    )


@pytest.mark.parametrize(
    "labels",
    [torch.full((6,), -1), torch.zeros(6, dtype=torch.long), torch.tensor([0, 1, 2, -1, -1, -1])],
)
def test_pair_alignment_without_evidence_is_zero(labels):
    grams = torch.randn(3, 6, 6).abs()
    assert torch.equal(wt.pair_alignment(grams + grams.mT, labels), torch.zeros(3))


def test_a_constant_teacher_has_no_say_in_the_ground_cost():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(5)
    good = 3 * torch.eye(4)[labels] + torch.randn(20, 4)
    constant = torch.zeros(20, 4)

    def cost_of(*teachers):
        names = tuple(map(str, range(len(teachers))))
        return ground_cost(
            Knowledge(names, torch.stack(teachers, 1), [], [], labels, torch.zeros(20)), 0.0
        )

    torch.testing.assert_close(cost_of(good, constant), cost_of(good))
    torch.testing.assert_close(cost_of(constant), zero_one_cost(4))
