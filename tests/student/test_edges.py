"""Both graphs of a run are saved whole, and edges are learned from the teachers alone."""

from dataclasses import replace

import pytest
import torch
from conftest import memory_set
from torch import Generator

from gdviz.config import Distillation, Edges
from gdviz.core.files import UserError
from gdviz.graphs import zero_one_cost
from gdviz.student.edges import (
    Graphs,
    build_graphs,
    ground_cost,
    learn_edges,
    open_graphs,
    save_graphs,
)
from gdviz.teachers.bank import Bank, Readout, gather

CFG = Distillation(edges=Edges(refreshes=3, gate_steps=5))
CLASSES, COUNT, LABELLED = 3, 60, 30


def draw_bank(*quality: float, seed: int = 0) -> tuple[Bank, torch.Tensor]:
    """Teachers whose logits point at the true class so strongly (0: noise), and the truth."""
    rng = Generator().manual_seed(seed)
    truth = torch.arange(COUNT) % CLASSES
    splits = ["train"] * LABELLED + ["unlabelled"] * 20 + ["test"] * 10
    pixels = torch.zeros(COUNT, 1, 1, 1, 3, dtype=torch.uint8).numpy()
    videos = memory_set(pixels, truth.tolist(), splits)
    fold = torch.where(torch.arange(COUNT) < LABELLED, torch.arange(COUNT) // 3 % 3, -1)
    readouts = {}
    for k, q in enumerate(quality):
        z = q * torch.eye(CLASSES)[truth] + torch.randn(COUNT, CLASSES, generator=rng)
        readouts[f"t{k}"] = Readout.from_means(z, z @ torch.randn(3, 5 + k, generator=rng), fold)
    return gather(readouts, videos), truth


def graphs_of(bank: Bank) -> Graphs:
    rows = torch.arange(50)
    both = build_graphs(bank, rows, CFG, student_dim=4)
    return Graphs(*both, learn_edges(bank, *both, CFG.edges, seed=0))


def test_saved_graphs_are_opened_whole(tmp_path):
    bank, _ = draw_bank(3.0, 1.0, 0.5)
    graphs = graphs_of(bank)
    save_graphs(tmp_path / "graphs.safetensors", graphs)
    again = open_graphs(tmp_path / "graphs.safetensors")
    for name in ("teachers", "consensus", "pairs"):
        assert torch.equal(getattr(graphs.edges, name), getattr(again.edges, name))
    z, rows = torch.randn(8, CLASSES), torch.arange(8)
    for moment in range(3):
        said = [
            g.logits.loss(z, bank.probs()[rows], g.edges.teachers[moment, rows])
            for g in (graphs, again)
        ]
        assert torch.equal(*said)
    h = torch.randn(8, 4)
    losses = [
        g.representation.loss(h, bank.features_at(rows), None, g.edges.pairs[0])
        for g in (graphs, again)
    ]
    assert torch.equal(*losses)
    with pytest.raises(UserError, match=r"none\.safetensors"):
        open_graphs(tmp_path / "none.safetensors")


def test_good_teachers_get_the_weight_on_clips_without_labels():
    bank, _ = draw_bank(4.0, 1.0, 0.0)
    weights = graphs_of(bank).edges.teachers[:, LABELLED:].mean(1)  # (r, k)
    assert (weights[:, 0] > weights[:, 1]).all() and (weights[:, 1] > weights[:, 2]).all()
    assert weights[-1, 0] > 0.5
    assert weights.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_pairs_are_weighed_by_what_their_features_tell_out_of_fold():
    """Teachers 0 and 1 know the class out of fold; 2 only in features that have seen the labels."""
    bank, truth = draw_bank(2.0, 2.0, 2.0)
    known, rng = torch.eye(CLASSES)[truth], Generator().manual_seed(1)
    noise = [torch.randn(COUNT, CLASSES, generator=rng) for _ in range(3)]
    held = [known + 0.3 * noise[0], known + 0.3 * noise[1], noise[2]]
    readouts = tuple(
        Readout.from_means(bank.logits[:, k], known, bank.fold, held[k]) for k in range(3)
    )
    bank = replace(bank, readouts=readouts)
    pairs = graphs_of(bank).edges.pairs[-1]
    assert graphs_of(bank).representation.names[0] == "t0+t1"
    assert pairs[0] > 2 * pairs[1:].max()


def test_the_graphs_are_those_of_the_settings():
    bank, _ = draw_bank(3.0, 1.0)
    told = {"eps": 0.7, "beta": 0.2, "temperature": 3.0}
    cfg = replace(CFG, distance="coral", cost_shrink=1.0, **told)
    logits, pairs = build_graphs(bank, torch.arange(50), cfg, 4)
    assert logits.settings.items() >= told.items() and pairs.settings["distance"] == "coral"
    torch.testing.assert_close(logits.cost, zero_one_cost(CLASSES))


def test_the_moment_in_force():
    edges = graphs_of(draw_bank(2.0, 1.0)[0]).edges
    assert [edges.at(p) for p in (0.0, 0.32, 0.34, 0.99)] == [0, 0, 1, 2]


def test_a_constant_teacher_has_no_say_in_the_ground_cost():
    bank, _ = draw_bank(3.0, 1.0)
    flat = torch.zeros(COUNT, CLASSES)
    readouts = dict(zip(bank.teachers, bank.readouts, strict=True))
    fold = bank.fold
    one = Bank(("flat",), (Readout.from_means(flat, flat, fold),), flat[:, None], bank.labels, fold)
    assert torch.equal(ground_cost(one, 0.0), zero_one_cost(CLASSES))
    both = torch.cat([bank.logits, flat[:, None]], 1)
    more = Bank(
        (*bank.teachers, "flat"), (*readouts.values(), one.readouts[0]), both, bank.labels, fold
    )
    torch.testing.assert_close(ground_cost(more, 0.3), ground_cost(bank, 0.3))


def test_routed_edges_listen_to_teachers_calibrated_under_them():
    bank, _ = draw_bank(4.0, 1.0, 0.5)
    graphs = graphs_of(bank)
    cfg = Edges(components=3, refreshes=2)
    edges = learn_edges(bank, graphs.logits, graphs.representation, cfg, seed=0)
    w, t = edges.teachers[-1], edges.temperatures[-1]
    assert torch.equal(t, bank.recalibrated(w)) and (t != 1).any()
    probs = bank.probs(graphs.logits.temperature * t)
    torch.testing.assert_close(edges.consensus[-1], graphs.logits.consensus(probs, w))
    gated = learn_edges(bank, graphs.logits, graphs.representation, Edges(refreshes=1), seed=0)
    assert (gated.temperatures == 1).all()
