"""Masks in three languages, and by their definition: every mask, every pair of masks, on small grids."""

from __future__ import annotations

import functools
import importlib.util
import itertools

import pytest
import torch

from fastattn.masks import UNBOUNDED, Band, Causal, Full, Mask, Window, pairs
from fastattn.op import _native, _why_no_triton, triton_device

SIZES = (0, 1, 2, 5, 8, 9)
GRIDS = list(itertools.product(SIZES, SIZES))
WINDOWS = (None, 0, 2, 100)
SINGLE: dict[str, Mask] = {
    str(mask): mask
    for mask in (
        Full(),
        Causal(),
        Causal("top-left"),
        *(Window(left, right) for left in WINDOWS for right in WINDOWS),
        Window(UNBOUNDED + 5, 2 * UNBOUNDED),
        Band(left=2, right_top=1),
        Band(left=-1, right=3),  # starts after the query's own position
        Band(left_top=0, right_top=0),
        Band(left=UNBOUNDED - 1, right_top=UNBOUNDED - 1),
    )
}
PAIRS = {f"{a}&{b}": x & y for (a, x), (b, y) in itertools.combinations(SINGLE.items(), 2)}


def allows(mask: Mask, i: int, j: int, Nq: int, Nk: int) -> bool:
    """The definitions as the documentation words them, on Python's integers."""
    position = i + Nk - Nq
    if isinstance(mask, Full):
        return True
    if isinstance(mask, Causal):
        return j <= (position if mask.align == "bottom-right" else i)
    if isinstance(mask, Window):
        return (mask.left is None or j >= position - mask.left) and (
            mask.right is None or j <= position + mask.right
        )
    if isinstance(mask, Band):
        return (
            position - mask.left <= j <= position + mask.right
            and i - mask.left_top <= j <= i + mask.right_top
        )
    return allows(mask.first, i, j, Nq, Nk) and allows(mask.second, i, j, Nq, Nk)


@functools.cache
def defined(name: str, Nq: int, Nk: int) -> torch.Tensor:
    if name in PAIRS:
        both = PAIRS[name]
        return defined(str(both.first), Nq, Nk) & defined(str(both.second), Nq, Nk)
    rows = [[allows(SINGLE[name], i, j, Nq, Nk) for j in range(Nk)] for i in range(Nq)]
    return torch.tensor(rows, dtype=torch.bool).view(Nq, Nk)


def each(masks: dict[str, Mask]):
    """(name, mask, Nq, Nk, what its definition allows) over all masks and grids."""
    for (name, mask), (Nq, Nk) in itertools.product(masks.items(), GRIDS):
        yield name, mask, Nq, Nk, defined(name, Nq, Nk)


# ---- Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_python_materializes_the_definition(masks):
    for name, mask, Nq, Nk, allowed in each(masks):
        assert torch.equal(mask.materialize(Nq, Nk), allowed), (name, Nq, Nk)


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_pairs_counts_what_is_allowed(masks):
    for name, mask, Nq, Nk, allowed in each(masks):
        assert pairs(mask, Nq, Nk) == int(allowed.sum()), (name, Nq, Nk)


def test_three_masks_and_any_order():
    a, b, c = Causal(), Window(3, 3), Causal("top-left")
    for Nq, Nk in GRIDS:
        allowed = torch.stack([mask.materialize(Nq, Nk) for mask in (a, b, c)]).all(0)
        for x, y, z in itertools.permutations((a, b, c)):
            assert torch.equal(((x & y) & z).materialize(Nq, Nk), allowed)
            assert torch.equal((x & (y & z)).materialize(Nq, Nk), allowed)


def test_masks_are_values():
    assert Window(3, 0) == Window(3, 0)
    assert Window(3, 0) != Window(3, 1)
    assert Causal() & Full() == Causal() & Full()
    assert len({Causal(), Causal(), Causal("top-left"), Full(), Full()}) == 3
    with pytest.raises(AttributeError):
        Window(3, 0).left = 4
    assert [str(m) for m in (Full(), Causal(), Causal("top-left"), Window(None, 0), Causal() & Window(3))] == [
        "Full", "Causal", "Causal(top-left)", "Window(None,0)", "Causal&Window(3,None)"]  # fmt: skip


def test_equal_masks_encode_equally():
    assert Window(None, 0).encode() == Causal().encode()
    assert Window().encode() == Full().encode()
    assert (Causal() & Full()).encode() == Causal().encode()
    assert (Causal() & Window(5, 5)).encode() == Window(5, 0).encode()


# ---- C++ ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native():
    if _native() is None:
        pytest.skip("the compiled CPU library is missing")
    return _native()


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_cpp_sees_what_python_sees(native, masks):
    for name, mask, Nq, Nk, allowed in each(masks):
        seen = torch.tensor(native.mask_visible(mask.encode(), Nq, Nk), dtype=torch.bool).view(
            Nq, Nk
        )
        assert torch.equal(seen, allowed), (name, Nq, Nk)


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_cpp_ranges_of_keys_are_tight(native, masks):
    """keys(i0, i1) begins and ends where visible keys do: a kernel walks no tile for nothing."""
    for name, mask, Nq, Nk, allowed in each(masks):
        for i0, i1 in itertools.combinations(range(Nq + 1), 2):
            found = native.mask_keys(mask.encode(), Nq, Nk, i0, i1)
            agree(found, allowed[i0:i1].any(0), mask, (name, Nq, Nk, i0, i1))


def test_cpp_refuses_unknown_masks(native):
    with pytest.raises(ValueError, match=r"mask kind is 7; compiled for 0 \(band\)"):
        native.mask_visible([7, 1, 1, 1, 1], 2, 2)
    with pytest.raises(ValueError, match="a band mask has 4 bounds, got 2"):
        native.mask_visible([0, 1, 1], 2, 2)
    with pytest.raises(ValueError, match="mask kind"):
        native.mask_visible([], 2, 2)


def agree(found: tuple[int, int], wanted: torch.Tensor, mask: Mask, where: tuple) -> None:
    """[begin, end) is where ``wanted`` is True; none where it is never, unless the mask contradicts itself."""
    (begin, end), true = found, wanted.nonzero().flatten().tolist()
    if true:
        assert (begin, end) == (true[0], true[-1] + 1), where
    elif not contradicts_itself(mask, where[1], where[2]):
        assert begin >= end, where


def contradicts_itself(mask: Mask, Nq: int, Nk: int) -> bool:
    """The band closes before it opens, so it has no ends to be tight at."""
    band = mask.band()
    return max(Nk - Nq - band.left, -band.left_top) > min(Nk - Nq + band.right, band.right_top)


# ---- Triton -------------------------------------------------------------------------------------------

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from fastattn.kernels.common import triton_masks

    @triton.jit(do_not_specialize=("Nq", "Nk"))
    def answer(seen, ranges, mask, Nq, Nk, N: tl.constexpr):
        """Visible pairs [N, N], and the four ranges [4, 2, N, N] of every begin and end."""
        i = tl.arange(0, N)[:, None]
        j = tl.arange(0, N)[None, :]
        at = i * N + j
        tl.store(seen + at, triton_masks.visible(mask, i, j) & (i < Nq) & (j < Nk))
        begin, end = triton_masks.keys(mask, i, j, Nq, Nk)
        tl.store(ranges + at, tl.broadcast_to(begin, N, N))
        tl.store(ranges + N * N + at, tl.broadcast_to(end, N, N))
        begin, end = triton_masks.keys_all(mask, i, j, Nq, Nk)
        tl.store(ranges + 2 * N * N + at, tl.broadcast_to(begin, N, N))
        tl.store(ranges + 3 * N * N + at, tl.broadcast_to(end, N, N))
        begin, end = triton_masks.queries(mask, i, j, Nq, Nk)
        tl.store(ranges + 4 * N * N + at, tl.broadcast_to(begin, N, N))
        tl.store(ranges + 5 * N * N + at, tl.broadcast_to(end, N, N))
        begin, end = triton_masks.queries_all(mask, i, j, Nq, Nk)
        tl.store(ranges + 6 * N * N + at, tl.broadcast_to(begin, N, N))
        tl.store(ranges + 7 * N * N + at, tl.broadcast_to(end, N, N))


N = 16


@functools.cache
def answers(mask, Nq: int, Nk: int) -> tuple[torch.Tensor, list]:
    device = triton_device()
    seen = torch.zeros(N, N, dtype=torch.bool, device=device)
    ranges = torch.zeros(4, 2, N, N, dtype=torch.int32, device=device)
    answer[(1,)](seen, ranges, mask, Nq, Nk, N)
    return seen[:Nq, :Nk].cpu(), ranges.tolist()


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_triton_sees_what_python_sees(masks):
    if why := _why_no_triton():
        pytest.skip(f"triton: {why}")
    for name, mask, Nq, Nk, allowed in itertools.islice(
        each(masks), 0, None, 1 if masks is SINGLE else 5
    ):
        seen, ranges = answers(triton_masks.encode(mask.encode(), Nq, Nk), Nq, Nk)
        assert torch.equal(seen, allowed), (name, Nq, Nk)
        keys, keys_all, queries, queries_all = ranges
        for i0, i1 in itertools.combinations(range(Nq + 1), 2):
            where = (name, Nq, Nk, i0, i1)
            agree((keys[0][i0][i1], keys[1][i0][i1]), allowed[i0:i1].any(0), mask, where)
            agree((keys_all[0][i0][i1], keys_all[1][i0][i1]), allowed[i0:i1].all(0), mask, where)
        for j0, j1 in itertools.combinations(range(Nk + 1), 2):
            where = (name, Nq, Nk, j0, j1)
            agree((queries[0][j0][j1], queries[1][j0][j1]), allowed[:, j0:j1].any(1), mask, where)
            agree(
                (queries_all[0][j0][j1], queries_all[1][j0][j1]),
                allowed[:, j0:j1].all(1),
                mask,
                where,
            )
