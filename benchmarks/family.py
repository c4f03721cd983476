"""Costs of the networks of plans/family.toml, in turns: ``python -m benchmarks.family OUT.json``

Clips of 8x24x24 (profile `specialists`), one thread, eager and exported; untrained, since training
changes no cost. int8 is calibrated on noise: its speed counts here, not its answers.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gdviz.config import PROFILES
from gdviz.core.files import save_json
from gdviz.experiment.bench import bench, bench_table
from gdviz.experiment.folder import environment
from gdviz.student.export import export_onnx, quantise
from gdviz.student.family import build_student

NETWORKS = ("tiny16m", "tiny8m", "light-2xsm", "light-xsm", "light-sm")  # a teacher, then students


def main(out: Path, folder: Path) -> None:
    torch.manual_seed(0)
    view = PROFILES["specialists"].view
    models = {name: (build_student(name, 12).eval(), view) for name in NETWORKS}
    noise = [torch.randn(16, 3, view.length, view.size, view.size) for _ in range(2)]
    for name, (net, _) in models.items():
        (folder / name).mkdir()
        export_onnx(net, noise[0], folder / name / "model.onnx")
        if name.startswith("light"):
            quantise(folder / name / "model.onnx", folder / name / "model-int8.onnx", noise)
    rows = bench(models, compiled=False, exports=[folder / name for name in NETWORKS], rounds=40)
    save_json(out, {"machine": environment(), "rows": rows})
    print(bench_table(rows))


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(Path(sys.argv[1]), Path(folder))
