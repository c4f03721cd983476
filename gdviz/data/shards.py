"""Sets of videos as WebDataset .tar shards: JPEG frames that an object store serves as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from gdviz.core.files import UserError, load_json, save_json
from gdviz.data.cache import from_jpeg, to_jpeg
from gdviz.data.clips import starts_and_strides
from gdviz.data.videos import VideoSet


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise UserError("shards need WebDataset; pip install 'gdviz[shards]'") from None
    return webdataset


def write_shards(videos: VideoSet, out: Path, *, per_shard: int = 256) -> list[Path]:
    """Writes one ``SPLIT-NNNNNN.tar`` after another, in an order drawn once, and ``index.json`` last.

    A sample holds ``json`` (label, group, split, row) and ``000.jpg``, ``001.jpg``, ...: the frames that the view kept.

    Raises:
        UserError: the disk is full, or WebDataset is missing.
    """
    wds, files = _webdataset(), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split in sorted(set(videos.splits)):
            rows = videos.rows(split)[
                torch.randperm(len(videos.rows(split)), generator=Generator().manual_seed(0))
            ]
            with wds.ShardWriter(
                str(out / f"{split}-%06d.tar"), maxcount=per_shard, verbose=0
            ) as writer:
                for row in rows.tolist():
                    label = int(videos.labels[row])
                    about = {
                        "label": videos.label_names[label] if label >= 0 else "",
                        "group": videos.groups[row],
                        "row": row,
                    }
                    frames = {
                        f"{k:03d}.jpg": to_jpeg(frame)
                        for k, frame in enumerate(videos.batch(torch.tensor([row]))[0].numpy())
                    }
                    writer.write(
                        {"__key__": f"{row:08d}", "json": about | {"split": split}, **frames}
                    )
            files += [out / f"{split}-{n:06d}.tar" for n in range(-(-len(rows) // per_shard))]
        index = {
            "fingerprint": videos.fingerprint,
            "label_names": videos.label_names,
            "frames": len(frames),
        }
        save_json(out / "index.json", index | {"shards": [file.name for file in files]})
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error}; free some space or choose another folder"
        ) from error
    return files


def stream_clips(
    index: Path | str,
    split: str,
    length: int,
    stride: int = 1,
    *,
    rng: Generator | None = None,
    shuffle: int = 0,
    root: str = "",
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """One clip of each video of a split, as it comes: uint8 [length, h, w, 3] and its ``json``; other frames are not decoded.

    Args:
        index: ``index.json`` of the shards.
        split: train, unlabelled or test.
        length: frames of a clip.
        stride: kept frames from one frame of a clip to the next.
        rng: draws where clips start; None centres them.
        shuffle: videos among which the next one is drawn.
        root: where the shards are, if not beside the index: ``https://...``, or what else WebDataset opens (``pipe:...``).
    """
    wds, known = _webdataset(), load_json(index)
    urls = [
        f"{root or Path(index).parent}/{name}"
        for name in known["shards"]
        if name.startswith(f"{split}-")
    ]
    samples = wds.WebDataset(urls, shardshuffle=len(urls) if shuffle else False, empty_check=False)
    for sample in samples.shuffle(shuffle) if shuffle else samples:
        start, step = map(int, starts_and_strides(1, known["frames"], length, stride, rng))
        clip = np.stack([from_jpeg(sample[f"{start + k * step:03d}.jpg"]) for k in range(length)])
        yield torch.from_numpy(clip), json.loads(sample["json"])
