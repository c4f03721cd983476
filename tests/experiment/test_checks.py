"""Settings that cannot work are refused by name, before any work."""

from dataclasses import is_dataclass, replace
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from conftest import TINY

from gdviz.config import PROFILES, Profile, Range
from gdviz.core.files import UserError
from gdviz.experiment.checks import check_profile
from gdviz.experiment.folder import Run
from gdviz.experiment.steps import execute
from gdviz.teachers.pretext import TASKS


def vary(part: str, **changes) -> Profile:
    return replace(TINY, **({part: replace(getattr(TINY, part), **changes)} if part else changes))


FIT, PRETRAIN = TINY.teachers.fit, TINY.teachers.pretrain
LONG = replace(
    vary("view", length=11), teachers=replace(TINY.teachers, tasks=("order", "clip-order"))
)
BAD = {
    "task": (
        vary("teachers", tasks=("order", "jigsaw")),
        "--teachers.tasks: unknown task 'jigsaw'",
    ),
    "backbone": (vary("teachers", backbone="resnet50"), "--teachers.backbone resnet50: unknown"),
    "student": (vary("distillation", student="tiny"), "--distillation.student tiny: unknown"),
    "method": (vary("", methods=("labels", "kd-pace")), "--methods: unknown method 'kd-pace'"),
    "method twice": (vary("", methods=("labels", "labels")), "--methods"),
    "strides": (vary("teachers", strides=(1, 2, 3)), "--teachers.strides: 3 strides for 2 tasks"),
    "no seeds": (vary("", seeds=()), "--seeds"),
    "clip": (vary("view", length=12), "--view.length 12"),
    "long clip": (LONG, "--teachers.tasks: "),
    "parts": (vary("teachers", fit=replace(FIT, accumulate=3)), "--teachers.fit: 28 clips"),
    "average": (
        vary("teachers", fit=replace(FIT, ema=1.0)),
        "--teachers.fit.ema 1.0: needs [0, 1)",
    ),
    "epochs": (
        vary("teachers", pretrain=replace(PRETRAIN, epochs=0)),
        "--teachers.pretrain.epochs 0",
    ),
    "seed": (vary("", seeds=(0, 2**32)), "--seeds 4294967296: needs [0, "),
    "seed below": (vary("", seeds=(-1,)), "--seeds -1"),
    "folds": (vary("teachers", folds=1), "--teachers.folds 1: needs 2 or more"),
    "moments": (
        vary("distillation", edges=replace(TINY.distillation.edges, refreshes=0)),
        "--distillation.edges.refreshes 0: needs 1 or more",
    ),
    "labelled": (vary("distillation", labelled_batch=0), "--distillation.labelled-batch 0"),
    "heat": (vary("distillation", temperature=0.0), "--distillation.temperature 0.0: needs more"),
    "one motion": (vary("motion", unnamed=1, test=9), "--motion.unnamed 1: needs two motions"),
    "few shots": (vary("motion", unnamed=2, test=5), "--motion.unnamed 2: needs two motions"),
    "no number": (vary("distillation", beta=float("nan")), "--distillation.beta nan"),
}


@pytest.mark.parametrize(("profile", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_found_before_any_work(tmp_path, profile, message):
    with pytest.raises(UserError) as caught:
        execute(Run(profile, tmp_path / "run", cache=tmp_path / "data"), workers=1)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_profiles_and_every_task_are_settings():
    for profile in PROFILES.values():
        check_profile(profile)
    teachers = replace(TINY.teachers, tasks=tuple(TASKS), strides=(1,) * len(TASKS))
    check_profile(replace(TINY, teachers=teachers, methods=("kd-clip-order",)))


def test_too_few_labelled_videos_are_found_before_training(tmp_path):
    profile = vary("motion", labelled=1, unlabelled=1, test=2)
    with pytest.raises(UserError, match=r"--motion\.labelled 1: needs 2"):
        execute(Run(profile, tmp_path / "run", cache=tmp_path / "data"), workers=1)
    assert not (tmp_path / "run").exists()


def test_every_number_has_a_range():
    def visit(kind: type) -> None:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
            if is_dataclass(inner):
                visit(inner)
            elif inner in (int, float) or get_origin(inner) is Annotated:
                assert any(isinstance(a, Range) for a in getattr(inner, "__metadata__", ())), name

    visit(Profile)


def test_a_run_of_which_nothing_is_finished_says_so(tmp_path):
    with pytest.raises(UserError, match="holds nothing finished yet"):
        Run(TINY, tmp_path).results()
