"""Identities that hold whatever the numbers: what tolerances miss, these catch.

Equality is bit for bit where one number must not depend on another's neighbours; else it is the contract's budget.

One file because both ops are asked the same questions in the same words.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

import fastattn as fa
from fastattn.masks import Causal, Full, Window
from fastattn.op import OPS
from fastattn.testing import Result, check, run

NQ, NK, D = 37, 70, 40  # no multiples of a tile, and more than one


def qkv(backend, Hq=2, Hk=2, Nq=NQ, Nk=NK, B=2, dtype=torch.float32):
    return [
        torch.randn(shape).to(dtype).to(backend.device)
        for shape in ((B, Hq, Nq, D), (B, Hk, Nk, D), (B, Hk, Nk, D + 8))
    ]


def attention(backend, q, k, v, **options):
    """o, lse, dq, dk, dv of one call, with upstream gradients that depend on the position alone."""
    result = run(OPS["attention"], {"q": q, "k": k, "v": v, **options}, backend.name)
    return *result.outputs.values(), *result.gradients.values()


def same(*pairs):
    for n, (a, b) in enumerate(pairs):
        assert torch.equal(a, b), f"pair {n} differs by {(a.double() - b.double()).abs().max():.3g}"


def within_budget(op, call, got):
    """The outputs ``got`` err no more than the reference in the same dtype, against the reference in float64."""
    double = {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in call.items()
    }
    exact, plain = (run(OPS[op], c, "reference").outputs for c in (double, call))
    names = list(exact)[: len(got)]
    results = [
        Result({n: outputs[n] for n in names}, {})
        for outputs in (dict(zip(names, got)), exact, plain)
    ]
    check(*results, OPS[op].budget)


def near(a, b, roundings=16):
    """``a`` is ``b`` but for a handful of roundings of the largest value."""
    a, b = a.detach(), b.detach()
    largest = max(float(b.abs().max()), 1.0)
    error = float((a.double() - b.double()).abs().max())
    assert error <= roundings * torch.finfo(a.dtype).eps * largest, (
        f"{error:.3g} at values up to {largest:.3g}"
    )


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


pytestmark = pytest.mark.usefixtures("poisoned")

# ---- attention: what a result may depend on -----------------------------------------------------------

of_attention = pytest.mark.op("attention")


@of_attention
def test_a_batch_element_is_alone(backend, dtype):
    """Whatever the batch around it, its slot, and the number of heads: the same bits, gradients too."""
    q, k, v = qkv(backend, B=1, Hq=1, Hk=1, dtype=dtype)
    others = qkv(backend, B=3, Hq=3, Hk=3, dtype=dtype)
    do = torch.randn(1, 1, NQ, D + 8).to(q)

    def gradients(*tensors, at=None):
        tensors = [t.clone().requires_grad_() for t in tensors]
        o, lse = fa.attention(*tensors, causal=True, return_lse=True, backend=backend.name)
        upstream = torch.zeros_like(o)
        upstream[at] = do[0, 0]
        return [t[at].detach() for t in (o, lse, *torch.autograd.grad(o, tensors, upstream))]

    alone = gradients(q, k, v, at=(0, 0))
    for slot in ((0, 0), (1, 2), (2, 1)):
        full = [t.clone() for t in others]
        for t, one in zip(full, (q, k, v)):
            t[slot] = one[0, 0]
        same(*zip(alone, gradients(*full, at=slot)))


@of_attention
def test_permuted_heads_permute_the_result(backend):
    q, k, v = qkv(backend, Hq=4, Hk=4)
    order = torch.tensor([2, 0, 3, 1])
    options = {"causal": True, "backend": backend.name, "return_lse": True}
    (o, lse), (o2, lse2) = (
        fa.attention(*t, **options) for t in ((q, k, v), (q[:, order], k[:, order], v[:, order]))
    )
    same((o[:, order], o2), (lse[:, order], lse2))


@of_attention
def test_permuted_queries_permute_the_result(backend):
    """Without a mask a query does not know its place, nor who shares its tile."""
    q, k, v = qkv(backend)
    order = torch.randperm(NQ)
    options = {"return_lse": True, "backend": backend.name}
    (o, lse), (o2, lse2) = (
        fa.attention(q, k, v, **options),
        fa.attention(q[:, :, order], k, v, **options),
    )
    same((o[:, :, order], o2), (lse[:, :, order], lse2))


@of_attention
def test_permuted_keys_change_nothing_but_rounding(backend):
    q, k, v = qkv(backend)
    order = torch.randperm(NK)
    got = fa.attention(q, k[:, :, order], v[:, :, order], return_lse=True, backend=backend.name)
    within_budget("attention", {"q": q, "k": k, "v": v}, got)


@of_attention
def test_the_future_does_not_matter(backend, dtype):
    """Keys a causal row cannot see may hold anything finite; its bits stay."""
    q, k, v = qkv(backend, Nq=NK, dtype=dtype)
    o, lse = fa.attention(q, k, v, causal=True, return_lse=True, backend=backend.name)
    for cut in (1, 31, 64):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, cut:], v2[:, :, cut:] = 100.0, -1e4
        o2, lse2 = fa.attention(q, k2, v2, causal=True, return_lse=True, backend=backend.name)
        same((o[:, :, :cut], o2[:, :, :cut]), (lse[:, :, :cut], lse2[:, :, :cut]))


@of_attention
def test_hidden_keys_are_padding(backend):
    """Keys that a mask hides from every query could as well not be there, whatever they hold."""
    q, k, v = qkv(backend, Nk=NQ)
    ones, tens = (
        attention(
            backend,
            q,
            *(torch.cat([t, torch.full_like(t, value)], 2) for t in (k, v)),
            mask=Causal("top-left"),
        )
        for value in (1.0, 10.0)
    )
    same(*zip(ones, tens))
    within_budget("attention", {"q": q, "k": k, "v": v, "mask": Causal("top-left")}, ones[:2])
    for gradient in ones[3:]:
        assert not gradient[:, :, NQ:].any()


@of_attention
def test_threads_do_not_matter(backend, dtype):
    if backend.family != "cpu":
        pytest.skip(f"{backend.name}: has no threads of torch's")
    call = qkv(backend, Hq=3, Hk=1, Nq=150, Nk=190, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(attention(backend, *call, mask=Causal()))
    for other in results[1:]:
        same(*zip(results[0], other))


@of_attention
def test_run_twice(backend, dtype):
    if not backend.deterministic:
        pytest.skip(f"{backend.name}: does not promise it")
    call = qkv(backend, Hq=4, Hk=2, Nq=130, Nk=150, dtype=dtype)
    same(
        *zip(
            attention(backend, *call, mask=Window(60, 10)),
            attention(backend, *call, mask=Window(60, 10)),
        )
    )


@of_attention
def test_memory_layout_does_not_matter(backend):
    q, k, v = qkv(backend)
    laid = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    same(*zip(attention(backend, q, k, v, mask=Causal()), attention(backend, *laid, mask=Causal())))


# ---- attention: masks, heads, scale -------------------------------------------------------------------


@of_attention
@pytest.mark.parametrize(
    ("mask", "other"),
    [
        (Window(None, 0), Causal()),
        (Window(NK + NQ, 0), Causal()),
        (Window(NK, NK), Full()),
        (Causal() & Full(), Causal()),
        (Causal("top-left") & Causal("top-left"), Causal("top-left")),
    ],
    ids=str,
)
def test_masks_that_allow_the_same_give_the_same(backend, mask, other):
    for lengths in ({}, {"Nq": NK, "Nk": NQ}):
        call = qkv(backend, **lengths)
        same(*zip(attention(backend, *call, mask=mask), attention(backend, *call, mask=other)))


@of_attention
def test_causal_is_short_for_a_mask(backend):
    q, k, v = qkv(backend)
    pairs = [({"causal": True}, {"mask": Causal()}),
             ({"causal": True, "mask": Window(9, 9)}, {"mask": Causal() & Window(9, 9)})]  # fmt: skip
    for a, b in pairs:
        same([fa.attention(q, k, v, backend=backend.name, **options) for options in (a, b)])


@of_attention
def test_a_query_that_sees_one_key_copies_its_value(backend, dtype):
    q, k, v = qkv(backend, Nk=NQ, dtype=dtype)
    o, lse = fa.attention(q, k, v, mask=Window(0, 0), return_lse=True, backend=backend.name)
    same((o, v))
    within_budget("attention", {"q": q, "k": k, "v": v, "mask": Window(0, 0)}, (o, lse))


@of_attention
def test_equal_keys_average_the_values(backend):
    q, k, v = qkv(backend)
    o, lse = fa.attention(q, torch.zeros_like(k), v, return_lse=True, backend=backend.name)
    within_budget("attention", {"q": q, "k": torch.zeros_like(k), "v": v}, (o, lse))
    near(lse, torch.full_like(lse, NK).log())


@of_attention
def test_values_of_one_give_one(backend, dtype):
    q, k, v = qkv(backend, dtype=dtype)
    o = fa.attention(q, k, torch.ones_like(v), causal=True, backend=backend.name)
    near(o, torch.ones_like(o), roundings=4)


@of_attention
def test_rows_that_see_nothing(backend, dtype):
    """o = 0, lse = -inf and zero gradients, beside rows that see something; never NaN."""
    q, k, v = qkv(backend, Nq=NK, Nk=NQ, dtype=dtype)
    blind = NK - NQ
    o, lse, dq, dk, dv = attention(backend, q, k, v, mask=Causal())
    assert not o[:, :, :blind].any()
    assert torch.isinf(lse[:, :, :blind]).all()
    assert not dq[:, :, :blind].any()
    assert all(torch.isfinite(t).all() for t in (o, lse[:, :, blind:], dq, dk, dv))


@of_attention
def test_grouped_heads_are_repeated_heads(backend):
    q, k, v = qkv(backend, Hq=6, Hk=2)
    o, lse, dq, dk, dv = attention(backend, q, k, v, mask=Causal())
    repeated = [t.repeat_interleave(3, 1) for t in (k, v)]
    o2, lse2, dq2, dk2, dv2 = attention(backend, q, *repeated, mask=Causal())
    same((o, o2), (lse, lse2), (dq, dq2))
    for grouped, parts in ((dk, dk2), (dv, dv2)):
        total = parts.unflatten(1, (2, 3)).double().sum(2)
        near(grouped, total)


@of_attention
def test_powers_of_two_move_between_q_and_scale(backend):
    q, k, v = qkv(backend)
    options = {"causal": True, "return_lse": True, "backend": backend.name}
    a, b = (
        fa.attention(q, k, v, scale=0.25, **options),
        fa.attention(q * 4, k, v, scale=0.0625, **options),
    )
    same(*zip(a, b))


@of_attention
def test_output_is_linear_in_powers_of_two_of_v(backend):
    q, k, v = qkv(backend)
    a, b = (fa.attention(q, k, s * v, backend=backend.name) for s in (1, 8))
    same((8 * a, b))


@of_attention
def test_a_vector_added_to_all_keys_shifts_lse_alone(backend):
    q, k, v = qkv(backend)
    shift = torch.randn(D).to(q)
    o, lse = fa.attention(q, k + shift, v, return_lse=True, backend=backend.name)
    within_budget("attention", {"q": q, "k": k + shift, "v": v}, (o, lse))
    o2, lse2 = fa.attention(q, k, v, return_lse=True, backend=backend.name)
    near(o, o2)
    near(lse, lse2 + D**-0.5 * (q @ shift))


@of_attention
def test_large_logits_choose_the_largest(backend, dtype):
    """Logits of thousands: one key takes all; nothing overflows."""
    q = torch.ones(1, 1, 5, D).to(dtype).to(backend.device)
    k = torch.linspace(-60, 60, 70).round()[:, None].expand(70, D)[None, None].to(q)
    v = torch.arange(70.0)[:, None].expand(70, 8)[None, None].to(q)
    o, lse = fa.attention(q, k, v, scale=4.0, return_lse=True, backend=backend.name)
    same((o, v[:, :, -1:].expand_as(o)))
    assert torch.isfinite(lse).all()
    o, lse = fa.attention(q, k - 100, v, scale=4.0, return_lse=True, backend=backend.name)
    assert torch.isfinite(o).all()
    assert torch.isfinite(lse).all()


# ---- attention: lse -----------------------------------------------------------------------------------


@of_attention
@pytest.mark.parametrize("cuts", [(35,), (1, 69), (16, 32, 48), (7, 8, 70)], ids=str)
def test_keys_can_be_split_and_merged(backend, cuts):
    """Attention over parts of the keys, weighted by exp(lse - total), is attention over all of them."""
    q, k, v = qkv(backend)
    bounds = [0, *cuts, NK]
    parts = [
        fa.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, backend=backend.name)
        for a, b in itertools.pairwise(bounds)
        if b > a
    ]
    lses = torch.stack([lse.double() for _, lse in parts])
    lse = lses.logsumexp(0)
    o = sum(
        (part_lse - lse).exp()[..., None] * part.double()
        for (part, _), part_lse in zip(parts, lses)
    )
    within_budget("attention", {"q": q, "k": k, "v": v}, (o.float(), lse.float()))


@of_attention
def test_gradient_of_lse(backend):
    """d lse_i / d q_i = scale sum_j p_ij k_j: attention with the keys as values; and v has no part in it."""
    q, k, v = (t.requires_grad_() for t in qkv(backend))
    _, lse = fa.attention(q, k, v, causal=True, return_lse=True, backend=backend.name)
    dq, dv = torch.autograd.grad(lse.sum(), (q, v))
    expected = D**-0.5 * fa.attention(q, k, k, causal=True, backend=backend.name)
    near(dq, expected)
    assert not dv.any()


# ---- attention: what hides ----------------------------------------------------------------------------


@of_attention
def test_minus_infinity_in_a_bias_hides_as_a_mask_does(backend):
    """Rows that see some keys, and rows that see none: the same numbers, and no gradient of what is hidden."""
    q, k, v = qkv(backend)
    seen = torch.rand(2, 1, NQ, NK).to(q) > 0.5
    seen[:, :, 3:9] = False
    bias = torch.randn(2, 1, NQ, NK).to(q)
    hidden = bias.masked_fill(~seen, float("-inf"))
    by_mask = attention(backend, q, k, v, bias=bias, mask=seen)
    by_bias = attention(backend, q, k, v, bias=hidden)
    for a, b in zip(by_bias, by_mask):
        finite = b.isfinite()
        same((a[~finite], b[~finite]))
        near(a[finite], b[finite])
    assert not by_bias[-1][~seen].any()
    assert not by_bias[0][:, :, 3:9].any()
    assert (by_bias[1][:, :, 3:9] == float("-inf")).all()


# ---- add_norm -----------------------------------------------------------------------------------------

of_norm = pytest.mark.op("add_norm")
KINDS = pytest.mark.parametrize("kind", ["layer", "rms", "crms"])


def rows(backend, N=67, width=130, dtype=torch.float32):
    return torch.randn(N, width).to(dtype).to(backend.device)


def norm(backend, x, *args, **options):
    return fa.add_norm(x, *args, backend=backend.name, **options)


def norm_gradients(backend, call, upstream):
    call = {
        n: t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t
        for n, t in call.items()
    }
    y = fa.add_norm(**call, backend=backend.name)
    return torch.autograd.grad(
        y, [t for t in call.values() if isinstance(t, torch.Tensor)], upstream
    )


@of_norm
def test_arguments_by_place_are_those_by_name(best_cpu):
    values = torch.randn(3, 8), torch.randn(3, 8), *torch.randn(3, 8), 0.1, "crms"
    names = ("x", "residual", "bias", "weight", "beta", "eps", "kind")
    for n in range(1, 8):
        by_name = dict(zip(names[:n], values))
        same((fa.add_norm(*values[:n], backend=best_cpu), fa.add_norm(**by_name, backend=best_cpu)))


@of_norm
@KINDS
def test_a_row_is_alone(backend, dtype, kind):
    x, r, up = rows(backend, dtype=dtype), rows(backend, dtype=dtype), rows(backend, dtype=dtype)
    w = rows(backend, N=1, dtype=dtype)[0]
    whole, whole_sum = norm(backend, x, r, weight=w, kind=kind, return_sum=True)
    dx = norm_gradients(backend, {"x": x, "residual": r, "weight": w, "kind": kind}, up)[0]
    for i in (0, 1, 40, 66):
        one, one_sum = norm(
            backend, x[i : i + 1], r[i : i + 1], weight=w, kind=kind, return_sum=True
        )
        same((one[0], whole[i]), (one_sum[0], whole_sum[i]))
        call = {"x": x[i : i + 1], "residual": r[i : i + 1], "weight": w, "kind": kind}
        same((norm_gradients(backend, call, up[i : i + 1])[0][0], dx[i]))


@of_norm
@KINDS
def test_permuted_rows_permute_the_result(backend, kind):
    x, order = rows(backend), torch.randperm(67)
    same((norm(backend, x, kind=kind)[order], norm(backend, x[order], kind=kind)))


@of_norm
@KINDS
def test_threads_do_not_matter_to_norms(backend, kind):
    if backend.family != "cpu":
        pytest.skip(f"{backend.name}: has no threads of torch's")
    x, r, up = (rows(backend, N=700) for _ in range(3))
    w, b = (rows(backend, N=1)[0] for _ in range(2))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            call = {"x": x, "residual": r, "bias": b, "weight": w, "beta": b, "kind": kind}
            results.append([norm(backend, **call), *norm_gradients(backend, call, up)])
    for other in results[1:]:
        same(*zip(results[0], other))


@of_norm
@KINDS
def test_nothing_added_is_zero_added(backend, dtype, kind):
    x = rows(backend, dtype=dtype)
    zero = torch.zeros_like(x)
    y = norm(backend, x, kind=kind)
    one = torch.ones(130).to(x)
    same(
        (y, norm(backend, x, zero, kind=kind)),
        (y, norm(backend, x, None, zero[0], kind=kind)),
        (y, norm(backend, x, zero, zero[0], kind=kind)),
        (y, norm(backend, x, weight=one, kind=kind)),
        (y, norm(backend, x, beta=zero[0], kind=kind)),
    )


@of_norm
@KINDS
def test_the_sum_is_symmetric_and_rounded_once(backend, dtype, kind):
    x, r = rows(backend, dtype=dtype), rows(backend, dtype=dtype)
    y, s = norm(backend, x, r, kind=kind, return_sum=True)
    y2, s2 = norm(backend, r, x, kind=kind, return_sum=True)
    same((y, y2), (s, s2), (s, x + r), (y, norm(backend, s, kind=kind)))
    s3 = norm(backend, x, kind=kind, return_sum=True)[1]
    same((s3, x))


@of_norm
@KINDS
def test_parameters_scale_and_shift(backend, kind):
    x, w, b = (
        rows(backend),
        torch.randn(130).to(backend.device),
        torch.randn(130).to(backend.device),
    )
    y = norm(backend, x, kind=kind)
    got = norm(backend, x, weight=w, beta=b, kind=kind)
    near(got, y * w + b)
    eighth = torch.full_like(w, 0.125)
    same((norm(backend, x, weight=eighth, kind=kind), y * 0.125))


@of_norm
@KINDS
def test_leading_axes_are_rows(backend, kind):
    x = rows(backend, N=24).view(2, 3, 4, 130)
    y = norm(backend, x, x, kind=kind)
    assert y.shape == x.shape
    same((y.view(24, 130), norm(backend, x.view(24, 130), x.view(24, 130), kind=kind)))
    same((norm(backend, x[0, 0, 0], kind=kind), norm(backend, x, kind=kind)[0, 0, 0]))


@of_norm
@KINDS
def test_scale_of_the_input_cancels(backend, kind):
    x = rows(backend)
    same((norm(backend, x, eps=0.0, kind=kind), norm(backend, 32 * x, eps=0.0, kind=kind)))


@of_norm
def test_layer_norm_is_rms_norm_of_centred_rows(backend):
    x = rows(backend)
    centred = (x.double() - x.double().mean(1, keepdim=True)).float()
    near(norm(backend, x), norm(backend, centred, kind="rms"))
    near(norm(backend, x + 3.0), norm(backend, x))


@of_norm
def test_crms_is_rms_of_the_vector_with_its_last_channel(backend):
    """The channel that is not stored makes the sum zero."""
    x = rows(backend).double()
    extended = torch.cat([x, -x.sum(1, keepdim=True)], 1)
    got, want = norm(backend, x.float(), kind="crms"), norm(backend, extended.float(), kind="rms")
    near(got, want[:, :-1])


@of_norm
def test_rows_of_one_value(backend, dtype):
    """Zero variance: layer norm gives beta, not NaN."""
    x = torch.full((5, 64), 3.0).to(dtype).to(backend.device)
    beta = torch.randn(64).to(x)
    same((norm(backend, x, beta=beta), beta.expand(5, 64)))
    assert not norm(backend, torch.zeros_like(x), kind="rms").any()


@of_norm
def test_large_offsets_keep_their_variance(backend):
    """The mean is taken away before squares are summed."""
    x = rows(backend).double()
    got = norm(backend, (x + 1000).float())
    within_budget("add_norm", {"x": (x + 1000).float(), "kind": "layer"}, (got,))
