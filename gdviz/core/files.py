"""Files that are either whole or absent: atomic writes, fingerprints, JSONL, safe tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


class UserError(Exception):
    """A mistake the user can mend: printed as one line, without a traceback."""


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary sibling of ``path`` and renames it into place on success.

    A reader, a crash or a full disk therefore never meets a half-written file.

    Raises:
        UserError: the disk refused the write; ``path`` is left as it was.
    """
    path = Path(path)
    # Keeps two workers that write the same artefact apart.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {error}; free some space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: type, value: dict[str, Any]) -> Any:
    """The dataclass that ``plain`` made ``value`` of; lists become tuples."""
    types = get_type_hints(kind)
    known = {
        name: from_plain(types[name], v)
        if dataclasses.is_dataclass(types[name])
        else tuple(v)
        if isinstance(v, list)
        else v
        for name, v in value.items()
    }
    return kind(**known)


def fingerprint(*values: Any) -> str:
    """Sixteen hexadecimal digits that change when any of ``values`` does."""
    text = json.dumps([plain(v) for v in values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_json(path: Path | str, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1) + "\n")


def save_jsonl(path: Path | str, rows: list[dict[str, Any]]) -> None:
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(plain(row)) + "\n" for row in rows))


def load_json(path: Path | str) -> Any:
    """Raises UserError when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(f"{path} is not JSON ({error}); delete it to have it made again") from None


def save_tensors(path: Path | str, tensors: dict[str, Tensor], **meta: Any) -> None:
    """Tensors and a JSON description in one safetensors file."""
    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    seen: set[int] = set()
    for key, value in flat.items():  # tied weights share memory, which the format refuses
        if value.untyped_storage().data_ptr() in seen:
            flat[key] = value.clone()
        seen.add(value.untyped_storage().data_ptr())
    with atomic(path) as temporary:
        save_file(flat, temporary, metadata={"meta": json.dumps(plain(meta))})


def load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Raises UserError when the file is missing or damaged."""
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it to have it made again") from None


def meta_of(path: Path | str) -> dict[str, Any]:
    """The description that :func:`save_tensors` wrote; {} where there is no such file."""
    if not Path(path).exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("meta", "{}"))
    except (OSError, SafetensorError):
        return {}


def save_checkpoint(path: Path | str, state: dict[str, Any]) -> None:
    """Module and optimiser state, nested as PyTorch nests it, after its SHA-256; read back with ``weights_only``."""
    content = io.BytesIO()
    torch.save(state, content)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Raises UserError when the file is damaged or not one of :func:`save_checkpoint`; never unpickles code."""
    try:
        content = Path(path).read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError("wrong checksum")
        return torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (
            str(error).splitlines()[0]
            if isinstance(error, OSError | ValueError)
            else type(error).__name__
        )
        raise UserError(
            f"{path} is damaged, or no checkpoint ({reason}); delete it to start that step again"
        ) from None
