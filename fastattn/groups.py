"""Groups of tokens, each of which attends inside itself: what ``fastattn.grouped_attention`` is given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

__all__ = ["Groups"]

HOLE = -1


class Groups:
    """Groups of slots, each holding a token or nothing.

    index    int [G, W] or [B|1, H|1, G, W]: the token in slot w of group g, -1 where there is none.  A heads axis may also
             divide H: then each of its rows serves as many heads in a row
    offsets  for groups of different sizes, int [G + 1] ascending from 0: ``index`` is then [T] or [B|1, H|1, T], and group
             g has the slots offsets[g] to offsets[g + 1]
    labels   int, of the shape of ``index``: tokens of a group see each other where their labels are equal

    >>> import torch, fastattn as fa
    >>> fa.Groups(torch.tensor([[0, 1, 2], [3, 4, -1]]))
    Groups(2 groups of at most 3 slots)
    """

    def __init__(
        self,
        index: torch.Tensor,
        offsets: torch.Tensor | None = None,
        *,
        labels: torch.Tensor | None = None,
    ) -> None:
        self.is_regular = offsets is None
        slots = _slots("index", index, self.is_regular)
        if labels is not None:
            of_slots = _slots("labels", labels, self.is_regular)
            if any(a != b and 1 not in (a, b) for a, b in zip(slots.shape, of_slots.shape)):
                raise ValueError(
                    f"Groups: labels is {list(labels.shape)}; beside index {list(index.shape)} it takes its shape"
                )
            slots = torch.cat(torch.broadcast_tensors(slots, of_slots), 2)  # type: ignore[no-untyped-call]
        if offsets is None:
            self.num, self.size = index.shape[-2:]
            ends = torch.arange(self.num + 1, dtype=torch.int32, device=index.device) * self.size
        else:
            ends = _ends(offsets, index)
            self.num = ends.shape[0] - 1
            self.size = -max(slots.shape[3], 1)  # of several sizes, at most that
        self.slots = slots.contiguous()  # int32 [B|1, H|1, 1 or with labels 2, T]
        self.ends = ends  # int32 [G + 1]

    def __repr__(self) -> str:
        slots = f"{self.size} slots" if self.is_regular else f"{self.slots.shape[3]} slots in all"
        return f"Groups({self.num} groups of {'at most ' if self.is_regular else ''}{slots})"

    def to(self, device: torch.device | str) -> Groups:
        """The same groups on another device."""
        moved = object.__new__(Groups)
        moved.__dict__ |= self.__dict__ | {
            "slots": self.slots.to(device),
            "ends": self.ends.to(device),
        }
        return moved

    @classmethod
    def windows(
        cls,
        size: int | Sequence[int],
        window: int | Sequence[int] | None = None,
        shift: int | Sequence[int] = 0,
        stripes: int | None = None,
        dilation: int | Sequence[int] = 1,
        device: torch.device | str | None = None,
    ) -> Groups:
        """Windows of a grid of tokens, ``size`` a side, in one to as many axes as you like; tokens in raster order.

        window    its sides; the whole grid's where None
        shift     how far the grid is rolled back before it is cut, as Swin does; tokens that meet only because of the
                  roll do not see each other
        stripes   CSWin: the first half of the heads has windows ``stripes`` wide and ``window`` high, the second half
                  those ``window`` wide and ``stripes`` high
        dilation  a window takes every n-th token of an axis; as many windows start at neighbouring tokens

        Windows come in raster order, inside those of one start where ``dilation`` is not 1.  A grid that windows do
        not divide is padded with empty slots at its end.

        >>> import fastattn as fa
        >>> fa.Groups.windows((4, 6), (2, 3)).slots[0, 0, 0, :6]
        tensor([0, 1, 2, 6, 7, 8], dtype=torch.int32)
        """
        sizes = _sides("size", size, None)
        n = len(sizes)
        sides = sizes if window is None else _sides("window", window, n)
        shifts, steps = _sides("shift", shift, n), _sides("dilation", dilation, n)
        if stripes is None:
            return cls._windows([(sizes, sides, shifts, steps)], device)
        if n != 2 or type(stripes) is not int or stripes < 1:
            raise ValueError(
                f"Groups.windows: stripes is {stripes!r} and size has {n} axes; it takes a width >= 1, and two axes"
            )
        high, wide = (sides[0], stripes), (stripes, sides[1])
        return cls._windows([(sizes, high, shifts, steps), (sizes, wide, shifts, steps)], device)

    @classmethod
    def _windows(cls, heads: Sequence[tuple[Sequence[int], ...]], device: object) -> Groups:
        index, labels = zip(*(_cut(*sides) for sides in heads))
        num, slots = (max(t.shape[axis] for t in index) for axis in (0, 1))
        whole = torch.full((2, 1, len(heads), num, slots), HOLE, dtype=torch.int32)
        for h, (at, label) in enumerate(zip(index, labels)):
            whole[0, 0, h, : at.shape[0], : at.shape[1]] = at
            whole[1, 0, h, : at.shape[0], : at.shape[1]] = label
        whole = whole.to(device)  # type: ignore[call-overload]
        return cls(whole[0], labels=whole[1] if any(bool(t.any()) for t in labels) else None)


def _cut(
    sizes: Sequence[int], sides: Sequence[int], shifts: Sequence[int], steps: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each window [G, W], and which of them the roll brought there."""
    index = labels = torch.zeros((), dtype=torch.int64)
    n = len(sizes)
    shape = [0] * (3 * n)  # where windows start, windows of each start, slots of each window
    for axis, (size, side, shift, step) in enumerate(zip(sizes, sides, shifts, steps)):
        each = (size + step - 1) // step  # tokens of a start, at most
        shape[axis::n] = min(step, size), (each + side - 1) // side, side
        start, window, slot = (
            torch.arange(shape[at]).view([-1 if a == at else 1 for a in range(3 * n)])
            for at in (axis, n + axis, 2 * n + axis)
        )
        padded = shape[n + axis] * side
        rolled = window * side + slot + shift % padded
        token = start + rolled % padded * step
        index = torch.where((index >= 0) & (token < size), index * size + token, HOLE)
        labels = labels + (rolled >= padded).long() * (1 << axis)
    num = math.prod(shape[: 2 * n])
    return index.expand(shape).reshape(num, -1), labels.expand(shape).reshape(num, -1)


def _sides(name: str, given: int | Sequence[int], n: int | None) -> list[int]:
    sides = (
        [given] * (n or 1)
        if isinstance(given, int)
        else [*given]
        if isinstance(given, Sequence)
        else []
    )
    if (
        (n is not None and len(sides) != n)
        or not sides
        or any(type(x) is not int or (name != "shift" and x < 1) for x in sides)
    ):
        raise ValueError(
            f"Groups.windows: {name} is {given!r}; it takes an integer"
            + ("" if name == "shift" else " >= 1")
            + (", or one an axis" if n is None else f", or {n}, one an axis")
        )
    return sides


def _slots(name: str, t: torch.Tensor, is_regular: bool) -> torch.Tensor:
    """int32 [B|1, H|1, 1, T]"""
    axes = "[G, W] or [B|1, H|1, G, W]" if is_regular else "[T] or [B|1, H|1, T] (beside offsets)"
    allowed = (2, 4) if is_regular else (1, 3)
    if (
        not isinstance(t, torch.Tensor)
        or t.is_floating_point()
        or t.dtype is torch.bool
        or t.dim() not in allowed
    ):
        given = (
            f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            if isinstance(t, torch.Tensor)
            else type(t).__name__
        )
        raise ValueError(f"Groups: {name} is {given}; it takes integers {axes}")
    if t.dtype is torch.int64:  # what does not fit stays out of range
        t = t.clamp(-(1 << 31), (1 << 31) - 1)
    t = t.to(torch.int32)
    flat = t.flatten(-2) if is_regular else t
    return flat.expand(*(1,) * (3 - flat.dim()), *flat.shape)[:, :, None]


def _ends(offsets: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if (
        not isinstance(offsets, torch.Tensor)
        or offsets.dtype not in (torch.int32, torch.int64)
        or offsets.dim() != 1
        or not offsets.shape[0]
        or offsets.device != index.device
    ):
        given = (
            f"{str(offsets.dtype).removeprefix('torch.')} {list(offsets.shape)} on {offsets.device}"
            if isinstance(offsets, torch.Tensor)
            else type(offsets).__name__
        )
        raise ValueError(
            f"Groups: offsets is {given}; it takes int32 [G + 1] on {index.device}, as index is"
        )
    if offsets.is_cpu and type(offsets) is torch.Tensor and not torch.compiler.is_compiling():
        ends, slots = offsets.tolist(), index.shape[-1]
        if ends[0] != 0 or ends[-1] != slots or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"Groups: offsets goes from {ends[0]} to {ends[-1]}; it must ascend from 0 to the {slots} slots of index"
            )
    return offsets.to(torch.int32).contiguous()
