"""Two processes train one network: what they share, and what is each one's own."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdviz.core import distributed

REPO = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What rank_job.py found, by number of processes and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for launch in ((sys.executable,), TORCHRUN):
        command = [*launch, str(Path(__file__).with_name("rank_job.py")), str(folder)]
        environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}


def numbers(tree: object, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, value in items for k, v in numbers(value, f"{path}/{name}").items()}
    return {path: torch.as_tensor(tree).double()}


@pytest.mark.slow
def test_graph_losses_of_parts_are_those_of_the_batch(found):
    """Values, gradients of logits and features, and of the adapters."""
    for name, whole in found["1-0"]["losses"].items():
        for part in (found["2-0"], found["2-1"]):
            torch.testing.assert_close(part["losses"][name], whole, rtol=0, atol=1e-10, msg=name)
        assert whole.abs().max() > 1e-3, name


@pytest.mark.slow
def test_gradients_are_means_over_ranks(found):
    for rank in ("2-0", "2-1"):
        grads = found[rank]["gradients"]
        assert grads["both"].eq(1.5).all() and grads["one"].eq(2).all()
        assert grads["short"].eq(1.5).all() and grads["short"].dtype == torch.bfloat16
        assert grads["none"] is None and grads["frozen"] is None


@pytest.mark.slow
def test_ranks_draw_views_of_their_own_from_one_generator(found):
    first, second = (found[name]["draws"] for name in ("2-0", "2-1"))
    assert torch.equal(first["shared"], second["shared"])
    assert not torch.equal(first["own"], second["own"])
    alone = torch.rand(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(torch.cat([*found["1-0"]["draws"].values()]), alone)


@pytest.mark.slow
def test_without_views_two_processes_train_as_one(found):
    for kind in ("plain", "everything"):
        one, two = (numbers(found[name]["trainings"][kind]) for name in ("1-0", "2-0"))
        assert one.keys() == two.keys()
        for name in (name for name in one if not name.endswith("/x")):
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.slow
def test_both_ranks_end_alike_and_have_learned(found):
    """Running means of batch norm too, which each rank took of its own clips."""
    first, second = (found[name]["trainings"] for name in ("2-0", "2-1"))
    mine, theirs = numbers(first), numbers(second)
    assert mine.keys() == theirs.keys() and len(mine) > 100
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    for name, training in first.items():
        losses = [row["loss"] for row in training["history"]]
        assert all(map(math.isfinite, losses)) and losses[-1] < 0.5 * losses[0], name


@pytest.mark.slow
def test_when_one_rank_is_asked_to_stop_all_do_and_go_on_exactly(found):
    for name in ("1-0", "2-0"):
        whole, again = (numbers(found[name]["trainings"][kind]) for kind in ("views", "stopped"))
        assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.slow
def test_what_ranks_tell_each_other(found):
    for name in ("2-0", "2-1"):
        assert found[name]["agreed"] == {"rank": 0} and found[name]["mean"] == {"rank": 0.5}
        assert found[name]["notices"] == [0, 1, 5]  # one call later
        assert found[name]["uneven"].startswith("7 clips cannot be dealt out evenly to 2 processes")


def test_one_process_changes_nothing():
    x, rng = torch.randn(3, 2, requires_grad=True), torch.Generator()
    assert distributed.gather(x) is x and distributed.deal(x).equal(x)
    assert distributed.agreed("a") == "a" and distributed.own_generator(rng) is rng
    assert distributed.mean({"a": 2.0}) == {"a": 2.0}
    assert (distributed.world(), distributed.rank(), distributed.first()) == (1, 0, True)
    assert distributed.Notice(torch.device("cpu"))(3) == 3
    module = torch.nn.Linear(2, 1)
    module(x).sum().backward()
    before = module.weight.grad
    distributed.average_gradients(module)
    assert module.weight.grad is before
