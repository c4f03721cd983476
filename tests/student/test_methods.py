"""Methods: found by name, told apart by what they teach, and never asked for by name elsewhere."""

import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import REPO, TINY
from torch import Generator

from gdviz.core.files import UserError
from gdviz.student.distill import Balance, distill
from gdviz.student.losses import decoupled_kd_loss, kd_loss
from gdviz.student.methods import METHODS, Batch, Method, Setting, find_method
from gdviz.teachers.bank import Bank, calibration_temperature

NAMES = ("order", "prediction")


@pytest.fixture
def setting(finished):
    videos = finished.videos()
    bank, graphs = finished.bank(0, videos), finished.graphs(0)
    return Setting(bank, graphs, TINY.distillation, videos.training_rows, 16)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logits, features = torch.randn(8, 12, requires_grad=True), torch.randn(8, 16)
    rng = Generator().manual_seed(0)
    return Batch(torch.arange(8), None, logits, features.requires_grad_(), rng)


def losses(method, setting, batch, moment=0):
    return method.losses(batch, setting.bank, setting.graphs.edges, moment)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "labels"] + ["kd-order"])
def test_every_method_has_finite_losses_that_reach_the_student(setting, batch, name):
    torch.manual_seed(0)
    method = find_method(name, NAMES)(setting)
    found = losses(method, setting, batch)
    assert tuple(found) == method.terms
    total = sum(found.values())
    assert total.isfinite()
    own = list(method.parameters())
    grads = torch.autograd.grad(total, [batch.logits, batch.features, *own], allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in grads[:2])
    assert all(g is not None and g.abs().sum() > 0 for g in grads[2:])


@pytest.mark.parametrize("name", ["labels", "kd-uniform", "kd-aekd", "crd", "both-graphs"])
def test_methods_train_another_student_than_labels(finished, setting, name):
    videos = finished.videos()
    short = replace(TINY.distillation.schedule, epochs=1, min_steps=1)
    cfg = replace(TINY.distillation, schedule=short)
    fc = []
    for method in ("labels", name):
        args = setting.bank, setting.graphs, videos, TINY.view, cfg
        student, history = distill(method, *args, seed=0)
        assert math.isfinite(history[-1]["loss"])
        fc.append(student.classifier.fc.weight)
    assert torch.equal(*fc) == (name == "labels")


def test_kd_from_one_teacher_is_what_a_weight_of_one_says(setting, batch):
    probs = setting.bank.probs(TINY.distillation.temperature)[batch.rows]
    best = setting.bank.best_teacher()
    method = find_method("kd-best", NAMES)(setting)
    expected = kd_loss(batch.logits, probs[:, [best]], torch.ones(8, 1), 1.0)
    torch.testing.assert_close(losses(method, setting, batch)["kd"], expected)
    assert method.notes == {"teacher": NAMES[best]}
    first = kd_loss(batch.logits, probs[:, :1], torch.ones(8, 1), 1.0)
    single = find_method("kd-order", NAMES)(setting)
    torch.testing.assert_close(losses(single, setting, batch)["kd"], first)


def test_the_graphs_follow_the_moment(setting, batch):
    """Every moment's edges listen to another teacher alone: so does the loss."""
    edges = setting.graphs.edges
    moments = len(edges.teachers)
    alone = torch.eye(2)[torch.arange(moments) % 2][:, None].expand_as(edges.teachers)
    turned = replace(
        setting,
        graphs=replace(
            setting.graphs,
            edges=replace(edges, teachers=alone, temperatures=torch.ones(moments, 2)),
        ),
    )
    method = find_method("kd-learned", NAMES)(turned)
    for moment in range(moments):
        single = find_method(f"kd-{NAMES[moment % 2]}", NAMES)(setting)
        same = losses(single, setting, batch)["kd"]
        torch.testing.assert_close(losses(method, turned, batch, moment)["kd"], same)
    graph = find_method("logits-graph", NAMES)(turned)
    values = [float(losses(graph, turned, batch, m)["logits"].detach()) for m in range(moments)]
    assert len({round(v, 6) for v in values}) == moments  # the consensus moves, too


def test_both_graphs_are_the_sum_of_each(setting, batch):
    torch.manual_seed(0)
    both = find_method("both-graphs", NAMES)(setting)
    torch.manual_seed(0)
    second = find_method("representation-graph", NAMES)(setting)
    first = find_method("logits-graph", NAMES)(setting)
    expected = losses(first, setting, batch) | losses(second, setting, batch)
    found = losses(both, setting, batch)
    assert all(torch.equal(found[k], expected[k]) for k in expected) and len(found) == 2


def test_negatives_are_never_the_clip_itself(setting, batch, monkeypatch):
    few = replace(setting, rows=torch.arange(8))  # the clip itself would come up often
    method, asked, real = find_method("crd", NAMES)(few), [], Bank.features_at

    def spy(self, rows, clips=None, *, held=False):
        asked.append(rows)
        return real(self, rows, clips, held=held)

    monkeypatch.setattr(Bank, "features_at", spy)
    losses(method, few, batch)
    negatives = asked[-1].view(8, 7)
    assert (negatives != batch.rows[:, None]).all() and set(negatives.flatten().tolist()) <= {
        *range(8)
    }


def test_dkd_takes_the_label_where_one_is_known(setting, batch):
    best = setting.bank.best_teacher()
    teacher = setting.bank.logits[batch.rows, best]
    wrong = (teacher.argmax(1) + 1) % 12
    labels = setting.bank.labels.clone()
    labels[:4], labels[4:8] = wrong[:4], -1
    told = replace(setting, bank=replace(setting.bank, labels=labels))
    method = find_method("dkd", NAMES)(setting)
    used = torch.where(labels[:8] >= 0, labels[:8], teacher.argmax(1))
    temperature = TINY.distillation.temperature
    expected = decoupled_kd_loss(batch.logits, teacher, used, temperature)
    torch.testing.assert_close(losses(method, told, batch)["dkd"], expected)


def test_aekd_weighs_teachers_of_several_labels_by_all_classes_of_the_batch(setting):
    g, each = Generator().manual_seed(0), 5
    logits = torch.randn(8 * each, 3, 2, generator=g)
    labels, fold = torch.zeros(8 * each, dtype=torch.long), torch.zeros(8, dtype=torch.long)
    bank = Bank(("a", "b", "c"), setting.bank.readouts[:1] * 3, logits, labels, fold)
    method = METHODS["kd-aekd"](replace(setting, bank=bank))
    z = torch.randn(4 * each, 2, generator=g)
    batch = Batch(torch.arange(4), None, z, torch.zeros(4, 16), g)
    w = method.weights(batch, bank, setting.graphs.edges, 0)
    assert w.shape == (4 * each, 3) and (w == w[0]).all()
    gap = (z.softmax(-1)[:, None] - logits[: 4 * each].softmax(-1)).unflatten(0, (4, each)).mean(0)
    gap = gap.transpose(0, 1).flatten(1)  # [k, each * 2]: classes are kept apart
    others = torch.distributions.Dirichlet(torch.ones(3)).sample((4000,))
    others = others[others.max(1).values <= 0.6]
    assert (w[0] @ gap).norm() <= (others @ gap).norm(dim=1).min() + 1e-6


@pytest.mark.parametrize("policy", ["camkd", "entropic", "ebkd", "kendall"])
def test_a_policy_that_sees_labels_does_not_sharpen_calibrated_teachers(setting, policy):
    """Each is calibrated and errs on clips of its own: under all of them its temperature is 1."""
    g = Generator().manual_seed(0)
    labels = torch.randint(12, (4000,), generator=g)
    logits = 2 * torch.eye(12)[labels][:, None] + torch.randn(4000, 3, 12, generator=g)
    each = [calibration_temperature(z, labels) for z in logits.unbind(1)]
    logits = logits / torch.tensor(each)[:, None]
    fold = torch.zeros(4000, dtype=torch.long)
    bank = Bank(("a", "b", "c"), setting.bank.readouts[:1] * 3, logits, labels, fold)
    method = METHODS[f"kd-{policy}"](replace(setting, bank=bank))
    assert ((method.calibrated - 1).abs() < 0.1).all(), method.calibrated


def test_teachers_of_a_policy_are_softened_by_the_temperatures_under_its_weights(setting, batch):
    method = find_method("kd-ebkd", NAMES)(setting)
    assert torch.equal(method.calibrated, setting.bank.recalibrated(method.fixed))
    method.calibrated = torch.tensor([3.0, 0.5])
    probs = torch.softmax(setting.bank.logits[batch.rows] / method.calibrated[:, None], -1)
    expected = kd_loss(batch.logits, probs, method.fixed[batch.rows], 1.0)
    torch.testing.assert_close(losses(method, setting, batch)["kd"], expected)


@pytest.mark.parametrize("name", ["wkd", "kd-best"])
def test_a_student_that_says_what_its_teacher_says_is_left_alone(setting, batch, name):
    method = METHODS[name](setting)
    best = setting.bank.best_teacher()
    said = setting.bank.logits_at(batch.rows)[:, best].clone().requires_grad_()
    (loss,) = losses(method, setting, replace(batch, logits=said)).values()
    (grad,) = torch.autograd.grad(loss, said)
    assert grad.abs().max() < 1e-4 and loss.detach().abs() < 1e-4


def test_unknown_methods_and_things_that_are_none():
    with pytest.raises(UserError, match=r"unknown method 'kd-bets'.*kd-best"):
        find_method("kd-bets", NAMES)
    with pytest.raises(UserError, match="math:pi: is no method"):
        find_method("math:pi", NAMES)


def test_one_control_and_one_headline_among_the_defaults():
    kinds = [find_method(name, NAMES) for name in TINY.methods]
    assert [k.headline for k in kinds].count(True) == 1
    assert [k.shuffled for k in kinds].count(True) == 1
    assert all(issubclass(k, Method) and k.label for k in METHODS.values())


def test_no_other_module_knows_a_method_by_its_name():
    names = "|".join(f"[\"']{re.escape(name)}[\"']" for name in METHODS)
    for path in (REPO / "gdviz").rglob("*.py"):
        if path.name not in ("methods.py", "config.py", "weighting.py"):
            found = re.findall(names, path.read_text())
            assert set(found) <= {'"labels"'}, path  # "labels" is also a field of data


def test_balance_gives_a_loss_its_share_of_the_gradient():
    features = torch.tensor([1.0, 2.0], requires_grad=True)
    balance = Balance({"kd": 0.5})
    ce, kd = (3 * features).sum(), (features**2).sum()
    balance.measure({"ce": ce, "kd": kd}, features)
    (share,) = torch.autograd.grad(balance.factor("kd") * kd, features)
    assert share.norm().item() == pytest.approx(0.5 * 3 * 2**0.5)


@pytest.mark.parametrize("name", ["logits-graph", "kd-learned"])
def test_teachers_are_softened_by_the_temperatures_of_the_edges(setting, batch, name):
    edges = setting.graphs.edges
    hot = replace(edges, temperatures=torch.full_like(edges.temperatures, 3))
    hotter = replace(setting, graphs=replace(setting.graphs, edges=hot))
    softer = replace(setting, bank=replace(setting.bank, logits=setting.bank.logits / 3))
    plain, same, other = (
        losses(find_method(name, NAMES)(s), s, batch) for s in (setting, hotter, softer)
    )
    for term, value in same.items():
        torch.testing.assert_close(value, other[term])
        assert not torch.isclose(value, plain[term])
