"""Writing H.264."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from gdviz.core.files import atomic

FPS = 12


def encode(frames: np.ndarray, path: Path, *, fps: int = FPS, **options: str) -> None:
    """Write uint8 frames [f, h, w, 3] as an H.264 mp4 file; ``options`` are libx264's."""
    height, width = frames.shape[1:3]
    # Weighted prediction costs a third of the time and saves nothing here. x264's vector code
    # writes other bytes from run to run: of 5 to 20 % of videos of 32 pixels, which do without, and
    # of 5 in 2,052 of 64 pixels, once. There it stays: without it all files would be other ones.
    x264 = "weightp=0" + ":no-asm=1" * (min(height, width) < 64)
    defaults = {"crf": "20", "preset": "veryfast", "bf": "0", "threads": "1", "x264-params": x264}
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=defaults | options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with atomic(path) as temporary:
        temporary.write_bytes(content.getvalue())
