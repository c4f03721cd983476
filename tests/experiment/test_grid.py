"""Plans: read, refused by name, run once, resumed, and reported."""

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from gdviz.config import PROFILES
from gdviz.core.files import UserError, save_json
from gdviz.experiment import grid
from gdviz.experiment.report import latex, markdown, report, tradeoff, wide

PLAN = """
profile = "specialists"
draws = [1, 2, 3]
methods = ["kd-uniform", "both-graphs", "kd-truth"]
measures = ["accuracy"]
contrasts = [["both-graphs", "kd-uniform"], ["both-graphs", "fewer/both-graphs"]]
[settings.main]
[settings.fewer]
"distillation.edges.components" = 2
"""
SMALL = """
"motion.labelled" = 2
"motion.unlabelled" = 2
"motion.test" = 1
"teachers.tasks" = ["none@plain", "registration@noise"]
"teachers.strides" = [2, 1]
"teachers.home-labelled" = 2
"teachers.home-unlabelled" = 1
"teachers.backbone" = "tiny4"
"teachers.pretrain" = {epochs = 1, min_steps = 1}
"teachers.fit" = {epochs = 1, min_steps = 1}
"distillation.student" = "tiny4"
"distillation.schedule" = {epochs = 2, batch = 8, min_steps = 2}
"distillation.labelled-batch" = 4
"distillation.edges.refreshes" = 2
"""


@pytest.fixture
def plan(tmp_path):
    def write(text: str):
        (tmp_path / "plan.toml").write_text(text)
        return tmp_path / "plan.toml"

    return write


def test_a_plan_changes_its_profile_by_flags(plan):
    read = grid.read_plan(plan(PLAN))
    assert read.draws == (1, 2, 3) and list(read.settings) == ["main", "fewer"]
    main, fewer = read.settings.values()
    assert fewer.distillation.edges.components == 2
    assert main.distillation == PROFILES["specialists"].distillation
    assert main.methods == fewer.methods == ("kd-uniform", "both-graphs", "kd-truth")
    for runs in read.runs(Path("out"), Path("data"), "cpu"):  # all is drawn anew
        drawn = [(run.profile.motion.seed, run.profile.seeds) for run in runs]
        assert drawn == [(1, (1,)), (2, (2,)), (3, (3,))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("draws = 3", "draws"),
        ('profile = "none"', "profile 'none'"),
        ("drawz = [1]", "drawz"),
        ('draws = [1]\nmethods = ["nothing"]', "nothing"),
        ('draws = [1]\n[settings.a]\n"view.width" = 3', "view.width"),
        ('draws = [1]\n[settings.a]\n"view.stride" = -1', "stride"),
        ("draws = [", "plan.toml"),
        ('draws = [1]\ncontrasts = [["labels", "kd-unifrom"]]', "kd-unifrom"),
        ('draws = [1]\n[settings.a]\n"motion.domains" = ["fog"]', "--motion.domains fog"),
        ("draws = [1, 2, 1]", "draws: give each number once"),
        ('draws = [1]\nmeasures = "accuracy"', "measures: give columns"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_by_name(plan, line, said):
    with pytest.raises(UserError, match=said):
        grid.read_plan(plan(line))


def test_videos_of_a_plan_lie_beside_it_from_wherever_it_is_read(plan, tmp_path, monkeypatch):
    file = plan('draws = [1]\ndata = "mine.csv"')
    monkeypatch.chdir(tmp_path)
    assert grid.read_plan(Path(file.name)).data == tmp_path.resolve() / "mine.csv"


def test_a_plan_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml: No such file"):
        grid.read_plan(tmp_path / "none.toml")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    text = PLAN.replace("[1, 2, 3]", "[1]").replace("[settings.main]", "[settings.main]" + SMALL)
    (folder / "plan.toml").write_text(text + SMALL)
    read = grid.read_plan(folder / "plan.toml")
    results = grid.execute(read, folder / "out", folder / "data", "cpu", 1)
    return folder, read, results


def test_all_is_run_and_told_in_one_table(made):
    folder, _, results = made
    counts = results.groupby(["setting", "kind"]).size()
    assert counts.tolist() == [3, 2, 3, 2]
    assert set(results["draw"]) == {1}
    assert {"accuracy: plain", "accuracy: snow"} <= set(results)
    edges = pd.read_csv(folder / "out" / "edges.csv")
    at_home = edges[edges["setting"] == "main"].set_index("edges")["at_home"]
    # Two of four looks have a teacher at home; the others' weight is half right by definition.
    assert at_home["graphs-truth"] == pytest.approx((0.99 + 0.5) / 2, abs=0.01)
    assert 0 < at_home["graphs"] < at_home["graphs-truth"] and len(edges) == 4


def test_a_teacher_of_one_s_own_is_a_network_of_its_own_in_the_results(made, monkeypatch):
    _, read, results = made
    assert set(results["network"]) == {"tiny4"}
    own = grid.OwnBackbone.__new__(grid.OwnBackbone)
    monkeypatch.setattr(grid, "find_source", lambda task: own if "none" in task else None)
    (run, *_), *_ = read.runs(made[0] / "out", made[0] / "data", "cpu")
    networks = grid._results(run).set_index("name")["network"]
    assert networks["none@plain"] == "none@plain" and networks["registration@noise"] == "tiny4"
    assert networks["both-graphs"] == "tiny4"


def test_videos_of_one_s_own_are_decoded_before_draws_begin(made, tmp_path, monkeypatch):
    done = []

    def begin(*_, **__):
        done.append("runs")
        raise StopIteration

    monkeypatch.setattr(grid.Run, "videos", lambda run, workers: done.append(str(run.data)))
    monkeypatch.setattr(grid, "over_processes", begin)
    plan = replace(made[1], data=tmp_path / "list_{draw}.csv", draws=(1, 2))
    with pytest.raises(StopIteration):
        grid.execute(plan, tmp_path / "out", tmp_path / "data", "cpu", 2)
    assert done == [*(str(tmp_path / f"list_{draw}.csv") for draw in (1, 2)), "runs"]


def test_homes_share_no_video_with_the_run_nor_with_each_other(made):
    folder, read, _ = made
    (run,), _ = read.runs(folder / "out", folder / "data", "cpu")
    sets = [run.videos(), *map(run.home, run.profile.teachers.tasks)]
    drawn = [seed for videos in sets for seed in videos.groups]  # a group is a video's seed
    assert len(set(drawn)) == len(drawn)


def test_teachers_of_an_earlier_setting_are_taken_from_there(made):
    folder, _, results = made
    taken = folder / "out" / "fewer" / "1" / "seed1" / "teachers" / "none@plain"
    assert os.path.islink(taken) and (taken / "result.json").exists()
    teachers = results[results["kind"] == "teacher"].pivot(
        index="name", columns="setting", values="accuracy"
    )
    assert (teachers["main"] == teachers["fewer"]).all()


def test_other_settings_of_teachers_are_not_taken(made):
    _, read, _ = made
    main = read.settings["main"]
    longer = replace(main.teachers, fit=replace(main.teachers.fit, epochs=2))
    folder = made[0] / "out"
    runs = grid.Plan((1,), {"main": main, "longer": replace(main, teachers=longer)})
    (first,), (second,) = runs.runs(folder, made[0] / "data", "cpu")
    grid._adopt(second, [first])
    assert not second.teacher_folder(1, "none@plain").exists()


def test_a_teacher_with_a_home_is_pre_trained_there(made, tmp_path, monkeypatch):
    folder, read, _ = made
    (run,) = replace(read, settings={"main": read.settings["main"]}).runs(
        tmp_path, folder / "data", "cpu"
    )[0]

    def spy(task, cfg, view, videos, **_):
        assert set(videos.audit["domain"]) == {"noise"}
        raise StopIteration

    monkeypatch.setattr(grid.steps, "pretrain", spy)
    with pytest.raises(StopIteration):
        grid.steps.train_teacher(run, 1, "registration@noise")


def test_a_finished_experiment_trains_nothing_again(made, monkeypatch):
    folder, read, results = made
    for step in ("train_teacher", "learn_graphs", "train_student"):
        monkeypatch.setattr(grid.steps, step, lambda *_, **__: pytest.fail("trained again"))
    again = grid.execute(read, folder / "out", folder / "data", "cpu", 1)
    pd.testing.assert_frame_equal(again, results)


def test_the_report_names_students_and_contrasts(made):
    folder, *_ = made
    text = report(folder / "out")
    assert "fewer/both-graphs" in text and "both-graphs minus kd-uniform" in text
    assert (folder / "out" / "tables.tex").read_text().count(r"\toprule") == 2
    with pytest.raises(UserError, match="no finished experiment"):
        report(folder)


def test_a_plan_that_is_refused_late_leaves_the_report(made, plan):
    folder, read, _ = made
    before = (folder / "out" / "plan.json").read_text()
    main = replace(read.settings["main"], methods=("labels",))
    other = replace(read, settings={"main": main}, contrasts=(("labels", "labels"),))
    with pytest.raises(UserError, match="another configuration"):
        grid.execute(other, folder / "out", folder / "data", "cpu", 1)
    assert (folder / "out" / "plan.json").read_text() == before


def test_a_report_names_measures_that_are_none_and_settings_that_are_numbers(made, tmp_path):
    folder, _, results = made
    numbered = results.assign(setting=results["setting"].map({"main": "4", "fewer": "16"}))
    numbered.to_csv(tmp_path / "results.csv", index=False)
    edges = pd.read_csv(folder / "out" / "edges.csv").assign(setting="16", target=0.5)
    edges.to_csv(tmp_path / "edges.csv", index=False)
    told = {"contrasts": [["both-graphs", "16/both-graphs"]], "measures": ["accuracy"]}
    save_json(tmp_path / "plan.json", told)
    assert "16/both-graphs" in report(tmp_path)
    save_json(tmp_path / "plan.json", told | {"measures": ["acuracy"]})
    with pytest.raises(UserError, match=r"'acuracy' is no measure.*accuracy"):
        report(tmp_path)


def test_a_tradeoff_joins_accuracies_and_costs(tmp_path):
    rows = [
        {"network": net, "kind": kind, "name": name, "draw": draw, "accuracy": mean + 0.01 * draw}
        for net, kind, name, mean in (
            ("big", "teacher", "order", 0.5),
            ("small", "student", "labels", 0.3),
            ("small", "student", "both-graphs", 0.45),
        )
        for draw in range(4)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    save_json(tmp_path / "plan.json", {"contrasts": [], "measures": ["accuracy"]})
    machine = {"device": "cpu", "threads": 1}
    bench = [
        machine | {"name": "big", "engine": "eager", "ms": 4.0, "params": 9e3, "gflops": 2.0},
        machine | {"name": "small", "engine": "eager", "ms": 2.0, "params": 1e3, "gflops": 1.0},
        machine | {"name": "small", "engine": "onnx", "ms": 1.0},
        machine | {"name": "small", "engine": "onnx-int8", "ms": 0.1},
        machine | {"threads": 2, "name": "small", "engine": "onnx", "ms": 0.5},
    ]
    bench = [{"peak_mb": 3.0} | row for row in bench]
    save_json(tmp_path / "bench.json", {"rows": bench})
    found = tradeoff(tmp_path).set_index(["network", "name"])
    small = found.loc["small", "both-graphs"]
    assert (small["ms"], small["params"], small["gflops"], small["peak_mb"]) == (1, 1000, 1, 3)
    assert small["mean"] == pytest.approx(46.5) and small["low"] < 46.5 < small["high"]
    assert small["headline"] and small["unlabelled"] and found.loc["big", "order"]["ms"] == 4
    save_json(tmp_path / "bench.json", {"rows": bench[1:]})
    with pytest.raises(UserError, match="holds nothing of big"):
        tradeoff(tmp_path)


def test_tables_of_a_report():
    table = pd.DataFrame({"a_b": ["1 %"]}, index=["x"])
    assert markdown(table, "row") == "| row | a_b |\n| --- | --- |\n| x | 1 % |"
    assert r"x & 1 \% \\" in latex(table, "row") and r"a\_b" in latex(table, "row")


def test_students_of_other_settings_have_their_setting_s_name():
    rows = [
        {"kind": "student", "setting": s, "name": "m", "draw": d, "accuracy": a}
        for s, d, a in (("one", 1, 0.5), ("one", 2, 0.6), ("two", 1, 0.7), ("two", 2, 0.8))
    ]
    assert wide(pd.DataFrame(rows), "accuracy").to_dict("list") == {
        "m": [0.5, 0.6],
        "two/m": [0.7, 0.8],
    }


@pytest.mark.slow
def test_unnamed_motions_are_probed(tmp_path):
    text = 'profile = "unnamed"\ndraws = [1]\nmethods = ["both-graphs"]\n[settings.main]' + SMALL
    text = text.replace('"none@plain", "registration@noise"', '"none", "order"')
    text += '"motion.size" = 32\n"teachers.folds" = 2\n'
    text = text.replace('"motion.test" = 1', '"motion.test" = 12')
    (tmp_path / "plan.toml").write_text(text)
    plan = grid.read_plan(tmp_path / "plan.toml")
    results = grid.execute(plan, tmp_path / "out", tmp_path / "data", "cpu", 1)
    for column in ("unnamed R@1", "unnamed probe"):
        assert results[column].notna().all() and (results[column] > 0.1).all()  # chance: .25
