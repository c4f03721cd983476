"""Files are whole or absent, and what is wrong with one is told in a line."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from gdviz.core import files
from gdviz.core.files import (
    UserError,
    fingerprint,
    from_plain,
    load_checkpoint,
    load_json,
    load_jsonl,
    load_tensors,
    meta_of,
    plain,
    save_checkpoint,
    save_json,
    save_jsonl,
    save_tensors,
)

WRITERS = {
    "tensors": (
        lambda p, n: save_tensors(p, {"x": torch.full((n,), 1.0)}),
        lambda p: load_tensors(p)["x"].numel(),
    ),
    "checkpoint": (
        lambda p, n: save_checkpoint(p, {"x": torch.full((n,), 1.0)}),
        lambda p: load_checkpoint(p)["x"].numel(),
    ),
    "json": (lambda p, n: save_json(p, {"x": [1] * n}), lambda p: len(load_json(p)["x"])),
    "jsonl": (lambda p, n: save_jsonl(p, [{"x": 1}] * n), lambda p: len(load_jsonl(p))),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, kind):
    """A real failure of the operating system's write, by a limit on file size."""
    resource = pytest.importorskip("resource", reason="needs a limit on file size")
    write, read = WRITERS[kind]
    write(tmp_path / "file", 10)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UserError, match=r"cannot write .*file: .*choose another folder"):
            write(tmp_path / "file", 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert read(tmp_path / "file") == 10


def test_safetensors_errors_and_bad_folders_are_user_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_json(tmp_path / "file" / "below.json", {})

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_tensors(tmp_path / "x.safetensors", {})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [b"\x01", b"\xff\x00garbage", None, "folder"])
@pytest.mark.parametrize("load", [load_json, load_jsonl, load_tensors, load_checkpoint])
def test_unreadable_files_are_named(tmp_path, load, content):
    file = tmp_path / "unreadable"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="unreadable") as caught:
        load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [3, 40, -3])
def test_one_wrong_byte_in_a_checkpoint_is_seen(tmp_path, at):
    save_checkpoint(tmp_path / "x.ckpt", {"x": torch.zeros(100)})
    content = bytearray((tmp_path / "x.ckpt").read_bytes())
    content[at] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="wrong checksum"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Harm()))
    save_checkpoint(tmp_path / "disguised.ckpt", {"x": Harm()})
    for name in ("plain", "disguised"):
        message = rf"{name}\.ckpt is damaged, or no checkpoint.*delete it"
        with pytest.raises(UserError, match=message):
            load_checkpoint(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "harm").exists()


def test_tensors_come_back_with_their_description_tied_ones_too(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    save_tensors(tmp_path / "x", {"x": x, "tied": x, "turned": x.T}, view=(1, Path("a")))
    loaded = load_tensors(tmp_path / "x")
    assert all(torch.equal(loaded[k], v) for k, v in {"x": x, "tied": x, "turned": x.T}.items())
    assert meta_of(tmp_path / "x") == {"view": [1, "a"]}
    assert meta_of(tmp_path / "none") == {} and meta_of(tmp_path) == {}


@dataclass(frozen=True)
class Inner:
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers()), st.text(), st.lists(st.dictionaries(st.text(), JSON), max_size=5))
def test_what_json_knows_comes_back(tmp_path_factory, numbers, name, rows):
    outer, folder = Outer(Inner(tuple(numbers)), name), tmp_path_factory.getbasetemp()
    save_json(folder / "outer.json", outer)
    assert from_plain(Outer, load_json(folder / "outer.json")) == outer
    save_jsonl(folder / "rows.jsonl", rows)
    assert load_jsonl(folder / "rows.jsonl") == rows == plain(rows)


def test_a_fingerprint_changes_with_every_value():
    outer = Outer(Inner((1, 2)), "a")
    values = [(outer,), (outer, 0), (Outer(Inner((1, 3)), "a"),), (Outer(Inner((1, 2)), "b"),), ()]
    assert len({fingerprint(*v) for v in values}) == len(values)
    assert fingerprint(outer) == fingerprint(Outer(Inner((1, 2)), "a"))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
