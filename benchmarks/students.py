"""Light students against their teachers and yardsticks, turn by turn: batch 1, one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.students [ROUNDS]

Random weights, 101 classes, clips of 16x112x112; X3D-XS sees the same clips. int8 is calibrated on
noise: its speed counts here, not its answers.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch

from benchmarks.yardsticks import x3d_xs
from gdviz.experiment.bench import turns
from gdviz.student.export import export_onnx, quantise
from gdviz.student.family import STUDENTS, build_student

PAIRS = [("4 x r3d_18", "light-m"), ("r3d_18", "light-m"), ("x3d_xs", "light-m")]
PAIRS += [("shift-small", "light-m"), ("light-m", "light-m onnx"), ("light-m", "light-m int8")]
PAIRS += [("r3d_18", name) for name in STUDENTS if name != "light-m"]


def main(rounds: int, folder: Path) -> None:
    torch.manual_seed(0)
    clip = torch.rand(1, 3, 16, 112, 112)
    nets = {name: build_student(name, 101).eval() for name in (*STUDENTS, "r3d_18")}
    nets["x3d_xs"] = x3d_xs(101).eval()
    calls = {name: (lambda net=net: net(clip)) for name, net in nets.items()}
    four = [build_student("r3d_18", 101).eval() for _ in range(4)]
    calls["4 x r3d_18"] = lambda: [net(clip) for net in four]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    noise = [torch.rand(4, 3, 16, 112, 112) for _ in range(4)]
    export_onnx(nets["light-m"], noise[0], folder / "onnx")
    quantise(folder / "onnx", folder / "int8", noise)
    for kind in ("onnx", "int8"):
        session = onnxruntime.InferenceSession(folder / kind, options)
        calls[f"light-m {kind}"] = lambda session=session: session.run(
            None, {"clips": clip.numpy()}
        )
    times = dict(zip(calls, turns(list(calls.values()), rounds)[:, 0].T, strict=True))
    for name, seconds in times.items():
        print(f"{name:14} {1e3 * float(seconds.median()):8.2f} ms")
    for slow, fast in PAIRS:
        low, middle, high = (times[slow] / times[fast]).quantile(torch.tensor([0.25, 0.5, 0.75]))
        print(f"{slow} over {fast}: {middle:.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, Path(folder))
