"""Which weights dropout keeps: a pure function of the seed and of where the weight stands.

Philox 4x32 with ten rounds (Salmon et al., 2011): key = seed, counter = (j // 4, i, head, batch), and word j % 4 of the
result belongs to key j.  The same in csrc/core/philox.h and kernels/common/triton_philox.py.
"""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = (1 << 32) - 1


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a * b, from halves: 64-bit integers have a sign."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: torch.Tensor, *counter: torch.Tensor) -> list[torch.Tensor]:
    """Four words in [0, 2^32), as int64, for a seed [1] of 64 bits and four counters that broadcast."""
    key = [seed & WORD, (seed >> 32) & WORD]
    x = list(torch.broadcast_tensors(*counter))  # type: ignore[no-untyped-call]
    for _ in range(10):
        (h0, l0), (h1, l1) = _product(x[0], MULTIPLIERS[0]), _product(x[2], MULTIPLIERS[1])
        x = [h1 ^ x[1] ^ key[0], l1, h0 ^ x[3] ^ key[1], l0]
        key = [(k + step) & WORD for k, step in zip(key, STEPS)]
    return x


def threshold(p: float) -> int:
    """A word below this is dropped."""
    return min(round(p * (1 << 32)), WORD)


def keep(
    seed: torch.Tensor, p: float, B: int, H: int, Nq: int, Nk: int, first: int = 0
) -> torch.Tensor:
    """0 or 1 / (1 - p) for each pair [B, H, Nq, Nk], float32; batches are numbered from ``first``."""
    ahead = -(-Nk // 4)
    b, h, i, j = (
        torch.arange(n, device=seed.device).view([-1 if a == axis else 1 for a in range(4)])
        for axis, n in enumerate((B, H, Nq, ahead))
    )
    words = torch.stack(philox(seed, j, i, h, b + first), -1).flatten(-2)[..., :Nk]
    return (words >= threshold(p)).float() * (1.0 / (1.0 - p))
