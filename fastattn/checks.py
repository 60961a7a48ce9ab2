"""Refusals: one sentence with what is wrong, where each value came from, and what would work."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Axes:
    """Binds letters to sizes: ``Axes("attention", q="B Hq Nq D", k="B Hk Nk D")(q, k)`` -> (B, Hq, Nq, D, Hk, Nk).

    Each letter stands for one size wherever it appears; the letters come back in order of first
    appearance.  Arguments must be tensors of one dtype and on one device.
    """

    def __init__(self, function: str, **specs: str) -> None:
        self.function = function
        self.specs = {name: spec.split() for name, spec in specs.items()}
        self.flat = [letter for letters in self.specs.values() for letter in letters]
        self.bind = _compile(self.specs)

    def __call__(self, *tensors: torch.Tensor) -> tuple[int, ...]:
        sizes: tuple[int, ...] | None = self.bind(*tensors)
        if sizes is None:
            self._refuse_rank(tensors)
            self._refuse_kind(tensors)
            self._refuse_size(tensors)
            raise AssertionError(f"{self.function}: {tensors} is refused for no reason")
        return sizes

    def _owner(self, position: int) -> str:
        for name, letters in self.specs.items():
            if position < len(letters):
                return name
            position -= len(letters)
        raise IndexError(position)

    def _table(self, tensors: tuple[Any, ...]) -> str:
        width = max(len(" ".join(letters)) for letters in self.specs.values()) + 2
        lead = max(map(len, self.specs)) + 1
        return "\n".join(
            f"  {name + ':':<{lead}} {' '.join(letters):<{width}}= {list(t.shape)}"
            for (name, letters), t in zip(self.specs.items(), tensors)
        )

    def _refuse_rank(self, tensors: tuple[Any, ...]) -> None:
        for (name, letters), t in zip(self.specs.items(), tensors):
            if not isinstance(t, torch.Tensor):
                raise ValueError(
                    f"{self.function}: {name} is {type(t).__name__}; it takes a tensor [{', '.join(letters)}]"
                )
            if t.layout is not torch.strided:
                raise ValueError(
                    f"{self.function}: {name} is a {shown(t.layout)} tensor; it takes a dense one"
                )
            if t.dim() != len(letters):
                raise ValueError(
                    f"{self.function}: {name} has {t.dim()} axes, {list(t.shape)}; "
                    f"it takes {len(letters)}, [{', '.join(letters)}]"
                )

    def _refuse_kind(self, tensors: tuple[Any, ...]) -> None:
        if len({(t.dtype, t.device) for t in tensors}) > 1:
            raise ValueError(
                f"{self.function}: {self._kinds(tensors)}; they must share one dtype and one device"
            )
        if tensors[0].dtype not in DTYPES:
            raise ValueError(f"{self.function}: {self._kinds(tensors)}; they take {shown(*DTYPES)}")

    def _kinds(self, tensors: tuple[Any, ...]) -> str:
        return ", ".join(
            f"{name} is {shown(t.dtype)} on {t.device}" for name, t in zip(self.specs, tensors)
        )

    def _refuse_size(self, tensors: tuple[Any, ...]) -> None:
        sizes = [size for t in tensors for size in t.shape]
        for i, letter in enumerate(self.flat):
            j = self.flat.index(letter)
            if sizes[i] != sizes[j]:
                raise ValueError(
                    f"{self.function}: {letter} is {sizes[j]} in {self._owner(j)} "
                    f"but {sizes[i]} in {self._owner(i)}\n{self._table(tensors)}"
                )


def _compile(specs: dict[str, list[str]]) -> Callable[..., Any]:
    """The check as straight code, for it runs at every call: the sizes, or None where anything is off."""
    lead, seen = (
        next(iter(specs)),
        list(dict.fromkeys(x for letters in specs.values() for x in letters)),
    )
    lines, same, known = [], [f"{lead}.dtype not in dtypes"], set()
    for name, letters in specs.items():
        fresh = [x if x not in known else f"{x}_{name}" for x in letters]
        same += [f"{x}_{name} != {x}" for x in letters if x in known]
        known.update(letters)
        lines.append(f"        {', '.join(fresh)}, = {name}.shape")
        same.append(f"{name}.layout is not strided")
        if name != lead:
            same += [f"{name}.dtype != {lead}.dtype", f"{name}.device != {lead}.device"]
    source = [
        f"def bind({', '.join(specs)}):",
        "    try:",
        *lines,
        f"        if {' or '.join(same)}:",
        "            return None",
        "    except (AttributeError, ValueError, TypeError):",
        "        return None",
        f"    return {', '.join(seen)},",
    ]
    scope: dict[str, Any] = {"strided": torch.strided, "dtypes": DTYPES}
    exec("\n".join(source), scope)
    return scope["bind"]  # type: ignore[no-any-return]


def number(function: str, name: str, value: Any) -> float:
    """``value`` as a float.  A tensor is refused: it would get no gradient."""
    if not isinstance(value, (int, float)) and not isinstance(value, numbers.Real):
        raise ValueError(
            f"{function}: {name} is {repr(value) if isinstance(value, str) else type(value).__name__}; it takes a number"
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{function}: {name} is too large for a float") from None


def given(value: Any) -> str:
    """What was passed where a name is wanted, as it is typed; long things are cut."""
    return repr(value) if isinstance(value, str) else reprlib.repr(value)


def grouped_heads(function: str, Hq: int, Hk: int) -> None:
    if Hq != Hk and (Hk == 0 or Hq % Hk):
        raise ValueError(f"{function}: Hq is {Hq} and Hk is {Hk}; Hq must be a multiple of Hk")


def fits(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    # Not ``in``: torch.compile does not ask a symbol there whether it is this number.
    return all(n == 1 or size < 0 or n == size for n, size in zip(shape, sizes))


def named_sizes(sizes: Sequence[int], axes: str = "B, Hq, Nq, Nk") -> str:
    """ "[B, Hq, Nq, Nk] = [2, 4, any, any]", where kernels look at the sizes that are negative."""
    return f"[{axes}] = [{', '.join('any' if n < 0 else str(n) for n in sizes)}]"


def shown(*values: Any) -> str:
    """dtypes and layouts as users type them: "float32, bfloat16"."""
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def described(t: Any) -> str:
    """A value as sentences show it: "float32[3, 16] on cpu"; the type of what is no tensor."""
    if not isinstance(t, torch.Tensor):
        return type(t).__name__
    layout = "" if t.layout is torch.strided else f"{shown(t.layout)} "
    return f"{layout}{shown(t.dtype)}{list(t.shape)} on {t.device}"


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """``t`` itself when its last axis is contiguous, else one copy: the only layout rule kernels have."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
