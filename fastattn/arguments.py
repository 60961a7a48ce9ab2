"""What users pass to attention, checked and brought to what its kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.bias import Term, multiplier, terms
from fastattn.checks import described, fits, named_sizes, number, unit_stride
from fastattn.masks import Causal, Dense, Full, Mask, heads, lowered

FULL = lowered(Full())
CAUSAL = lowered(Causal())


def scale_of(function: str, scale: Any, D: int) -> float:
    """D ** -0.5 where nothing is given; a number of Python's, also while torch.compile counts in symbols."""
    return float(int(D) or 1) ** -0.5 if scale is None else number(function, "scale", scale)


def mask_code(
    function: str, mask: Any, causal: bool, Hq: int
) -> tuple[list[int], torch.Tensor | None]:
    if causal is not True and causal is not False:
        raise ValueError(f"{function}: causal is {causal!r}; it takes True or False")
    if mask is None:
        return CAUSAL if causal else FULL
    if isinstance(mask, Mask):
        code, blocks = lowered(Causal() & mask if causal else mask)
        for H in heads(code) if blocks is not None else ():
            if H not in (1, Hq):
                raise ValueError(
                    f"{function}: mask has a layout of {H} heads; Hq is {Hq}, and it takes 1 or Hq"
                )
        return code, blocks
    given = type(mask).__name__
    if isinstance(mask, torch.Tensor):
        given = f"a tensor of {str(mask.dtype).removeprefix('torch.')}"
    raise ValueError(
        f"{function}: mask is {given}; it takes a value of fastattn.masks, a bool tensor or None"
        + (" (floats are biases: bias=)" if "float" in given else "")
    )


def optional_arguments(
    function: str, q: torch.Tensor, sizes: tuple[int, int, int, int], Hk: int, mask: Any, causal: bool, scale: float,
    softcap: Any, bias: Any, sinks: Any, clip: Any, weight: Any, head_map: Any, dropout: Any, seed: Any,
    cu_q: torch.Tensor | None = None, cu_k: torch.Tensor | None = None,
    slots_q: torch.Tensor | None = None, slots_k: torch.Tensor | None = None,
    pairs: tuple[int, int, int, int] | None = None,
) -> tuple[Sequence[Any], list[int], list[float]]:  # fmt: skip
    """The op's arguments between v and the end, checked: ``sizes`` are B, Hq, Nq, Nk; ``pairs`` those of biases if others."""
    Hq = sizes[1]
    visible = None
    if isinstance(mask, torch.Tensor) and mask.dtype is torch.bool:
        visible, mask = _broadcasts(function, "mask", mask, sizes), Dense()
        if visible.numel() == 0:  # of no pair
            visible, mask = None, None
    code, blocks = mask_code(function, mask, causal, Hq)
    added = terms(function, "bias", bias, pairs or sizes, q.dtype)
    first, second = (*added, Term(None), Term(None))[:2]  # type: ignore[arg-type]
    factor = multiplier(function, weight, pairs or sizes, q.dtype)
    if sinks is not None:
        if (
            not isinstance(sinks, torch.Tensor)
            or tuple(sinks.shape) != (Hq,)
            or not sinks.is_floating_point()
        ):
            raise ValueError(
                f"{function}: sinks is {described(sinks)}; it takes a float tensor [Hq] = [{Hq}]"
            )
        sinks = unit_stride(sinks.to(torch.promote_types(q.dtype, torch.float32)))
    softcap = 0.0 if softcap is None else _above_zero(function, "softcap", softcap)
    low, high = (0.0, 1.0) if clip is None else _clip(function, clip)
    dropout = number(function, "dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{function}: dropout is {dropout}; it takes 0 <= dropout < 1")
    extras = (
        first.values, first.index, second.values, second.index, factor.values, factor.index, sinks, visible,
        None if blocks is None else blocks.to(q.device),
        None if head_map is None else _head_map(function, head_map, Hq, Hk),
        cu_q, cu_k,
        _seed(function, seed, q.device) if dropout else None,
        slots_q, slots_k,
    )  # fmt: skip
    for name, t in zip(
        ("bias", "", "bias", "", "weight", "", "sinks", "mask", "", "head_map"), extras
    ):
        if name and t is not None and t.device != q.device:
            raise ValueError(
                f"{function}: {name} is on {t.device} and q on {q.device}; they must share one device"
            )
    return extras, code, [scale, softcap, low, high, dropout, 0.0, 0.0]


def _broadcasts(
    function: str, name: str, t: torch.Tensor, sizes: tuple[int, int, int, int]
) -> torch.Tensor:
    wide = t[(None,) * (4 - t.dim())] if t.dim() <= 4 else t
    if t.dim() > 4 or not fits(wide.shape, sizes):
        raise ValueError(
            f"{function}: {name} is {list(t.shape)}; it must broadcast to {named_sizes(sizes)}"
        )
    return wide


def _above_zero(function: str, name: str, value: Any) -> float:
    found = number(function, name, value)
    if not 0.0 < found < float("inf"):
        raise ValueError(f"{function}: {name} is {found}; it takes a number > 0, or None")
    return found


def _clip(function: str, clip: Any) -> tuple[float, float]:
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"{function}: clip is {clip!r}; it takes (gamma, zeta)")
    low, high = (number(function, "clip", x) for x in clip)
    if not float("-inf") < low <= 0.0 < high < float("inf"):
        raise ValueError(
            f"{function}: clip is {(low, high)}; it takes finite gamma <= 0 < zeta, or hidden pairs would weigh"
        )
    return low, high


def _head_map(function: str, head_map: Any, Hq: int, Hk: int) -> torch.Tensor:
    if (
        not isinstance(head_map, torch.Tensor)
        or head_map.is_floating_point()
        or tuple(head_map.shape) != (Hq,)
    ):
        given = (
            list(head_map.shape) if isinstance(head_map, torch.Tensor) else type(head_map).__name__
        )
        raise ValueError(f"{function}: head_map is {given}; it takes integers [Hq] = [{Hq}]")
    if (
        type(head_map) is torch.Tensor
        and head_map.is_cpu
        and not torch.compiler.is_compiling()
        and Hq
    ):
        least, most = (int(x) for x in head_map.aminmax())
        if least < 0 or most >= Hk:
            raise ValueError(
                f"{function}: head_map holds {least if least < 0 else most}; it takes 0 to {Hk - 1}, key heads"
            )
    return head_map.to(torch.int32).contiguous()


def _seed(function: str, seed: Any, device: torch.device) -> torch.Tensor:
    """int64 [1].  None draws one from PyTorch's generator, so that ``torch.manual_seed`` decides."""
    if seed is None:
        return torch.randint(1 << 62, (1,), device=device)
    if isinstance(seed, torch.Tensor) and seed.numel() == 1 and not seed.is_floating_point():
        return seed.to(device=device, dtype=torch.int64).reshape(1)
    if isinstance(seed, int) and not isinstance(seed, bool) and -(1 << 63) <= seed < 1 << 63:
        return torch.tensor([seed], dtype=torch.int64, device=device)
    raise ValueError(
        f"{function}: seed is {seed!r}; it takes an integer of 64 bits, a tensor with one, or None"
    )


def sequence_ends(
    function: str, name: str, ends: Any, tokens: int, letter: str, device: torch.device
) -> torch.Tensor:
    if (
        not isinstance(ends, torch.Tensor)
        or ends.dtype not in (torch.int32, torch.int64)
        or ends.dim() != 1
    ):
        given = (
            f"{ends.dtype} {list(ends.shape)}"
            if isinstance(ends, torch.Tensor)
            else type(ends).__name__
        )
        raise ValueError(f"{function}: {name} is {given}; it takes int32 [batch + 1]")
    if ends.shape[0] == 0 or ends.device != device:
        raise ValueError(
            f"{function}: {name} is {list(ends.shape)} on {ends.device}; it takes int32 [batch + 1] on {device}"
        )
    if type(ends) is torch.Tensor and ends.is_cpu and not torch.compiler.is_compiling():
        values = (
            ends.tolist()
        )  # on a GPU that would wait for it: kernels stay inside the tensors there
        if values[0] != 0 or values[-1] != tokens or values != sorted(values):
            raise ValueError(
                f"{function}: {name} goes from {values[0]} to {values[-1]}; it must ascend from 0 to {letter} = {tokens}"
            )
    return ends.to(torch.int32).contiguous()
