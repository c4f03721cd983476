"""Baseline losses: against PyTorch, by identities."""

import pytest
import torch
import torch.nn.functional as F

from gdviz.student import losses


def kd(z, p, temperature):
    """From one teacher."""
    return losses.kd_loss(z, p[..., None, :], torch.ones_like(z[..., :1]), temperature)


def test_kd_loss_is_kl_times_t_squared():
    z, p, t = torch.randn(7, 5), torch.softmax(torch.randn(7, 5), -1), 3.0
    expected = t**2 * F.kl_div(F.log_softmax(z / t, -1), p, reduction="batchmean")
    torch.testing.assert_close(kd(z, p, t), expected)
    assert kd(z, torch.eye(5)[[0, 1, 2, 3, 4, 0, 1]], 2.0).isfinite()
    with pytest.raises(ValueError, match="temperature"):
        kd(z, p, 0.0)


def test_kd_gradient_keeps_its_size_with_temperature():
    """For small logits T^2 KL tends to a constant: without the factor it would fall by 100."""
    z, teacher = 0.1 * torch.randn(9, 5), 0.1 * torch.randn(9, 5)

    def size(t):
        x = z.clone().requires_grad_()
        kd(x, torch.softmax(teacher / t, -1), t).backward()
        return float(x.grad.norm())

    assert size(10.0) == pytest.approx(size(1.0), rel=0.1)


def test_kd_has_no_gradient_where_student_and_teacher_agree():
    z = torch.randn(4, 6, requires_grad=True)
    value = kd(z, torch.softmax(z / 2, -1), 2.0)
    (grad,) = torch.autograd.grad(value, z)
    assert abs(value.item()) < 1e-6 and grad.abs().max() < 1e-6


def test_several_teachers_add_up_and_pull_like_their_mixture():
    z, p = torch.randn(4, 5, requires_grad=True), torch.softmax(torch.randn(4, 3, 5), -1)
    w = torch.softmax(torch.randn(4, 3), -1)
    each = [w[n, k] * kd(z[n], p[n, k], 2.0) for n in range(4) for k in range(3)]
    value = losses.kd_loss(z, p, w, 2.0)
    torch.testing.assert_close(value, sum(each) / 4)
    mixture = kd(z, (w[..., None] * p).sum(1), 2.0)
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], torch.autograd.grad(mixture, z)[0])


def test_hint_loss():
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    assert losses.hint_loss(x, x) == 0
    torch.testing.assert_close(losses.hint_loss(x, y), (x - y).pow(2).sum(1).mean() / 8)


def test_teachers_get_no_gradient():
    z, p = (
        torch.randn(4, 5, requires_grad=True),
        torch.softmax(torch.randn(4, 5), -1).requires_grad_(),
    )
    for loss in (kd(z, p, 2.0), losses.hint_loss(z, p)):
        assert torch.autograd.grad(loss, p, allow_unused=True, retain_graph=True)[0] is None


# --- losses on features and relations: by their definitions, and where public versions go wrong


def park_reference(x, y):
    """RKD as its authors wrote it: differences, mean over positive distances."""

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


RELATIONAL = {"distance": losses.relational_distance_loss, "angle": losses.relational_angle_loss}


@pytest.mark.parametrize("loss", RELATIONAL.values(), ids=RELATIONAL)
def test_relational_losses(loss):
    """Zero on equal features, blind to rotation, finite for one clip, unhurt by autocast."""
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
    """KL = KL(b) + (1 - p_true) KL(p^) (Zhao et al. 2022, eq. 5); finite at extremes."""
    z, teacher, y = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    weight = (1 - torch.softmax(teacher / 2, 1)[torch.arange(6), y]).tolist()
    terms = [
        losses.decoupled_kd_loss(z[[i]], teacher[[i]], y[[i]], 2.0, 1.0, weight[i])
        for i in range(6)
    ]
    expected = kd(z, torch.softmax(teacher / 2, 1), 2.0)
    torch.testing.assert_close(torch.stack(terms).mean(), expected)
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    value = losses.decoupled_kd_loss(extreme, -extreme.detach(), torch.tensor([0, 0]), 4.0)
    assert value.isfinite() and torch.autograd.grad(value, extreme)[0].isfinite().all()


def test_dist_is_pearson_over_classes_and_clips():
    z, teacher = torch.randn(6, 5), torch.randn(6, 5)
    p, q = torch.softmax(z, 1), torch.softmax(teacher, 1)
    rho = [
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        for a, b in ((p, q), (p.T, q.T))
    ]
    expected = sum(1 - torch.stack(r).mean() for r in rho)
    torch.testing.assert_close(losses.dist_loss(z, teacher, 1.0), expected)
    flat = torch.zeros(4, 3, requires_grad=True)
    assert (
        torch.autograd.grad(losses.dist_loss(flat, teacher[:4, :3], 1.0), flat)[0].isfinite().all()
    )
