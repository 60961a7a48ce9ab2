"""Times of functions that take turns in one process.

The contenders are called in rotation (ours, peer, ours, peer, ...), so that whatever the machine does to
one it does to the other, and each call takes the next of several input sets, so that none finds its
operands where the last call left them.  A sample counts as undisturbed when the kernel took no processor
from this process while it ran (``ru_nivcsw`` of getrusage, which counts every thread).  The median and
the quartiles are of undisturbed samples; where there are fewer than three, of the third that lost the
processor least often, and ``clean`` is False.
On a GPU a sample is the time between two events of the stream, after the second-level cache was
overwritten.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # not a Unix: every sample counts
    resource = None  # type: ignore[assignment]

Call = Callable[[], Any]
FEWEST, MOST = 3, 60  # rounds


@dataclass(frozen=True)
class Timing:
    """Seconds a call: fastest, median and quartiles of ``kept`` samples out of ``taken``."""

    fastest: float
    median: float
    low: float
    high: float
    kept: int
    taken: int
    clean: bool


def summary(samples: Sequence[tuple[float, int]]) -> Timing:
    """The quartiles of the undisturbed ones among (seconds, how often the processor was taken away)."""
    kept = [seconds for seconds, lost in samples if not lost]
    clean = len(kept) >= FEWEST
    most = sorted(lost for _, lost in samples)[
        min(max(FEWEST, len(samples) // 3), len(samples)) - 1
    ]
    used = kept if clean else [seconds for seconds, lost in samples if lost <= most]
    low, median, high = (
        statistics.quantiles(used, n=4, method="inclusive") if len(used) > 1 else used * 3
    )
    return Timing(min(used), median, low, high, len(kept), len(samples), clean)


def interleave(
    contenders: dict[str, Sequence[Call]], seconds: float, device: str = "cpu"
) -> dict[str, Timing]:
    """Time each contender, given as one call per input set, in about ``seconds`` altogether."""
    clock = _Events() if device == "cuda" else _Clock()
    repeats, round_time = {}, 0.0
    for name, calls in contenders.items():
        first = min(clock.sample(calls, 0, 1)[0] for _ in range(2))
        repeats[name] = max(1, min(1000, int(clock.shortest / max(first, 1e-9))))
        round_time += repeats[name] * first
    rounds = max(FEWEST, min(MOST, int(seconds / max(round_time, 1e-9))))
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, calls in contenders.items():
            samples[name].append(clock.sample(calls, turn * repeats[name], repeats[name]))
    return {name: summary(taken) for name, taken in samples.items()}


class _Clock:
    shortest = 2e-4  # seconds a sample should last: shorter calls are repeated within it

    def sample(self, calls: Sequence[Call], start: int, repeats: int) -> tuple[float, int]:
        turns = [calls[(start + i) % len(calls)] for i in range(repeats)]
        before = _preemptions()
        began = time.perf_counter()
        for call in turns:
            call()
        seconds = (time.perf_counter() - began) / repeats
        return seconds, _preemptions() - before


class _Events:
    shortest = 0.0  # each call finds the cache overwritten

    def __init__(self) -> None:
        self.cache = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # 256 MB

    def sample(self, calls: Sequence[Call], start: int, repeats: int) -> tuple[float, int]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        begin.record()
        for i in range(repeats):
            calls[(start + i) % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats, 0


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def peak_memory(call: Call, device: str = "cpu") -> int | None:
    """Bytes that ``call`` needs at its worst moment, its outputs included; None where nobody can tell.

    On Linux the kernel's own high-water mark of resident memory is reset before the call: it sees torch's
    allocations and a library's scratch memory alike, in steps of a few pages.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        _return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _return_free_memory() -> None:
    """Freed memory that the allocator keeps is resident already and would hide what a call needs."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
