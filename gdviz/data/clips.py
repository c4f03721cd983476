"""Clips out of videos: where a clip starts, how its frames are spaced, how it is seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import pad


def to_float(frames: Tensor) -> Tensor:
    """uint8 [..., f, h, w, 3] to float32 [..., f, 3, h, w], centred and of about unit variance."""
    return frames.movedim(-1, -3).float().div_(255).sub_(0.5).div_(0.25)


def starts_and_strides(
    count: int,
    frames: int,
    length: int,
    stride: int | Tensor,
    rng: Generator | None = None,
    place: float | Tensor = 0.5,
) -> tuple[Tensor, Tensor]:
    """Where the clips of ``count`` videos start and how far apart their frames are, [count] each:
    see :func:`pick_frames`."""
    if frames < length:
        raise ValueError(
            f"a clip of {length} frames does not fit a video of {frames}: lower the clip length or "
            "raise the frames kept"
        )
    stride = torch.as_tensor(stride).expand(count).clamp(max=(frames - 1) // max(length - 1, 1))
    room = frames - 1 - stride * (length - 1)  # (b,)
    return (room * place).long() if rng is None else (
        torch.rand(count, generator=rng) * (room + 1)
    ).long(), stride


def pick_frames(
    videos: Tensor,
    length: int,
    stride: int | Tensor,
    rng: Generator | None = None,
    place: float | Tensor = 0.5,
) -> Tensor:
    """Takes ``length`` frames, ``stride`` frames apart, from each video: [b, f, ...] to [b, length,
    ...].

    Args:
        videos: decoded videos, frames second.
        length: frames of a clip.
        stride: distance between frames; one for all, or one a video [b]. Lowered to the largest
            that fits when the videos are too short for it.
        rng: draws the starts uniformly; None puts them all at ``place``.
        place: where clips start, from 0 (the first frame) over 0.5 (centred) to 1 (the last that
            fits); one for all, or one a video.

    Raises:
        ValueError: the videos have fewer frames than a clip.
    """
    count, frames = videos.shape[:2]
    start, stride = starts_and_strides(count, frames, length, stride, rng, place)
    index = start[:, None] + stride[:, None] * torch.arange(length)  # (b, t)
    rows = torch.arange(count)[:, None]
    return videos[rows.to(videos.device), index.to(videos.device)]


def sample_clips(
    videos: Float[Tensor, "b f 3 h w"],
    length: int,
    stride: int | Tensor,
    rng: Generator | None = None,
) -> Float[Tensor, "b 3 t h w"]:
    """One clip of each video, by :func:`pick_frames`, in the layout of networks."""
    return pick_frames(videos, length, stride, rng).transpose(1, 2)


def clips_of(
    frames: Tensor,
    length: int,
    stride: int,
    rng: Generator | None = None,
    place: float | Tensor = 0.5,
) -> Float[Tensor, "b 3 t h w"]:
    """``sample_clips(to_float(frames), ...)`` of raw frames [b, f, h, w, 3]; only those of the clip
    are converted."""
    return to_float(pick_frames(frames, length, stride, rng, place)).transpose(1, 2)


def clip_places(clips: int) -> list[float]:
    """Where that many clips of a video start, evenly from its start to its end; one is in the
    middle."""
    return torch.linspace(0, 1, clips).tolist() if clips > 1 else [0.5]


def multi_views(
    frames: Tensor,
    length: int,
    stride: int,
    clips: int | None = 10,
    crops: int = 3,
    side: int | None = None,
) -> Iterator[Float[Tensor, "b 3 t s s"]]:
    """The clips of raw frames [b, f, h, w, 3] whose outputs are averaged in testing (Wang et al.
    2018, non-local: 10 clips x 3 crops).

    Args:
        length, stride: frames of a clip, and from one to the next.
        clips: starts, spread evenly over the video; None for every start that fits (dense).
        crops: squares along the longer side, or along the rows of a square, from one end to the
            other; one is the middle.
        side: of a crop, in pixels; by default the shorter side for one crop, and 7/8 of it for more
            (224 of 256).

    Raises:
        ValueError: less than one crop, or crops larger than the frames.
    """
    height, width = frames.shape[2:4]
    side = side or (min(height, width) if crops == 1 else min(height, width) * 7 // 8)
    if crops < 1 or side > min(height, width):
        raise ValueError(
            f"crops={crops}, side={side}: needs one crop or more, within {height} x {width} pixels"
        )
    room = (
        frames.shape[1]
        - 1
        - min(stride, (frames.shape[1] - 1) // max(length - 1, 1)) * (length - 1)
    )
    dense = [
        min(1.0, (start + 0.5) / max(room, 1)) for start in range(room + 1)
    ]  # + 0.5: starts are rounded down
    for place in dense if clips is None else clip_places(clips):
        clip = clips_of(frames, length, stride, place=place)
        for share in torch.linspace(0, 1, crops).tolist() if crops > 1 else [0.5]:
            along, across = share if height > width else 0.5, share if height <= width else 0.5
            top, left = round((height - side) * along), round((width - side) * across)
            yield clip[..., top : top + side, left : left + side]


def augment(
    clips: Float[Tensor, "b 3 t h w"], rng: Generator, strength: float = 1.0
) -> Float[Tensor, "b 3 t h w"]:
    """Random shift by up to a twelfth of the side, brightness, contrast and colour balance.

    The same for all frames of a clip, so that motion is left alone; no flip, which would turn
    "left" into "right".
    """
    count, _, _, height, width = clips.shape
    margin = max(1, width // 12)
    padded = pad(clips.flatten(1, 2), [margin] * 4, mode="replicate").unflatten(1, clips.shape[1:3])
    shift = torch.randint(2 * margin + 1, (count, 2), generator=rng)
    rows = (shift[:, :1] + torch.arange(height)).to(clips.device)  # (b, h)
    columns = (shift[:, 1:] + torch.arange(width)).to(clips.device)
    padded = padded.gather(
        3, rows[:, None, None, :, None].expand(-1, *padded.shape[1:3], -1, padded.shape[4])
    )
    moved = padded.gather(4, columns[:, None, None, None, :].expand(-1, *padded.shape[1:4], -1))
    gain = torch.exp(0.2 * strength * torch.randn(count, 3, 1, 1, 1, generator=rng))
    offset = 0.2 * strength * torch.randn(count, 3, 1, 1, 1, generator=rng)
    return moved * gain.to(clips) + offset.to(clips)
