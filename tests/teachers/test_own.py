"""Networks of others as teachers: read at the right place, left as they were, and distilled."""

import copy
import sys
import types
from collections import OrderedDict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import TINY as RUN
from conftest import memory_set
from torch import nn
from torchvision.models import video

from gdviz.config import Distillation, Schedule, Teachers, View
from gdviz.core.files import UserError
from gdviz.experiment.checks import check_profile
from gdviz.student.edges import build_graphs
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.bank import device_of, gather, predict, stamp_of
from gdviz.teachers.fit import fit, fit_teacher
from gdviz.teachers.own import (
    OwnBackbone,
    OwnClassifier,
    OwnView,
    Tapped,
    Teacher,
    build_classifier,
    find_source,
)
from gdviz.teachers.pretext.choices import FrameOrder

VIEW = View(size=16, frames=6, length=4, stride=1, clips=2)
TINY = Teachers(fit=Schedule(epochs=1, batch=4, min_steps=2), folds=2)
PLAIN = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # as this package scales clips
SMALL, LARGE = OwnView(16, 4), OwnView(32, 4)


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


@cache
def drawn(classes):
    torch.manual_seed(0)
    return video.r3d_18(num_classes=classes).eval()


def r3d(classes=3):
    """A network of one's own; drawing 33 million numbers takes a second."""
    return copy.deepcopy(drawn(classes))


def as_input(clips, view):
    """Colours in [0, 1], resized frame by frame, normalised as the network wants them."""
    resize = nn.Upsample((view.size, view.size), mode="bilinear")
    frames = torch.stack([resize(frame * 0.25 + 0.5) for frame in clips.unbind(2)], 2)
    mean, std = (torch.tensor(colours).view(3, 1, 1, 1) for colours in (view.mean, view.std))
    return (frames - mean) / std


def hooks_of(net):
    return sum(len(module._forward_hooks) for module in net.modules())


def test_swin_is_read_where_its_head_reads(swin, clips):
    """The head on the features gives the logits: they are what the network itself calls so."""
    teacher = Tapped(swin, "norm", LARGE, logits="", channels=-1)  # tokens [b, t, h, w, d]
    assert isinstance(teacher, Teacher) and teacher.fitted
    logits, features = OwnClassifier(teacher)(clips)
    with torch.no_grad():
        torch.testing.assert_close(logits, swin(as_input(clips, LARGE)))
        torch.testing.assert_close(swin.head(features), logits)
    pooled = OwnBackbone(Tapped(swin, "avgpool", LARGE))  # maps [b, d, 1, 1, 1]
    torch.testing.assert_close(pooled(clips), features)
    assert pooled.dim == features.shape[1] == 768
    assert hooks_of(swin) == 0


def test_r3d_agrees_with_the_backbone_of_the_zoo(clips):
    net, ours = r3d(), build_backbone("r3d_18").eval()
    weights = zip(ours.trunk.state_dict(), net.state_dict().values(), strict=False)
    ours.trunk.load_state_dict(dict(weights))
    read = OwnBackbone(Tapped(net, "layer4", OwnView(16, 4, **PLAIN)))
    torch.testing.assert_close(read(clips), ours(clips), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", ["videomae.encoder.layer.1", "videomae"])
def test_videomae_tokens_are_pooled_and_outputs_unpacked(clips, layer):
    transformers = pytest.importorskip("transformers", reason="needs gdviz[hub]")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    size = {"image_size": 32, "patch_size": 16, "num_frames": 4, "intermediate_size": 32}
    config = transformers.VideoMAEConfig(**small, **size)
    net = transformers.VideoMAEForVideoClassification(config).eval()
    hooks, view = hooks_of(net), OwnView(32, 4, frames_first=True)
    logits, features = OwnClassifier(Tapped(net, layer, view, logits=""))(clips)
    assert hooks_of(net) == hooks
    with torch.no_grad():
        whole = net(as_input(clips, view).transpose(1, 2), output_hidden_states=True)
    torch.testing.assert_close(logits, whole.logits)
    torch.testing.assert_close(features, whole.hidden_states[-1].mean(1))


def test_clips_are_resampled_in_time():
    class Frames(nn.Conv3d):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    net = Frames(3, 2, 1)
    backbone = OwnBackbone(Tapped(net, "", OwnView(8, 3, **PLAIN)))
    backbone(torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 8, 8))
    assert net.seen[0, 0, :, 0, 0].tolist() == [0, 4, 8]


def test_frozen_networks_stay_in_eval_mode_and_keep_no_gradient(clips):
    net = r3d().train()
    frozen = OwnBackbone(Tapped(net, "layer4", SMALL))
    before = copy.deepcopy(net.state_dict())
    assert not frozen.train()(clips).requires_grad
    assert not any(module.training for module in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    learning = OwnBackbone(Tapped(net, "layer4", SMALL, frozen=False)).train()
    learning(clips).sum().backward()
    assert net.training and net.layer4[0].conv1[0].weight.grad.abs().sum() > 0
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert changed and all("running" in k or "num_batches" in k for k in changed)


def test_a_stamp_tells_how_a_network_is_read(videos):
    def net(classes=3):
        torch.manual_seed(0)
        pool = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten())
        parts = {"layer3": nn.Conv3d(3, 4, 1), "layer4": nn.Conv3d(4, 4, 1), "pool": pool}
        return nn.Sequential(OrderedDict(parts | {"fc": nn.Linear(4, classes)}))

    teachers = [
        Tapped(net(), "layer4", SMALL),
        Tapped(net(), "layer3", SMALL),
        Tapped(net(), "layer4", LARGE),
        Tapped(net(), "layer4", SMALL, channels=2),
        Tapped(net(), "layer4", OwnView(16, 4, **PLAIN)),
        Tapped(net(), "layer4", OwnView(16, 4, std=(0.2,) * 3)),
        Tapped(net(classes=4), "layer4", SMALL),
    ]
    stamps = [stamp_of([OwnBackbone(teacher)], videos, VIEW) for teacher in teachers]
    assert len(set(stamps)) == len(stamps)
    assert stamp_of([OwnBackbone(Tapped(net(), "layer4", SMALL))], videos, VIEW) == stamps[0]


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_what_cannot_be_read_is_named(swin, clips):
    near = r"features='features\.4\.blok': no such module in SwinTransformer3d; near: .*features\.4"
    with pytest.raises(UserError, match=near):
        Tapped(swin, "features.4.blok", LARGE)
    with pytest.raises(UserError, match=r"logits='hed': no such module .*near: head"):
        Tapped(swin, "avgpool", LARGE, logits="hed")
    idle = r3d()
    idle.fc.spare = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"features='fc\.spare': the network runs without"):
        OwnBackbone(Tapped(idle, "fc.spare", SMALL))
    wrong = {
        (None, "words"): "features='1': returns tuple, in which there is no tensor",
        torch.zeros(1, 2, 2, 8): r"features='1': wanted are .*, not \[1, 2, 2, 8\]",
    }
    for value, complaint in wrong.items():
        net = nn.Sequential(nn.Conv3d(3, 2, 1), Returns(value))
        with pytest.raises(UserError, match=complaint):
            OwnBackbone(Tapped(net, "1", SMALL))
    broken = OwnBackbone(Tapped(swin, "avgpool", LARGE))
    broken.trunk.net = nn.Sequential(swin, nn.Linear(1, 1))  # fails after the module that is read
    broken.trunk.paths = {"features": "0.avgpool"}
    with pytest.raises(RuntimeError):
        broken(clips)
    assert hooks_of(swin) == 0


def test_teachers_of_all_kinds_go_through_to_a_loss_with_a_gradient(swin, videos):
    """One with a new head, fitted with cross-fitting; one that has the classes; one of ours."""
    teachers = {
        "swin": OwnBackbone(Tapped(swin, "norm", LARGE, channels=-1)),
        "fitted": OwnClassifier(Tapped(swin, "features.2", LARGE, logits="", channels=-1)),
        "tiny": build_backbone("tiny4"),
    }
    before = copy.deepcopy(swin.state_dict())
    models, readouts = {}, {}
    for name, teacher in teachers.items():
        models[name], readouts[name] = fit_teacher(teacher, videos, TINY, VIEW, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in swin.state_dict().items())

    head, every = models["swin"], torch.arange(16)
    assert isinstance(head, Classifier) and head.fc.in_features == 768
    logits, features = predict(head, videos, every[:3], VIEW)
    torch.testing.assert_close(logits, (features @ head.fc.weight.T + head.fc.bias).detach())
    frozen = readouts["swin"]  # the copies of every fold have the same features
    # Other clips beside them move last digits, and half precision rounds.
    torch.testing.assert_close(
        frozen.at("features", every), frozen.at("held", every), atol=4e-3, rtol=4e-3
    )

    assert models["fitted"] is teachers["fitted"]
    whole = predict(teachers["fitted"], videos, every, VIEW)[0].mean(1)
    kept = readouts["fitted"].at("logits", every)  # in half precision
    torch.testing.assert_close(kept, whole, atol=1e-3, rtol=1e-2)

    bank, rows = gather(readouts, videos), torch.arange(8)
    logits_graph, representation_graph = build_graphs(
        bank, videos.training_rows, Distillation(), student_dim=5
    )
    student = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    uniform = torch.full((8, 3), 1 / 3)
    loss = logits_graph.loss(nn.Linear(5, 3)(student), bank.probs()[rows], uniform)
    features = bank.features_at(rows)
    loss = loss + representation_graph.loss(student, features, uniform, uniform[0])
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss > 0 and gradient.isfinite().all() and (gradient.abs().sum(1) > 0).all()


def test_a_head_over_other_classes_is_refused(videos):
    teacher = OwnClassifier(Tapped(r3d(classes=7), "layer4", SMALL, logits="fc"))
    with pytest.raises(UserError, match="over 7 classes, but the data has 3; read its features"):
        build_classifier(teacher, 3)
    with pytest.raises(UserError, match="7 classes, but the data has 3"):
        fit(teacher, videos, torch.arange(4), VIEW, TINY.fit, seed=0)
    features_only = build_classifier(OwnBackbone(teacher.trunk), 3)
    assert isinstance(features_only, Classifier) and features_only.fc.out_features == 3


# --- what networks of others do wrong, found before any training


class Odd(nn.Module):
    """A small network whose features, or logits, come out as ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.map, self.tokens, self.head = (
            how,
            nn.Linear(3, 6),
            nn.Identity(),
            nn.Identity(),
        )

    def forward(self, x):  # [b, 3, t, h, w]
        x = self.map(x.mean((3, 4)).transpose(1, 2))  # (b, t, d)
        folds = {
            "frames in the batch": lambda: x.flatten(0, 1),  # [b t, d]
            "patches in the batch": lambda: x.transpose(1, 2).reshape(-1, x.shape[1], 3),
            "tokens first": lambda: x.transpose(0, 1),  # [n, b, d]
            "two tokens first": lambda: x.transpose(0, 1)[:2],
            "beside each other": lambda: x - x.mean(0),
            "not finite": lambda: x / 0,
        }
        whole = self.tokens(folds[self.how]() if self.how in folds else x)
        logits = x.flatten(0, 1) if self.how == "logits of frames" else x.mean(1)
        if self.how == "raises":
            raise KeyError("pixel_values\nand more")
        return self.head(logits), whole


ODD = {
    "frames in the batch": r"features: wanted is one row for each of 2 clips, not \[8, 6\]",
    "patches in the batch": r"features: wanted is one row for each of 2 clips, not \[",
    "tokens first": r"features: wanted is one row for each of 2 clips, not \[4, 6\]",
    "two tokens first": r"features: wanted is one row for each of 1 clips, not \[2, 6\]",
    "beside each other": "a clip's features are others beside another clip than alone",
    "not finite": "returns numbers that are not finite",
    "logits of frames": r"logits: wanted is one row for each of 2 clips, not \[8, 6\]",
    "raises": "KeyError: 'pixel_values",
}


@pytest.mark.parametrize(("how", "complaint"), ODD.items(), ids=ODD)
def test_networks_that_mix_clips_or_fail_are_refused_by_name(monkeypatch, how, complaint):
    module = types.ModuleType("odd")
    module.net = lambda: Tapped(Odd(how), "tokens", SMALL, logits="head")
    monkeypatch.setitem(sys.modules, "odd", module)
    profile = replace(RUN, teachers=replace(RUN.teachers, tasks=("order", "odd:net")))
    with pytest.raises(UserError, match=f"--teachers.tasks: odd:net: {complaint}") as caught:
        check_profile(profile)
    assert "\n" not in str(caught.value)


def test_a_network_that_mixes_clips_only_later_is_caught_in_that_call(clips):
    net = Odd("plain")
    backbone = OwnBackbone(Tapped(net, "tokens", SMALL))
    net.how = "frames in the batch"
    with pytest.raises(UserError, match="one row for each of 2 clips"):
        backbone(clips)


def test_weights_that_cannot_be_fetched_are_told_by_the_teacher_s_name(monkeypatch):
    def unreachable():
        raise OSError("We couldn't connect to the hub to load the files.\nCheckout your internet")

    module = types.ModuleType("far")
    module.net = unreachable
    monkeypatch.setitem(sys.modules, "far", module)
    with pytest.raises(UserError, match=r"far:net: OSError: We couldn't connect .* files\.$"):
        find_source("far:net")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_precision_work(clips, videos, dtype):
    single = OwnBackbone(Tapped(r3d(), "layer4", SMALL))
    other = OwnBackbone(Tapped(r3d().to(dtype), "layer4", SMALL))
    features = other(clips)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, single(clips), atol=0.03, rtol=0.05)
    model = build_classifier(other, 3).train()  # as in a fit: the head learns in full precision
    model(clips)[0].square().sum().backward()
    assert model.fc.weight.grad.dtype == torch.float32 and model.fc.weight.grad.abs().sum() > 0


def test_a_network_without_parameters_is_a_teacher(videos):
    net = nn.AvgPool3d((1, 8, 8))
    _, readout = fit_teacher(OwnBackbone(Tapped(net, "", SMALL)), videos, TINY, VIEW, seed=0)
    assert readout.at("features", torch.arange(16)).shape == (16, 3)


@pytest.mark.parametrize("kind", ["VideoMAE", "VJEPA2"])
def test_half_precision_checkpoints_are_read_as_they_are_saved(tmp_path, clips, kind):
    """transformers keeps a checkpoint's own precision."""
    transformers = pytest.importorskip("transformers", reason="needs gdviz[hub]")
    size = {"image_size": 32, "patch_size": 16, "num_frames": 4, "num_labels": 3}
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "VJEPA2":
        small |= {"crop_size": 32, "frames_per_clip": 4, "mlp_ratio": 1, "pred_hidden_size": 24}
        small |= {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    config = getattr(transformers, f"{kind}Config")(**size, **small, intermediate_size=32)
    model = getattr(transformers, f"{kind}Model")
    torch.manual_seed(0)
    model(config).to(torch.bfloat16).save_pretrained(tmp_path)
    net = model.from_pretrained(tmp_path)
    assert next(net.parameters()).dtype == torch.bfloat16
    layer = "encoder.layer.1"
    view = OwnView(32, 4, frames_first=True)
    half = OwnBackbone(Tapped(net, layer, view))(clips)
    whole = OwnBackbone(Tapped(model.from_pretrained(tmp_path).float(), layer, view))(clips)
    assert half.shape == (2, 24)
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0.05)


class HalfATask(nn.Module):
    metric = "accuracy"

    def views(self, videos, rng):
        return videos, videos


class Flat(nn.Module):
    """A teacher written by hand."""

    view, fitted = OwnView(4, 2, **PLAIN, frames_first=True), True

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(2 * 3 * 4 * 4, 5)

    def forward(self, clips):
        features = self.map(clips.flatten(1))
        return features[:, :3], features


@pytest.fixture
def mine(monkeypatch):
    """A module of the user's."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    vars(module).update(
        Task=FrameOrder,
        Half=HalfATask,
        Flat=Flat,
        tapped=lambda: Tapped(nn.Sequential(nn.Conv3d(3, 2, 1)), "0", SMALL),
        number=5,
        words=lambda: "words",
        net=lambda: nn.Linear(2, 2),
        needs=lambda size: Flat(),
    )


@pytest.mark.usefixtures("mine")
def test_sources_are_found_by_name():
    assert find_source("order") is find_source("mine:Task") is FrameOrder
    state = torch.get_rng_state()
    first, again = (find_source("mine:tapped") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(first) is OwnBackbone and not first.fitted
    assert torch.equal(first.trunk.net[0].weight, again.trunk.net[0].weight)
    flat = find_source("mine:Flat")
    assert type(flat) is OwnClassifier and (flat.dim, flat.classes) == (5, 3)
    clips = torch.randn(2, 3, 2, 4, 4)
    expected = flat.trunk.map(clips.transpose(1, 2).flatten(1))
    torch.testing.assert_close(flat(clips)[1], expected)
    torch.testing.assert_close(OwnBackbone(flat.trunk)(clips), expected)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "complaint"),
    {
        "jigsaw": "unknown task 'jigsaw'",
        "mine:gone": "mine has no 'gone'",
        "mine:Half": "mine:Half: a pretext task needs chance, too",
        "mine:number": "mine:number: .* is not a callable object; name a pretext task's class",
        "mine:words": "mine:words: returned str; name a pretext task's class, or a function",
        "mine:net": "mine:net: returned Linear; ",
        "mine:needs": "mine:needs: missing a required argument: 'size'",
    }.items(),
)
def test_what_is_no_source_is_named(name, complaint):
    with pytest.raises(UserError, match=complaint):
        find_source(name)


def test_a_network_of_buffers_alone_is_where_they_are():
    net = nn.BatchNorm3d(3, affine=False)
    assert device_of(OwnBackbone(Tapped(net, "", SMALL)).to("meta")).type == "meta"
