"""Students by name."""

from gdviz.teachers.backbones import Classifier, build_backbone


def build_student(name: str, classes: int) -> Classifier:
    """Build an untrained student: a light backbone and a linear head.

    Raises:
        UserError: no such name (see :func:`gdviz.teachers.backbones.build_backbone`).
    """
    return Classifier(build_backbone(name), classes)
