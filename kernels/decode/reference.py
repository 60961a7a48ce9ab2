"""Attention over a cache, as the formula is written.  This page defines the op; kernels must agree with it."""

import torch


def forward(q, k_cache, v_cache, block_table, visible, bias, scale, softcap, sinks, weight=None):
    """o_i = sum_j p_ij v_j with p_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink)) over the keys visible to i.

    q [B, Hq, Nq, D]; caches [B, Hk, Nmax, D] and [B, Hk, Nmax, Dv], or with block_table [B, pages of a sequence]
    of page numbers [pages, page_size, Hk, D] and [pages, page_size, Hk, Dv]; visible bool [B, 1 or Hq, Nq, Nmax],
    false past a sequence's length; bias and weight, by which p is multiplied, [B, Hq, Nq, Nmax] or None; sinks [Hq] or None
    -> o [B, Hq, Nq, Dv], lse [B, Hq, Nq] (natural log of the denominator, at least float32).
    What is not visible may be NaN.  A row that sees no key gives o = 0, and lse = its sink or -inf.
    """
    if block_table is not None:
        k_cache, v_cache = (_gathered(cache, block_table) for cache in (k_cache, v_cache))
    used = visible.any(2).any(1)[:, None, :, None]  # [B, 1, Nmax, 1]
    group = q.shape[1] // max(k_cache.shape[1], 1)
    k = k_cache.masked_fill(~used, 0.0).repeat_interleave(group, dim=1)  # [B, Hq, Nmax, D]
    v = v_cache.masked_fill(~used, 0.0).repeat_interleave(group, dim=1)  # [B, Hq, Nmax, Dv]
    s = scale * (q @ k.transpose(-1, -2))  # [B, Hq, Nq, Nmax]
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    s = s.masked_fill(~visible, float("-inf"))
    B, Hq, Nq, _ = s.shape
    sink = s.new_full((Hq,), float("-inf")) if sinks is None else sinks.to(s.dtype)
    s = torch.cat([s, sink[:, None, None].expand(B, Hq, Nq, 1)], -1)  # one logit without a value
    # A row of -inf alone would be NaN: give it finite logits, then zero weights.
    empty = (s == float("-inf")).all(-1, keepdim=True)
    p = s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., :-1]
    p = p if weight is None else p * weight
    o = p.to(v.dtype) @ v  # [B, Hq, Nq, Dv]
    lse = s.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return o, lse


def append(k_cache, v_cache, k_new, v_new, lengths, block_table):
    """Writes k_new and v_new [B, Hk, Nnew, ...] behind the lengths[b] tokens that each sequence has."""
    at = lengths[:, None] + torch.arange(k_new.shape[2], device=lengths.device)  # [B, Nnew]
    b = torch.arange(at.shape[0], device=at.device)[:, None]
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        if block_table is None:
            cache[b, :, at] = new.transpose(1, 2)
        else:
            page_size = max(cache.shape[1], 1)
            pages = block_table.gather(1, (at // page_size).long()).long()
            cache[pages, at % page_size] = new.transpose(1, 2)


def _gathered(cache, block_table):
    """[pages, page_size, Hk, D] -> [B, Hk, pages of a sequence * page_size, D]; unused numbers may be anything."""
    if not cache.shape[0]:
        cache = cache.new_zeros(1, *cache.shape[1:])
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]
    return pages.flatten(1, 2).transpose(1, 2)
