"""Files that are either whole or absent: atomic writes, fingerprints, JSON, safe tensors."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, without a traceback."""


def in_a_line(error: BaseException) -> str:
    """Return what an error of anybody's code says, in one line."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + next(iter(str(error).strip().splitlines()), "(no reason given)")


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` and rename it into place on success.

    Raises UserError if the disk refuses the write; ``path`` is then left as it was.
    """
    path = Path(path)
    # Two workers that write the same file stay apart.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        advice = "free some space or choose another folder"
        raise UserError(f"cannot write {path}: {error}; {advice}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _simpler(x: Any) -> Any:
    return vars(x) if is_dataclass(x) else os.fspath(x)


_json = partial(json.dumps, default=_simpler)


def plain(value: Any) -> Any:
    """Return what comes back when dataclasses, paths and tuples are written as JSON."""
    return json.loads(_json(value))


def from_plain(kind: type, value: dict[str, Any]) -> Any:
    """Return the dataclass that ``value``, read from JSON, was; lists become tuples."""
    types, known = get_type_hints(kind), {}
    for name, v in value.items():
        if is_dataclass(types[name]):
            v = from_plain(types[name], v)
        known[name] = tuple(v) if isinstance(v, list) else v
    return kind(**known)


def fingerprint(*values: Any) -> str:
    """Return sixteen hexadecimal digits that change when any of ``values`` does."""
    return hashlib.sha256(_json(values, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_json(path: Path | str, value: Any) -> None:
    """Write a value as :func:`plain` sees it; raise UserError if the disk refuses."""
    with atomic(path) as temporary:
        temporary.write_text(_json(value, indent=1) + "\n")


def save_jsonl(path: Path | str, rows: list[dict[str, Any]]) -> None:
    """Write one line of JSON a row; errors as :func:`save_json`."""
    with atomic(path) as temporary:
        temporary.write_text("".join(_json(row) + "\n" for row in rows))


def _load(
    path: Path | str,
    read: Callable[[Path], Any],
    wrong: str = "not JSON",
    advice: str = "have it made again",
) -> Any:
    """Return what ``read`` makes of a file; raise UserError when it is missing or wrong."""
    try:
        return read(Path(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:
        told = isinstance(error, ValueError | SafetensorError)  # torch.load would say: trust it
        reason = str(error).splitlines()[0] if told else type(error).__name__
        raise UserError(f"{path} is {wrong} ({reason}); delete it to {advice}") from None


def load_json(path: Path | str) -> Any:
    """Raise UserError when the file is missing or is not JSON."""
    return _load(path, lambda file: json.loads(file.read_text()))


def load_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Raise UserError when the file is missing or a line of it is not JSON."""
    return _load(path, lambda file: [json.loads(row) for row in file.read_text().splitlines()])


def save_tensors(path: Path | str, tensors: dict[str, Tensor], **meta: Any) -> None:
    """Write tensors and a JSON description as one safetensors file."""
    # copies, as the format refuses memory that two tensors share, such as tied weights
    copies = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    with atomic(path) as temporary:
        save_file(copies, temporary, metadata={"meta": _json(meta)})


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Raise UserError when the file is missing or damaged."""
    return _load(path, load_file, "damaged")


def meta_of(path: Path | str) -> dict[str, Any]:
    """Return the description that :func:`save_tensors` wrote; {} where there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("meta", "{}"))
    except (OSError, SafetensorError):
        return {}


def save_checkpoint(path: Path | str, state: dict[str, Any]) -> None:
    """Write states of modules and optimisers, nested as PyTorch nests them, after a SHA-256."""
    content = io.BytesIO()
    torch.save(state, content)
    with atomic(path) as temporary:
        digest = hashlib.sha256(content.getbuffer()).digest()
        temporary.write_bytes(digest + content.getbuffer())


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; raise UserError else. Never unpickles code."""

    def read(file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError("wrong checksum")
        return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)

    return _load(path, read, "damaged, or no checkpoint", "start that step again")
