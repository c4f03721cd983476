"""The training loop: goes on from a checkpoint to the bit, follows its schedule, stops at nonsense; and files are whole."""

import itertools
import math
import os
import pickle
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from torch import Generator, nn

from gdviz.config import Schedule, Teachers, View
from gdviz.core import files as artefacts
from gdviz.core import loop as training
from gdviz.core.files import (
    UserError,
    load_checkpoint,
    load_json,
    load_tensors,
    save_checkpoint,
    save_json,
    save_tensors,
)
from gdviz.core.loop import learning_rate, train
from gdviz.core.processes import Stopped
from gdviz.data.clips import clips_of
from gdviz.student.distill import _Balance
from gdviz.teachers.backbones import Classifier, build_backbone
from gdviz.teachers.fit import calibration_temperature, folds_of
from gdviz.teachers.fit import fit as teachers
from gdviz.teachers.readout import predict

PLAN = Schedule(epochs=6, batch=8, lr=1e-2)


class Interrupted(Exception):
    """As if the process had been killed."""


def problem() -> tuple[nn.Module, training.Step]:
    """Batch norm (buffers), dropout (global generator) and noise (the step's generator): all that a checkpoint must cover."""
    torch.manual_seed(3)
    x = torch.randn(40, 5)
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def step(rows, rng):
        noise = torch.randn(len(rows), 5, generator=rng)
        loss = (module(x[rows] + 0.1 * noise) - x[rows].sum(1, keepdim=True)).square().mean()
        return loss, {"rows": rows.float().mean(), "first": float(rows[0])}

    return module, step


EVERYTHING = replace(PLAN, clip=0.5, ema=0.9, accumulate=2, precision="bf16", warmup=0.3)


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_resuming_is_exact(tmp_path, monkeypatch, at, plan):
    monkeypatch.setattr(training, "SAVE_EVERY_S", -1.0)
    module, step = problem()
    expected = train(module, step, torch.arange(40), plan, seed=5)

    def stop(epoch):
        if epoch == at:
            raise Interrupted
        return {"extra": epoch}

    other, step = problem()
    with pytest.raises(Interrupted):
        train(
            other,
            step,
            torch.arange(40),
            plan,
            seed=5,
            checkpoint=tmp_path / "x.ckpt",
            on_epoch=stop,
        )
    resumed, step = problem()
    torch.manual_seed(999)  # another process has another generator
    began = []
    history = train(
        resumed,
        step,
        torch.arange(40),
        plan,
        seed=5,
        checkpoint=tmp_path / "x.ckpt",
        on_epoch=lambda e: began.append(e) or {},
    )
    assert began == list(range(at, 6))
    assert [{k: v for k, v in row.items() if k != "extra"} for row in history] == expected
    for key, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not resumed.training


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_after_the_step_and_goes_on_exactly(tmp_path, signum):
    module, step = problem()
    expected = train(module, step, torch.arange(40), EVERYTHING, seed=5)

    def asked(step, calls, at, rows, rng):
        calls.append(at)
        if len(calls) == at:
            os.kill(os.getpid(), signum)
        return step(rows, rng)

    for at in (
        7,
        19,
        60,
    ):  # in the middle of a step of two parts, in the last one of an epoch, at the very end
        calls, before = [], signal.getsignal(signum)
        other, step = problem()
        with pytest.raises(Stopped) as stopped:
            train(
                other,
                partial(asked, step, calls, at),
                torch.arange(40),
                EVERYTHING,
                seed=5,
                checkpoint=tmp_path / f"{at}.ckpt",
            )
        assert stopped.value.signum == signum and signal.getsignal(signum) is before
        assert len(calls) == at + at % 2
        torch.manual_seed(999)
        resumed, step = problem()
        assert (
            train(
                resumed,
                step,
                torch.arange(40),
                EVERYTHING,
                seed=5,
                checkpoint=tmp_path / f"{at}.ckpt",
            )
            == expected
        )
        assert all(
            torch.equal(value, resumed.state_dict()[key])
            for key, value in module.state_dict().items()
        )


def linear() -> tuple[nn.Module, training.Step]:
    torch.manual_seed(0)
    x, module = torch.randn(40, 5), nn.Linear(5, 1)
    return module, lambda rows, rng: (
        (module(x[rows]) - 9 * x[rows].sum(1, keepdim=True)).square().mean(),
        {},
    )


def test_parts_of_a_batch_add_up_to_it():
    found = {}
    for count in (1, 3, 4):  # parts of 8, of 3, 3 and 2, of 2
        module, step = linear()
        history = train(module, step, torch.arange(40), replace(PLAN, accumulate=count), seed=0)
        found[count] = module.weight, torch.tensor([row["loss"] for row in history])
    torch.testing.assert_close(found[3][0], found[1][0])
    torch.testing.assert_close(found[4], found[1])


def test_gradients_are_clipped(monkeypatch):
    norms, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *_: norms.append(norm(self)) or real(self)
    )

    def norm(optimiser):
        return float(
            torch.cat(
                [p.grad.flatten() for group in optimiser.param_groups for p in group["params"]]
            ).norm()
        )

    for clip in (0.0, 0.5):
        train(*linear(), torch.arange(40), replace(PLAN, clip=clip), seed=0)
    assert min(norms[:30]) > 1 and max(norms[30:]) == pytest.approx(0.5, rel=1e-4)


def test_the_result_is_the_moving_average_of_the_weights():
    seen = []
    module, step = linear()
    train(
        module,
        lambda rows, rng: seen.append(module.weight.detach().clone()) or step(rows, rng),
        torch.arange(40),
        PLAN,
        seed=0,
    )
    seen.append(module.weight.detach().clone())
    average = seen[1]
    for weight in seen[2:]:
        average = 0.9 * average + 0.1 * weight
    module, step = linear()
    train(module, step, torch.arange(40), replace(PLAN, ema=0.9), seed=0)
    torch.testing.assert_close(module.weight.detach(), average)
    assert not torch.allclose(average, seen[-1], rtol=1e-3)


def test_lower_precision_and_compiled_backbones(monkeypatch):
    kinds, compiled = [], []
    monkeypatch.setattr(nn.Sequential, "compile", lambda self: compiled.append(self))
    torch.manual_seed(0)
    module, clips = build_backbone("tiny4"), torch.randn(2, 3, 2, 8, 8)
    module.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    train(
        module,
        lambda rows, rng: (module(clips).mean(), {}),
        torch.arange(8),
        replace(PLAN, epochs=1, precision="bf16", compile=True),
        seed=0,
    )
    assert set(kinds) == {torch.bfloat16} and compiled == [module.trunk]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="fp16: needs a GPU"):
        train(*linear(), torch.arange(40), replace(PLAN, precision="fp16"), seed=0)


def test_tensorboard_shows_the_history(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = train(*linear(), torch.arange(40), PLAN, seed=0, board=tmp_path)
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["epoch"], pytest.approx(row["loss"])) for row in history
    ]
    assert all(e.value > 0 for e in events.Scalars("clips a second"))


def batches_of(rows, schedule):
    """The rows of every step of a training."""
    seen, weight = [], nn.Linear(1, 1)
    train(
        weight,
        lambda picked, rng: seen.append(picked) or (weight.weight.sum(), {}),
        rows,
        schedule,
        seed=0,
    )
    return seen


def test_batches_cover_the_rows_once_an_epoch():
    seen = batches_of(torch.arange(100, 140), Schedule(epochs=2, batch=8))
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(100, 140))
    assert not torch.equal(first, second)
    assert [
        len(rows) for rows in batches_of(torch.arange(5), Schedule(epochs=1, batch=8, min_steps=1))
    ] == [5]


def test_a_small_set_is_seen_again_within_an_epoch():
    """37 clips in batches of 32 would be one step an epoch: students of a small data set stayed at chance."""
    seen = batches_of(torch.arange(37), Schedule(epochs=1, batch=32, min_steps=20))
    assert [len(rows) for rows in seen] == [32] * 20
    count = torch.cat(seen).bincount()
    assert count.min() >= 17 and count.max() <= 18


def test_learning_rate_warms_up_and_decays(monkeypatch):
    rates = [learning_rate(PLAN, i / 1000) for i in range(1000)]
    peak = max(range(1000), key=rates.__getitem__)
    assert 90 <= peak <= 110
    assert PLAN.lr * 0.95 < rates[peak] <= PLAN.lr
    assert rates[0] < 0.02 * PLAN.lr
    assert rates[-1] < 1e-4 * PLAN.lr
    assert rates[550] == pytest.approx(PLAN.lr * 0.5 * (1 + math.cos(math.pi * 0.55)))
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in zip(rates[peak:-1], rates[peak + 1 :], strict=True))
    used, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *_: used.append(self.param_groups[0]["lr"]) or real(self),
    )
    module, step = problem()
    train(module, step, torch.arange(40), PLAN, seed=0)
    assert used == [learning_rate(PLAN, i / 30) for i in range(30)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, bad):
    module, step = problem()

    def broken(rows, rng):
        loss, logged = step(rows, rng)
        return loss * (bad if len(calls) > 7 else 1), logged | {"n": float(calls.append(0) or 0)}

    calls: list[int] = []
    with pytest.raises(FloatingPointError, match="in epoch 1"):
        train(module, broken, torch.arange(40), PLAN, seed=0, checkpoint=tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    module, step = problem()
    file = tmp_path / "pretrain.ckpt"
    save_checkpoint(file, {"module": module.state_dict()})
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"pretrain\.ckpt is damaged.*delete it"):
        train(module, step, torch.arange(40), PLAN, seed=0, checkpoint=file)


@pytest.mark.parametrize("at", [3, 40, -3])
def test_one_wrong_byte_in_a_checkpoint_is_seen(tmp_path, at):
    save_checkpoint(tmp_path / "x.ckpt", {"x": torch.zeros(100)})
    content = bytearray((tmp_path / "x.ckpt").read_bytes())
    content[at] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Harm()))
    save_checkpoint(tmp_path / "disguised.ckpt", {"x": Harm()})
    for name in ("plain", "disguised"):
        with pytest.raises(
            UserError, match=rf"{name}\.ckpt is damaged, or no checkpoint.*delete it"
        ):
            load_checkpoint(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "harm").exists()


# --- files


WRITERS = {
    "tensors": (
        lambda p, n: save_tensors(p, {"x": torch.full((n,), 1.0)}),
        lambda p: load_tensors(p)["x"].numel(),
    ),
    "checkpoint": (
        lambda p, n: save_checkpoint(p, {"x": torch.full((n,), 1.0)}),
        lambda p: load_checkpoint(p)["x"].numel(),
    ),
    "json": (lambda p, n: save_json(p, {"x": [1] * n}), lambda p: len(load_json(p)["x"])),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, kind):
    """A real failure of the operating system's write, by a limit on file size."""
    resource = pytest.importorskip("resource", reason="needs a limit on file size")
    write, read = WRITERS[kind]
    write(tmp_path / "file", 10)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UserError, match=r"cannot write .*file: .*choose another folder"):
            write(tmp_path / "file", 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert read(tmp_path / "file") == 10


def test_safetensors_errors_and_bad_folders_are_user_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_json(tmp_path / "file" / "below.json", {})

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(artefacts, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_tensors(tmp_path / "x.safetensors", {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [b"", b"\xff\x00garbage", None, "folder"])
@pytest.mark.parametrize("load", [load_json, load_tensors, load_checkpoint])
def test_unreadable_artefacts_are_named(tmp_path, load, content):
    file = tmp_path / "artefact"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="artefact") as caught:
        load(file)
    assert "\n" not in str(caught.value)


# --- fitting teachers


def test_folds_balance_classes_and_keep_groups_together():
    labels = torch.arange(36) % 3
    fold = folds_of(labels, [str(i) for i in range(36)], 3, seed=0)
    assert all(labels[fold == f].bincount().tolist() == [4, 4, 4] for f in range(3))
    groups = [str(i // 4) for i in range(36)]
    fold = folds_of(labels, groups, 3, seed=0)
    assert fold.unique().tolist() == [0, 1, 2]
    assert all(len(fold[i : i + 4].unique()) == 1 for i in range(0, 36, 4))
    with pytest.raises(ValueError, match="cross-fitting needs two"):
        folds_of(torch.tensor([0, 0, 1]), ["a", "b", "c"], 3, seed=0)


def test_calibration_undoes_overconfidence():
    rng = Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=rng)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert float(calibration_temperature(3 * logits, labels)) == pytest.approx(3, rel=0.1)
    assert float(calibration_temperature(logits / 2, labels)) == pytest.approx(0.5, rel=0.1)


class _Videos:
    """Four videos of noise, in memory."""

    frames = torch.randint(
        256, (4, 6, 8, 8, 3), dtype=torch.uint8, generator=Generator().manual_seed(0)
    )

    def batch(self, rows):
        return self.frames[rows]


def test_read_out_is_the_mean_over_clips_of_a_video():
    torch.manual_seed(0)
    model, rows = Classifier(build_backbone("tiny4"), 2).eval(), torch.arange(4)
    logits, _ = predict(model, _Videos(), rows, View(length=2, stride=1, clips=3))
    with torch.no_grad():
        at = [model(clips_of(_Videos.frames, 2, 1, place=place))[0] for place in (0.0, 0.5, 1.0)]
    assert not torch.allclose(at[0], at[2])
    torch.testing.assert_close(logits, torch.stack(at).mean(0))


def test_balance_gives_a_loss_its_share_of_the_gradient():
    features = torch.tensor([1.0, 2.0], requires_grad=True)
    balance = _Balance({"kd": 0.5})
    ce, kd = (3 * features).sum(), (features**2).sum()
    total = balance(ce, {"kd": kd}, features)
    (share,) = torch.autograd.grad(total - ce, features)
    assert share.norm().item() == pytest.approx(0.5 * 3 * 2**0.5)


def test_no_labelled_clip_is_judged_by_a_teacher_that_saw_its_label(monkeypatch):
    class Videos:
        fingerprint = "none"
        splits, groups = ("train",) * 9 + ("test",) * 3, tuple("abcdefghijkl")
        labels = torch.arange(12) % 3

        def rows(self, split):
            return torch.tensor([i for i, s in enumerate(self.splits) if s == split])

    def knows(fitted_on, videos, rows, view, each):
        seen = torch.isin(rows, fitted_on).float()[:, None, None]
        return seen.expand(-1, 2, 3).clone(), seen

    monkeypatch.setattr(
        teachers, "fit", lambda backbone, videos, rows, view, schedule, *, seed, checkpoint: rows
    )
    monkeypatch.setattr(teachers, "stamp_of", lambda *_: "")
    monkeypatch.setattr(teachers, "predict", knows)
    model, outputs = teachers.outputs_of(None, Videos(), Teachers(folds=3), View(), seed=0)
    assert model.tolist() == list(range(9))  # the teacher itself is fitted on all
    assert outputs.features[:9].all() and not outputs.features[9:].any()
    assert not outputs.logits.any() and not outputs.held_features.any()
    assert outputs.fold[9:].eq(-1).all() and sorted(outputs.fold[:9].tolist()) == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
    ]


def test_a_standardising_network_does_not_see_light_and_contrast():
    torch.manual_seed(0)
    clips = torch.randn(2, 3, 4, 8, 8)
    for name, blind in (("tiny4n", True), ("tiny4", False)):
        backbone = build_backbone(name).eval()
        relit = 3 * clips + torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1, 1)
        assert torch.allclose(backbone(clips), backbone(relit), atol=1e-4) == blind
