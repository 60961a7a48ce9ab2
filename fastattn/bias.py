"""What is added to logits, or multiplies weights: values whose tensors get gradients.

A kernel knows two shapes of them: a tensor with a number for each pair, broadcast over any axes, and a table that is
looked up by the offset j - i or by an index.  ``terms`` brings everything a user may pass to at most two of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.checks import fits, named_sizes

__all__ = ["ALiBi", "Bias", "KeyBias", "Relative", "Toeplitz"]


class Bias:
    """Base of all biases: they hold tensors, and are equal only to themselves."""


class ALiBi(Bias):
    """Adds ``-slopes[h] * |position of i - j|``; slopes [H]."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.slopes = _table("ALiBi", "slopes", slopes, "H")


class Toeplitz(Bias):
    """A number for each offset: ``table[h, j - position of i + L - 1]``; table [H or 1, 2 L - 1]."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = _table("Toeplitz", "table", table, "H", "2 L - 1")
        if table.shape[1] % 2 == 0:
            raise ValueError(
                f"Toeplitz: table has {table.shape[1]} columns; it takes 2 L - 1, an odd number"
            )


class Relative(Bias):
    """A number for each pair by index: ``table[index[i, j], h]``; table [T, H or 1], index int [Nq, Nk].

    Swin's relative positions and T5's buckets have this form.  ``Relative.t5_buckets`` and ``Relative.swin_index``
    make their indices.
    """

    def __init__(self, table: torch.Tensor, index: torch.Tensor) -> None:
        self.table = _table("Relative", "table", table, "T", "H")
        if not isinstance(index, torch.Tensor) or index.is_floating_point() or index.dim() != 2:
            raise ValueError(f"Relative: index is {_shown(index)}; it takes integers [Nq, Nk]")
        self.index = index

    @staticmethod
    def t5_buckets(
        Nq: int,
        Nk: int,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: Any = None,
    ) -> torch.Tensor:
        """T5's index [Nq, Nk]: exact for near offsets, logarithmic up to ``max_distance``, by sign if bidirectional."""
        away = torch.arange(Nk, device=device) - (
            torch.arange(Nq, device=device)[:, None] + Nk - Nq
        )
        index = torch.zeros_like(away)
        if bidirectional:
            buckets //= 2
            index = (away > 0) * buckets
            distance = away.abs()
        else:
            distance = (-away).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / torch.log(
            torch.tensor(max_distance / exact)
        )
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return index + torch.where(distance < exact, distance, far)

    @staticmethod
    def swin_index(height: int, width: int, device: Any = None) -> torch.Tensor:
        """Swin's index [height * width, height * width] into a table of (2 height - 1) * (2 width - 1) rows."""
        y, x = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        y, x = y.flatten(), x.flatten()
        down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
        return down * (2 * width - 1) + right


class KeyBias(Bias):
    """A number for each key, whatever the query: x [B or 1, H or 1, Nk]."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = _table("KeyBias", "x", x, "B", "H", "Nk")


@dataclass(frozen=True)
class Term:
    """What a kernel takes: values [B|1, H|1, Nq|1, Nk|1]; or [H|1, 2 L - 1] by offset; or [H|1, T] by index [Nq, Nk]."""

    values: torch.Tensor
    index: torch.Tensor | None = None

    @property
    def by_offset(self) -> bool:
        return self.index is None and self.values.dim() == 2


def terms(
    function: str, name: str, given: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> list[Term]:
    """``given`` as at most two terms; ``sizes`` are B, Hq, Nq, Nk, and ``dtype`` is that of q.

    Of packed sequences Nq and Nk are minus the number of tokens: each has its own length, at most that.
    """
    if given is None:
        return []
    parts = given if isinstance(given, (list, tuple)) else [given]
    found = _join([_term(function, name, part, sizes, dtype) for part in parts])
    if len(found) > 2 and min(sizes[2:]) < 0:
        raise ValueError(
            f"{function}: {name} has {len(found)} parts of different forms; packed sequences take 2"
        )
    found.sort(key=lambda term: term.by_offset)
    while len(found) > 2:  # what cannot be kept apart is added up beforehand
        first, second, *others = found
        total = _dense(first, sizes).values + _dense(second, sizes).values
        found = [Term(total), *others]
    return found


def multiplier(
    function: str, weight: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> Term:
    """What multiplies p, or a term without values."""
    if isinstance(weight, (list, tuple, ALiBi, KeyBias)):
        raise ValueError(
            f"{function}: weight is {type(weight).__name__}; it takes a float tensor, Toeplitz or Relative"
        )
    found = terms(function, "weight", weight, sizes, dtype)
    return found[0] if found else Term(None)  # type: ignore[arg-type]


def _term(
    function: str, name: str, given: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> Term:
    B, H, Nq, Nk = sizes
    if isinstance(given, ALiBi):
        _fits(function, f"{name}.slopes", given.slopes, (H,), "Hq")
        L = max(abs(Nq), abs(Nk), 1)
        away = torch.arange(1 - L, L, device=given.slopes.device).abs()
        return Term(given.slopes.to(_wide(dtype))[:, None] * -away)
    if isinstance(given, Toeplitz):
        L = (given.table.shape[1] + 1) // 2
        if max(Nq, Nk) > L:
            raise ValueError(
                f"{function}: {name}.table has {given.table.shape[1]} columns, for lengths up to {L}; "
                f"Nq is {Nq} and Nk is {Nk}"
            )
        _fits(function, f"{name}.table", given.table, (H, given.table.shape[1]), "Hq, 2 L - 1")
        return Term(given.table.to(_wide(dtype)))
    if isinstance(given, Relative):
        if min(Nq, Nk) >= 0 and given.index.shape != (Nq, Nk):
            raise ValueError(
                f"{function}: {name}.index is {list(given.index.shape)}; it takes [Nq, Nk] = {[Nq, Nk]}"
            )
        _fits(function, f"{name}.table", given.table, (given.table.shape[0], H), "T, Hq")
        _in_range(function, f"{name}.index", given.index, given.table.shape[0])
        return Term(given.table.to(_wide(dtype)).t(), given.index.to(torch.int32).contiguous())
    if isinstance(given, KeyBias):
        _fits(function, f"{name}.x", given.x, (B, H, Nk), "B, Hq, Nk")
        return Term(given.x.to(_wide(dtype))[:, :, None])
    if isinstance(given, torch.Tensor) and given.is_floating_point():
        if given.dim() > 4:
            raise ValueError(
                f"{function}: {name} has {given.dim()} axes, {list(given.shape)}; it takes at most 4, [B, Hq, Nq, Nk]"
            )
        values = given[(None,) * (4 - given.dim())]
        _fits(function, name, values, sizes, "B, Hq, Nq, Nk")
        return Term(values if values.dtype == dtype else values.to(_wide(dtype)))
    allowed = "a float tensor, Toeplitz or Relative" + (
        "" if name == "weight" else ", ALiBi, KeyBias, or a list of them"
    )
    raise ValueError(f"{function}: {name} is {_shown(given)}; it takes {allowed}")


def _join(found: list[Term]) -> list[Term]:
    """Adds up the terms that share a form: tables by offset, tables by one index, tensors where none grows."""
    joined: list[Term] = []
    for term in found:
        for i, other in enumerate(joined):
            if term.by_offset and other.by_offset:
                joined[i] = Term(_centred_sum(term.values, other.values))
            elif term.index is not None and term.index is other.index:
                joined[i] = Term(term.values + other.values, term.index)
            elif (
                term.index is None
                and other.index is None
                and not (term.by_offset or other.by_offset)
            ):
                shapes = term.values.shape, other.values.shape
                if any(a != b and 1 not in (a, b) for a, b in zip(*shapes)):
                    continue  # of a batch's groups, and of those of all batches
                if torch.broadcast_shapes(*shapes) not in shapes:  # type: ignore[no-untyped-call]
                    continue
                joined[i] = Term(term.values + other.values)
            else:
                continue
            break
        else:
            joined.append(term)
    return joined


def _centred_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Tables by offset have the offset 0 in the middle; the shorter bounds what may be asked."""
    n = min(a.shape[1], b.shape[1])
    a, b = (t[:, (t.shape[1] - n) // 2 : (t.shape[1] + n) // 2] for t in (a, b))
    return a + b


def _dense(term: Term, sizes: tuple[int, int, int, int]) -> Term:
    return term if term.values.dim() == 4 else Term(expand(term.values, term.index, *sizes[2:]))


def expand(values: torch.Tensor, index: torch.Tensor | None, Nq: int, Nk: int) -> torch.Tensor:
    """A term as a tensor that broadcasts to [B, Hq, Nq, Nk]: the definition of its two other forms."""
    if values.dim() == 4:
        return values
    if index is None:
        i = torch.arange(Nq, device=values.device)[:, None]
        j = torch.arange(Nk, device=values.device)
        index = j - (i + Nk - Nq) + (values.shape[1] - 1) // 2
    return values[:, index.long()][None]


def _table(function: str, name: str, t: Any, *axes: str) -> torch.Tensor:
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dim() != len(axes):
        raise ValueError(
            f"{function}: {name} is {_shown(t)}; it takes a float tensor [{', '.join(axes)}]"
        )
    return t


def _fits(function: str, name: str, t: torch.Tensor, sizes: Sequence[int], axes: str) -> None:
    """Every axis is that of ``sizes``, or 1; where sizes are negative, kernels look."""
    if not fits(t.shape, sizes):
        raise ValueError(
            f"{function}: {name} is {list(t.shape)}; each axis of {named_sizes(sizes, axes)} may also be 1"
        )


def _in_range(function: str, name: str, index: torch.Tensor, size: int) -> None:
    """Looked at where that costs no synchronisation; kernels clamp what is not looked at."""
    if (
        torch.compiler.is_compiling()
        or type(index) is not torch.Tensor
        or not index.is_cpu
        or not index.numel()
    ):
        return
    least, most = (int(x) for x in index.aminmax())
    if least < 0 or most >= size:
        raise ValueError(
            f"{function}: {name} holds {least if least < 0 else most}; it takes 0 to {size - 1}, rows of the table"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _shown(given: Any) -> str:
    if isinstance(given, torch.Tensor):
        return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    return type(given).__name__
