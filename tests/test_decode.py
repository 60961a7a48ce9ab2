"""Attention over a cache: what is written, what may be read, what a result may depend on.

One file because the same small caches, full of NaN where nothing is cached, are asked all of it.
"""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch

import fastattn as fa
from fastattn.masks import Causal, Full, Window
from fastattn.op import OPS, _replaced
from fastattn.testing import Result, check, poisoned, run

OP = OPS["attention_decode"]
of_decode = pytest.mark.op("attention_decode")
LENGTHS = (600, 0, 41, 1030)
NMAX, D = 1100, 40


def call(backend, dtype=torch.float32, Hq=4, Hk=2, Nq=2, lengths=LENGTHS, Nmax=NMAX):
    """Arguments of a dense call; what no sequence uses is NaN."""
    B = len(lengths)
    q, k, v = (torch.randn(B, h, n, D).to(dtype) for h, n in ((Hq, Nq), (Hk, Nmax), (Hk, Nmax)))
    lengths = torch.tensor(lengths)
    unused = (torch.arange(Nmax) >= lengths[:, None])[:, None, :, None]
    k, v = (t.masked_fill(unused, float("nan")) for t in (k, v))
    given = {"q": q, "k_cache": k, "v_cache": v, "lengths": lengths}
    return {n: t.to(backend.device) for n, t in given.items()}


def paged(given, page_size):
    """The same caches in pages, in no order, among pages of NaN; numbers of pages that are not used are no pages."""
    k, v, lengths = given["k_cache"], given["v_cache"], given["lengths"]
    B, Hk, Nmax, _ = k.shape
    per = -(-Nmax // page_size)
    order = torch.randperm(2 * B * per)[: B * per].view(B, per).int().to(k.device)
    result = dict(given, block_table=order.clone())
    for name, cache in (("k_cache", k), ("v_cache", v)):
        pages = cache.new_full((2 * B * per, page_size, Hk, D), float("nan"))
        whole = torch.nn.functional.pad(
            cache, (0, 0, 0, per * page_size - Nmax), value=float("nan")
        )
        pages[order.long()] = whole.transpose(1, 2).reshape(B, per, page_size, Hk, D)
        result[name] = pages
    first_unused = (lengths[:, None] + page_size - 1) // page_size
    is_unused = torch.arange(per, device=k.device) >= first_unused
    result["block_table"].masked_fill_(is_unused, -1)
    return result


def decode(backend, given, **options):
    with torch.no_grad(), poisoned():
        return fa.attention_decode(**given, **options, return_lse=True, backend=backend.name)


def promises_bits(backend):
    if backend.family == "reference":
        pytest.skip("reference: the order of its sums is torch's")


def same(a, b):
    for x, y in zip(a, b):
        assert torch.equal(x, y), f"differs by {(x.double() - y.double()).abs().max():.3g}"


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- What a result may depend on ------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "window": {"mask": Window(550, 0)},
    "all": {"causal": True, "softcap": 2.0, "sinks": torch.randn(4), "bias": SimpleNamespace(slopes=torch.rand(4))},
}  # fmt: skip
EVERY_OPTION = pytest.mark.parametrize("what", OPTIONS)


def options(what, backend):
    given = dict(OPTIONS[what])
    if "sinks" in given:
        given["sinks"] = given["sinks"].to(backend.device)
    return given


@of_decode
@EVERY_OPTION
def test_a_sequence_is_alone(backend, dtype, what):
    """Whatever the batch around it, its slot and the room in the cache: the same bits."""
    promises_bits(backend)
    given = call(backend, dtype)
    o, lse = decode(backend, given, **options(what, backend))
    for b, length in enumerate(LENGTHS):
        one = {n: t[b : b + 1] for n, t in given.items()}
        same(decode(backend, one, **options(what, backend)), (o[b : b + 1], lse[b : b + 1]))
        for name in ("k_cache", "v_cache"):
            one[name] = one[name][:, :, : max(length, 1)]
        same(decode(backend, one, **options(what, backend)), (o[b : b + 1], lse[b : b + 1]))
    order = [3, 1, 0, 2]
    again = decode(backend, {n: t[order] for n, t in given.items()}, **options(what, backend))
    same(again, (o[order], lse[order]))


@of_decode
@EVERY_OPTION
@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_pages_do_not_matter(backend, dtype, page_size, what):
    promises_bits(backend)
    given = call(backend, dtype)
    expected = decode(backend, given, **options(what, backend))
    same(expected, decode(backend, paged(given, page_size), **options(what, backend)))


@of_decode
def test_threads_do_not_matter(backend, dtype):
    if backend.family != "cpu":
        pytest.skip(f"{backend.name}: has no threads of torch's")
    given = call(backend, dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(decode(backend, given))
    same(results[0], results[1])
    same(results[0], results[2])


@of_decode
def test_what_lies_behind_a_sequence_is_not_read(backend, dtype):
    """NaN there, and any numbers there, give the same bits."""
    promises_bits(backend)
    given = call(backend, dtype)
    filled = {n: t.nan_to_num(7.0) if t.is_floating_point() else t for n, t in given.items()}
    results = decode(backend, given), decode(backend, filled)
    same(*results)
    assert all(torch.isfinite(o).all() for o, _ in results)


@of_decode
def test_integers_of_either_width(backend):
    given = paged(call(backend), 16)
    narrow = {n: t.int() if n == "lengths" else t for n, t in given.items()}
    wide = {n: t.long() if n == "block_table" else t for n, t in given.items()}
    strided = dict(given, lengths=given["lengths"].repeat_interleave(3)[::3],
                   block_table=given["block_table"].T.contiguous().T)  # fmt: skip
    for other in (narrow, wide, strided):
        same(decode(backend, given), decode(backend, other))


def within_budget(given, got):
    double = {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in given.items()
    }
    exact, plain = (run(OP, c, "reference").outputs for c in (double, given))
    check(Result(dict(zip(exact, got)), {}), Result(exact, {}), Result(plain, {}), OP.budget)


@of_decode
@pytest.mark.parametrize("num_splits", [1, 2, 9, 4000])
def test_splits_change_nothing_but_rounding(backend, num_splits):
    given = call(backend, lengths=(1000, 3))
    within_budget(given, decode(backend, given, num_splits=num_splits))


@of_decode
@pytest.mark.parametrize(
    "mask", [None, Causal(), Window(30, 0), Window(4, 2) & Causal("top-left")], ids=str
)
def test_it_is_attention_over_the_tokens_that_are_there(backend, mask):
    given = call(backend, Nq=3)
    o, lse = decode(backend, given, mask=mask)
    for b, n in enumerate(LENGTHS):
        k, v = (given[name][b : b + 1, :, :n] for name in ("k_cache", "v_cache"))
        o2, lse2 = fa.attention(given["q"][b : b + 1], k, v, mask=mask, return_lse=True)
        assert torch.allclose(o[b : b + 1], o2, atol=1e-5)
        assert torch.allclose(lse[b : b + 1], lse2, atol=1e-5)


@of_decode
def test_rows_that_see_nothing(backend, dtype):
    given = call(backend, dtype, lengths=(0, 0))
    o, lse = decode(backend, given)
    assert not o.any()
    assert (lse == float("-inf")).all()
    sinks = torch.tensor([0.5, -1.0, float("-inf"), 3.0]).to(given["q"])
    o, lse = decode(backend, given, sinks=sinks)
    assert not o.any()
    assert torch.allclose(lse, sinks.float()[None, :, None].expand_as(lse))


# ---- New tokens -----------------------------------------------------------------------------------------


@of_decode
@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("Nnew", [1, 3, 40])
def test_new_tokens_are_written_behind_the_others_and_nowhere_else(backend, dtype, page_size, Nnew):
    given = call(backend, dtype)
    dense = {n: given[n].clone() for n in ("k_cache", "v_cache")}
    new = {n: torch.randn(len(LENGTHS), 2, Nnew, D).to(given["q"]) for n in ("k_new", "v_new")}
    for b, n in enumerate(LENGTHS):
        dense["k_cache"][b, :, n : n + Nnew] = new["k_new"][b]
        dense["v_cache"][b, :, n : n + Nnew] = new["v_new"][b]
    after = dict(given, **dense, lengths=given["lengths"] + Nnew)
    expected = decode(backend, after, causal=True)
    if page_size:
        # pages with room for the new tokens: a table for what is there afterwards
        after = paged(after, page_size)
        given = dict(after, lengths=given["lengths"])
        for name in ("k_cache", "v_cache"):
            at = given["lengths"][:, None] + torch.arange(Nnew, device=given["q"].device)
            pages = after["block_table"].gather(1, at // page_size).long()
            given[name] = after[name].clone()
            given[name][pages, at % page_size] = float("nan")
    same(decode(backend, given, **new), expected)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name].nan_to_num(123.0), after.get(name).nan_to_num(123.0))


@of_decode
def test_new_tokens_see_one_another_causally(backend):
    given = call(backend, Nq=3, lengths=(5, 70))
    new = {n: torch.randn(2, 2, 3, D).to(given["q"]) for n in ("k_new", "v_new")}
    whole = decode(backend, given, **new)
    for i in range(3):  # one after another
        step = dict(given, q=given["q"][:, :, i : i + 1], lengths=given["lengths"] + i)
        o, lse = decode(backend, step, **{n: t[:, :, i : i + 1] for n, t in new.items()})
        assert torch.allclose(o, whole[0][:, :, i : i + 1], atol=1e-6)
        assert torch.allclose(lse, whole[1][:, :, i : i + 1], atol=1e-6)


def test_a_view_of_a_larger_cache_is_written(best_cpu):
    backend = SimpleNamespace(name=best_cpu, device="cpu")
    given = call(backend, lengths=(3, 8), Nmax=20)
    room = torch.full((4, 5, 30, D + 3), float("nan"))
    for name in ("k_cache", "v_cache"):
        view = room.clone()[1:3, 2:4, 4:24, 1 : D + 1]
        given[name] = view.copy_(given[name])
    k, v = torch.randn(2, 2, 2, 1, D)
    decode(backend, given, k_new=k, v_new=v)
    for b, n in enumerate((3, 8)):
        assert torch.equal(given["k_cache"][b, :, n : n + 1], k[b])
        assert (
            given["v_cache"]._base.isnan().sum()
            == given["v_cache"]._base.numel() - (3 + 8 + 2) * 2 * D
        )


def test_a_graph_that_saved_the_cache_notices(best_cpu):
    given = call(SimpleNamespace(device="cpu"), lengths=(3,), Nmax=9)
    cache = given["k_cache"]
    x = torch.randn_like(cache).requires_grad_()
    y = (x * cache).sum()
    with torch.no_grad():
        new = torch.zeros(1, 2, 1, D)
        fa.attention_decode(**given, k_new=new, v_new=new, backend=best_cpu)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 4])
def test_opcheck_of_appending(best_cpu, page_size):
    given = call(SimpleNamespace(device="cpu"), lengths=(3, 8), Nmax=20)
    given = {n: t.nan_to_num(1.0) if t.is_floating_point() else t for n, t in given.items()}
    if page_size:
        given = paged(given, page_size)
        given["block_table"] = torch.arange(10).view(2, 5)
        given |= {n: given[n].nan_to_num(1.0) for n in ("k_cache", "v_cache")}
    k, v = torch.randn(2, 2, 2, 3, D)
    args = (given["k_cache"], given["v_cache"], k, v, given["lengths"], given.get("block_table"))
    torch.library.opcheck(
        torch.ops.fastattn.attention_decode_append.default, args, {"backend": best_cpu}
    )


@pytest.mark.parametrize("page_size", [None, 16])
def test_compiled_once_for_all_lengths(best_cpu, page_size):
    """A loop that decodes token after token compiles once, and writes the same cache."""
    torch._dynamo.reset()
    given = call(SimpleNamespace(device="cpu"), Nq=1, lengths=(3, 40), Nmax=64)
    if page_size:
        given = paged(given, page_size)
        given["block_table"] = torch.randperm(16)[:8].view(2, 4).int()
        for name in ("k_cache", "v_cache"):
            given[name].nan_to_num_(0.5)
    other = {n: t.clone() for n, t in given.items()}

    def step(q, k_cache, v_cache, lengths, k, v, block_table=None):
        o = fa.attention_decode(
            q * 2, k_cache, v_cache, lengths, k_new=k, v_new=v, block_table=block_table,
            mask=Window(20, 0), softcap=3.0, backend=best_cpu,
        )  # fmt: skip
        return o + k_cache[0, 0, 0, 0], lengths + 1

    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(5):
            q, new = torch.randn(2, 4, 1, D), torch.randn(2, 2, 2, 1, D)
            results = []
            for f, state in ((step, given), (compiled, other)):
                o, state["lengths"] = f(**state | {"q": q}, k=new[0], v=new[1])
                results.append(o)
            same(*[(o,) for o in results])
            for name in ("k_cache", "v_cache"):
                assert torch.equal(given[name].nan_to_num(9.0), other[name].nan_to_num(9.0))
    torch._dynamo.reset()


def test_autocast_leaves_the_cache_alone(best_cpu):
    given = call(SimpleNamespace(device="cpu"), torch.bfloat16, lengths=(30, 7))
    wide = dict(given, q=given["q"].float())
    new = torch.randn(2, 2, 1, D)
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        o = fa.attention_decode(**wide, k_new=new, v_new=new, backend=best_cpu)
    assert o.dtype == torch.bfloat16
    assert torch.equal(given["k_cache"][0, :, 30:31], new[0].bfloat16())


def test_inference_tensors(best_cpu):
    with torch.inference_mode():
        given = call(SimpleNamespace(device="cpu"), lengths=(30, 7))
        new = torch.randn(2, 2, 1, D)
        fa.attention_decode(**given, k_new=new, v_new=new, backend=best_cpu)
    assert torch.equal(given["v_cache"][1, :, 7:8], new[1])


# ---- Refusals -------------------------------------------------------------------------------------------


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def n(*values):
    return torch.tensor(values)


Q, K, V, L = t(2, 4, 1, 8), t(2, 2, 9, 8), t(2, 2, 9, 6), n(4, 9)
POOL, TABLE = t(5, 3, 2, 8), torch.tensor([[0, 4], [1, 2]], dtype=torch.int32)
NEW = {"k_new": t(2, 2, 1, 8), "v_new": t(2, 2, 1, 6)}
REFUSED = {
    "D": ((Q, t(2, 2, 9, 7), V, L), {}, """D is 8 in q but 7 in k_cache
  q:       B Hq Nq D     = [2, 4, 1, 8]
  k_cache: B Hk Nmax D   = [2, 2, 9, 7]
  v_cache: B Hk Nmax Dv  = [2, 2, 9, 6]"""),
    "rank": ((Q[0], K, V, L), {}, "q has 3 axes, [4, 1, 8]; it takes 4, [B, Hq, Nq, D]"),
    "pages": ((Q, POOL, t(4, 3, 2, 6), n(0, 0)), {"block_table": TABLE}, """pages is 5 in k_cache but 4 in v_cache
  q:       B Hq Nq D              = [2, 4, 1, 8]
  k_cache: pages page_size Hk D   = [5, 3, 2, 8]
  v_cache: pages page_size Hk Dv  = [4, 3, 2, 6]"""),
    "groups": ((t(2, 3, 1, 8), K, V, L), {}, "Hq is 3 and Hk is 2; Hq must be a multiple of Hk"),
    "dtype": ((Q.half(), K, V, L), {}, "q is float16 on cpu, k_cache is float32 on cpu, v_cache is float32 on cpu; "
              "they must share one dtype and one device"),
    "one of two": ((Q, K, V, L), {"k_new": t(2, 2, 1, 8)}, "k_new and v_new come together; one of them is None"),
    "new D": ((Q, K, V, L), {"k_new": t(2, 2, 1, 6), "v_new": t(2, 2, 1, 6)}, """D is 8 in q but 6 in k_new
  q:       B Hq Nq D     = [2, 4, 1, 8]
  k_cache: B Hk Nmax D   = [2, 2, 9, 8]
  v_cache: B Hk Nmax Dv  = [2, 2, 9, 6]
  k_new:   B Hk Nnew D   = [2, 2, 1, 6]
  v_new:   B Hk Nnew Dv  = [2, 2, 1, 6]"""),
    "lengths": ((Q, K, V, [4, 9]), {}, "lengths is list; with q float32[2, 4, 1, 8] on cpu it takes [2] of int32 or int64"),
    "lengths dtype": ((Q, K, V, t(2)), {},
                      "lengths is float32[2] on cpu; with q float32[2, 4, 1, 8] on cpu it takes [2] of int32 or int64"),
    "lengths shape": ((Q, K, V, n(4)), {},
                      "lengths is int64[1] on cpu; with q float32[2, 4, 1, 8] on cpu it takes [2] of int32 or int64"),
    "table": ((Q, POOL, t(5, 3, 2, 6), L), {"block_table": TABLE[:1]},
              "block_table is int32[1, 2] on cpu; with q float32[2, 4, 1, 8] on cpu it takes "
              "[2, pages of a sequence] of int32 or int64"),
    "sinks": ((Q, K, V, L), {"sinks": t(2)}, "sinks is float32[2] on cpu; it takes a float tensor [Hq] = [4]"),
    "bias": ((Q, K, V, L), {"bias": 3},
             "bias is int; it takes a float tensor, Toeplitz or Relative, ALiBi, KeyBias, or a list of them"),
    "slopes": ((Q, K, V, L), {"bias": SimpleNamespace(slopes=t(3))},
               "bias.slopes is float32[3] on cpu; with q float32[2, 4, 1, 8] on cpu it takes [4] of float32"),
    "softcap": ((Q, K, V, L), {"softcap": 0.0}, "softcap is 0.0; it takes a number > 0, or None"),
    "softcap word": ((Q, K, V, L), {"softcap": "x"}, "softcap is 'x'; it takes a number"),
    "scale": ((Q, K, V, L), {"scale": t(1)}, "scale is Tensor; it takes a number"),
    "causal": ((Q, K, V, L), {"causal": 1}, "causal is 1; it takes True or False"),
    "mask": ((Q, K, V, L), {"mask": torch.ones(1, 8, dtype=torch.bool)},
             "mask is [1, 8]; it must broadcast to [B, Hq, Nq, Nk] = [2, 4, 1, 9]"),
    "clip": ((Q, K, V, L), {"clip": 0.1}, "clip is 0.1; it takes (gamma, zeta)"),
    "head_map": ((Q, K, V, L), {"head_map": n(0, 1)}, "head_map is [2]; it takes integers [Hq] = [4]"),
    "dropout": ((Q, K, V, L), {"dropout": 1.0}, "dropout is 1.0; it takes 0 <= dropout < 1"),
    "mask word": ((Q, K, V, L), {"mask": "causal"},
                  "mask is str; it takes a value of fastattn.masks, a bool tensor or None"),
    "weight": ((Q, K, V, L), {"weight": [t(1, 9)]}, "weight is list; it takes a float tensor, Toeplitz or Relative"),
    "splits": ((Q, K, V, L), {"num_splits": 0}, "num_splits is 0; it takes None or an integer >= 1"),
    "gradient": ((Q.clone().requires_grad_(), K, V, L), {}, "q requires grad, and this function is for inference: call it under "
                 "torch.no_grad(), or fastattn.attention, which has gradients"),
    "gradient of new": ((Q, K, V, n(4, 8)), NEW | {"v_new": t(2, 2, 1, 6).requires_grad_()},
                        "v_new requires grad, and this function is for inference: call it under "
                        "torch.no_grad(), or fastattn.attention, which has gradients"),
    "last axis": ((Q, K.mT.contiguous().mT, V, n(4, 8)), NEW,
                  "k_cache has stride 9 on its last axis; with k_new it must be 1"),
    "shared rows": ((Q, K[:1].expand_as(K), V, n(4, 8)), NEW,
                    "k_cache has strides [0, 72, 8, 1] for [2, 2, 9, 8]: several tokens in one place, where k_new "
                    "cannot be written"),
    "too long": ((t(1, 2, 1, 4), *[t(1, 1, 1, 4).expand(1, 1, 1 << 40, 4)] * 2, n(3)), {},
                 "Nq is 1 and the cache holds 1099511627776; sequences have at most 1073741824 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("named", [None, "reference"], ids=str)
def test_refusals(what, named):
    args, given, text = REFUSED[what]
    with pytest.raises(ValueError, match=f"^{re.escape('attention_decode: ' + text)}$"):
        fa.attention_decode(*args, **given, backend=named)


OUTSIDE = {
    "negative": ((Q, K, V, n(-1, 3)), {}, r"lengths\[0\] is -1; with 0 appended, a cache of 9 takes 0 to 9"),
    "too long": ((Q, K, V, n(3, 10)), {}, r"lengths\[1\] is 10; with 0 appended, a cache of 9 takes 0 to 9"),
    "no room": ((Q, K, V, n(3, 9)), NEW, r"lengths\[1\] is 9; with 1 appended, a cache of 9 takes 0 to 8"),
    "page": ((Q, POOL, POOL, n(6, 4)), {"block_table": torch.tensor([[0, 5], [1, 2]])},
             r"block_table\[0, 1\] is 5; it takes 0 to 4"),
    "negative page": ((Q, POOL, POOL, n(6, 4)), {"block_table": torch.tensor([[0, 4], [1, -2]])},
                      r"block_table\[1, 1\] is -2; it takes 0 to 4"),
    "long pages": ((Q, POOL, POOL, n(6, 7)), {"block_table": TABLE},
                   r"lengths\[1\] is 7; with 0 appended, a cache of 6 takes 0 to 6"),
}  # fmt: skip


@pytest.mark.parametrize("what", OUTSIDE)
@pytest.mark.parametrize("named", ["cpu", "reference"])
def test_lengths_and_pages_outside_are_refused_before_anything_is_written(what, named):
    args, given, text = OUTSIDE[what]
    new = {name: x + 5 for name, x in given.items() if name.endswith("new")}
    with pytest.raises(ValueError, match=f"^attention_decode\\w*: {text}$"):
        fa.attention_decode(*args, **given | new, backend=named)
    assert not any(cache.any() for cache in args[1:3])


@of_decode
def test_a_gpu_stays_inside_without_looking(backend):
    """Nobody waits for its lengths: those outside are cut to what the cache holds, and what has no room is not written."""
    if backend.family != "triton":
        pytest.skip(f"{backend.name}: refuses on the CPU")
    given = call(backend, lengths=(60, 70, 64), Nmax=80)
    for name in ("k_cache", "v_cache"):
        given[name].nan_to_num_(1.0)
    inside = torch.tensor([80, 80, 0]).to(given["lengths"])
    beyond = torch.tensor([1 << 40, 81, -5]).to(given["lengths"])
    expected = decode(backend, dict(given, lengths=inside))
    same(decode(backend, dict(given, lengths=beyond)), expected)
    pages = paged(dict(given, lengths=inside), 16)
    wild = pages["block_table"].long()
    wild[2] = torch.tensor([1 << 40, -3, 7, 8, 9])
    same(decode(backend, dict(pages, lengths=beyond, block_table=wild)), decode(backend, pages))
    before = {n: given[n].clone() for n in ("k_cache", "v_cache")}
    new = torch.zeros(3, 2, 2, D).to(given["q"])
    outside = torch.tensor([79, 1 << 40, -1]).to(given["lengths"])
    decode(backend, dict(given, lengths=outside), k_new=new, v_new=new)
    assert all(torch.equal(given[n], t) for n, t in before.items())


def test_pages_that_are_not_used_may_be_any_number(best_cpu):
    table = torch.tensor([[0, 1 << 40], [2, -9]])
    fa.attention_decode(Q, POOL, POOL, n(3, 1), block_table=table, backend=best_cpu)
    fa.attention_decode(Q, POOL, POOL, n(0, 0), block_table=table - 3, backend=best_cpu)


@of_decode
@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 1, 4, 4, 4), (1, 0, 0, 1, 4, 4, 4), (1, 2, 2, 0, 4, 4, 4), (1, 2, 2, 1, 0, 4, 4),
              (1, 2, 1, 1, 4, 0, 4), (1, 2, 1, 1, 4, 4, 0), (1, 0, 1, 1, 4, 4, 4)],
    ids=lambda s: "B{} Hq{} Hk{} Nq{} Nmax{} D{} Dv{}".format(*s),
)  # fmt: skip
@pytest.mark.parametrize("page_size", [None, 2, 0])
def test_nothing_is_a_size(backend, shape, page_size):
    B, Hq, Hk, Nq, Nmax, D, Dv = shape
    q = torch.randn(B, Hq, Nq, D).to(backend.device)
    room = (B, Hk, Nmax) if page_size is None else (2 * B, page_size, Hk)
    given = {
        "q": q,
        "k_cache": torch.randn(*room, D).to(q),
        "v_cache": torch.randn(*room, Dv).to(q),
    }
    tokens = 0 if page_size == 0 else Nmax
    given["lengths"] = torch.full((B,), tokens, device=q.device)
    if page_size is not None:
        given["block_table"] = torch.arange(2 * B, device=q.device).view(B, 2)[:, : Nmax // 2]
    o, lse = decode(backend, given)
    assert o.shape == (B, Hq, Nq, Dv)
    assert lse.shape == (B, Hq, Nq)
    assert torch.isfinite(o).all()


@of_decode
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38], ids=str)
@pytest.mark.parametrize("where", ["q", "k_cache", "v_cache"])
def test_bad_numbers_stay_in_their_sequence_and_head(backend, where, bad):
    given = call(backend, lengths=(90, 70), Nmax=90)
    o, _ = decode(backend, given)
    given[where][1, 1, 0, 3] = bad
    o2, _ = decode(backend, given)
    heads = [0, 2, 3] if where == "q" else [0, 1]
    assert torch.equal(o[0], o2[0])
    assert torch.equal(o[1, heads], o2[1, heads])
    if bad != bad:
        assert o2[1].isnan().any(), "a NaN in a visible place was swallowed"


def test_kernels_check_shapes_because_torch_ops_does_not(best_cpu):
    def run(q=Q, k=K, v=V, lengths=L, table=None, sinks=None, mask=None, splits=0):
        torch.ops.fastattn.attention_decode_fwd(
            q, k, v, lengths, table, sinks, *[None] * 9, 0, mask or Full().encode(), 1.0, 0.0, splits, backend=best_cpu
        )  # fmt: skip

    for given, says in (
        ({"k": K[:1]}, "k_cache is .*; axis 0 must be 2"),
        ({"v": V[:, :, :3]}, "v_cache is .*; axis 2 must be 9"),
        ({"lengths": n(1)}, r"lengths is int64\[1\]; it takes \[2\]"),
        ({"lengths": t(2)}, "it takes int32 or int64"),
        ({"table": TABLE, "k": POOL, "v": POOL[:, :2]}, "v_cache is .*; axis 1 must be 3"),
        ({"table": TABLE[:1], "k": POOL, "v": POOL}, "it takes 2 rows"),
        ({"sinks": t(3)}, "sinks is .*; axis 0 must be 4"),
        ({"mask": [0, 2]}, "mask has 2 numbers"),
        ({"splits": -1}, "num_splits is -1"),
    ):
        with pytest.raises(ValueError, match=says):
            run(**given)
    new = (t(2, 2, 1, 8), t(2, 2, 2, 6))
    with pytest.raises(ValueError, match="they differ before the last axis"):
        torch.ops.fastattn.attention_decode_append(K, V, *new, L, None, backend=best_cpu)


@pytest.mark.parametrize("what", ["bias", "weight"])
@pytest.mark.parametrize("shape", [(2, 4, 1, 5), (1, 4, 1, 7)])
def test_sizes_are_refused_before_anything_is_written(what, shape):
    k, v = torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 6)
    new = {"k_new": t(2, 2, 1, 8), "v_new": t(2, 2, 1, 6)}
    with pytest.raises(
        ValueError,
        match=rf"{what} is for \[1, {shape[3]}\]; it takes \[Nq, Nk\] = \[1, 8 or more\]",
    ):
        fa.attention_decode(Q, k, v, n(3, 7), **new, **{what: torch.randn(shape)})
    assert not k.any()


def test_a_second_bias_that_requires_grad_is_refused():
    table = torch.randn(4, 23, requires_grad=True)
    with pytest.raises(ValueError, match="bias requires grad"):
        fa.attention_decode(Q, K, V, L, bias=[t(2, 4, 1, 9), fa.bias.Toeplitz(table)])


def test_triton_refuses_by_itself_what_its_kernel_does_not_read():
    """``attention_decode`` sends such calls elsewhere; torch.ops, and code compiled before, do not."""
    op, seen = OPS["attention_decode"], []
    with _replaced(lambda op, *args, backend="": (seen.append(args), op.fake(*args))[1]):
        fa.attention_decode(Q, K, V, L, bias=t(2, 4, 1, 9))
    with pytest.raises(fa.Unsupported, match=r"pairs is True \(takes False\)"):
        op.call(*seen[0], backend="triton")
