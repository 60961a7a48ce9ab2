"""Results over parts of the keys, merged: values, gradients, parts that saw nothing, refusals."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import fastattn as fa
from fastattn.op import OPS
from fastattn.testing import Result, check, run


def t(*shape):
    return torch.zeros(shape)


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def parts_of(cuts, q, k, v, **given):
    bounds = [0, *cuts, k.shape[2]]
    return [
        fa.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, **given)
        for a, b in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("cuts", [(), (35,), (1, 69), (0, 16, 16, 48), (70,)], ids=str)
@pytest.mark.op("attention")
def test_parts_of_the_keys_merge(cuts, dtype, best_cpu):
    q, k, v = (torch.randn(2, 4, m, 24).to(dtype) for m in (20, 70, 70))
    given = {"q": q, "k": k, "v": v}
    o, lse = fa.merge_attention(*zip(*parts_of(cuts, **given, backend=best_cpu)))
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    double = {name: x.double() for name, x in given.items()}
    op = OPS["attention"]
    exact, plain = (run(op, c, "reference").outputs for c in (double, given))
    check(Result(dict(zip(exact, (o, lse))), {}), Result(exact, {}), Result(plain, {}), 4.0)


def test_gradients_of_merged_parts_are_those_of_the_whole():
    """In float64, through o and lse, and with parts that saw nothing."""
    q, k, v = (
        torch.randn(1, 2, m, 8, dtype=torch.float64, requires_grad=True) for m in (5, 12, 12)
    )
    up = [torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)]
    whole = fa.attention(q, k, v, return_lse=True, backend="reference")
    merged = fa.merge_attention(*zip(*parts_of((0, 3, 3, 9), q, k, v, backend="reference")))
    for a, b in zip(whole, merged):
        assert torch.allclose(a, b, atol=1e-12)
    grads = [torch.autograd.grad(outs, (q, k, v), up) for outs in (whole, merged)]
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradcheck_of_merging():
    outs = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fa.merge_attention, (outs, lses))
    assert torch.autograd.gradgradcheck(fa.merge_attention, (outs, lses))


def test_parts_that_saw_nothing_add_nothing():
    outs, lses = torch.randn(3, 5, 4), torch.randn(3, 5)
    lses[1], outs[1] = float("-inf"), float("nan")
    lses[:, 2] = float("-inf")
    outs.requires_grad_(), lses.requires_grad_()
    o, lse = fa.merge_attention(outs, lses)
    kept = fa.merge_attention(outs[[0, 2]], lses[[0, 2]])
    same((o, lse), kept)
    assert not o[2].any()
    assert lse[2] == float("-inf")
    grads = torch.autograd.grad(o.sum() + lse[[0, 1, 3, 4]].sum(), (outs, lses))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][1].any()
    assert not grads[1][1].any()


def test_merging_is_safe_at_any_size_of_lse():
    outs, lses = torch.randn(2, 3, 4), torch.tensor([[1e4, -1e4, 300.0], [1e4, -1e4, -300.0]])
    o, lse = fa.merge_attention(outs, lses)
    assert torch.allclose(
        o, torch.stack([outs[:, 0].mean(0), outs[:, 1].mean(0), outs[0, 2]]), atol=1e-6
    )
    assert torch.allclose(lse, torch.tensor([1e4, -1e4, 300.0]), atol=1.0)


def test_lists_and_stacks_compile():
    outs, lses = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5)
    expected = fa.merge_attention(outs, lses)
    same(fa.merge_attention(list(outs), tuple(lses)), expected)
    found = torch.compile(fa.merge_attention, fullgraph=True, backend="aot_eager")(outs, lses)
    same(found, expected)
    one = fa.merge_attention(outs[:1], lses[:1])
    assert torch.allclose(one[0], outs[0])


MERGE = {
    "counts": (([t(2, 3)] * 2, [t(2)]), "outs has 2 parts and lses 1; each part has both"),
    "empty": (([], []), "outs is list; it takes a list of floating tensors, at least one, or them stacked"),
    "lse shape": (([t(2, 3)], [t(3)]), "outs[0] is float32[2, 3] on cpu and lses[0] float32[3] on cpu; beside outs[0], "
                  "float32[2, 3] on cpu, they take the same and [2]"),
    "shapes": (([t(2, 3), t(2, 4)], [t(2)] * 2), "outs[1] is float32[2, 4] on cpu and lses[1] float32[2] on cpu; "
               "beside outs[0], float32[2, 3] on cpu, they take the same and [2]"),
    "integers": (([t(2, 3).long()], [t(2)]), "outs is list; it takes a list of floating tensors, at least one, or them stacked"),
    "number": ((3.0, [t(2)]), "outs is float; it takes a list of floating tensors, at least one, or them stacked"),
}  # fmt: skip


@pytest.mark.parametrize("what", MERGE)
def test_merge_refuses(what):
    args, text = MERGE[what]
    with pytest.raises(ValueError, match=f"^{re.escape('merge_attention: ' + text)}$"):
        fa.merge_attention(*args)
