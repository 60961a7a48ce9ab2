"""fastattn.attention: the public function and the descriptor of dense softmax attention."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.checks import Axes, number, unit_stride
from fastattn.choice import PROCESS
from fastattn.kernels.attention import reference as formula
from fastattn.masks import UNBOUNDED, Causal, Full, Mask, Window, materialize, pairs
from fastattn.op import Case, Cost, Op, at_most, autocast, cpu, reference, takes, triton

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FULL = Full().encode()
CAUSAL = Causal().encode()
MAX_HEAD_DIM = 256
AXES = Axes("attention", q="B Hq Nq D", k="B Hk Nk D", v="B Hk Nk Dv")


def _fake(q, k, v, mask, scale):
    B, Hq, Nq, _ = q.shape
    o = q.new_empty(B, Hq, Nq, v.shape[3])
    if q.dtype is F32:
        return o, q.new_empty(B, Hq, Nq)
    return o, q.new_empty(B, Hq, Nq, dtype=F64 if q.dtype is F64 else F32)


def _fake_backward(do, dlse, q, k, v, o, lse, mask, scale):
    return q.new_empty(*q.shape), k.new_empty(*k.shape), v.new_empty(*v.shape)


def _workspace(do, dlse, q, k, v, o, lse, mask, scale):
    """For each head delta_i = do_i . o_i, dq by tiles of queries, and whose turn it is to add to a tile."""
    B, Hq, Nq, D = q.shape
    return [lse.new_empty(B, Hq, ((Nq + 64) * D + Nq + Nq // 8 + 16) // 16 * 16)]


def _make(case: Case, randn: Any) -> dict[str, Any]:
    D, Hk = case.D, case.Hk or case.Hq
    call = {
        "q": randn(case.B, case.Hq, case.Nq, D),
        "k": randn(case.B, Hk, case.Nk, D),
        "v": randn(case.B, Hk, case.Nk, case.Dv or D),
    }
    return call | {
        key: getattr(case, key) for key in ("mask", "scale") if getattr(case, key) is not None
    }


def _cost(case: Case, size: int) -> Cost:
    """Two products of 2 D flops a pair forward, five backward; every tensor once through memory."""
    D, Dv, Hk = case.D, case.Dv or case.D, case.Hk or case.Hq
    work = 2 * case.B * case.Hq * pairs(case.mask or Full(), case.Nq, case.Nk)
    queries = case.B * case.Hq * case.Nq * (D + Dv) * size
    keys = case.B * Hk * case.Nk * (D + Dv) * size
    return Cost(work * (D + Dv), work * (3 * D + 2 * Dv), queries + keys, 2 * (queries + keys))


def _peers(q, k, v, mask=None, scale=None):
    """PyTorch's own: its causal flag where that means the same, else its dense bool mask."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if mask == Causal() and q.shape[2] == k.shape[2]:
        return {"torch sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True, **options)}
    if mask not in (None, Full()):
        options["attn_mask"] = mask.materialize(q.shape[2], k.shape[2], q.device)
    return {"torch sdpa": lambda q, k, v: sdpa(q, k, v, **options)}


_MASKS = (
    None,
    Causal(),
    Causal("top-left"),
    Window(7, 0),
    Window(3, 5),
    Causal("top-left") & Window(20, 2),
)
_LENGTHS = ((1, 1), (33, 33), (5, 40), (40, 5), (65, 131), (130, 67), (0, 3), (3, 0))

OP = Op(
    "attention",
    forward="(Tensor q, Tensor k, Tensor v, SymInt[] mask, float scale) -> (Tensor o, Tensor lse)",
    backward="(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, SymInt[] mask,"
    " float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=_fake,
    fake_backward=_fake_backward,
    facts={
        "device": "'cpu' if q.is_cpu else q.device.type",
        "dtype": "q.dtype",
        "D": "q.shape[3]",
        "Dv": "v.shape[3]",
    },
    reference=lambda q, k, v, mask, scale: formula.forward(
        q, k, v, materialize(mask, q.shape[2], k.shape[2], q.device), scale
    ),
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
    cases=[
        *(Case(B=2, Hq=2, Nq=n, Nk=m, D=32, mask=mask) for n, m in _LENGTHS for mask in _MASKS),
        *(Case(B=1, Hq=4, Hk=hk, Nq=37, Nk=70, D=d, Dv=dv, mask=Causal())
          for hk, d, dv in ((1, 64, 64), (2, 64, 40), (4, 128, 64), (2, 1, 3), (4, 17, 256), (1, 256, 80))),
        *(Case(B=2, Hq=4, Hk=2, Nq=70, Nk=70, D=48, mask=Window(9, 9), layout=how)
          for how in ("transposed", "sliced", "broadcast", "last-axis")),
        Case(B=1, Hq=2, Nq=300, Nk=520, D=64, mask=Causal()),
        Case(B=1, Hq=1, Nq=129, Nk=257, D=96, scale=0.5),
        Case(B=1, Hq=1, Nq=64, Nk=128, D=64, scale=-0.3),
        *(Case(B=1, Hq=2, Nq=64, Nk=64, D=64, mask=Window(0, 0), scale=scale) for scale in (None, 1.0)),
        Case(B=0, Hq=2, Nq=4, Nk=4, D=8),
    ],
    make=_make,
    cost=_cost,
    bench=[
        *(Case(B=1, Hq=8, Nq=n, Nk=n, D=d, mask=mask)
          for n in (1024, 4096) for d in (64, 128) for mask in (None, Causal())),
        *(Case(B=1, Hq=8, Nq=n, Nk=n, D=64) for n in (16, 64, 128)),
    ],
    peers=_peers,
)  # fmt: skip


@OP
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention: ``o_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the visible keys j.

    q [B, Hq, Nq, D], k [B, Hk, Nk, D], v [B, Hk, Nk, Dv] -> o [B, Hq, Nq, Dv].

    mask        a value of ``fastattn.masks``: ``Causal()``, ``Window(left, right)``, ...; ``a & b`` combines
    causal      short for ``mask=Causal() & mask``
    scale       of the logits; D ** -0.5 when None
    return_lse  also give lse [B, Hq, Nq], the natural log of the softmax denominator, differentiable
    backend     None: the first that accepts; a name: that one, or an error that says why not

    Hq is a multiple of Hk: query head h reads key head h // (Hq / Hk).  Query i stands at position
    i + Nk - Nq.  A row that sees no key gives o = 0, lse = -inf and zero gradients.  Memory is O(Nq + Nk).

    >>> import torch, fastattn as fa
    >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    >>> fa.attention(q, k, v, causal=True).shape
    torch.Size([1, 2, 5, 8])
    """
    q, k, v = autocast(q, k, v)
    B, Hq, Nq, D, Hk, Nk, Dv = AXES(q, k, v)
    if Hq != Hk and (Hk == 0 or Hq % Hk):
        raise ValueError(f"attention: Hq is {Hq} and Hk is {Hk}; Hq must be a multiple of Hk")
    if Nq > UNBOUNDED or Nk > UNBOUNDED:
        raise ValueError(
            f"attention: Nq is {Nq} and Nk is {Nk}; sequences have at most {UNBOUNDED} tokens"
        )
    if causal is not True and causal is not False:
        raise ValueError(f"attention: causal is {causal!r}; it takes True or False")
    if mask is None:
        code = CAUSAL if causal else FULL
    elif isinstance(mask, Mask):
        code = (Causal() & mask).encode() if causal else mask.encode()
    else:
        raise ValueError(
            f"attention: mask is {type(mask).__name__}; it takes a value of fastattn.masks or None"
        )
    o, lse = OP.call(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        code,
        (D or 1) ** -0.5 if scale is None else number("attention", "scale", scale),
        backend=PROCESS.backend("attention", backend),
    )
    return (o, lse) if return_lse else o
