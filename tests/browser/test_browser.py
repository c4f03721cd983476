"""In a real browser: explorers follow the keyboard in JupyterLab and, without a network, on pages.

Needs Chromium (Debian: ``apt-get install chromium``) and playwright, which ``make test-browser``
installs. No browser is downloaded.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from conftest import REPO

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("default")]
EVERY = """import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_widgets
explorers = [make(test_widgets.CAST) for make in test_widgets.MAKE.values()]"""


@pytest.fixture(scope="module")
def browser():
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    if not (chromium := next(found, None)):
        pytest.skip("needs Chromium: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="needs make test-browser")
    with driver.sync_playwright() as p:
        yield p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A notebook with an explorer of every kind."""
    first = EVERY.format(root=str(REPO), tests=str(REPO / "tests/show"))
    each = [f"explorers[{k}]" for k in range(8)]
    path = tmp_path_factory.mktemp("lab") / "every.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in (first, *each)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture(scope="module")
def lab(notebook):
    """JupyterLab with settings of its own; the address of the notebook in it."""
    folder = notebook.parent
    settings = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # outputs out of sight stay on the page
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    environment |= {f"JUPYTER_{k}_DIR": str(folder / k) for k in ("CONFIG", "DATA", "RUNTIME")}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--ServerApp.root_dir={folder}"]
    options += ["--IdentityProvider.token=", "--ServerApp.port_retries=0"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api").close()
            break
        except OSError:
            assert server.poll() is None, (folder / "lab.log").read_text()
            time.sleep(0.5)
    yield f"{address}/lab/tree/{notebook.name}"
    server.terminate()
    server.wait(30)


def listened(page):
    """What goes wrong on a page from now on."""
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    return wrong


def shown(explorer):
    picture = explorer.locator("img")
    readout = explorer.locator("div[role=status]").inner_text()
    return picture.get_attribute("src"), picture.get_attribute("alt"), readout


def press(explorer, key, what):
    """Press a key; the picture, its text and the read-out must follow."""
    before = shown(explorer)
    explorer.page.keyboard.press(key)
    for _ in range(200):
        explorer.page.wait_for_timeout(50)
        now = shown(explorer)
        same = [a for a, b in zip(before, now, strict=True) if a == b]
        if not same and now[2] != "drawing …":
            return
    raise AssertionError(f"{what}: {key} changes nothing of {[text[-99:] for text in same]}")


def move_all(explorer):
    """Move each control of an explorer by keyboard; return how many there are."""
    assert explorer.locator("img").evaluate("i => i.naturalWidth >= i.width && i.width > 0")
    sliders, groups = explorer.get_by_role("slider"), explorer.get_by_role("radiogroup")
    for slider in sliders.all():
        name, said = slider.get_attribute("aria-label"), slider.get_attribute("aria-valuetext")
        assert name
        slider.focus()
        last = slider.evaluate("s => s.value === s.max")
        press(explorer, "ArrowLeft" if last else "ArrowRight", name)
        assert slider.get_attribute("aria-valuetext") != said
        assert slider.evaluate("s => s === document.activeElement")
    for group in groups.all():
        assert group.get_attribute("aria-label")
        group.get_by_role("radio", checked=True).focus()
        press(explorer, "ArrowDown", group.get_attribute("aria-label"))
    for play in explorer.get_by_role("button").all():
        assert play.get_attribute("aria-label").startswith("play")
        play.focus()
        press(explorer, "Space", "play")
        explorer.page.keyboard.press("Space")
        assert play.get_attribute("aria-label").startswith("play")
    return sliders.count() + groups.count()


def test_each_control_answers_the_keyboard_in_jupyterlab(browser, lab):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(20_000)
    page.goto(lab)
    page.locator(".jp-Notebook .jp-CodeCell").nth(8).wait_for(timeout=90_000)
    wrong = listened(page)
    page.get_by_text("Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    explorers = page.locator(".gdviz")
    explorers.nth(7).locator("img").wait_for(timeout=180_000)
    assert [move_all(explorers.nth(k)) for k in range(8)] == [5, 4, 3, 1, 2, 1, 1, 1]
    explorers.first.get_by_role("slider").first.focus()
    for key in "rmyabx":  # of JupyterLab: raw, markdown, code, above, below, cut
        page.keyboard.press(key)
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == 9
    assert page.locator(".jp-Notebook .jp-Cell").count() == 9
    assert wrong == []


MADE = REPO / "build/site"


@pytest.mark.parametrize(
    "site",
    [
        "of every explorer",
        pytest.param("made", marks=pytest.mark.skipif(not MADE.exists(), reason="no make site")),
    ],
)
def test_each_control_of_the_site_answers_the_keyboard_without_a_network(browser, notebook, site):
    folder = MADE if site == "made" else notebook.parent / "site"
    if site != "made":
        command = [sys.executable, REPO / "tools/build_site.py", "--out", folder, notebook]
        subprocess.run(command, check=True)
    page, moved = browser.new_page(viewport={"width": 1100, "height": 900}), 0
    page.context.set_offline(True)
    wrong, asked = listened(page), []
    page.on("request", lambda request: asked.append(request.url))
    for file in sorted(folder.rglob("*.html")):
        page.goto(file.as_uri())
        moved += sum(move_all(explorer) for explorer in page.locator(".gdviz").all())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), file
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)"), file
    assert moved >= 10
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert wrong == []
