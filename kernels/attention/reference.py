"""Softmax attention, as the formula is written.  This page defines the op; kernels must agree with it."""

import torch


def forward(q, k, v, visible, scale):
    """o_i = sum_j p_ij v_j with p_i. = softmax_j(scale q_i . k_j) over the keys visible to i.

    q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv], visible bool [Nq, Nk]
    -> o [B, Hq, Nq, Dv], lse [B, Hq, Nq] (natural log of the softmax denominator, at least float32).
    Query head h reads key head h // (Hq / Hk).  A row that sees no key gives o = 0 and lse = -inf.
    """
    group = q.shape[1] // max(k.shape[1], 1)
    k = k.repeat_interleave(group, dim=1)  # [B, Hq, Nk, D]
    v = v.repeat_interleave(group, dim=1)  # [B, Hq, Nk, Dv]
    s = scale * (q @ k.transpose(-1, -2))  # [B, Hq, Nq, Nk]
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    s = s.masked_fill(~visible, float("-inf"))
    # Rows with no visible key have an all -inf softmax: give them a finite logit, then a zero weight.
    empty = ~visible.any(-1, keepdim=True)
    p = s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    o = p.to(v.dtype) @ v  # [B, Hq, Nq, Dv]
    lse = s.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return o, lse
