"""Distilling several self-supervised video teachers into one light student through two graphs."""

from gdviz.artefacts import UserError
from gdviz.config import PROFILES, Profile

__version__ = "0.1.0"
__all__ = ["PROFILES", "Profile", "UserError", "__version__"]
