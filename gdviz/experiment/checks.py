"""Settings that cannot work are found before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gdviz.config import Profile
from gdviz.core import distributed as ranks
from gdviz.core.files import UserError, load_json, save_json
from gdviz.data.videos import VideoSet
from gdviz.student.distill import methods_of
from gdviz.teachers.backbones import build_backbone
from gdviz.teachers.own import TappedClassifier, own_teacher
from gdviz.teachers.pretext import TASKS
from gdviz.teachers.readout import predict, stamp_of


def check_profile(profile: Profile) -> None:
    """Raises UserError where parts do not fit together, or a task, backbone or method is one that nothing answers to."""
    teachers, distillation, view = profile.teachers, profile.distillation, profile.view
    if len(teachers.tasks) != len(teachers.strides) or not teachers.tasks:
        raise UserError(
            f"--teachers.strides: {len(teachers.strides)} strides for {len(teachers.tasks)} tasks; give one each"
        )
    for name, values in {
        "--seeds": profile.seeds,
        "--methods": profile.methods,
        "--teachers.tasks": teachers.tasks,
    }.items():
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"{name}: needs at least one value and none twice, got {' '.join(map(str, values)) or 'none'}"
            )
    known = {"--teachers.tasks": list(TASKS), "--methods": methods_of(teachers.tasks)}
    for flag, names in {"--teachers.tasks": teachers.tasks, "--methods": profile.methods}.items():
        for name in names:
            if name not in known[flag] and not (flag == "--teachers.tasks" and ":" in name):
                raise UserError(f"{flag}: unknown {name!r}; choose from {', '.join(known[flag])}")
    if not 1 < view.length < view.frames:
        raise UserError(
            f"--view.length {view.length}: needs two frames or more, and fewer than the {view.frames} of --view.frames"
        )
    for task, stride in zip(teachers.tasks, teachers.strides, strict=True):
        try:
            if ":" in task:
                own_teacher(task)
                continue
            TASKS[task](1, view.length, stride).views(
                torch.zeros(6, view.frames, 3, 24, 24), torch.Generator()
            )
        except ValueError as error:
            raise UserError(f"--teachers.tasks {task}: {error}") from None
    for flag, schedule in {
        "--teachers.pretrain": teachers.pretrain, "--teachers.fit": teachers.fit, "--distillation.schedule": distillation.schedule,
    }.items():  # fmt: skip
        if schedule.epochs < 1 or schedule.batch < 2:
            raise UserError(f"{flag}: needs one epoch or more and batches of two or more")
        if not (
            schedule.accumulate > 0
            and 0 <= schedule.ema < 1
            and 0 <= schedule.warmup <= 1
            and schedule.clip >= 0
        ):
            raise UserError(
                f"{flag}: needs accumulate > 0, ema in [0, 1), warmup in [0, 1] and clip >= 0"
            )
        if (
            schedule.batch % (ranks.world() * schedule.accumulate)
            or distillation.labelled_batch % ranks.world()
        ):
            raise UserError(
                f"{flag}: {schedule.batch} clips (and --distillation.labelled-batch {distillation.labelled_batch}) cannot be dealt out "
                f"evenly to {ranks.world()} processes in {schedule.accumulate} parts"
            )
    for flag, name in {
        "--teachers.backbone": teachers.backbone,
        "--distillation.student": distillation.student,
    }.items():
        try:
            with torch.device("meta"):  # nothing is allocated, but sizes are checked
                build_backbone(name).eval()(torch.zeros(1, 3, view.length, view.size, view.size))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{flag} {name}: {str(error).splitlines()[0]}") from None


def recognise_own_teachers(
    profile: Profile, videos: VideoSet, folder: Callable[[int, str], Path]
) -> None:
    """Raises UserError where one does not answer in the classes of the data, or is not the one that ``folder`` of a seed began with."""
    for task in (t for t in profile.teachers.tasks if ":" in t):
        teacher, view = own_teacher(task), profile.view_of(task)
        if isinstance(teacher, TappedClassifier):
            answers = predict(teacher, videos, torch.arange(1), view)[0].shape[1]
            if answers != len(videos.label_names):
                raise UserError(
                    f"--teachers.tasks {task}: answers in {answers} classes, the data has {len(videos.label_names)}"
                )
        stamp = stamp_of([teacher], videos, view)
        for seed in profile.seeds:
            file = folder(seed, task) / "own.json"
            if file.exists() and load_json(file)["stamp"] != stamp:
                raise UserError(
                    f"--teachers.tasks {task}: returns another network than when {file.parent} began; choose another --out"
                )
            save_json(file, {"stamp": stamp})
