"""Distil several self-supervised video teachers into one light student through two graphs.

What a researcher imports is here; each name is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdviz.config import PROFILES, Profile
    from gdviz.core.files import UserError
    from gdviz.data.videos import load_videos
    from gdviz.graphs import LogitsGraph, RepresentationGraph
    from gdviz.student.distill import distill
    from gdviz.student.edges import build_graphs, learn_edges
    from gdviz.student.predict import load_student
    from gdviz.teachers.fit import fit_teacher, pretrain

__version__ = "0.1.0"
__all__ = ["PROFILES", "LogitsGraph", "Profile", "RepresentationGraph", "UserError", "build_graphs"]
__all__ += ["distill", "fit_teacher", "learn_edges", "load_student", "load_videos", "pretrain"]
_ROOMS = {
    "config": ("PROFILES", "Profile"),
    "core.files": ("UserError",),
    "data.videos": ("load_videos",),
    "graphs": ("LogitsGraph", "RepresentationGraph"),
    "student.distill": ("distill",),
    "student.edges": ("build_graphs", "learn_edges"),
    "student.predict": ("load_student",),
    "teachers.fit": ("fit_teacher", "pretrain"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"gdviz.{room}"), name)
    raise AttributeError(f"module 'gdviz' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
