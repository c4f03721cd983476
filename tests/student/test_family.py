"""Light students: cheap as they say, one contract for all, and streams that end where clips do."""

import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gdviz.config import Profile
from gdviz.core.files import UserError, from_plain, plain
from gdviz.experiment.checks import check_profile
from gdviz.student.family import STUDENTS, StreamingClassifier, _Shifted, _step, build_student


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(name, classes=5):
    """A student whose batch norms have seen clips: untrained, MobileNet's signal fades away."""
    torch.manual_seed(0)
    model = build_student(name, classes)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.normal_(norm.bias, std=0.1)
    with torch.no_grad():
        model.train()(draw(4, 3, 8, 32, 32, seed=2))
    return model.eval()


@pytest.mark.parametrize("name", STUDENTS)
def test_parameters_and_flops_are_those_of_the_docstring(name):
    row = re.search(rf"^ +{name} +([\d.]+) M +([\d.]+)\s", build_student.__doc__, re.M)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_student(name, 101).eval()
        model(torch.zeros(1, 3, 16, 112, 112))
    size = sum(p.numel() for p in model.parameters())
    assert f"{size / 1e6:.2f}" == row[1] and 0.02e6 < size < 4e6
    assert f"{counter.get_total_flops() / 1e9:.2f}" == row[2]


@pytest.mark.parametrize("name", [*STUDENTS, "light-xsn", "light-mm", "tiny4"])
@pytest.mark.parametrize("shape", [(8, 24, 24), (16, 48, 64)])
def test_features_are_mean_maps_of_three_by_three_or_more(name, shape):
    model, clips = student(name), draw(2, 3, *shape)
    with torch.no_grad():
        maps, (logits, features) = model.backbone.maps(clips), model(clips)
    assert maps.shape[:2] == features.shape == (2, model.backbone.dim)
    assert maps.shape[2] >= 4 and min(maps.shape[3:]) >= 3
    torch.testing.assert_close(features, maps.mean((2, 3, 4)))
    assert torch.equal(logits, model.fc(features)) and features.std() > 0


@pytest.mark.parametrize("name", STUDENTS)
def test_convolutions_are_of_two_dimensions_and_every_weight_learns(name):
    model = student(name).train()
    assert not [m for m in model.modules() if isinstance(m, nn.Conv3d)]
    model(draw(2, 3, 8, 24, 24))[0].square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", STUDENTS)
def test_the_order_of_frames_matters_and_other_clips_of_the_batch_do_not(name):
    model, clips = student(name), draw(3, 3, 8, 32, 32)
    with torch.no_grad():
        _, features = model(clips)
        backwards, alone = model(clips.flip(2))[1], model(clips[1:2])[1]
    assert (features - backwards).abs().max() > 1e-3
    torch.testing.assert_close(alone, features[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "static"), [("light-xs", 0), ("light-xsn", 0), ("light-xsm", 1)])
def test_suffixes_are_those_of_tiny_networks(name, static):
    """n forgets the gain of a clip, m the picture behind what moves, too."""
    model, clips = student(name), draw(2, 3, 8, 24, 24)
    with torch.no_grad():
        before, louder, behind = (
            model(x)[1] for x in (clips, 3 * clips, clips + clips[:, :, :1].flip(0))
        )
    assert torch.allclose(louder, before, atol=1e-4) == (name != "light-xs")
    assert torch.allclose(behind, before, atol=1e-4) == bool(static)


def test_a_block_is_a_convolution_over_pixels_and_one_over_time():
    """The same by Conv3d: folding frames into the batch changes nothing."""
    model, clips = student("light-xs"), draw(2, 3, 16, 64, 64)
    stem = next(model.backbone.trunk.children())
    with torch.no_grad():
        across, along = (stem.across.weight[:, :, None], stem.along.weight[..., None])
        x = nn.functional.conv3d(clips, across, stride=(1, 4, 4), padding=(0, 3, 3))
        x = stem.norms[0](x.flatten(3)).view_as(x).relu()
        x = nn.functional.conv3d(x, along, stride=(2, 1, 1), padding=(1, 0, 0))
        x = stem.norms[1](x.flatten(3)).view_as(x).relu()
        torch.testing.assert_close(stem(clips), x, atol=1e-5, rtol=1e-4)


def test_strides_leave_enough():
    assert [_step(4, size, 12) for size in (112, 48, 47, 24, 23)] == [4, 4, 2, 2, 1]


def test_shift_moves_an_eighth_of_the_channels_each_way():
    x = draw(2, 4, 16, 3, 3)
    shifted = _Shifted._shift(x)
    assert torch.equal(shifted[:, :-1, :2], x[:, 1:, :2]) and not shifted[:, -1, :2].any()
    assert torch.equal(shifted[:, 1:, 2:4], x[:, :-1, 2:4]) and not shifted[:, 0, 2:4].any()
    assert torch.equal(shifted[:, :, 4:], x[:, :, 4:])


@pytest.mark.parametrize("size", [24, 64])
def test_a_stream_ends_where_the_clip_does_in_constant_memory(size):
    model, clips, state, sizes = student("causal-s"), draw(2, 3, 9, size, size), None, []
    assert isinstance(model, StreamingClassifier)
    with torch.no_grad():
        for count, frame in enumerate(clips.unbind(2), 1):
            logits, features, state = model.stream(frame, state)
            sizes.append([x.shape for x in state])
            expected = model(clips[:, :, :count])
            torch.testing.assert_close((logits, features), expected, atol=1e-4, rtol=1e-4)
        assert all(shapes == sizes[0] for shapes in sizes)
        started = model.stream(clips[:, :, 0], tuple(map(torch.zeros_like, state)))
        torch.testing.assert_close(started, model.stream(clips[:, :, 0]))  # zeros are no past


@pytest.mark.parametrize("name", ["light-xsn", "light-mm", "shift-small", "causal-s"])
def test_exports_hold_for_any_batch(name):
    model, clips = student(name), draw(2, 3, 8, 32, 32)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (clips,), dynamic_shapes=(batch,)).module()
    more = draw(5, 3, 8, 32, 32, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(program(more), model(more), atol=1e-4, rtol=1e-4)


def test_names_are_checked_as_settings():
    def profile(name):
        return from_plain(Profile, plain(Profile()) | {"distillation": {"student": name}})

    check_profile(profile("light-xsm"))
    choice = f"unknown backbone 'light-xl': choose tinyW.*; or a light student: {STUDENTS[0]}, .*"
    with pytest.raises(UserError, match=f"--distillation.student light-xl: {choice}causal-s"):
        check_profile(profile("light-xl"))
    for name in ("light", "light-xsnm", "causal-sn", "shift-small@kinetics"):
        with pytest.raises(UserError, match="light-l"):
            build_student(name, 5)
