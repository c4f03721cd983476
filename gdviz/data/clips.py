"""Clips out of videos: where a clip starts, how its frames are spaced, how it is seen."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Generator, Tensor
from torch.nn.functional import pad


def to_float(frames: UInt8[Tensor, "*b f h w 3"]) -> Float[Tensor, "*b f 3 h w"]:
    """Return pixels as float32, centred and of about unit variance."""
    return frames.movedim(-1, -3).float().div_(255).sub_(0.5).div_(0.25)


def starts_and_strides(
    count: int,
    frames: int,
    length: int,
    stride: int | Tensor,
    rng: Generator | None = None,
    place: float | Tensor = 0.5,
    windows: int = 1,
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Return where clips of ``count`` videos start, and their strides: see :func:`pick_frames`.

    Of videos that are kept as several windows, one after the other, a clip lies in one of them.
    """
    frames = frames // windows
    if frames < length:
        problem = f"a clip of {length} frames does not fit a video of {frames}"
        raise ValueError(f"{problem}: lower the clip length or raise the frames kept")
    stride = torch.as_tensor(stride).expand(count).clamp(max=(frames - 1) // max(length - 1, 1))
    last = frames - 1 - stride * (length - 1)  # the last start that fits, (b,)
    fixed = rng is None
    place = torch.as_tensor(place).expand(count) if fixed else torch.rand(count, generator=rng)
    window = (place * windows).long().clamp(max=windows - 1)
    within = place * windows - window  # 0 to 1; less than 1 where it is drawn
    start = (within * (last if fixed else last + 1)).long()  # a draw takes each start as often
    return window * frames + torch.minimum(start, last), stride


def pick_frames(
    videos: Shaped[Tensor, "b f ..."],
    length: int,
    stride: int | Tensor,
    rng: Generator | None = None,
    place: float | Tensor = 0.5,
) -> Shaped[Tensor, "b t ..."]:
    """Return ``length`` frames, ``stride`` (lowered to what fits) apart, of each video.

    ``rng`` draws where clips start; without it they start at ``place``, from 0 (the first frame)
    over 0.5 (centred) to 1 (the last start that fits). Stride and place may be given by video, [b].
    Raise ValueError where the videos have fewer frames than a clip.
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
    """Return one clip of each video, by :func:`pick_frames`, in the layout of networks."""
    return pick_frames(videos, length, stride, rng).transpose(1, 2)


def clip_places(clips: int) -> list[float]:
    """Return where that many clips of a video start, spread evenly; one is in the middle."""
    return torch.linspace(0, 1, clips).tolist() if clips > 1 else [0.5]


def augment(
    clips: Float[Tensor, "b 3 t h w"], rng: Generator, strength: float = 1.0
) -> Float[Tensor, "b 3 t h w"]:
    """Shift clips by up to a twelfth of their side, change brightness, contrast and colours.

    All frames of a clip alike, so that motion is left alone; no flip, which would turn "left" into
    "right".
    """
    count, _, _, height, width = clips.shape
    margin = max(1, width // 12)
    padded = pad(clips.flatten(1, 2), [margin] * 4, mode="replicate").unflatten(1, clips.shape[1:3])
    shift = torch.randint(2 * margin + 1, (count, 2), generator=rng).tolist()
    corners = zip(padded, shift, strict=True)
    moved = torch.stack([clip[..., y : y + height, x : x + width] for clip, (y, x) in corners])
    gain = torch.exp(0.2 * strength * torch.randn(count, 3, 1, 1, 1, generator=rng))
    offset = 0.2 * strength * torch.randn(count, 3, 1, 1, 1, generator=rng)
    return moved * gain.to(clips) + offset.to(clips)
