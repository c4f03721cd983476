"""What several test files share: a very small run, short videos, and real ones where they are
present."""

import gc
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# In the background a shell has it ignored, and children that tests interrupt would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Jupyter's schemas would compile its grammars, three seconds in every process; no test has an IRI.
sys.modules["rfc3987_syntax"] = None

import jaxtyping
from jaxtyping import install_import_hook

# Shapes and types of every call in this process are held to their annotations.
install_import_hook("gdviz", "typecheck.check")

import numpy as np
import pytest
import torch

from gdviz.config import Distillation, Edges, MotionData, Profile, Schedule, Teachers, View
from gdviz.data.motion import encode, render
from gdviz.data.videos import VideoSet
from gdviz.experiment.folder import Run
from gdviz.experiment.model_folder import export
from gdviz.experiment.steps import execute

REPO = Path(__file__).resolve().parents[1]

TINY = Profile(
    motion=MotionData(labelled=4, unlabelled=3, test=2, size=32, frames=12),
    view=View(size=16, frames=12, length=4, stride=2),
    teachers=Teachers(
        tasks=("order", "prediction"),
        strides=(2, 1),
        backbone="tiny4",
        pretrain=Schedule(epochs=2, batch=28, min_steps=3),
        fit=Schedule(epochs=2, batch=28, min_steps=3),
        folds=2,
    ),
    distillation=Distillation(
        student="tiny4",
        schedule=Schedule(epochs=2, batch=28, min_steps=3),
        labelled_batch=8,
        edges=Edges(refreshes=3, gate_steps=2),
    ),
    seeds=(0,),
    methods=("labels", "kd-best", "both-graphs", "both-shuffled"),
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _denormals():
    """``execute`` with one worker flushes denormal numbers in this process: not in the next
    test."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def unchecked():
    """Without the tests' checks of annotations, as users call the package."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def video_folder(tmp_path):
    """``make(count, classes)``: a folder of class sub-folders with that many short videos each."""

    def make(
        count: int = 3, classes: tuple[str, ...] = ("a", "b"), where: Path = tmp_path / "videos"
    ) -> Path:
        for label, name in enumerate(classes):
            (where / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                encode(
                    render(label, i + 100 * label, size=32, frames=12),
                    where / name / f"{name}{i}.mp4",
                )
        return where

    return make


def memory_set(pixels: np.ndarray, labels: list[int], splits: list[str]) -> VideoSet:
    """A VideoSet without files: uint8 pixels [n, f, h, w, 3]."""
    return VideoSet.from_arrays(pixels, labels, splits)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Run:
    """A finished run of ``TINY``. Look at it, do not change it."""
    root = tmp_path_factory.mktemp("finished")
    run = Run(TINY, root / "run", cache=root / "data")
    execute(run, workers=1)
    return run


class _Shadow:
    """Two coordinates in the place of UMAP's."""

    def __init__(self, *_, **__) -> None: ...

    def fit_transform(self, x: np.ndarray) -> np.ndarray:
        return x[:, :2]


@pytest.fixture(autouse=True)
def _no_umap(request, monkeypatch):
    """Compiling UMAP takes each process eight seconds: left to the slow tests, and to its own."""
    plots = sys.modules.get("gdviz.show.plots")
    if plots and not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(plots, "_umap", lambda: _Shadow)


@pytest.fixture(scope="session")
def exported_card(finished, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of that run's student, exported, and what its model card says."""
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("export") / "student"
    return out, export(finished, out)


@pytest.fixture(scope="session")
def exported(exported_card) -> Path:
    """The folder of that run's student, exported. Look at it, do not change it."""
    return exported_card[0]


def _shared_video(name: str) -> Path:
    for folder in (REPO, *REPO.parents):
        if (folder / "shared" / "video" / name).exists():
            return folder / "shared" / "video" / name
    pytest.skip(f"needs shared/video/{name}, real video that the repository does not hold")


@pytest.fixture(scope="session")
def ut_interaction() -> Path:
    return _shared_video("ut_interaction_set1")


@pytest.fixture(scope="session")
def peer_clips() -> Path:
    return _shared_video("peer_clips")


@pytest.fixture(scope="session")
def official() -> Path:
    """A folder that holds ``splits``, the official lists, and ``ucf101_layout``, a few clips in
    their place."""
    return _shared_video("splits").parent


def pytest_collection_finish():
    """What was imported stays: the collector need not look at it again, nor at all so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
