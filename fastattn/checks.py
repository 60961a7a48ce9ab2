"""Refusals: one sentence with what is wrong, where each value came from, and what would work."""

from __future__ import annotations

from typing import Any

import torch


class Axes:
    """Binds letters to sizes: ``Axes("attention", q="B Hq Nq D", k="B Hk Nk D")(q, k)`` -> (B, Hq, Nq, D, Hk, Nk).

    Each letter stands for one size wherever it appears; the letters come back in order of first
    appearance.  Arguments must be tensors of one dtype and on one device.
    """

    def __init__(self, function: str, **specs: str) -> None:
        self.function = function
        self.specs = {name: spec.split() for name, spec in specs.items()}
        self.ndims = [len(letters) for letters in self.specs.values()]
        flat = [letter for letters in self.specs.values() for letter in letters]
        self.same = [(i, flat.index(x)) for i, x in enumerate(flat) if flat.index(x) != i]
        self.first = [i for i, x in enumerate(flat) if flat.index(x) == i]
        self.flat = flat

    def __call__(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        lead = tensors[0]
        for t, ndim in zip(tensors, self.ndims):
            if not isinstance(t, torch.Tensor) or t.dim() != ndim:
                self._refuse_rank(tensors)
            if t.dtype != lead.dtype or t.device != lead.device:
                self._refuse_kind(tensors)
        sizes = [size for t in tensors for size in t.shape]
        for i, j in self.same:
            if sizes[i] != sizes[j]:
                self._refuse_size(tensors, i, j)
        return tuple([sizes[i] for i in self.first])

    def _owner(self, position: int) -> str:
        for name, ndim in zip(self.specs, self.ndims):
            if position < ndim:
                return name
            position -= ndim
        raise IndexError(position)

    def _table(self, tensors: tuple[Any, ...]) -> str:
        width = max(len(" ".join(letters)) for letters in self.specs.values()) + 2
        return "\n".join(
            f"  {name}: {' '.join(letters):<{width}}= {list(t.shape)}"
            for (name, letters), t in zip(self.specs.items(), tensors)
        )

    def _refuse_rank(self, tensors: tuple[Any, ...]) -> None:
        for (name, letters), t in zip(self.specs.items(), tensors):
            if not isinstance(t, torch.Tensor):
                raise ValueError(
                    f"{self.function}: {name} is {type(t).__name__}; it takes a tensor [{', '.join(letters)}]"
                )
            if t.dim() != len(letters):
                raise ValueError(
                    f"{self.function}: {name} has {t.dim()} axes, {list(t.shape)}; "
                    f"it takes {len(letters)}, [{', '.join(letters)}]"
                )

    def _refuse_kind(self, tensors: tuple[Any, ...]) -> None:
        kinds = ", ".join(
            f"{name} is {str(t.dtype).removeprefix('torch.')} on {t.device}"
            for name, t in zip(self.specs, tensors)
        )
        raise ValueError(f"{self.function}: {kinds}; they must share one dtype and one device")

    def _refuse_size(self, tensors: tuple[Any, ...], i: int, j: int) -> None:
        sizes = [size for t in tensors for size in t.shape]
        raise ValueError(
            f"{self.function}: {self.flat[i]} is {sizes[j]} in {self._owner(j)} "
            f"but {sizes[i]} in {self._owner(i)}\n{self._table(tensors)}"
        )


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """``t`` itself when its last axis is contiguous, else one copy: the only layout rule kernels have."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
