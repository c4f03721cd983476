"""Distilling several self-supervised video teachers into one light student through two graphs."""

from gdviz.config import PROFILES, Profile
from gdviz.core.files import UserError

__version__ = "0.1.0"
__all__ = ["PROFILES", "Profile", "UserError", "__version__"]
