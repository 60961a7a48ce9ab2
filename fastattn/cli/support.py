"""Which op runs where, read from the descriptors' limits."""

from __future__ import annotations

import re

import torch

from fastattn.backends import Backend, Limit
from fastattn.op import OPS, Op
from fastattn.testing import asked, make

SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
HUGE = 1 << 40


def of_call(limit: Limit) -> bool:
    """Whether a limit is about the call's facts; one that needs none is about the machine."""
    try:
        limit.holds({})
    except KeyError:
        return True
    return False


def unavailable(backend: Backend) -> str:
    """Why ``backend`` cannot run on this machine whatever the call, or ""."""
    limits = [limit for limit in backend.limits if not of_call(limit)]
    return "; ".join(limit.why({}) for limit in limits if not limit.holds({}))


def limits(op: Op, backend: Backend) -> str:
    """dtypes and bounds of one row of the descriptor: "f32 bf16 f16, D at most 256"."""
    _, known = asked(op, make(op, op.cases[0], op.dtypes[0], "cpu"))
    known["device"] = backend.device
    own = [limit for limit in backend.limits if of_call(limit)]
    dtypes = [
        s for dtype, s in SHORT.items() if all(x.holds(known | {"dtype": dtype}) for x in own)
    ]
    bounds = []
    for name in (
        n for n, value in known.items() if isinstance(value, int) and not isinstance(value, bool)
    ):
        extreme = known | {name: HUGE}
        for sentence in (x.why(extreme) for x in own if not x.holds(extreme)):
            if bound := re.fullmatch(r"(\w+) is .* \((at most .*)\)", sentence):
                bounds.append(" ".join(bound.groups()))
    return ", ".join([" ".join(dtypes), *bounds])


def matrix() -> list[list[str]]:
    """Op x family of backends, the same on every machine."""
    families = list(dict.fromkeys(b.family for op in OPS.values() for b in op.backends))
    families.sort(key=("cpu", "triton", "cuda", "reference").index)
    rows = [["op", *families]]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        cells = [
            "; ".join(dict.fromkeys(limits(op, b) for b in op.backends if b.family == f))
            for f in families
        ]
        rows.append([op.name, *(cell or "no" for cell in cells)])
    return rows


def here() -> tuple[list[list[str]], dict[str, str]]:
    """Op x backend on this machine, and for each backend that cannot run, why."""
    names = list(dict.fromkeys(b.name for op in OPS.values() for b in op.backends))
    rows, reasons = [["op", *names]], {}
    for op in sorted(OPS.values(), key=lambda op: op.name):
        cells = []
        for name in names:
            backend = op.by_name.get(name)
            why = "no kernel" if backend is None else unavailable(backend)
            if backend is not None and why:
                reasons[name] = why
            cells.append("-" if why else "yes")
        rows.append([op.name, *cells])
    return rows, reasons
