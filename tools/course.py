"""Make a course of the notebooks: copies without solutions, and a page for whoever teaches it.

    python tools/course.py [build/course]

Students get the notebooks with their questions, hints and checks. ``instructor.md`` has what each
costs in minutes, what it asks to be predicted, and the exercises with pitfalls and solutions.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n(.*?)</details>\n*", re.DOTALL)
HEAD = r"^\*\*(\d · .+?)\*\* \((easy|medium|hard), (\d+) minutes\)\.? ?"
EXERCISE = re.compile(HEAD + r"(.*(?:\n.+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    """One exercise as its notebook has it."""

    title: str
    level: str
    minutes: int
    question: str
    solution: str  # Markdown: code and comments, a pitfall last
    pitfall: str


def prose(notebook: nbformat.NotebookNode) -> str:
    """Return all Markdown of a notebook."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def exercises(notebook: nbformat.NotebookNode) -> list[Exercise]:
    """Return a notebook's exercises; raise ValueError where one has no solution or pitfall."""
    text = prose(notebook)
    asked, solved = EXERCISE.findall(text), SOLUTION.findall(text)
    found = []
    for (title, level, minutes, question), solution in zip(asked, solved, strict=True):
        code, mark, pitfall = solution.rpartition("*Pitfall:* ")
        if not mark:
            raise ValueError(f"{title}: its solution names no pitfall")
        found.append(Exercise(title, level, int(minutes), question, code.strip(), pitfall.strip()))
    return found


def student_copy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy without solutions, whose links fit its place two folders down."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            source = SOLUTION.sub("", cell.source).strip()
            cell.source = source.replace("](../", "](../../")
    return copy


def page_of(name: str, notebook: nbformat.NotebookNode) -> tuple[str, int]:
    """Return a notebook's part of the instructor's page, and its minutes of work."""
    text, given = prose(notebook), exercises(notebook)
    title = text.splitlines()[0].removeprefix("# ")
    cost = re.search(r"\*\*Cost\.\*\* (.+)", text)[1]
    question = re.search(r"\*\*Question\.\*\* (.+)", text)[1]
    predictions = [line.strip() for line in re.findall(r"\*\*Predict\.\*\* (.+)", text)]
    work = sum(e.minutes for e in given) + 2 * len(predictions)
    lines = [f"## [{title}]({name})", "", question, ""]
    lines += [f"**Minutes.** {work}: two for each prediction, and the exercises'. {cost}", ""]
    lines += ["**Predictions**; their answers are computed, and folded below the cell:", ""]
    lines += [f"{i}. {line}" for i, line in enumerate(predictions, 1)]
    for e in given:
        lines += ["", f"### {e.title} ({e.level}, {e.minutes} minutes)", "", e.question, ""]
        lines += [f"**Pitfall.** {e.pitfall}", "", e.solution]
    return "\n".join(lines), work


def make_course(folder: Path) -> None:
    """Write the students' notebooks and ``instructor.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, minutes = [], {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(student_copy(notebook), folder / path.name)
        part, minutes[path.stem] = page_of(path.name, notebook)
        parts.append(part)
    table = [f"| {name} | {count} |" for name, count in minutes.items()]
    head = ["# For whoever teaches it", "", "| notebook | minutes |", "|---|---|", *table]
    head += ["", f"In all {sum(minutes.values()) / 60:.1f} hours of work; running takes minutes."]
    head += ["A check raises until its answer is right, so *Run all* passes over it.", ""]
    (folder / "instructor.md").write_text("\n".join([*head, "\n\n".join(parts), ""]))


if __name__ == "__main__":
    make_course(Path(sys.argv[1] if len(sys.argv) > 1 else "build/course"))
