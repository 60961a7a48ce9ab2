"""fastattn.topk_attention: each query keeps its greatest logits."""

from __future__ import annotations

import operator
from typing import Any

import torch

from fastattn.arguments import optional_arguments, scale_of
from fastattn.checks import Axes, grouped_heads, unit_stride
from fastattn.choice import PROCESS
from fastattn.kernels.attention.api import OP, TOPK
from fastattn.masks import UNBOUNDED, Mask
from fastattn.op import autocast

AXES = Axes("topk_attention", q="B Hq Nq D", k="B Hk Nk D", v="B Hk Nk Dv")


@OP.also
def topk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    topk: int,
    *,
    mask: Mask | torch.Tensor | None = None,
    bias: Any = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    clip: tuple[float, float] | None = None,
    weight: Any = None,
    head_map: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``attention`` in which each query keeps its ``topk`` greatest logits, and the softmax is over those.

    q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv] -> o [B, Hq, Nq, Dv], and lse [B, Hq, Nq] with ``return_lse``.

    Logits are compared as the softmax would take them: capped, with biases, masked.  Of equal ones the keys with the
    lower numbers are kept; where a query sees no more than ``topk`` keys it keeps them all.  Gradients are those of the
    logits kept.  Memory is O(Nq + Nk): what a query keeps is not written down, but the least of it.
    The other keywords are those of ``attention``.

    >>> import torch, fastattn as fa
    >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> torch.equal(fa.topk_attention(q, k, v, 5), fa.attention(q, k, v))
    True
    """
    q, k, v = autocast(q, k, v)
    B, Hq, Nq, D, Hk, Nk, _ = AXES(q, k, v)
    if head_map is None:
        grouped_heads("topk_attention", Hq, Hk)
    try:
        count = 0 if isinstance(topk, bool) else operator.index(topk)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"topk_attention: topk is {topk!r}; it takes an integer >= 1")
    scale = scale_of("topk_attention", scale, D)
    extras, code, numbers = optional_arguments(
        "topk_attention", q, (B, Hq, Nq, Nk), Hk, mask, causal, scale, softcap, bias, sinks, clip, weight, head_map,
        dropout, seed,
    )  # fmt: skip
    o, lse, _ = OP.call(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        *extras,
        code,
        [*numbers[:TOPK], float(min(count, UNBOUNDED))],
        backend=PROCESS.backend("attention", backend),
    )
    return (o, lse) if return_lse else o
