"""Explorers on a page: one script draws their controls, with a kernel or without.

With a kernel the page sends where the controls stand and is sent a picture. Without, it has a table
of pictures, of some values of each control, and needs neither a server nor a network.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import anywidget
import numpy as np
import traitlets
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from gdviz.show import plots

MOST = 60  # pictures in a table
DPI = 110
SCRIPT = Path(__file__).with_name("explorer.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Control:
    """A choice among values.

    Args:
        label: its name, also for those who hear the page.
        values: what can be chosen.
        start: the one chosen first.
        still: how many of the values a page without a kernel has.
        kind: its look; a "player" is a slider with a button that moves it.
    """

    label: str
    values: Sequence[Any]
    start: Any
    still: int = 1
    kind: Literal["slider", "buttons", "player"] = "slider"

    @property
    def page(self) -> dict[str, Any]:
        """What the page knows of it."""
        texts = [v if isinstance(v, str) else f"{v:.4g}" for v in self.values]
        return {"label": self.label, "kind": self.kind, "texts": texts}

    def thinned(self, room: int, now: Any) -> Control:
        """Return it with up to ``room`` of its values, evenly spread, ``now`` among them."""
        count, at = min(self.still, room, len(self.values)), list(self.values).index(now)
        kept = np.linspace(0, len(self.values) - 1, count).round().astype(int)
        kept[np.abs(kept - at).argmin()] = at
        return replace(self, values=[self.values[k] for k in kept], start=now)


def log_scale(low: float, high: float, steps: int) -> list[float]:
    """Return values with two digits, each about the same multiple of the one before."""
    return [float(f"{v:.2g}") for v in np.geomspace(low, high, steps)]


class Page(anywidget.AnyWidget):
    """The side of an explorer that a browser sees; ``at`` is a value's number for each control."""

    _esm = f"{SCRIPT}\nexport default {{ render }};"
    title = traitlets.Unicode().tag(sync=True)
    controls = traitlets.List().tag(sync=True)
    at = traitlets.List().tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)  # picture, alt, readout, and the ``at`` they are for


_PLAYING: WeakKeyDictionary[Figure, tuple[Axes, np.ndarray]] = WeakKeyDictionary()


def play(ax: Axes, frames: UInt8[np.ndarray, "f h w 3"]) -> None:
    """Draw a video that plays by itself, again and again, on a page; its first frame elsewhere."""
    ax.imshow(frames[0], interpolation="nearest")
    ax.axis("off")
    _PLAYING[plots.figure_of(ax)] = ax, frames


def _pictures(figure: Figure, still: Image.Image) -> list[Image.Image]:
    """Return a picture, or one for each frame of what plays in it."""
    if figure not in _PLAYING:
        return [still.quantize(128)]  # colours: a third of the bytes
    ax, frames = _PLAYING[figure]
    left, bottom, right, top = map(round, ax.get_window_extent().extents)
    pictures, size = [], (right - left, top - bottom)
    for frame in frames:
        small = Image.fromarray(frame).resize(size, Image.Resampling.NEAREST)
        pictures.append(still.copy())
        pictures[-1].paste(small, (left, still.height - top))
    return pictures


def shown(title: str, figure: Figure, numbers: Mapping[str, float | str]) -> dict[str, str]:
    """Return a picture and its read-out as a page shows them."""
    small = io.BytesIO()
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    with plots.style():
        canvas.draw()
    still = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    first, *more = _pictures(figure, still)
    moving: dict[str, Any] = {"save_all": True, "append_images": more, "duration": 160, "loop": 0}
    first.save(small, "png", **moving if more else {})
    words = {k: v if isinstance(v, str) else f"{v:.3g}" for k, v in numbers.items()}
    each = (f"{html.escape(k)} <b>{html.escape(v)}</b>" for k, v in words.items())
    return {
        "picture": "data:image/png;base64," + base64.b64encode(small.getvalue()).decode(),
        "alt": f"{title} {', '.join(f'{k}: {v}' for k, v in words.items())}",
        "readout": " &nbsp;·&nbsp; ".join(each),
    }


def block(title: str, controls: Mapping[str, Control], now: dict[str, Any], show: Any) -> str:
    """Return HTML that needs nothing else: the controls, and a table of what ``show`` returns.

    At most ``MOST`` pictures: the controls whose turn comes last stay where they stand, ``now``.
    """
    kept, room = {}, MOST
    for name, control in controls.items():
        kept[name] = control.thinned(room, now[name])
        room //= len(kept[name].values)
    moving = {name: control for name, control in kept.items() if len(control.values) > 1}
    grid = list(itertools.product(*(control.values for control in moving.values())))
    each = [shown(title, *show(**now | dict(zip(moving, values, strict=True)))) for values in grid]
    first = each[grid.index(tuple(control.start for control in moving.values()))]
    at = [list(control.values).index(control.start) for control in moving.values()]
    pages = [control.page for control in moving.values()]
    table = {"title": title, "controls": pages, "at": at, "shown": each}
    data = json.dumps(table).replace("</", "<\\/")
    fixed = ", ".join(f"{c.label} {c.page['texts'][0]}" for c in kept.values() if len(c.values) < 2)
    note = f"<small>Fixed here, free with a kernel: {html.escape(fixed)}.</small>" if fixed else ""
    return (
        f'<div><div><img src="{first["picture"]}" alt="{html.escape(first["alt"])}"></div>\n'
        f"<script>(() => {{\n{SCRIPT}\nrender({{ model: still({data}),"
        f" el: document.currentScript.previousElementSibling }});\n}})()</script>{note}</div>"
    )
