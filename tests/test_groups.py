"""Attention inside groups, and the greatest logits: what they are beside plain attention, and beside code of others."""

from __future__ import annotations

import pytest
import torch

import fastattn as fa

KINDS = [torch.float32, torch.float64]


def tokens(B=2, H=4, N=48, D=8, dtype=torch.float32, count=3):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, H, N, D, generator=generator).to(dtype).requires_grad_()
        for _ in range(count)
    ]


def backend_of(dtype):
    return "reference" if dtype == torch.float64 else None


def agree(ours, theirs, inputs):
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours.dtype)
    found, wanted = (torch.autograd.grad(o, inputs, g) for o in (ours, theirs))
    for a, b in zip((ours, *found), (theirs, *wanted)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def plain(q, k, v, bias=0.0):
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shifted_windows_are_those_of_swin(kind):
    """Rolled, cut, masked by regions and rolled back, as the paper's code does it."""
    height, width, side, shift = 6, 8, (3, 4), (1, 2)
    q, k, v = tokens(dtype=kind)
    table = torch.randn(35, 4, generator=torch.Generator().manual_seed(1)).to(kind).requires_grad_()
    index = fa.bias.Relative.swin_index(*side)
    region = torch.zeros(height, width)
    count = 0
    for rows in (slice(0, -side[0]), slice(-side[0], -shift[0]), slice(-shift[0], None)):
        for columns in (slice(0, -side[1]), slice(-side[1], -shift[1]), slice(-shift[1], None)):
            region[rows, columns] = count
            count += 1

    def cut(t):  # [.., 48, D] -> [.., 4, 12, D]
        t = t.unflatten(-2, (2, side[0], 2, side[1]))
        return t.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)

    def rolled(t):
        return (
            t.unflatten(-2, (height, width)).roll((-shift[0], -shift[1]), (-3, -2)).flatten(-3, -2)
        )

    of_window = cut(region.flatten()[:, None])[..., 0]
    hidden = (of_window[:, :, None] != of_window[:, None]) * -1e9
    bias = table[index].permute(2, 0, 1)[:, None] + hidden.to(kind)
    o = plain(*(cut(rolled(t)) for t in (q, k, v)), bias)
    o = o.unflatten(-2, side).unflatten(-4, (2, 2)).transpose(-4, -3)  # [.., 2, 3, 2, 4, D]
    o = o.flatten(-3, -2).flatten(-4, -3).roll(shift, (-3, -2)).flatten(-3, -2)
    groups = fa.Groups.windows((height, width), side, shift=shift)
    ours = fa.grouped_attention(
        q, k, v, groups, bias=fa.bias.Relative(table, index), backend=backend_of(kind)
    )
    agree(ours, o, (q, k, v, table))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stripes_are_those_of_cswin(kind):
    q, k, v = tokens(dtype=kind)
    y, x = torch.arange(48) // 8, torch.arange(48) % 8
    bands = [(y[:, None] // 2 == y // 2), (x[:, None] // 2 == x // 2)]
    seen = torch.stack([bands[1], bands[1], bands[0], bands[0]])
    o = plain(q, k, v, torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, -1e9))
    groups = fa.Groups.windows((6, 8), stripes=2)
    agree(fa.grouped_attention(q, k, v, groups, backend=backend_of(kind)), o, (q, k, v))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_tokens_in_several_groups(combine, kind):
    """Each group by itself, then put together."""
    q, k, v = tokens(dtype=kind)
    index = torch.randint(-1, 48, (2, 4, 5, 13), generator=torch.Generator().manual_seed(4))
    o, count = torch.zeros_like(q), torch.zeros(2, 4, 48, dtype=kind)
    for b in range(2):
        for h in range(4):
            for row in index[b, h]:
                at = row[row >= 0]
                found = plain(*(t[b, h, at] for t in (q, k, v)))
                o = o.index_put((torch.tensor(b), torch.tensor(h), at), found, accumulate=True)
                count[b, h].index_add_(0, at, torch.ones(len(at), dtype=kind))
    o = o / count.clamp(min=1)[..., None] if combine == "mean" else o
    ours = fa.grouped_attention(
        q, k, v, fa.Groups(index), combine=combine, backend=backend_of(kind)
    )
    agree(ours, o, (q, k, v))


def test_one_group_of_all_tokens_is_attention():
    q, k, v = tokens()
    everything = fa.Groups(torch.arange(48)[None])
    agree(
        fa.grouped_attention(q, k, v, everything, causal=True),
        fa.attention(q, k, v, causal=True),
        (q, k, v),
    )


def test_causal_goes_by_the_tokens_own_places():
    q, k, v = tokens()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    o, lse = fa.grouped_attention(q, k, v, fa.Groups(order[None]), causal=True, return_lse=True)
    wanted, log = fa.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, log, rtol=1e-5, atol=1e-5)


def test_tokens_of_no_group():
    q, k, v = tokens()
    o, lse = fa.grouped_attention(q, k, v, fa.Groups(torch.tensor([[5, -1, 7]])), return_lse=True)
    inside = torch.zeros(48, dtype=torch.bool)
    inside[[5, 7]] = True
    assert not o[:, :, ~inside].any()
    assert bool((lse[:, :, ~inside] == -torch.inf).all())
    for grad in torch.autograd.grad(o.sum() + lse[:, :, inside].sum(), (q, k, v)):
        assert not grad[:, :, ~inside].any()
        assert grad[:, :, inside].any()


def test_windows_that_do_not_divide_the_grid():
    groups = fa.Groups.windows((5, 4), 2)
    assert groups.slots[0, 0, 0].view(-1, 4).tolist()[-1] == [18, 19, -1, -1]
    every = groups.slots[groups.slots >= 0]
    assert sorted(every.tolist()) == list(range(20))


def test_the_same_bits_whatever_the_threads():
    q, k, v = tokens(H=2, N=300, D=32)
    index = torch.randint(-1, 300, (1, 2, 9, 140), generator=torch.Generator().manual_seed(4))
    bias = torch.randn(1, 2, 140, 140, requires_grad=True)

    def found():
        o = fa.grouped_attention(q, k, v, fa.Groups(index), combine="sum", bias=bias)
        return [o, *torch.autograd.grad(o.sum(), (q, k, v, bias))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = found()
    finally:
        torch.set_num_threads(threads)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(once, found()))


REFUSED = {
    "a token in two groups": (lambda: fa.Groups(torch.tensor([[1, 2], [2, 3]])), {}, "is in two groups"),
    "a token too many": (lambda: fa.Groups(torch.tensor([[1, 48]])), {}, "names token 48; it takes 0 to 47, or -1"),
    "a hole of another number": (lambda: fa.Groups(torch.tensor([[1, -2]])), {}, "names token -2"),
    "floats": (lambda: fa.Groups(torch.zeros(2, 2)), {}, "index is float32"),
    "three axes": (lambda: fa.Groups(torch.zeros(2, 2, 2, dtype=torch.int64)), {}, r"int64 \[2, 2, 2\]"),
    "labels": (lambda: fa.Groups(torch.zeros(2, 3, dtype=torch.int64), labels=torch.zeros(2, 2, dtype=torch.int64)), {},
               r"labels is \[2, 2\]; beside index \[2, 3\]"),
    "stripes": (lambda: fa.Groups.windows((4, 4), stripes="2"), {}, "stripes is '2'"),
    "a side that is no number": (lambda: fa.Groups.windows((4, 4), 2.5), {}, "window is 2.5; it takes an integer >= 1"),
    "a shift that is no number": (lambda: fa.Groups.windows(4, 2, shift=(0.5,)), {}, r"shift is \(0.5,\); it takes an integer"),
    "offsets that fall": (
        lambda: fa.Groups(torch.arange(4), torch.tensor([0, 3, 2, 4])), {}, "must ascend from 0 to the 4 slots"),
    "heads": (lambda: fa.Groups(torch.zeros(1, 3, 1, 1, dtype=torch.int64)), {}, "3 heads; B is 2 and Hq is 4"),
    "no groups": (lambda: torch.zeros(2, 2), {}, "groups is Tensor"),
    "combine": (lambda: fa.Groups(torch.tensor([[1, 2]])), {"combine": "max"}, "only, mean, sum"),
    "lse": (lambda: fa.Groups(torch.tensor([[1, 2]])), {"combine": "sum", "return_lse": True}, "return_lse is True"),
    "bias": (lambda: fa.Groups(torch.tensor([[1, 2]])), {"bias": torch.zeros(3, 1, 2, 2)}, "its B is 1, or 1 groups"),
    "bias of tokens": (lambda: fa.Groups(torch.tensor([[1, 2]])), {"bias": torch.zeros(48, 48)}, r"\[48, 48\]|\[1, 1, 48, 48\]"),
    "numbers of groups": (
        lambda: fa.Groups(torch.tensor([[1, 2]])), {"key_groups": fa.Groups(torch.tensor([[1], [2]]))},
        "groups has 1 and key_groups 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        fa.grouped_attention(*tokens(), make(), **options)


# ---- The greatest logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("topk", [1, 7, 48, 100])
def test_topk_is_a_mask_of_the_greatest(topk, kind):
    q, k, v = tokens(dtype=kind)
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    kept = torch.zeros_like(s, dtype=torch.bool)
    kept.scatter_(-1, s.topk(min(topk, 48)).indices, True)
    wanted = s.masked_fill(~kept, -torch.inf).softmax(-1) @ v
    agree(fa.topk_attention(q, k, v, topk, backend=backend_of(kind)), wanted, (q, k, v))


@pytest.mark.parametrize("row", [None, "reference"])
def test_the_first_of_equal_logits_are_kept(row):
    q, k = torch.ones(1, 1, 3, 8), torch.ones(1, 1, 200, 8)
    v = torch.arange(200.0)[None, None, :, None]
    o = fa.topk_attention(q, k, v, 5, mask=fa.masks.Window(None, 0), backend=row)
    assert o.flatten().tolist() == [2.0, 2.0, 2.0]


def test_topk_keeps_nan():
    q, k, v = (t.detach().clone() for t in tokens())
    q[0, 0, 3, 2] = torch.nan
    o = fa.topk_attention(q, k, v, 3)
    assert bool(o[0, 0, 3].isnan().all())
    assert not o[0, 0, :3].isnan().any()


@pytest.mark.parametrize("topk", [0, -1, 1.5, True, None])
def test_topk_refuses(topk):
    with pytest.raises(ValueError, match="it takes an integer >= 1"):
        fa.topk_attention(*tokens(), topk)


def test_biases_of_a_batch_and_of_all():
    """[G, ..] and [B G, ..] in one call."""
    q, k, v = tokens()
    groups = fa.Groups.windows((6, 8), (3, 4))
    of_batch, of_all = torch.randn(4, 1, 12, 12), torch.randn(8, 4, 12, 12)
    both = fa.grouped_attention(q, k, v, groups, bias=[of_batch, of_all])
    joined = fa.grouped_attention(q, k, v, groups, bias=of_batch.repeat(2, 1, 1, 1) + of_all)
    torch.testing.assert_close(both, joined, rtol=1e-4, atol=1e-5)
