"""Which pairs of query i and key j may attend, as hashable values.

Query i of Nq stands at position i + Nk - Nq ("bottom-right": the last query sees the last key), unless a
mask says ``align="top-left"``, where it stands at i.  ``a & b`` allows what both allow, ``a | b`` what either does.

One file because a mask, its code and what the code means must agree.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "And",
    "Band",
    "BlockSparse",
    "Causal",
    "Dilated",
    "Full",
    "Mask",
    "Or",
    "Prefix",
    "Window",
]

UNBOUNDED = 1 << 30  # no sequence is longer

# A mask crosses into kernels as a formula in postfix order: WIDTH integers a node, the first of them its kind.
# csrc/core/masks.h and kernels/common/triton_masks.py follow these two lines.
KINDS = ("band", "dilated", "prefix", "blocks", "dense", "and", "or")
WIDTH = 6
MAX_NODES = 16

Code = tuple[int, ...]


def node(kind: str, *parameters: int) -> Code:
    return (KINDS.index(kind), *parameters, *[0] * (WIDTH - 1 - len(parameters)))


class Mask:
    """Base of all masks."""

    def band(self) -> Band | None:
        """The mask as limits on j - i, or None where it is no band."""
        return None

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        """The nodes of the mask, which appends its block layouts to ``layouts``."""
        raise NotImplementedError(f"{type(self).__name__} does not say which keys it allows")

    def encode(self) -> list[int]:
        """The integers that kernels in every language read."""
        return lowered(self)[0]

    def materialize(
        self, Nq: int, Nk: int, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The dense bool mask, True where query i may attend to key j: [Nq, Nk], or [H, Nq, Nk] if heads differ."""
        for name, length in (("Nq", Nq), ("Nk", Nk)):
            if length < 0:
                raise ValueError(f"materialize: {name} is {length}; it takes a length >= 0")
        code, layouts = lowered(self)
        return materialize(code, Nq, Nk, device, layouts)

    def transposed(self, Nq: int, Nk: int) -> Mask:
        """The mask of Nk queries and Nq keys that shows (j, i) where this one shows (i, j)."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it is transposed")

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __str__(self) -> str:
        """The mask in a test id: ``Causal``, ``Window(7,0)``."""
        given = [
            (getattr(self, f.name), f.default)
            for f in getattr(self, "__dataclass_fields__", {}).values()
        ]
        shown = ",".join(str(value) for value, _ in given)
        return type(self).__name__ + (
            f"({shown})" if any(value != default for value, default in given) else ""
        )


@dataclass(frozen=True)
class Band(Mask):
    """Keys j with  i + Nk - Nq - left <= j <= i + Nk - Nq + right  and  i - left_top <= j <= i + right_top."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    left_top: int = UNBOUNDED
    right_top: int = UNBOUNDED

    def __post_init__(self) -> None:
        for name in ("left", "right", "left_top", "right_top"):
            _integer(self, name, None)

    def band(self) -> Band:
        return self

    def transposed(self, Nq: int, Nk: int) -> Mask:
        return Band(self.right, self.left, self.right_top, self.left_top)

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        bounds = (self.left, self.right, self.left_top, self.right_top)
        return node("band", *(max(-UNBOUNDED, min(bound, UNBOUNDED)) for bound in bounds))


class _OfBand(Mask):
    """A mask that is another way to write a band."""

    def band(self) -> Band:
        raise NotImplementedError

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        return self.band().formula(layouts)

    def transposed(self, Nq: int, Nk: int) -> Mask:
        return self.band().transposed(Nq, Nk)


@dataclass(frozen=True)
class Full(_OfBand):
    """Every query sees every key."""

    def band(self) -> Band:
        return Band()


@dataclass(frozen=True)
class Causal(_OfBand):
    """A query sees the keys up to its own position."""

    align: str = "bottom-right"

    def __post_init__(self) -> None:
        if self.align not in ("bottom-right", "top-left"):
            raise ValueError(
                f'Causal: align is {self.align!r}; it takes "bottom-right" or "top-left"'
            )

    def band(self) -> Band:
        return Band(right=0) if self.align == "bottom-right" else Band(right_top=0)


@dataclass(frozen=True)
class Window(_OfBand):
    """A query sees ``left`` keys before its position, itself, and ``right`` keys after it; None = unbounded."""

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _integer(self, name, 0, "None or an integer >= 0")

    def band(self) -> Band:
        left, right = (
            UNBOUNDED if w is None else min(w, UNBOUNDED) for w in (self.left, self.right)
        )
        return Band(left=left, right=right)


@dataclass(frozen=True)
class Dilated(Mask):
    """A query sees its position and, on each side, ``window`` keys that lie ``step`` apart."""

    window: int
    step: int

    def __post_init__(self) -> None:
        _integer(self, "window", 0)
        _integer(self, "step", 1)

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        step = min(self.step, UNBOUNDED)
        return node("dilated", min(self.window * step, UNBOUNDED), step)

    def transposed(self, Nq: int, Nk: int) -> Mask:
        return self


@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first ``n`` keys; ``Causal() | Prefix(n)`` is the mask of a prefix language model."""

    n: int

    def __post_init__(self) -> None:
        _integer(self, "n", 0)

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        return node("prefix", min(self.n, UNBOUNDED))

    def transposed(self, Nq: int, Nk: int) -> Mask:
        if not self.n:
            return self
        return BlockSparse(torch.ones(1, -(-max(Nq, 1) // self.n), dtype=torch.bool), self.n)


class BlockSparse(Mask):
    """Query i sees key j where ``layout[h, i // block_size, j // block_size]`` is True.

    ``layout`` is bool [nq, nk], or [H, nq, nk] with H = 1 or the number of query heads.  Blocks are counted from the
    first query and the first key.  What is outside the layout is hidden.
    """

    def __init__(self, layout: Any, block_size: int) -> None:
        layout = torch.as_tensor(layout)
        if layout.dtype != torch.bool or layout.dim() not in (2, 3):
            raise ValueError(
                f"BlockSparse: layout is {str(layout.dtype).removeprefix('torch.')} {list(layout.shape)}; "
                "it takes bool [nq, nk] or [H, nq, nk]"
            )
        self.block_size = block_size
        _integer(self, "block_size", 1)
        layout = layout.detach().to("cpu", copy=True).contiguous()
        self.layout = layout if layout.dim() == 3 else layout[None]
        self._key = (self.block_size, tuple(self.layout.shape), self.layout.numpy().tobytes())

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "_key"):
            raise AttributeError(f"BlockSparse is a value: {name} cannot be set")
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockSparse) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        H, nq, nk = self.layout.shape
        share = float(self.layout.float().mean()) if self.layout.numel() else 0.0
        return f"BlockSparse({H}x{nq}x{nk},{self.block_size},{share:.0%})"

    __repr__ = __str__

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        H, nq, nk = self.layout.shape
        offset = sum(t.numel() for t in layouts)
        layouts.append(self.layout.flatten())
        return node("blocks", offset, H, nq, nk, self.block_size)

    def transposed(self, Nq: int, Nk: int) -> Mask:
        return BlockSparse(self.layout.mT, self.block_size)

    # ---- Published patterns -----------------------------------------------------------------------

    @classmethod
    def from_mask(cls, mask: torch.Tensor, block_size: int) -> BlockSparse:
        """The blocks in which a dense bool mask [Nq, Nk] or [H, Nq, Nk] shows anything.

        Equal to the mask if that is constant in every block; otherwise pass the mask itself.
        """
        if mask.dtype != torch.bool or mask.dim() not in (2, 3):
            raise ValueError(
                f"BlockSparse.from_mask: mask is {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}; "
                "it takes bool [Nq, Nk] or [H, Nq, Nk]"
            )
        m = mask if mask.dim() == 3 else mask[None]
        H, Nq, Nk = m.shape
        nq, nk = -(-Nq // block_size), -(-Nk // block_size)
        whole = m.new_zeros(H, nq * block_size, nk * block_size)
        whole[:, :Nq, :Nk] = m
        return cls(
            whole.view(H, nq, block_size, nk, block_size).transpose(2, 3).flatten(-2).any(-1),
            block_size,
        )

    @classmethod
    def strided(
        cls, n: int, block_size: int, *, stride: int, local: int | None = None, causal: bool = True
    ) -> BlockSparse:
        """Sparse Transformer, strided: the last ``local`` blocks, and every ``stride``-th before; n blocks a side.

        ``local`` is ``stride`` when None.  Combine with ``Causal()`` to hide what is ahead inside the diagonal blocks.
        """
        i, j = torch.arange(n)[:, None], torch.arange(n)
        far = (i - j) % stride == 0
        near = (i - j).abs() < (stride if local is None else local)
        layout = near | far
        return cls(layout & (j <= i) if causal else layout, block_size)

    @classmethod
    def fixed(
        cls,
        n: int,
        block_size: int,
        *,
        stride: int,
        summary: int = 1,
        heads: int = 1,
        causal: bool = True,
    ) -> BlockSparse:
        """Sparse Transformer, fixed: a query's own run of ``stride`` blocks, and of every run the ``summary`` blocks
        at its end; head h takes the (h mod stride / summary)-th group of ``summary`` blocks counted from the end."""
        if stride % summary:
            raise ValueError(
                f"BlockSparse.fixed: stride is {stride} and summary is {summary}; summary must divide it"
            )
        i, j = torch.arange(n)[:, None], torch.arange(n)
        own = i // stride == j // stride
        groups = stride // summary
        layouts = []
        for h in range(heads):
            first = stride - summary * (h % groups + 1)
            at = j % stride
            layouts.append(own | ((at >= first) & (at < first + summary)))
        layout = torch.stack(layouts)
        return cls(layout & (j <= i) if causal else layout, block_size)

    @classmethod
    def longformer(
        cls, n: int, block_size: int, *, window: int, globals: Sequence[int] = (0,)
    ) -> BlockSparse:
        """Longformer: ``window`` blocks on each side, and blocks ``globals`` that see all and are seen by all."""
        i, j = torch.arange(n)[:, None], torch.arange(n)
        layout = (i - j).abs() <= window
        for g in globals:
            layout = layout | (i == g) | (j == g)
        return cls(layout, block_size)

    @classmethod
    def bigbird(
        cls, n: int, block_size: int, *, random: int, window: int = 1, seed: int = 0, heads: int = 1
    ) -> BlockSparse:
        """BigBird: ``window`` blocks on each side, the first and last block global, and ``random`` others a row.

        The random blocks of each head and row are drawn once, from ``seed``, among those not seen anyway.
        """
        i, j = torch.arange(n)[:, None], torch.arange(n)
        near = (i - j).abs() <= window
        layout = (near | (i == 0) | (i == n - 1) | (j == 0) | (j == n - 1)).repeat(heads, 1, 1)
        draw = torch.rand(heads, n, n, generator=torch.Generator().manual_seed(seed))
        draw[layout] = -1.0
        count = min(random, n)
        chosen = torch.zeros_like(layout).scatter_(-1, draw.topk(count).indices, True)
        return cls(layout | (chosen & (draw >= 0)), block_size)


@dataclass(frozen=True)
class And(Mask):
    """What both masks allow; written ``a & b``."""

    first: Mask
    second: Mask

    def __str__(self) -> str:
        return f"({self.first}&{self.second})"

    def band(self) -> Band | None:
        a, b = self.first.band(), self.second.band()
        if a is None or b is None:
            return None
        return Band(
            min(a.left, b.left),
            min(a.right, b.right),
            min(a.left_top, b.left_top),
            min(a.right_top, b.right_top),
        )

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        band = self.band()
        if band is not None:
            return band.formula(layouts)
        return self.first.formula(layouts) + self.second.formula(layouts) + node("and")

    def transposed(self, Nq: int, Nk: int) -> Mask:
        return self.first.transposed(Nq, Nk) & self.second.transposed(Nq, Nk)


@dataclass(frozen=True)
class Or(Mask):
    """What either mask allows; written ``a | b``."""

    first: Mask
    second: Mask

    def __str__(self) -> str:
        return f"({self.first}|{self.second})"

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        return self.first.formula(layouts) + self.second.formula(layouts) + node("or")

    def transposed(self, Nq: int, Nk: int) -> Mask:
        return self.first.transposed(Nq, Nk) | self.second.transposed(Nq, Nk)


@dataclass(frozen=True)
class Dense(Mask):
    """The bool tensor that comes with the call: what ``attention`` makes of ``mask=tensor``."""

    def formula(self, layouts: list[torch.Tensor]) -> Code:
        return node("dense")


def _integer(mask: Mask, name: str, least: int | None, takes: str = "") -> None:
    value = getattr(mask, name)
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)  # numpy's integers too
        or (least is not None and value < least)
    ):
        takes = takes or ("an integer" if least is None else f"an integer >= {least}")
        raise ValueError(f"{type(mask).__name__}: {name} is {value!r}; it takes {takes}")
    object.__setattr__(mask, name, int(value))


def lowered(mask: Mask) -> tuple[list[int], torch.Tensor | None]:
    """What kernels are given: the formula, and the layouts of its blocks end to end (bool [n])."""
    return _lowered(mask) if torch.compiler.is_compiling() else _remembered(mask)


def _lowered(mask: Mask) -> tuple[list[int], torch.Tensor | None]:
    layouts: list[torch.Tensor] = []
    code = list(mask.formula(layouts))
    if len(code) > MAX_NODES * WIDTH:
        raise ValueError(
            f"a mask combines {len(code) // WIDTH} parts and operators; kernels take {MAX_NODES}"
        )
    return code, torch.cat(layouts) if layouts else None


_remembered = functools.lru_cache(maxsize=512)(_lowered)


def heads(code: Sequence[int]) -> list[int]:
    """How many heads each layout of an encoded mask has."""
    return [code[at + 2] for at in range(0, len(code), WIDTH) if code[at] == KINDS.index("blocks")]


def materialize(
    code: Sequence[int],
    Nq: int,
    Nk: int,
    device: torch.device | str | None = None,
    layouts: torch.Tensor | None = None,
    dense: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bool mask of an encoded one: [Nq, Nk], with heads or batches in front where they differ."""
    i = torch.arange(Nq, device=device)[:, None]
    j = torch.arange(Nk, device=device)[None, :]
    shift = Nk - Nq
    stack: list[torch.Tensor] = []
    for at in range(0, len(code), WIDTH):
        kind, (a, b, c, d, e) = KINDS[code[at]], code[at + 1 : at + WIDTH]
        if kind == "band":
            seen = (j >= i + shift - a) & (j <= i + shift + b) & (j >= i - c) & (j <= i + d)
        elif kind == "dilated":
            away = j - i - shift
            seen = (away.abs() <= a) & (away % b == 0)
        elif kind == "prefix":
            seen = (j < a).expand(Nq, Nk)
        elif kind == "blocks":
            layout = layouts[a : a + b * c * d].view(b, c, d).to(device)  # type: ignore[index]
            inside = (i < c * e) & (j < d * e)
            seen = inside & layout[:, (i // e).clamp(max=c - 1), (j // e).clamp(max=d - 1)] \
                if c and d else inside[None] & False  # fmt: skip
        elif kind == "dense":
            seen = dense  # type: ignore[assignment]
        else:
            second, first = stack.pop(), stack.pop()
            seen = first & second if kind == "and" else first | second
        stack.append(seen)
    (result,) = stack
    return result[0] if result.dim() == 3 and len(result) == 1 else result


@functools.lru_cache(maxsize=128)
def pairs(mask: Mask, Nq: int, Nk: int) -> float:
    """How many pairs (i, j) the mask allows, on average over heads: what a kernel must compute, and no more."""
    band = mask.band()
    if band is None:
        seen = mask.materialize(Nq, Nk)
        return float(seen.sum()) / (len(seen) if seen.dim() == 3 else 1)
    i = torch.arange(Nq)
    first = torch.maximum(i + Nk - Nq - band.left, i - band.left_top).clamp(min=0)
    last = torch.minimum(i + Nk - Nq + band.right, i + band.right_top).clamp(max=Nk - 1)
    return int((last - first + 1).clamp(min=0).sum())
