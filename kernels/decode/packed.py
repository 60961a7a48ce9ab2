"""attention_decode with what no kernel of its own takes: as the op ``attention`` on packed queries and keys gathered in place.

Sequence b is the queries b Nq .. (b + 1) Nq of a single batch.  Its keys are the slots cu_k[b] .. cu_k[b + 1] of an index
that says where in the cache, as it lies, each of them is; nothing of the cache is copied, unless its tokens (pages and
tokens; or, of several sequences, batches, heads and tokens) do not follow one another evenly in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastattn.checks import unit_stride
from fastattn.op import OPS, opaque


def check_values(
    lengths: torch.Tensor, block_table: torch.Tensor | None, new: int, room: int, pages: int, page_size: int
) -> None:  # fmt: skip
    """Refuses what would lead out of the cache.  On a GPU nobody looks: kernels keep inside by themselves."""
    if not lengths.is_cpu:
        return
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= room - new:
            raise ValueError(
                f"attention_decode: lengths[{b}] is {length}; with {new} appended, a cache of {room} takes "
                f"0 to {room - new}"
            )
        if block_table is None:
            continue
        used = -(-(length + new) // max(page_size, 1))
        for p, page in enumerate(block_table[b, :used].tolist()):
            if not 0 <= page < pages:
                raise ValueError(
                    f"attention_decode: block_table[{b}, {p}] is {page}; it takes 0 to {pages - 1}"
                )


def _index(
    lengths: torch.Tensor, block_table: torch.Tensor | None, new: int, room: int, pages: int, page_size: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The ends of the sequences' keys, and their rows in the cache: int32 [B + 1] and [1, heads, 1, B room]; -1 behind the last."""
    check_values(lengths, block_table, new, room, pages, page_size)
    B, device = lengths.shape[0], lengths.device
    totals = (lengths.long() + new).clamp(0, room)
    ends = torch.cat([totals.new_zeros(1), totals.cumsum(0)])
    slot = torch.arange(B * room, device=device)
    b = (torch.searchsorted(ends, slot, right=True) - 1).clamp(0, max(B - 1, 0))
    j = slot - ends[b]
    if block_table is None:
        row = b * heads * room + j
    else:
        page = (j // max(page_size, 1)).clamp(max=max(block_table.shape[1] - 1, 0))
        row = block_table[b, page].long() * page_size + j % max(page_size, 1)
    # The heads of a dense cache lie one behind the other.
    row = row + room * torch.arange(heads, device=device)[:, None]
    return ends.int(), row.masked_fill(slot >= ends[-1], -1).int()[None, :, None]


def _fake(
    lengths: Any, block_table: Any, new: int, room: int, pages: int, page_size: int, heads: int
) -> Any:
    B = lengths.shape[0]
    shapes = (B + 1,), (1, heads, 1, B * room)
    return [lengths.new_empty(shape, dtype=torch.int32) for shape in shapes]


INDEX = opaque(
    "attention_decode_index",
    "(Tensor lengths, Tensor? block_table, SymInt num_new, SymInt room, SymInt pages, SymInt page_size, SymInt heads)"
    " -> (Tensor ends, Tensor slots)",
    _index,
    _fake,
)


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor, block_table: Any, new: int,
    room: int, extras: Sequence[Any], mask: list[int], numbers: list[float], backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """o [B, Hq, Nq, Dv] and lse; ``extras`` are the op's arguments between v and the mask."""
    B, Hq, Nq, D = q.shape
    Hk = k_cache.shape[1 if block_table is None else 2]
    is_paged, heads = block_table is not None, 1 if B == 1 or block_table is not None else Hk
    ends_k, slots = INDEX(lengths, block_table, new, room, *k_cache.shape[:2], heads)
    ends_q = torch.arange(B + 1, dtype=torch.int32, device=q.device) * Nq
    ours = {"cu_q": ends_q, "cu_k": ends_k, "slots_k": slots}
    op = OPS["attention"]
    names = op.arguments[3:-2]
    o, lse, _ = op.call(
        q.transpose(0, 1).reshape(1, Hq, B * Nq, D),
        *(_rows(cache, is_paged, Hk) for cache in (k_cache, v_cache)),
        *(ours.get(name, t) for name, t in zip(names, extras)),
        mask,
        numbers,
        backend=backend,
    )
    return (
        o.view(Hq, B, Nq, v_cache.shape[3]).transpose(0, 1).contiguous(),
        lse.view(Hq, B, Nq).transpose(0, 1).contiguous(),
    )


def _rows(cache: torch.Tensor, is_paged: bool, Hk: int) -> torch.Tensor:
    """A cache as [1, Hk, rows, D], of which ``INDEX`` counts the rows."""
    if is_paged:
        return unit_stride(cache).flatten(0, 1).transpose(0, 1)[None]
    if cache.shape[0] == 1:
        return unit_stride(cache)
    rows = unit_stride(cache).flatten(0, 2)
    return rows.expand(1, Hk, *rows.shape)
