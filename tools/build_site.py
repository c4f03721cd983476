"""Write notebooks, pages and figures as a static site that opens from disk, without a network.

    python tools/build_site.py [--executed FOLDER] [--out build/site] [NOTEBOOK ...]

Notebooks are executed unless a folder of executed ones is given. Explorers keep the pictures they
carry for where no kernel runs, formulas become MathML, and links among the pages stay whole.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import posixpath
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "docs/*.md", "data/README.md")
WIDGET = "application/vnd.jupyter.widget-"
STYLE = """
body { max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; background: white;
  font: 1rem/1.55 system-ui, sans-serif }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.9rem }
a { color: #0550ae }
pre, table, math[display=block] { overflow-x: auto; max-width: 100% }
pre { padding: 0.5rem 0.8rem; font-size: 0.85rem; line-height: 1.4; white-space: pre-wrap }
.highlight pre { background: #f5f5f5 } img { max-width: 100%; height: auto }
table { border-collapse: collapse; display: block } td, th { padding: 0.2em 0.7em;
  border-bottom: 1px solid #ddd; text-align: left } summary { cursor: pointer }
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body><nav aria-label="pages">{nav}</nav><main>
{body}
</main></body></html>
"""


def mathml(tex: str, display: str) -> str:
    """Return a formula as MathML; raise ValueError for a command that cannot be converted."""
    found = convert(tex.replace(r"\arg", r"\operatorname{arg}"), display=display)
    if "\\" in found:
        raise ValueError(f"no MathML for a command in: {tex}")
    return found


def slug(heading: str) -> str:
    """Return the name of a heading in links, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


class Renderer(IPythonRenderer):
    """Markdown of ``folder`` to HTML: MathML for TeX, and links to what the site has."""

    def __init__(self, site: Site, folder: str) -> None:
        super().__init__(escape=False)
        self.site, self.folder = site, folder

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        return f'<h{level} id="{slug(html.unescape(re.sub("<.*?>", "", text)))}">{text}</h{level}>'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """Return a link, or its text alone where the site lacks the file."""
        found = self.site.address(url, self.folder)
        return text if found is None else super().link(text, found, title)

    def block_mermaidjs(self, code: str) -> str:
        raise ValueError("mermaid needs a script of its own: draw the diagram instead")


class Site:
    """Pages by their sources, both relative to the project and to the site."""

    def __init__(self, notebooks: Sequence[Path], out: Path) -> None:
        self.out, self.notebooks = out, list(notebooks)
        self.texts = sorted(path for pattern in TEXTS for path in ROOT.glob(pattern))
        self.pages = {f"notebooks/{p.name}": f"notebooks/{p.stem}.html" for p in self.notebooks}
        for path in self.texts:
            source = path.relative_to(ROOT).as_posix()
            self.pages[source] = source.removesuffix(".md") + ".html"
        self.pages |= {"README.md": "index.html", "figures": "figures/index.html"}

    def address(self, url: str, folder: str) -> str | None:
        """Return where a link found in a page of ``folder`` leads; None: nowhere on the site."""
        path, mark, anchor = url.partition("#")
        if not path:
            return mark + slug(anchor)
        if re.match(r"[a-z]+:", path):
            return url
        target = posixpath.normpath(posixpath.join(folder, path))
        if target in self.pages:
            return posixpath.relpath(self.pages[target], folder or ".") + mark + slug(anchor)
        return url if target.startswith("figures/") and (ROOT / target).is_file() else None

    def markdown(self, text: str, folder: str) -> str:
        """Return Markdown as HTML."""
        return MarkdownWithMath(renderer=Renderer(self, folder)).render(text)

    def write(self, page: str, title: str, body: str) -> None:
        """Write a page of the site."""
        folder = posixpath.dirname(page)
        names = {"README.md": "gdviz", "docs/results.md": "results", "figures": "figures"}
        names |= {f"notebooks/{path.name}": path.stem.replace("_", " ") for path in self.notebooks}
        links = ((posixpath.relpath(self.pages[k], folder or "."), v) for k, v in names.items())
        nav = " ".join(f'<a href="{address}">{name}</a>' for address, name in links)
        style = STYLE + HtmlFormatter().get_style_defs(".highlight")
        file = self.out / page
        file.parent.mkdir(parents=True, exist_ok=True)
        title = html.escape(title)
        file.write_text(PAGE.format(title=title, style=style, nav=nav, body=body), encoding="utf-8")

    def write_texts_and_figures(self) -> None:
        """Write what needs no notebook."""
        for path in self.texts:
            source = path.relative_to(ROOT).as_posix()
            text = path.read_text(encoding="utf-8")
            title = text.partition("\n")[0].lstrip("# ")
            self.write(self.pages[source], title, self.markdown(text, posixpath.dirname(source)))
        shutil.copytree(ROOT / "figures", self.out / "figures", dirs_exist_ok=True)
        for picture in ROOT.glob("docs/**/*.png"):
            copy = self.out / picture.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, copy)
        each = [
            f"## {stem.replace('_', ' ')}\n\n![{stem}]({stem}.png)\n\n[PDF]({stem}.pdf)"
            for stem in sorted(path.stem for path in (ROOT / "figures").glob("*.png"))
        ]
        self.write("figures/index.html", "figures", self.markdown("\n\n".join(each), "figures"))

    def write_notebook(self, name: str, notebook: NotebookNode) -> None:
        """Write an executed notebook."""
        exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True)
        exporter.exclude_output_prompt = True
        exporter.register_filter("markdown2html", lambda text: self.markdown(text, "notebooks"))
        body = exporter.from_notebook_node(still(notebook))[0]
        title = notebook.cells[0].source.partition("\n")[0].lstrip("# ")
        self.write(f"notebooks/{name}.html", title, body)


def still(notebook: NotebookNode) -> NotebookNode:
    """Return it without what needs a kernel; pictures are named after the heading above them."""
    notebook, heading = nbformat.from_dict(notebook), ""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) or [heading])[-1]
            continue
        for output in list(cell.outputs):
            data = output.get("data", {})
            if live := [kind for kind in data if kind.startswith(WIDGET)]:
                for kind in live:
                    del data[kind]
                if "text/html" not in data:  # a progress bar
                    cell.outputs.remove(output)
            if "image/png" in data:
                output.metadata["image/png"] = {"alt": f"picture: {heading}"}
    return notebook


def execute(path: Path) -> NotebookNode:
    """Return a notebook with outputs.

    Raises:
        RuntimeError: an explorer failed, which Jupyter does not tell of.
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    unset = "MPLBACKEND", "JPY_SESSION_NAME"  # figures, and explorers whole, as for a page
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    where: dict[str, Any] = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, resources=where).execute(env=environment)
    state = json.dumps(notebook.metadata.get("widgets", {}))
    if '"output_type": "error"' in state or "role='alert'" in state:
        raise RuntimeError(f"{path.name}: an explorer shows an error")
    return notebook


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all")
    parser.add_argument("--executed", type=Path, help="a folder of executed notebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "build/site")
    chosen = parser.parse_args(arguments)
    notebooks = chosen.notebooks or sorted((chosen.executed or ROOT / "notebooks").glob("*.ipynb"))
    if chosen.out.exists() and not (chosen.out / "index.html").exists():
        parser.error(f"--out {chosen.out}: is there and holds no site; choose another folder")
    shutil.rmtree(chosen.out, ignore_errors=True)
    site = Site(notebooks, chosen.out)
    site.write_texts_and_figures()
    for path in tqdm(notebooks, "notebooks"):
        done = nbformat.read(path, as_version=4) if chosen.executed else execute(path)
        site.write_notebook(path.stem, done)
    print(f"open {chosen.out / 'index.html'}")


if __name__ == "__main__":
    main()
