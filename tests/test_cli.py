"""The command line: a mistake is one line that names it, exit code 1, and leaves nothing behind."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from gdviz import cli, commands
from gdviz.config import PROFILES
from gdviz.experiment.folder import open_run
from gdviz.experiment.tables import table


@pytest.fixture
def gdviz(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder: (exit code, what it said)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "draw_figures", lambda run, out: [])
    monkeypatch.setitem(PROFILES, "smoke", TINY)

    def call(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gdviz", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        seen = capsys.readouterr()
        return code, seen.out + seen.err

    return call


def complaint(answer: tuple[int, str]) -> str:
    code, text = answer
    assert code == 1, text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("gdviz: ")]
    return line


WRONG = {
    "profile": (("--profile", "huge"), "--profile huge"),
    "no profile": (("--profile",), "--profile"),
    "device": (("--device", "warp"), "--device warp"),
    "no device": (("--device", "meta"), "--device meta"),
    "no such cuda": (("--device", "cuda:99"), "--device cuda:99"),
    "workers": (("--workers", "-1"), "--workers -1"),
    "task": (("--teachers.tasks", "order", "jigsaw"), "--teachers.tasks: unknown task 'jigsaw'"),
    "strides": (
        ("--teachers.tasks", "order", "--teachers.strides", "1", "2"),
        "--teachers.strides: 2 strides for 1 tasks",
    ),
    "backbone": (("--teachers.backbone", "vit"), "--teachers.backbone vit"),
    "method": (("--methods", "magic"), "--methods: unknown method 'magic'"),
    "data": (("--data", "nowhere"), "--data nowhere: no such folder"),
}


@pytest.mark.parametrize(("words", "named"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(gdviz, tmp_path, words, named):
    assert named in complaint(gdviz("run", *words, "--out", "run", "--cache", "data"))
    assert list(tmp_path.iterdir()) == []


def test_wrong_types_and_unknown_flags_do_not_start(gdviz, tmp_path):
    for words in (("--seeds", "x"), ("--nonsense", "1"), ("--distillation.distance", "far")):
        code, text = gdviz("run", *words)
        assert code == 2
        assert words[0] in text
    assert list(tmp_path.iterdir()) == []


def test_usage(gdviz):
    for words in ((), ("--help",), ("-h",)):
        code, text = gdviz(*words)
        assert (code, text.split()[:3]) == (0, ["usage:", "gdviz", "run"])
    assert gdviz("walk")[0] == 2
    code, text = gdviz("run", "--help")
    assert code == 0
    for flag in (
        "--data",
        "--out",
        "--cache",
        "--workers",
        "--device",
        "--teachers.tasks",
        "--distillation.schedule.epochs",
        "--seeds",
    ):
        assert flag in text


FOLDERS = {
    "empty": ({}, "no videos"),
    "no videos": ({"a/x.txt": 1, "b/y.png": 1}, "no videos"),
    "one class": ({"a/1.mp4": 1, "a/2.mp4": 1, "a/3.mp4": 1}, "1 class found (a)"),
    "no class": ({"1.mp4": 1, "2.mp4": 1}, "0 class found"),
    "one clip": (
        {"a/1.mp4": 1, "a/2.mp4": 1, "a/3.mp4": 1, "b/4.mp4": 1},
        "class 'b' has 1 usable clip",
    ),
    "one group": (
        {f"{c}/v_X_g01_c0{i}.mp4": 1 for c in "ab" for i in range(4)},
        "no split by group",
    ),
}


@pytest.mark.parametrize(("files", "reason"), FOLDERS.values(), ids=FOLDERS)
def test_folders_that_cannot_be_learned_from(gdviz, tmp_path, files, reason):
    (tmp_path / "videos").mkdir()
    for name in files:
        (tmp_path / "videos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(b"x")
    line = complaint(gdviz("run", "--data", "videos", "--out", "run", "--workers", "1"))
    assert reason in line
    assert os.listdir(tmp_path) == ["videos"]


def test_damaged_and_missing_videos_are_skipped_and_listed(gdviz, tmp_path, video_folder):
    root = video_folder(count=6)
    (root / "a" / "a3.mp4").write_bytes(b"nothing")
    rows = [f"videos/{p.relative_to(root)},{p.parent.name}" for p in sorted(root.rglob("*.mp4"))]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows, "videos/gone.mp4,b"]))
    flags = ("--data", "list.csv", "--workers", "1", "--methods", "labels", "--cache", "cache")
    flags += ("--teachers.tasks", "order", "--teachers.strides", "2")
    code, text = gdviz("run", *flags, "--out", "run")
    assert code == 0, text
    for line in (
        "2 skipped",
        "skipped videos/a/a3.mp4: ",
        "skipped videos/gone.mp4: ",
        "baseline: metadata",
        "baseline: mean-frame",
    ):
        assert line in text
    listed = (tmp_path / "run" / "skipped.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in listed] == ["path", "videos/a/a3.mp4", "videos/gone.mp4"]
    assert all(line.partition(",")[2] for line in listed)


def test_only_damaged_videos_left(gdviz, tmp_path, video_folder):
    root = video_folder(count=4)
    for i in range(3):
        (root / "b" / f"b{i}.mp4").write_bytes(b"nothing")
    line = complaint(gdviz("run", "--data", root, "--out", "run", "--workers", "1"))
    assert "class 'b' has 1 usable clip" in line
    assert not (tmp_path / "run").exists()


def test_data_check_says_what_is_there_and_what_cannot_be_read(gdviz, tmp_path, video_folder):
    root = video_folder(count=3)
    code, text = gdviz("data", "check", root)
    assert (code, text.split()) == (0, ["a:", "3", "videos", "b:", "3", "videos"])
    (root / "a" / "a1.mp4").write_bytes(b"nothing")
    code, text = gdviz("data", "check", root, "--verify", "--cache", "cache", "--csv", "list.csv")
    assert code == 1
    assert f"refused {root}/a/a1.mp4: cannot be decoded" in text
    assert "5 of 6 videos can be read" in text
    assert len((tmp_path / "list.csv").read_text().splitlines()) == 7
    (root / "classInd.txt").write_text("1 a\r\n2 b\r\n")
    for part, i in (("train", 0), ("test", 9)):
        (root / f"{part}list01.txt").write_text(f"a/a{i}.mp4 1\r\nb/b{i}.mp4 2\r\n")
    code, text = gdviz("data", "check", root)
    assert code == 1
    for words in (
        "UCF101: 2 of 4 videos, 2 classes",
        "train: 2 of 2",
        "test: 0 of 2; missing a9.mp4",
        "https://www.crcv.ucf.edu",
        "terms: ",
    ):
        assert words in text
    assert "--split 4: choose 1, 2 or 3" in complaint(gdviz("data", "check", root, "--split", "4"))
    assert "nowhere: no such folder" in complaint(gdviz("data", "check", "nowhere"))
    assert "--lists videos/a: holds the lists of none" in complaint(
        gdviz("data", "check", root, "--lists", "videos/a")
    )
    assert "unknown" in complaint(gdviz("data", "get"))


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    gdviz, tmp_path, finished, monkeypatch
):
    words = (
        "run",
        "--methods",
        "labels",
        "--out",
        "run",
        "--cache",
        finished.cache,
        "--workers",
        "1",
    )
    for broken in (1, 3, 5):  # the run's configuration, its environment, a teacher
        calls = []

        def full(fd, broken=broken, calls=calls):
            calls.append(fd)
            if len(calls) >= broken:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert "No space left on device; free some space" in complaint(gdviz(*words))
        assert not list(tmp_path.rglob("*.part"))
    code, text = gdviz(*words)
    assert code == 0, text
    assert "student: labels" in text


def test_foreign_folders_are_refused(gdviz, tmp_path, finished):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert "--out mine: is not empty" in complaint(
        gdviz("run", "--out", "mine", "--cache", finished.cache)
    )
    line = complaint(
        gdviz("run", "--out", finished.folder, "--cache", finished.cache, "--teachers.folds", "3")
    )
    assert "another configuration (profile differ)" in line
    assert "holds no run" in complaint(gdviz("figures", "mine"))
    assert "holds no run" in complaint(gdviz("figures", "nowhere"))
    assert "holds no run" in complaint(gdviz("evaluate", "nowhere"))
    assert "--device warp" in complaint(gdviz("evaluate", finished.folder, "--device", "warp"))


def test_the_table_of_a_finished_run(gdviz, finished):
    code, text = gdviz("run", "--out", finished.folder, "--cache", finished.cache, "--workers", "1")
    assert code == 0
    assert table(open_run(finished.folder)) in text


def test_as_a_program(tmp_path):
    """From outside, without ONNX: exit code, one line on stderr, nothing on stdout."""
    (tmp_path / "list.csv").write_text("file\nx.mp4\n")
    code = "import sys; sys.modules |= {'onnx': None, 'onnxruntime': None, 'onnxscript': None};"
    code += "from gdviz.cli import main; main()"
    program = [sys.executable, "-c", code, "run", "--data", "list.csv", "--device", "cpu"]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "gdviz: --data list.csv: needs a header line with at least the column 'path'"
    )


def test_ranks_take_no_numbered_gpu(monkeypatch, capsys):
    monkeypatch.setattr(commands.distributed, "start", lambda **_: None)
    monkeypatch.setattr(commands.distributed, "world", lambda: 2)
    monkeypatch.setattr(commands, "_device", lambda name: name)
    with pytest.raises(SystemExit, match=r"--device cuda:1: `torchrun` gives each process"):
        commands.execute("run", ["--device", "cuda:1"])
