"""Backbones: found by name, fed as they expect, and weights that come with their normalisation."""

from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, video

from gdviz.core.files import UserError
from gdviz.teachers.backbones import KINETICS, ZOO, Classifier, Renormalise, build_backbone


@pytest.fixture
def clips():
    return torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_clip_is_renormalised_from_our_scale_to_another(clips):
    mean, std = (0.4, 0.5, 0.1), (0.2, 0.1, 0.3)
    pixels = clips * 0.25 + 0.5
    expected = [(pixels[:, c] - mean[c]) / std[c] for c in range(3)]
    torch.testing.assert_close(Renormalise(mean, std)(clips), torch.stack(expected, 1))


@pytest.mark.parametrize("name", ["tiny4", "tiny4n", "tiny4m", *ZOO])
def test_features_are_mean_maps_of_the_promised_size(name):
    backbone = build_backbone(name).eval()
    clips = torch.randn(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, features = backbone.maps(clips), backbone(clips)
        model = Classifier(backbone, 5).eval()
        logits, same = model(clips)
    assert maps.shape[:2] == features.shape == (2, backbone.dim)
    torch.testing.assert_close(features, maps.flatten(2).mean(2))
    assert torch.equal(same, features) and torch.equal(logits, model.fc(features))


@pytest.mark.parametrize(
    ("name", "gain", "static"), [("tiny4", 0, 0), ("tiny4n", 1, 0), ("tiny4m", 1, 1)]
)
def test_tiny_ones_ignore_what_their_suffix_says(clips, name, gain, static):
    """The gain of a clip, and a picture that stands still behind it."""
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        before = backbone(clips)
        louder, behind = backbone(3 * clips), backbone(clips + clips[:, :, :1].flip(0))
    assert torch.allclose(louder, before, atol=1e-4) == bool(gain)
    assert torch.allclose(behind, before, atol=1e-4) == bool(static)


@pytest.mark.parametrize("name", ["r3d_18", "s3d"])
def test_kinetics_weights_come_with_their_normalisation(monkeypatch, name):
    torch.manual_seed(0)
    net = getattr(video, name)().eval()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: net.state_dict())
    length, size = (16, 64) if name == "s3d" else (4, 16)
    clips = torch.randn(1, 3, length, size, size)
    trunk = net.features if name == "s3d" else nn.Sequential(*list(net.children())[:-2])
    mean, std = (torch.tensor(colours).view(3, 1, 1, 1) for colours in KINETICS)
    backbone = build_backbone(f"{name}@kinetics").eval()
    with torch.no_grad():
        expected = trunk((clips * 0.25 + 0.5 - mean) / std).mean((2, 3, 4))
        torch.testing.assert_close(backbone(clips), expected, atol=1e-4, rtol=1e-3)
    with torch.device("meta"):  # as a run checks its settings
        backbone = build_backbone(f"{name}@kinetics").eval()
        assert backbone(torch.zeros(1, 3, length, size, size)).shape == (1, backbone.dim)


def test_weights_that_cannot_be_had_and_unknown_names_are_told(monkeypatch):
    def offline(self, **_):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    advice = r"cannot fetch https.*r3d_18.*no network.*into .*checkpoints, or take r3d_18"
    with pytest.raises(UserError, match=advice):
        build_backbone("r3d_18@kinetics")
    for name in ("r3d_18@imagenet", "tiny8@kinetics", "tiny", "resnet50"):
        with pytest.raises(UserError, match=f"unknown backbone '{name}': choose tinyW .*s3d"):
            build_backbone(name)
