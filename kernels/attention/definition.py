"""The op ``attention`` by its formula: sequence by sequence, or group by group."""

import itertools
from collections.abc import Iterator

import torch

from fastattn.bias import expand
from fastattn.dropout import keep
from fastattn.kernels.attention import reference as formula
from fastattn.masks import materialize


def forward(
    q, k, v,
    bias, bias_index, bias2, bias2_index, weight, weight_index, sinks, visible, blocks, heads, cu_q, cu_k, seed,
    slots_q, slots_k, mask, numbers,
):  # fmt: skip
    scale, softcap, low, high, dropout, _, topk = numbers
    B, Hq = q.shape[:2]
    if slots_q is not None:
        return _grouped(
            q, k, v, ((bias, bias_index), (bias2, bias2_index)), (weight, weight_index), sinks, visible, blocks, heads,
            cu_q.tolist(), cu_k.tolist(), seed, slots_q, slots_k, mask, numbers,
        )  # fmt: skip
    parts = []
    if slots_k is not None:  # packed sequences whose keys lie apart
        Hk = k.shape[1]
        token = slots_k[0, :, 0].long().repeat_interleave(Hk // slots_k.shape[1], 0)
        k, v = (t[:, torch.arange(Hk, device=q.device)[:, None], token] for t in (k, v))
    for b, (q_, k_, v_) in _sequences(q, k, v, cu_q, cu_k):
        Nq, Nk = q_.shape[2], k_.shape[2]

        def pairwise(values, index, b=b, Nq=Nq, Nk=Nk):
            if values is None:
                return None
            dense = (
                expand(values, index, Nq, Nk)
                if index is None
                else expand(values, index[:Nq, :Nk], Nq, Nk)
            )
            dense = dense[b : b + 1] if cu_q is not None and dense.shape[0] > 1 else dense
            return dense[:, :, :Nq, :Nk]

        parts.append(
            formula.forward(
                q_, k_, v_,
                materialize(mask, Nq, Nk, q.device, blocks, pairwise(visible, None)),
                scale,
                bias=[pairwise(t, i) for t, i in ((bias, bias_index), (bias2, bias2_index)) if t is not None],
                softcap=softcap,
                topk=int(topk),
                sinks=sinks,
                clip=None if (low, high) == (0.0, 1.0) else (low, high),
                weight=pairwise(weight, weight_index),
                keep=keep(seed, dropout, B, Hq, Nq, Nk, b) if dropout else None,
                heads=None if heads is None else heads.long(),
            )
        )  # fmt: skip
    o, lse = parts[0] if cu_q is None else (torch.cat(t, 2) for t in zip(*parts))
    return o, lse, lse.new_zeros(*lse.shape[:2], 3 if topk else 1, lse.shape[2])


def _sequences(q, k, v, cu_q, cu_k) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """(0, the tensors), or the number and the rows of each sequence."""
    if cu_q is None:
        yield 0, (q, k, v)
        return
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    if len(ends_q) == 1:  # no sequence: nothing, in its shapes
        yield 0, (q, k[:, :, :0], v[:, :, :0])
    for b in range(len(ends_q) - 1):
        of_q, of_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        yield b, (q[:, :, of_q], k[:, :, of_k], v[:, :, of_k])


def _grouped(
    q, k, v, biases, weight, sinks, visible, blocks, heads, ends_q, ends_k, seed, slots_q, slots_k, mask, numbers,
):  # fmt: skip
    """Head by head and group by group, those slots that hold a token."""
    scale, softcap, low, high, dropout, by_slot, topk = numbers
    (B, Hq, Nq, _), (_, Hk, Nk, Dv) = q.shape, v.shape
    groups = len(ends_q) - 1
    seen = materialize(mask, Nq, Nk, q.device, blocks, visible).expand(B, Hq, Nq, Nk)
    o = v.new_zeros(B, Hq, slots_q.shape[3] if by_slot else Nq, Dv)
    lse = q.new_full(
        (B, Hq, slots_q.shape[3]), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32)
    )
    dropped = [
        keep(seed, dropout, 1, Hq, *(max(end[g + 1] - end[g] for g in range(groups)) for end in (ends_q, ends_k)), x)
        if dropout else None for x in range(B * groups)
    ]  # fmt: skip
    for b, h, g in itertools.product(range(B), range(Hq), range(groups)):
        hk = h // (Hq // max(Hk, 1)) if heads is None else int(heads[h])
        of_q = slots_q[b % len(slots_q), h * slots_q.shape[1] // Hq, :, ends_q[g] : ends_q[g + 1]]
        of_k = slots_k[b % len(slots_k), hk * slots_k.shape[1] // Hk, :, ends_k[g] : ends_k[g + 1]]
        at_q, at_k = (t[0].ge(0).nonzero()[:, 0] for t in (of_q, of_k))
        (i, *label_q), (j, *label_k) = of_q[:, at_q].long(), of_k[:, at_k].long()

        def pairwise(values, index=None, g=g, b=b, h=h, at_q=at_q, at_k=at_k, of_q=of_q, of_k=of_k):
            if values is None:
                return None
            sizes = of_q.shape[1], of_k.shape[1]
            index = None if index is None else index[: sizes[0], : sizes[1]]
            x = expand(values, index, *sizes)
            x = x[(b * groups + g) % len(x), h % x.shape[1]]
            return x.expand(max(len(x), sizes[0]), max(x.shape[1], sizes[1]))[at_q][:, at_k]

        shown = seen[b, h][i][:, j]
        for a, c in zip(label_q, label_k):
            shown = shown & (a[:, None] == c)
        found, log = formula.forward(
            q[b, h, i][None, None], k[b, hk, j][None, None], v[b, hk, j][None, None], shown, scale,
            bias=[pairwise(*bias) for bias in biases if bias[0] is not None],
            softcap=softcap,
            topk=int(topk),
            sinks=None if sinks is None else sinks[h : h + 1],
            clip=None if (low, high) == (0.0, 1.0) else (low, high),
            weight=pairwise(*weight),
            keep=dropped[b * groups + g][0, h][at_q][:, at_k] if dropout else None,
        )  # fmt: skip
        o[b, h, at_q + ends_q[g] if by_slot else i] = found[0, 0]
        lse[b, h, at_q + ends_q[g]] = log[0, 0].to(lse.dtype)
    return o, lse, lse.new_zeros(*lse.shape[:2], 3 if topk else 1, lse.shape[2])
