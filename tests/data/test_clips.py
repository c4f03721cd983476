"""Clips hold the frames that they say, and are seen as testing and training need them."""

from collections import Counter

import pytest
import torch

from gdviz.data.clips import augment, clip_places, sample_clips, starts_and_strides, to_float


def to_bytes(clip: torch.Tensor) -> torch.Tensor:
    return (clip * 0.25 + 0.5).mul(255).round().long()


def test_pixels_become_centred_floats():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 4, 5, 6, 3)
    x = to_float(pixels)
    assert x.shape == (2, 4, 3, 5, 6)
    assert x.flatten(1)[:, 0].tolist() == [-2, 2]


def test_clips_hold_the_right_frames():
    numbers = torch.arange(11.0) + 100 * torch.arange(300.0)[:, None]  # frame and video
    frames = numbers[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    stride = torch.arange(300) % 4 + 1  # 4 does not fit: 3 is used
    clips = sample_clips(frames, 4, stride, torch.Generator().manual_seed(0))[:, 0, :, 0, 0]
    starts = Counter()
    for i, row in enumerate(clips):
        step = min(int(stride[i]), 3)
        begin = int(row[0]) - 100 * i
        assert 0 <= begin <= 10 - 3 * step
        assert row.tolist() == [100 * i + begin + step * t for t in range(4)]
        starts[step, begin] += 1
    assert len(starts) == 8 + 5 + 2  # every start that fits is drawn
    assert sample_clips(frames[:1], 4, 2)[0, 0, :, 0, 0].tolist() == [2, 4, 6, 8]  # centred
    with pytest.raises(ValueError, match="12 frames does not fit a video of 11"):
        sample_clips(frames, 12, 1)


def test_clips_of_videos_kept_as_windows_lie_in_one_and_reach_all():
    rng, begun = torch.Generator().manual_seed(0), Counter()
    start, stride = starts_and_strides(3000, 3 * 10, 4, 2, rng, windows=3)
    assert (stride == 2).all() and (start % 10 <= 3).all()
    begun.update(start.tolist())
    assert set(begun) == {w * 10 + k for w in range(3) for k in range(4)}
    assert max(begun.values()) < 1.4 * min(begun.values())
    places = torch.tensor(clip_places(5))
    start, _ = starts_and_strides(5, 3 * 10, 4, 2, place=places, windows=3)
    assert start.tolist() == [0, 2, 11, 20, 23]  # evenly, from the first to the last


def test_augmentation_leaves_motion_alone():
    rng = torch.Generator().manual_seed(0)
    still = torch.rand(6, 3, 1, 24, 24, generator=rng).expand(-1, -1, 5, -1, -1)
    seen = augment(still, rng)
    assert torch.equal(seen, seen[:, :, :1].expand_as(seen))
    assert len({tuple(x.flatten()[:8].tolist()) for x in seen}) == 6
    moving = torch.rand(8, 3, 4, 24, 24, generator=rng)
    padded = torch.nn.functional.pad(moving.flatten(1, 2), [2] * 4, mode="replicate")
    padded = padded.unflatten(1, (3, 4))
    crops = [padded[..., y : y + 24, x : x + 24] for y in range(5) for x in range(5)]
    for i, clip in enumerate(augment(moving, rng, strength=0)):  # shifted, not flipped or turned
        assert sum(torch.equal(clip, crop[i]) for crop in crops) == 1
