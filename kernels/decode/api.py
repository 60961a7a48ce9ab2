"""fastattn.attention_decode: the public function and the descriptor of attention over a cache.

One file because the function's arguments are checked for what the descriptor then passes on.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.arguments import optional_arguments, scale_of
from fastattn.backends import at_most, cpu, reference, takes, triton
from fastattn.bias import ALiBi, KeyBias, Relative, Toeplitz, expand, terms
from fastattn.checks import Axes, described, grouped_heads, unit_stride
from fastattn.choice import PROCESS
from fastattn.kernels.decode import packed
from fastattn.kernels.decode import reference as formula
from fastattn.masks import (
    UNBOUNDED,
    WIDTH,
    BlockSparse,
    Causal,
    Dilated,
    Full,
    Mask,
    Prefix,
    Window,
    materialize,
    pairs,
)
from fastattn.op import Case, Cost, Op, in_place
from fastattn.transforms import is_plain

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INTEGERS = (torch.int32, torch.int64)
FULL = Full().encode()
NEW = {"k_new": "B Hk Nnew D", "v_new": "B Hk Nnew Dv"}
DENSE = {"q": "B Hq Nq D", "k_cache": "B Hk Nmax D", "v_cache": "B Hk Nmax Dv"}
PAGED = {
    "q": "B Hq Nq D",
    "k_cache": "pages page_size Hk D",
    "v_cache": "pages page_size Hk Dv",
}
AXES = {  # (paged, with new tokens)
    (False, False): Axes("attention_decode", **DENSE),
    (False, True): Axes("attention_decode", **DENSE, **NEW),
    (True, False): Axes("attention_decode", **PAGED),
    (True, True): Axes("attention_decode", **PAGED, **NEW),
}

# ---- The descriptor -------------------------------------------------------------------------------------


def _fake(q, k_cache, v_cache, *_):
    B, Hq, Nq, _ = q.shape
    lse = F64 if q.dtype is F64 else F32
    return q.new_empty(B, Hq, Nq, v_cache.shape[3]), q.new_empty(B, Hq, Nq, dtype=lse)


def _capacity(k_cache, block_table):
    """How many tokens there is room for in each sequence."""
    return k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[1]


def _reference(
    q, k_cache, v_cache, lengths, block_table, sinks, slopes,
    bias, bias_index, bias2, bias2_index, weight, weight_index, visible, blocks, new, mask, scale, softcap, splits,
):  # fmt: skip
    B, Hq, Nq, _ = q.shape
    Nmax = _capacity(k_cache, block_table)
    packed.check_values(lengths, block_table, new, Nmax, *k_cache.shape[:2])
    totals = (lengths + new).clamp(0, Nmax).tolist()
    seen = torch.zeros(B, Hq, Nq, Nmax, dtype=torch.bool, device=q.device)
    added = torch.zeros(B, Hq, Nq, Nmax, dtype=_wide(q), device=q.device)
    factor = torch.ones_like(added)
    for b, n in enumerate(totals):  # each sequence by its own length

        def pairwise(values, index=None, b=b, n=n):
            x = expand(values, None if index is None else index[:, :n], Nq, n)
            return x[b % len(x), :, :, :n]

        known = None if visible is None else pairwise(visible)
        seen[b, :, :, :n] = materialize(mask, Nq, n, q.device, blocks, known)
        for values, index in ((bias, bias_index), (bias2, bias2_index)):
            if values is not None:
                added[b, :, :, :n] += pairwise(values, index)
        if slopes is not None:
            at = n - Nq + torch.arange(Nq, device=q.device)[:, None]
            away = (at - torch.arange(n, device=q.device)).abs()
            added[b, :, :, :n] -= slopes[:, None, None].to(added.dtype) * away
        if weight is not None:
            factor[b, :, :, :n] = pairwise(weight, weight_index)
    return formula.forward(
        q, k_cache, v_cache, block_table, seen, added, scale, softcap, sinks, factor if weight is not None else None
    )  # fmt: skip


def _wide(q):
    return F64 if q.dtype is F64 else F32


def _append(k_cache, v_cache, k_new, v_new, lengths, block_table, *, backend=""):
    # What the limits of the rows ask of q, they may ask of k_new.
    known = {"q": k_new, "k_cache": k_cache, "v_cache": v_cache, "mask": FULL}
    like = [known.get(name) for name in OP.arguments]
    row = OP.choose(like, backend)
    append = row.beside("append") if row.forward else _append_by_formula
    append(k_cache, v_cache, k_new, v_new, lengths, block_table)


def _append_by_formula(k_cache, v_cache, k_new, v_new, lengths, block_table):
    room = _capacity(k_cache, block_table)
    packed.check_values(lengths, block_table, k_new.shape[2], room, *k_cache.shape[:2])
    formula.append(k_cache, v_cache, k_new, v_new, lengths, block_table)


APPEND = in_place(
    "attention_decode_append",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new, Tensor lengths, Tensor? block_table)"
    " -> ()",
    _append,
)

# ---- What is proved and timed ---------------------------------------------------------------------------


def _make(case: Case, randn: Any) -> dict[str, Any]:
    B, Hq, Hk, D, Dv = case.B, case.Hq, case.Hk or case.Hq, case.D, case.Dv or case.D
    given = (case.given or "").split()
    q = randn(B, Hq, case.Nq, D)
    new = (case.Nnew or case.Nq) if "new" in given else 0
    known = case.lengths or (case.Nmax - new,) * B
    call: dict[str, Any] = {"q": q, "lengths": torch.tensor(known, dtype=torch.int32)}
    if case.page:
        per_sequence = -(-case.Nmax // case.page)
        pages = B * per_sequence + 2
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        table = order[: B * per_sequence].view(B, per_sequence).int()
        shape = (pages, case.page, Hk)
        call["block_table"] = table
    else:
        shape = (B, Hk, case.Nmax)
    call |= {"k_cache": randn(*shape, D), "v_cache": randn(*shape, Dv)}
    if case.layout != "broadcast" and (
        case.page or min(known, default=case.Nmax) + new < case.Nmax
    ):
        _poison(call, new)
    if new:
        call |= {"k_new": randn(B, Hk, new, D), "v_new": randn(B, Hk, new, Dv)}
    if "sinks" in given:
        call["sinks"] = randn(Hq)
    if "bias" in given:
        call["bias"] = ALiBi(2.0 ** -torch.arange(1.0, Hq + 1))
    if case.terms:
        call["bias"] = [_term(case, kind, randn) for kind in case.terms.split("+")]
    if case.weight:
        call["weight"] = _term(case, case.weight, randn)
    if "heads" in given:
        call["head_map"] = torch.arange(Hq).flip(0) % Hk
    if case.visible:
        call["mask"] = randn(B, Hq, case.Nq, case.Nmax) > -0.5
    for name in ("lengths", "block_table", "head_map"):
        if name in call:
            call[name] = call[name].to(q.device)
    options = ("mask", "causal", "scale", "softcap", "num_splits", "clip", "dropout", "seed")
    return call | {n: getattr(case, n) for n in options if getattr(case, n) is not None}


def _term(case: Case, kind: str, randn: Any) -> Any:
    if kind == "alibi":
        return ALiBi(randn(case.Hq, wide=True).abs() / 4)
    if kind == "toeplitz":
        return Toeplitz(randn(case.Hq, 2 * case.Nmax + 3, wide=True))
    if kind == "relative":
        index = (torch.arange(case.Nq)[:, None] * 5 + torch.arange(case.Nmax) * 3) % 13
        return Relative(randn(13, case.Hq, wide=True), index.to(randn(1).device))
    if kind == "key":
        return KeyBias(randn(case.B, 1, case.Nmax, wide=True))
    return randn(1, case.Hq, case.Nq, case.Nmax, wide=kind == "wide")


def _poison(call: dict[str, Any], new: int) -> None:
    """NaN wherever no token is cached, pages that do not exist wherever no page is used."""
    lengths, table, k_cache = call["lengths"], call.get("block_table"), call["k_cache"]
    rows = torch.arange(_capacity(k_cache, table))
    is_token = rows < lengths[:, None]  # [B, Nmax]
    if table is None:
        unused = ~is_token[:, None, :, None]
    else:
        page_size = k_cache.shape[1]
        used = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
        used[table.long()] = is_token.view(*table.shape, page_size)
        unused = ~used[:, :, None, None]
        is_page = rows[: table.shape[1]] * page_size < lengths[:, None] + new
        table.masked_fill_(~is_page, -7)
    for name in ("k_cache", "v_cache"):
        call[name].masked_fill_(unused.to(call[name].device), float("nan"))


def _cost(case: Case, size: int) -> Cost:
    """Two products a pair; every visible token of the cache once through memory."""
    D, Dv, Hk, Nq, given = case.D, case.Dv or case.D, case.Hk or case.Hq, case.Nq, case.given or ""
    new = (case.Nnew or Nq) if "new" in given else 0
    totals = [n + new for n in case.lengths or (case.Nmax - new,) * case.B]
    mask = (case.mask or Full()).band() or Full()
    mask = Causal() & mask if new or case.causal else mask
    left, right, left_top, right_top = mask.encode()[1:5]
    work = keys = 0
    for n in totals:
        first, last = (
            max(n - Nq - left, -left_top, 0),
            min(n - 1 + right, Nq - 1 + right_top, n - 1),
        )
        keys += max(last + 1 - first, 0)
        work += 2 * case.Hq * pairs(mask, Nq, n)
    moved = (Hk * keys + case.B * case.Hq * Nq) * (D + Dv) * size
    return Cost(work * (D + Dv), 0, moved, 0)


def _peers(q, k_cache, v_cache, lengths, mask=None, causal=False, scale=None, **others):
    """PyTorch's attention over caches that need nothing but a mask; grouped heads in each way that it has."""
    B, Hq, Nq, _ = q.shape
    if others or not lengths.numel() or int(lengths.min()) == 0:
        return {}
    mask = Causal() & (mask or Full()) if causal else mask or Full()
    group = Hq // k_cache.shape[1]
    copies: dict[int, torch.Tensor] = {}

    def attend(q, k_cache, v_cache, lengths, gqa=False):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        options = {"scale": scale, "enable_gqa": gqa}
        if mask == Full() and int(lengths.min()) == k_cache.shape[2]:
            return sdpa(q, k_cache, v_cache, **options)
        parts = [
            sdpa(q[b : b + 1], k_cache[b : b + 1, :, :n], v_cache[b : b + 1, :, :n],
                 attn_mask=mask.materialize(Nq, n, q.device), **options)
            for b, n in enumerate(lengths.tolist())
        ]  # fmt: skip
        return torch.cat(parts)

    def expanded(cache):
        if cache.data_ptr() not in copies:
            copies[cache.data_ptr()] = cache.repeat_interleave(group, 1)
        return copies[cache.data_ptr()]

    def folded(q, k_cache, v_cache, lengths):
        """The heads of a group as queries of one head."""
        o = attend(q.reshape(B, Hq // group, group, -1), k_cache, v_cache, lengths)
        return o.reshape(B, Hq, 1, -1)

    if group == 1:
        return {"torch sdpa": attend}
    ways = {
        "torch sdpa gqa": lambda q, k_cache, v_cache, lengths: attend(
            q, k_cache, v_cache, lengths, True
        ),
        "torch sdpa expanded": lambda q, k_cache, v_cache, lengths: attend(
            q, expanded(k_cache), expanded(v_cache), lengths
        ),
    }
    return ways | ({"torch sdpa folded": folded} if Nq == 1 and mask == Full() else {})


_MASKS = (None, Causal(), Window(9, 0), Window(3, 5) & Causal("top-left"))
_LAYOUT = torch.rand(4, 1, 9, generator=torch.Generator().manual_seed(2)) > 0.5
_FORMULAS = (Prefix(4) | Window(20, 0), Dilated(40, 3) & Causal(), BlockSparse(_LAYOUT, 11))

OP = Op(
    "attention_decode",
    forward="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? sinks,"
    " Tensor? alibi_slopes, Tensor? bias, Tensor? bias_index, Tensor? bias2, Tensor? bias2_index, Tensor? weight,"
    " Tensor? weight_index, Tensor? visible, Tensor? blocks, SymInt num_new, SymInt[] mask, float scale, float softcap, SymInt num_splits)"
    " -> (Tensor o, Tensor lse)",
    backward="",
    fake=_fake,
    fake_backward=None,
    facts={
        "device": "'cpu' if q.is_cpu else q.device.type",
        "dtype": "q.dtype",
        "D": "q.shape[3]",
        "Dv": "v_cache.shape[3]",
        "pairs": "bias is not None or weight is not None or len(mask) > 6 or mask[0] != 0",
    },
    reference=_reference,
    backends=(
        *cpu("attention_decode", takes("dtype", F32, BF16, F16), at_most("D", 1024), at_most("Dv", 1024)),
        triton("decode", takes("dtype", F32, BF16, F16), at_most("D", 256), at_most("Dv", 256),
               takes("pairs", False)),
        reference(),
    ),
    cases=[
        *(Case(B=2, Hq=hq, Hk=2, Nq=nq, Nmax=75, D=32, lengths=lengths, mask=mask)
          for hq, nq in ((2, 1), (8, 3)) for lengths in ((1, 67), (75, 0), (5, 64)) for mask in _MASKS),
        *(Case(B=1, Hq=hq, Hk=hk, Nq=nq, Nmax=150, D=d, Dv=dv, lengths=(149,))
          for hq, hk, nq, d, dv in ((8, 2, 1, 64, None), (16, 2, 1, 128, None), (8, 8, 1, 80, None), (4, 2, 1, 96, 64),
                                    (7, 1, 1, 64, 40), (5, 1, 3, 128, 128), (3, 3, 1, 17, 3), (6, 2, 2, 256, 1),
                                    (2, 1, 1, 1, 200), (4, 1, 1, 576, 512))),
        *(Case(B=3, Hq=4, Hk=2, Nq=nq, Nmax=96, D=48, lengths=(40, 0, 90), given=given, mask=mask)
          for nq in (1, 3) for given in ("new", "new sinks bias", "sinks", "bias") for mask in (None, Window(20, 0))),
        *(Case(B=3, Hq=8, Hk=2, Nq=nq, Nmax=96, page=page, D=64, lengths=(33, 0, 91), given=given)
          for nq in (1, 3) for page in (1, 16, 7) for given in ("", "new sinks")),
        *(Case(B=2, Hq=4, Hk=2, Nq=2, Nmax=70, D=48, lengths=(70, 31), causal=True, layout=how, page=page)
          for how in ("transposed", "sliced", "broadcast", "last-axis") for page in (None, 10)),
        *(Case(B=1, Hq=4, Hk=2, Nq=2, Nmax=60, D=40, softcap=cap, scale=scale, given=given)
          for cap, scale, given in ((5.0, None, ""), (0.7, 1.0, "bias"), (30.0, -0.3, "new sinks"))),
        *(Case(B=2, Hq=4, Hk=1, Nq=1, Nmax=1400, D=64, lengths=(1399, 700), num_splits=n, given="sinks")
          for n in (None, 1, 5)),
        Case(B=2, Hq=8, Hk=2, Nq=3, Nmax=1300, D=128, lengths=(1290, 30), page=64, given="new", mask=Window(600, 0)),
        *(Case(B=3, Hq=4, Hk=2, Nq=nq, Nmax=96, D=48, lengths=(40, 0, 90), given=given, mask=mask)
          for nq, given in ((1, ""), (3, "new")) for mask in _FORMULAS),
        *(Case(B=2, Hq=4, Hk=2, Nq=2, Nmax=150, D=64, lengths=(149, 60), terms=kind)
          for kind in ("alibi+dense", "toeplitz", "relative", "key", "wide", "toeplitz+key")),
        *(Case(B=2, Hq=4, Hk=2, Nq=2, Nmax=150, D=64, lengths=(148, 60), weight=kind, given="new sinks")
          for kind in ("dense", "toeplitz")),
        Case(B=2, Hq=8, Hk=2, Nq=1, Nmax=700, D=64, lengths=(699, 60), terms="key+toeplitz", visible=True, page=20, softcap=9.0),
        *(Case(B=3, Hq=4, Hk=2, Nq=nq, Nmax=96, page=page, D=48, lengths=(40, 0, 90), given=given, clip=clip,
               dropout=dropout, seed=dropout and 7, terms=terms, mask=mask)
          for nq, page, given, clip, dropout, terms, mask in (
              (1, None, "", (-0.1, 1.2), None, None, None), (3, 7, "new sinks", (-0.02, 1.0), 0.3, None, Window(30, 0)),
              (2, None, "heads new", None, None, None, None), (1, 16, "heads bias", None, 0.2, None, None),
              (2, 10, "", (-0.03, 1.1), None, "toeplitz+dense", Dilated(40, 3)))),
        Case(B=2, Hq=4, Hk=2, Nq=2, Nmax=70, D=48, lengths=(70, 31), layout="sliced", clip=(-0.1, 1.0)),
        Case(B=0, Hq=2, Nq=1, Nmax=4, D=8, clip=(-0.1, 1.0)),
        Case(B=2, Hq=2, Nq=1, Nmax=0, D=8, given="sinks", dropout=0.5, seed=1),
        Case(B=2, Hq=2, Nq=3, Nmax=5, D=8, Nnew=2, lengths=(0, 3), given="new"),
        Case(B=1, Hq=2, Nq=5, Nmax=9, D=8, lengths=(2,), causal=True, given="sinks"),
        Case(B=0, Hq=2, Nq=1, Nmax=4, D=8),
        Case(B=1, Hq=2, Nq=0, Nmax=4, D=8),
        Case(B=2, Hq=2, Nq=1, Nmax=0, D=8, given="sinks"),
    ],
    make=_make,
    cost=_cost,
    bench=[
        Case(B=1, Hq=32, Hk=32, Nq=1, Nmax=8192, D=128),
        Case(B=1, Hq=32, Hk=8, Nq=1, Nmax=8192, D=128),
        Case(B=1, Hq=32, Hk=8, Nq=1, Nmax=8192, D=128, page=64),
        Case(B=1, Hq=32, Hk=8, Nq=3, Nmax=8192, D=128),
        Case(B=1, Hq=32, Hk=8, Nq=1, Nmax=256, D=128),
    ],
    peers=_peers,
)  # fmt: skip

# ---- The functions --------------------------------------------------------------------------------------


@OP
def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    causal: bool = False,
    mask: Mask | torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: Any = None,
    weight: Any = None,
    clip: tuple[float, float] | None = None,
    head_map: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries over a cache of keys and values, each sequence to its own length; for inference.

    q [B, Hq, Nq, D], k_cache [B, Hk, Nmax, D], v_cache [B, Hk, Nmax, Dv], lengths int [B] -> o [B, Hq, Nq, Dv].

    lengths      tokens that each sequence has in the cache, before k_new; what lies behind is not read
    block_table  int [B, pages of a sequence]: k_cache is [pages, page_size, Hk, D], v_cache alike, and token j of
                 sequence b lies in page block_table[b, j // page_size]
    k_new, v_new [B, Hk, Nnew, D] and [B, Hk, Nnew, Dv] are first written into the caches, behind the others
    causal       short for ``mask=Causal() & mask``; implied by k_new.  Without either, all tokens are visible
    mask         a value of ``fastattn.masks``, relative to each sequence's own length; or a bool tensor that
                 broadcasts to [B, Hq, Nq, Nmax], True where i may attend to token j
    scale        of the logits; D ** -0.5 when None
    softcap      s becomes softcap * tanh(s / softcap)
    sinks        [Hq]: a logit of each head that is in the denominator only
    bias         an ALiBi, or anything with ``slopes`` float32 [Hq]: adds -slope * |position of i - j|; or as in
                 ``attention``, where Nk is Nmax, tables by offset count from each query's own position, and a list adds
    weight       multiplies p, which is not normalised again: a float tensor, ``Toeplitz`` or ``Relative``
    clip, head_map, dropout, seed
                 as in ``attention``
    return_lse   also give lse [B, Hq, Nq], the natural log of the softmax denominator
    num_splits   parts into which each sequence's tokens are divided among threads; None: by its length alone
    backend      None: the first that accepts; a name: that one, or an error that says why not

    Query i stands at position length + Nnew - Nq + i.  A row that sees nothing gives o = 0, and lse = its sink or
    -inf.  There are no gradients: where one is wanted, use ``fastattn.attention``.

    >>> import torch, fastattn as fa
    >>> k_cache, v_cache = torch.zeros(2, 1, 2, 100, 8)        # [B, Hk, Nmax, D]
    >>> q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    >>> lengths = torch.tensor([41])
    >>> fa.attention_decode(q, k_cache, v_cache, lengths, k_new=k, v_new=v).shape
    torch.Size([1, 4, 1, 8])
    >>> torch.equal(k_cache[:, :, 41:42], k)
    True
    """
    is_new = k_new is not None
    if is_new is not (v_new is not None):
        raise ValueError("attention_decode: k_new and v_new come together; one of them is None")
    if torch._C._is_any_autocast_enabled():
        q, k_new, v_new = _in_the_dtype_of(k_cache, q, k_new, v_new)
    given = (q, k_cache, v_cache, k_new, v_new) if is_new else (q, k_cache, v_cache)
    axes = AXES[block_table is not None, is_new](*given)
    B, Hq, Nq, D = axes[:4]
    Hk = axes[4] if block_table is None else axes[6]
    new = axes[-1] if is_new else 0
    if head_map is None:
        grouped_heads("attention_decode", Hq, Hk)
    _check_integers("lengths", lengths, (B,), q)
    if block_table is not None:
        _check_integers("block_table", block_table, (B, None), q)
    if max(Nq, _capacity(k_cache, block_table)) > UNBOUNDED:
        raise ValueError(
            f"attention_decode: Nq is {Nq} and the cache holds {_capacity(k_cache, block_table)}; "
            f"sequences have at most {UNBOUNDED} tokens"
        )
    room = _capacity(k_cache, block_table)
    sizes = B, Hq, Nq, -max(room, 1)  # each sequence has its own number of tokens
    slopes = getattr(bias, "slopes", None)
    is_alibi = isinstance(slopes, torch.Tensor)
    more = clip is not None or head_map is not None or dropout != 0.0
    extras, code, numbers = optional_arguments(
        "attention_decode", q, (B, Hq, Nq, room), Hk, mask, causal or is_new, scale_of("attention_decode", scale, D),
        softcap, None if is_alibi else bias, sinks, clip, weight, head_map, dropout, seed, pairs=sizes,
    )  # fmt: skip
    if is_alibi:
        slopes = _slopes(slopes.to(q.device), Hq, q)
    if not torch.compiler.is_compiling() and is_plain():
        _check_sizes(extras, Nq, lengths, new)
    if torch.is_grad_enabled():
        _refuse_gradients(
            q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new, sinks=sinks, weight=extras[4],
            bias=slopes if is_alibi else extras[0], bias2=extras[2],
        )  # fmt: skip
    backend = PROCESS.backend("attention_decode", backend)
    if num_splits is not None and (
        not isinstance(num_splits, int) or isinstance(num_splits, bool) or num_splits < 1
    ):
        raise ValueError(
            f"attention_decode: num_splits is {num_splits!r}; it takes None or an integer >= 1"
        )
    if is_new:
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            _check_writable(name, cache)
        APPEND(
            k_cache, v_cache, unit_stride(k_new), unit_stride(v_new), lengths, block_table, backend=backend
        )  # fmt: skip
    beside = any(t is not None for t in extras[:6]) or len(code) > WIDTH or code[0] != 0
    if more or (beside and not (q.is_cpu and backend != "triton")):
        if is_alibi:
            (term,) = terms("attention_decode", "bias", ALiBi(slopes), sizes, q.dtype)
            extras = (term.values, term.index, *extras[2:])
        o, lse = packed.attend(
            q, k_cache, v_cache, lengths, block_table, new, room, extras, code, numbers, backend
        )  # fmt: skip
        return (o, lse) if return_lse else o
    *added, of_weight, weight_index, sinks, visible, blocks = extras[:9]
    o, lse = OP.call(
        unit_stride(q), unit_stride(k_cache), unit_stride(v_cache), lengths, block_table,
        sinks, slopes if is_alibi else None, *added, of_weight, weight_index, visible, blocks,
        new, code, *numbers[:2], num_splits or 0, backend=backend,
    )  # fmt: skip
    return (o, lse) if return_lse else o


# ---- Refusals -------------------------------------------------------------------------------------------


def _check_sizes(extras: Any, Nq: int, lengths: torch.Tensor, new: int) -> None:
    """What kernels would find too small for a sequence, when the new tokens are written already."""
    if not lengths.is_cpu or not lengths.numel():
        return
    longest = int(lengths.max()) + new
    for name, values, index in zip(("bias", "bias", "weight"), extras[:6:2], extras[1:6:2]):
        if values is None:
            continue
        wanted = f"[Nq, Nk] = [{Nq}, {longest} or more]"
        if index is not None:
            held, fine = index.shape, index.shape[0] >= Nq and index.shape[1] >= longest
        elif values.dim() == 2:
            held, wanted = values.shape, f"2 L - 1 offsets with L >= {max(Nq, longest)}"
            fine = values.shape[1] + 1 >= 2 * max(Nq, longest)
        else:
            held, wanted = values.shape[2:], wanted + ", or 1"
            fine = held[0] in (1, Nq) and (held[1] == 1 or held[1] >= longest)
        if not fine:
            raise ValueError(f"attention_decode: {name} is for {list(held)}; it takes {wanted}")


def _check_integers(name: str, t: Any, shape: tuple[int | None, ...], q: torch.Tensor) -> None:
    if (
        isinstance(t, torch.Tensor)
        and t.dtype in INTEGERS
        and t.layout is torch.strided
        and t.device == q.device
        and t.dim() == len(shape)
        and all(n is None or n == size for n, size in zip(shape, t.shape))
    ):
        return
    takes = ", ".join("pages of a sequence" if n is None else str(n) for n in shape)
    raise ValueError(
        f"attention_decode: {name} is {described(t)}; with q {described(q)} it takes [{takes}] of int32 or int64"
    )


def _slopes(t: torch.Tensor, Hq: int, q: torch.Tensor) -> torch.Tensor:
    if not (
        t.is_floating_point()
        and t.layout is torch.strided
        and t.shape == (Hq,)
        and t.device == q.device
    ):
        raise ValueError(
            f"attention_decode: bias.slopes is {described(t)}; with q {described(q)} it takes [{Hq}] of float32"
        )
    wide = _wide(q)
    return unit_stride(t if t.dtype is wide else t.to(wide))


def _refuse_gradients(**tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        name = name.removesuffix("2")  # the second bias
        if t is not None and t.requires_grad:
            raise ValueError(
                f"attention_decode: {name} requires grad, and this function is for inference: call it under "
                "torch.no_grad(), or fastattn.attention, which has gradients"
            )


def _check_writable(name: str, cache: torch.Tensor) -> None:
    if cache.stride(-1) != 1 and cache.shape[-1] > 1:
        raise ValueError(
            f"attention_decode: {name} has stride {cache.stride(-1)} on its last axis; with k_new it must be 1"
        )
    if 0 in cache.stride() and any(
        step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape)
    ):
        raise ValueError(
            f"attention_decode: {name} has strides {list(cache.stride())} for {list(cache.shape)}: several "
            "tokens in one place, where k_new cannot be written"
        )


def _in_the_dtype_of(cache: Any, *tensors: Any) -> tuple[Any, ...]:
    """Under autocast the cache decides: it cannot be cast at every step."""
    if not isinstance(cache, torch.Tensor) or not torch.is_autocast_enabled(cache.device.type):
        return tensors
    return tuple(
        t.to(cache.dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in tensors
    )
