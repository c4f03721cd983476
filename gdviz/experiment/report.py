"""An experiment's table as pages: means with intervals, and the contrasts it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gdviz.core.files import UserError, atomic, load_json
from gdviz.experiment.statistics import compare, summarise
from gdviz.student.methods import find_method


def wide(results: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return a measure with draws as rows; columns are students, SETTING/STUDENT but the first."""
    students: Any = results[results["kind"] == "student"]
    first = students["setting"].iloc[0]
    names = students["name"].where(
        students["setting"] == first, students["setting"] + "/" + students["name"]
    )
    order = list(dict.fromkeys(names))
    table = students.assign(column=names).pivot(index="draw", columns="column", values=measure)
    return table[order]


def open_results(folder: Path) -> tuple[pd.DataFrame, list[tuple[str, str]], list[str]]:
    """Open an experiment's results, contrasts and measures.

    Raises:
        UserError: no experiment is there.
    """
    for name in ("results.csv", "plan.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder}: holds no finished experiment (no {name})")
    plan, results = load_json(folder / "plan.json"), _read(folder / "results.csv")
    if unknown := set(plan["measures"]) - set(results.select_dtypes("number")):
        numbers = ", ".join(results.select_dtypes("number"))
        problem = f"{min(unknown)!r} is no measure of its results; they hold {numbers}"
        raise UserError(f"{folder}: {problem}: mend the plan and run it again")
    return results, [(better, than) for better, than in plan["contrasts"]], plan["measures"]


def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype={"setting": str})  # which may look like a number


def tradeoff(folder: Path) -> pd.DataFrame:
    """Return a row a model of an experiment: how often it is right, and what its network costs.

    Columns: ``network``, ``kind``, ``name``; ``mean`` accuracy over draws, ``low`` and ``high`` of
    its interval, percent; ``ms`` of a clip on one thread (exported, where that is faster),
    ``params``, ``gflops`` and ``peak_mb``, from ``bench.json`` as ``gdviz bench --out`` writes it;
    and of a student, of its method, ``label``, ``colour``, ``marker``, ``headline`` and
    ``unlabelled``.

    Raises:
        UserError: no experiment or no ``bench.json`` is there, or it lacks a network.
    """
    results, rows = open_results(folder)[0], load_json(folder / "bench.json")["rows"]
    bench: Any = pd.DataFrame(rows).query("device == 'cpu' and threads == 1")
    costs = bench.groupby("name")[["params", "gflops", "peak_mb"]].max()
    costs["ms"] = bench[bench["engine"].isin(["eager", "onnx"])].groupby("name")["ms"].min()
    if lacking := sorted(set(results["network"]) - set(costs.index)):
        raise UserError(f"{folder / 'bench.json'}: holds nothing of {', '.join(lacking)}")
    keys = ["network", "kind", "name"]
    found: Any = summarise(results.pivot_table("accuracy", "draw", keys, sort=False))
    found = found.rename_axis(keys).reset_index().join(costs, "network")
    teachers = found.query("kind == 'teacher'")["name"].tolist()
    methods = {name: find_method(name, teachers) for name in {*found["name"]} - {*teachers}}
    for field in ("label", "colour", "marker", "headline", "unlabelled"):
        found[field] = [getattr(methods.get(name), field, None) for name in found["name"]]
    return found


def markdown(table: pd.DataFrame, head: str) -> str:
    """Return a table in Markdown, its index as the first column."""
    rows = [[str(name), *map(str, row)] for name, *row in table.itertuples()]
    lines = [[head, *map(str, table.columns)], ["---"] * (1 + len(table.columns)), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(table: pd.DataFrame, head: str) -> str:
    """Return a table in LaTeX (booktabs)."""
    escaped = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&"})
    rows = [[head, *map(str, table.columns)]]
    rows += [[str(name), *map(str, row)] for name, *row in table.itertuples()]
    lines = [" & ".join(cell.translate(escaped) for cell in row) + r" \\" for row in rows]
    begin = r"\begin{tabular}{l" + "r" * len(table.columns) + "}"
    body = [begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    return "\n".join(body)


def _means(table: Any) -> pd.DataFrame:
    shown = pd.DataFrame(index=table.index)
    shown["draws"] = table["n"].astype(int)
    shown["mean"] = table["mean"].map("{:.1f}".format)
    shown["95 % interval"] = [
        f"{a:.1f} to {b:.1f}" for a, b in zip(table["low"], table["high"], strict=True)
    ]
    shown["interquartile mean"] = table["iqm"].map("{:.1f}".format)
    return shown


def _contrasts(table: Any) -> pd.DataFrame:
    shown = pd.DataFrame(index=table["better"] + " minus " + table["than"])
    for name in ("difference", "low", "high"):
        shown[name] = table[name].map("{:+.1f}".format).to_numpy()
    shown["won"] = [f"{round(w * n)} of {n}" for w, n in zip(table["won"], table["n"], strict=True)]
    shown["p (sign flips)"] = table["p"].map("{:.4f}".format).to_numpy()
    shown["p (Holm)"] = table["p_holm"].map("{:.4f}".format).to_numpy()
    return shown


def _by_domain(results: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    first: Any = results[results["setting"] == results["setting"].iloc[0]]
    means: Any = 100 * first.groupby(["kind", "name"], sort=False)[list(columns)].mean()
    means.index = [f"{kind}: {name}" for kind, name in means.index]
    return means.rename(columns=lambda c: c.removeprefix("accuracy: ")).map("{:.1f}".format)


def report(folder: Path) -> str:
    """Write ``report.md`` and ``tables.tex`` beside an experiment's results; return the first."""
    results, contrasts, measures = open_results(folder)
    text, tex = [], []
    for measure in measures:
        table = wide(results, measure)
        means = _means(summarise(table))
        text += [f"## {measure}, %", "", markdown(means, "student"), ""]
        tex += [f"% {measure}", latex(means, "student")]
        if contrasts:
            found = _contrasts(compare(table, contrasts))
            text += [markdown(found, "difference, points"), ""]
            tex.append(latex(found, "difference, points"))
    if columns := [c for c in results if c.startswith("accuracy: ")]:
        domains = _by_domain(results, columns)
        text += ["## By domain, %, mean over draws", "", markdown(domains, ""), ""]
    if (folder / "edges.csv").exists():
        edges = _read(folder / "edges.csv").dropna(subset=["target"])
        if len(edges):
            shares = ["target", "at_home"]
            kept: Any = edges.groupby(["setting", "edges"], sort=False)[shares].mean()
            kept.index = ["/".join(i) for i in kept.index]
            shown = (100 * kept).map("{:.1f}".format)
            text += ["## Targets on unlabelled clips, %, mean over draws", ""]
            text += [markdown(shown, "edges"), ""]
    for name, lines in {"report.md": text, "tables.tex": tex}.items():
        with atomic(folder / name) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
    return "\n".join(text)
