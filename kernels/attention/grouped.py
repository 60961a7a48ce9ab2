"""fastattn.grouped_attention: attention inside groups of tokens, whose rows the kernels gather."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.arguments import optional_arguments, scale_of
from fastattn.checks import grouped_heads, unit_stride
from fastattn.choice import PROCESS
from fastattn.groups import Groups
from fastattn.kernels.attention.api import OP, Axes
from fastattn.masks import Mask
from fastattn.op import autocast

GROUPED = Axes("grouped_attention", q="B Hq Nq D", k="B Hk Nk D", v="B Hk Nk Dv")
COMBINE = ("only", "mean", "sum")


@OP.also
def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: Groups,
    *,
    key_groups: Groups | None = None,
    combine: str = "only",
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
    """``attention`` inside groups of tokens: windows, clusters, buckets, any sets.

    q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv] -> o [B, Hq, Nq, Dv], and lse [B, Hq, Nq] with ``return_lse``.

    groups      ``fastattn.Groups``: the tokens of each group
    key_groups  queries of group g attend to the keys of group g of these; ``groups`` when None
    combine     of tokens in several groups: "only" promises that there are none; "mean" or "sum" of the results

    Rows are gathered inside the kernels.  A token in no group gives o = 0, lse = -inf and zero gradients.  Masks speak of
    tokens: ``causal`` goes by their own places, not by those in a group.  Biases, ``weight`` and dropout speak of slots:
    their Nq and Nk are a group's, and their B counts the groups (G, or B G where batches differ).
    The other keywords are those of ``attention``.

    >>> import torch, fastattn as fa
    >>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    >>> fa.grouped_attention(q, k, v, fa.Groups.windows((4, 4), 2)).shape
    torch.Size([1, 2, 16, 8])
    """
    q, k, v = autocast(q, k, v)
    B, Hq, Nq, D, Hk, Nk, _ = GROUPED(q, k, v)
    if head_map is None:
        grouped_heads("grouped_attention", Hq, Hk)
    of_keys = groups if key_groups is None else key_groups
    _check("groups", groups, B, Hq, "Hq", q.device)
    _check("key_groups" if key_groups else "groups", of_keys, B, Hk, "Hk", q.device)
    if groups.num != of_keys.num:
        raise ValueError(
            f"grouped_attention: groups has {groups.num} and key_groups {of_keys.num}; both take as many"
        )
    if combine not in COMBINE:
        raise ValueError(
            f"grouped_attention: combine is {combine!r}; it takes {', '.join(COMBINE)}"
        )
    if return_lse and combine != "only":
        raise ValueError(
            f'grouped_attention: return_lse is True and combine is {combine!r}; it takes combine="only"'
        )
    scale = scale_of("grouped_attention", scale, D)
    sizes = (B, Hq, Nq, Nk)
    of_slots = (-1, Hq, groups.size, of_keys.size)
    extras, code, numbers = optional_arguments(
        "grouped_attention", q, sizes, Hk, mask, causal, scale, softcap, bias, sinks, clip, weight, head_map, dropout,
        seed, groups.ends, of_keys.ends, *_labelled(groups.slots, of_keys.slots), of_slots,
    )  # fmt: skip
    for name, values in zip(("bias", "bias", "weight"), (extras[0], extras[2], extras[4])):
        if values is not None and values.dim() == 4 and values.shape[0] not in (
            1, groups.num, B * groups.num,
        ):  # fmt: skip
            raise ValueError(
                f"grouped_attention: {name} is {list(values.shape)}; its B is 1, or {groups.num} groups, "
                f"or {B * groups.num}, those of every batch"
            )
    by_slot = combine != "only"
    o, lse, _ = OP.call(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        *extras,
        code,
        [*numbers[:5], float(by_slot), numbers[6]],
        backend=PROCESS.backend("attention", backend),
    )
    token = groups.slots[:, :, 0].long()
    at = token.masked_fill(token < 0, Nq).expand(-1, -1, -1)  # a place beyond the last for no token
    if by_slot:
        return _combined(o, at, Nq, combine == "mean")
    if not return_lse:
        return o
    at = _to_heads(at, B, Hq)
    of_tokens = lse.new_full((B, Hq, Nq + 1), float("-inf")).scatter(2, at, lse)
    return o, of_tokens[:, :, :Nq]


def _combined(parts: torch.Tensor, at: torch.Tensor, N: int, is_mean: bool) -> torch.Tensor:
    """The sum, or mean, of what the slots of each token give, in the order of slots."""
    B, H, _, Dv = parts.shape
    if is_mean:
        count = torch.zeros(*at.shape[:2], N + 1, dtype=torch.int64, device=at.device)
        count = count.scatter_add(2, at, torch.ones_like(at)).gather(2, at)
        parts = parts / _to_heads(count, B, H)[..., None].to(parts.dtype)
    at = _to_heads(at, B, H)
    wide = torch.promote_types(parts.dtype, torch.float32)
    if parts.device.type == "cpu":
        sums = parts.new_zeros(B, H, N + 1, Dv, dtype=wide)
        sums = sums.scatter_add(2, at[..., None].expand(-1, -1, -1, Dv), parts.to(wide))
    else:  # there this is the one with an order
        rows = at + (N + 1) * torch.arange(B * H, device=at.device).view(B, H, 1)
        sums = parts.new_zeros(B * H * (N + 1), Dv, dtype=wide)
        sums = sums.index_put((rows.flatten(),), parts.to(wide).flatten(0, 2), accumulate=True)
        sums = sums.view(B, H, N + 1, Dv)
    return sums[:, :, :N].to(parts.dtype)


def _to_heads(t: torch.Tensor, B: int, H: int) -> torch.Tensor:
    """[B|1, heads, T] -> [B, H, T], each head of it for as many in a row."""
    return t.repeat_interleave(H // t.shape[1], 1).expand(B, -1, -1)


def _labelled(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with labels where one has them; those of the other are 0."""
    if a.shape[2] == b.shape[2]:
        return a, b
    a, b = (t if t.shape[2] == 2 else torch.cat([t, torch.zeros_like(t)], 2) for t in (a, b))
    return a, b


def _check(name: str, groups: object, B: int, H: int, letter: str, device: torch.device) -> None:
    if not isinstance(groups, Groups):
        raise ValueError(
            f"grouped_attention: {name} is {type(groups).__name__}; it takes fastattn.Groups"
        )
    batches, heads = groups.slots.shape[:2]
    if batches not in (1, B) or (H and (heads == 0 or H % heads)):
        raise ValueError(
            f"grouped_attention: the index of {name} has {batches} batches and {heads} heads; B is {B} and {letter} is {H}, "
            f"and it takes 1 or B, and a divisor of {letter}"
        )
    if groups.slots.device != device:
        raise ValueError(
            f"grouped_attention: {name} is on {groups.slots.device} and q on {device}; they must share one device"
        )
