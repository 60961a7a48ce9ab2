"""What attention's functions are to one another: packed, nested, transposed; and what dropout drops."""

from __future__ import annotations

import re

import pytest
import torch

import fastattn as fa
from fastattn.dropout import keep, philox
from fastattn.masks import BlockSparse, Causal, Dilated, Mask, Prefix, Window

MASKS = [
    None,
    Causal(),
    Dilated(3, 2) | Prefix(2),
    torch.rand(2, 1, 9, 13, generator=torch.Generator().manual_seed(1)) > 0.4,
]


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def weights(q, k, mask, bias=0.0, dim=-1):
    s = q @ k.mT * q.shape[-1] ** -0.5 + bias
    if isinstance(mask, Mask):
        mask = mask.materialize(q.shape[2], k.shape[2])
    if mask is None:
        return s.softmax(dim)
    return s.masked_fill(~mask, -1e30).softmax(dim) * mask


def agree(ours, theirs, inputs):
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours.dtype)
    found = torch.autograd.grad(ours, inputs, g)
    wanted = torch.autograd.grad(theirs, inputs, g.to(theirs.dtype))
    for a, b in zip((ours, *found), (theirs, *wanted)):
        torch.testing.assert_close(
            a, b.to(a.dtype), rtol=1e-4, atol=1e-4 if a.dtype == torch.float32 else 1e-9
        )


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["kernel", "formula"])
def test_importance_is_the_column_sums_of_p(mask, kind):
    q, k, w, bias = leaves((2, 4, 9, 8), (2, 2, 13, 8), (2, 1, 9), (1, 4, 9, 13), dtype=kind)
    backend = "reference" if kind == torch.float64 else None
    ours = fa.attention_importance(q, k, query_weight=w, mask=mask, bias=bias, backend=backend)
    P = weights(q, k.repeat_interleave(2, 1), mask, bias)
    agree(ours, (P * w[..., None]).sum(-2), (q, k, w, bias))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["kernel", "formula"])
def test_column_attention_normalises_over_queries(mask, kind):
    q, k, v, w = leaves((2, 3, 9, 8), (2, 3, 13, 8), (2, 3, 13, 5), (2, 3, 13), dtype=kind)
    backend = "reference" if kind == torch.float64 else None
    ours = fa.column_attention(q, k, v, mask=mask, sender_weight=w, backend=backend)
    agree(ours, weights(q, k, mask, dim=-2) @ (v * w[..., None]), (q, k, v, w))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda q, k: fa.attention_importance(q, k, query_weight=torch.ones(4)),
         "attention_importance: query_weight is float32[4] on cpu; it takes floats on cpu that broadcast to [B, Hq, Nq] = [2, 4, 9]"),
        (lambda q, k: fa.attention_importance(q, k[:, :3]), "Hq is 4 and Hk is 3; Hq must be a multiple of Hk"),
        (lambda q, k: fa.column_attention(q, k[:, :2], k[:, :2]), "H is 4 in q but 2 in k"),
        (lambda q, k: fa.column_attention(q, k, k, sender_weight=torch.ones(4)), "it takes floats on cpu that broadcast to [B, H, Nk] = [2, 4, 13]"),
    ],
)  # fmt: skip
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(torch.ones(2, 4, 9, 8), torch.ones(2, 4, 13, 8))


# ---- Packed and nested ---------------------------------------------------------------------------------

LENGTHS = (5, 0, 130, 1, 64)


def packed(dtype=torch.float32):
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return *leaves((200, 4, 16), (200, 2, 16), (200, 2, 24), dtype=dtype), ends


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "mask", [None, Causal(), Window(7, 2), BlockSparse.longformer(9, 16, window=1)], ids=str
)
def test_packed_sequences_are_as_if_alone_bit_for_bit(kind, mask):
    q, k, v, ends = packed(kind)
    o, lse = fa.attention_varlen(q, k, v, ends, mask=mask, return_lse=True)
    assert o.is_contiguous()
    g = torch.randn_like(o)
    found = torch.autograd.grad(o, (q, k, v), g)
    for begin, end in zip(ends.tolist(), ends.tolist()[1:]):
        parts = [t[begin:end].detach().transpose(0, 1)[None].requires_grad_() for t in (q, k, v)]
        alone, lse_alone = fa.attention(*parts, mask=mask, return_lse=True)
        assert torch.equal(alone[0].transpose(0, 1), o[begin:end])
        assert torch.equal(lse_alone[0].transpose(0, 1), lse[begin:end])
        grads = torch.autograd.grad(alone, parts, g[begin:end].transpose(0, 1)[None])
        for grad, whole in zip(grads, found):
            assert torch.equal(grad[0].transpose(0, 1), whole[begin:end])


def test_jagged_tensors_are_packed_sequences():
    q, k, v, ends = packed()
    nested = [
        torch.nested.nested_tensor_from_jagged(t, ends.long()).transpose(1, 2) for t in (q, k, v)
    ]
    o, lse = fa.attention(*nested, causal=True, return_lse=True)
    plain, plain_lse = fa.attention_varlen(q, k, v, ends, causal=True, return_lse=True)
    assert torch.equal(o.transpose(1, 2).values(), plain)
    assert torch.equal(lse.transpose(1, 2).values(), plain_lse)
    g = torch.randn_like(plain)
    ours = torch.autograd.grad(o.transpose(1, 2).values(), (q, k, v), g)
    for a, b in zip(ours, torch.autograd.grad(plain, (q, k, v), g)):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="k is not jagged"):
        fa.attention(nested[0], torch.ones(5, 2, 3, 16), nested[2])


@pytest.mark.parametrize(
    ("ends", "sentence"),
    [
        ([0, 9, 5, 200], "cu_seqlens_q goes from 0 to 200; it must ascend from 0 to Tq = 200"),
        ([0, 5], "cu_seqlens_q goes from 0 to 5; it must ascend from 0 to Tq = 200"),
        ([1, 200], "cu_seqlens_q goes from 1 to 200"),
        ([], "cu_seqlens_q is [0] on cpu; it takes int32 [batch + 1] on cpu"),
    ],
)
def test_ends_that_are_refused(ends, sentence):
    q, k, v, _ = packed()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fa.attention_varlen(q, k, v, torch.tensor(ends, dtype=torch.int32))
    if ends:  # and by the kernel itself
        cu = torch.tensor(ends, dtype=torch.int32)
        args = [*(t.transpose(0, 1)[None] for t in (q, k, v)), *[None] * 10, cu, cu, *[None] * 3]
        with pytest.raises(ValueError, match="cu_q"):
            torch.ops.fastattn.attention_fwd(
                *args, Causal().encode(), [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], backend="cpu"
            )


# ---- Dropout -------------------------------------------------------------------------------------------


def test_philox_gives_the_words_its_authors_publish():
    """The known answers that come with Random123: counters and keys of zeros, and of ones."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), (1 << 32) - 1)
    assert [int(w) for w in philox(zero, zero, zero, zero, zero)] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    assert [int(w) for w in philox(torch.full((1,), -1), ones, ones, ones, ones)] == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]


def test_dropout_drops_the_share_asked_for_and_by_position():
    whole = keep(torch.tensor([5]), 0.25, 2, 3, 40, 50)
    assert abs(float((whole == 0).float().mean()) - 0.25) < 0.01
    assert set(whole.unique().tolist()) == {0.0, whole.max().item()}
    assert whole.max().item() == pytest.approx(1 / 0.75)
    assert torch.equal(keep(torch.tensor([5]), 0.25, 1, 2, 30, 47), whole[:1, :2, :30, :47])
    assert not torch.equal(keep(torch.tensor([6]), 0.25, 2, 3, 40, 50), whole)


def test_a_seed_decides_and_torch_draws_it_when_none_is_given():
    q, k, v = leaves((1, 2, 33, 8), (1, 2, 40, 8), (1, 2, 40, 8), dtype=torch.float32)
    same = [fa.attention(q, k, v, dropout=0.5, seed=seed) for seed in (3, torch.tensor(3), 4)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    drawn = []
    for _ in range(2):
        torch.manual_seed(11)
        drawn.append(fa.attention(q, k, v, dropout=0.5))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], fa.attention(q, k, v, dropout=0.5))


def test_second_derivatives_of_sums_over_queries_are_refused():
    q, k = torch.randn(1, 2, 4, 8, requires_grad=True), torch.randn(1, 2, 5, 8)
    for function in (lambda: fa.attention_importance(q, k), lambda: fa.column_attention(q, k, k)):
        (g,) = torch.autograd.grad(function().square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            torch.autograd.grad(g.square().sum(), q)
    assert "second ones are refused" in fa.explain(fa.attention_importance, q, k)


def test_sums_over_queries_compile_without_gradients():
    q = torch.randn(1, 4, 7, 8)
    found = torch.compile(
        lambda q: fa.attention_importance(q, q), fullgraph=True, backend="aot_eager"
    )(q)
    assert torch.equal(found, fa.attention_importance(q, q))


def test_learned_biases_of_modules_compile_for_all_shapes():
    class Slopes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slopes = torch.nn.Parameter(torch.rand(4))

        def forward(self, q, k):
            return fa.attention(q, k, k, bias=fa.bias.ALiBi(self.slopes))

    module, q, k = Slopes(), torch.randn(1, 4, 7, 8), torch.randn(1, 2, 9, 8)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), module(q, k))


def test_explain_writes_nothing_and_draws_nothing():
    cache, q = torch.zeros(1, 2, 9, 8), torch.randn(1, 2, 1, 8)
    before = torch.random.get_rng_state()
    text = fa.explain(
        fa.attention_decode, q, cache, cache.clone(), torch.tensor([3]), k_new=q, v_new=q, dropout=0.5
    )  # fmt: skip
    assert text.startswith("attention(")
    fa.explain(fa.attention, q, q, q, dropout=0.5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not cache.any()


@pytest.mark.parametrize("shape", [(3, 3), (5, 6), (2, 1, 3, 3), (3, 1), (1, 3)])
def test_bool_masks_of_packed_sequences(shape):
    x, ends = torch.randn(4, 2, 8), torch.tensor([0, 1, 4], dtype=torch.int32)
    mask = torch.rand(shape) > 0.4
    found = fa.attention_varlen(x, x, x, ends, mask=mask)
    assert torch.equal(found, fa.attention_varlen(x, x, x, ends, mask=mask, backend="cpu"))
    wanted = fa.attention_varlen(x, x, x, ends, mask=mask, backend="reference")
    torch.testing.assert_close(found, wanted)


def test_bool_masks_of_no_pair():
    q, none = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    assert not fa.attention(q, none, none, mask=torch.ones(3, 0, dtype=torch.bool)).any()


def test_more_logits_than_there_are_keys():
    q = torch.randn(1, 2, 4, 8)
    for topk in (1 << 63, 10**400):
        assert torch.equal(fa.topk_attention(q, q, q, topk), fa.attention(q, q, q))


def test_numbers_of_tokens_beyond_32_bits_are_refused():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="names token"):
        fa.grouped_attention(q, q, q, fa.Groups(torch.tensor([[1, 1 << 32]])))
