"""What proves and times attention: cases, their inputs, what they cost, and who else computes them."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.bias import ALiBi, KeyBias, Relative, Toeplitz
from fastattn.groups import Groups
from fastattn.masks import BlockSparse, Causal, Dilated, Full, Prefix, Window, pairs
from fastattn.op import Case, Cost

_LETTERS = {"B": "B", "H": "Hq", "N": "Nq", "M": "Nk"}


def _shape(case: Case, letters: str) -> list[int]:
    """ "1HNM" -> [1, Hq, Nq, Nk]"""
    return [1 if x == "1" else getattr(case, _LETTERS[x]) for x in letters]


def _pairwise(case: Case, kind: str, randn: Any) -> Any:
    L = max(case.Nq, case.Nk)
    if kind == "alibi":
        return ALiBi(randn(case.Hq, wide=True).abs() / 4)
    if kind == "toeplitz":
        return Toeplitz(randn(case.Hq, 2 * L + 3, wide=True))
    if kind == "relative":
        q = randn(1)
        i, j = torch.arange(case.Nq)[:, None], torch.arange(case.Nk)
        return Relative(randn(13, case.Hq, wide=True), ((i * 5 + j * 3) % 13).to(q.device))
    if kind == "key":
        return KeyBias(randn(case.B, 1, case.Nk, wide=True))
    x = randn(*_shape(case, kind.removeprefix("wide:")), wide=kind.startswith("wide:"))
    return x


def make(case: Case, randn: Any) -> dict[str, Any]:
    D, Hk = case.D, case.Hk or case.Hq
    call = {
        "q": randn(case.B, case.Hq, case.Nq, D),
        "k": randn(case.B, Hk, case.Nk, D),
        "v": randn(case.B, Hk, case.Nk, case.Dv or D),
    }
    of_pairs = case  # whose B, Nq and Nk biases have
    if case.groups:
        call |= {"function": "grouped_attention", "combine": case.combine or "only"}
        if case.combine:
            call["return_lse"] = False  # of which there is none
        call["groups"], key_groups = _groups(case, call["q"].device)
        if key_groups:
            call["key_groups"] = key_groups
        sizes = [int(g.ends.diff().max()) for g in (call["groups"], key_groups or call["groups"])]
        num = call["groups"].num * (case.B if case.each else 1)
        of_pairs = case.but(B=num, Nq=sizes[0], Nk=sizes[1])
    if case.topk:
        call |= {"function": "topk_attention", "topk": case.topk}
        if case.exact and call["q"].dtype != torch.float64:
            # logits without rounding, some of them equal; but finite differences want none
            call |= {name: (8 * call[name]).round() / 8 for name in "qk"}
    if case.bias:
        biases = [_pairwise(of_pairs, kind, randn) for kind in case.bias.split("+")]
        call["bias"] = biases if len(biases) > 1 else biases[0]
    if case.weight:
        call["weight"] = _pairwise(of_pairs, case.weight, randn)
    if case.sinks:
        call["sinks"] = randn(case.Hq, wide=True)
    if case.visible:
        call["mask"] = randn(*_shape(case, case.visible)) > -0.5
    if case.heads:
        call["head_map"] = torch.tensor(case.heads, device=call["q"].device)
    names = ("mask", "causal", "scale", "softcap", "clip", "dropout", "seed")
    call |= {key: getattr(case, key) for key in names if getattr(case, key) is not None}
    return call if case.lengths is None else _packed(case, call, randn)


def _packed(case: Case, call: dict[str, Any], randn: Any) -> dict[str, Any]:
    """The same call on sequences of (Nq, Nk) = ``case.lengths`` end to end."""
    ends = torch.tensor([(0, 0), *case.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    Tq, Tk = ends[-1].tolist()
    Hk, device = case.Hk or case.Hq, call["q"].device
    return call | {
        "q": randn(Tq, case.Hq, case.D),
        "k": randn(Tk, Hk, case.D),
        "v": randn(Tk, Hk, case.Dv or case.D),
        "cu_seqlens_q": ends[:, 0].contiguous().to(device),
        "cu_seqlens_k": ends[:, 1].contiguous().to(device),
        "function": "attention_varlen",
    }


def _groups(case: Case, device: Any) -> tuple[Groups, Groups | None]:
    """Groups of queries, and of keys if others; of grids 10 wide, but for "swin"."""
    generator, Hk = torch.Generator().manual_seed(3), case.Hk or case.Hq
    kind, N, Nk, grid = case.groups, case.Nq, case.Nk, (case.Nq // 10, 10)

    def drawn(*shape: int) -> torch.Tensor:  # no token twice
        sets = torch.rand(*shape[:2], N, generator=generator).argsort(-1).to(torch.int32)
        return sets[..., : torch.Size(shape[2:]).numel()].reshape(shape)

    key_groups = None
    if kind == "swin":
        groups = Groups.windows((56, 56), 7, shift=3 if case.shifted else 0)
    elif kind == "windows":
        groups = Groups.windows(grid, (3, 5))
    elif kind == "shifted":
        groups = Groups.windows(grid, (3, 5), shift=(1, 2))
    elif kind == "stripes":
        groups = Groups.windows(grid, stripes=2)
    elif kind == "sets":
        index = drawn(case.B, Hk, 2, N // 2 - 3)
        groups = Groups(index.masked_fill(index % 7 == 3, -1))
    elif kind == "ragged":
        ends = torch.tensor([0, 5, 5, N // 2, N // 2 + 1, N - 2], dtype=torch.int32)
        groups = Groups(drawn(1, Hk, N - 2), ends)
    else:  # tokens in several groups, and some twice in one
        draw = torch.randint(-1, N, (case.B, Hk, 5, 17), generator=generator)
        groups = Groups(draw)
        if kind == "keys":
            groups = Groups(drawn(1, 1, 5, N // 5))
            key_groups = Groups(torch.randint(0, Nk, (1, Hk, 5, 23), generator=generator))
    return groups.to(device), key_groups.to(device) if key_groups else None


def cost(case: Case, size: int) -> Cost:
    """Two products of 2 D flops a pair forward, five backward; every tensor once through memory."""
    D, Dv, Hk = case.D, case.Dv or case.D, case.Hk or case.Hq
    mask, lengths = case.mask or Full(), case.lengths or [(case.Nq, case.Nk)] * case.B
    seen = sum(pairs(mask, n, m) for n, m in lengths)
    if case.groups == "swin":
        seen = case.B * case.Nq * 49
    work = 2 * case.Hq * seen
    queries, keys = (
        (H * sum(length) * (D + Dv) * size for H, length in zip((case.Hq, Hk), zip(*lengths)))
        if lengths
        else (0, 0)
    )
    return Cost(work * (D + Dv), work * (3 * D + 2 * Dv), queries + keys, 2 * (queries + keys))


def peers(q, k, v, mask=None, scale=None, bias=None, **others):
    """PyTorch's own: its causal flag where that means the same, else its dense mask; nothing for what it lacks."""
    if others.get("function") == "attention_varlen":
        return _packed_peers(q, k, v, mask, scale, bias, **others)
    if others.get("function") == "grouped_attention":
        return _grouped_peers(q, k, v, mask, scale, bias, **others)
    if others.get("function") == "topk_attention":
        return _topk_peers(q, k, v, mask, scale, bias, **others)
    if others or (bias is not None and not isinstance(bias, torch.Tensor)):
        return {}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if bias is not None:
        if mask is not None:
            return {}
        return {
            "torch sdpa": lambda q, k, v, bias: sdpa(q, k, v, attn_mask=bias.to(q.dtype), **options)
        }
    if isinstance(mask, torch.Tensor):
        return {"torch sdpa": lambda q, k, v: sdpa(q, k, v, attn_mask=mask, **options)}
    if mask == Causal() and q.shape[2] == k.shape[2]:
        return {"torch sdpa": lambda q, k, v: sdpa(q, k, v, is_causal=True, **options)}
    if mask not in (None, Full()):
        options["attn_mask"] = mask.materialize(q.shape[2], k.shape[2], q.device)
    return {"torch sdpa": lambda q, k, v: sdpa(q, k, v, **options)}


def _packed_peers(q, k, v, mask, scale, bias, function, cu_seqlens_q, cu_seqlens_k, **others):
    """PyTorch's, sequence by sequence."""
    causal = mask == Causal() and torch.equal(cu_seqlens_q, cu_seqlens_k)
    if others or bias is not None or not (causal or mask is None):
        return {}
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    def one_by_one(q, k, v):
        outs = []
        for b in range(len(ends_q) - 1):
            of_q, of_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
            outs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *(t.transpose(0, 1)[None] for t in (q[of_q], k[of_k], v[of_k])),
                    is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
                )[0].transpose(0, 1)
            )  # fmt: skip
        return torch.cat(outs)

    return {"torch sdpa": one_by_one}


def _grouped_peers(q, k, v, mask, scale, bias, function, groups, combine, **others):
    """PyTorch's on rows gathered group by group, and put back: as windowed attention is written."""
    alike = (
        groups.slots.shape[:3] == (1, 1, 1)
        and groups.is_regular
        and bool((groups.slots >= 0).all())
    )
    if (
        others
        or mask is not None
        or combine != "only"
        or not isinstance(bias, torch.Tensor)
        or not alike
    ):
        return {}
    token, num = groups.slots[0, 0, 0].long(), groups.num

    def gathered(q, k, v, bias):
        B, H, N, _ = q.shape
        q, k, v = (
            t[:, :, token].unflatten(2, (num, -1)).transpose(1, 2).flatten(0, 1) for t in (q, k, v)
        )
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), scale=scale
        )
        o = o.unflatten(0, (B, num)).transpose(1, 2).flatten(2, 3)
        return torch.empty_like(o).index_copy(2, token, o)

    return {"torch sdpa": gathered}


def _topk_peers(q, k, v, mask, scale, bias, function, topk, **others):
    """The greatest logits as a mask, which PyTorch has no other word for."""
    if others or mask is not None or bias is not None or q.shape[1] != k.shape[1]:
        return {}

    def masked(q, k, v):
        s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden = torch.full_like(s, float("-inf"))
        return (s + hidden.scatter(-1, s.topk(topk).indices, 0.0)).softmax(-1) @ v

    return {"torch": masked}


_MASKS = (
    None,
    Causal(),
    Causal("top-left"),
    Window(7, 0),
    Window(3, 5),
    Causal("top-left") & Window(20, 2),
)
_LENGTHS = ((1, 1), (33, 33), (5, 40), (40, 5), (65, 131), (130, 67), (0, 3), (3, 0))
_LAYOUT = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(5)) > 0.6
_FORMULAS = (
    Dilated(4, 3),
    Causal() & Dilated(9, 5),
    Causal() | Prefix(21),
    Prefix(40) & Window(30, 30),
    BlockSparse(_LAYOUT, 20),
    BlockSparse(_LAYOUT[:1], 16) & Causal() | Window(2, 2),
    BlockSparse.bigbird(9, 16, random=1, heads=2),
)
_BIASES = ("BHNM", "1HNM", "B1NM", "11NM", "1H1M", "BHN1", "wide:1HNM", "wide:BHNM",
           "alibi", "toeplitz", "relative", "key", "1HNM+key")  # fmt: skip
_RAGGED = ((70, 140), (0, 5), (1, 1), (33, 17), (7, 0), (129, 129))
_PACKED = {"B": 6, "Hq": 4, "Hk": 2, "Nq": 129, "Nk": 140, "D": 32}
_GROUPED = {"B": 2, "Hq": 2, "Nq": 60, "Nk": 60, "D": 32}
_SMALL = {"B": 2, "Hq": 2, "Nq": 37, "Nk": 140, "D": 32}

CASES = [
    *(Case(B=2, Hq=2, Nq=n, Nk=m, D=32, mask=mask) for n, m in _LENGTHS for mask in _MASKS),
    *(Case(B=1, Hq=4, Hk=hk, Nq=37, Nk=70, D=d, Dv=dv, mask=Causal())
      for hk, d, dv in ((1, 64, 64), (2, 64, 40), (4, 128, 64), (2, 1, 3), (4, 17, 256), (1, 256, 80))),
    *(Case(B=2, Hq=4, Hk=2, Nq=70, Nk=70, D=48, mask=Window(9, 9), layout=how)
      for how in ("transposed", "sliced", "broadcast", "last-axis")),
    Case(B=1, Hq=2, Nq=300, Nk=520, D=64, mask=Causal()),
    Case(B=1, Hq=1, Nq=129, Nk=257, D=96, scale=0.5),
    Case(B=1, Hq=1, Nq=64, Nk=128, D=64, scale=-0.3),
    *(Case(B=1, Hq=2, Nq=64, Nk=64, D=64, mask=Window(0, 0), scale=scale) for scale in (None, 1.0)),
    Case(B=0, Hq=2, Nq=4, Nk=4, D=8),
    # masks that are no bands
    *(Case(**_SMALL, mask=mask) for mask in _FORMULAS),
    *(Case(**_SMALL, visible=shape) for shape in ("BHNM", "11NM", "B11M", "1HN1")),
    Case(**_SMALL, visible="BHNM", causal=True, bias="1HNM"),
    Case(B=1, Hq=2, Nq=3, Nk=2, D=8, mask=BlockSparse(_LAYOUT, 1) | Prefix(0)),
    # biases
    *(Case(**_SMALL, bias=bias) for bias in _BIASES),
    Case(**_SMALL | {"Hq": 8}, bias="toeplitz+alibi+B1NM+relative"),
    Case(**_SMALL | {"Hq": 8}, bias="1H11"),  # what the formula errs on two numbers is luck
    *(Case(B=3, Hq=4, Hk=2, Nq=37, Nk=300, D=64, mask=Causal(), bias=bias)
      for bias in ("1HNM", "B1NM", "toeplitz", "relative", "BHN1", "1H1M")),
    *(Case(B=2, Hq=2, Nq=67, Nk=67, D=48, bias="BHNM", layout=how) for how in ("transposed", "sliced", "last-axis")),
    Case(B=1, Hq=2, Nq=300, Nk=520, D=64, bias="1HNM", mask=Window(100, 0)),
    # the rest of the logit and of the weight
    Case(**_SMALL, softcap=3.0),
    Case(**_SMALL, softcap=0.7, bias="1HNM", mask=Causal()),
    Case(**_SMALL, sinks=True),
    Case(B=2, Hq=4, Hk=2, Nq=40, Nk=5, D=32, sinks=True, mask=Causal(), softcap=20.0),
    *(Case(**_SMALL, clip=clip, mask=mask) for clip in ((-0.03, 1.0), (-0.1, 1.3)) for mask in (None, Causal())),
    *(Case(**_SMALL, weight=weight) for weight in ("BHNM", "1HNM", "toeplitz", "relative", "1H1M")),
    Case(B=2, Hq=2, Nq=70, Nk=140, D=32, weight="toeplitz", mask=Causal(), bias="1HNM", sinks=True, clip=(-0.02, 1.1), softcap=5.0),
    *(Case(**_SMALL, dropout=p, seed=7, mask=mask) for p in (0.1, 0.5) for mask in (None, Causal())),
    Case(**_SMALL, dropout=0.3, seed=1 << 40, weight="1HNM", clip=(-0.02, 1.0)),
    Case(B=2, Hq=4, Hk=3, Nq=33, Nk=70, D=32, heads=(2, 0, 0, 1), bias="1HNM", mask=Causal()),
    # packed sequences
    *(Case(**_PACKED, lengths=_RAGGED, mask=mask) for mask in (None, Causal(), Window(9, 3), _FORMULAS[1], BlockSparse(_LAYOUT[:1], 20))),
    *(Case(**_PACKED, lengths=_RAGGED, bias=bias) for bias in ("alibi", "toeplitz", "1HNM", "BHNM", "key", "relative")),
    Case(**_PACKED, lengths=_RAGGED, mask=Causal(), softcap=4.0, sinks=True, weight="toeplitz", dropout=0.2, seed=3),
    Case(**_PACKED, lengths=((0, 0),)),
    Case(**_PACKED, lengths=((5, 5), (130, 130), (1, 1)), mask=Causal(), layout="transposed"),
    # the greatest logits
    *(Case(B=1, Hq=4, Hk=2, Nq=37, Nk=140, D=16, topk=n, exact=True, mask=mask) for n in (1, 9, 130) for mask in (None, Causal())),
    *(Case(**_SMALL, topk=n, mask=mask) for n in (4, 40) for mask in (None, Window(20, 3))),
    Case(B=2, Hq=2, Nq=70, Nk=300, D=64, topk=16, bias="1HNM", sinks=True, mask=_FORMULAS[2]),
    # groups
    *(Case(**_GROUPED, groups=kind, mask=mask) for kind in ("windows", "shifted", "stripes", "sets", "ragged")
      for mask in (None, Causal())),
    *(Case(**_GROUPED, groups="shifted", bias=bias) for bias in ("relative", "1HNM", "BHNM", "key")),
    Case(**_GROUPED, groups="windows", bias="BHNM+toeplitz", each=True),
    *(Case(**_GROUPED, groups="ragged", bias=bias, mask=Window(25, 9)) for bias in ("toeplitz", "1HNM", "B1NM")),
    *(Case(**_GROUPED, groups="several", combine=how, mask=mask) for how in ("mean", "sum") for mask in (None, Causal())),
    Case(B=2, Hq=4, Hk=2, Nq=60, Nk=70, D=64, Dv=40, groups="keys", mask=Causal(), layout="transposed"),
    Case(B=1, Hq=4, Hk=2, Nq=60, Nk=33, D=48, groups="keys", bias="1HNM", sinks=True, softcap=4.0),
    Case(B=2, Hq=2, Nq=410, Nk=410, D=64, groups="sets", mask=_FORMULAS[2], bias="1HNM"),
    Case(**_GROUPED, groups="sets", visible="BHNM", weight="toeplitz", dropout=0.2, seed=5, clip=(-0.02, 1.1)),
    Case(B=2, Hq=2, Nq=60, Nk=60, D=48, groups="ragged", layout="sliced", mask=BlockSparse(_LAYOUT, 9)),
]  # fmt: skip

BENCH = [
    *(Case(B=1, Hq=8, Nq=n, Nk=n, D=d, mask=mask)
      for n in (1024, 4096) for d in (64, 128) for mask in (None, Causal())),
    *(Case(B=1, Hq=8, Nq=n, Nk=n, D=64) for n in (16, 64, 128)),
    Case(B=1, Hq=8, Nq=2048, Nk=2048, D=64, bias="1HNM"),
    Case(B=2, Hq=4, Nq=3136, Nk=3136, D=32, groups="swin", bias="1HNM"),
    # time falls with what a mask shows
    *(Case(B=1, Hq=8, Nq=4096, Nk=4096, D=64, mask=mask)
      for mask in (Window(127, 0), Window(1023, 0), Dilated(512, 4), BlockSparse.longformer(64, 64, window=2),
                   BlockSparse.strided(64, 64, stride=8))),
    Case(B=8, Hq=12, Nq=512, Nk=512, D=64,
         lengths=tuple((n, n) for n in (512, 384, 256, 256, 128, 96, 64, 32))),
    Case(B=1, Hq=8, Nq=1024, Nk=1024, D=64, topk=32),
]  # fmt: skip
