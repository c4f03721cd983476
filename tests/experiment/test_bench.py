"""The benchmark: everybody in turn, nobody measured twice, and what cannot run is left out."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gdviz import commands
from gdviz.config import PROFILES, View
from gdviz.core.files import UserError
from gdviz.experiment import bench as bench_module
from gdviz.experiment.bench import Racer, bench, bench_table, contenders, footprints
from gdviz.experiment.bench import _peak_mb as peak_mb
from gdviz.experiment.bench import _throughput as throughput
from gdviz.teachers.own import OwnBackbone, OwnView

SMALL = View(size=8, length=2)


class Slow(torch.nn.Module):
    """Takes ``work`` matrix products."""

    def __init__(self, work):
        super().__init__()
        self.work, self.weight = work, torch.nn.Parameter(torch.eye(200))

    def forward(self, clips):
        assert torch.get_num_threads() == 1
        for _ in range(self.work):
            _ = self.weight @ self.weight
        return clips


def test_models_are_timed_in_turns_each_round_once():
    called, models = [], [(Slow(work), View(size=8)) for work in (1, 2, 40)]
    for k, (model, _) in enumerate(models):
        model.register_forward_hook(lambda *_, k=k: called.append(k))
    costs, times = footprints(models, repeats=6, batch=2)
    assert called == [0, 1, 2, *[0, 1, 2, 2, 1, 0] * 4]  # counted once, warmed up twice
    assert times.shape == (6, 3) and (times > 0).all()
    assert [cost["latency_ms"] for cost in costs] == times.quantile(0.5, 0).tolist()
    assert (times[:, 2] / times[:, 0]).median() > 5
    assert costs[1]["params"] == 40_000 and costs[1]["gflops"] == 2 * 2 * 200**3 / 1e9


def test_a_busy_machine_leaves_the_ratio_as_it_is(monkeypatch):
    """Work takes nine times as long for a while, which is longer than a round."""
    now, calls = [0.0], [0]

    def work(units):
        calls[0] += 1
        now[0] += units * (9 if 7 < calls[0] < 20 else 1)

    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: now[0])
    models = [(Slow(0), View(size=8)), (Slow(0), View(size=8))]
    for (model, _), units in zip(models, (6, 2), strict=True):
        model.register_forward_hook(lambda *_, units=units: work(units))
    _, times = footprints(models, repeats=9)
    ratios = times[:, 0] / times[:, 1]
    assert times[:, 0].max() == 9 * times[:, 0].min()
    assert ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx([3, 3, 3])


class Pooled(nn.Module):
    """The smallest network with parameters."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, clips):
        return self.fc(clips.mean((2, 3, 4)))


def models(*names):
    return {name: (Pooled(), SMALL) for name in names}


def test_peak_memory_is_of_what_is_held_at_once():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(250_000))  # 1 MB

        def forward(self, clips):
            first = torch.zeros(1_000_000)  # 4 MB
            second = torch.zeros(500_000)  # 2 MB more
            del first
            return second, torch.zeros(750_000)  # 3 MB in the place of 4

    clip = torch.zeros(1, 3, 1, 10, 10)
    assert peak_mb(Racer("", "eager", Greedy(), clip)) == pytest.approx(1 + 6 + 0.0012)


def test_the_best_batch_is_where_clips_are_cheapest(monkeypatch):
    """Calls take 9 + b, 1 + b + b^2 / 16 and b units of time for b clips."""
    now = [0.0]
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: now[0])
    costs = (lambda b: 9 + b, lambda b: 1 + b + b * b / 16, lambda b: b)
    tried = [[] for _ in costs]

    def racer(k):
        def run(clips):
            tried[k].append(len(clips))
            now[0] += costs[k](len(clips))

        return Racer(str(k), "eager", run, torch.zeros(1, 3, 1, 1, 1))

    found = throughput([racer(k) for k in range(3)], 1)
    assert [row["batch"] for row in found] == [64, 4, 1]
    rates = [row["clips_a_second"] for row in found]
    assert rates == pytest.approx([64 / 73, 4 / 6, 1], rel=1e-3)
    assert [max(batches) for batches in tried] == [64, 16, 4]  # no larger than can pay


def test_every_network_has_a_row_by_threads_and_ratios_are_to_all_teachers():
    before = torch.get_num_threads()
    found = models("light", "all teachers")
    rows = bench(found, threads=(1, 2), compiled=False, rounds=2)
    rows = [row for row in rows if row["device"] == "cpu"]
    assert [(r["name"], r["threads"]) for r in rows] == [(n, t) for t in (1, 2) for n in found]
    assert all(r["params"] == 8 and r["gflops"] == 2 * 6 / 1e9 for r in rows)
    assert all(0 < r["low_ms"] <= r["ms"] <= r["high_ms"] <= r["p95_ms"] for r in rows)
    assert all(r["faster"] == 1 for r in rows if r["name"] == "all teachers")
    assert torch.get_num_threads() == before
    text = bench_table(rows)
    assert len(text.splitlines()) == 5 and "2x8x8" in text


def test_what_an_engine_cannot_run_is_left_out_with_a_line(monkeypatch, capsys, tmp_path):
    def broken(net):
        def run(clips):
            raise RuntimeError("no compiler\nat all")

        return run

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(bench_module, "import_module", absent)
    (tmp_path / "model.onnx").write_bytes(b"")
    rows = bench(models("light"), exports=[tmp_path], rounds=1)
    assert {row["engine"] for row in rows} == {"eager"}
    said = capsys.readouterr().out
    assert "light, compiled: left out (no compiler)\n" in said
    assert f"{tmp_path.name}, onnx: left out (onnxruntime is not installed)\n" in said


def test_exports_run_on_as_many_threads_as_are_asked_for(tmp_path):
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(n, kind, ["batch", 3, 2, 8, 8]) for n in ("in", "out")]
    graph = helper.make_graph([helper.make_node("Relu", ["in"], ["out"])], "g", ends[:1], ends[1:])
    version = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=version, ir_version=8)
    for name in ("model.onnx", "model-int8.onnx"):
        onnx.save(model, tmp_path / name)
    rows = bench(models("light"), compiled=False, exports=[tmp_path], threads=(1, 2), rounds=1)
    rows = [row for row in rows if row["name"] == tmp_path.name]
    assert [(r["engine"], r["threads"], r["clip"]) for r in rows] == [
        (engine, threads, "2x8x8") for threads in (1, 2) for engine in ("onnx-int8", "onnx")
    ]
    (racer,) = [r for r in bench_module._exported(tmp_path, 1) if r.engine == "onnx"]
    assert np.array_equal(racer.run(-racer.clip)[0], np.zeros((1, 3, 2, 8, 8)))


def test_a_video_is_decoded_before_every_clip(video_folder, monkeypatch):
    video, read = next(video_folder(count=1).rglob("*.mp4")), []
    real = bench_module.read_square
    monkeypatch.setattr(
        bench_module, "read_square", lambda *args: read.append(args[1:3]) or real(*args)
    )
    seen = []
    net = Pooled()
    net.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    alone = Racer("light", "eager", net, torch.zeros(1, 3, 2, 8, 8))
    (racer,) = bench_module._decoding(video, [alone])
    racer.call(3)()
    assert read == [(2, 8)] * 3 and seen[0].shape == (3, 3, 2, 8, 8) and seen[0].std() > 0
    rows = bench({"light": (net, SMALL)}, compiled=False, video=video, rounds=1)
    assert [row["engine"] for row in rows][:2] == ["eager", "decode, eager"]


class OwnTeacher(Pooled):
    view, fitted = OwnView(size=8, length=2), False

    def forward(self, clips):
        return None, super().forward(clips)


def own_yardstick(classes):
    net = Pooled()
    net.classes, net.view = classes, View(size=12, length=4)
    return net


def test_contenders_are_students_each_kind_of_teacher_all_of_them_and_yardsticks():
    cfg = PROFILES["smoke"]
    tasks = ("order", "prediction", f"{__name__}:OwnTeacher")
    cfg = replace(cfg, teachers=replace(cfg.teachers, tasks=tasks, strides=(1, 1, 1)))
    yardsticks = ("shift-small", f"{__name__}:own_yardstick")
    view = View(size=24, length=8)
    found = contenders(cfg, ("light-xs", "tiny4"), yardsticks, view, 5)
    assert list(found) == ["light-xs", "tiny4", "tiny16m", tasks[2], "all teachers", *yardsticks]
    together, _ = found["all teachers"]
    assert len(together) == 3 and together[0] is not together[1]
    assert isinstance(together[2].backbone, OwnBackbone)
    assert len(together(torch.zeros(1, 3, 8, 24, 24))) == 3
    net, own = found[yardsticks[1]]
    assert (net.classes, own.size, found["shift-small"][1]) == (5, 12, view)
    for bad, said in (("math:pi", "TypeError: 'float'"), ("math:floor", "returns no network")):
        with pytest.raises(UserError, match=f"yardstick '{bad}': {said}"):
            contenders(cfg, (), (bad,), view, 5)
    with pytest.raises(UserError, match="unknown yardstick 'r3d_19'"):
        contenders(cfg, (), ("r3d_19",), view, 5)
    with pytest.raises(UserError, match="light-l"):
        contenders(cfg, ("light",), (), view, 5)


def test_the_command_writes_what_it_prints(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_module, "BATCHES", (1,))
    words = f"{finished.folder} --students light-xs --yardsticks shift-small --no-compiled"
    out = tmp_path / "new" / "bench.json"
    commands.execute("bench", [*words.split(), "--out", str(out)])
    told, table = json.loads(out.read_text()), capsys.readouterr().out
    names = [row["name"] for row in told["rows"] if row["device"] == "cpu"]
    assert names == ["tiny4", "light-xs", "all teachers", "shift-small"]
    assert all(name in table for name in names) and told["rows"][0]["clip"] == "4x16x16"
    assert torch.__version__.startswith(told["machine"]["torch"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--view 16x112", "--view is written as 16x112x112"),
        ("--view 16x112x96", "--view is written as 16x112x112"),
        ("--view 1x24x24", "--view.length 1: needs 2 or more"),
        ("--threads 0", "--threads are 1 or more"),
        ("--students light", "unknown backbone 'light'"),
        ("--yardsticks magic", "unknown yardstick 'magic'"),
        ("--exports nowhere", "--exports nowhere: holds no model.onnx"),
        ("--video nowhere.mp4", "nowhere.mp4"),
        ("nowhere", "nowhere: holds no run"),
    ],
)
def test_wrong_arguments_are_named(words, message, monkeypatch):
    monkeypatch.setattr(bench_module, "build_teacher", lambda *_: Pooled())
    with pytest.raises(SystemExit) as stop:
        commands.execute("bench", [*words.split(), "--no-compiled"])
    assert str(stop.value).startswith("gdviz: ") and message in str(stop.value)


def test_the_ninth_network_is_compiled_too(monkeypatch):
    class Deep(Pooled):
        def __init__(self, depth):
            super().__init__()
            self.more = nn.Sequential(*[nn.Linear(2, 2) for _ in range(depth)])

        def forward(self, clips):
            return self.more(super().forward(clips))

    graphs = []

    def counting(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    monkeypatch.setattr(bench_module, "BATCHES", (1,))
    bench({str(depth): (Deep(depth), SMALL) for depth in range(12)}, rounds=1)
    assert len(set(graphs)) == 12


@pytest.mark.slow
def test_compiled_networks_are_measured_where_there_is_a_compiler(capsys):
    rows = bench(models("light"), rounds=1)
    left_out = "light, compiled: left out" in capsys.readouterr().out
    assert {r["engine"] for r in rows} == ({"eager"} if left_out else {"eager", "compiled"})


def test_a_call_waits_for_apple_s_gpu(monkeypatch):
    waited = []
    clip = SimpleNamespace(is_cuda=False, is_mps=True, repeat=lambda *_: clip)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    Racer("net", "eager", lambda clips: None, clip).call(2)()
    assert waited == [1]
