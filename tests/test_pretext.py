"""Pretext tasks: what they show is what they ask about, and a backbone learns from it."""

import math

import pytest
import torch
from torch import Generator, nn

from gdviz.models import build_backbone
from gdviz.pretext import TASKS, coherence, order, pace, prediction, registration

MODULES = {"order": order, "coherence": coherence, "registration": registration, "prediction": prediction, "pace": pace}
LENGTH = 4
each_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture
def bare(monkeypatch):
    """Views without augmentation, so that a pixel's value says where it came from."""
    for module in MODULES.values():
        monkeypatch.setattr(module, "augment", lambda clips, rng: clips)


def numbered(count: int, frames: int = 12, size: int = 4) -> torch.Tensor:
    """Videos [b, f, 3, h, w] whose pixels hold 100 * video + frame."""
    number = 100.0 * torch.arange(count)[:, None] + torch.arange(frames)
    return number[..., None, None, None].expand(-1, -1, 3, size, size)


def moving(rng: Generator, count: int = 32, frames: int = 12, size: int = 16) -> torch.Tensor:
    """A bar that travels right at one pixel a frame and grows brighter, on noise of its own."""
    start = torch.randint(size, (count, 1, 1), generator=rng)
    place = (torch.arange(size) - start - torch.arange(frames)[:, None]) % size  # (b, f, w)
    bar = (place < 4) * (0.5 + 0.1 * torch.arange(frames))[:, None]
    return bar[:, :, None, None].expand(-1, -1, 3, size, -1) + 0.3 * torch.randn(count, 1, 3, size, size, generator=rng)


def build(name: str, stride: int = 2) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    backbone = build_backbone("tiny4")
    return backbone, TASKS[name](backbone.dim, LENGTH, stride)


@each_task
def test_shapes_loss_and_gradient(name):
    rng = Generator().manual_seed(0)
    backbone, task = build(name)
    inputs, target = task.views(moving(rng, count=7), rng)
    count = {"order": 8, "coherence": 12}.get(name, 7)  # two or three views of half of the batch, rounded up
    assert inputs.shape == (count, 3, LENGTH, 16, 16)
    assert target.shape == {"order": (8,), "coherence": (4,), "registration": (7, 4), "prediction": (7, 3, 16, 16)}.get(name, (7,))
    loss, metric = task(backbone, inputs, target)
    assert loss.shape == metric.shape == ()
    assert loss.isfinite()
    assert not metric.requires_grad
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*backbone.parameters(), *task.parameters()])
    assert sum(float(p.grad.abs().sum()) for p in backbone.parameters()) > 0


@each_task
def test_views_are_drawn_from_the_generator(name):
    task = build(name)[1]
    videos = moving(Generator().manual_seed(0))
    a, b, c = (task.views(videos, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])


@pytest.mark.usefixtures("bare")
def test_order_shuffles_where_it_says_so():
    inputs, target = TASKS["order"](8, LENGTH, 2).views(numbered(200), Generator().manual_seed(0))
    steps = inputs[:, 0, :, 0, 0].diff(dim=1)
    assert (steps[target == 0] == 2).all()
    assert int(target.sum()) == len(target) // 2 == 100
    out_of_order = (steps[target == 1] != 2).any(1).float().mean()
    assert out_of_order > 0.9  # one in 4! permutations changes nothing
    assert (inputs[:, 0, :, 0, 0].sort(1).values.diff(dim=1) == 2).all()
    assert (inputs[:, 0, 0, 0, 0] // 100 == torch.arange(100).repeat(2)).all()  # both forms of the same clips


@pytest.mark.usefixtures("bare")
def test_pace_target_is_the_stride():
    inputs, target = TASKS["pace"](8, LENGTH, 1).views(numbered(90), Generator().manual_seed(0))
    assert (inputs[:, 0, :, 0, 0].diff(dim=1) == target[:, None] + 1).all()
    assert target.unique().tolist() == [0, 1, 2]
    _, short = TASKS["pace"](8, LENGTH, 1).views(numbered(90, frames=8), Generator().manual_seed(0))
    assert short.unique().tolist() == [0, 1]  # a stride of 3 does not fit eight frames


@pytest.mark.usefixtures("bare")
def test_coherence_spoils_a_clip_without_changing_its_frames():
    inputs, target = TASKS["coherence"](8, LENGTH, 2).views(numbered(40), Generator().manual_seed(0))
    intact, swapped, returning = inputs[:, 0, :, 0, 0].chunk(3)
    assert target.tolist() == [0] * 20
    assert (intact.diff(dim=1) == 2).all()
    half = LENGTH // 2
    assert torch.equal(swapped, torch.cat([intact[:, half:], intact[:, :half]], 1))
    assert torch.equal(returning, torch.cat([intact[:, :half], intact[:, half:].flip(1)], 1))


@pytest.mark.usefixtures("bare")
def test_prediction_asks_for_the_next_frame_and_scores_copying_zero():
    backbone, task = build("prediction", stride=3)
    inputs, target = task.views(numbered(20, frames=14), Generator().manual_seed(0))
    assert (inputs[:, 0, :, 0, 0].diff(dim=1) == 3).all()
    assert (target[:, 0, 0, 0] - inputs[:, 0, -1, 0, 0] == 3).all()
    nn.init.zeros_(task.paint[-1].weight)
    nn.init.zeros_(task.paint[-1].bias)
    inputs, target = task.views(moving(Generator().manual_seed(0)), Generator().manual_seed(0))
    loss, explained = task(backbone, inputs, target)
    assert float(loss.detach()) == pytest.approx(1, abs=1e-4)
    assert float(explained) == pytest.approx(0, abs=1e-4)


@pytest.mark.usefixtures("bare")
def test_registration_target_is_the_transform_between_the_ends():
    """A frame that holds its own coordinates shows where the camera stood: the map is read off and compared."""
    side, length = 64, 5
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    frame = torch.stack([axis.expand(side, side), axis[:, None].expand(side, side), torch.zeros(side, side)])
    task = TASKS["registration"](8, length, 1)
    inputs, target = task.views(frame.expand(20, 2, -1, -1, -1), Generator().manual_seed(0))
    middle = slice(side // 2 - 6, side // 2 + 6)  # nothing outside the frame is seen there
    u = torch.stack(torch.meshgrid(axis[middle], axis[middle], indexing="xy"), -1).reshape(-1, 2)
    design = torch.cat([u, torch.ones(len(u), 1)], 1)
    for path, scaled in zip(inputs, target, strict=True):
        seen = path[:2, :, middle, middle].flatten(2).permute(1, 2, 0)  # (t, p, 2)
        maps = torch.linalg.lstsq(design.expand(length, -1, -1), seen).solution  # (t, 3, 2): x' = [u v 1] M
        turn = torch.complex(maps[:, 0, 0], maps[:, 0, 1]).log()  # log zoom + i angle
        first_to_last = [*(maps[-1, 2] - maps[0, 2]), turn[-1].imag - turn[0].imag, turn[-1].real - turn[0].real]
        expected = scaled * torch.tensor(task.ranges)
        torch.testing.assert_close(torch.stack(first_to_last), expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(maps[length // 2], torch.eye(3)[:, :2], atol=2e-3, rtol=0)  # the path is centred
    assert target.abs().max() <= 1
    assert target.std() == pytest.approx(1 / math.sqrt(3), abs=0.1)


def test_registration_scores_the_right_answer_one_and_the_mean_zero():
    task, target = TASKS["registration"](8, LENGTH, 1), torch.rand(50, 4) * 2 - 1
    task.head = nn.Identity()
    for guess, loss_is_zero, score in ((target, True, 1.0), (target.mean(0).expand(50, 4), False, 0.0)):
        loss, r2 = task(lambda answer: answer, guess, target)
        assert (float(loss) == 0) == loss_is_zero
        assert float(r2) == pytest.approx(score, abs=2e-2)


@each_task
@pytest.mark.usefixtures("bare")
def test_a_backbone_learns_it(name):
    """A few steps on an easy case: well above chance, which a wrong target could not be."""
    rng = Generator().manual_seed(0)
    backbone, task = build(name)
    optimiser = torch.optim.Adam([*backbone.parameters(), *task.parameters()], lr=1e-2)
    scores = []
    for _ in range({"registration": 80, "coherence": 60}.get(name, 40)):
        loss, metric = task(backbone, *task.views(moving(rng), rng))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        scores.append(float(metric))
    bar = {"order": 0.8, "coherence": 0.55, "registration": 0.25, "prediction": 0.5, "pace": 0.8}[name]
    assert sum(scores[-10:]) / 10 > bar
