"""The cases of ``fastattn bench`` under pytest-benchmark: pytest bench --benchmark-only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn.bench import cases
from fastattn.op import OPS

pytest.importorskip("pytest_benchmark")

LARGEST = 1e10  # operations: larger cases take minutes under pytest-benchmark's own rounds


def every() -> Iterator[Any]:
    """Each row once for fastattn and once for each peer, side by side in the row's group."""
    for op in OPS.values():
        kernels = [b for b in op.backends if b.family != "reference"]
        kernels = [b for b in kernels if not (b.family == "triton" and b.device == "cpu")]
        for row in cases.rows(op, kernels, list(op.dtypes), quick=True):
            if row.kind == "speed" and row.flops < LARGEST:
                for name in (cases.OURS, *cases.peers(row)):
                    yield pytest.param(row, name, id=f"{row}-{name}".replace(" ", "-"))


@pytest.mark.parametrize(("row", "contender"), list(every()))
def test_speed(benchmark: Any, row: cases.Row, contender: str) -> None:
    wrong = cases.contract(row.op.name, row.backend.name, row.dtype)
    assert not wrong, f"no time is given of what is wrong: {wrong}"
    calls = cases.calls(row, cases.contender(row, contender))
    turn = iter(range(1 << 62))
    wait = torch.cuda.synchronize if row.backend.device == "cuda" else lambda: None

    def call() -> None:
        calls[next(turn) % len(calls)]()
        wait()

    benchmark.group = str(row)
    benchmark.extra_info.update(backend=row.backend.name, flops=row.flops, bytes=row.bytes)
    benchmark(call)
