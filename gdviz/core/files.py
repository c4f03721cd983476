"""Files that are either whole or absent: atomic writes, fingerprints, JSON, safe tensors."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, without a traceback."""


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` and rename it into place on success.

    A reader, a crash or a full disk therefore never meets a half-written file.

    Raises:
        UserError: the disk refused the write; ``path`` is left as it was.
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


def plain(value: Any) -> Any:
    """Return dataclasses, paths and tuples as what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type, value: dict[str, Any]) -> Any:
    """Return the dataclass that :func:`plain` made ``value`` of; lists become tuples."""
    types, known = get_type_hints(kind), {}
    for name, v in value.items():
        if is_dataclass(types[name]):
            v = from_plain(types[name], v)
        known[name] = tuple(v) if isinstance(v, list) else v
    return kind(**known)


def fingerprint(*values: Any) -> str:
    """Return sixteen hexadecimal digits that change when any of ``values`` does."""
    text = json.dumps([plain(v) for v in values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_json(path: Path | str, value: Any) -> None:
    """Write what :func:`plain` makes of a value as JSON.

    Raises:
        UserError: the disk refused the write.
    """
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1) + "\n")


def save_jsonl(path: Path | str, rows: list[dict[str, Any]]) -> None:
    """Write one line of JSON a row; errors as :func:`save_json`."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(plain(row)) + "\n" for row in rows))


def _load(path: Path | str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(f"{path} is not JSON ({error}); delete it to have it made again") from None


def load_json(path: Path | str) -> Any:
    """Raise UserError when the file is missing or is not JSON."""
    return _load(path, json.loads)


def load_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Raise UserError when the file is missing or a line of it is not JSON."""
    return _load(path, lambda text: [json.loads(line) for line in text.splitlines()])


def save_tensors(path: Path | str, tensors: dict[str, Tensor], **meta: Any) -> None:
    """Write tensors and a JSON description as one safetensors file."""
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    seen: set[int] = set()
    for key, value in flat.items():  # tied weights share memory, which the format refuses
        if value.untyped_storage().data_ptr() in seen:
            flat[key] = value.clone()
        seen.add(value.untyped_storage().data_ptr())
    with atomic(path) as temporary:
        save_file(flat, temporary, metadata={"meta": json.dumps(plain(meta))})


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Raise UserError when the file is missing or damaged."""
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it to have it made again") from None


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
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; raise UserError else. Never unpickles code."""
    try:
        content = Path(path).read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError("wrong checksum")
        return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    except Exception as error:
        told = isinstance(error, OSError | ValueError)
        reason = str(error).splitlines()[0] if told else type(error).__name__
        problem = f"{path} is damaged, or no checkpoint ({reason})"
        raise UserError(f"{problem}; delete it to start that step again") from None
