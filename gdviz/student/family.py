"""Students by name."""

from __future__ import annotations

from gdviz.teachers.backbones import Classifier, build_backbone


def build_student(name: str, classes: int) -> Classifier:
    """Build an untrained student: a light backbone and a linear head.

    Args:
        name: see :func:`gdviz.teachers.backbones.build_backbone`; ``tiny8n`` for instance.
        classes: of the data.

    Raises:
        UserError: unknown name.
    """
    return Classifier(build_backbone(name), classes)
