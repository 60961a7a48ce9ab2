"""fastattn.attention: the public function and the descriptor of dense softmax attention.

One file because the function, what it makes of its arguments and the cases that prove it name the same things.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.arguments import (
    mask_code,
    optional_arguments,
    scale_of,
    sequence_ends,
)
from fastattn.backends import at_most, cpu, reference, takes, triton
from fastattn.checks import Axes, grouped_heads, unit_stride
from fastattn.choice import PROCESS
from fastattn.kernels.attention import definition
from fastattn.kernels.attention.cases import BENCH, CASES, cost, make, peers
from fastattn.masks import UNBOUNDED, Mask
from fastattn.op import Op, autocast

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MAX_HEAD_DIM = 256
AXES = Axes("attention", q="B Hq Nq D", k="B Hk Nk D", v="B Hk Nk Dv")
PACKED = Axes("attention_varlen", q="Tq Hq D", k="Tk Hk D", v="Tk Hk Dv")

# The arguments of the op between v and the mask; each may be absent.
#   bias, bias2, weight   values [B|1, Hq|1, Nq|1, Nk|1]; or [Hq|1, 2 L - 1] by offset; or [Hq|1, T] by index [Nq, Nk]
#   visible, blocks       the bool tensor [B|1, Hq|1, Nq|1, Nk|1] and the block layouts that the mask's formula names
#   heads                 int32 [Hq], the key head of each query head
#   cu_q, cu_k            int32: sequences end to end; then B = 1, and the biases' B counts sequences
#   seed                  int64 [1], of dropout
#   slots_q, slots_k      int32 [B|1, heads, 1 or 2, slots]: the token of each slot of a group, -1 for none, and its label;
#                         then cu_q and cu_k are the ends of groups, biases are by slot and their B counts groups;
#                         slots_k alone: packed queries, and keys that lie where it says (the forward pass of decoding)
# The result `rest` [B, Hq, 1 or 3, Nq] is for the backward pass alone: what rounding took from lse; and of queries that
# keep some logits, the least of them and the last key that has it.
EXTRAS = (
    "Tensor? bias, Tensor? bias_index, Tensor? bias2, Tensor? bias2_index, Tensor? weight, Tensor? weight_index,"
    " Tensor? sinks, Tensor? visible, Tensor? blocks, Tensor? heads, Tensor? cu_q, Tensor? cu_k, Tensor? seed,"
    " Tensor? slots_q, Tensor? slots_k"
)
NO_EXTRAS = (None,) * (EXTRAS.count(",") + 1)
CU_Q = EXTRAS.split(",").index(" Tensor? cu_q")
SLOTS_Q = EXTRAS.split(",").index(" Tensor? slots_q")
# numbers: scale, softcap or 0, clip[0] and clip[1] (0 and 1 where nothing is clipped), dropout, 1 where groups leave o
# by slot, and how many logits a query keeps or 0
PLAIN = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
BY_SLOT, TOPK = 5, 6


def _fake(q, k, v, *more):
    B, Hq, Nq, _ = q.shape
    slots = Nq if more[SLOTS_Q] is None else more[SLOTS_Q].shape[3]
    if more[SLOTS_Q] is not None:
        o = q.new_empty(B, Hq, slots if more[-1][BY_SLOT] else Nq, v.shape[3])
    elif more[CU_Q] is None:
        o = q.new_empty(B, Hq, Nq, v.shape[3])
    else:  # as users of packed sequences lay them out, [Nq, Hq, Dv]
        o = q.new_empty(B, Nq, Hq, v.shape[3]).transpose(1, 2)
    wide = F64 if q.dtype is F64 else F32
    planes = 3 if more[-1][TOPK] else 1
    lse, rest = (q.new_empty(B, Hq, *n, slots, dtype=wide) for n in ((), (planes,)))
    return o, lse, rest


def _fake_backward(
    do, dlse, q, k, v,
    bias, bias_index, bias2, bias2_index, weight, weight_index, sinks, visible, blocks, heads, cu_q, cu_k, seed,
    slots_q, slots_k, o, lse, rest, mask, numbers, needs,
):  # fmt: skip
    return [
        t.new_empty(*t.shape) if i < 3 or (t is not None and needs[i]) else q.new_empty(0)
        for i, t in enumerate((q, k, v, bias, bias2, weight, sinks))
    ]


def _workspace(
    do, dlse, q, k, v, bias, bias_index, bias2, bias2_index, weight, weight_index, *more
):
    """For each head delta_i = do_i . o_i, dq by tiles of queries, and whose turn it is to add to a tile.

    For each gradient of a bias or weight, what it is summed in and whose turn that is: csrc/cpu/terms.h.
    """
    cu_q, slots_q, slots_k, lse, needs = more[4], more[7], more[8], more[10], more[14]
    B, Hq, Nq, D = q.shape
    Nq = Nq if slots_q is None else slots_q.shape[3]
    num = 1 if cu_q is None else cu_q.shape[0] - 1
    rows = Nq + 64 * num
    work = [lse.new_empty(B, Hq, (rows * D + rows + rows // 8 + 16 * num + 16) // 16 * 16)]
    for needed, values, index in zip(
        needs[3:6], (bias, bias2, weight), (bias_index, bias2_index, weight_index)
    ):
        floats = _sums(values, index, B * num, Hq) if needed and values is not None else 0
        work.append(lse.new_empty(floats))
    for slots, t in (
        (slots_q, q),
        (slots_k, k),
        (slots_k, v),
    ):  # gradients by slot, of tokens in several groups
        work.append(
            lse.new_empty(0 if slots is None else (*t.shape[:2], slots.shape[3], t.shape[3]))
        )
    return work


def _sums(values, index, B, Hq):
    """Floats that a gradient of ``values`` is summed in: its own size where pairs are kept, else a row a head."""
    if index is None and values.dim() == 4 and values.shape[2] > 1 and values.shape[3] > 1:
        tiles = (values.shape[2] // 48 + 1) * (values.shape[3] // 128 + 1)
        return values.numel() + values.shape[0] * values.shape[1] * tiles
    return B * Hq * (values[0].numel() if values.dim() == 2 else max(values.shape[2:])) + B * Hq


def _folds(known):
    """Nothing that has a batch axis of its own, or counts batches."""
    of_pairs = [known[n] for n in ("bias", "bias2", "weight", "visible", "slots_q", "slots_k")]
    return (
        known["cu_q"] is None
        and known["seed"] is None
        and all(t is None or t.dim() == 2 or t.shape[0] == 1 for t in of_pairs)
        and not any(known.get("needs", ())[3:])  # what is summed over batches
    )


OP = Op(
    "attention",
    forward=f"(Tensor q, Tensor k, Tensor v, {EXTRAS}, SymInt[] mask, float[] numbers) -> (Tensor o, Tensor lse, Tensor rest)",
    backward=f"(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, {EXTRAS}, Tensor o, Tensor lse, Tensor rest, SymInt[] mask,"
    " float[] numbers, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dbias2,"
    " Tensor dweight, Tensor dsinks)",
    fake=_fake,
    fake_backward=_fake_backward,
    facts={
        "device": "'cpu' if q.is_cpu else q.device.type",
        "dtype": "q.dtype",
        "D": "q.shape[3]",
        "Dv": "v.shape[3]",
    },
    reference=definition.forward,
    backends=(
        *cpu(
            "attention",
            takes("dtype", F32, BF16, F16),
            at_most("D", MAX_HEAD_DIM),
            at_most("Dv", MAX_HEAD_DIM),
            workspace=_workspace,
        ),
        triton(
            "attention",
            takes("dtype", F32, BF16, F16),
            at_most("D", MAX_HEAD_DIM),
            at_most("Dv", MAX_HEAD_DIM),
        ),
        reference(),
    ),
    cases=CASES,
    make=make,
    cost=cost,
    bench=BENCH,
    peers=peers,
    folds=_folds,
    batched=("q", "k", "v", "do", "dlse", "o", "lse", "rest"),
)  # fmt: skip


# ---- The functions ---------------------------------------------------------------------------------------


@OP
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    """Softmax attention: ``o_i = sum_j p_ij v_j`` with ``p_i = softmax_j(scale q_i . k_j)`` over the visible keys j.

    q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv] -> o [B, Hq, Nq, Dv].

    mask        a value of ``fastattn.masks``: ``Causal()``, ``Window(left, right)``, ..., combined by ``&`` and ``|``;
                or a bool tensor that broadcasts to [B, Hq, Nq, Nk], True where i may attend to j
    bias        added to the logits: a float tensor that broadcasts to [B, Hq, Nq, Nk], a value of ``fastattn.bias``
                (``ALiBi``, ``Toeplitz``, ``Relative``, ``KeyBias``), or a list of them
    causal      short for ``mask=Causal() & mask``
    scale       of the logits; D ** -0.5 when None
    softcap     bends logits, before biases: ``softcap * tanh(s / softcap)``
    sinks       [Hq]: a logit that takes part in the denominator alone
    clip        (gamma, zeta), gamma <= 0: p becomes ``clamp((zeta - gamma) * p + gamma, 0, 1)``
    weight      multiplies p, which is not normalised again: a float tensor, ``Toeplitz`` or ``Relative``
    head_map    int [Hq]: the key head of each query head
    dropout     the share of weights set to 0 (the others grow by 1 / (1 - dropout)); ``seed`` and the place
                of a weight decide which, so that every backend drops the same
    return_lse  also give lse [B, Hq, Nq], the natural log of the softmax denominator, differentiable
    backend     None: the first that accepts; a name: that one, or an error that says why not

    Jagged nested tensors [B, H, j, D] are taken too, as packed sequences (``attention_varlen``).
    Hq is a multiple of Hk: query head h reads key head h // (Hq / Hk), unless ``head_map`` says otherwise.
    Query i stands at position i + Nk - Nq.  A row that sees no key gives o = 0, lse = -inf and zero gradients.
    Memory is O(Nq + Nk) beside the tensors given.  Everything that is float gets a gradient.

    >>> import torch, fastattn as fa
    >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> fa.attention(q, k, v, causal=True).shape
    torch.Size([1, 2, 5, 8])
    >>> fa.attention(q, k, v, bias=fa.bias.ALiBi(torch.tensor([0.5, 0.25]))).shape
    torch.Size([1, 2, 5, 8])
    """
    if _is_nested(q):
        options = {
            "mask": mask, "bias": bias, "causal": causal, "scale": scale, "softcap": softcap, "sinks": sinks,
            "clip": clip, "weight": weight, "head_map": head_map, "dropout": dropout, "seed": seed,
            "return_lse": return_lse, "backend": backend,
        }  # fmt: skip
        return _nested(q, k, v, options)
    q, k, v = autocast(q, k, v)
    B, Hq, Nq, D, Hk, Nk, Dv = AXES(q, k, v)
    if head_map is None:
        grouped_heads("attention", Hq, Hk)
    if Nq > UNBOUNDED or Nk > UNBOUNDED:
        raise ValueError(
            f"attention: Nq is {Nq} and Nk is {Nk}; sequences have at most {UNBOUNDED} tokens"
        )
    scale = scale_of("attention", scale, D)
    if (
        bias is softcap is sinks is clip is weight is head_map is None
        and dropout == 0.0
        and not (isinstance(mask, torch.Tensor))
    ):
        (code, blocks), extras, numbers = (
            mask_code("attention", mask, causal, Hq),
            NO_EXTRAS,
            [scale, *PLAIN],
        )
        if blocks is not None:
            extras = (*NO_EXTRAS[:8], blocks.to(q.device), *NO_EXTRAS[9:])
    else:
        extras, code, numbers = optional_arguments(
            "attention", q, (B, Hq, Nq, Nk), Hk, mask, causal, scale, softcap, bias, sinks, clip, weight, head_map,
            dropout, seed,
        )  # fmt: skip
    o, lse, _ = OP.call(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        *extras,
        code,
        numbers,
        backend=PROCESS.backend("attention", backend),
    )
    return (o, lse) if return_lse else o


# ---- Packed sequences ------------------------------------------------------------------------------------


@OP.also
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
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
    """``attention`` on sequences of any lengths packed end to end, without padding.

    q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv] -> o [Tq, Hq, Dv], and lse [Tq, Hq] with ``return_lse``.

    Sequence b owns the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys that cu_seqlens_k (the same when
    None) says; int32 [batch + 1], from 0 to Tq and Tk, and a sequence may be empty.  Masks, biases and dropout count
    from each sequence's own start: their B is the number of sequences, and Nq and Nk at least the longest.
    The other keywords are those of ``attention``.

    >>> import torch, fastattn as fa
    >>> q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    >>> fa.attention_varlen(q, k, v, torch.tensor([0, 3, 7], dtype=torch.int32), causal=True).shape
    torch.Size([7, 2, 8])
    """
    q, k, v = autocast(q, k, v)
    Tq, Hq, D, Tk, Hk, Dv = PACKED(q, k, v)
    if head_map is None:
        grouped_heads("attention_varlen", Hq, Hk)
    cu_q = sequence_ends("attention_varlen", "cu_seqlens_q", cu_seqlens_q, Tq, "Tq", q.device)
    cu_k = (
        cu_q
        if cu_seqlens_k is None
        else sequence_ends("attention_varlen", "cu_seqlens_k", cu_seqlens_k, Tk, "Tk", q.device)
    )
    if cu_k.shape != cu_q.shape or (cu_seqlens_k is None and Tq != Tk):
        raise ValueError(
            f"attention_varlen: cu_seqlens_q is {list(cu_q.shape)} for {Tq} queries and cu_seqlens_k "
            f"{list(cu_k.shape)} for {Tk} keys; they name the same sequences"
        )
    scale = scale_of("attention_varlen", scale, D)
    extras, code, numbers = optional_arguments(
        "attention_varlen", q, (cu_q.shape[0] - 1, Hq, -max(Tq, 1), -max(Tk, 1)), Hk, mask, causal, scale, softcap,
        bias, sinks, clip, weight, head_map, dropout, seed, cu_q, cu_k,
    )  # fmt: skip
    o, lse, _ = OP.call(
        *(unit_stride(t).transpose(0, 1)[None] for t in (q, k, v)),
        *extras,
        code,
        numbers,
        backend=PROCESS.backend("attention", backend),
    )
    o = o[0].transpose(0, 1)
    return (o, lse[0].transpose(0, 1)) if return_lse else o


def _is_nested(t: Any) -> bool:
    """Compiled code of torch 2.4 may ask for the layout alone."""
    return isinstance(t, torch.Tensor) and (
        t.layout is torch.jagged or (not torch.compiler.is_compiling() and t.is_nested)
    )


def _nested(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    """Jagged nested tensors [B, H, j, D], as ``torch.nested`` and PyTorch's own attention lay them out."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if (
            not getattr(t, "is_nested", False)
            or t.layout is not torch.jagged
            or t.dim() != 4
            or t._ragged_idx != 2
        ):
            raise ValueError(
                f"attention: {name} is {'nested, but not' if getattr(t, 'is_nested', False) else 'not'} "
                "jagged [B, H, j, D]; q, k and v are all jagged in their third axis, or none is"
            )
        if t.transpose(1, 2).lengths() is not None:
            raise ValueError(
                f"attention: {name} is jagged with holes; call .contiguous() on it first"
            )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    found = attention_varlen(
        q.values(), k.values(), v.values(), q.offsets(), k.offsets(), **options
    )

    def jagged(t: torch.Tensor) -> Any:
        return torch.nested.nested_tensor_from_jagged(t, q.offsets()).transpose(1, 2)

    return tuple(jagged(t) for t in found) if isinstance(found, tuple) else jagged(found)
