"""The site opens from disk: it loads nothing, its links lead somewhere, its explorers are whole."""

import importlib.util
import re
import sys
from html.parser import HTMLParser

import matplotlib as mpl
import nbformat
import pytest
from conftest import REPO

mpl.use("Agg")

from gdviz.show import static, widgets

spec = importlib.util.spec_from_file_location("build_site", REPO / "tools/build_site.py")
build_site = sys.modules["build_site"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_site)
new = nbformat.v4


class Number(widgets.Explorer):
    """A number."""

    size, panels = (1.0, 1.0), 1

    def draw(self, axes, x):
        return {"x": x}


def output(data):
    return new.new_output("display_data", data)


def notebook():
    """As Jupyter leaves it: an explorer, a progress bar, a picture, and a widgets' state."""
    bundle = Number(x=static.Control("x", range(3), 1, still=3))._repr_mimebundle_()
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    outputs = [
        output(bundle),
        output(view | {"text/plain": "  0%"}),
        output({"image/png": "iVBORw0KGgo="}),
    ]
    text = r"""# 00 · Small
$\arg\min_t \sqrt{t}$ and [next](01_next.ipynb#Look), [results](../docs/results.md),
[code](../gdviz/config.py), [far](https://arxiv.org/abs/1804.10069)

$$\sum_k w_k = 1$$

## Look"""
    cells = [new.new_markdown_cell(text), new.new_code_cell("x = 1", outputs=outputs)]
    state = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    return new.new_notebook(cells=cells, metadata={"widgets": state})


class Loads(HTMLParser):
    """What a page loads and links to; ``ids`` are the places in it."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.linked, self.ids, self.unnamed = [], [], set(), 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        self.ids.add(of.get("id"))
        self.loaded += [of[k] for k in ("src", "srcset", "data", "poster") if k in of]
        self.loaded += [of["href"]] if tag == "link" else []
        self.linked += [of["href"]] if tag == "a" and "href" in of else []
        self.unnamed += tag == "img" and not of.get("alt")


def assert_whole(site):
    """Nothing is loaded from a network, no widget needs a kernel, every link leads somewhere."""
    pages = {path: Loads(path.read_text()) for path in site.rglob("*.html")}
    for path, page in pages.items():
        text = path.read_text()
        assert "application/vnd.jupyter.widget" not in text
        assert not re.search(r"@import|url\(\s*['\"]?http|require\.js|mathjax|<link[^>]+http", text)
        assert page.unnamed == 0, path
        for address in page.loaded:
            assert address.startswith("data:") or (path.parent / address).is_file(), address
        for address in page.linked:
            file, _, anchor = address.partition("#")
            if not re.match(r"[a-z]+:", address):
                there = (path.parent / file).resolve() if file else path
                assert there.is_file(), (path, address)
                assert not anchor or there not in pages or anchor in pages[there].ids, address
    return pages


@pytest.fixture
def small(tmp_path):
    for name in ("00_small", "01_next"):
        nbformat.write(notebook(), tmp_path / f"{name}.ipynb")
    build_site.main(["--executed", str(tmp_path), "--out", str(tmp_path / "site")])
    return tmp_path / "site"


def test_a_small_site_loads_nothing_and_its_explorer_is_whole(small):
    pages = assert_whole(small)
    text = (small / "notebooks/00_small.html").read_text()
    assert {p.relative_to(small).as_posix() for p in pages} >= {"index.html", "docs/results.html"}
    assert text.count("still({") == 1
    assert static.SCRIPT in text
    assert "  0%" not in text
    assert text.count("<math") == 2
    assert 'alt="picture: Look"' in text


def test_links_lead_to_pages_or_are_text(small):
    text = (small / "notebooks/00_small.html").read_text()
    assert 'href="01_next.html#look"' in text
    assert 'href="../docs/results.html"' in text
    assert 'href="https://arxiv.org/abs/1804.10069"' in text
    assert ">code<" not in text and "code" in text
    assert 'src="figures/logits_graph.png"' in (small / "index.html").read_text()


def test_what_cannot_be_shown_without_a_network_is_refused():
    site = build_site.Site([], REPO)
    with pytest.raises(ValueError, match=r"no MathML.*\\nonsense"):
        site.markdown(r"$\nonsense{x}$", "")
    with pytest.raises(ValueError, match="mermaid"):
        site.markdown("```mermaid\ngraph LR\n```", "")


def test_every_formula_of_the_notebooks_becomes_mathml():
    site = build_site.Site(sorted((REPO / "notebooks").glob("*.ipynb")), REPO)
    found = [
        site.markdown(cell.source, "notebooks")
        for path in site.notebooks
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    ]
    assert sum(text.count("<math") for text in found) > 50


def test_an_explorer_that_failed_stops_the_build(tmp_path):
    source = """import anywidget, traitlets
class W(anywidget.AnyWidget):
    _esm = ""
    shown = traitlets.Unicode("<b role='alert'>").tag(sync=True)
W()"""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    path = tmp_path / "failed.ipynb"
    nbformat.write(new.new_notebook(cells=[new.new_code_cell(source)], metadata=kernel), path)
    with pytest.raises(RuntimeError, match=r"failed\.ipynb: an explorer shows an error"):
        build_site.execute(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_whole_site_is_whole_and_small(tmp_path):
    build_site.main(["--out", str(tmp_path / "site")])
    pages = assert_whole(tmp_path / "site")
    texts = [path.read_text() for path in pages]
    assert sum(text.count("still({") for text in texts) >= 5
    size = sum(file.stat().st_size for file in (tmp_path / "site").rglob("*") if file.is_file())
    assert size < 30e6


def test_only_a_site_is_replaced(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit):
        build_site.main(["--out", str(tmp_path)])
    assert "holds no site" in capsys.readouterr().err and (tmp_path / "mine.txt").exists()
