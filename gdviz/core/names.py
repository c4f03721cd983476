"""Names that a user gives: one of ours, or MODULE:NAME for an object in a file of theirs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from gdviz.core.files import UserError, in_a_line


def split_home(name: str) -> tuple[str, str]:
    """Return the task and the home of TASK@HOME; the home is empty where none is given."""
    task, _, home = name.partition("@")
    return task, home


def folder_name(name: str) -> str:
    """Return a name as a folder's: MODULE:NAME becomes MODULE.NAME."""
    return re.sub(r"[^\w.+@-]", ".", name)


def resolve(name: str, known: Mapping[str, Any], what: str) -> Any:
    """Return ``known[name]``, or the object MODULE:NAME; the working folder is searched, too.

    Raises UserError if there is no such thing; the message names ``what`` and near names.
    """
    module, own, attribute = name.partition(":")
    if name in known:
        return known[name]
    if not own:
        choice = f"choose from {', '.join(known)}, or MODULE:NAME of your own"
        raise UserError(f"unknown {what} {name!r}{_near(name, known)}; {choice}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except Exception as error:  # whatever a file of the user's raises
        raise UserError(f"{what} {name!r}: {in_a_line(error)}") from error
    if not hasattr(found, attribute):
        near = _near(attribute, vars(found))
        raise UserError(f"{what} {name!r}: {module} has no {attribute!r}{near}")
    return getattr(found, attribute)


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known)
    return f" (near: {', '.join(near)})" if near else ""
