"""How long an experiment takes: one step of each network, timed here, times the steps there are."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

import torch
from torch import nn

from gdviz.config import Profile, Schedule, View
from gdviz.core.files import UserError
from gdviz.core.loop import DTYPES
from gdviz.core.names import split_home
from gdviz.data.listing import read_list
from gdviz.data.motion import CLASSES
from gdviz.data.official import read_official
from gdviz.data.splits import split_by_group
from gdviz.experiment.folder import Run
from gdviz.experiment.grid import Plan
from gdviz.student.family import build_student
from gdviz.teachers.fit import build_teacher
from gdviz.teachers.own import OwnBackbone, find_source


def count_videos(run: Run, told: dict[str, int]) -> dict[str, int]:
    """Return the number of videos of each split, and of classes; ``told`` where data are away.

    Raises:
        UserError: the data are not there, and nothing is told.
    """
    motion = run.profile.motion
    if run.data is None:
        named = len(CLASSES) - motion.unnamed
        sizes = {"train": motion.labelled, "unlabelled": motion.unlabelled, "test": motion.test}
        return {name: count * named for name, count in sizes.items()} | {"classes": named}
    if not run.data.exists():
        if not {"train", "test", "classes"} <= set(told):
            needs = "name them in the plan: videos = {train = 100, test = 50, classes = 10}"
            raise UserError(f"{run.data}: is not here, so how many videos? {needs}")
        return {"unlabelled": 0} | told
    official = read_official(run.data)
    videos = official.videos if official else read_list(run.data)
    splits = Counter(split_by_group(videos, str(run.data), seed=0))
    labels = {label for video in videos for label in video.classes}
    return {"unlabelled": 0} | dict(splits) | {"classes": len(labels)}


def clip_seconds(
    model: nn.Module, view: View, schedule: Schedule, device: str
) -> tuple[float, float]:
    """Return the seconds that a clip takes in a training step, and in answering alone.

    The better of two rounds, after one that warms up; on a CPU, of four clips.
    """
    part = -(-schedule.batch // schedule.accumulate)
    batch = part if device.startswith("cuda") else min(part, 4)
    dtype = DTYPES[schedule.precision]
    model = model.to(device).train()
    clips = torch.randn(batch, 3, view.length, view.size, view.size, device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0) if list(model.parameters()) else None
    times = []
    for _ in range(3):
        times.append([])
        for trained in (True, False):
            began = perf_counter()
            with (
                torch.set_grad_enabled(trained and optimiser is not None),
                torch.autocast(clips.device.type, dtype, enabled=dtype is not None),
            ):
                loss = torch.stack([part.float().mean() for part in model(clips)]).sum()
            if trained and optimiser is not None and loss.requires_grad:
                loss.backward()
                optimiser.step()
            float(loss.detach())  # waits for a GPU
            times[-1].append((perf_counter() - began) / batch)
    training, answering = (min(each[k] for each in times[1:]) for k in (0, 1))
    return training, answering


def clips_trained(schedule: Schedule, videos: int, more: int = 0) -> int:
    """Return how many clips a training sees, with ``more`` beside each batch."""
    steps = max(schedule.min_steps, videos // schedule.batch) * schedule.epochs
    return steps * (min(schedule.batch, videos) + more)


def hours_of(profile: Profile, count: dict[str, int], device: str) -> dict[str, float]:
    """Return the hours of one draw on one process: of its teachers, and of its students.

    Decoding the videos comes before, once; transport, graphs and tables are left out, since they
    take less than a hundredth.
    """
    cfg, distillation, classes = profile.teachers, profile.distillation, count["classes"]
    labelled, training = count["train"], count["train"] + count["unlabelled"]
    answered = (training + count["test"]) * profile.view.clips
    teachers, costs = 0.0, {}
    for task in cfg.tasks:
        home, source = split_home(task)[1], find_source(task)
        pretrained_on, fitted_on = training, labelled  # videos
        if home in profile.motion.domains:
            fitted_on = classes * cfg.home_labelled
            pretrained_on = fitted_on + classes * cfg.home_unlabelled
        fits = 1 if home else 1 + cfg.folds
        kind, clips = cfg.backbone, fits * clips_trained(cfg.fit, fitted_on)
        if isinstance(source, OwnBackbone):  # it is there already, and perhaps its head
            kind, clips = task, 0 if source.fitted else clips
        else:
            clips += clips_trained(cfg.pretrain, pretrained_on)
        if kind not in costs:
            model = build_teacher(task, cfg, classes)
            costs[kind] = clip_seconds(model, profile.view_of(task), cfg.pretrain, device)
        train, answer = costs[kind]
        teachers += train * clips + answer * answered
    student = build_student(distillation.student, classes)
    train, answer = clip_seconds(student, profile.view, distillation.schedule, device)
    each = clips_trained(distillation.schedule, training, distillation.labelled_batch)
    students = len(profile.methods) * (train * each + answer * answered)
    return {"teachers": teachers / 3600, "students": students / 3600}


def estimate(plan: Plan, runs: list[list[Run]], device: str) -> str:
    """Return what a plan holds, and how long it takes here, a line a setting."""
    lines, whole = [], 0.0
    for (name, profile), (first, *_) in zip(plan.settings.items(), runs, strict=True):
        count = count_videos(first, plan.videos)
        hours = hours_of(profile, count, device)
        videos = ", ".join(f"{count[s]:,} {s}" for s in ("train", "unlabelled", "test"))
        sizes = {"teachers": len(profile.teachers.tasks), "students": len(profile.methods)}
        each = " and ".join(f"{n} {kind} ({hours[kind]:.2f} h)" for kind, n in sizes.items())
        lines.append(f"{name}: {len(plan.draws)} draws of {each}; {videos} videos")
        whole += len(plan.draws) * sum(hours.values())
    left_out = "if it is not busy; decoding and teachers that settings share are not counted"
    return "\n".join([*lines, f"about {whole:.1f} hours of one process on {device}, {left_out}"])
