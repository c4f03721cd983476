"""The bundled run reads like any run, is small, is not damaged, and can be packed anew."""

import importlib.util
import shutil
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

mpl.use("Agg")

from gdviz.core.files import UserError
from gdviz.data.clips import pick_frames
from gdviz.show.bundled import Bundled, open_bundled
from gdviz.show.figures import open_finished
from gdviz.show.notebook import Session

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data/example"


def load_tool():
    spec = importlib.util.spec_from_file_location("pack_example", ROOT / "tools/pack_example.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture(scope="module")
def packed(finished, tmp_path_factory) -> Bundled:
    folder = tmp_path_factory.mktemp("packed") / "example"
    load_tool().pack(finished, folder)
    return open_bundled(folder)


def assert_reads_like_a_run(run):
    look = open_finished(run)
    videos, bank, edges = look.videos, look.bank, look.graphs.edges
    n, tasks, classes = len(videos.labels), run.profile.teachers.tasks, len(videos.label_names)
    assert bank.logits.shape == (n, len(tasks), classes)
    assert {x.dtype for x in (bank.logits, *vars(edges).values())} == {torch.float32}
    assert edges.teachers.shape[1:] == (n, len(tasks))
    assert edges.consensus.shape[1:] == (n, classes)
    assert torch.equal(bank.labels >= 0, torch.tensor([s == "train" for s in videos.splits]))
    assert torch.equal(bank.fold >= 0, bank.labels >= 0)
    torch.testing.assert_close(edges.pairs.sum(1), torch.ones(len(edges.pairs)))
    assert look.adapted
    students = look.results[look.results["kind"] == "student"]
    assert list(students["name"].unique()) == list(run.profile.methods)
    assert (students["seed"].nunique(), *students["seed"][:1]) == (len(run.profile.seeds), 0)
    rows, view = torch.tensor([0, n - 1]), run.profile.view
    batch = videos.batch(rows)
    assert batch.shape == (2, view.frames, view.size, view.size, 3)
    assert batch.dtype == torch.uint8
    assert torch.equal(videos.clips(rows, 4, 2), pick_frames(batch, 4, 2))


def test_the_example_is_small_and_reads_like_a_run():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 2e6
    assert_reads_like_a_run(open_bundled(FOLDER))


def test_the_renderer_still_draws_what_the_run_saw():
    run = open_bundled(FOLDER)
    films, titles = Session(0, run.profile, "cpu", ROOT, run).films()
    videos, first = run.videos(), sorted((FOLDER / "videos").glob("*/*.mp4"))[0]
    row = torch.tensor([videos.groups.index(str(int(first.stem)))])
    drawn = videos.batch(row)[0].float()
    small = adaptive_avg_pool2d(torch.tensor(films[0]).movedim(-1, 1).float(), drawn.shape[1])
    assert len(films) == len(titles) == 3 * len(set(titles))
    assert titles[0] == videos.label_names[videos.labels[row]]
    assert (drawn - small.movedim(1, -1)).abs().mean() < 4, "make the example anew"


def test_packing_keeps_what_the_run_holds(finished, packed):
    assert_reads_like_a_run(packed)
    videos, again = finished.videos(), packed.videos()
    assert (again.splits, again.groups) == (videos.splits, videos.groups)
    assert again.labels.tolist() == videos.labels.tolist()
    assert torch.equal(again.batch(torch.arange(3)), videos.batch(torch.arange(3)))
    whole, thin = finished.bank(0, videos), packed.bank(0, again)
    torch.testing.assert_close(thin.logits, whole.logits, atol=2e-2, rtol=2e-3)
    every = torch.arange(len(videos.labels))
    for held in (False, True):
        ours, theirs = (bank.features_at(every, held=held) for bank in (thin, whole))
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-3)
    edges = packed.graphs(0).edges, finished.graphs(0).edges
    torch.testing.assert_close(*(e.teachers for e in edges))
    assert packed.results().equals(finished.results())


def test_a_damaged_example_is_refused(packed, tmp_path):
    shutil.copytree(packed.folder, tmp_path / "example")
    with open(tmp_path / "example/results.csv", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"results\.csv is damaged"):
        open_bundled(tmp_path / "example")
    (tmp_path / "example/results.csv").unlink()
    with pytest.raises(UserError, match="or gone"):
        open_bundled(tmp_path / "example")
