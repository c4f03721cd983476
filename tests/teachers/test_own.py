"""Networks of others as teachers: read where they say, left as they were, and through to a loss."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import memory_set
from torch import nn
from torchvision.models import WeightsEnum, video

from gdviz.config import Distillation, Schedule, Teachers, View
from gdviz.core.files import UserError
from gdviz.student.edges import build_graphs
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import gather, predict
from gdviz.teachers.fit import fit, fit_teacher
from gdviz.teachers.own import OwnBackbone, OwnView, Tapped, Teacher, find_source
from gdviz.teachers.pretext import TASKS

VIEW = View(size=16, frames=6, length=4, stride=1, clips=2)
TINY = Teachers(fit=Schedule(epochs=1, batch=4, min_steps=2), folds=2)
OURS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # as this package scales clips


def tap(net, features, size, length=4, *, view=None, **options):
    return OwnBackbone(Tapped(net, features, OwnView(size, length, **view or {}), **options))


@pytest.fixture(scope="module")
def clips():
    return torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def videos():
    pixels = np.random.default_rng(0).integers(256, size=(16, 6, 16, 16, 3), dtype=np.uint8)
    splits = ["train"] * 9 + ["unlabelled"] * 3 + ["test"] * 4
    return memory_set(pixels, [0, 1, 2] * 5 + [0], splits)


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return video.swin3d_t(num_classes=3).eval()


def videomae():
    transformers = pytest.importorskip("transformers", reason="needs gdviz[hub]")
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32,
        patch_size=16,
        num_labels=3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_frames=4,
    )
    return transformers.VideoMAEForVideoClassification(config).eval()


def as_input(clips, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """Colours in [0, 1], resized frame by frame, normalised the network's way."""
    resize = nn.functional.interpolate
    frames = [resize(f * 0.25 + 0.5, (size, size), mode="bilinear") for f in clips.unbind(2)]
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (mean, std))
    return (torch.stack(frames, 2) - mean) / std


def hooks_of(net):
    return sum(len(module._forward_hooks) for module in net.modules())


def test_swin_is_read_where_its_head_reads(swin, clips):
    """The head on the features gives the logits: they are what the network calls features."""
    tokens = tap(swin, "norm", 32, channels=-1, logits="")  # [b, t, h, w, d]
    logits, features = tokens(clips)
    with torch.no_grad():
        torch.testing.assert_close(logits, swin(as_input(clips, 32)))
        torch.testing.assert_close(swin.head(features), logits)
    torch.testing.assert_close(tap(swin, "avgpool", 32)(clips), features)  # [b, d, 1, 1, 1]
    assert tokens.dim == features.shape[1] == 768
    assert hooks_of(swin) == 0


def test_r3d_agrees_with_the_backbone_of_the_zoo(clips):
    torch.manual_seed(0)
    net = video.r3d_18(num_classes=3).eval()
    ours = build_backbone("r3d_18").eval()
    state = dict(zip(ours.trunk.state_dict(), net.state_dict().values(), strict=False))
    ours.trunk.load_state_dict(state)
    torch.testing.assert_close(
        tap(net, "layer4", 16, view=OURS)(clips), ours(clips), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("layer", ["videomae.encoder.layer.1", "videomae"])
def test_videomae_tokens_are_pooled_and_outputs_unpacked(clips, layer):
    net = videomae()
    hooks = hooks_of(net)
    logits, features = tap(net, layer, 32, view={"frames_first": True}, logits="")(clips)
    assert hooks_of(net) == hooks
    with torch.no_grad():
        whole = net(as_input(clips, 32).transpose(1, 2), output_hidden_states=True)
    torch.testing.assert_close(logits, whole.logits)
    torch.testing.assert_close(features, whole.hidden_states[-1].mean(1))


def test_clips_are_resampled_in_time():
    class Frames(nn.Conv3d):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    net = Frames(3, 2, 1)
    own = tap(net, "", 8, 3, view=OURS)
    own(torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 8, 8))
    assert net.seen[0, 0, :, 0, 0].tolist() == [0, 4, 8]


def test_frozen_networks_stay_in_eval_and_keep_no_gradient(clips):
    net = video.r3d_18(num_classes=3).train()
    frozen = tap(net, "layer4", 16)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert not frozen.train()(clips).requires_grad
    assert not any(module.training for module in net.modules())
    tap(net, "layer4", 16, frozen=False).train()(clips).sum().backward()
    assert net.training and net.layer4[0].conv1[0].weight.grad is not None
    running = [not torch.equal(v, before[k]) for k, v in net.state_dict().items()]
    assert any(running) and hooks_of(net) == 0


class Says(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


def test_what_cannot_be_read_is_named(swin, clips):
    near = r"features='features\.4\.blok': no such module in SwinTransformer3d; near: .*features\.4"
    with pytest.raises(ValueError, match=near):
        tap(swin, "features.4.blok", 32)
    with pytest.raises(ValueError, match=r"logits='hed': no such module .*near: head"):
        tap(swin, "avgpool", 32, logits="hed")
    idle = video.r3d_18(num_classes=3)
    idle.fc.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"features='fc\.spare': the network runs without it"):
        tap(idle, "fc.spare", 16)
    for answer, complaint in {
        (None, "words"): r"'1' returns tuple, in which there is no tensor",
        torch.zeros(1, 2, 2, 8): r"features='1': .*not \[1, 2, 2, 8\]",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            tap(nn.Sequential(nn.Conv3d(3, 2, 1), Says(answer)), "1", 8, 2)
    net = video.r3d_18(num_classes=3).eval()
    own = tap(net, "layer4", 16)
    with pytest.raises(RuntimeError):
        own(clips[:, :1].expand(-1, 2, -1, -1, -1))
    assert hooks_of(swin) == hooks_of(net) == 0


def test_foreign_teachers_go_through_to_a_loss_with_a_gradient(swin, videos):
    """One with a new head, one that has the classes already, next to one of ours."""
    teachers = {
        "swin": tap(swin, "norm", 32, channels=-1),
        "own-head": tap(swin, "features.2", 32, channels=-1, logits=""),
        "tiny": build_backbone("tiny4"),
    }
    before = {k: v.clone() for k, v in swin.state_dict().items()}
    readouts = {
        name: fit_teacher(teacher, videos, TINY, VIEW, seed=0)[1]
        for name, teacher in teachers.items()
    }
    assert all(torch.equal(v, before[k]) for k, v in swin.state_dict().items())
    every = torch.arange(16)
    whole = predict(teachers["own-head"], videos, every, VIEW)[0].mean(1)
    # nothing was fitted; kept in half precision
    torch.testing.assert_close(readouts["own-head"].at("logits", every), whole, atol=1e-3, rtol=0)
    held = (readouts["swin"].at(name, every) for name in ("features", "held"))
    assert torch.equal(*held)  # frozen: every fold's copy has the same
    bank = gather(readouts, videos)
    logits_graph, graph = build_graphs(bank, videos.training_rows, Distillation(), 5)
    rows, head = torch.arange(8), nn.Linear(5, 3)
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    uniform = torch.full((8, 3), 1 / 3)
    loss = logits_graph.loss(head(features), bank.probs()[rows], uniform)
    loss = loss + graph.loss(features, bank.features_at(rows), uniform, uniform[0])
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss > 0 and gradient.isfinite().all() and (gradient.abs().sum(1) > 0).all()


def test_a_head_of_other_classes_is_refused(videos):
    net = tap(video.r3d_18(num_classes=7), "layer4", 16, logits="fc")
    with pytest.raises(UserError, match=r"answers in 7 classes, but the data has 3"):
        fit(net, videos, torch.arange(4), VIEW, TINY.fit, seed=0)


def test_a_fitted_head_reads_the_features(swin, videos):
    net = tap(swin, "norm", 32, channels=-1)
    model = fit(net, videos, torch.arange(9), VIEW, TINY.fit, seed=0)
    assert isinstance(model, Classifier) and model.fc.in_features == 768
    kept = model.backbone.trunk.net.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in swin.state_dict().items())
    logits, features = predict(model, videos, torch.arange(3), VIEW)
    torch.testing.assert_close(model.fc(features.mean(1)), logits.mean(1), atol=1e-5, rtol=1e-4)


def test_sources_are_tasks_or_teachers(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom gdviz.teachers.own import OwnView\n"
        "class Plain:\n"
        "    view, fitted = OwnView(8, 2), False\n"
        "    weight = torch.randn(3)\n"
        "    def __call__(self, clips):\n"
        "        return None, clips.mean((2, 3, 4)) * self.weight\n"
        "def net():\n    return Plain()\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_source("order") is TASKS["order"]
    own = find_source("mine:net")
    assert isinstance(own.trunk.teacher, Teacher) and own.dim == 3 and not own.fitted
    clips = torch.randn(2, 3, 4, 16, 16)
    assert own(clips).shape == (2, 3)
    for name, message in (
        ("mine:none", "has no 'none'"),
        ("yours:net", "No module"),
        ("mine:nothing", "gives int"),
        ("ordr", r"unknown task 'ordr' \(near: order"),
    ):
        with pytest.raises(UserError, match=message):
            find_source(name)


def test_weights_that_cannot_be_fetched_are_named(monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(
        ValueError, match=r"cannot fetch https.*put that file into .*take r3d_18"
    ):
        build_backbone("r3d_18@kinetics")
    with pytest.raises(ValueError, match="unknown backbone 'r3d_18@imagenet'"):
        build_backbone("r3d_18@imagenet")
