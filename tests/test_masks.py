"""Masks in three languages, and by their definition: every mask, every pair of masks, on small grids.

One file because three languages are held to one definition.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re

import pytest
import torch

from fastattn.backends import compiled_library, triton_device, why_no_triton
from fastattn.masks import (
    UNBOUNDED,
    WIDTH,
    And,
    Band,
    BlockSparse,
    Causal,
    Dense,
    Dilated,
    Full,
    Mask,
    Or,
    Prefix,
    Window,
    lowered,
    materialize,
    pairs,
)

SIZES = (0, 1, 2, 5, 8, 9)
GRIDS = list(itertools.product(SIZES, SIZES))
WINDOWS = (None, 0, 2, 100)


def layout(H: int, nq: int, nk: int) -> torch.Tensor:
    return torch.rand(H, nq, nk, generator=torch.Generator().manual_seed(H + nq)) > 0.5


BANDS: dict[str, Mask] = {
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
OTHERS: dict[str, Mask] = {
    str(mask): mask
    for mask in (
        Dilated(0, 1),
        Dilated(2, 1),
        Dilated(1, 3),
        Dilated(100, 2),
        Dilated(UNBOUNDED, UNBOUNDED),
        Prefix(0),
        Prefix(3),
        Prefix(UNBOUNDED + 1),
        BlockSparse(layout(1, 3, 3), 3),
        BlockSparse(layout(1, 9, 9), 1),
        BlockSparse(layout(2, 3, 2), 4),  # heads differ, and the layout is narrower than some grids
        BlockSparse(layout(1, 1, 1) | True, 100),
        BlockSparse(torch.zeros(0, 2, dtype=torch.bool), 4),
    )
}
SINGLE = BANDS | OTHERS
PAIRS = {f"({a}&{b})": x & y for (a, x), (b, y) in itertools.combinations(SINGLE.items(), 2)} | {
    f"({a}|{b})": x | y for (a, x), (b, y) in itertools.combinations(SINGLE.items(), 2)
}
HEADS = 2


def allows(mask: Mask, h: int, i: int, j: int, Nq: int, Nk: int) -> bool:
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
    if isinstance(mask, Dilated):
        away = abs(j - position)
        return away % mask.step == 0 and away // mask.step <= mask.window
    if isinstance(mask, Prefix):
        return j < mask.n
    if isinstance(mask, BlockSparse):
        H, nq, nk = mask.layout.shape
        row, column = i // mask.block_size, j // mask.block_size
        return row < nq and column < nk and bool(mask.layout[h if H > 1 else 0, row, column])
    if isinstance(mask, And):
        return allows(mask.first, h, i, j, Nq, Nk) and allows(mask.second, h, i, j, Nq, Nk)
    assert isinstance(mask, Or)
    return allows(mask.first, h, i, j, Nq, Nk) or allows(mask.second, h, i, j, Nq, Nk)


@functools.cache
def defined(name: str, Nq: int, Nk: int) -> torch.Tensor:
    """[HEADS, Nq, Nk]"""
    if name in PAIRS:
        both = PAIRS[name]
        a, b = (defined(str(part), Nq, Nk) for part in (both.first, both.second))
        return a & b if isinstance(both, And) else a | b
    rows = [
        [[allows(SINGLE[name], h, i, j, Nq, Nk) for j in range(Nk)] for i in range(Nq)]
        for h in range(HEADS)
    ]
    return torch.tensor(rows, dtype=torch.bool).view(HEADS, Nq, Nk)


def each(masks: dict[str, Mask], step: int = 1):
    """(name, mask, Nq, Nk, what its definition allows) over all masks and grids, or every so many of them."""
    for (name, mask), (Nq, Nk) in itertools.islice(
        itertools.product(masks.items(), GRIDS), 0, None, step
    ):
        yield name, mask, Nq, Nk, defined(name, Nq, Nk)


# ---- Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_python_materializes_the_definition(masks):
    for name, mask, Nq, Nk, allowed in each(masks, 1 if masks is SINGLE else 5):
        found = mask.materialize(Nq, Nk)
        assert torch.equal(found.expand(HEADS, Nq, Nk), allowed), (name, Nq, Nk)


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_pairs_counts_what_is_allowed(masks):
    for name, mask, Nq, Nk, allowed in each(masks, 1 if masks is SINGLE else 7):
        assert pairs(mask, Nq, Nk) == int(allowed.sum()) / HEADS, (name, Nq, Nk)


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_transposed_masks(masks):
    for name, mask, Nq, Nk, allowed in each(masks, 1 if masks is SINGLE else 13):
        found = mask.transposed(Nq, Nk).materialize(Nk, Nq)
        assert torch.equal(found.expand(HEADS, Nk, Nq), allowed.mT), (name, Nq, Nk)


def test_three_masks_and_any_order():
    a, b, c = Causal(), Window(3, 3), Dilated(4, 2)
    for Nq, Nk in GRIDS:
        x, y, z = (mask.materialize(Nq, Nk) for mask in (a, b, c))
        assert torch.equal((a & b & c).materialize(Nq, Nk), x & y & z)
        assert torch.equal((a & (b | c)).materialize(Nq, Nk), x & (y | z))
        assert torch.equal((a | b & c).materialize(Nq, Nk), x | (y & z))


def test_masks_are_values():
    assert Window(3, 0) == Window(3, 0)
    assert Window(3, 0) != Window(3, 1)
    assert Causal() & Full() == Causal() & Full()
    assert Causal() & Full() != Causal() | Full()
    assert len({Causal(), Causal(), Causal("top-left"), Full(), Full()}) == 3
    blocks = BlockSparse(layout(1, 3, 3), 4)
    assert len({blocks, BlockSparse(layout(1, 3, 3), 4)}) == 1
    assert blocks != BlockSparse(~layout(1, 3, 3), 4)
    for mask, name in ((Window(3, 0), "left"), (blocks, "block_size")):
        with pytest.raises(AttributeError):
            setattr(mask, name, 4)
    assert [str(m) for m in (Full(), Causal(), Causal("top-left"), Window(None, 0), Causal() & Window(3), Prefix(2))] == [
        "Full", "Causal", "Causal(top-left)", "Window(None,0)", "(Causal&Window(3,None))", "Prefix(2)"]  # fmt: skip


def test_equal_masks_encode_equally():
    assert Window(None, 0).encode() == Causal().encode()
    assert Window().encode() == Full().encode()
    assert (Causal() & Full()).encode() == Causal().encode()
    assert (Causal() & Window(5, 5)).encode() == Window(5, 0).encode()
    assert len((Causal() & Window(5, 5) | Prefix(3)).encode()) == 3 * WIDTH


# ---- Published patterns of blocks ---------------------------------------------------------------------


def test_patterns_are_those_of_their_papers():
    n = 12
    i, j = torch.arange(n)[:, None], torch.arange(n)

    def blocks(mask: BlockSparse) -> torch.Tensor:
        return mask.layout.squeeze(0)

    strided = BlockSparse.strided(n, 16, stride=4)
    assert torch.equal(blocks(strided), (j <= i) & ((i - j < 4) | ((i - j) % 4 == 0)))
    fixed = BlockSparse.fixed(n, 16, stride=4, summary=1)
    assert torch.equal(blocks(fixed), (j <= i) & ((i // 4 == j // 4) | (j % 4 == 3)))
    by_head = BlockSparse.fixed(n, 16, stride=4, summary=2, heads=3).layout
    assert torch.equal(by_head[0], (j <= i) & ((i // 4 == j // 4) | (j % 4 >= 2)))
    assert torch.equal(by_head[1], (j <= i) & ((i // 4 == j // 4) | (j % 4 < 2)))
    assert torch.equal(by_head[2], by_head[0])
    near = BlockSparse.longformer(n, 16, window=2, globals=(0, 5))
    special = (i == 0) | (i == 5) | (j == 0) | (j == 5)
    assert torch.equal(blocks(near), ((i - j).abs() <= 2) | special)


def test_bigbird_adds_random_blocks_to_each_row():
    n, random = 16, 3
    mask = BlockSparse.bigbird(n, 8, random=random, heads=4, seed=1)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    always = ((i - j).abs() <= 1) | (i == 0) | (i == n - 1) | (j == 0) | (j == n - 1)
    assert (mask.layout | ~always).all()
    assert torch.equal((mask.layout & ~always).sum(-1)[:, 1:-1], torch.full((4, n - 2), random))
    assert mask == BlockSparse.bigbird(n, 8, random=random, heads=4, seed=1)
    assert mask != BlockSparse.bigbird(n, 8, random=random, heads=4, seed=2)
    assert BlockSparse.bigbird(3, 8, random=5).layout.all()  # no more than there are


def test_blocks_of_a_dense_mask():
    dense = Causal().materialize(10, 7)
    blocks = BlockSparse.from_mask(dense, 4)
    assert torch.equal(blocks.materialize(10, 7) & dense, dense)
    tiled = layout(2, 3, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(BlockSparse.from_mask(tiled, 4).materialize(12, 8), tiled)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BlockSparse(torch.ones(2, 2), 4), "layout is float32 [2, 2]; it takes bool [nq, nk] or [H, nq, nk]"),
        (lambda: BlockSparse(layout(1, 2, 2), 0), "block_size is 0; it takes an integer >= 1"),
        (lambda: Dilated(-1, 2), "Dilated: window is -1; it takes an integer >= 0"),
        (lambda: Dilated(1, 0), "Dilated: step is 0; it takes an integer >= 1"),
        (lambda: Prefix(1.5), "Prefix: n is 1.5; it takes an integer >= 0"),
        (lambda: Band("x"), "Band: left is 'x'; it takes an integer"),
        (lambda: Full().materialize(-1, 3), "materialize: Nq is -1; it takes a length >= 0"),
        (lambda: BlockSparse.fixed(8, 4, stride=4, summary=3), "stride is 4 and summary is 3"),
        (lambda: functools.reduce(Or, [Dilated(1, k) for k in range(1, 20)]).encode(), "kernels take 16"),
    ],
)  # fmt: skip
def test_refusals(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


# ---- C++ ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native():
    if compiled_library() is None:
        pytest.skip("the compiled CPU library is missing")
    return compiled_library()


def seen_by_cpp(native, mask: Mask, Nq: int, Nk: int, h: int):
    code, layouts = lowered(mask)
    return native.SeenMask(code, [] if layouts is None else layouts.tolist(), Nq, Nk, h)


@pytest.mark.parametrize("masks", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_cpp_sees_what_python_sees(native, masks):
    for name, mask, Nq, Nk, allowed in each(masks, 1 if masks is SINGLE else 3):
        for h in range(HEADS):
            seen = seen_by_cpp(native, mask, Nq, Nk, h)
            found = [[seen.visible(i, j) for j in range(Nk)] for i in range(Nq)]
            assert torch.equal(torch.tensor(found, dtype=torch.bool).view(Nq, Nk), allowed[h]), (
                name,
                Nq,
                Nk,
            )


@pytest.mark.parametrize("masks", [BANDS, OTHERS, PAIRS], ids=["bands", "others", "pairs"])
def test_cpp_skips_what_may_be_skipped(native, masks):
    """A rectangle said to show none or all does; keys outside the range are not seen; bands are tight."""
    for name, mask, Nq, Nk, allowed in each(masks, 11 if masks is PAIRS else 1):
        seen = seen_by_cpp(native, mask, Nq, Nk, 1)
        for i0, i1 in itertools.combinations(range(Nq + 1), 2):
            begin, end = seen.keys(i0, i1)
            shown = allowed[1, i0:i1].any(0).nonzero().flatten().tolist()
            assert not shown or (begin <= shown[0] and shown[-1] < end), (name, Nq, Nk, i0, i1)
            if masks is BANDS and shown:
                assert (begin, end) == (shown[0], shown[-1] + 1), (name, Nq, Nk, i0, i1)
            for j0, j1 in itertools.combinations(range(Nk + 1), 2):
                part, said = allowed[1, i0:i1, j0:j1], seen.seen(i0, i1, j0, j1)
                assert said or not part.any(), (name, Nq, Nk, i0, i1, j0, j1)
                assert said < 2 or part.all(), (name, Nq, Nk, i0, i1, j0, j1)
                if masks is not PAIRS and not isinstance(mask, (Dilated, Window)):
                    exact = 2 if part.all() else int(part.any())
                    assert said == exact, (name, Nq, Nk, i0, i1, j0, j1)


def test_cpp_refuses_malformed_masks(native):
    band, both = Causal().encode(), [5, 0, 0, 0, 0, 0]
    for code, sentence in (
        ([7, 1, 1, 1, 1, 1], "mask kind is 7; compiled for 0 to 6"),
        ([0, 1, 1], "mask has 3 numbers; it takes 6 a node, at most 16 nodes"),
        ([], "mask has 0 numbers"),
        (band + both, "mask joins two parts where there are not two"),
        (band + band, "mask leaves 2 parts; they must be joined to one"),
        ([3, 0, 1, 2, 2, 4], "does not lie in the 0 given"),
        ([4, 0, 0, 0, 0, 0], "the mask names a bool tensor that is not given"),
        ([1, 5, 0, 0, 0, 0], "a dilated mask reaches 5 in steps of 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            native.SeenMask(code, [], 2, 2, 0)


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
    assert band is not None
    return max(Nk - Nq - band.left, -band.left_top) > min(Nk - Nq + band.right, band.right_top)


# ---- Triton -------------------------------------------------------------------------------------------

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from fastattn.kernels.common import triton_masks
    from fastattn.kernels.common.triton_pairs import Place

    @triton.jit(do_not_specialize=("Nq", "Nk", "h"))
    def answer(seen, ranges, mask, h, Nq, Nk, N: tl.constexpr, IS_BAND: tl.constexpr):
        """Visible pairs [N, N], and the ranges [2 or 4, 2, N, N] of every begin and end."""
        i = tl.arange(0, N)[:, None]
        j = tl.arange(0, N)[None, :]
        at = i * N + j
        shown = triton_masks.visible(mask, Place(0, h, Nq, Nk), i, j)
        tl.store(seen + at, shown & (i < Nq) & (j < Nk))
        begin, end = triton_masks.keys(mask, i, j, Nq, Nk)
        tl.store(ranges + at, tl.broadcast_to(begin, N, N))
        tl.store(ranges + N * N + at, tl.broadcast_to(end, N, N))
        begin, end = triton_masks.queries(mask, i, j, Nq, Nk)
        tl.store(ranges + 2 * N * N + at, tl.broadcast_to(begin, N, N))
        tl.store(ranges + 3 * N * N + at, tl.broadcast_to(end, N, N))
        if IS_BAND:
            begin, end = triton_masks.keys_all(mask, i, j, Nq, Nk)
            tl.store(ranges + 4 * N * N + at, tl.broadcast_to(begin, N, N))
            tl.store(ranges + 5 * N * N + at, tl.broadcast_to(end, N, N))
            begin, end = triton_masks.queries_all(mask, i, j, Nq, Nk)
            tl.store(ranges + 6 * N * N + at, tl.broadcast_to(begin, N, N))
            tl.store(ranges + 7 * N * N + at, tl.broadcast_to(end, N, N))

    @triton.jit(do_not_specialize=("Nq", "Nk", "h"))
    def classify(answers, mask, h, Nq, Nk, BM: tl.constexpr, BN: tl.constexpr):
        """What is found of each tile [BM, BN]."""
        num = tl.cdiv(Nk, BN)
        for i0 in tl.range(0, Nq, BM):
            for j0 in tl.range(0, Nk, BN):
                i1, j1 = tl.minimum(i0 + BM, Nq), tl.minimum(j0 + BN, Nk)
                found = triton_masks.found(mask, Place(0, h, Nq, Nk), i0, i1, j0, j1)
                tl.store(answers + i0 // BM * num + j0 // BN, found)


N = 16
TILE = (4, 2)
RANDOM = torch.Generator().manual_seed(0)
SEEN = torch.rand(2, N, N, generator=RANDOM) > 0.4
SEEN[:, 4:8] = True
SEEN[:, :, 4:10] &= SEEN[:, :1, :1]
LAYOUT = torch.rand(2, 5, 6, generator=RANDOM) > 0.4
OTHERS: dict[str, Mask] = {  # without operators; a tile of these is told exactly
    str(mask): mask
    for mask in (
        *(Prefix(n) for n in (0, 1, 4, 7, 100)),
        *(
            Dilated(w, step)
            for w, step in ((0, 1), (2, 1), (1, 3), (2, 2), (9, 5), (1, UNBOUNDED), (3, 1))
        ),
        *(BlockSparse(LAYOUT[:H], size) for H, size in ((1, 1), (2, 2), (2, 3), (1, 4), (2, 50))),
        BlockSparse(LAYOUT[:, :0], 3),
        BlockSparse(torch.ones(1, 9, 9, dtype=torch.bool), UNBOUNDED),
        Dense(),
    )
}
COMBINED: dict[str, Mask] = {
    str(mask): mask
    for mask in (
        Causal() | Prefix(3),
        Causal() & Dilated(2, 3),
        Prefix(6) & Causal("top-left") | Window(1, 1),
        (BlockSparse(LAYOUT, 3) | Band(left=0, right=0)) & Window(4, 2),
        Dense() & Causal(),
        Window(0, 0) | Dense() & BlockSparse(LAYOUT[:1], 2) | Prefix(1),
        (Band(left=-3) & Band(right=-3)) | Band(left=-4, right=4),
        (Dilated(1, 4) | Prefix(2)) & (Window(1, 0) | Dense())
        | (Dilated(2, 2) | Prefix(7)) & (Dense() | Causal("top-left")),
    )
}


def triton_grids(mask: Mask, step: int = 1):
    """(Nq, Nk, head, what Python materialises, the mask as kernels carry it), one grid of ``step``."""
    if why := why_no_triton():
        pytest.skip(f"triton: {why}")
    code, layouts = lowered(mask)
    device = triton_device()
    for Nq, Nk in GRIDS[::step]:
        dense = SEEN[None, :, :Nq, :Nk].to(device)
        allowed = materialize(code, Nq, Nk, None, layouts, dense.cpu())
        for h in range(2):
            of_head = allowed.expand(1, 2, Nq, Nk)[0, h]
            blocks = None if layouts is None else layouts.to(device)
            carried = triton_masks.encode(code, Nq, Nk, False, blocks, dense, *TILE)
            yield Nq, Nk, h, of_head, carried
            if allowed.dim() == 2:
                break


@functools.cache
def answers(band, Nq: int, Nk: int) -> tuple[torch.Tensor, list]:
    return ask(band, 0, Nq, Nk)


def ask(mask, h: int, Nq: int, Nk: int) -> tuple[torch.Tensor, list]:
    device = triton_device()
    seen = torch.zeros(N, N, dtype=torch.bool, device=device)
    ranges = torch.zeros(4, 2, N, N, dtype=torch.int32, device=device)
    answer[(1,)](seen, ranges, mask, h, Nq, Nk, N, triton_masks.is_band(mask))
    return seen[:Nq, :Nk].cpu(), ranges.tolist()


def slices(ranges: list, allowed: torch.Tensor):
    """(begin, end, the rows or columns that the range is about) for every range of the other axis."""
    for axis, (begins, ends) in enumerate(ranges):
        rows = allowed if axis % 2 == 0 else allowed.T
        for first, past in itertools.combinations(range(len(rows) + 1), 2):
            yield axis >= 2, begins[first][past], ends[first][past], rows[first:past]


BAND_PAIRS = [name for name, mask in PAIRS.items() if mask.band() is not None]


@pytest.mark.parametrize("name", [*BANDS, *BAND_PAIRS[::5]])
def test_triton_bands(name):
    """What is visible, and ranges: of the four, exactly the keys or queries of which some or all are."""
    mask = (BANDS | PAIRS)[name]
    for Nq, Nk, _, allowed, carried in triton_grids(mask, 1 if name in BANDS else 4):
        seen, ranges = answers(carried, Nq, Nk)
        assert torch.equal(seen, allowed), (name, Nq, Nk)
        for is_all, begin, end, part in slices(ranges, allowed):
            wanted = (part.all(0) if is_all else part.any(0)).nonzero().flatten().tolist()
            where = (name, Nq, Nk, is_all, begin, end, wanted)
            if wanted:
                assert (begin, end) == (wanted[0], wanted[-1] + 1), where
            else:  # a band that closes before it opens has no ends to be tight at
                assert begin >= end or carried.lo > carried.hi, where


@pytest.mark.parametrize("name", [*OTHERS, *COMBINED])
def test_triton_formulas(name):
    """What is visible; ranges hold all of it."""
    for Nq, Nk, h, allowed, carried in triton_grids((OTHERS | COMBINED)[name], 3):
        seen, ranges = ask(carried, h, Nq, Nk)
        assert torch.equal(seen, allowed), (name, Nq, Nk, h)
        for _, begin, end, part in slices(ranges[:2], allowed):
            wanted = part.any(0).nonzero().flatten().tolist()
            assert begin >= 0, (name, Nq, Nk, begin)
            if wanted:
                assert begin <= wanted[0] <= wanted[-1] < end, (name, Nq, Nk, begin, end, wanted)


@pytest.mark.parametrize("name", [*list(SINGLE)[::3], *OTHERS, *COMBINED])
def test_triton_tells_tiles(name):
    """NONE and ALL are said only where they hold, and wherever they hold unless operators combine."""
    BM, BN = TILE
    is_exact = name not in COMBINED
    for Nq, Nk, h, allowed, carried in triton_grids((SINGLE | OTHERS | COMBINED)[name], 5):
        num_i, num_j = -(-Nq // BM), -(-Nk // BN)
        if not num_i * num_j:
            continue
        found = torch.full((num_i, num_j), 9, dtype=torch.int32, device=triton_device())
        classify[(1,)](found, carried, h, Nq, Nk, BM, BN)
        for ti, tj in itertools.product(range(num_i), range(num_j)):
            tile = allowed[ti * BM : ti * BM + BM, tj * BN : tj * BN + BN]
            exact = 2 if tile.all() else 1 if tile.any() else 0
            said = int(found[ti, tj])
            assert said == exact or (said == 1 and not is_exact), (name, Nq, Nk, h, ti, tj, said)
