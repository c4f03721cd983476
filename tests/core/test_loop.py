"""The training loop: resumes to the bit, follows its schedule, stops at nonsense."""

import itertools
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from gdviz.config import Schedule
from gdviz.core import loop
from gdviz.core.files import UserError, save_checkpoint
from gdviz.core.loop import Bookkeeping, learning_rate, train
from gdviz.core.processes import Stopped

PLAN = Schedule(epochs=6, batch=8, lr=1e-2)
EVERYTHING = replace(PLAN, clip=0.5, ema=0.9, accumulate=2, precision="bf16", warmup=0.3)
ROWS = torch.arange(40)


class Interrupted(Exception):
    """As if the process had been killed."""


def problem() -> tuple[nn.Module, loop.Step]:
    """All that a checkpoint must cover: batch norm's buffers, dropout, noise of the step's own."""
    torch.manual_seed(3)
    x = torch.randn(40, 5)
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def step(rows, rng, epoch):
        noise = torch.randn(len(rows), 5, generator=rng)
        loss = (module(x[rows] + 0.1 * noise) - x[rows].sum(1, keepdim=True)).square().mean()
        return loss, {"rows": rows.float().mean(), "first": float(rows[0]), "moment": epoch}

    return module, step


def linear() -> tuple[nn.Module, loop.Step]:
    torch.manual_seed(0)
    x, module = torch.randn(40, 5), nn.Linear(5, 1)

    def step(rows, rng, epoch):
        return (module(x[rows]) - 9 * x[rows].sum(1, keepdim=True)).square().mean(), {}

    return module, step


def after(calls: int, step: loop.Step, act) -> loop.Step:
    """Act once, before the given call of a step."""
    count = itertools.count(1)

    def interrupted(rows, rng, epoch):
        if next(count) == calls:
            act()
        return step(rows, rng, epoch)

    return interrupted


def interrupt() -> None:
    raise Interrupted


def test_who_watches_sees_every_epoch_and_changes_nothing():
    module, step = problem()
    seen = []

    def watch(watched):
        watched.eval()
        torch.rand(7)
        seen.append((watched is module, watched[0].weight.detach().clone()))

    watched = train(module, step, ROWS, PLAN, seed=0, keep=Bookkeeping(watch=watch))
    assert len(seen) == PLAN.epochs and all(same for same, _ in seen)
    assert torch.equal(seen[-1][1], module[0].weight) and not torch.equal(seen[0][1], seen[1][1])
    assert watched == train(*problem(), ROWS, PLAN, seed=0)


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING], ids=["plain", "everything"])
def test_resuming_is_exact(tmp_path, monkeypatch, plan):
    """Between epochs, within one, and again and again."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)
    module, step = problem()
    expected = train(module, step, ROWS, plan, seed=5)
    assert [row["moment"] for row in expected] == list(range(6))
    keep = Bookkeeping(tmp_path / "x.ckpt")
    for calls in (6, 14, 4):
        other, step = problem()
        torch.manual_seed(999)  # another process has another generator
        with pytest.raises(Interrupted):
            train(other, after(calls, step, interrupt), ROWS, plan, seed=5, keep=keep)
    resumed, step = problem()
    assert train(resumed, step, ROWS, plan, seed=5, keep=keep) == expected
    for key, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not resumed.training
    untouched, _ = problem()
    assert train(untouched, interrupt, ROWS, plan, seed=5, keep=keep) == expected  # it had ended


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_after_the_step_and_goes_on_exactly(tmp_path, signum, request):
    # A shell's background job ignores Ctrl-C, and a training then leaves it ignored.
    given = signal.signal(signum, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signum, given))
    module, step = problem()
    expected, before = train(module, step, ROWS, EVERYTHING, seed=5), signal.getsignal(signum)
    # In the middle of a step of two parts, in the last step of an epoch, in the very last one.
    for calls in (7, 19, 60):
        keep, seen = Bookkeeping(tmp_path / f"{calls}.ckpt"), []
        other, step = problem()
        asked = after(calls, step, lambda: os.kill(os.getpid(), signum))

        def counted(*how, step=asked, seen=seen):
            seen.append(how)
            return step(*how)

        with pytest.raises(Stopped) as stopped:
            train(other, counted, ROWS, EVERYTHING, seed=5, keep=keep)
        assert stopped.value.signum == signum and signal.getsignal(signum) is before
        assert len(seen) == calls + calls % 2
        resumed, step = problem()
        assert train(resumed, step, ROWS, EVERYTHING, seed=5, keep=keep) == expected
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    """A clock that steps of a second and saves of two seconds move."""
    clock, saves = [0.0], []

    def save(path, state):
        saves.append(clock[0])
        clock[0] += 2

    monkeypatch.setattr(loop, "monotonic", lambda: clock[0])
    monkeypatch.setattr(loop, "save_checkpoint", save)
    module, step = linear()

    def timed(*how):
        clock[0] += 1
        return step(*how)

    plan = replace(PLAN, epochs=40)
    train(module, timed, ROWS, plan, seed=0, keep=Bookkeeping(tmp_path / "x.ckpt"))
    gaps = [b - a for a, b in itertools.pairwise(saves[:-1])]
    assert len(gaps) >= 3 and min(gaps) >= 40
    assert saves[-1] == 200 + 2 * (len(saves) - 1)


def test_parts_of_a_batch_add_up_to_it():
    found = {}
    for count in (1, 3, 4):  # parts of 8, of 3, 3 and 2, of 2
        module, step = linear()
        history = train(module, step, ROWS, replace(PLAN, accumulate=count), seed=0)
        found[count] = module.weight, torch.tensor([row["loss"] for row in history])
    torch.testing.assert_close(found[3][0], found[1][0])
    torch.testing.assert_close(found[4], found[1])


def test_gradients_are_clipped(monkeypatch):
    norms, real = [], torch.optim.AdamW.step

    def step(self, *_):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(grads).norm()))
        return real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for clip in (0.0, 0.5):
        train(*linear(), ROWS, replace(PLAN, clip=clip), seed=0)
    assert min(norms[:30]) > 1 and max(norms[30:]) == pytest.approx(0.5, rel=1e-4)


def test_the_result_is_the_moving_average_of_weights_and_buffers():
    def state(module):
        return torch.cat([x.detach().flatten() for x in (module[0].running_mean, module[1].weight)])

    def averaged(ema):
        torch.manual_seed(0)
        x, seen = torch.randn(40, 5) + 3, []
        module = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1))

        def step(rows, rng, epoch):
            seen.append(state(module))
            return (module(x[rows]) - x[rows].sum(1, keepdim=True)).square().mean(), {}

        train(module, step, ROWS, replace(PLAN, ema=ema), seed=0)
        return state(module), [*seen[1:], state(module)]

    last, (average, *others) = averaged(0)
    for other in others:
        average = 0.9 * average + 0.1 * other
    torch.testing.assert_close(averaged(0.9)[0], average)
    assert not torch.allclose(average, last, rtol=1e-3)


def test_lower_precision_and_compiled_parts(monkeypatch):
    kinds, compiled = [], []
    monkeypatch.setattr(nn.Sequential, "compile", lambda self: compiled.append(self))
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU())
    module, clips = nn.ModuleDict({"trunk": trunk}), torch.randn(2, 3, 4, 8, 8)

    def step(rows, rng, epoch):
        maps = trunk(clips)
        kinds.append(maps.dtype)
        return maps.mean(), {}

    plan = replace(PLAN, epochs=1, precision="bf16")
    train(module, step, torch.arange(8), plan, seed=0, compiled=[trunk])
    assert compiled == []
    plan = replace(plan, compile=True)
    train(module, step, torch.arange(8), plan, seed=0, compiled=[trunk])
    assert compiled == [trunk] and set(kinds) == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="fp16: needs an NVIDIA or AMD GPU"):
        train(*linear(), ROWS, replace(PLAN, precision="fp16"), seed=0)


def test_tensorboard_shows_the_history(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = train(*linear(), ROWS, PLAN, seed=0, keep=Bookkeeping(board=tmp_path))
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["epoch"], pytest.approx(row["loss"])) for row in history
    ]


def batches_of(rows: torch.Tensor, plan: Schedule, seed: int = 0) -> list[torch.Tensor]:
    """Return the rows of every step of a training."""
    seen, module = [], nn.Linear(1, 1)

    def step(picked, rng, epoch):
        seen.append(picked)
        return module.weight.sum(), {}

    train(module, step, rows, plan, seed=seed)
    return seen


def test_batches_cover_the_rows_once_an_epoch():
    seen = batches_of(torch.arange(100, 140), Schedule(epochs=2, batch=8))
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(100, 140))
    assert not torch.equal(first, second)
    other = batches_of(torch.arange(100, 140), Schedule(epochs=2, batch=8), seed=1)
    assert not torch.equal(torch.cat(other[:5]), first)
    few = batches_of(torch.arange(5), Schedule(epochs=1, batch=8, min_steps=1))
    assert [len(rows) for rows in few] == [5]


def test_a_small_set_is_seen_again_within_an_epoch():
    """37 clips in batches of 32 would be one step an epoch: students would stay at chance."""
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
    assert all(a > b for a, b in itertools.pairwise(rates[peak:]))
    used, real = [], torch.optim.AdamW.step

    def step(self, *_):
        used.append(self.param_groups[0]["lr"])
        return real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(*problem(), ROWS, PLAN, seed=0)
    assert used == [learning_rate(PLAN, i / 30) for i in range(30)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, bad):
    module, step = problem()

    def broken(rows, rng, epoch):
        loss, logged = step(rows, rng, epoch)
        return loss * (bad if epoch == 1 else 1), logged

    keep = Bookkeeping(tmp_path / "x.ckpt")
    with pytest.raises(FloatingPointError, match="in epoch 1"):
        train(module, broken, ROWS, PLAN, seed=0, keep=keep)
    assert not (tmp_path / "x.ckpt").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    module, step = problem()
    file = tmp_path / "pretrain.ckpt"
    save_checkpoint(file, {"module": module.state_dict()})
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"pretrain\.ckpt is damaged.*delete it"):
        train(module, step, ROWS, PLAN, seed=0, keep=Bookkeeping(file))
