"""The table says what the results say, and evaluation agrees with it."""

import pandas as pd
import pytest
import torch
from conftest import TINY

from gdviz.core.files import load_json, load_tensors
from gdviz.experiment import tables
from gdviz.experiment.tables import _chance, _scaled, evaluation, gains, spread, table
from gdviz.teachers.bank import calibration_temperature


def test_the_table_holds_every_result(finished):
    text = table(finished)
    for row in finished.results().itertuples():
        (line,) = [line for line in text.splitlines() if f"{row.kind}: {row.name} " in line]
        assert line.split()[-1] == f"{100 * row.accuracy:.1f}"
    summary = load_json(finished.folder / "summary.json")
    smaller, fewer = (
        sum(t[key] for t in summary["teacher"].values()) / summary["student"][key]
        for key in ("params", "gflops")
    )
    assert f"{smaller:.1f} times smaller, {fewer:.1f} times fewer FLOPs" in text
    assert "baseline: metadata" in text
    (low, high), ratio = summary["ratio"]["latency_ms_quartiles"], summary["ratio"]["latency_ms"]
    assert 0 < low <= ratio <= high
    assert f"{ratio:.1f} times faster (quartiles {low:.1f} and {high:.1f})" in text


def test_spread_and_gains_are_over_seeds():
    rows = [
        {"seed": s, "kind": "student", "name": n, "headline": n == "ours", "accuracy": a}
        for n, pair in {"labels": (0.2, 0.4), "ours": (0.5, 0.6)}.items()
        for s, a in enumerate(pair)
    ]
    results = pd.DataFrame(rows)
    assert gains(results)["labels"].tolist() == pytest.approx([0.3, 0.2])
    assert spread(pd.Series([0.2, 0.4])) == "30.0 ± 14.1"
    assert spread(pd.Series([0.2])) == "20.0"
    assert gains(results[results["name"] == "labels"]).empty


def test_no_row_is_judged_by_its_own_temperature():
    z, labels = 3 * torch.randn(40, 5), torch.randint(5, (40,))
    probs = _scaled(z, labels)
    t = calibration_temperature(z[1::2], labels[1::2])
    torch.testing.assert_close(probs[::2], torch.softmax(z[::2] / t, 1))


def test_chance_of_retrieval_is_what_blind_draws_give():
    labels, truth = torch.arange(12) % 4, torch.tensor([0, 1, 1])
    found = _chance(labels, truth, [1, 5])
    torch.manual_seed(0)
    draws = torch.stack([labels[torch.randperm(12)[:5]] for _ in range(4000)])
    assert found["R@5"] == pytest.approx((draws == 0).any(1).float().mean().item(), abs=0.03)
    assert found["top-1"] == pytest.approx(2 / 3) and found["R@1"] == pytest.approx(1 / 4)


def test_a_finished_run_is_evaluated(finished, monkeypatch):
    probed, real = [], tables.predict
    monkeypatch.setattr(
        tables, "predict", lambda net, *rest: probed.append(net) or real(net, *rest)
    )
    text = evaluation(finished)
    for net, task in zip(probed, TINY.teachers.tasks, strict=True):  # as before any label
        kept = load_tensors(finished.teacher_folder(0, task) / "teacher.safetensors")
        for name, x in net.backbone.state_dict().items():
            assert torch.equal(x, kept[f"pretrained.{name}"])
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line}
    for row in finished.results().itertuples():
        numbers = lines[f"{row.kind}: {row.name}"].split()[2:]
        values = [float(x) for x in numbers]
        assert values[0] == pytest.approx(100 * row.accuracy, abs=0.051)
        assert values[2] <= values[3] <= values[4] <= values[5]  # R@1 to R@20
        if row.kind == "teacher":
            assert values[7] == pytest.approx(100 * row.calibration_error, abs=0.051)
    for column, method in enumerate(TINY.methods):  # as many test videos a class
        shares = [float(lines[name].split()[1 + column]) for name in finished.videos().label_names]
        first = float(lines[f"student: {method}"].split()[2])
        assert sum(shares) / 12 == pytest.approx(first, abs=0.1)
