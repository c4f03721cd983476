"""Foreign networks as teachers: read where they say, left as they were, and through to a loss."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import memory_set
from gdviz.teachers.readout import predict
from torch import nn
from torchvision.models import WeightsEnum, video

from gdviz.config import Distillation, Schedule, Teachers, View
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import build_graphs, gather
from gdviz.teachers.fit import fit, outputs_of
from gdviz.teachers.own import TappedBackbone, TappedClassifier

VIEW = View(size=16, frames=6, length=4, stride=1, clips=2)
TINY = Teachers(fit=Schedule(epochs=1, batch=4, min_steps=2), folds=2)


@pytest.fixture(scope="module")
def clips():
    return torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def videos():
    pixels = np.random.default_rng(0).integers(256, size=(16, 6, 16, 16, 3), dtype=np.uint8)
    return memory_set(
        pixels, [0, 1, 2] * 5 + [0], ["train"] * 9 + ["unlabelled"] * 3 + ["test"] * 4
    )


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return video.swin3d_t(num_classes=3).eval()


def videomae(**settings):
    transformers = pytest.importorskip("transformers", reason="needs gdviz[hub]")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_frames": 4,
    }
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=16, num_labels=3, **small | settings
    )
    return transformers.VideoMAEForVideoClassification(config).eval()


def as_input(clips, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """Colours in [0, 1], resized frame by frame, normalised the foreign way."""
    frames = torch.stack(
        [
            nn.functional.interpolate(f * 0.25 + 0.5, (size, size), mode="bilinear")
            for f in clips.unbind(2)
        ],
        2,
    )
    return (frames - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)


def hooks_of(net):
    return sum(len(module._forward_hooks) for module in net.modules())


def test_swin_is_read_where_its_head_reads(swin, clips):
    """The head on the features gives the logits: they are what the network itself calls features."""
    tokens = TappedBackbone(swin, "norm", size=32, length=4, channels=-1)  # [b, t, h, w, d]
    logits, features = TappedClassifier(tokens)(clips)
    with torch.no_grad():
        torch.testing.assert_close(logits, swin(as_input(clips, 32)))
        torch.testing.assert_close(swin.head(features), logits)
    torch.testing.assert_close(
        TappedBackbone(swin, "avgpool", size=32, length=4)(clips), features
    )  # [b, d, 1, 1, 1]
    assert tokens.dim == features.shape[1] == 768
    assert hooks_of(swin) == 0


def test_r3d_agrees_with_the_backbone_of_the_zoo(clips):
    torch.manual_seed(0)
    net = video.r3d_18(num_classes=3).eval()
    ours = build_backbone("r3d_18").eval()
    ours.trunk.load_state_dict(
        dict(zip(ours.trunk.state_dict(), net.state_dict().values(), strict=False))
    )
    tapped = TappedBackbone(net, "layer4", size=16, length=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(tapped(clips), ours(clips), atol=1e-5, rtol=1e-4)
    assert tapped.maps(clips).shape == ours.maps(clips).shape


@pytest.mark.parametrize("layer", ["videomae.encoder.layer.1", "videomae"])
def test_videomae_tokens_are_pooled_and_outputs_unpacked(clips, layer):
    net = videomae()
    hooks = hooks_of(net)
    backbone = TappedBackbone(net, layer, size=32, length=4, frames_first=True)
    logits, features = TappedClassifier(backbone)(clips)
    assert hooks_of(net) == hooks
    with torch.no_grad():
        said = net(as_input(clips, 32).transpose(1, 2), output_hidden_states=True)
    torch.testing.assert_close(logits, said.logits)
    torch.testing.assert_close(features, said.hidden_states[-1].mean(1))


def test_clips_are_resampled_in_time():
    class Frames(nn.Conv3d):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    net = Frames(3, 2, 1)
    tapped = TappedBackbone(net, "", size=8, length=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    tapped(torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 8, 8))
    assert net.seen[0, 0, :, 0, 0].tolist() == [0, 4, 8]


def test_frozen_networks_stay_in_eval_and_keep_no_gradient(clips):
    net = video.r3d_18(num_classes=3).train()
    frozen = TappedBackbone(net, "layer4", size=16, length=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert not frozen.train()(clips).requires_grad
    assert not any(module.training for module in net.modules())
    open_ = TappedBackbone(net, "layer4", size=16, length=4, frozen=False).train()
    features = open_(clips)
    features.sum().backward()
    assert net.training and net.layer4[0].conv1[0].weight.grad is not None
    assert not all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )  # batch norm's running means
    assert hooks_of(net) == 0


class Says(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


def test_what_cannot_be_tapped_is_named(swin, clips):
    with pytest.raises(
        ValueError,
        match=r"features='features\.4\.blok': no such module in SwinTransformer3d; near: .*features\.4",
    ):
        TappedBackbone(swin, "features.4.blok", size=32, length=4)
    tapped = TappedBackbone(swin, "avgpool", size=32, length=4)
    with pytest.raises(ValueError, match=r"logits='hed': no such module .*near: head"):
        TappedClassifier(tapped, "hed")(clips)
    idle = video.r3d_18(num_classes=3)
    idle.fc.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"features='fc\.spare': the network runs without it"):
        TappedBackbone(idle, "fc.spare", size=16, length=4)
    for answer, complaint in {
        (None, "words"): r"'1' returns tuple, in which there is no tensor",
        torch.zeros(1, 2, 2, 8): r"features='1': .*not \[1, 2, 2, 8\]",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            TappedBackbone(nn.Sequential(nn.Conv3d(3, 2, 1), Says(answer)), "1", size=8, length=2)
    assert hooks_of(swin) == 0


def test_hooks_are_gone_after_a_failure(clips):
    net = video.r3d_18(num_classes=3).eval()
    tapped = TappedBackbone(net, "layer4", size=16, length=4)
    with pytest.raises(RuntimeError):
        tapped(clips[:, :1].expand(-1, 2, -1, -1, -1))
    assert hooks_of(net) == 0


def test_foreign_teachers_go_through_to_a_loss_with_a_gradient(swin, videos):
    """One with a new head, fitted with cross-fitting, and one that has the classes already, next to one of ours."""
    teachers = {
        "swin": TappedBackbone(swin, "norm", size=32, length=4, channels=-1),
        "own-head": TappedClassifier(
            TappedBackbone(swin, "features.2", size=32, length=4, channels=-1)
        ),
        "tiny": build_backbone("tiny4"),
    }
    before = {k: v.clone() for k, v in swin.state_dict().items()}
    outputs = {
        name: outputs_of(teacher, videos, TINY, VIEW, seed=0)[1]
        for name, teacher in teachers.items()
    }
    assert all(torch.equal(v, before[k]) for k, v in swin.state_dict().items())
    whole = predict(teachers["own-head"], videos, torch.arange(16), VIEW)[0]
    assert torch.allclose(
        outputs["own-head"].logits, whole, atol=1e-3
    )  # nothing was fitted; kept in half precision
    assert torch.equal(
        outputs["swin"].features, outputs["swin"].held_features
    )  # frozen: every fold's copy has the same
    knowledge = gather(outputs, videos)
    logits_graph, representation_graph = build_graphs(
        knowledge, 5, videos.training_rows, Distillation()
    )
    rows, head = torch.arange(8), nn.Linear(5, 3)
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    uniform = torch.full((8, 3), 1 / 3)
    loss = logits_graph.loss(head(features), knowledge.probs()[rows], uniform)
    loss = loss + representation_graph.loss(
        features, [f[rows] for f in knowledge.features], uniform, uniform[0]
    )
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss > 0 and gradient.isfinite().all() and (gradient.abs().sum(1) > 0).all()


def test_a_head_of_other_classes_is_refused(videos):
    net = TappedClassifier(
        TappedBackbone(video.r3d_18(num_classes=7), "layer4", size=16, length=4), "fc"
    )
    with pytest.raises(
        ValueError, match=r"logits='fc': 7 classes, but the data has 3; tap features only"
    ):
        fit(net, videos, torch.arange(4), VIEW, TINY.fit, seed=0)


def test_a_fitted_head_reads_the_tapped_features(swin, videos):
    model = fit(
        TappedBackbone(swin, "norm", size=32, length=4, channels=-1),
        videos,
        torch.arange(9),
        VIEW,
        TINY.fit,
        seed=0,
    )
    assert isinstance(model, Classifier) and model.fc.in_features == 768
    assert all(
        torch.equal(v, model.backbone.trunk.state_dict()[k]) for k, v in swin.state_dict().items()
    )  # the head alone was fitted
    logits, features = predict(model, videos, torch.arange(3), VIEW)
    torch.testing.assert_close(logits, (features @ model.fc.weight.T + model.fc.bias).detach())


@pytest.mark.parametrize("name", ["r3d_18", "s3d"])
def test_kinetics_weights_come_with_their_normalisation(monkeypatch, name):
    torch.manual_seed(0)
    net = getattr(video, name)().eval()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: net.state_dict())
    size, length = (64, 16) if name == "s3d" else (16, 4)
    clips, trunk = (
        torch.randn(1, 3, length, size, size),
        net.features if name == "s3d" else nn.Sequential(*list(net.children())[:-2]),
    )
    backbone = build_backbone(f"{name}@kinetics").eval()
    with torch.no_grad():
        expected = trunk(
            as_input(clips, size, (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
        )
        torch.testing.assert_close(backbone(clips), expected.mean((2, 3, 4)), atol=1e-4, rtol=1e-3)
    with torch.device("meta"):  # as a run checks its settings
        assert build_backbone(f"{name}@kinetics").eval()(
            torch.zeros(1, 3, length, size, size)
        ).shape == (1, backbone.dim)


def test_weights_that_cannot_be_had_are_named(monkeypatch):
    def offline(self, **_):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(
        ValueError,
        match=r"cannot fetch https.*r3d_18.*no network.*put that file into .*checkpoints, or take r3d_18",
    ):
        build_backbone("r3d_18@kinetics")
    for name in ("r3d_18@imagenet", "tiny8@kinetics"):
        with pytest.raises(ValueError, match=f"unknown backbone '{name}'"):
            build_backbone(name)
