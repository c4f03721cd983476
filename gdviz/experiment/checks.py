"""Settings that cannot work are found before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from gdviz.config import Profile, Range
from gdviz.core import distributed
from gdviz.core.files import UserError
from gdviz.data.motion import DOMAINS
from gdviz.data.videos import VideoSet
from gdviz.experiment.metrics import SHOTS
from gdviz.student.family import build_student
from gdviz.student.methods import find_method
from gdviz.teachers.backbones import build_backbone
from gdviz.teachers.bank import stamp_of
from gdviz.teachers.own import OwnBackbone, find_source


def check_profile(profile: Profile) -> None:
    """Raise UserError, which names a flag, where parts of a profile do not fit or do not exist."""
    check_ranges(profile)
    teachers, distillation, view = profile.teachers, profile.distillation, profile.view
    tasks, world = teachers.tasks, distributed.world()
    lists = {"--seeds": profile.seeds, "--methods": profile.methods, "--teachers.tasks": tasks}
    for flag, values in lists.items():
        if not values or len(set(values)) < len(values):
            given = " ".join(map(str, values)) or "none"
            raise UserError(f"{flag}: needs at least one value and none twice, got {given}")
    if len(tasks) != len(teachers.strides):
        given = f"{len(teachers.strides)} strides for {len(tasks)} tasks"
        raise UserError(f"--teachers.strides: {given}; give one each")
    if not 1 < view.length < view.frames:
        wanted = f"two frames or more, and fewer than the {view.frames} of --view.frames"
        raise UserError(f"--view.length {view.length}: needs {wanted}")
    if view.windows > 1 and not view.fps:
        raise UserError(f"--view.windows {view.windows}: several windows need --view.fps")
    if not profile.motion.domains or set(profile.motion.domains) - set(DOMAINS):
        given = " ".join(profile.motion.domains) or "none"
        raise UserError(f"--motion.domains {given}: choose from {', '.join(DOMAINS)}")
    motion = profile.motion
    if motion.unnamed and (motion.unnamed < 2 or motion.test <= SHOTS):
        needs = f"two motions or more, and --motion.test of more than {SHOTS}"
        raise UserError(f"--motion.unnamed {motion.unnamed}: needs {needs}")
    for name in profile.methods:
        with _naming("--methods"):
            find_method(name, tasks)
    for task in tasks:
        with _naming("--teachers.tasks"):
            source, own = find_source(task), profile.view_of(task)
            if not isinstance(source, OwnBackbone):  # a clip that is too long shows
                videos = torch.zeros(6, own.frames, 3, 24, 24)
                source(1, own.length, own.stride).views(videos, torch.Generator())
    schedules = {
        "--teachers.pretrain": teachers.pretrain,
        "--teachers.fit": teachers.fit,
        "--distillation.schedule": distillation.schedule,
    }
    labelled = distillation.labelled_batch
    for flag, schedule in schedules.items():
        if schedule.batch % (world * schedule.accumulate) or labelled % world:
            raise UserError(
                f"{flag}: {schedule.batch} clips (and --distillation.labelled-batch {labelled}) "
                f"cannot be dealt out evenly to {world} processes in {schedule.accumulate} parts"
            )
    nets: dict[str, tuple[str, Callable[[str], nn.Module]]] = {
        "--teachers.backbone": (teachers.backbone, build_backbone),
        "--distillation.student": (distillation.student, partial(build_student, classes=2)),
    }
    for flag, (name, build) in nets.items():
        # On "meta" nothing is allocated, but sizes are checked.
        with _naming(f"{flag} {name}"), torch.device("meta"):
            build(name).eval()(torch.zeros(1, 3, view.length, view.size, view.size))


def check_ranges(settings: Any, prefix: str = "--") -> None:
    """Raise UserError where a value of a dataclass, or of one in it, is of another type, or out of
    its `Range`."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value, flag = getattr(settings, name), prefix + name.replace("_", "-")
        if is_dataclass(value):
            check_ranges(value, f"{flag}.")
            continue
        several = get_origin(hint) is tuple
        inner = get_args(hint)[0] if several else hint
        kind = getattr(inner, "__origin__", inner)  # of what is annotated
        kinds = (int, float) if kind is float else kind
        for one in value if several and isinstance(value, tuple) else (value,):
            if kind is Literal:
                fits, needs = one in get_args(inner), f"one of {', '.join(get_args(inner))}"
            else:
                fits, needs = isinstance(one, kinds), f"{'several ' * several}{kind.__name__}"
            if not fits or (isinstance(value, tuple) != several):
                raise UserError(f"{flag} {one!r}: needs {needs}")
            for allowed in getattr(inner, "__metadata__", ()):
                if isinstance(allowed, Range) and one not in allowed:
                    raise UserError(f"{flag} {one}: needs {allowed}")


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Let what is raised name the flag."""
    try:
        yield
    except (UserError, ValueError, RuntimeError) as error:
        raise UserError(f"{flag}: {str(error).splitlines()[0]}") from None


def check_home(task: str, home: VideoSet, videos: VideoSet) -> None:
    """Raise UserError where a teacher's own videos show other classes than the run's."""
    if other := sorted(set(videos.label_names) ^ set(home.label_names)):
        raise UserError(f"--teachers.tasks {task}: its home has other classes, {other[0]!r} is one")


def stamp_own_teachers(profile: Profile, videos: VideoSet) -> dict[str, str]:
    """Return a fingerprint of each network of one's own; raise UserError if it does not fit."""
    stamps, classes = {}, len(videos.label_names)
    for task in profile.teachers.tasks:
        source, flag = find_source(task), f"--teachers.tasks {task}"
        if isinstance(source, OwnBackbone):
            if source.fitted and source.classes != classes:
                given = f"answers in {source.classes} classes, the data has {classes}"
                raise UserError(f"{flag}: {given}")
            stamps[flag] = stamp_of([source], videos, profile.view_of(task))
    return stamps
