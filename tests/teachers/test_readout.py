"""What teachers say of every clip is read out once, kept in half precision, and is what they say."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, memory_set
from torch import nn

from gdviz.config import View
from gdviz.core.files import UserError, load_json, load_tensors, save_json
from gdviz.data.clips import clip_places, clips_of
from gdviz.experiment.steps import execute
from gdviz.student.distill import distill
from gdviz.teachers.fit import readout
from gdviz.teachers.readout import open_clips, predict, read_out, stamp_of

VIEW = View(size=8, frames=12, length=4, stride=2, clips=3)


class Net(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.fc.weight.data *= gain

    def forward(self, clips):
        features = clips.mean((1, 2, 3))
        return self.fc(features), features


@pytest.fixture
def videos():
    pixels = torch.randint(
        256, (10, 12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).numpy()
    return memory_set(
        pixels, [i % 3 for i in range(10)], ["train"] * 6 + ["unlabelled"] * 2 + ["test"] * 2
    )


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(readout, "PART", 4)


def say(model, videos):
    return lambda rows: dict(
        zip(("logits", "features"), predict(model, videos, rows, VIEW, each=True), strict=True)
    )


@pytest.mark.usefixtures("small_parts")
def test_what_was_kept_is_what_a_live_teacher_says_of_the_same_clip(videos, tmp_path):
    torch.manual_seed(0)
    model = Net()
    read_out(say(model, videos), videos, VIEW, tmp_path / "clips", stamp_of([model], videos, VIEW))
    kept = open_clips(tmp_path / "clips", videos, VIEW)
    rows, clips = torch.tensor([9, 0, 4, 4, 7]), torch.tensor([0, 2, 1, 2, 0])
    seen = clips_of(
        videos.batch(rows), VIEW.length, VIEW.stride, place=torch.tensor(clip_places(3))[clips]
    )
    for name, live in zip(("logits", "features"), model(seen), strict=True):
        assert torch.allclose(kept.at(name, rows, clips), live, rtol=1e-3, atol=1e-4)
    assert torch.allclose(
        kept.mean("logits"), predict(model, videos, torch.arange(10), VIEW)[0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.usefixtures("small_parts")
def test_it_goes_on_where_it_stood_and_other_networks_start_anew(videos, tmp_path):
    model, asked = Net(), []

    def dies(rows):
        asked.append(rows.tolist())
        if rows[0] == 8:
            raise KeyboardInterrupt
        return say(model, videos)(rows)

    stamp = stamp_of([model], videos, VIEW)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            read_out(dies, videos, VIEW, tmp_path, stamp)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [8, 9]]
    with pytest.raises(UserError, match=r"index\.json"):  # not before it is whole
        open_clips(tmp_path, videos, VIEW)
    whole = read_out(say(model, videos), videos, VIEW, tmp_path, stamp)
    assert torch.equal(
        whole.mean("logits"), read_out(say(model, videos), videos, VIEW, None, "").mean("logits")
    )
    other = Net()
    assert (
        stamp_of([other], videos, VIEW)
        != stamp
        != stamp_of([model], videos, replace(VIEW, stride=1))
    )
    read_out(say(other, videos), videos, VIEW, tmp_path, stamp_of([other], videos, VIEW))
    assert not torch.equal(open_clips(tmp_path, videos, VIEW).mean("logits"), whole.mean("logits"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_other_sets_views_and_numbers_are_refused(videos, tmp_path):
    model = Net()
    read_out(say(model, videos), videos, VIEW, tmp_path, stamp_of([model], videos, VIEW))
    for other, view, what in (
        (replace(videos, fingerprint="other"), VIEW, "videos"),
        (videos, replace(VIEW, stride=1, clips=2), "stride, clips"),
    ):
        with pytest.raises(UserError, match=f"of another set \\({what} differ\\); delete it"):
            open_clips(tmp_path, other, view)
    part = tmp_path / "00000.safetensors"
    save_json(tmp_path / "index.json", load_json(tmp_path / "index.json") | {"stamp": "other"})
    with pytest.raises(
        UserError, match=r"00000\.safetensors of another teacher; delete the folder"
    ):
        open_clips(tmp_path, videos, VIEW)
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        open_clips(tmp_path, videos, VIEW)
    with pytest.raises(ValueError, match=r"logits of a teacher are not finite, or larger"):
        read_out(say(Net(1e6), videos), videos, VIEW, None, "")


def test_a_student_is_taught_clip_by_clip(finished, tmp_path):
    """The clips average to what is said of the video, the control's are dealt alike, and the student is another one."""
    by_clip = replace(
        finished.profile, distillation=replace(finished.profile.distillation, target="clip")
    )
    run = replace(finished, profile=by_clip, folder=tmp_path)
    execute(run, workers=1)
    videos = run.videos()
    knowledge, rows, clips = (
        run.knowledge(0, videos),
        torch.tensor([3, 0, 5]),
        torch.tensor([0, 1, 2]),
    )
    logits, shuffled = knowledge.said(rows, clips), knowledge.shuffled(videos.training_rows, 0)
    mean = torch.stack([knowledge.said(rows, torch.full((3,), c)) for c in range(3)]).mean(0)
    assert torch.allclose(mean, knowledge.said(rows), atol=2e-3) and not torch.allclose(
        logits, mean, atol=2e-3
    )
    for clip in (clips, None):
        moved, own = shuffled.shown(rows, clip)[0], knowledge.shown(rows, clip)[0]
        assert torch.equal(
            moved, knowledge.shown(shuffled.dealt[rows], clip)[0]
        ) and not torch.equal(moved, own)
        assert torch.equal(shuffled.said(rows, clip), knowledge.said(shuffled.dealt[rows], clip))
    with pytest.raises(ValueError, match="target='clip': this knowledge is of whole videos only"):
        distill(
            "labels",
            finished.knowledge(0, videos),
            run.edges(0),
            videos,
            TINY.view,
            by_clip.distillation,
            seed=0,
        )
    part = run.teacher_folder(0, "order") / "clips" / "00000.safetensors"
    before = load_tensors(part)
    part.unlink()
    execute(run, workers=1)  # makes that teacher again
    assert all(torch.equal(x, before[name]) for name, x in load_tensors(part).items())
    old, new = (
        load_tensors(r.student_folder(0, "both-graphs") / "student.safetensors")
        for r in (finished, run)
    )
    assert not torch.equal(old["fc.weight"], new["fc.weight"])
