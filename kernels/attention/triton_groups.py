"""attention, gradients of tokens in several slots, Triton                         maths: README.md

dq_i = sum of the gradients of the slots that hold token i, in the order of slots; dk and dv likewise

    slots of a head    3  0  3  5  0  3           sorted by token, in their order     1 4 | 0 2 5 | 3
    sum                dq_0 = 1 + 4,  dq_3 = 0 + 2 + 5,  dq_5 = 3,  the others 0

The backward pass first writes float32 gradients a slot.  Then a program owns BLOCK tokens of a head and adds
up their slots one by one: every sum has one order, no atomics.

Whether an index names a token twice is not looked at, which would wait for the GPU.  Queries may where o is
kept by slot, keys where they have an index of their own: only that of queries promises otherwise.

Not done: sorting once for dk and dv and for later steps.  Measured: not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import triton_launch as launch
from fastattn.kernels.common import triton_rows as rows

BLOCK = 32  # tokens of a program


def repeats(c):
    """Whether queries, and keys, may be in several slots."""
    a, b = c.slots_q, c.slots_k
    if a is None:
        return False, False
    # What autograd has saved is another object of the same memory.
    is_same = (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
    return c.by_slot, c.by_slot or not is_same


def by_slot(t, index):
    """Room for the gradients of the slots of t; zeros, because groups may leave slots out."""
    B, H, _, D = t.shape
    return torch.zeros((B, H, index.shape[3], D), dtype=torch.float32, device=t.device)


def gather(grad, parts, index):
    """Write the sum over the slots of each token."""
    B, H, N, D = grad.shape
    if not grad.numel():
        return
    token = index[:, :, 0]
    token = token.masked_fill((token < 0) | (token >= N), N)
    token, order = token.sort(dim=-1, stable=True)
    every = torch.arange(N + 1, dtype=torch.int32, device=grad.device)
    starts = torch.searchsorted(token, every.expand(*token.shape[:2], -1).contiguous())
    block = launch.block(D)
    attention_gather[(B * H * triton.cdiv(N, BLOCK),)](
        rows.rows(grad), rows.rows(parts), rows.rows(order), rows.rows(starts), H,
        H // token.shape[1], int(token.shape[0] > 1), N, D, block, BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=("H", "N"))
def attention_gather(
    grad, parts, order, starts, H, per, has_batches, N,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # Find the tokens, and which of the sorted slots are theirs.
    b, h, i0 = rows.tile(grad, H, N, BM, False)
    at_b, at_h = b * has_batches, h // per
    i = i0 + tl.arange(0, BM)[:, None]
    d = tl.arange(0, BD)[None, :]
    is_token = i < N
    p_starts = rows.place(starts, at_b, at_h, i, tl.zeros_like(i))
    begin = tl.load(p_starts, mask=is_token, other=0)  # [BM, 1]
    count = tl.load(p_starts + 1, mask=is_token, other=0) - begin
    most = tl.max(tl.max(count, 1), 0)

    # Add up the first of each, the second of each, and so on.
    acc = tl.zeros([BM, BD], tl.float32)
    for n in tl.range(0, most):
        is_slot = n < count
        p_order = rows.place(order, at_b, at_h, begin + n, tl.zeros_like(i))
        slot = tl.load(p_order, mask=is_slot, other=0)
        p_parts = rows.place(parts, b, h, slot, d)
        acc += tl.load(p_parts, mask=is_slot & (d < D), other=0.0)
    rows.store(grad, b, h, i0, acc, N, BM, D, BD)
