"""How long the two graphs take, next to other forms of the same computation: medians of paired
ratios in one run."""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from gdviz.graphs import LogitsGraph, RepresentationGraph, kernels, sinkhorn, zero_one_cost
from gdviz.student import losses
from gdviz.teachers.backbones import Classifier, build_backbone

try:
    from ot.batch import solve_batch
except ImportError:
    solve_batch = print("POT is not installed: left out")
try:
    import jax
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as ott_sinkhorn
except ImportError:
    jax = print("OTT-JAX is not installed: left out")

BUDGET_S = 10.0  # for one comparison
DEVICE = "cpu"
EPS = 0.05
SIZES = (
    (51, 4),
    (101, 4),
    (51, 6),
    (101, 6),
    (51, 8),
    (101, 8),
    (400, 4),
    (400, 6),
    (400, 8),
)  # classes, teachers
# of the L2 norm of the marginal error, tested every 10 iterations; ours is of the L1 norm, which is
# larger
POT_TOL = 1e-3


def once(call: Callable[[], object], least: float = 0.1) -> float:
    """Seconds a call takes: the mean over as many as fill ``least`` seconds, for what came before
    leaves caches and threads cold."""
    calls, start, spent = 0, time.perf_counter(), 0.0
    while spent < least:
        call()
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        calls, spent = calls + 1, time.perf_counter() - start
    return spent / calls


def compare(title: str, **forms: Callable[[], object]) -> None:
    """Times the forms in turn until the budget is spent; the first is ours and the unit of the
    ratios."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for call in forms.values():
        call()  # what is built once: plans, kernels, caches
    end = time.perf_counter() + BUDGET_S
    while len(times[next(iter(forms))]) < 3 or (
        time.perf_counter() < end and len(times[next(iter(forms))]) < 50
    ):
        for name, call in forms.items():
            times[name].append(once(call))
    ours = times[next(iter(forms))]
    parts = [f"{next(iter(forms))} {1e3 * statistics.median(ours):.2f} ms"]
    for name in list(forms)[1:]:
        ratios = sorted(theirs / mine for theirs, mine in zip(times[name], ours, strict=True))
        spread = f"{ratios[len(ratios) // 4]:.1f} to {ratios[3 * len(ratios) // 4]:.1f}"
        parts.append(
            f"{name} {statistics.median(ratios):.1f}x ({spread}; best against best "
            f"{min(times[name]) / min(ours):.1f})"
        )
    print(f"{title:46}" + "   ".join(parts), flush=True)


def gradient(value: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, of)


# --- transport


def log_sum_exp(a: Tensor, b: Tensor, cost: Tensor, eps: float, steps: int) -> Tensor:
    """Textbook log-domain Sinkhorn on [N, C, C]."""
    f, g, log_a, log_b = torch.zeros_like(a), torch.zeros_like(b), a.log(), b.log()
    for _ in range(steps):
        f = -eps * torch.logsumexp((g[:, None, :] - cost) / eps + log_b[:, None, :], 2)
        g = -eps * torch.logsumexp((f[:, :, None] - cost) / eps + log_a[:, :, None], 1)
    return (f * a).sum(1) + (g * b).sum(1)


def steps_to(error: float, a: Tensor, b: Tensor, cost: Tensor, eps: float) -> int:
    """Plain Sinkhorn iterations until every plan's L1 marginal error is below ``error``."""
    kernel, v = torch.exp(-cost / eps), torch.ones_like(b)
    for step in range(1, 2000):
        u = 1 / ((v * b) @ kernel)
        v = 1 / ((u * a) @ kernel)
        reached = a * u * ((v * b) @ kernel)
        if (reached - a).abs().sum(1).max() < error:
            return step
    return 2000


def marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> float:
    """Largest L1 distance of a plan's marginals from those asked for."""
    return float(
        torch.maximum((plan.sum(2) - a).abs().sum(1), (plan.sum(1) - b).abs().sum(1)).max()
    )


def problems(classes: int, teachers: int) -> tuple[Tensor, Tensor, Tensor, str]:
    """Marginals and ground cost of a batch of 64 clips, every pair of teachers, and what it is
    called."""
    torch.manual_seed(0)
    count = 64 * (teachers * (teachers - 1) // 2)
    points = torch.randn(classes, 16)
    cost = torch.cdist(points, points).to(DEVICE)
    a, b = (torch.softmax(2 * torch.randn(count, classes), 1).to(DEVICE) for _ in range(2))
    return (
        a,
        b,
        cost / cost.sum() * classes * (classes - 1),
        f"transport to 1e-3, C={classes}, K={teachers} ({count})",
    )


def transport() -> None:
    for classes, teachers in SIZES[:2]:  # beyond, one call of the others takes minutes
        a, b, cost, title = problems(classes, teachers)
        steps = steps_to(1e-3, a, b, cost, EPS)
        forms = {
            "gdviz": lambda a=a, b=b, cost=cost: sinkhorn(a, b, cost, eps=EPS, tol=1e-3),
            "log-sum-exp loop": lambda a=a, b=b, cost=cost, steps=steps: log_sum_exp(
                a, b, cost, EPS, steps
            ),
        }
        if solve_batch is not None:
            options = {
                "method": "log_sinkhorn",
                "reg_type": "entropy",
                "max_iter": 2000,
                "tol": POT_TOL,
                "grad": "detach",
            }
            forms["POT solve_batch, log"] = lambda a=a, b=b, cost=cost: solve_batch(
                cost.expand(len(a), -1, -1), EPS, a, b, **options
            )
            print(
                "POT's marginal error: "
                f"{marginal_error(forms['POT solve_batch, log']().plan, a, b):.1e}"
            )
        compare(title, **forms)


def ott() -> None:
    """By itself, as JAX's threads, once started, slow everybody else's."""
    for classes, teachers in SIZES if jax is not None else ():
        a, b, cost, title = problems(classes, teachers)
        steps = steps_to(1e-3, a, b, cost, EPS)
        shared = geometry.Geometry(cost_matrix=jax.numpy.asarray(cost.cpu()), epsilon=EPS)
        ja, jb = (jax.numpy.asarray(x.cpu()) for x in (a, b))
        solver = ott_sinkhorn.Sinkhorn(
            lse_mode=False, threshold=0.0, min_iterations=steps, max_iterations=steps
        )

        def one(x, y, shared=shared, solver=solver):
            out = solver(linear_problem.LinearProblem(shared, a=x, b=y))
            return out.reg_ot_cost, out.f, out.g

        solve = jax.jit(jax.vmap(one))
        f, g = (torch.tensor(jax.device_get(x)) for x in solve(ja, jb)[1:])
        plan = ((f[:, :, None] + g[:, None, :] - cost.cpu()) / EPS).exp()
        print(f"OTT's marginal error: {marginal_error(plan, a.cpu(), b.cpu()):.1e}")
        forms = {
            f"OTT-JAX kernel, told {steps} steps": lambda solve=solve, ja=ja, jb=jb: (
                jax.block_until_ready(solve(ja, jb))
            )
        }
        compare(
            title,
            gdviz=lambda a=a, b=b, cost=cost: sinkhorn(a, b, cost, eps=EPS, tol=1e-3),
            **forms,
        )


# --- representation


def compact_bilinear(x: Tensor, y: Tensor, h: list[Tensor], s: list[Tensor], out: int) -> Tensor:
    """Compact bilinear pooling pair by pair: a dense sketch matrix for each factor, complex
    transforms, and a transform back."""
    sketches = []
    for v, place, sign in zip((x, y), h, s, strict=True):
        matrix = torch.zeros(v.shape[1], out, device=v.device)
        matrix[torch.arange(v.shape[1], device=v.device), place] = sign
        sketches.append(torch.fft.fft(v @ matrix))
    return torch.fft.ifft(sketches[0] * sketches[1]).real


def representation() -> None:
    for teachers, size, m in ((4, 512, 4096), (8, 512, 8192)):
        torch.manual_seed(0)
        shown = [torch.randn(64, size, device=DEVICE) for _ in range(teachers)]
        h = torch.randn(64, 128, device=DEVICE, requires_grad=True)
        graphs = {
            route: RepresentationGraph(
                [f"t{k}" for k in range(teachers)],
                [size] * teachers,
                128,
                route=route,
                sketch_dim=m,
            ).to(DEVICE)
            for route in ("kernel", "sketch")
        }
        pairs = list(combinations(range(teachers), 2))
        weights = torch.full((len(pairs),), 1 / len(pairs), device=DEVICE)
        places = [torch.randint(m, (size + 1,), device=DEVICE) for _ in range(2)]
        signs = [torch.randint(2, (size + 1,), device=DEVICE) * 2.0 - 1 for _ in range(2)]

        def pooled(
            graph=graphs["kernel"], shown=shown, h=h, pairs=pairs, places=places, signs=signs, m=m
        ):
            own, told, total = graph.student_vectors(h), graph.teacher_vectors(shown), 0.0
            for i, j in pairs:
                x, y = (
                    compact_bilinear(told[i], told[j], places, signs, m),
                    compact_bilinear(own[i], own[j], places, signs, m),
                )
                total = total + gram_mmd(x, y)  # the same distance: only the pooling differs
            return gradient(total, h)

        compare(
            f"representation loss, K={teachers}, m={m}",
            **{
                "kernel route": lambda: gradient(graphs["kernel"].loss(h, shown, None, weights), h),
                "sketch route": lambda: gradient(graphs["sketch"].loss(h, shown, None, weights), h),
                "bilinear pooling, pair by pair": pooled,
            },
        )


def naive_mmd(x: Tensor, y: Tensor, widths: int = 5) -> Tensor:
    """MMD by the [2N, 2N, d] differences of both samples, five Gaussians (a widely copied form)."""
    total = torch.cat([x, y])
    square = (total[None] - total[:, None]).pow(2).sum(2)
    bandwidth = square.detach().sum() / (len(total) ** 2 - len(total)) / 2 ** (widths // 2)
    k = sum(torch.exp(-square / (bandwidth * 2**i)) for i in range(widths))
    n = len(x)
    return (k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]).mean()


def gram_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The MMD of this project, from three products."""
    center = x.mean(0)
    a, b = x - center, y - center
    return kernels.mmd(a @ a.T, b @ b.T, a @ b.T)


def mmd() -> None:
    x, y = (
        torch.randn(64, 512, device=DEVICE),
        torch.randn(64, 512, device=DEVICE, requires_grad=True),
    )

    compare(
        "MMD, B=64, d=512",
        **{
            "one product": lambda: gradient(gram_mmd(x, y), y),
            "differences": lambda: gradient(naive_mmd(x, y), y),
        },
    )


def rkd() -> None:
    x, y = (
        torch.randn(64, 512, device=DEVICE, requires_grad=True),
        torch.randn(64, 512, device=DEVICE),
    )

    def authors():
        def distance(e):
            square = e.pow(2).sum(1)
            d = (square[:, None] + square[None] - 2 * e @ e.T).clamp(min=1e-12).sqrt() * (
                1 - torch.eye(len(e), device=e.device)
            )
            return d / d[d > 0].mean()

        def angle(e):
            d = F.normalize(e[None] - e[:, None], dim=2)
            return torch.bmm(d, d.transpose(1, 2))

        with torch.no_grad():
            told = distance(y), angle(y)
        return gradient(
            25 * F.smooth_l1_loss(distance(x), told[0]) + 50 * F.smooth_l1_loss(angle(x), told[1]),
            x,
        )

    def ours():
        return gradient(
            25 * losses.relational_distance_loss(x, y) + 50 * losses.relational_angle_loss(x, y), x
        )

    compare("RKD, B=64, d=512", **{"Gram matrix": ours, "differences": authors})


# --- the share of a training step


def step() -> None:
    torch.manual_seed(0)
    batch, classes, teachers = 64, 101, 4
    names = [f"t{k}" for k in range(teachers)]
    logits_graph = LogitsGraph(names, zero_one_cost(classes), eps=0.3).to(DEVICE)
    graph = RepresentationGraph(names, [512] * teachers, 512).to(DEVICE)
    probs = torch.softmax(2 * torch.randn(batch, teachers, classes, device=DEVICE), -1)
    w = torch.full((batch, teachers), 1 / teachers, device=DEVICE)
    consensus = logits_graph.consensus(probs, w)
    shown = [torch.randn(batch, 512, device=DEVICE) for _ in names]
    z = torch.randn(batch, classes, device=DEVICE, requires_grad=True)
    h = torch.randn(batch, 512, device=DEVICE, requires_grad=True)
    v = torch.full((len(graph.pairs),), 1 / len(graph.pairs), device=DEVICE)
    part = (
        batch if DEVICE != "cpu" else 2
    )  # on a CPU a whole batch takes a minute: two clips, times 32
    student, clips = (
        Classifier(build_backbone("r3d_18"), classes).to(DEVICE),
        torch.randn(part, 3, 16, 112, 112, device=DEVICE),
    )

    def graphs():
        return gradient(
            logits_graph.loss(z, probs, w, consensus) + graph.loss(h, shown, consensus, v), z, h
        )

    def network():
        student.zero_grad()
        student(clips)[0].logsumexp(1).mean().backward()

    graphs()
    network()
    ratio = statistics.median(once(graphs) / (once(network) * batch / part) for _ in range(5))
    print(
        f"{'both graphs, C=101, K=4, B=64':46}{100 * ratio:.2f} % of a step of r3d_18 at "
        f"16x112x112 ({part} clips timed)",
        flush=True,
    )


PARTS = {
    "transport": transport,
    "ott": ott,
    "representation": representation,
    "mmd": mmd,
    "rkd": rkd,
    "step": step,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="budget of one comparison")
    given = parser.parse_args()
    DEVICE, BUDGET_S = given.device, given.seconds
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    where = torch.cuda.get_device_name() if DEVICE != "cpu" else f"CPU, {given.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}; ratios: median (quartiles)")
    for name in given.parts:
        PARTS[name]()
