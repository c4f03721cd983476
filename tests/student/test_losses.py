"""Baseline losses: against PyTorch, by identities."""

import pytest
import torch
import torch.nn.functional as F

from gdviz.student import losses


def test_kd_loss_is_kl_times_t_squared():
    z, p, t = torch.randn(7, 5), torch.softmax(torch.randn(7, 5), -1), 3.0
    expected = t**2 * F.kl_div(F.log_softmax(z / t, -1), p, reduction="batchmean")
    torch.testing.assert_close(losses.kd_loss(z, p, t), expected)


def test_kd_gradient_keeps_its_size_with_temperature():
    """For small logits T^2 KL -> a constant: without the factor it would fall by 100."""
    z, teacher = 0.1 * torch.randn(9, 5), 0.1 * torch.randn(9, 5)

    def size(t):
        x = z.clone().requires_grad_()
        losses.kd_loss(x, torch.softmax(teacher / t, -1), t).backward()
        return float(x.grad.norm())

    assert size(10.0) == pytest.approx(size(1.0), rel=0.1)


def test_kd_loss_zero_on_identical_inputs_and_finite_on_one_hot():
    z = torch.randn(4, 6, requires_grad=True)
    value = losses.kd_loss(z, torch.softmax(z / 2, -1), 2.0)
    (grad,) = torch.autograd.grad(value, z)
    assert abs(value.item()) < 1e-6 and grad.abs().max() < 1e-6
    assert losses.kd_loss(z, torch.eye(6)[:4], 2.0).isfinite()
    with pytest.raises(ValueError, match="temperature"):
        losses.kd_loss(z, torch.eye(6)[:4], 0.0)


def test_several_teachers():
    z, p, w = (
        torch.randn(4, 5),
        torch.softmax(torch.randn(4, 3, 5), -1),
        torch.softmax(torch.randn(4, 3), -1),
    )
    expected = (
        sum(w[n, k] * losses.kd_loss(z[n], p[n, k], 2.0) for n in range(4) for k in range(3)) / 4
    )
    torch.testing.assert_close(losses.multi_teacher_kd_loss(z, p, w, 2.0), expected)
    grads = []
    for loss in (
        lambda x: losses.multi_teacher_kd_loss(x, p, w, 2.0),
        lambda x: losses.kd_loss(x, (w[..., None] * p).sum(1), 2.0),
    ):
        x = z.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(x), x)[0])
    torch.testing.assert_close(*grads)


def test_hint_loss():
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    assert losses.hint_loss(x, x) == 0
    torch.testing.assert_close(losses.hint_loss(x, y), (x - y).pow(2).sum(1).mean() / 8)


def test_teachers_get_no_gradient():
    z, p = (
        torch.randn(4, 5, requires_grad=True),
        torch.softmax(torch.randn(4, 5), -1).requires_grad_(),
    )
    for loss in (losses.kd_loss(z, p, 2.0), losses.hint_loss(z, p)):
        assert torch.autograd.grad(loss, p, allow_unused=True, retain_graph=True)[0] is None


# --- losses on features and relations: by their definitions, and where public versions go wrong


def park_reference(x, y):
    """RKD as its authors wrote it: differences, loops over nothing, mean over positive distances."""

    def distance(e):
        d = torch.cdist(e, e)
        return d / d[d > 0].mean()

    def angle(e):
        d = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), dim=2)
        return torch.bmm(d, d.transpose(1, 2))

    return F.smooth_l1_loss(distance(x), distance(y)), F.smooth_l1_loss(angle(x), angle(y))


def test_rkd_equals_the_explicit_form_with_its_gradient():
    x, y = (
        torch.randn(9, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(9, 11, dtype=torch.float64),
    )
    ours = losses.relational_distance_loss(x, y), losses.relational_angle_loss(x, y)
    for mine, theirs in zip(ours, park_reference(x, y), strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, x, retain_graph=True)[0] for value in (mine, theirs))
        )


RELATIONAL = {
    "distance": losses.relational_distance_loss, "angle": losses.relational_angle_loss,
    "similarity": losses.similarity_loss, "correlation": losses.correlation_loss,
}  # fmt: skip


@pytest.mark.parametrize("loss", RELATIONAL.values(), ids=RELATIONAL)
def test_relational_losses(loss):
    """Zero on equal features, blind to rotation, finite for one clip and for equal clips, and unhurt by autocast."""
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    assert float(loss(x, x)) == pytest.approx(0, abs=1e-8)
    turn = torch.linalg.qr(torch.randn(16, 16))[0]
    assert float(loss(x @ turn, x)) == pytest.approx(0, abs=1e-8)
    assert float(loss(x, y)) > 1e-4
    for few in (x[:1], x[:1].expand(4, -1)):
        few = few.clone().requires_grad_()
        value = loss(few, y[: len(few)])
        assert value.isfinite() and torch.autograd.grad(value, few)[0].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            loss(x, y), loss(x.double(), y.double()).float(), rtol=1e-4, atol=1e-7
        )


def test_similarity_normalises_rows():
    """With a matrix of known rows: a public version passed dim as the norm's order and was nine times off."""
    x, y = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    expected = (torch.eye(2) - torch.full((2, 2), 0.5**0.5)).pow(2).mean()
    torch.testing.assert_close(losses.similarity_loss(x, y), expected)


def test_attention_is_blind_to_channels_and_scale():
    a, b = torch.rand(3, 5, 2, 4, 4), torch.rand(3, 7, 2, 4, 4)
    assert float(losses.attention_loss(a, 3 * a[:, [4, 2, 0, 1, 3]])) == pytest.approx(0, abs=1e-10)
    q = [m.pow(2).sum(1).reshape(3, -1) for m in (a, b)]
    expected = sum((u / u.norm() - v / v.norm()).pow(2).sum() for u, v in zip(*q, strict=True)) / 3
    torch.testing.assert_close(losses.attention_loss(a, b), expected)
    with pytest.raises(ValueError, match="grids"):
        losses.attention_loss(a, b[..., :2])


def test_correlation_is_the_taylor_series_of_a_gaussian():
    """For unit vectors exp(-gamma |x - y|^2) = exp(-2 gamma) exp(2 gamma <x, y>): third-order remainder."""
    x, y = F.normalize(torch.randn(6, 4), dim=1), F.normalize(torch.randn(6, 4), dim=1)
    exact = (
        (torch.exp(-0.05 * torch.cdist(x, x) ** 2) - torch.exp(-0.05 * torch.cdist(y, y) ** 2))
        .pow(2)
        .mean()
    )
    torch.testing.assert_close(
        losses.correlation_loss(x, y, gamma=0.05), exact, rtol=2e-2, atol=1e-8
    )


def test_contrastive_loss_by_its_definition():
    s, t, n = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 5, 4)

    def h(a, b):
        e = torch.exp(F.cosine_similarity(a, b, dim=-1) / 0.5)
        return e / (e + 5 / 20)

    expected = -(h(s, t).log() + (1 - h(s[:, None], n)).log().sum(1)).mean()
    torch.testing.assert_close(losses.contrastive_loss(s, t, n, bank=20, temperature=0.5), expected)
    assert losses.contrastive_loss(t, t, -t[:, None], 20) < losses.contrastive_loss(
        -t, t, t[:, None], 20
    )


def test_decoupled_kd_adds_up_to_kd():
    """KL = KL(b) + (1 - p_true) KL(p^) (Zhao et al. 2022, eq. 5), and finite where public versions are not."""
    z, teacher, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.randint(5, (6,))
    weight = 1 - torch.softmax(teacher / 2, 1)[torch.arange(6), y]
    terms = torch.stack([
        losses.decoupled_kd_loss(z[i : i + 1], teacher[i : i + 1], y[i : i + 1], 2.0, 1.0, float(weight[i])) for i in range(6)
    ])  # fmt: skip
    torch.testing.assert_close(terms.mean(), losses.kd_loss(z, torch.softmax(teacher / 2, 1), 2.0))
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    value = losses.decoupled_kd_loss(extreme, -extreme.detach(), torch.tensor([0, 0]))
    assert value.isfinite() and torch.autograd.grad(value, extreme)[0].isfinite().all()


def test_dist_is_pearson_over_classes_and_clips():
    z, teacher = torch.randn(6, 5), torch.randn(6, 5)
    p, q = torch.softmax(z, 1), torch.softmax(teacher, 1)
    rho = [
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        for a, b in ((p, q), (p.T, q.T))
    ]
    expected = sum(1 - torch.stack(r).mean() for r in rho)
    torch.testing.assert_close(losses.dist_loss(z, teacher), expected)
    flat = torch.zeros(4, 3, requires_grad=True)
    assert torch.autograd.grad(losses.dist_loss(flat, teacher[:4, :3]), flat)[0].isfinite().all()
