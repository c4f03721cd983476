"""Ground costs: one normalisation, no opinion where there is none, and refusals."""

import pytest
import torch
from graph_cases import normal

from gdviz.graphs.costs import average_costs, check_cost, cost_from_means, normalise_cost
from gdviz.graphs.costs import zero_one_cost as zero_one

LABELS = torch.tensor([0, 0, 1, 2, -1, -1])


def off_mean(cost):
    return float(cost.sum() / (cost.numel() - len(cost)))


def test_cost_from_means_is_the_distances_of_class_means_shrunk_to_the_zero_one_cost():
    features = normal(6, 4)
    cost = check_cost(cost_from_means(features, LABELS, 4))
    means = torch.stack([features[:2].mean(0), features[2], features[3]])
    expected = torch.ones(4, 4, dtype=torch.float64).fill_diagonal_(0)
    expected[:3, :3] = normalise_cost(torch.cdist(means, means))  # class 3 is equally far from all
    expected = normalise_cost(expected) / 2 + zero_one(4) / 2  # four labels, four classes
    torch.testing.assert_close(cost, expected.float())
    moved = cost_from_means(1e3 + 5 * features, LABELS, 4)
    torch.testing.assert_close(moved, cost)
    with pytest.raises(ValueError, match="two classes"):
        cost_from_means(features, LABELS.clamp(max=0), 4)


def test_costs_have_unit_mean_off_the_diagonal():
    cost = cost_from_means(normal(6, 4), LABELS, 4)
    for one in (cost, normalise_cost(7 * cost, shrink=0.3), average_costs([7 * cost, zero_one(4)])):
        assert off_mean(one) == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(normalise_cost(cost, shrink=1.0), zero_one(4))
    torch.testing.assert_close(average_costs([7 * cost, cost]), cost)
    for bad in ({"cost": torch.zeros(3, 3)}, {"cost": cost, "shrink": 1.5}):
        with pytest.raises(ValueError, match=r"zero|shrink"):
            normalise_cost(**bad)


@pytest.mark.parametrize(
    "cost",
    [
        torch.eye(3),
        torch.tensor([[0.0, 1], [2, 0]]),
        torch.tensor([[0.0, float("inf")], [1, 0]]),
        torch.tensor([[0.0, float("nan")], [float("nan"), 0]]),
        torch.tensor([[0.0, -1], [-1, 0]]),
    ],
)
def test_what_cannot_be_a_ground_cost_is_refused(cost):
    with pytest.raises(ValueError, match="finite, non-negative, symmetric"):
        check_cost(cost)
