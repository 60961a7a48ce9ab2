"""Sums over queries: fastattn.attention_importance and fastattn.column_attention, made of attention's backward pass."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.arguments import optional_arguments, scale_of
from fastattn.checks import Axes, described, fits, grouped_heads, named_sizes, unit_stride
from fastattn.choice import PROCESS
from fastattn.kernels.attention.api import OP
from fastattn.masks import Mask
from fastattn.op import autocast
from fastattn.transforms import Once

SCORED = Axes("attention_importance", q="B Hq Nq D", k="B Hk Nk D")
COLUMNS = Axes("column_attention", q="B H Nq D", k="B H Nk D", v="B H Nk Dv")
SUMS = "attention_importance and column_attention"


class _Transposed(torch.autograd.Function):
    """y_j = sum_i p_ij u_i: the gradient of o with respect to v, at u.  Its own gradients are those of attention to
    the values dy, so that nothing of size Nq Nk is stored."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        backend: str, code: Any, numbers: Any, q: Any, k: Any, u: Any, *extras: Any
    ) -> tuple[torch.Tensor, ...]:
        B, Hk, Nk, _ = k.shape
        _, lse, rest = OP.call(
            q, k, k.new_zeros(B, Hk, Nk, 1), *extras, code, numbers, backend=backend
        )
        v = k.new_zeros(1, 1, 1, u.shape[3]).expand(B, Hk, Nk, -1)
        needs = [False, False, True, False, False, False, False]
        # o and v are not looked at where only dv is asked for
        y = OP.call_backward(
            u, None, q, k, v, *extras, u, lse, rest, code, numbers, needs, backend=backend
        )[2]
        return y, lse, rest

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        backend, code, numbers, q, k, u, *extras = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, u, *output[1:], *extras)
        ctx.others = backend, code, numbers

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> Any:
        (q, k, u, lse, rest, *extras), (backend, code, numbers) = ctx.saved_tensors, ctx.others
        wanted = ctx.needs_input_grad[3:]
        needs = [wanted[0], wanted[1], False, wanted[3], wanted[5], wanted[7], wanted[9]]
        with torch.no_grad():
            upstream = unit_stride(dy)
            o = OP.call(q, k, upstream, *extras, code, numbers, backend=backend)[0]
            dq, dk, _, dbias, dbias2, dweight, dsinks = OP.call_backward(
                u,
                None,
                q,
                k,
                upstream,
                *extras,
                o,
                lse,
                rest,
                code,
                numbers,
                needs,
                backend=backend,
            )
        found = (dq, dk, o, dbias, None, dbias2, None, dweight, None, dsinks)
        if torch.is_grad_enabled():
            once: Any = Once.apply
            found = once(SUMS, len(found), *found, dy, q, k, u, *extras)
        return (
            None,
            None,
            None,
            *(d if want else None for d, want in zip(found, wanted)),
            *(None,) * 8,
        )


def _transposed(
    function: str, q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, mask: Any, causal: bool, scale: float | None,
    backend: str | None, **options: Any,
) -> torch.Tensor:  # fmt: skip
    B, Hq, Nq, D = q.shape
    scale = scale_of(function, scale, D)
    names = ("softcap", "bias", "sinks", "clip", "weight", "head_map")
    extras, code, numbers = optional_arguments(
        function, q, (B, Hq, Nq, k.shape[2]), k.shape[1], mask, causal, scale,
        *(options.get(name) for name in names), 0.0, None,
    )  # fmt: skip
    chosen = PROCESS.backend("attention", backend)
    tensors = (q, k, u, *extras)
    if torch.compiler.is_compiling() and not any(
        t is not None and t.requires_grad for t in tensors
    ):
        run: Any = _Transposed.forward  # the compiler takes no Function that has nothing to do
    else:
        run = _Transposed.apply
    if u is q or u is k:
        u = u.view_as(u)  # torch.compile takes no tensor twice
    if q is k:
        k = k.view_as(k)
    return run(chosen, code, numbers, unit_stride(q), unit_stride(k), unit_stride(u), *extras)[0]  # type: ignore[no-any-return]


@OP.also
def attention_importance(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    query_weight: torch.Tensor | None = None,
    mask: Mask | torch.Tensor | None = None,
    bias: Any = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    clip: tuple[float, float] | None = None,
    weight: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How much attention each key gets: ``a_j = sum_i w_i p_ij``, the column sums of P, without forming P.

    q [B, Hq, Nq, D], k [B, Hk, Nk, D], query_weight w that broadcasts to [B, Hq, Nq] (1 when None) -> a [B, Hq, Nk].

    p and the keywords are those of ``attention``.  Divide by Nq for means, as token pruning and merging use them.
    Memory is O(Nq + Nk); differentiable in every float input.

    >>> import torch, fastattn as fa
    >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    >>> torch.allclose(fa.attention_importance(q, k).sum(-1), torch.tensor(5.0))
    True
    """
    q, k = autocast(q, k)
    B, Hq, Nq, D, Hk, Nk = SCORED(q, k)
    grouped_heads("attention_importance", Hq, Hk)
    if Hq != Hk:
        k = k.repeat_interleave(Hq // Hk, 1)  # a column a query head
    if query_weight is None:
        u = q.new_ones(1, 1, 1, 1).expand(B, Hq, Nq, 1)
    else:
        _check("attention_importance", "query_weight", query_weight, (B, Hq, Nq), "B, Hq, Nq", q)
        u = query_weight.to(q.dtype).expand(B, Hq, Nq)[..., None]
    return _transposed(
        "attention_importance", q, k, u, mask, causal, scale, backend, bias=bias, softcap=softcap, sinks=sinks,
        clip=clip, weight=weight,
    )[..., 0]  # fmt: skip


@OP.also
def column_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    mask: Mask | torch.Tensor | None = None,
    sender_weight: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention normalised over queries: ``o_i = sum_j p_ij w_j v_j`` with ``p_.j = softmax_i(scale q_i . k_j)``.

    q [B, H, Nq, D], k [B, H, Nk, D], v [B, H, Nk, Dv], sender_weight w that broadcasts to [B, H, Nk] (1 when None)
    -> o [B, H, Nq, Dv].

    Every key hands out its value once, in shares that sum to 1; those of a query need not.  The mask says which
    query i may get from which key j, as in ``attention``.  Memory is O(Nq + Nk).

    >>> import torch, fastattn as fa
    >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> torch.allclose(fa.column_attention(q, k, v).sum(2), v.sum(2), atol=1e-5)
    True
    """
    q, k, v = autocast(q, k, v)
    B, H, Nq, D, Nk, Dv = COLUMNS(q, k, v)
    if isinstance(mask, Mask):
        mask = mask.transposed(Nq, Nk)
    elif isinstance(mask, torch.Tensor):
        if mask.dim() > 4 or not fits(mask.shape[::-1], (Nk, Nq, H, B)):
            raise ValueError(
                f"column_attention: mask is {list(mask.shape)}; it must broadcast to {named_sizes((B, H, Nq, Nk))}"
            )
        mask = mask.expand(*mask.shape[:-2], Nq, Nk).mT if mask.dim() > 1 else mask[..., None]
    if sender_weight is not None:
        _check("column_attention", "sender_weight", sender_weight, (B, H, Nk), "B, H, Nk", q)
        v = v * sender_weight[..., None].to(v.dtype)
    return _transposed("column_attention", k, q, v, mask, False, scale, backend)


def _check(
    function: str, name: str, t: Any, sizes: tuple[int, ...], axes: str, q: torch.Tensor
) -> None:
    if (
        not isinstance(t, torch.Tensor)
        or not t.is_floating_point()
        or t.device != q.device
        or t.dim() > 3
        or not fits(t.shape[::-1], sizes[::-1])
    ):
        raise ValueError(
            f"{function}: {name} is {described(t)}; it takes floats on {q.device} that broadcast to "
            f"{named_sizes(sizes, axes)}"
        )


for _function in (attention_importance, column_attention):
    _function.derivatives = "by the kernels; second ones are refused"  # type: ignore[attr-defined]
