"""Which floating-point types the graphs compute in."""

import torch
from torch import Tensor


def double(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def full(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()
