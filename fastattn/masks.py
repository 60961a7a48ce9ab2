"""Which pairs of query i and key j may attend, as hashable values.

Query i of Nq stands at position i + Nk - Nq ("bottom-right": the last query sees the last key), unless a
mask says ``align="top-left"``, where it stands at i.  ``a & b`` allows what both allow.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch

UNBOUNDED = 1 << 30  # no sequence is longer


class Mask:
    """Base of all masks."""

    def band(self) -> Band:
        """The mask as limits on j - i; every mask of this module is one."""
        raise NotImplementedError(f"{type(self).__name__} does not say which keys it allows")

    def encode(self) -> list[int]:
        """The integers that kernels in every language read: [kind, parameters...]."""
        return self.band().encode()

    def materialize(
        self, Nq: int, Nk: int, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The dense bool mask [Nq, Nk], True where query i may attend to key j."""
        return materialize(self.encode(), Nq, Nk, device)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Both(self, other)

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

    def band(self) -> Band:
        return self

    def encode(self) -> list[int]:
        bounds = (self.left, self.right, self.left_top, self.right_top)
        return [KINDS.index("band"), *(max(-UNBOUNDED, min(bound, UNBOUNDED)) for bound in bounds)]


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def band(self) -> Band:
        return Band()


@dataclass(frozen=True)
class Causal(Mask):
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
class Window(Mask):
    """A query sees ``left`` keys before its position, itself, and ``right`` keys after it; None = unbounded."""

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name, width in (("left", self.left), ("right", self.right)):
            if isinstance(width, numbers.Integral):  # numpy's integers too
                object.__setattr__(self, name, int(width))
            if width is not None and (not isinstance(width, numbers.Integral) or width < 0):
                raise ValueError(f"Window: {name} is {width!r}; it takes None or an integer >= 0")

    def band(self) -> Band:
        left, right = (
            UNBOUNDED if w is None else min(w, UNBOUNDED) for w in (self.left, self.right)
        )
        return Band(left=left, right=right)


@dataclass(frozen=True)
class Both(Mask):
    """What both masks allow; written ``a & b``."""

    first: Mask
    second: Mask

    def __str__(self) -> str:
        return f"{self.first}&{self.second}"

    def band(self) -> Band:
        a, b = self.first.band(), self.second.band()
        return Band(
            min(a.left, b.left),
            min(a.right, b.right),
            min(a.left_top, b.left_top),
            min(a.right_top, b.right_top),
        )


KINDS = (
    "band",
)  # the first integer of an encoded mask; csrc/core/masks.h and triton_masks.py follow it


def materialize(
    code: list[int], Nq: int, Nk: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """The dense bool mask [Nq, Nk] of an encoded mask."""
    _, left, right, left_top, right_top = code
    i = torch.arange(Nq, device=device)[:, None]
    j = torch.arange(Nk, device=device)[None, :]
    shift = Nk - Nq
    return (
        (j >= i + shift - left)
        & (j <= i + shift + right)
        & (j >= i - left_top)
        & (j <= i + right_top)
    )


def pairs(mask: Mask, Nq: int, Nk: int) -> int:
    """How many pairs (i, j) the mask allows: what a kernel must compute, and no more."""
    _, left, right, left_top, right_top = mask.encode()
    i = torch.arange(Nq)
    first = torch.maximum(i + Nk - Nq - left, i - left_top).clamp(min=0)
    last = torch.minimum(i + Nk - Nq + right, i + right_top).clamp(max=Nk - 1)
    return int((last - first + 1).clamp(min=0).sum())
