"""Labelling videos with an export: the frames of training, bounded memory, one line a mistake."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import REPO
from torch.nn.functional import interpolate

from gdviz.data.motion import encode, render
from gdviz.data.reading import EXTENSIONS, read_square
from gdviz.student import predict
from gdviz.student.predict import HELD, CannotLabel, Stretch, main, square

pytest.importorskip("onnxscript")


@pytest.fixture
def video(tmp_path):
    def make(name="clip.mp4", frames=20, size=48):
        path = tmp_path / name
        encode(render(1, 3, size=size, frames=frames), path)
        return str(path)

    return make


@pytest.mark.parametrize("shape", [(48, 48), (31, 77), (300, 200), (10, 12)])
def test_resizing_is_that_of_training(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = interpolate(image, (24, 24), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert np.abs(square(pixels, 24).astype(float) - expected.numpy()).max() <= 0.51


def test_a_video_is_seen_as_in_training_and_answered_as_by_pytorch(exported, finished, video):
    student = predict.load_student(exported)
    view = finished.profile.view
    frames, _ = read_square(video(frames=30), view.frames, view.size)
    seen = []
    ask = student.probabilities
    student.probabilities = lambda x: (seen.append(x), ask(x))[1]
    (found,) = student.predict(video(frames=30))
    apart = np.abs(seen[0].astype(float) - frames.numpy())
    assert apart.mean() < 0.5 and apart.max() <= 2
    assert found.start == 0 and found.end == pytest.approx(30 / 12)
    p = ask(seen[0])
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert found.top[0] == (student.labels[p.argmax()], round(float(p.max()), 4))


def test_a_long_stretch_is_held_in_bounded_memory_and_spread_evenly():
    stretch = Stretch(0.0)
    for n in range(100_000):
        stretch.add(np.full((1, 1, 3), n, np.float64) if stretch.wants() else None)
        assert len(stretch.frames) <= HELD
    wanted = np.linspace(0, 99_999, 24)
    assert np.abs(stretch.spread(24)[:, 0, 0, 0] - wanted).max() <= 100_000 / HELD * 2
    short = Stretch(0.0)
    for n in range(100):
        short.add(np.full((1, 1, 3), n))
    assert (short.spread(7)[:, 0, 0, 0] == np.linspace(0, 99, 7).round()).all()


def test_of_a_short_stretch_the_last_frame_is_held_where_training_keeps_a_frame_rate(
    exported, finished, video
):
    student, view, seen = predict.load_student(exported), finished.profile.view, []
    student.about["fps"] = 4.0  # twelve frames are three seconds of it
    ask = student.probabilities
    student.probabilities = lambda x: (seen.append(x), ask(x))[1]
    path = video(frames=18)  # 1.5 s
    (found,) = student.predict(path)
    assert (found.start, found.end) == (0, 1.5)
    frames, _ = read_square(path, view.frames, view.size, fps=4.0)
    apart = np.abs(seen[0].astype(float) - frames.numpy())
    assert (apart.mean((1, 2, 3)) > 2).sum() <= 2  # a frame early or late
    assert (seen[0][6:] == seen[0][-1]).all() and (seen[0][0] != seen[0][3]).any()
    long = student.predict(video("long.mp4", frames=84))  # 7 s: less than half is left over
    assert [(p.start, p.end) for p in long] == [(0, 3), (3, 6)]


def test_a_video_whose_last_frame_stays_is_whole_and_one_frame_of_a_broken_one_is_told(
    exported, tmp_path
):
    def write(name: str, frames: int, last: int) -> str:
        with av.open(str(tmp_path / name), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=10, options={"bf": "0", "g": "1"})
            stream.width = stream.height = 48
            for n, pixels in enumerate(render(1, 3, size=48, frames=frames)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = n, Fraction(1, 10)
                for packet in stream.encode(frame):
                    container.mux(packet)
            *packets, ending = stream.encode()
            ending.duration = last  # tenths of a second
            for packet in (*packets, ending):
                container.mux(packet)
        return str(tmp_path / name)

    student = predict.load_student(exported)
    (found,) = student.predict(write("stays.mp4", 12, 400))
    assert not found.warning and found.end > 40
    path = write("cut.mp4", 33, 1)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: data.index(b"mdat") + 1500])
    with pytest.raises(
        CannotLabel, match=r"^1 frame only: nothing moves; it is damaged from 0.1 s"
    ):
        student.predict(path)


def test_after_a_gap_in_the_time_stamps_stretches_go_on_as_before():
    times = [*np.arange(0, 10, 0.5), *np.arange(1000, 1010, 0.5)]
    frame = av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), "rgb24")

    class Numbered(predict.Reel):
        def __init__(self):
            self.count, self.end = 0, 0.0

        def __iter__(self):
            for now in times:
                self.count, self.end = self.count + 1, now + 0.5
                yield now, frame

    found = [(s.start, s.seen) for s, _ in predict.cut(Numbered(), 8, 5.0, 5.0)]
    assert found == [(0, 10), (5, 10), (1000, 10), (1005, 10)]


def test_windows_slide_over_a_video(exported, video):
    student = predict.load_student(exported)
    path = video(frames=60)  # five seconds
    found = student.predict(path, window=2, every=1)
    assert [(p.start, p.end) for p in found] == [(0, 2), (1, 3), (2, 4), (3, 5), (4, 5)]
    apart = student.predict(path, window=2)
    assert [(p.start, p.end) for p in apart] == [(0, 2), (2, 4), (4, 5)]
    assert [p.top for p in apart[:2]] == [found[0].top, found[2].top]


def test_the_same_files_are_videos_to_training_and_to_labelling():
    assert predict.EXTENSIONS == EXTENSIONS


def damaged(path: str) -> str:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    return path


def silent_sound(path: Path) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def test_every_bad_file_is_a_line_and_the_others_are_labelled(exported, video, tmp_path, capsys):
    good = video()
    (tmp_path / "empty.mp4").write_bytes(b"")
    encode(render(1, 3, size=48, frames=1), tmp_path / "one.mp4")
    bad = {
        str(tmp_path / "none.mp4"): "no such file",
        str(tmp_path / "empty.mp4"): "cannot be opened",
        str(tmp_path / "one.mp4"): "1 frame only",
        silent_sound(tmp_path / "sound.mp4"): "no video stream",
    }
    assert main([str(exported), *bad, good, "--format", "json"]) == 1
    out, err = capsys.readouterr()
    (row,) = map(json.loads, out.splitlines())
    assert row["path"] == good and len(row["top"]) == 5
    lines = err.splitlines()
    assert len(lines) == len(bad)
    for line, (path, reason) in zip(lines, bad.items(), strict=True):
        assert line.startswith(path) and reason in line and "Traceback" not in line
    assert main([str(exported), good]) == 0
    assert main([str(tmp_path), good]) == 2  # no model
    assert "holds no exported student" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([str(exported), good, "--every", "1"])
    assert stop.value.code == 2


def test_folders_patterns_and_pipes(exported, video, tmp_path, capsys):
    for name in ("a/x.mp4", "a/b/y.MP4", "a/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Path(video("clip.mp4")).rename(tmp_path / name)
    assert main([str(exported), str(tmp_path / "a"), "--format", "csv"]) == 0
    assert [line.split(",")[0][-5:] for line in capsys.readouterr().out.splitlines()] == [
        "y.MP4",
        "x.mp4",
    ]
    assert main([str(exported), str(tmp_path / "a/*.mp4")]) == 0
    assert main([str(exported), str(tmp_path / "*.avi")]) == 1
    raw = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3), dtype=np.uint8)
    command = [sys.executable, "-m", "gdviz.cli", "predict", str(exported), "-"]
    command += ["--raw", "48x32@6", "--format", "json"]
    done = subprocess.run(command, input=raw.tobytes(), capture_output=True, check=True)
    assert json.loads(done.stdout)["end"] == pytest.approx(2)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_video_on_its_side_is_turned_as_in_training(exported, video, monkeypatch, turns):
    path = Path(video(frames=12))
    data = bytearray(path.read_bytes())
    matrix = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
    at = data.index(b"tkhd") + 4 + 40  # the display matrix of the track's header
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[at + place : at + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    seen = []
    student = predict.load_student(exported)
    ask = student.probabilities
    monkeypatch.setattr(student, "probabilities", lambda x: (seen.append(x), ask(x))[1])
    student.predict(str(path))
    expected = read_square(path, len(seen[0]), student.about["size"])[0].numpy()
    assert np.abs(seen[0].astype(float) - expected).max() <= 2


def test_an_export_runs_without_pytorch_and_without_gdviz(exported, video, tmp_path):
    """In a process that cannot import either; what is asked of it is what is asked here."""
    block = (
        "import sys, runpy\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'gdviz', 'scipy', 'pandas'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    path = video()
    command = [sys.executable, "-c", block, str(exported / "predict.py"), str(exported), path]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (expected,) = predict.load_student(exported).predict(path)
    assert json.loads(done.stdout)["top"] == [list(pair) for pair in expected.top]


def test_labelling_does_not_import_pytorch():
    code = "import sys, gdviz.student.predict; sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(REPO)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


def test_a_file_that_ends_in_damage_is_labelled_as_far_as_it_goes(exported, tmp_path):
    path = tmp_path / "clip.mkv"  # readable from its start
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width = stream.height = 48
        for pixels in render(1, 3, size=48, frames=40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    student = predict.load_student(exported)
    (whole,) = student.predict(str(path))
    (part,) = student.predict(damaged(str(path)))
    assert 0 < part.end < whole.end
    assert part.warning == "breaks off at 0.3 s of 3.3 s" and not whole.warning
    student.predict(str(path), window=0.3)  # what is left over is too short to be labelled
    assert student.warning == part.warning
    with pytest.raises(CannotLabel):
        student.predict(str(tmp_path / "none.mp4"))


@pytest.mark.slow
def test_ten_hours_are_labelled_hour_by_hour_in_the_memory_of_a_minute(exported, tmp_path):
    still = render(1, 3, size=16, frames=60)
    for name, seconds in (("minute.mp4", 60), ("hours.mp4", 36_000)):
        encode(np.tile(still, (seconds // 60, 1, 1, 1)), tmp_path / name, fps=1)
    peak = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    code = f"import sys; from gdviz.student.predict import main; main(sys.argv[1:]); {peak}"
    lines, most = {}, {}
    for name in ("minute.mp4", "hours.mp4"):
        words = [str(exported), str(tmp_path / name), "--window", "3600", "--format", "json"]
        command = [sys.executable, "-c", code, *words]
        env = os.environ | {"PYTHONPATH": str(REPO)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        *lines[name], most[name] = done.stdout.splitlines()
    assert [json.loads(line)["start"] for line in lines["hours.mp4"]] == list(range(0, 36000, 3600))
    kilobytes = 1e3 if sys.platform == "darwin" else 1
    assert int(most["hours.mp4"]) - int(most["minute.mp4"]) < 30_000 * kilobytes
