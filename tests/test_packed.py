"""Sequences end to end in the rows of one batch: each is computed as if it were alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fastattn.backends import triton_device, why_no_triton
from fastattn.kernels.attention.api import EXTRAS
from fastattn.masks import BlockSparse, Causal, Dense, Dilated, Full, Window, lowered
from fastattn.op import OPS
from fastattn.testing import Result, check

NAMES = [part.split()[-1] for part in EXTRAS.split(",")]
LENGTHS = {  # of queries and keys
    "equal": ((70, 5, 64, 1), (70, 5, 64, 1)),
    "unequal": ((3, 130, 65), (80, 70, 2)),
    "empty": ((0, 33, 0, 9, 0), (4, 0, 0, 70, 0)),
    "all empty": ((0, 0), (0, 0)),
}
LONGEST, H, D = 130, 2, 24
LAYOUT = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(5)) > 0.5


def tensors(num: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What may be said beside q, k, v, each by a name."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).half().to(dtype)

    index = (torch.arange(LONGEST)[:, None] * 5 + torch.arange(LONGEST) * 3) % 13
    return {
        "full": {},
        "causal": {"mask": Causal()},
        "window": {"mask": Window(20, 3) & Causal("top-left"), "seed": torch.tensor([3]), "dropout": 0.3},
        "formula": {"mask": BlockSparse(LAYOUT, 16) & Causal() | Dilated(3, 7)},
        "dense": {"mask": Dense(), "visible": torch.rand(num, 1, LONGEST, LONGEST) > 0.5},
        "values": {"bias": randn(num, H, LONGEST, LONGEST), "bias2": randn(1, H, 1, LONGEST), "mask": Causal()},
        "queries": {"bias": randn(num, 1, LONGEST, 1), "weight": randn(num, H, 1, 1), "sinks": randn(H)},
        "offset": {"bias": randn(H, 2 * LONGEST + 3), "weight": randn(1, 2 * LONGEST - 1)},
        "index": {"bias": randn(H, 13), "bias_index": index.int(), "heads": torch.tensor([1, 0]).int()},
    }  # fmt: skip


def run(
    lengths: tuple[tuple[int, ...], ...], given: dict[str, Any], dtype: torch.dtype, backend: str
) -> Result:
    """Outputs and gradients; what is drawn is the same for every dtype and backend."""
    op, generator = OPS["attention"], torch.Generator().manual_seed(1)
    device = triton_device() if backend == "triton" else "cpu"

    def cast(t: torch.Tensor) -> torch.Tensor:
        t = t.detach().to(device, dtype) if t.is_floating_point() else t.to(device)
        return t.requires_grad_(t.is_floating_point())

    totals = [sum(n) for n in lengths]
    leaves = {
        name: cast(torch.randn(1, H, N, D, generator=generator))
        for name, N in zip("qkv", (totals[0], totals[1], totals[1]))
    }
    code, layouts = lowered(given.get("mask", Full()))
    ends = [torch.tensor([0, *n]).cumsum(0).int() for n in lengths]
    extras = {n: t for n, t in given.items() if n in NAMES} | {"cu_q": ends[0], "cu_k": ends[1]}
    extras |= {"blocks": layouts} if layouts is not None else {}
    extras = {n: cast(t) for n, t in extras.items()}
    leaves |= {n: t for n, t in extras.items() if t.requires_grad}
    numbers = (D**-0.5, 0.0, 0.0, 1.0, given.get("dropout", 0.0))
    outs = op.call(
        *(leaves[n] for n in "qkv"), *(extras.get(n) for n in NAMES), code, numbers, backend=backend
    )
    upstream = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    upstream = [g.masked_fill(torch.isinf(o), 0.0) for o, g in zip(outs, upstream)]
    found = torch.autograd.grad(outs, list(leaves.values()), upstream, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found)]
    return Result(
        {name: o.detach() for name, o in zip(op.outputs, outs)},
        {f"d{name}": g for name, g in zip(leaves, grads)},
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", tensors(1, torch.float32))
def test_packed_sequences_match_the_reference(name: str, lengths: str, poisoned: None) -> None:
    if why := why_no_triton():
        pytest.skip(f"triton: {why}")
    given = tensors(len(LENGTHS[lengths][0]), torch.float32)[name]
    results = [
        run(LENGTHS[lengths], given, dtype, backend)
        for dtype, backend in (
            (torch.float32, "triton"), (torch.float64, "reference"), (torch.float32, "reference")
        )
    ]  # fmt: skip
    check(*results)


@pytest.mark.parametrize(
    "ends", [[5, 9, 20], [0, 30, 12, 20], [0, 90], [-4, 3], [7, 7, 7], [20, 0]], ids=str
)
def test_ends_that_make_no_sense_touch_nothing_outside(ends: list[int], poisoned: None) -> None:
    """And rows of no sequence are 0, with lse = -inf and no gradient."""
    if why := why_no_triton():
        pytest.skip(f"triton: {why}")
    op, cu = OPS["attention"], torch.tensor(ends, dtype=torch.int32, device=triton_device())
    q, k, v = (torch.randn(1, 1, 20, 16, device=cu.device).requires_grad_() for _ in range(3))
    extras = [cu if name in ("cu_q", "cu_k") else None for name in NAMES]
    o, lse, _ = op.call(
        q, k, v, *extras, lowered(Causal())[0], (0.25, 0.0, 0.0, 1.0, 0.0), backend="triton"
    )
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    inside = torch.zeros(20, dtype=torch.bool)
    for begin, end in itertools.pairwise(ends):
        inside[max(begin, 0) : max(end, 0)] = True
    assert all(t.isfinite().all() for t in (o, *grads))
    assert lse[0, 0, inside.to(lse.device)].isfinite().all()
    assert (lse[0, 0, ~inside.to(lse.device)] == float("-inf")).all()
    assert all((t[:, :, ~inside.to(t.device)] == 0).all() for t in (o, *grads))
