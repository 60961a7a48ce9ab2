"""fastattn.merge_attention: results over parts of the keys, combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.checks import described


def merge_attention(
    outs: Sequence[torch.Tensor] | torch.Tensor, lses: Sequence[torch.Tensor] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over all keys from attentions over disjoint sets of them, exactly; differentiable.

    outs: P tensors o [..., Dv], or one [P, ..., Dv]; lses: P tensors lse [...], or one [P, ...] -> (o, lse).

        lse = log sum_p exp(lse_p),   o = sum_p exp(lse_p - lse) o_p

    A part with lse = -inf has seen nothing and adds nothing, whatever its o; if all are, o = 0 and lse = -inf.
    Sums are float32 (float64 for float64), and o has the dtype of outs.

    >>> import torch, fastattn as fa
    >>> q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    >>> parts = [fa.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
    >>> o, lse = fa.merge_attention(*zip(*parts))
    >>> torch.allclose(o, fa.attention(q, k, v), atol=1e-6)
    True
    """
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    if len(outs) != len(lses):
        raise ValueError(
            f"merge_attention: outs has {len(outs)} parts and lses {len(lses)}; each part has both"
        )
    for p, (o, lse) in enumerate(zip(outs, lses)):
        same = (o.dtype, o.device, o.shape) == (outs[0].dtype, outs[0].device, outs[0].shape)
        if not same or lse.shape != o.shape[:-1] or lse.device != o.device:
            raise ValueError(
                f"merge_attention: outs[{p}] is {described(o)} and lses[{p}] {described(lse)}; beside outs[0], "
                f"{described(outs[0])}, they take the same and {list(outs[0].shape[:-1])}"
            )
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    known = [lse.to(wide) for lse in lses]
    m = torch.stack([lse.detach() for lse in known]).amax(0)
    m = m.masked_fill(m == float("-inf"), 0.0)  # any number: it cancels
    merged, total = torch.zeros_like(outs[0], dtype=wide), torch.zeros_like(m)
    for o, lse in zip(outs, known):
        w = (lse - m).exp()
        nothing = torch.isneginf(lse)[..., None]  # its o may be NaN
        merged = merged + w[..., None] * o.to(wide).masked_fill(nothing, 0.0)
        total = total + w
    empty = total.eq(0.0)
    total = total.masked_fill(empty, 1.0)
    o = (merged / total[..., None]).to(outs[0].dtype)
    return o, (total.log() + m).masked_fill(empty, float("-inf"))


def _parts(name: str, given: Any) -> list[torch.Tensor]:
    parts = list(given.unbind(0)) if isinstance(given, torch.Tensor) and given.dim() else given
    if isinstance(parts, (list, tuple)) and parts and all(_is_real(t) for t in parts):
        return list(parts)
    raise ValueError(
        f"merge_attention: {name} is {described(given)}; it takes a list of floating tensors, at least one, "
        "or them stacked"
    )


def _is_real(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.is_floating_point()
