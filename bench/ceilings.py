"""The measured limits of this machine: what no kernel exceeds, timed by loops that do nothing else.

On the processor the loops are native (csrc/cpu/ceilings.cc), one per instruction set; without the compiled
library there are no ceilings.  On a GPU they are a large matrix product and a device-to-device copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.backends import compiled_library
from fastattn.bench.timing import interleave

FLOPS = 4e8  # a call of the arithmetic loops: a few milliseconds
SAMPLES = 0.06  # seconds


class Ceilings:
    """Measures when asked and remembers every measurement: ``history["fma float32"]`` are rates."""

    def __init__(self, backend: str, device: str) -> None:
        self.device = device
        self.isa = backend.removeprefix("cpu-") if backend.startswith("cpu-") else ""
        native = compiled_library()
        self.native = getattr(native, self.isa, None) if native and self.isa else None
        if not hasattr(self.native, "ceiling_fma"):
            self.native = None
        self.sums = torch.zeros(64)
        self.history: dict[str, list[float]] = {}

    def arithmetic(self, dtype: torch.dtype) -> float | None:
        """Operations a second, in the instructions that a kernel of this dtype may use."""
        if self.device == "cuda":
            return self._measure(f"matmul {dtype}".replace("torch.", ""), *_matmul(dtype))
        if not self.native:
            return None
        dot = dtype == torch.bfloat16 and self.isa == "avx512bf16"
        loop: Callable[..., Any] = self.native.ceiling_dot if dot else self.native.ceiling_fma
        flops = FLOPS * torch.get_num_threads() * (2 if dot else 1)
        return self._measure(
            "bf16 dot" if dot else "float32 FMA", lambda: loop(self.sums, flops), flops
        )

    def reading(self, size: float) -> float | None:
        """Bytes a second, read from a buffer of ``size`` bytes (a cache may hold it) or copied on a GPU."""
        if self.device == "cuda":
            a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
            b = torch.empty_like(a)
            return self._measure("copy", lambda: b.copy_(a), 2.0 * a.numel())
        if not self.native:
            return None
        native, megabytes = self.native, 1 << max(0, round(size / 2**20) - 1).bit_length()
        data = torch.zeros(min(megabytes, 512) << 18)
        name = f"read {min(megabytes, 512)} MB"
        return self._measure(name, lambda: native.ceiling_read(self.sums, data), 4.0 * data.numel())

    def _measure(self, name: str, call: Callable[[], Any], amount: float) -> float:
        """The rate now; where the machine was too busy to tell, the best of the run so far."""
        timing = interleave({name: [call]}, SAMPLES, self.device)[name]
        rates = self.history.setdefault(name, [])
        rates.append(amount / timing.low)
        return rates[-1] if timing.clean else max(rates)


def _matmul(dtype: torch.dtype, n: int = 8192) -> tuple[Callable[[], Any], float]:
    a = torch.randn(n, n, device="cuda").to(dtype)
    return lambda: a @ a, 2.0 * n**3
