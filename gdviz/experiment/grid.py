"""An experiment: a plan's settings, each run on every draw of the data; one table of all results.

A plan is a small TOML file (docs/experiments.md): a profile, draws, methods, contrasts, and
settings with what each changes in the profile.

Every setting and draw is a run in OUT/SETTING/DRAW, and resumes as runs do. Teachers that an
earlier setting has made for the same draw are taken from there.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from gdviz.config import PROFILES, Profile
from gdviz.core.files import UserError, atomic, fingerprint, from_plain, load_json, plain, save_json
from gdviz.core.names import folder_name
from gdviz.core.processes import over_processes
from gdviz.experiment import steps
from gdviz.experiment.checks import check_profile
from gdviz.experiment.folder import Run, Workers, is_done, save_results
from gdviz.teachers.own import OwnBackbone, find_source


@dataclass(frozen=True)
class Plan:
    """What an experiment runs, and which differences it was made for."""

    draws: tuple[int, ...]
    settings: dict[str, Profile]
    contrasts: tuple[tuple[str, str], ...] = ()
    measures: tuple[str, ...] = ("accuracy",)
    data: Path | None = None  # may hold "{draw}"; None: the embedded data, drawn anew by each draw
    videos: dict[str, int] = field(default_factory=dict)  # of each split and "classes", as told

    def runs(self, out: Path, cache: Path, device: str) -> list[list[Run]]:
        """Return the runs of each setting, one a draw."""

        def run(name: str, profile: Profile, draw: int) -> Run:
            motion = replace(profile.motion, seed=draw)
            drawn = replace(profile, motion=motion, seeds=(draw,))
            data = self.data and Path(str(self.data).replace("{draw}", str(draw)))
            return Run(drawn, out / folder_name(name) / str(draw), data, cache, device)

        return [[run(*setting, draw) for draw in self.draws] for setting in self.settings.items()]


def _set(settings: Any, name: str, value: Any, where: str) -> Any:
    """Return a dataclass with the field of a dotted name set."""
    first, _, rest = name.replace("-", "_").partition(".")
    if not is_dataclass(settings) or isinstance(settings, type) or not hasattr(settings, first):
        raise UserError(f"{where}: the profile has no such field")
    if rest:
        return replace(settings, **{first: _set(getattr(settings, first), rest, value, where)})
    try:
        return from_plain(type(settings), plain(settings) | {first: value})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} = {value!r}: {error}") from None


def read_plan(file: Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: it is no TOML, or names what does not exist; settings that cannot work.
    """
    try:
        words = tomllib.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give the plan's file") from None
    except ValueError as error:
        raise UserError(f"{file}: is no TOML: {error}") from None
    try:
        return _plan(words, file)
    except (TypeError, ValueError, AttributeError) as error:
        advice = "compare docs/experiments.md"
        raise UserError(f"{file}: holds a value of the wrong kind ({error}); {advice}") from None


def _plan(words: dict[str, Any], file: Path) -> Plan:
    known = {"profile", "draws", "methods", "measures", "contrasts", "settings", "data", "videos"}
    if unknown := set(words) - known:
        raise UserError(f"{file}: unknown {min(unknown)!r}; a plan has {', '.join(sorted(known))}")
    name = words.get("profile", "smoke")
    if name not in PROFILES:
        raise UserError(f"{file}: profile {name!r} is none of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if "methods" in words:
        profile = replace(profile, methods=tuple(words["methods"]))
    settings = {}
    for setting, fields in words.get("settings", {"main": {}}).items():
        changed = profile
        for name, value in fields.items():
            changed = _set(changed, name, value, f"{file}: settings.{setting}: {name}")
        check_profile(changed)
        settings[setting] = changed
    draws, contrasts = words.get("draws"), words.get("contrasts", ())
    if not (isinstance(draws, list) and draws and all(isinstance(d, int) for d in draws)):
        raise UserError(f"{file}: draws: give numbers, one for each time that all is drawn anew")
    if len(set(draws)) < len(draws):
        raise UserError(f"{file}: draws: give each number once")
    measures = words.get("measures", ["accuracy"])
    if not (isinstance(measures, list) and measures and all(isinstance(m, str) for m in measures)):
        raise UserError(f'{file}: measures: give columns of the results, as ["accuracy"]')
    first, *others = settings.items()
    students = {*first[1].methods, *(f"{s}/{m}" for s, p in others for m in p.methods)}
    if unknown := {name for pair in contrasts for name in pair} - students:
        raise UserError(f"{file}: contrasts: {min(unknown)!r} is no student of this plan")
    data = (file.parent / words["data"]).resolve() if "data" in words else None
    pairs, videos = tuple((a, b) for a, b in contrasts), words.get("videos", {})
    return Plan(tuple(draws), settings, pairs, tuple(measures), data, videos)


def _teachers_of(run: Run) -> str:
    """Return a fingerprint of all that a teacher of a run depends on but its task."""
    profile = run.profile
    fitted = replace(profile.teachers, tasks=(), strides=(), impostors=False)
    return fingerprint(profile.motion, profile.view, profile.storage, fitted, run.data)


def _adopt(run: Run, earlier: list[Run]) -> None:
    """Link finished teachers that an earlier run has made from the same videos and settings."""
    (seed,) = run.profile.seeds
    for other in earlier:
        if _teachers_of(other) != _teachers_of(run):
            continue
        for task in set(run.profile.teachers.tasks) & set(other.profile.teachers.tasks):
            folder, made = (r.teacher_folder(seed, task) for r in (run, other))
            same = run.profile.view_of(task) == other.profile.view_of(task)
            if same and is_done(made) and not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.symlink_to(os.path.relpath(made, folder.parent))


def _one(run: Run, earlier: list[Run]) -> None:
    """Do one run, in this process."""
    steps.execute(run, workers=1, begun=partial(_adopt, run, earlier))


def execute(plan: Plan, out: Path, cache: Path, device: str, workers: Workers) -> pd.DataFrame:
    """Do what is left of a plan; write and return its results.

    ``results.csv`` (and ``results.parquet``, where pyarrow is installed) has one row a teacher and
    a student, with the setting, the draw and its network; ``edges.csv`` one row a setting, draw and
    kind of edges: how often their mixture is right on unlabelled clips, and the weight at home.
    """
    done: list[tuple[str, int, Run]] = []
    earlier: list[list[Run]] = [[] for _ in plan.draws]  # runs so far of each draw
    for name, runs in zip(plan.settings, plan.runs(out, cache, device), strict=True):
        for run in runs:
            if run.data:  # decoded once, by all workers, before draws that may share it begin
                run.videos(workers)
        jobs = list(zip(runs, earlier, strict=True))
        over_processes(_one, jobs, workers, title=name, unit="draw")
        for draw, run, made in zip(plan.draws, runs, earlier, strict=True):
            made.append(run)
            done.append((name, draw, run))
    tables = [_results(run).assign(setting=name, draw=draw) for name, draw, run in done]
    results = pd.concat(tables, ignore_index=True)
    save_results(out / "results.csv", results)
    if find_spec("pyarrow"):
        with atomic(out / "results.parquet") as temporary:
            results.to_parquet(temporary, index=False)
    edges = [
        {"setting": name, "draw": draw, "edges": folder.name} | load_json(folder / "result.json")
        for name, draw, run in done
        for folder in sorted(run.folder.glob("seed*/graphs*"))
    ]
    columns = ["setting", "draw", "edges", "target", "at_home"]
    save_results(out / "edges.csv", pd.DataFrame(edges).reindex(columns=columns))
    save_json(out / "plan.json", {"contrasts": plan.contrasts, "measures": plan.measures})
    return results


def _results(run: Run) -> pd.DataFrame:
    """Return a run's results with the name of each model's network."""
    cfg, table = run.profile, run.results()
    named = dict.fromkeys(table["name"], cfg.distillation.student)
    for task in cfg.teachers.tasks:
        own = isinstance(find_source(task), OwnBackbone)
        named[task] = task if own else cfg.teachers.backbone
    return table.assign(network=[named[name] for name in table["name"]])
