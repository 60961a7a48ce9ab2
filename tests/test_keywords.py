"""Every function and keyword as a citizen of PyTorch: compiled once for all lengths, cast, batched, recomputed.

Each line of CALLS is a function of tensors alone, and what makes the tensors of given lengths.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn as fa
from fastattn.backends import Backend
from fastattn.cli.support import of_call
from fastattn.masks import BlockSparse, Causal, Dilated, Prefix, Window
from fastattn.op import OPS, Op, _replaced

Tensors = dict[str, torch.Tensor]


def qkv(Nq: int, Nk: int) -> Tensors:
    return {n: torch.randn(2, h, m, 16) for n, h, m in (("q", 4, Nq), ("k", 2, Nk), ("v", 2, Nk))}


def beside(**more: Callable[[int, int], torch.Tensor]) -> Callable[[int, int], Tensors]:
    return lambda Nq, Nk: qkv(Nq, Nk) | {name: make(Nq, Nk) for name, make in more.items()}


def packed(Nq: int, Nk: int) -> Tensors:
    ends = [0, Nq // 3, Nq // 3, Nq], [0, Nk // 2, Nk - 1, Nk]
    x = {n: torch.randn(m, h, 16) for n, h, m in (("q", 4, Nq), ("k", 2, Nk), ("v", 2, Nk))}
    return x | {f"cu_{n}": torch.tensor(e, dtype=torch.int32) for n, e in zip("qk", ends)}


def grouped(Nq: int, Nk: int) -> Tensors:
    half = Nq // 2
    x = {n: torch.randn(2, 4, Nq, 16) for n in "qkv"}
    return x | {"index": torch.randperm(Nq)[: 2 * half].view(2, half)}


def pair(Nq: int, Nk: int) -> Tensors:
    return {"q": torch.randn(2, 4, Nq, 16), "k": torch.randn(2, 4, Nk, 16)}


def cached(Nq: int, Nk: int) -> Tensors:
    caches = {n: torch.randn(2, 2, Nk + 8, 16) for n in ("k_cache", "v_cache")}
    return {"q": torch.randn(2, 4, 1, 16)} | caches | {"lengths": torch.tensor([Nk, 3])}


BLOCKS = BlockSparse(torch.rand(1, 13, 13, generator=torch.Generator().manual_seed(1)) > 0.5, 8)
LEFT = Causal() | Prefix(3)
KNOWN = torch.tensor([11])
CALLS: dict[str, tuple[Callable[..., Any], Callable[[int, int], Tensors]]] = {
    "formulas": (lambda q, k, v: fa.attention(q, k, v, mask=LEFT), qkv),
    "dilated": (lambda q, k, v: fa.attention(q, k, v, mask=Dilated(9, 2) & Window(9, 9)), qkv),
    "blocks": (lambda q, k, v: fa.attention(q, k, v, mask=BLOCKS), qkv),
    "bool mask": (
        lambda q, k, v, m: fa.attention(q, k, v, mask=m, causal=True),
        beside(m=lambda Nq, Nk: torch.rand(2, 1, Nq, Nk) > 0.3)),
    "bias": (lambda q, k, v, b: fa.attention(q, k, v, bias=b), beside(b=lambda Nq, Nk: torch.randn(4, Nq, Nk))),
    "alibi": (
        lambda q, k, v, s: fa.attention(q, k, v, bias=fa.bias.ALiBi(s)), beside(s=lambda *_: torch.rand(4))),
    "toeplitz": (
        lambda q, k, v, t: fa.attention(q, k, v, bias=fa.bias.Toeplitz(t)), beside(t=lambda *_: torch.randn(4, 199))),
    "relative": (
        lambda q, k, v, t, i: fa.attention(q, k, v, bias=fa.bias.Relative(t, i)),
        beside(t=lambda *_: torch.randn(50, 4), i=lambda Nq, Nk: torch.randint(50, (Nq, Nk)))),
    "key bias": (
        lambda q, k, v, x: fa.attention(q, k, v, bias=fa.bias.KeyBias(x)), beside(x=lambda _, Nk: torch.randn(2, 1, Nk))),
    "biases": (
        lambda q, k, v, b, s: fa.attention(q, k, v, bias=[b, fa.bias.ALiBi(s)]),
        beside(b=lambda Nq, Nk: torch.randn(Nq, Nk), s=lambda *_: torch.rand(4))),
    "softcap": (lambda q, k, v: fa.attention(q, k, v, softcap=5.0), qkv),
    "sinks": (lambda q, k, v, s: fa.attention(q, k, v, sinks=s, return_lse=True), beside(s=lambda *_: torch.randn(4))),
    "clip": (lambda q, k, v: fa.attention(q, k, v, clip=(-0.03, 1.1)), qkv),
    "weight": (lambda q, k, v, w: fa.attention(q, k, v, weight=w), beside(w=lambda Nq, Nk: torch.rand(4, Nq, Nk))),
    "dropout": (lambda q, k, v: fa.attention(q, k, v, dropout=0.3, seed=5), qkv),
    "dropout by a tensor": (
        lambda q, k, v, seed: fa.attention(q, k, v, dropout=0.3, seed=seed), beside(seed=lambda *_: KNOWN)),
    "head_map": (
        lambda q, k, v, h: fa.attention(q, k, v, head_map=h), beside(h=lambda *_: torch.tensor([1, 0, 0, 1]))),
    "varlen": (lambda q, k, v, cu_q, cu_k: fa.attention_varlen(q, k, v, cu_q, cu_k, causal=True), packed),
    "groups": (
        lambda q, k, v, index: fa.grouped_attention(q, k, v, fa.Groups(index), causal=True, return_lse=True), grouped),
    "mean of groups": (
        lambda q, k, v, index: fa.grouped_attention(q, k, v, fa.Groups(index), combine="mean"), grouped),
    "topk": (lambda q, k, v: fa.topk_attention(q, k, v, 4), qkv),
    "importance": (lambda q, k: fa.attention_importance(q, k, causal=True), pair),
    "columns": (lambda q, k: fa.column_attention(q, k, k), pair),
    "merge": (
        lambda q, k, v: fa.merge_attention(*zip(*(fa.attention(q, t, t, return_lse=True) for t in (k, v)))), qkv),
    "decode": (lambda **call: fa.attention_decode(**call), cached),
    "decode with more": (
        lambda b, **call: fa.attention_decode(**call, bias=[b], weight=b, mask=LEFT),
        lambda Nq, Nk: cached(Nq, Nk) | {"b": torch.randn(1, 4, 1, Nk + 8)}),
    "decode with all": (
        lambda b, h, **call: fa.attention_decode(
            **call, bias=b, causal=True, clip=(-0.1, 1.1), dropout=0.2, seed=3, head_map=h),
        lambda Nq, Nk: cached(Nq, Nk) | {"b": torch.randn(4, 1, Nk + 8), "h": torch.tensor([1, 0, 0, 1])}),
}  # fmt: skip
BY_NAME = pytest.mark.parametrize("call", CALLS)
SLOWLY = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch 2.4 says so


def flat(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def results(function: Callable[..., Any], tensors: Tensors, call: str) -> list[torch.Tensor]:
    """Outputs, and gradients of every float tensor."""
    if call.startswith("decode"):
        return [*flat(function(**tensors))]
    tensors = {
        n: t.detach().requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()
    }
    outs = flat(function(**tensors))
    loss = sum(torch.where(torch.isfinite(o), o, 0.0).float().square().sum() for o in outs)
    return [
        *(o.detach() for o in outs),
        *torch.autograd.grad(loss, [t for t in tensors.values() if t.requires_grad]),
    ]


@BY_NAME
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_once_for_all_lengths(call):
    """One graph without a break, forward and backward; other lengths compile nothing again."""
    function, make = CALLS[call]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for Nq, Nk in ((7, 9), (20, 12), (33, 41)):
            tensors = make(Nq, Nk)
            for a, b in zip(results(function, tensors, call), results(compiled, tensors, call)):
                assert torch.equal(a, b)
    torch._dynamo.reset()


@BY_NAME
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(call, low):
    """Float32 tensors under autocast give what tensors of its dtype give; gradients come in float32."""
    if call.startswith("decode"):
        pytest.skip("reference: decode computes in the dtype of its caches")
    function, make = CALLS[call]
    tensors = make(9, 12)
    with torch.autocast("cpu", low):
        found = results(function, tensors, call)
    assert found[0].dtype == low
    rounded = {
        n: t.to(low) if n in ("q", "k", "v", "k_cache", "v_cache") else t
        for n, t in tensors.items()
    }
    assert torch.equal(found[0], flat(function(**rounded))[0])
    assert all(g.dtype == torch.float32 for g in found[len(flat(function(**tensors))) :])


@BY_NAME
@SLOWLY
def test_vmap(call):
    """Over a new axis of q alone, and of every float tensor; with gradients."""
    function, make = CALLS[call]
    tensors = make(9, 12)
    floats = [n for n, t in tensors.items() if t.is_floating_point()]
    for names in (["q"], floats):
        batch = {n: torch.randn(3, *t.shape) if n in names else t for n, t in tensors.items()}
        dims = ({n: 0 if n in names else None for n in batch},)

        def run(x):
            return function(**x)

        found = flat(torch.func.vmap(run, in_dims=dims)(batch))
        for n in range(3):
            one = {name: t[n] if name in names else t for name, t in batch.items()}
            for a, b in zip(found, flat(run(one))):
                assert torch.equal(a[n], b)


@BY_NAME
@SLOWLY
def test_gradients_a_sample(call):
    """vmap of grad, which privacy and meta-learning use."""
    if call.startswith("decode"):
        pytest.skip("reference: decode has no gradient")
    function, make = CALLS[call]
    tensors = make(9, 12)
    floats = {n: torch.randn(3, *t.shape) for n, t in tensors.items() if t.is_floating_point()}
    others = {n: t for n, t in tensors.items() if n not in floats}

    def loss(x):
        outs = flat(function(**x, **others))
        return sum(torch.where(torch.isfinite(o), o, 0.0).square().sum() for o in outs)

    found = torch.func.vmap(torch.func.grad(loss))(floats)
    for n in range(3):
        one = torch.func.grad(loss)({name: t[n] for name, t in floats.items()})
        for name, g in one.items():
            torch.testing.assert_close(found[name][n], g, rtol=1e-4, atol=1e-4)


@BY_NAME
def test_checkpoint(call):
    """What is computed again in the backward pass is the same, dropout included."""
    if call.startswith("decode"):
        pytest.skip("reference: decode has no gradient")
    function, make = CALLS[call]
    tensors = make(9, 12)

    def again(**x):
        return torch.utils.checkpoint.checkpoint(lambda: function(**x), use_reentrant=False)

    for a, b in zip(results(function, tensors, call), results(again, tensors, call)):
        assert torch.equal(a, b)


@BY_NAME
def test_meta_tensors(call):
    function, make = CALLS[call]
    tensors = make(9, 12)
    found = flat(function(**{n: t.to("meta") for n, t in tensors.items()}))
    for a, b in zip(found, flat(function(**tensors))):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


# ---- The table in docs/backends.md -------------------------------------------------------------------


def natively(call: str, backend: Backend) -> bool:
    """Whether the row takes the call, on a machine that has it."""
    seen = []

    def record(op: Op, *args: Any, backend: str = "") -> Any:
        seen.append((op, args))
        return op.fake(*args)

    function, make = CALLS[call]
    # Which op a call of decode ends in depends on who is asked.
    told = fa.using(backend.name) if call.startswith("decode") else contextlib.nullcontext()
    with told, _replaced(record), contextlib.suppress(NotImplementedError):
        function(**make(9, 12))
    called, args = seen[0]
    facts = dict(zip(called.facts, called._facts(*args))) | {"device": backend.device}
    return all(
        limit.holds(facts) for limit in called.by_name[backend.name].limits if of_call(limit)
    )


def test_the_table_says_what_the_descriptors_say():
    page = Path(__file__).parent.parent / "docs" / "backends.md"
    if not page.is_file():
        pytest.skip("the documentation is not beside the tests")
    rows = re.findall(
        r"^\| (?:`\w+`: )?([\w ]+) \| (✓?) ?\| (✓?) ?\|$", page.read_text(), re.MULTILINE
    )
    assert {row[0] for row in rows} >= {*CALLS} - {"dilated", "dropout by a tensor", "merge"}
    for call, *ticks in rows:
        op = OPS["attention_decode" if call.startswith("decode") else "attention"]
        for family, tick in zip(("cpu", "triton"), ticks):
            found = {natively(call, row) for row in op.backends if row.family == family}
            assert found == {bool(tick)}, f"{call} on {family}"
