"""``fastattn bench``: speed, ratio to the peers, share of the machine's measured limits."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from fastattn.backends import Backend
from fastattn.bench import cases, figures, records, timing
from fastattn.bench.ceilings import Ceilings
from fastattn.cli import base, machine, select, support
from fastattn.cli.terminal import Progress, duration, table
from fastattn.op import Op

QUICK_SECONDS, SECONDS = 1.1, 4.0  # what a row may take
QUICK_MINUTES = 3.3  # what all rows may take, beside those that are long by themselves
QUICK_PATIENCE, PATIENCE = 6.0, 90.0  # a contender that would need more is left out
OWN = 3  # times as patient with ourselves
TELLING = 5e-2  # seconds of a call from which the time of a larger one can be foretold
CALLS = 5  # the fewest calls of a contender that make a row
INTENSE = 40.0  # operations a byte above which nothing waits for memory

HEADER = [
    "op",
    "case",
    "dtype",
    "",
    "time",
    "spread",
    "times faster than",
    "rate",
    "of ceiling",
    "memory",
]
RIGHT = "time|spread|rate|of ceiling|memory"


def main(arguments: argparse.Namespace) -> int:
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads is {arguments.threads}; it takes an integer >= 1")
        torch.set_num_threads(arguments.threads)
    if arguments.base:
        base.check(arguments.base)
    run = Run(arguments)
    if not run.rows:
        print("Nothing to time here.", *run.notes, sep="\n")
        return 1
    found = run.all()
    if arguments.json:
        records.append(Path(arguments.json), found)
        print(f"{len(found)} rows appended to {arguments.json}")
    if arguments.plot:
        if figures.installed():
            for path in figures.save(found, title(found), Path(arguments.plot)):
                print(f"wrote {path}")
        else:
            print("No figures: matplotlib is not installed (pip install matplotlib).")
    if arguments.base:
        print("\n".join(base.compare(arguments, found)))
    return 1 if run.red else 0


def title(found: list[records.Record]) -> str:
    r = found[0]
    where = f"fastattn {r['versions']['fastattn']} {r['commit']}".strip()
    return (
        f"{records.machine_name(r)} · {where} · torch {r['versions']['torch']} · {r['date'][:10]}"
    )


class Run:
    """One invocation: its rows, what it knows of the machine, and what it learns on the way."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.quick = arguments, arguments.quick
        self.notes: list[str] = []
        self.red: dict[str, str] = {}  # op, backend and dtype whose contract fails, and how
        self.rates: dict[tuple[Any, ...], float] = {}  # operations a second, of each contender
        self.ceilings: dict[str, Ceilings] = {}
        self.about: dict[str, Any] = {
            "machine": machine.machine(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "date": machine.now(),
        }
        chosen, dtypes = select.backends(arguments), select.dtypes(arguments)
        self.rows: list[cases.Row] = []
        for op in select.ops(arguments):
            able = self._worth_timing(op, chosen)
            self.rows += cases.rows(op, able, dtypes, self.quick) if able else []
        share = QUICK_MINUTES * 60 / max(len(self.rows), 1)
        self.seconds = min(QUICK_SECONDS, share) if self.quick else SECONDS
        self.patience = QUICK_PATIENCE if self.quick else PATIENCE

    def _worth_timing(self, op: Op, chosen: list[Backend]) -> list[Backend]:
        """The reference only on request, a GPU's kernels only on a GPU, the processor only without one."""
        able = [
            b
            for b in op.backends
            if b in chosen and not (b.family == "triton" and b.device == "cpu")
        ]
        if not self.arguments.backend:
            able = [b for b in able if b.family != "reference"]
        if not self.arguments.device and not self.arguments.backend and torch.cuda.is_available():
            able = [b for b in able if b.device == "cuda"]
        if all(support.unavailable(b) for b in able):
            self.notes.append(
                f"{op.name}: no kernel runs here; --backend reference times the formula itself"
            )
            return []
        return able

    def all(self) -> list[records.Record]:
        found: list[records.Record] = []
        widths = self._widths()
        with Progress(len(self.rows), "bench") as bar:
            bar.say(self._banner())
            for line in table([HEADER], RIGHT, widths):
                bar.say(line)
            for row in self.rows:
                bar.step(f"{row.op.name} {cases.label(row.case)} {row.direction}", 0)
                key = (row.op.name, row.backend.name, row.dtype)
                if wrong := cases.contract(*key):
                    self.red[f"{row.op.name} {row.backend.name} {_name(row.dtype)}"] = wrong
                record = None if wrong else self.time(row)
                if record:
                    found.append(record)
                    bar.say(table([HEADER, self._cells(record)], RIGHT, widths)[-1])
                bar.step(row.op.name)
            for line in self._closing(found):
                bar.say(line)
        return found

    def time(self, row: cases.Row) -> records.Record | None:
        """One row: a warm call each, whose memory is noted, then samples in turn."""
        device, threads = row.backend.device, torch.get_num_threads()
        rivals, memory = {}, {}
        for name in (cases.OURS, *cases.peers(row, self.arguments.peers)):
            rate = self.rates.get((row.op.name, row.backend.name, row.dtype, row.direction, name))
            patience = self.patience * (OWN if name == cases.OURS else 1)
            work = row.flops if name == cases.OURS else row.whole
            if rate and CALLS * work / rate > patience:
                needed = duration(work / rate)
                self.notes.append(f"{row}: {name} left out; it would take about {needed} a call")
                if name == cases.OURS:
                    return None
                continue
            rivals[name] = cases.calls(row, cases.contender(row, name))
            memory[name] = timing.peak_memory(rivals[name][0], device)
        before = self._limits(row)
        if row.kind == "threads":
            times = self._by_threads(rivals[cases.OURS], threads)
        else:
            times = timing.interleave(rivals, self.seconds, device)
        peak, reading = (
            max(filter(None, pair), default=None)
            for pair in zip(before, self._limits(row), strict=True)
        )
        ours = times.pop(cases.OURS)
        if row.kind == "speed":
            for name, t in {cases.OURS: ours, **times}.items():
                key = (row.op.name, row.backend.name, row.dtype, row.direction, name)
                if t.fastest > TELLING:
                    work = row.flops if name == cases.OURS else row.whole
                    self.rates[key] = work / t.fastest
        record: records.Record = {
            "kind": row.kind,
            "op": row.op.name,
            "case": repr(row.case),
            "label": cases.label(row.case),
            "dtype": _name(row.dtype),
            "direction": row.direction,
            "backend": row.backend.name,
            "device": device,
            "threads": threads,
            **_timed(ours),
            "peak_bytes": memory[cases.OURS],
            "peers": {
                name: {**_timed(t), "ratio": t.median / ours.median, "peak_bytes": memory.get(name)}
                for name, t in times.items()
            },
        }
        return record | _reached(row, ours.median, peak, reading) | self.about

    def _by_threads(self, calls: list[timing.Call], threads: int) -> dict[str, timing.Timing]:
        """All threads against one; not in turns, since a change of threads starts the pool anew."""
        found: dict[str, timing.Timing] = {}
        try:
            for name, count in (("1 thread", 1), (cases.OURS, threads)):
                torch.set_num_threads(count)
                calls[0]()
                found |= timing.interleave({name: calls}, self.seconds / 2)
        finally:
            torch.set_num_threads(threads)
        return found

    def _limits(self, row: cases.Row) -> tuple[float | None, float | None]:
        """Operations a second and bytes a second that this machine reaches now, where they can bound the row."""
        ceilings = self.ceilings.setdefault(
            row.backend.name, Ceilings(row.backend.name, row.backend.device)
        )
        return (
            ceilings.arithmetic(row.dtype) if row.flops else None,
            None if row.flops > INTENSE * row.bytes else ceilings.reading(row.bytes * row.sets),
        )

    # -- printing -----------------------------------------------------------------------------------

    def _banner(self) -> str:
        m, v = self.about["machine"], self.about["versions"]
        backends = list(dict.fromkeys(row.backend.name for row in self.rows))
        lines = [
            f"{m['cpu']}, {m['cores']} cores, {torch.get_num_threads()} threads; torch {v['torch']}; {', '.join(backends)}"
        ]
        for name in backends:
            device = next(row.backend.device for row in self.rows if row.backend.name == name)
            ceilings = self.ceilings.setdefault(name, Ceilings(name, device))
            for _ in range(3):
                for dtype in (torch.float32, torch.bfloat16):
                    ceilings.arithmetic(dtype)
                for size in (4e6, 256e6):
                    ceilings.reading(size)
            lines += _measured(name, ceilings)
        return "\n".join(lines) + "\n"

    def _cells(self, record: records.Record) -> list[str]:
        half = (record["high"] - record["low"]) / 2 / record["seconds"]
        against = {"threads": "one thread"}.get(record["kind"], "")
        ratios = [
            f"{peer['ratio']:.2f} {against or name}" for name, peer in record["peers"].items()
        ]
        unit = "GFLOP/s" if record["bound"] == "compute" else "GB/s"
        tiny = record["kind"] == "call"
        return [
            record["op"],
            "call overhead" if tiny else record["label"],
            record["dtype"],
            record["direction"],
            ("" if record["clean"] else "~") + duration(record["seconds"]),
            f"±{half:.0%}",
            ", ".join(ratios) or "-",
            "" if tiny else f"{record['rate'] / 1e9:.3g} {unit}",
            f"{record['share']:.0%}" if record["share"] else "" if tiny else "n/a",
            "" if tiny or record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e6:.1f} MB",
        ]

    def _widths(self) -> list[int]:
        longest = [max(len(f(row)) for row in self.rows) for f in (
            lambda row: row.op.name, lambda row: cases.label(row.case), lambda row: _name(row.dtype),
        )]  # fmt: skip
        against = 31 if any(row.kind == "isa" for row in self.rows) else 16
        return [longest[0], max(longest[1], 13), longest[2], 8, 8, 5, against, 13, 10, 9]

    def _closing(self, found: list[records.Record]) -> list[str]:
        lines = ["", "Ceilings over the whole run:"]
        lines += [line for pair in self.ceilings.items() for line in _measured(*pair)]
        if any(not record["clean"] for record in found):
            lines.append(
                "~ marks rows with fewer than three undisturbed samples: the machine was busy."
            )
        if any(record["share"] is None and record["kind"] == "speed" for record in found):
            lines.append(
                "n/a: ceilings are measured by the compiled library, which has none for this backend."
            )
        for record in found:
            if record["kind"] == "call":
                peers = ", ".join(
                    f"{n} {duration(p['seconds'])}" for n, p in record["peers"].items()
                )
                lines.append(
                    f"{record['op']}: a call on tiny inputs takes {duration(record['seconds'])} ({peers})."
                )
        lines += self.notes
        return lines + [
            f"{what} is wrong, so no time is given: {why}" for what, why in self.red.items()
        ]


def _measured(backend: str, ceilings: Ceilings) -> list[str]:
    """One line for each ceiling: its median and range over the run."""
    lines = []
    for name, rates in sorted(ceilings.history.items(), key=lambda item: (len(item[0]), item[0])):
        middle, low, high = (
            rate / 1e9 for rate in (statistics.median(rates), min(rates), max(rates))
        )
        unit = "GB/s" if name.startswith(("read", "copy")) else "GFLOP/s"
        lines.append(f"  {backend}  {name:<12} {middle:6.4g} {unit}, {low:.4g} to {high:.4g}")
    return lines or [f"  {backend}  ceilings n/a"]


def _reached(
    row: cases.Row, seconds: float, peak: float | None, reading: float | None
) -> dict[str, Any]:
    """The resource that bounds the row by its cost, the rate reached, and its share of the ceiling."""
    intense = row.flops > INTENSE * row.bytes
    compute = intense or bool(peak and reading and row.flops / peak > row.bytes / reading)
    rate, ceiling = (row.flops / seconds, peak) if compute else (row.bytes / seconds, reading)
    return {
        "flops": row.flops,
        "bytes": row.bytes,
        "bound": "compute" if compute else "memory",
        "rate": rate,
        "ceiling": ceiling,
        "share": rate / ceiling if ceiling and row.kind != "call" else None,
    }


def _timed(t: timing.Timing) -> dict[str, Any]:
    return {
        "seconds": t.median, "low": t.low, "high": t.high, "kept": t.kept, "taken": t.taken, "clean": t.clean
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
