"""Triton on sequences end to end in the rows of one batch, and on groups of slots: each is computed as if it were alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.backends import triton_device, why_no_triton
from fastattn.bias import Toeplitz
from fastattn.groups import Groups
from fastattn.kernels.attention.api import EXTRAS
from fastattn.masks import BlockSparse, Causal, Dense, Dilated, Full, Prefix, Window, lowered
from fastattn.op import OPS
from fastattn.testing import Result, check

NAMES = [part.split()[-1] for part in EXTRAS.split(",")]
NUMBERS = (0.25, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
LENGTHS = {  # of queries and keys
    "equal": ((70, 5, 64, 1), (70, 5, 64, 1)),
    "unequal": ((3, 70, 65), (68, 70, 2)),
    "empty": ((0, 33, 0, 9, 0), (4, 0, 0, 70, 0)),
    "all empty": ((0, 0), (0, 0)),
}
LONGEST, H, D = 70, 2, 24
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
    numbers = (D**-0.5, 0.0, 0.0, 1.0, given.get("dropout", 0.0), 0.0, 0.0)
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
    o, lse, _ = op.call(q, k, v, *extras, lowered(Causal())[0], NUMBERS, backend="triton")
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    inside = torch.zeros(20, dtype=torch.bool)
    for begin, end in itertools.pairwise(ends):
        inside[max(begin, 0) : max(end, 0)] = True
    assert all(t.isfinite().all() for t in (o, *grads))
    assert lse[0, 0, inside.to(lse.device)].isfinite().all()
    assert (lse[0, 0, ~inside.to(lse.device)] == float("-inf")).all()
    assert all((t[:, :, ~inside.to(t.device)] == 0).all() for t in (o, *grads))


# ---- Groups --------------------------------------------------------------------------------------------


def grouped() -> dict[str, dict[str, Any]]:
    """Calls of grouped_attention whose tiles, heads and batches are unlike those of the contract's cases."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half().float()

    def some(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 100, shape, generator=generator)

    def qkv(Hq: int = 2, Hk: int = 2, N: int = 200) -> dict[str, torch.Tensor]:
        return {
            name: randn(1 if N == 200 else 2, h, N, D)
            for name, h in (("q", Hq), ("k", Hk), ("v", Hk))
        }

    in_order = torch.arange(200).view(2, 100)  # tiles that see all, some and nothing
    holes = in_order.masked_fill(in_order % 5 == 2, -1)
    holes[1, 32:] = -1  # tiles without a token
    ends = torch.tensor([0, 0, 66, 66, 69, 100])
    only = torch.rand(2, 120, generator=generator).argsort(-1)[None, :, :100]
    return {
        "tiles": {**qkv(), "groups": Groups(in_order), "causal": True},
        "holes": {**qkv(), "groups": Groups(holes), "mask": Window(70, 0), "sinks": randn(2)},
        "labels": {**qkv(), "groups": Groups(holes, labels=in_order // 40)},
        "labels of one side": {
            **qkv(), "groups": Groups(in_order, labels=in_order // 70 - 1), "key_groups": Groups(holes),
            "mask": Dilated(60, 3),
        },
        "heads": {
            **qkv(4, 2, 100), "groups": Groups(some(1, 4, 3, 30)), "key_groups": Groups(some(2, 2, 3, 66)),
            "combine": "sum", "head_map": torch.tensor([1, 0, 0, 1]), "mask": Causal() | Prefix(9),
            "bias": [randn(3, 1, 30, 66), Toeplitz(randn(4, 131))], "return_lse": False,
        },
        "ragged": {
            **qkv(4, 2, 120), "groups": Groups(only, ends), "bias": randn(5, 4, 66, 1),
            "weight": randn(5, 1, 1, 66), "dropout": 0.2, "seed": 4,
        },
        "nothing": {**qkv(N=9), "groups": Groups(torch.full((2, 3), -1)), "sinks": randn(2)},
        "no slots": {**qkv(N=9), "groups": Groups(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]))},
    }  # fmt: skip


@pytest.mark.parametrize("name", grouped())
def test_groups_match_the_reference(name: str, poisoned: None) -> None:
    if why := why_no_triton():
        pytest.skip(f"triton: {why}")
    op, call = OPS["attention"], {"function": "grouped_attention", **grouped()[name]}
    call = {n: x.to(triton_device()) if hasattr(x, "to") else x for n, x in call.items()}
    double = {n: t.double() for n, t in testing.floats(call).items()}
    check(
        testing.run(op, call, "triton"),
        testing.run(op, testing.with_floats(call, double), "reference"),
        testing.run(op, call, "reference"),
    )


@pytest.mark.parametrize("by_slot", [False, True])
@pytest.mark.parametrize("ends", [[0, 3, 8], [0, 90, 8], [-4, 3, 30], [7, 2, 1]], ids=str)
def test_tokens_that_do_not_exist_are_empty_slots(
    ends: list[int], by_slot: bool, poisoned: None
) -> None:
    """And whatever the ends of groups are, nothing outside is read or written."""
    if why := why_no_triton():
        pytest.skip(f"triton: {why}")
    op, device = OPS["attention"], triton_device()
    q, k, v = (torch.randn(1, 1, 20, 16, device=device).requires_grad_() for _ in range(3))
    slots = [3, -1, 20, 1 << 30, 7, -(1 << 31), 12, 0]
    results = []
    for held in (slots, [t if 0 <= t < 20 else -1 for t in slots]):
        given = {
            "cu_q": torch.tensor(ends, dtype=torch.int32, device=device),
            "slots_q": torch.tensor(held, dtype=torch.int32, device=device)[None, None, None],
        }
        given |= {"cu_k": given["cu_q"], "slots_k": given["slots_q"]}
        extras = [given.get(name) for name in NAMES]
        o, lse, _ = op.call(
            q, k, v, *extras, lowered(Causal())[0], (*NUMBERS[:5], by_slot, 0.0), backend="triton"
        )
        grads = torch.autograd.grad(o.sum(), (q, k, v))
        results.append((o, lse, *grads))
        assert all(t.isfinite().all() for t in (o, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_gradients_go_by_slot_only_where_tokens_may_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd hands back other objects for the same index."""
    if why := why_no_triton():
        pytest.skip(f"triton: {why}")
    from fastattn.kernels.attention import triton_groups

    sums: list[torch.Size] = []
    gather = triton_groups.gather
    monkeypatch.setattr(
        triton_groups, "gather", lambda *args: (sums.append(args[1].shape), gather(*args))
    )
    q, k, v = (
        torch.randn(1, 1, 20, D, device=triton_device(), requires_grad=True) for D in (16, 16, 8)
    )
    one = Groups(torch.arange(6).view(2, 3)).to(triton_device())
    for options, wanted in (
        ({}, []), ({"key_groups": one}, []),
        ({"key_groups": Groups(torch.arange(8).view(2, 4)).to(triton_device())}, [(1, 1, 8, 16), (1, 1, 8, 8)]),
        ({"combine": "sum"}, [(1, 1, 6, 16), (1, 1, 6, 16), (1, 1, 6, 8)]),
    ):  # fmt: skip
        sums.clear()
        fa.grouped_attention(q, k, v, one, **options, backend="triton").sum().backward()
        assert sums == wanted
