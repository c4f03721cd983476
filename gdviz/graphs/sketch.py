"""Tensor Sketch: an explicit vector for an ensemble ``x (x) y`` that would have d^2 entries."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gdviz.graphs import _dtypes


class TensorSketch(nn.Module):
    """Compact bilinear pooling of pairs of vectors (Pham & Pagh 2013; Gao et al. 2016, alg. 2).

    ``TS(x, y) = irfft(rfft(CS_1 x) * rfft(CS_2 y))`` with count sketches ``CS_s``: entry i goes to
    bin ``hash_s(i)`` with sign ``sign_s(i)``. Then ``E <TS(x, y), TS(x', y')> = <x, x'> <y, y'>``.

    One hash per *slot* (first or second factor), not per teacher: inner products across pairs would
    be noise. A short vector counts as padded with zeros up to ``max_dim``. The error falls as ``1 /
    sqrt(sketch_dim)``.
    """

    hash: Tensor
    sign: Tensor

    def __init__(self, max_dim: int, sketch_dim: int = 4096, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.sketch_dim = sketch_dim
        self.register_buffer("hash", torch.randint(sketch_dim, (2, max_dim), generator=generator))
        signs = torch.randint(2, (2, max_dim), generator=generator)
        self.register_buffer("sign", (2 * signs - 1).to(torch.int8))

    def _spectrum(self, x: Tensor, slot: int) -> Tensor:
        """Transform the count sketch of ``x`` for the first (0) or second (1) factor."""
        x, dim = _dtypes.full(x), x.shape[-1]  # FFTs know no half precision
        sketched = x.new_zeros(*x.shape[:-1], self.sketch_dim)
        signed = x * self.sign[slot, :dim].to(x.dtype)
        return torch.fft.rfft(sketched.index_add(-1, self.hash[slot, :dim], signed))

    def forward(
        self, vectors: Sequence[Float[Tensor, "clips _"]], pairs: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "pairs clips sketch"]:
        """Sketch ``vectors[i] (x) vectors[j]`` for each pair (i, j)."""
        with torch.autocast(vectors[0].device.type, enabled=False):
            first = {i: self._spectrum(vectors[i], 0) for i in {i for i, _ in pairs}}
            second = {j: self._spectrum(vectors[j], 1) for j in {j for _, j in pairs}}
            spectra = torch.stack([first[i] * second[j] for i, j in pairs])  # (E, N, m // 2 + 1)
            return torch.fft.irfft(spectra, n=self.sketch_dim)
