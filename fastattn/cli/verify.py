"""``fastattn verify``: every op x backend x dtype x case against the fp64 reference.

The cases run in worker processes, so that a kernel that kills its process is a finding and not the end:
one for the processor, the GPU and the reference itself, and beside it, where Triton is installed and there
is no GPU, one with Triton's interpreter, which is slow and gets a spread of the small cases (all with --all).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastattn.backends import Backend, triton_device
from fastattn.bench.records import append
from fastattn.cli import machine, select, support
from fastattn.cli.terminal import Progress, table
from fastattn.op import Case, Op
from fastattn.testing import prove, prove_reference, why_not

GRACE = 60.0  # seconds that the last case may take when time is up
SHOWN = 3  # failures printed for each op, backend and dtype
QUICK, INTERPRETED = (
    10,
    12,
)  # cases for each op, backend and dtype with --quick, and in Triton's interpreter
Point = tuple[Op, Backend, torch.dtype, Case]
Key = tuple[str, str, str]  # op, backend, dtype


@dataclass
class Tally:
    """What became of the cases of one op, backend and dtype."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    worst: float = 0.0  # share of the error budget

    def __str__(self) -> str:
        words = [f"{self.passed} ok" if self.passed else ""]
        words += [
            f"{self.failed} FAILED" if self.failed else "",
            f"{self.skipped} skipped" if self.skipped else "",
        ]
        return " ".join(filter(None, words)) + (f" {self.worst:.0%}" if self.passed else "")


@dataclass
class Findings:
    tallies: dict[Key, Tally] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    absent: set[tuple[str, str]] = field(
        default_factory=set
    )  # op, backend that this machine cannot run

    def add(self, said: dict[str, Any]) -> None:
        tally = self.tallies.setdefault((said["op"], said["backend"], said["dtype"]), Tally())
        if said["state"] == "passed":
            tally.passed += 1
            tally.worst = max(tally.worst, said["worst"])
        elif said["state"] == "failed":
            tally.failed += 1
            self.failures.append(
                f"{said['op']} {said['backend']} {said['dtype']} {said['case']}: {said['why']}"
            )
        else:
            tally.skipped += 1
            self.reasons[f"{said['backend']}: {said['why']}"] += 1
            if said["state"] == "absent":
                self.absent.add((said["op"], said["backend"]))

    def idle(self) -> list[str]:
        """Backends that could run and did not execute one case: a proof that proved nothing."""
        executed = {(op, b): 0 for op, b, _ in self.tallies}
        for (op, b, _), tally in self.tallies.items():
            executed[op, b] += tally.passed + tally.failed
        if not any(executed.values()):
            return ["not one case was executed"]
        return [
            f"{op} {b}: the backend is available and not one case was executed"
            for (op, b), count in executed.items()
            if not count and (op, b) not in self.absent
        ]


def plan(arguments: argparse.Namespace) -> list[Point]:
    """What to prove, in rounds over backends and dtypes, so that an early end has seen all of them."""
    chosen, dtypes, columns = select.backends(arguments), select.dtypes(arguments), []
    for op in select.ops(arguments):
        for backend in (b for b in op.backends if b in chosen):
            own = (torch.float64, *op.dtypes) if backend.family == "reference" else op.dtypes
            for dtype in (d for d in own if d in dtypes):
                cases = list(op.cases)
                if backend.family == "triton" and backend.device == "cpu" and not arguments.all:
                    cases.sort(key=lambda case, op=op: op.cost(case, 4).flops)  # type: ignore[misc]
                    cases = _spread(cases[: max(len(cases) * 3 // 4, 1)], INTERPRETED)
                if arguments.quick:
                    cases = _spread(cases, QUICK)
                columns.append([(op, backend, dtype, case) for case in cases])
    longest = max(map(len, columns), default=0)
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


def _spread(cases: list[Case], count: int) -> list[Case]:
    step = max(1.0, len(cases) / count)
    return [cases[int(i * step)] for i in range(min(count, len(cases)))]


# ---------------------------------------------------------------------------------------------------
# A worker: proves its plan, one JSON line before and one after each case


def work(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + 60 * arguments.minutes
    points = plan(arguments)
    _say({"total": len(points)})
    for op, backend, dtype, case in points:
        about = {"op": op.name, "backend": backend.name, "dtype": _name(dtype), "case": repr(case)}
        _say(about | {"state": "running"})
        if time.monotonic() > deadline:
            _say(
                about | {"state": "skipped", "why": f"time is up (--minutes {arguments.minutes:g})"}
            )
        else:
            _say(about | _verdict(op, backend, dtype, case))
    return 0


def _verdict(op: Op, backend: Backend, dtype: torch.dtype, case: Case) -> dict[str, Any]:
    try:
        if why := support.unavailable(backend):
            return {"state": "absent", "why": why}
        if why := why_not(op, backend, dtype, case):
            return {"state": "skipped", "why": why}
        if dtype == torch.float64 and backend.family == "reference":
            return {"state": "passed", "worst": prove_reference(op, case)}
        return {"state": "passed", "worst": prove(op, backend, dtype, case)}
    except AssertionError as failure:
        return {"state": "failed", "why": str(failure)}
    except Exception as error:  # whatever a kernel raises is a finding
        return {"state": "failed", "why": f"{type(error).__name__}: {error}"}


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


# ---------------------------------------------------------------------------------------------------
# The command: starts the workers, listens, prints


def main(arguments: argparse.Namespace) -> int:
    if arguments.worker:
        return work(arguments)
    began, findings = time.monotonic(), Findings()
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
    workers = [_Worker(arguments, names, extra, lines) for names, extra in _shares(arguments)]
    running, bar = len(workers), Progress(0, "verify")
    with bar:
        while running:
            try:
                said = lines.get(
                    timeout=max(1.0, began + 60 * arguments.minutes + GRACE - time.monotonic())
                )
            except queue.Empty:
                for worker in workers:
                    worker.process.kill()  # a case that never ends; its end is heard like any other
                continue
            if said is None:
                running -= 1
            elif "total" in said:
                bar.total += said["total"]
            else:
                if said["state"] != "running":
                    findings.add(said)
                bar.step(
                    f"{said['op']} {said['backend']} {said['dtype']}",
                    int(said["state"] != "running"),
                )
    for worker in workers:
        findings.failures += worker.obituary()
    problems = findings.failures + findings.idle()
    print("\n".join(_lines(findings, problems)))
    print(f"{'RED' if problems else 'green'} after {time.monotonic() - began:.0f} s")
    if arguments.json:
        append(Path(arguments.json), _records(findings, problems))
    return 1 if problems else 0


def _shares(arguments: argparse.Namespace) -> Iterator[tuple[list[str], dict[str, str]]]:
    """For each worker the backends it proves and what its environment adds."""
    anywhere = argparse.Namespace(**vars(arguments) | {"device": None})
    interpret = (
        arguments.device != "cuda"
        and triton_device() == "cuda"
        and not torch.cuda.is_available()
        and machine.versions()["triton"] != "not installed"
        and any(b.family == "triton" for b in select.backends(anywhere))
    )
    names = list(
        dict.fromkeys(
            b.name for b in select.backends(arguments) if not (interpret and b.family == "triton")
        )
    )
    quiet = {"OMP_WAIT_POLICY": "passive"}  # two processes share the cores
    if names:
        yield names, quiet
    if interpret:
        yield ["triton"], quiet | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if not names and not interpret:
        raise ValueError(f"no backend runs on --device {arguments.device}")


class _Worker:
    """A process that proves, and a thread that hears it."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        names: list[str],
        extra: dict[str, str],
        lines: queue.Queue[Any],
    ) -> None:
        command = [
            sys.executable,
            "-m",
            "fastattn",
            "verify",
            "--worker",
            "--backend",
            ",".join(names),
        ]
        for option in ("op", "dtype", "minutes"):
            if getattr(arguments, option) is not None:
                command += [f"--{option}", str(getattr(arguments, option))]
        command += ["--quick"] * arguments.quick + ["--all"] * arguments.all
        self.last: dict[str, Any] = {}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=os.environ | extra
        )
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()

    def _listen(self, lines: queue.Queue[Any]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.last = json.loads(line)
                lines.put(self.last)
        self.process.stdout.close()
        self.process.wait()
        lines.put(None)

    def obituary(self) -> list[str]:
        """A sentence when the process died before its last case."""
        with self.errors:
            self.errors.seek(0)
            last, end = self.last, self.errors.read().strip()[-2000:]
        if not self.process.returncode:
            return []
        where = (
            f"{last['op']} {last['backend']} {last['dtype']} {last['case']}"
            if "op" in last
            else "before any case"
        )
        return [f"{where}: the process ended with status {self.process.returncode} {end}".rstrip()]


def _lines(findings: Findings, problems: list[str]) -> list[str]:
    dtypes = [s for s in map(_name, support.SHORT) if any(key[2] == s for key in findings.tallies)]
    rows = [["op", "backend", *dtypes]]
    for op, backend in sorted(
        dict.fromkeys(key[:2] for key in findings.tallies), key=lambda pair: pair[0]
    ):
        cells = [findings.tallies.get((op, backend, dtype)) for dtype in dtypes]
        rows.append([op, backend, *(str(cell) if cell else "" for cell in cells)])
    lines = [
        "Cases passed, and the largest share of the error budget that one used",
        "",
        *table(rows),
        "",
    ]
    lines += [f"{count} skipped: {reason}" for reason, count in sorted(findings.reasons.items())]
    if any(key[1] == "triton" for key in findings.tallies) and not torch.cuda.is_available():
        lines.append(
            f"triton ran in its interpreter, on at most {INTERPRETED} cases a dtype unless --all was given"
        )
    return lines + _shortened(problems)


def _shortened(problems: list[str]) -> list[str]:
    """The first few of each op, backend and dtype; one cause usually fails many cases."""
    lines, seen = [], Counter[str]()
    for problem in problems:
        key = " ".join(problem.split()[:3])
        seen[key] += 1
        lines += [f"FAILED {problem}"] if seen[key] <= SHOWN else []
    return lines + [
        f"... and {n - SHOWN} more of {key} (--json has all)"
        for key, n in seen.items()
        if n > SHOWN
    ]


def _records(findings: Findings, problems: list[str]) -> list[dict[str, Any]]:
    about = {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "date": machine.now(),
    }
    return [
        {"kind": "verify", "op": op, "backend": backend, "dtype": dtype, **vars(tally)}
        | {"failures": [p for p in problems if p.startswith(f"{op} {backend} {dtype} ")]}
        | about
        for (op, backend, dtype), tally in findings.tallies.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
