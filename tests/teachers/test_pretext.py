"""Pretext tasks: views hold what is asked about, and a backbone learns from them."""

import math

import pytest
import torch
from torch import Generator, nn

from gdviz.core.files import UserError
from gdviz.teachers.backbones import Backbone, build_backbone
from gdviz.teachers.pretext import TASKS, PretextTask, common

LENGTH = 4
each_task = pytest.mark.parametrize("name", [name for name in TASKS if name != "none"])


@pytest.fixture
def bare(monkeypatch):
    """Views without augmentation, so that a pixel's value says where it came from."""
    monkeypatch.setattr(common, "augment", lambda clips, rng, strength: clips)


def numbered(count: int, frames: int = 12, size: int = 4) -> torch.Tensor:
    """Videos [b, f, 3, h, w] whose pixels hold 100 * video + frame."""
    number = 100.0 * torch.arange(count)[:, None] + torch.arange(frames)
    return number[..., None, None, None].expand(-1, -1, 3, size, size)


def moving(rng: Generator, count: int = 32, frames: int = 12, size: int = 16) -> torch.Tensor:
    """A bar that travels right at one pixel a frame and grows brighter, on noise of its own."""
    start = torch.randint(size, (count, 1, 1), generator=rng)
    place = (torch.arange(size) - start - torch.arange(frames)[:, None]) % size  # (b, f, w)
    bar = (place < 4) * (0.5 + 0.1 * torch.arange(frames))[:, None]
    noise = torch.randn(count, 1, 3, size, size, generator=rng)
    return bar[:, :, None, None].expand(-1, -1, 3, size, -1) + 0.3 * noise


class Given(Backbone):
    """Takes features for clips."""

    def __init__(self):
        super().__init__(nn.Identity(), 8)

    def forward(self, clips):
        return clips


def build(name: str, stride: int = 2) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    backbone = build_backbone("tiny4")
    return backbone, TASKS[name](backbone.dim, LENGTH, stride)


@each_task
def test_shapes_loss_and_gradient(name):
    rng = Generator().manual_seed(0)
    backbone, task = build(name)
    assert isinstance(task, PretextTask)
    inputs, target = task.views(moving(rng, count=7), rng)
    # Two to four views of a half or quarter of the videos, rounded up.
    several = {"order": 8, "coherence": 12, "contrast": 8, "rotation": 8}
    count, length = {"clip-order": (21, LENGTH // 2)}.get(name, (several.get(name, 7), LENGTH))
    assert inputs.shape == (count, 3, length, 16, 16)
    maps = {"coherence": (4,), "registration": (7, 4), "prediction": (7, 3, 16, 16)}
    maps |= {"masked": (7, 4, LENGTH, 16, 16), "clip-order": (7,)}
    assert target.shape == maps.get(name, (count,))
    loss, metric = task(backbone, inputs, target)
    assert loss.shape == metric.shape == ()
    assert loss.isfinite() and not metric.requires_grad
    loss.backward()
    trained = [*backbone.parameters(), *task.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
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
    both_forms = torch.arange(100).repeat(2)  # of the same clips
    assert (inputs[:, 0, 0, 0, 0] // 100 == both_forms).all()


@pytest.mark.usefixtures("bare")
def test_pace_target_is_the_stride():
    inputs, target = TASKS["pace"](8, LENGTH, 1).views(numbered(90), Generator().manual_seed(0))
    assert (inputs[:, 0, :, 0, 0].diff(dim=1) == target[:, None] + 1).all()
    assert target.unique().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="at pace 3 need 10 kept frames of a video, not 8"):
        TASKS["pace"](8, LENGTH, 1).views(numbered(90, frames=8), Generator().manual_seed(0))


@pytest.mark.usefixtures("bare")
def test_coherence_spoils_a_clip_without_changing_its_frames():
    inputs, target = TASKS["coherence"](8, LENGTH, 2).views(
        numbered(40), Generator().manual_seed(0)
    )
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
    """A frame that holds its own coordinates tells where the camera stood."""
    side, length = 64, 5
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    frame = torch.stack(
        [axis.expand(side, side), axis[:, None].expand(side, side), torch.zeros(side, side)]
    )
    task = TASKS["registration"](8, length, 1)
    inputs, target = task.views(frame.expand(20, 2, -1, -1, -1), Generator().manual_seed(0))
    middle = slice(side // 2 - 6, side // 2 + 6)  # nothing outside the frame is seen there
    u = torch.stack(torch.meshgrid(axis[middle], axis[middle], indexing="xy"), -1).reshape(-1, 2)
    design = torch.cat([u, torch.ones(len(u), 1)], 1)
    for path, scaled in zip(inputs, target, strict=True):
        seen = path[:2, :, middle, middle].flatten(2).permute(1, 2, 0)  # (t, p, 2)
        # x' = [u v 1] M, with M (t, 3, 2)
        maps = torch.linalg.lstsq(design.expand(length, -1, -1), seen).solution
        turn = torch.complex(maps[:, 0, 0], maps[:, 0, 1]).log()  # log zoom + i angle
        turned = turn[-1] - turn[0]
        first_to_last = torch.stack([*(maps[-1, 2] - maps[0, 2]), turned.imag, turned.real])
        expected = scaled * torch.tensor(task.ranges)
        torch.testing.assert_close(first_to_last, expected, atol=2e-3, rtol=0)
        centre = maps[length // 2]  # of the path, where the camera stands straight
        torch.testing.assert_close(centre, torch.eye(3)[:, :2], atol=2e-3, rtol=0)
    assert target.abs().max() <= 1
    assert target.std() == pytest.approx(1 / math.sqrt(3), abs=0.1)


def test_registration_scores_the_right_answer_one_and_the_mean_zero():
    task, target = TASKS["registration"](8, LENGTH, 1), torch.rand(50, 4) * 2 - 1
    task.head = nn.Identity()
    loss, r2 = task(Given(), target, target)
    assert loss.item() == 0 and float(r2) == 1
    loss, r2 = task(Given(), target.mean(0).expand(50, 4), target)
    assert float(loss) > 0 and float(r2) == pytest.approx(0, abs=1e-5)


@pytest.mark.usefixtures("bare")
def test_clip_order_target_is_the_order_and_gaps_are_kept():
    task = TASKS["clip-order"](8, 8, 1)
    inputs, target = task.views(numbered(300, frames=20), Generator().manual_seed(0))
    seen = inputs[:, 0, :, 0, 0].unflatten(0, (3, 300))  # (3, b, t)
    assert (seen.diff(dim=2) == 1).all()
    assert (seen // 100 == torch.arange(300)[:, None]).all()  # three sub-clips of one video
    assert torch.equal(torch.tensor(task.orders)[target].T, seen[:, :, 0].argsort(0).argsort(0))
    firsts = seen[:, :, 0].sort(0).values
    assert (firsts.diff(dim=0) == 4 + 2).all()  # four frames, and a gap of two
    assert target.bincount(minlength=6).min() > 30
    with pytest.raises(
        (UserError, ValueError), match=r"a clip of 16 frames does not fit a video of 15: lower"
    ):
        task.views(numbered(2, frames=15), Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "length"), [("clip-order", 3), ("masked", 1)])
def test_a_clip_too_short_for_a_task_is_refused(name, length):
    with pytest.raises(UserError, match=rf"length={length}: .*give"):
        TASKS[name](8, length, 1)


@pytest.mark.usefixtures("bare")
def test_rotation_is_undone_by_its_target():
    videos = moving(Generator().manual_seed(0), count=8)
    inputs, target = TASKS["rotation"](8, LENGTH, 2).views(videos, Generator().manual_seed(0))
    each = zip(inputs, target.tolist(), strict=True)
    upright = torch.stack([clip.rot90(-turns, (2, 3)) for clip, turns in each])
    assert target.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(torch.equal(upright[:2], turned) for turned in upright.split(2))
    assert len({tuple(clip.flatten()[:50].tolist()) for clip in inputs}) == 8


@pytest.mark.usefixtures("bare")
def test_contrast_pairs_two_clips_of_one_video_at_distances_that_fall_linearly():
    task = TASKS["contrast"](8, LENGTH, 2)
    inputs, partner = task.views(numbered(4000), Generator().manual_seed(0))
    frames = inputs[:, 0, :, 0, 0]
    assert (frames.diff(dim=1) == 2).all()
    assert torch.equal(frames // 100, frames[partner] // 100)
    assert not (partner == torch.arange(4000)).any()
    # Twelve frames leave starts 0 to 5.
    apart = (frames - frames[partner])[:2000, 0].abs().long().bincount(minlength=6)
    assert apart[1] > apart[2] > apart[3] > apart[4] > apart[5] > 0
    assert apart[1] / apart[5] == pytest.approx(5, rel=0.4)


def test_contrast_is_infonce():
    """Brute force, clip by clip; right answers rank first, and the loss is near zero."""
    task = TASKS["contrast"](8, LENGTH, 1)
    z = torch.randn(6, 8, generator=Generator().manual_seed(0))
    task.project = nn.Identity()
    partner, unit = torch.arange(6).roll(3), z / z.norm(dim=1, keepdim=True)
    loss, ranked = task(Given(), z, partner)
    losses, wins = [], []
    for i in range(6):
        terms = {j: math.exp(float(unit[i] @ unit[j]) / 0.1) for j in range(6) if j != i}
        losses.append(-math.log(terms[int(partner[i])] / sum(terms.values())))
        wins += [terms[j] < terms[int(partner[i])] for j in terms if j != int(partner[i])]
    assert float(loss) == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert float(ranked) == pytest.approx(sum(wins) / 24)
    loss, ranked = task(Given(), torch.eye(8)[:3].repeat(2, 1), partner)
    assert float(ranked) == 1 and float(loss) < 1e-3


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("size", [16, 24, 36])
def test_masked_pixels_are_invisible_and_tubes_hide_nine_cells_in_ten(size):
    backbone, task = build("masked")
    backbone.eval()
    videos = moving(Generator().manual_seed(0), count=3, size=size)
    inputs, target = task.views(videos, Generator().manual_seed(5))
    whole, hidden = target[:, :3], target[:, 3:].expand(-1, 3, -1, -1, -1).bool()
    assert torch.equal(hidden, hidden[:, :, :1].expand_as(hidden))  # tubes
    assert torch.equal(inputs, torch.where(hidden, 0, whole))
    assert hidden.float().mean() == pytest.approx(0.9, abs=0.06)
    # Other pixels behind the same mask, in every frame the video has: the network sees the same.
    other = torch.where(hidden[:, :, 0, None].movedim(1, 2), torch.randn_like(videos), videos)
    again, changed = task.views(other, Generator().manual_seed(5))
    assert not torch.equal(changed, target)
    assert torch.equal(backbone.maps(again), backbone.maps(inputs))


def test_masked_scores_the_right_cubes_one_and_flat_ones_zero():
    class Answer(nn.Module):
        def forward(self, maps):
            return self.answer.flatten(1, 2)

    backbone, task = build("masked")
    inputs, target = task.views(torch.randn(4, 12, 3, 24, 24), Generator().manual_seed(0))
    task.paint = Answer()
    # By hand: frames 2a and 2a + 1, rows 3i to 3i + 2, columns 3j to 3j + 2, mean 0, deviation 1.
    cubes = target[:, :3].unfold(2, 2, 2).unfold(3, 3, 3).unfold(4, 3, 3).flatten(5)
    flat = cubes - cubes.mean(-1, keepdim=True)  # (b, 3, a, i, j, 18)
    right = (flat / flat.std(-1, correction=0, keepdim=True)).movedim(-1, 2)
    for task.paint.answer, score in ((right, 1.0), (torch.zeros_like(right), 0.0)):
        loss, explained = task(backbone, inputs, target)
        assert float(explained) == pytest.approx(score, abs=1e-2)
        assert float(loss) == pytest.approx(1 - score, abs=1e-2)
    seen = ~target[:, 3, 0].unfold(1, 3, 3).unfold(2, 3, 3)[..., 0, 0].bool()  # (b, i, j)
    task.paint.answer = right + 9 * seen[:, None, None, None]  # what is visible is not asked
    assert float(task(backbone, inputs, target)[1]) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("name", ["order", "coherence", "clip-order"])
def test_clips_too_short_for_a_task_are_refused(name):
    with pytest.raises(UserError, match="needs 4 frames or more"):
        TASKS[name](8, 3, 1)


@pytest.mark.parametrize(
    "name", ["order", "coherence", "pace", "clip-order", "rotation", "contrast"]
)
def test_without_training_or_anything_to_see_a_task_is_at_chance(name):
    """Frames of pure noise: a metric above chance would come from the task itself."""
    scores = []
    for seed in range(12):
        rng = Generator().manual_seed(seed)
        torch.manual_seed(seed)
        backbone, task = build_backbone("tiny4"), TASKS[name](16, LENGTH, 2)
        noise = torch.randn(32, 12, 3, 16, 16, generator=rng)
        with torch.no_grad():
            scores.append(float(task(backbone, *task.views(noise, rng))[1]))
    assert sum(scores) / 12 == pytest.approx(TASKS[name].chance, abs=0.08)


@each_task
def test_the_default_clip_fits(name):
    """Eight frames of 24 x 24 pixels, out of 24, as profiles have it."""
    rng = Generator().manual_seed(0)
    backbone, task = build_backbone("tiny4"), TASKS[name](16, 8, 2)
    loss, _ = task(backbone, *task.views(moving(rng, count=4, frames=24, size=24), rng))
    assert loss.isfinite()


@each_task
@pytest.mark.usefixtures("bare")
def test_a_backbone_learns_it(name):
    """A few steps on an easy case: well above chance, which a wrong target could not be."""
    rng = Generator().manual_seed(0)
    backbone, task = build(name)
    optimiser = torch.optim.Adam([*backbone.parameters(), *task.parameters()], lr=1e-2)
    scores = []
    for _ in range({"registration": 80, "coherence": 60, "masked": 80}.get(name, 40)):
        loss, metric = task(backbone, *task.views(moving(rng), rng))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        scores.append(float(metric))
    bars = {"order": 0.8, "coherence": 0.55, "registration": 0.25, "prediction": 0.5, "pace": 0.8}
    bars |= {"clip-order": 0.8, "rotation": 0.8, "contrast": 0.9, "masked": 0.1}
    assert sum(scores[-10:]) / 10 > bars[name]


def test_no_task_leaves_a_backbone_as_it_was_drawn():
    backbone, task = build_backbone("tiny4"), TASKS["none"](16, LENGTH, 2)
    before = [p.clone() for p in backbone.parameters()]
    loss, _ = task(backbone, *task.views(torch.rand(4, 24, 3, 16, 16), Generator()))
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in backbone.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))
