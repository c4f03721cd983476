"""Networks of others, rebuilt, are as large as published."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.yardsticks import movinet_a0, x3d_xs


@pytest.mark.parametrize(
    ("build", "shape", "params", "multiply_adds"),
    [(x3d_xs, (4, 160, 160), 3.76e6, 0.60e9), (movinet_a0, (50, 172, 172), 3.1e6, 2.71e9)],
)
def test_published_parameters_and_operations(build, shape, params, multiply_adds):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build().eval()
        logits = net(torch.zeros(1, 3, *shape))
    assert (net.view.length, net.view.size, net.view.size) == shape
    assert logits.shape == (1, 400 if build is x3d_xs else 600)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(params, rel=0.02)
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.02)


@pytest.mark.parametrize("build", [x3d_xs, movinet_a0])
def test_they_answer_in_as_many_classes_as_are_asked_for(build):
    torch.manual_seed(0)
    with torch.no_grad():
        logits = build(7).eval()(torch.randn(2, 3, 4, 48, 48))
    assert logits.shape == (2, 7) and logits.isfinite().all()
