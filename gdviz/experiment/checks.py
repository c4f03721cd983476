"""Settings that cannot work are found before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from gdviz.config import Profile, Range, Schedule
from gdviz.core import distributed
from gdviz.core.files import UserError, load_json, save_json
from gdviz.data.videos import VideoSet
from gdviz.student.methods import find_method
from gdviz.teachers.backbones import build_backbone
from gdviz.teachers.bank import stamp_of
from gdviz.teachers.own import OwnBackbone, find_source


def check_profile(profile: Profile) -> None:
    """Check that a profile's parts fit together and that all it names exists.

    Raises:
        UserError: the flag, its value, and what is wanted.
    """
    check_ranges(profile)
    teachers, distillation, view = profile.teachers, profile.distillation, profile.view
    lists = {
        "--seeds": profile.seeds,
        "--methods": profile.methods,
        "--teachers.tasks": teachers.tasks,
    }
    for flag, values in lists.items():
        if not values or len(set(values)) < len(values):
            given = " ".join(map(str, values)) or "none"
            raise UserError(f"{flag}: needs at least one value and none twice, got {given}")
    if len(teachers.tasks) != len(teachers.strides):
        raise UserError(
            f"--teachers.strides: {len(teachers.strides)} strides for {len(teachers.tasks)} tasks; "
            "give one each"
        )
    if not 1 < view.length < view.frames:
        raise UserError(
            f"--view.length {view.length}: needs two frames or more, and fewer than the "
            f"{view.frames} of --view.frames"
        )
    for name in profile.methods:
        _named("--methods", lambda name=name: find_method(name, teachers.tasks))
    for task in teachers.tasks:
        _named("--teachers.tasks", lambda task=task: _try_task(profile, task))
    schedules = {
        "--teachers.pretrain": teachers.pretrain,
        "--teachers.fit": teachers.fit,
        "--distillation.schedule": distillation.schedule,
    }
    for flag, schedule in schedules.items():
        _check_parts(flag, schedule, distillation.labelled_batch)
    nets = {
        "--teachers.backbone": teachers.backbone,
        "--distillation.student": distillation.student,
    }
    for flag, name in nets.items():
        _named(f"{flag} {name}", lambda name=name: _try_backbone(profile, name))


def check_ranges(settings: Any, prefix: str = "--") -> None:
    """Check every number of a dataclass, and of those in it, against its :class:`Range`.

    Raises:
        UserError: the flag, its value, and the range.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value, flag = getattr(settings, name), prefix + name.replace("_", "-")
        if is_dataclass(value):
            check_ranges(value, f"{flag}.")
            continue
        several = isinstance(value, tuple)
        inner = get_args(hint)[0] if several else hint
        ranges = [a for a in getattr(inner, "__metadata__", ()) if isinstance(a, Range)]
        for number in value if several else (value,):
            for allowed in ranges:
                if number not in allowed:
                    raise UserError(f"{flag} {number}: needs {allowed}")


def _named(flag: str, attempt: Callable[[], object]) -> None:
    """Let what an attempt raises name the flag."""
    try:
        attempt()
    except (UserError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag}: {str(error).splitlines()[0]}") from None


def _try_task(profile: Profile, task: str) -> None:
    """Take views of empty videos: a clip that is too long shows."""
    source, view = find_source(task), profile.view_of(task)
    if not isinstance(source, OwnBackbone):
        videos = torch.zeros(6, view.frames, 3, 24, 24)
        source(1, view.length, view.stride).views(videos, torch.Generator())


def _try_backbone(profile: Profile, name: str) -> None:
    view = profile.view
    with torch.device("meta"):  # nothing is allocated, but sizes are checked
        build_backbone(name).eval()(torch.zeros(1, 3, view.length, view.size, view.size))


def _check_parts(flag: str, schedule: Schedule, labelled_batch: int) -> None:
    world = distributed.world()
    if schedule.batch % (world * schedule.accumulate) or labelled_batch % world:
        raise UserError(
            f"{flag}: {schedule.batch} clips (and --distillation.labelled-batch {labelled_batch}) "
            f"cannot be dealt out evenly to {world} processes in {schedule.accumulate} parts"
        )


def recognise_own_teachers(
    profile: Profile, videos: VideoSet, folder: Callable[[int, str], Path]
) -> None:
    """Check that networks of the user's own fit the data, and are those the run began with.

    Raises:
        UserError: one answers in another number of classes, or has changed.
    """
    for task in profile.teachers.tasks:
        source, view = find_source(task), profile.view_of(task)
        if not isinstance(source, OwnBackbone):
            continue
        if source.fitted and source.classes != len(videos.label_names):
            raise UserError(
                f"--teachers.tasks {task}: answers in {source.classes} classes, the data has "
                f"{len(videos.label_names)}"
            )
        stamp = stamp_of([source], videos, view)
        for seed in profile.seeds:
            file = folder(seed, task) / "own.json"
            if file.exists() and load_json(file)["stamp"] != stamp:
                raise UserError(
                    f"--teachers.tasks {task}: returns another network than when {file.parent} "
                    "began; choose another --out"
                )
            save_json(file, {"stamp": stamp})
