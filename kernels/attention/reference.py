"""Softmax attention, as the formula is written.  This page defines the op; kernels must agree with it."""

import torch


def forward(
    q, k, v, visible, scale, *,
    bias=None, softcap=None, topk=0, sinks=None, clip=None, weight=None, keep=None, heads=None,
):  # fmt: skip
    """o_i = sum_j p_ij v_j with p_i. = softmax_j(s_ij) over the keys visible to i, s_ij = scale q_i . k_j.

    q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv], visible bool, broadcast to [B, Hq, Nq, Nk]
    -> o [B, Hq, Nq, Dv], lse [B, Hq, Nq] (natural log of the softmax denominator, at least float32).

    Query head h reads key head heads[h], h // (Hq / Hk) when None.  softcap bends logits before the biases (list)
    are added; topk says how many of the greatest logits a query keeps (0: all), the first of equal ones; sinks [Hq] are logits in the denominator alone; clip stretches p and cuts it to [0, 1]; weight and
    keep (of dropout, 0 or 1 / (1 - p)) multiply it.  A row that sees no key gives o = 0 and lse = -inf.
    """
    B, Hq, Nq, _ = q.shape
    group = Hq // max(k.shape[1], 1)
    k, v = (t[:, heads] if heads is not None else t.repeat_interleave(group, dim=1) for t in (k, v))
    s = scale * (q @ k.transpose(-1, -2))  # [B, Hq, Nq, Nk]
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    for b in bias or ():
        s = s + b
    s = s.masked_fill(~visible, float("-inf"))
    if topk:
        kept = s.argsort(dim=-1, descending=True, stable=True)[..., :topk]
        s = s.masked_fill(
            torch.ones_like(s, dtype=torch.bool).scatter(-1, kept, False), float("-inf")
        )
    sink = (
        s.new_empty(B, Hq, Nq, 0)
        if sinks is None
        else sinks.to(s)[:, None, None].expand(B, Hq, Nq, 1)
    )
    s = torch.cat([s, sink], -1)
    # A row whose logits are all -inf has no softmax: give it finite logits, then zero weights.
    empty = (s == float("-inf")).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    p = s.softmax(-1).masked_fill(empty, 0.0)[..., : k.shape[2]]
    if clip is not None:
        p = ((clip[1] - clip[0]) * p + clip[0]).clamp(0.0, 1.0)
    for factor in (weight, keep):
        p = p if factor is None else p * factor
    o = p.to(v.dtype) @ v  # [B, Hq, Nq, Dv]
    lse = s.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return o, lse
