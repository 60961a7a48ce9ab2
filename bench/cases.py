"""What is timed: rows made from the descriptors' bench cases, and the calls of each contender."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.backends import Backend
from fastattn.bench.timing import Call
from fastattn.op import OPS, Case, Cost, Op
from fastattn.testing import floats, invoke, maker, prove, refusal, why_not, with_floats

OURS = "fastattn"
SETS, ENOUGH = (
    3,
    64e6,
)  # input sets that take turns: up to three, fewer where fewer fill so many bytes
PATIENT = 1e10  # operations of a case long enough to share out among threads, and short enough to wait for


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``kind`` is "speed", or "call" for the overhead on tiny inputs, "threads" for one thread against all,
    "isa" for ``backend`` against ``others``, the narrower instruction sets.
    """

    op: Op
    backend: Backend
    dtype: torch.dtype
    case: Case
    direction: str
    kind: str = "speed"
    others: tuple[Backend, ...] = ()

    @property
    def cost(self) -> Cost:
        return self.op.cost(self.case, self.dtype.itemsize)

    @property
    def flops(self) -> float:
        return self.cost.flops if self.direction == "forward" else self.cost.backward_flops

    @property
    def whole(self) -> float:
        """Operations with nothing hidden: most peers compute what a mask hides, too."""
        return dataclasses.replace(self, case=self.case.but(mask=None)).flops

    @property
    def bytes(self) -> float:
        return self.cost.bytes if self.direction == "forward" else self.cost.backward_bytes

    def __str__(self) -> str:
        return f"{self.op.name} {label(self.case)} {_short(self.dtype)} {self.direction}"

    @property
    def sets(self) -> int:
        return max(1, min(SETS, round(ENOUGH / max(self.cost.bytes, 1.0))))


def rows(
    op: Op, backends: Sequence[Backend], dtypes: Sequence[torch.dtype], quick: bool
) -> Iterator[Row]:
    """Every row of an op, small cases first, so that the large ones' times can be foretold.

    A row is timed on the first of ``backends`` that accepts it.
    """
    for dtype in (d for d in op.dtypes if d in dtypes):
        ordered = sorted(op.bench, key=lambda case: op.cost(case, 4).flops)
        accepting = [accepts(op, backends, dtype, case) for case in ordered]
        plain = dtype == torch.float32
        if plain and accepting and accepting[0]:
            yield Row(op, accepting[0][0], dtype, op.cases[0], "forward", "call")
        for case, able in zip(ordered, accepting, strict=True):
            for direction in op.directions if able else ():
                yield Row(op, able[0], dtype, case, direction)
        heavy = [
            pair
            for pair in zip(ordered, accepting, strict=True)
            if op.cost(pair[0], 4).flops < PATIENT
        ][-1:]
        for case, able in heavy if plain or not quick else ():
            isas = [b for b in able if b.family == "cpu" and b.name != "cpu-scalar"]
            for direction in op.directions if able and able[0].device == "cpu" else ():
                if torch.get_num_threads() > 1:
                    yield Row(op, able[0], dtype, case, direction, "threads")
                if len(isas) > 1 and able[0] in isas:
                    yield Row(op, isas[0], dtype, case, direction, "isa", tuple(isas[1:]))


def accepts(op: Op, backends: Sequence[Backend], dtype: torch.dtype, case: Case) -> list[Backend]:
    """Those of ``backends`` that run the case, in the op's order."""
    call = op.make(case, _unwritten(dtype))
    return [b for b in op.backends if b in backends and not refusal(op, b, call)]


def _unwritten(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Tensors whose shapes are read and whose memory is never touched."""

    def make(*shape: int, wide: bool | None = False) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32 if wide else dtype)

    return make


@functools.cache
def contract(op: str, backend: str, dtype: torch.dtype) -> str:
    """Prove the largest contract case that ``backend`` accepts: "" or what is wrong.  No number on red."""
    described = OPS[op]
    row = described.by_name[backend]
    for case in sorted(
        described.cases, key=lambda case: described.cost(case, 4).flops, reverse=True
    ):
        if not why_not(described, row, dtype, case):
            try:
                prove(described, row, dtype, case)
            except Exception as error:  # whatever it is, no time is printed
                return f"{case!r}: {type(error).__name__}: {error}"
            return ""
    return "no contract case is accepted"


@functools.lru_cache(maxsize=1)
def inputs(op: str, dtype: torch.dtype, case: Case, device: str, sets: int) -> list[dict[str, Any]]:
    """Random inputs of a case; kept for the next row, which is often the other direction of the same."""
    return [OPS[op].make(case, maker(dtype, device, case.layout, seed)) for seed in range(sets)]


def peers(row: Row, every_peer: bool = False) -> list[str]:
    """Against whom a row is timed; without ``every_peer``, against PyTorch alone."""
    if row.kind == "isa":
        return [b.name for b in row.others]
    if row.kind == "threads" or not row.op.peers:
        return []
    offered = row.op.peers(**row.op.make(row.case, _unwritten(row.dtype)))
    return [name for name in offered if every_peer or name.startswith("torch")]


def contender(row: Row, name: str) -> Callable[..., Any]:
    """The function called ``name`` in a row's columns: ours, another backend of ours, or a peer's."""
    if name == OURS or row.kind == "isa":
        return functools.partial(_ours, row.op, row.backend.name if name == OURS else name)
    assert row.op.peers is not None
    return row.op.peers(**_inputs(row)[0])[name]


def _ours(op: Op, backend: str, **values: Any) -> Any:
    return invoke(op, values, backend=backend)


def calls(row: Row, function: Callable[..., Any]) -> list[Call]:
    """One call for each input set: the forward without grad, or the backward of a graph that stays."""
    return [_call(row.direction, function, values) for values in _inputs(row)]


def _inputs(row: Row) -> list[dict[str, Any]]:
    return inputs(row.op.name, row.dtype, row.case, row.backend.device, row.sets)


def _call(direction: str, function: Callable[..., Any], values: dict[str, Any]) -> Call:
    if not isinstance(function, functools.partial):  # a peer takes the arguments it names
        names = inspect.signature(function).parameters
        values = {n: value for n, value in values.items() if n in names}
    if direction == "forward":
        return functools.partial(function, **values)
    leaves = {n: t.detach().requires_grad_() for n, t in floats(values).items()}
    outs = function(**with_floats(values, leaves))
    outs = tuple(o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.requires_grad)
    upstream = tuple(torch.randn_like(o) for o in outs)
    return functools.partial(
        torch.autograd.grad, outs, tuple(leaves.values()), upstream, retain_graph=True
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def label(case: Case) -> str:
    """A case in a few words: "B1 Hq8 N1024 D64 Causal"."""
    values = {n: v for n, v in vars(case).items() if v not in (None, False)}
    if values.get("Nq") == values.get("Nk") and "Nq" in values:
        values = {"N" if n == "Nq" else n: v for n, v in values.items() if n != "Nk"}
    return " ".join(_word(name, value) for name, value in values.items())


def _word(name: str, value: Any) -> str:
    if value is True:
        return name
    if dataclasses.is_dataclass(value):
        changed = [
            getattr(value, f.name)
            for f in dataclasses.fields(value)
            if getattr(value, f.name) != f.default
        ]
        return type(value).__name__ + (f"({', '.join(map(str, changed))})" if changed else "")
    if name == "lengths":
        first = [n if isinstance(n, int) else n[0] for n in value]
        return f"lengths {min(first)}-{max(first)}"
    return str(value) if name == "mask" or isinstance(value, str) else f"{name}{value}"
