"""What teachers say of every clip is read out once, and what is kept is what they say."""

from dataclasses import replace

import pytest
import torch
from conftest import memory_set
from torch import Generator, nn

from gdviz.config import View
from gdviz.core.files import UserError, load_json, save_json
from gdviz.data.clips import clip_places, pick_frames, to_float
from gdviz.teachers import bank as banks
from gdviz.teachers.bank import (
    Bank,
    Readout,
    calibration_temperature,
    gather,
    open_readout,
    predict,
    read_out,
    stamp_of,
)

VIEW = View(size=8, frames=12, length=4, stride=2, clips=3)
EVERY = torch.arange(10)


class Net(nn.Module):
    def __init__(self, gain: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(8, 3)
        self.fc.weight.data *= gain

    def forward(self, clips):
        features = clips.mean((1, 2, 3))
        return self.fc(features), features


@pytest.fixture
def videos():
    rng = Generator().manual_seed(0)
    pixels = torch.randint(256, (10, 12, 8, 8, 3), dtype=torch.uint8, generator=rng).numpy()
    splits = ["train"] * 6 + ["unlabelled"] * 2 + ["test"] * 2
    return memory_set(pixels, [i % 3 for i in range(10)], splits)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(banks, "PART", 4)


@pytest.fixture
def fold():
    return torch.tensor([0, 1, 0, 1, 0, 1, -1, -1, -1, -1])


def test_what_was_kept_is_what_the_live_teacher_says_of_the_same_clip(videos, tmp_path):
    model, nobody = Net(), torch.full((10,), -1)
    read_out([model], nobody, videos, VIEW, tmp_path)
    kept = open_readout(tmp_path, videos, VIEW)
    rows, clips = torch.tensor([9, 0, 4, 4, 7]), torch.tensor([0, 2, 1, 2, 0])
    place = torch.tensor(clip_places(3))[clips]
    seen = pick_frames(videos.batch(rows), VIEW.length, VIEW.stride, place=place)
    seen = to_float(seen).transpose(1, 2)
    for name, live in zip(("logits", "features"), model(seen), strict=True):
        torch.testing.assert_close(kept.at(name, rows, clips), live, rtol=1e-3, atol=1e-4)
    mean = torch.stack([kept.at("logits", rows, torch.full((5,), c)) for c in range(3)]).mean(0)
    torch.testing.assert_close(kept.at("logits", rows), mean)


def test_labelled_videos_are_judged_by_the_copy_that_has_not_seen_them(videos, fold, tmp_path):
    models = [Net(seed=i) for i in range(3)]  # the teacher, and one without each fold
    kept = read_out(models, fold, videos, VIEW, tmp_path)
    each = [predict(model, videos, EVERY, VIEW)[0].mean(1) for model in models]
    expected = torch.stack([each[1 + f if f >= 0 else 0][i] for i, f in enumerate(fold.tolist())])
    torch.testing.assert_close(kept.at("logits", EVERY), expected, rtol=1e-2, atol=2e-3)
    assert kept.fold.tolist() == fold.tolist()


def test_features_out_of_fold_are_those_of_the_copy(videos, fold):
    class Marked(Net):
        def forward(self, clips):
            logits, features = super().forward(clips)
            return logits, features * 0 + self.mark

    models = []
    for mark in (5.0, 0.0, 1.0):
        models.append(Marked())
        models[-1].mark = mark
    bank = gather({"t": read_out(models, fold, videos, VIEW)}, videos)
    assert (bank.features_at(EVERY)[0] == 5).all()
    held = bank.features_at(torch.tensor([3, 8, 0, 5]), held=True)[0]
    assert held[:, 0].tolist() == [1, 5, 0, 1]


def test_reading_out_goes_on_where_it_stood_and_other_networks_start_anew(
    videos, tmp_path, monkeypatch
):
    model, asked, real, nobody = Net(), [], predict, torch.full((10,), -1)

    def dies(model, videos, rows, view):
        asked.append(rows.tolist())
        if rows[0] == 8 and len(asked) < 5:
            raise KeyboardInterrupt
        return real(model, videos, rows, view)

    monkeypatch.setattr(banks, "predict", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            read_out([model], nobody, videos, VIEW, tmp_path)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [8, 9]]
    with pytest.raises(UserError, match=r"index\.json"):  # not before it is whole
        open_readout(tmp_path, videos, VIEW)
    whole = read_out([model], nobody, videos, VIEW, tmp_path).at("logits", EVERY)
    assert torch.equal(whole, read_out([model], nobody, videos, VIEW).at("logits", EVERY))
    other, slower = Net(seed=1), replace(VIEW, stride=1)
    stamp = stamp_of([model], videos, VIEW)
    assert stamp not in (stamp_of([other], videos, VIEW), stamp_of([model], videos, slower))
    read_out([other], nobody, videos, VIEW, tmp_path)
    assert not torch.equal(open_readout(tmp_path, videos, VIEW).at("logits", EVERY), whole)


def test_other_sets_views_and_numbers_are_refused(videos, tmp_path):
    nobody = torch.full((10,), -1)
    read_out([Net()], nobody, videos, VIEW, tmp_path)
    for other, view, what in (
        (replace(videos, fingerprint="other"), VIEW, "videos"),
        (videos, replace(VIEW, stride=1, clips=2), "stride, clips"),
    ):
        with pytest.raises(UserError, match=rf"of another set \({what} differ\); delete it"):
            open_readout(tmp_path, other, view)
    save_json(tmp_path / "index.json", load_json(tmp_path / "index.json") | {"stamp": "other"})
    with pytest.raises(UserError, match=r"00000\.safetensors.* of another teacher; delete it"):
        open_readout(tmp_path, videos, VIEW)
    part = tmp_path / "00000.safetensors"
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"00000\.safetensors is damaged"):
        open_readout(tmp_path, videos, VIEW)
    with pytest.raises(ValueError, match=r"logits of a teacher are not finite, or larger"):
        read_out([Net(1e6)], nobody, videos, VIEW)


def test_logits_of_a_bank_are_calibrated_and_the_control_is_dealt_alike(videos, monkeypatch):
    monkeypatch.setattr(banks, "PART", 4096)
    z, h = torch.randn(10, 3), torch.randn(10, 5)
    fold = torch.tensor([0, 1, 0, 1, 0, 1, -1, -1, -1, -1])
    readout = Readout.from_means(z, h, fold, temperature=2.0)
    bank = gather({"a": readout, "b": readout}, videos)
    torch.testing.assert_close(bank.logits[:, 1], z / 2)
    assert bank.labels.tolist() == [0, 1, 2, 0, 1, 2, -1, -1, -1, -1]  # no other label is told
    rows = videos.training_rows
    shuffled = bank.shuffled(rows, 0)
    assert sorted(shuffled.dealt[rows].tolist()) == rows.tolist()
    assert shuffled.dealt[8:].tolist() == [8, 9]
    for clips in (None, torch.zeros(8, dtype=torch.long)):
        own = bank.logits_at(shuffled.dealt[rows], clips)
        assert torch.equal(shuffled.logits_at(rows, clips), own)
        assert not torch.equal(own, bank.logits_at(rows, clips))
        told = bank.features_at(shuffled.dealt[rows], clips)[0]
        assert torch.equal(shuffled.features_at(rows, clips)[0], told)


def test_folds_of_a_bank_are_those_of_teachers_without_a_home_of_their_own(
    videos, fold, monkeypatch
):
    monkeypatch.setattr(banks, "PART", 4096)
    z, h = torch.randn(10, 3), torch.randn(10, 5)
    at_home = Readout.from_means(z, h, fold.clamp(max=0))
    dealt = Readout.from_means(z, h, fold)
    for order in ({"a@plain": at_home, "b": dealt}, {"b": dealt, "a@plain": at_home}):
        assert torch.equal(gather(order, videos).fold, fold)


def test_the_best_teacher_is_told_by_labelled_clips_alone(videos, monkeypatch):
    monkeypatch.setattr(banks, "PART", 4096)
    right = torch.eye(3)[torch.arange(10) % 3]
    good, bad = right.clone(), right.clone()
    good[6:], bad[:4] = 0, torch.eye(3)[(torch.arange(4) + 1) % 3]
    fold = torch.tensor([0, 1, 0, 1, 0, 1, -1, -1, -1, -1])
    readouts = {n: Readout.from_means(z, z, fold) for n, z in {"bad": bad, "good": good}.items()}
    assert gather(readouts, videos).best_teacher() == 1


def test_calibration_undoes_overconfidence():
    logits = 2 * torch.randn(4000, 5, generator=Generator().manual_seed(0))
    torch.manual_seed(0)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert calibration_temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    assert calibration_temperature(logits / 2, labels) == pytest.approx(0.5, rel=0.1)


def test_a_specialist_is_calibrated_where_it_counts():
    """Sharp and right on its first half, sharp and wrong on the other: told by the weights."""
    labels = torch.arange(40) % 4
    said = torch.where(torch.arange(40) < 20, labels, (labels + 1) % 4)
    z = 4.0 * torch.nn.functional.one_hot(said, 4)
    readout = Readout.from_means(z, z, torch.zeros(40, dtype=torch.long))
    bank = Bank(("one",), (readout,), z[:, None], labels, torch.zeros(40, dtype=torch.long))
    home = (torch.arange(40) < 20).float()[:, None]
    at_home, everywhere, abroad = (
        float(bank.recalibrated(w)) for w in (home, torch.ones(40, 1), 1 - home)
    )
    assert at_home < 0.5 < 2 < everywhere < abroad
    unlabelled = replace(bank, labels=torch.full((40,), -1))
    assert unlabelled.recalibrated(home).tolist() == [1]
