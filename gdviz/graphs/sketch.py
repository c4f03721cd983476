"""Tensor Sketch: an explicit vector for a bilinear ensemble ``x (x) y`` that would have d^2 entries."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class TensorSketch(nn.Module):
    """Compact bilinear pooling of pairs of vectors (Pham & Pagh 2013; Gao et al. 2016, algorithm 2).

    ``TS(x, y) = irfft(rfft(CS_1 x) * rfft(CS_2 y))`` with count sketches ``CS_s``: entry i goes to bin
    ``hash_s(i)`` with sign ``sign_s(i)``. Then ``E <TS(x, y), TS(x', y')> = <x, x'> <y, y'>``.

    One hash per *slot* (first or second factor), whatever the vector's owner: hashes per teacher would
    make inner products across pairs of teachers noise. A vector shorter than ``max_dim`` counts as
    padded with zeros. Hashes are buffers, so a saved sketch stays comparable after loading.

    Args:
        max_dim: longest vector that will be sketched.
        sketch_dim: m, size of the sketch; the error falls as ``1 / sqrt(m)``.
        seed: of the hashes.
    """

    def __init__(self, max_dim: int, sketch_dim: int = 4096, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.sketch_dim = sketch_dim
        self.register_buffer("hash", torch.randint(sketch_dim, (2, max_dim), generator=generator))
        signs = torch.randint(2, (2, max_dim), generator=generator)
        self.register_buffer("sign", (2 * signs - 1).to(torch.int8))

    def count_sketch(
        self, x: Float[Tensor, "*batch dim"], slot: int
    ) -> Float[Tensor, "*batch sketch"]:
        """Count sketch of ``x`` for the first (0) or second (1) factor.

        Raises:
            ValueError: if x is longer than ``max_dim``.
        """
        dim = x.shape[-1]
        if dim > self.hash.shape[1]:
            raise ValueError(
                f"vectors of {dim} entries, but the sketch was made for {self.hash.shape[1]}"
            )
        sketched = x.new_zeros(*x.shape[:-1], self.sketch_dim)
        return sketched.index_add(-1, self.hash[slot, :dim], x * self.sign[slot, :dim].to(x.dtype))

    def forward(
        self, vectors: Sequence[Float[Tensor, "clips _"]], pairs: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "pairs clips sketch"]:
        """Sketches of ``vectors[i] (x) vectors[j]`` for each pair (i, j); each transform is done once.

        FFTs know no half precision: those are upcast to float32.
        """
        with torch.autocast(vectors[0].device.type, enabled=False):
            vectors = [v if v.dtype == torch.float64 else v.float() for v in vectors]
            first = {
                i: torch.fft.rfft(self.count_sketch(vectors[i], 0)) for i in {i for i, _ in pairs}
            }
            second = {
                j: torch.fft.rfft(self.count_sketch(vectors[j], 1)) for j in {j for _, j in pairs}
            }
            spectra = torch.stack([first[i] * second[j] for i, j in pairs])  # (E, N, m // 2 + 1)
            return torch.fft.irfft(spectra, n=self.sketch_dim)
