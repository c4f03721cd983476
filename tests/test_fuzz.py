"""Whatever a user gives a command ends in its work, in usage, or in one line: never a traceback."""

import io
import os
import shutil
import sys
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdviz import cli, commands
from gdviz.config import Profile
from gdviz.core.files import UserError
from gdviz.data import videos as sets
from gdviz.data._encode import encode
from gdviz.data.motion import render
from gdviz.experiment import bench, grid
from gdviz.experiment import folder as folders
from gdviz.experiment.checks import check_profile


def flags_of(kind: type, prefix: str = "--") -> list[str]:
    found = []
    for name, hint in get_type_hints(kind).items():
        flag = prefix + name.replace("_", "-")
        found += flags_of(hint, f"{flag}.") if is_dataclass(hint) else [flag]
    return found


FLAGS = [*flags_of(Profile), "--profile", "--device", "--workers", "--cache", "--out"]


def one_of(words: str) -> st.SearchStrategy[str]:
    return st.sampled_from(words.split())


def text(size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_characters="/"), max_size=size)  # stays in its folder


NUMBERS = one_of("0 1 2 3 8 16 -1 0.5 1e400 nan inf 4294967296 1000000000000 True")
NAMES = one_of(
    "x order contrast order@plain order@nowhere @ : a:b math:pi math: json:dumps labels "
    "both-graphs kd-best kd- learned smoke paper cpu meta cuda:99 none tiny4 tiny0 tiny99999999999 "
    "r3d_18 memmap transcode mmd . .. /dev/null here/videos here/list.csv $^$ - -- --seeds ="
)
OPTION = st.tuples(
    st.sampled_from(FLAGS), st.lists(NUMBERS, max_size=2) | st.lists(NAMES | text(6), max_size=3)
)
OPTIONS = st.lists(OPTION, max_size=4).map(lambda pairs: [w for f, vs in pairs for w in (f, *vs)])

FOLDERS = st.lists(one_of("a b c train test val unlabelled .x v_a a:b lists pay_$^$"), max_size=3)
FILES = one_of(
    "1.mp4 2.avi 3.webm v_a_g01_c01.mp4 x.txt classInd.txt trainlist01.txt testlist01.txt "
    "a_test_split1.txt trainVidID.txt trainLabel.txt categoryName.txt index.csv"
)
PLACES = st.lists(st.tuples(FOLDERS, FILES, st.integers(0, 4)), max_size=9)
FIELDS = one_of("path label split group videos/a/1.mp4 a/1.mp4 7 0 train test") | text(4)
LINES = st.lists(st.lists(FIELDS, max_size=4), max_size=8)
LISTS = st.binary(max_size=40) | st.tuples(st.sampled_from(",;\t "), LINES).map(
    lambda drawn: "\n".join(map(drawn[0].join, drawn[1])).encode("utf-8", "surrogatepass")
)
CLASSES = [
    (f"{part}/{c}".strip("/"), i) for part in ("", "train", "test") for c in "ab" for i in range(3)
]
PLAN = st.lists(
    st.sampled_from(
        [
            "draws = [0, 1]", "draws = 2", "draws = []", "[settings.one]", "[settings.one.view]",
            "[settings]", "size = 16", "size = 'x'", "methods = ['labels']", "profile = 'smoke'",
            "profile = 3", "data = 'here/videos'", "contrasts = [['one', 'two']]", "seeds = [0]",
            "x = {", "[[", "a.b = 1", "[settings.two]", "methods = 3", "contrasts = 2", "data = 1",
            "view.size = 16", "contrasts = [['a']]", "settings = 3", "measures = 2", "draws = [-1]",
            "profile = []", "methods = [1]", "settings.one = 4", "seeds = 3", "view = 2",
        ]
    ),
    max_size=6,
).map("\n".join)  # fmt: skip
SOURCES = text(4) | one_of(
    "here/videos here/list.csv here/plan.toml here/run here nowhere /dev/null here/videos/a"
)
CHECKS = st.lists(
    one_of(
        "--verify --csv here/out.csv /dev/null --lists here/videos --split 2 9 x --cache here/c "
        "here/list.csv --workers 1 -1"
    ),
    max_size=5,
)
WINDOWS = one_of("--window --every 2 0 nan -1 inf 0.1 --int8 --threads -3 x --raw 16x16@12 0x0 a")
BENCHES = one_of("--view 8x24x24 0x0x0 8x24 x --threads 0 2 -1 --exports here/model here --video")
OUTS = st.sampled_from([["--out", "here/e"], ["--out", "here/list.csv", "--dry"], ["--dry"], []])


def command(first: str, source: st.SearchStrategy, *rest: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(source, *rest).map(lambda p: [*first.split(), p[0], *chain(*p[1:])])


COMMANDS = st.one_of(
    command("run --data", SOURCES, OPTIONS),
    command("run --data", st.just("here/videos"), OPTIONS),
    command("data check", SOURCES, CHECKS),
    command("evaluate", SOURCES, st.sampled_from([[], ["--device", "x"]])),
    command("figures", SOURCES, OUTS),
    command("experiment", SOURCES, OUTS),
    command("experiment", st.just("here/plan.toml"), OUTS),
    command("report", SOURCES),
    command("export", SOURCES, OUTS),
    command("export here/run --method", NAMES, st.just(["--out", "here/e"])),
    command("bench here/run --yardsticks", NAMES, st.lists(BENCHES | SOURCES, max_size=4)),
    command("bench here/run --students", NAMES, st.just(["--yardsticks", "shift-small"])),
    command("predict here/model", SOURCES, st.lists(SOURCES | WINDOWS | st.just("-"), max_size=4)),
    command("predict", SOURCES, st.lists(SOURCES, max_size=2)),
    command("", text(5), st.lists(text(5), max_size=3)),
)


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> list[bytes]:
    """Two videos, a cut one, junk and nothing."""
    root = tmp_path_factory.mktemp("contents")
    for i in range(2):
        encode(render(i, i, size=32, frames=12), root / f"{i}.mp4")
    good = [(root / f"{i}.mp4").read_bytes() for i in range(2)]
    return [*good, good[0][:-200], b"junk", b""]


def call(words: list[str]) -> int:
    """Run a command here; what is neither an exit code nor one line of ours is raised."""
    sys.argv = ["gdviz", *words]
    try:
        cli.main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            if not stop.code.startswith("gdviz: ") or "\n" in stop.code:
                raise AssertionError(stop.code) from stop
            return 1
        return stop.code or 0
    return 0


def lay_out(root, contents, places, listed, plan, whole) -> None:
    places = [*places, *(([*part.split("/")], f"{i}.mp4", i % 2) for part, i in whole)]
    for number, (folders_of, name, content) in enumerate(places):
        path = root.joinpath("videos", *folders_of, name)
        if not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                lines = f"a/v_a_g0{number}_c01.mp4 1\nb/{number}.mp4\n".encode()
                path.write_bytes(lines if name.endswith("txt") else contents[content])
    (root / "videos").mkdir(parents=True, exist_ok=True)
    (root / "list.csv").write_bytes(listed)
    (root / "plan.toml").write_text(plan)


@pytest.fixture
def fuzzed(monkeypatch, tmp_path, contents, finished, exported, unchecked):
    """``check(words, ...)``: one case in a folder of its own; trainings are left out."""

    def until_training(run, **_):
        check_profile(run.profile)
        run.videos()
        raise UserError("far enough")

    def here(source, view, cache, **options):
        return load(source, view, cache, **options | {"workers": 1})

    def nothing(*_, **__):
        raise UserError("far enough")

    load = sets.load_videos
    monkeypatch.setattr(folders, "load_videos", here)
    monkeypatch.setattr(folders, "load_motion", nothing)
    monkeypatch.setattr(commands.steps, "execute", until_training)
    monkeypatch.setattr(grid, "execute", nothing)
    monkeypatch.setattr(commands, "draw_figures", nothing)
    monkeypatch.setattr(commands, "evaluation", nothing)
    monkeypatch.setattr(commands, "bench", nothing)
    monkeypatch.setitem(bench.YARDSTICKS, "r3d_18", lambda classes: torch.nn.Identity())
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)

    def check(words, places, listed, plan, whole) -> None:
        root = tmp_path / "here"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        lay_out(root, contents, places, listed, plan, whole)
        (root / "run").symlink_to(finished.folder)
        (root / "model").symlink_to(exported)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(contents[3])))
        assert call(words) in (0, 1, 2)

    return check


WHOLE = st.sampled_from([[], [row for row in CLASSES if "/" not in row[0]], CLASSES[6:]])
FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=100, derandomize=True, **FUZZ)
@given(COMMANDS, PLACES, LISTS, PLAN, WHOLE)
def test_no_command_shows_a_traceback(fuzzed, words, places, listed, plan, whole):
    fuzzed(words, places, listed, plan, whole)


@pytest.mark.slow
# The gate must not fail by luck: FUZZ_ANEW=1 draws other cases each time, to look for more.
@settings(max_examples=2000, derandomize="FUZZ_ANEW" not in os.environ, **FUZZ)
@given(COMMANDS, PLACES, LISTS, PLAN, WHOLE)
def test_no_command_shows_a_traceback_in_two_thousand_cases(
    fuzzed, words, places, listed, plan, whole
):
    fuzzed(words, places, listed, plan, whole)


def test_the_fuzz_reaches_every_setting_and_gets_through(fuzzed, capsys):
    assert len(FLAGS) > 50 and "--distillation.schedule.epochs" in FLAGS
    assert {f.name for f in fields(Profile)} >= {"view", "seeds"}
    whole = [row for row in CLASSES if "/" not in row[0]]
    fuzzed(["data", "check", "here/videos", "--verify", "--workers", "1"], [], b"", "", whole)
    assert "6 of 6 videos can be read" in capsys.readouterr().out
    fuzzed(["run", "--data", "here/videos", "--out", "here/new"], [], b"", "", whole)
    assert len(list(Path("data/cache").glob("*/index.json"))) == 1  # its videos were read
