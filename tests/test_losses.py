"""Baseline losses: against PyTorch, by identities."""

import pytest
import torch
import torch.nn.functional as F

from gdviz import losses


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
    z, p, w = torch.randn(4, 5), torch.softmax(torch.randn(4, 3, 5), -1), torch.softmax(torch.randn(4, 3), -1)
    expected = sum(w[n, k] * losses.kd_loss(z[n], p[n, k], 2.0) for n in range(4) for k in range(3)) / 4
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
    z, p = torch.randn(4, 5, requires_grad=True), torch.softmax(torch.randn(4, 5), -1).requires_grad_()
    for loss in (losses.kd_loss(z, p, 2.0), losses.hint_loss(z, p)):
        assert torch.autograd.grad(loss, p, allow_unused=True, retain_graph=True)[0] is None
