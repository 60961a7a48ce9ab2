"""``fastattn info``: what is built, what is not and why, what the machine offers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastattn.backends import CPU_ISAS, compiled_library, why_no_isa, why_no_triton
from fastattn.cli import machine, support
from fastattn.cli.terminal import table


def gather() -> dict[str, Any]:
    native = compiled_library()
    rows, reasons = support.here()
    return {
        "versions": machine.versions(),
        "commit": machine.commit(),
        "machine": machine.machine(),
        "isas": {isa: why_no_isa(isa) or "yes" for isa in CPU_ISAS},
        "chosen": next((isa for isa in CPU_ISAS if not why_no_isa(isa)), "none"),
        "compiled": list(native.compiled) if native else [],
        "threads": torch.get_num_threads(),
        "openmp": machine.openmp(),
        "built": {
            "cpu (C++)": machine.missing("_cpu") or "yes",
            "cuda (C++)": machine.missing("_cuda") or "yes",
            "triton": why_no_triton() or "yes",
        },
        "support": {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]},
        "reasons": reasons,
        "limits": {
            row[0]: dict(zip(support.matrix()[0][1:], row[1:], strict=True))
            for row in support.matrix()[1:]
        },
    }


def main(arguments: argparse.Namespace) -> int:
    found = gather()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    m = found["machine"]
    pairs = [
        ("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items())),
        ("commit", found["commit"] or "an installed package, no checkout"),
        ("processor", f"{m['cpu']}, {m['cores']} cores, {m['arch']}, {m['os']}"),
        *(
            (f"  {isa}", why + (" (chosen)" if isa == found["chosen"] else ""))
            for isa, why in found["isas"].items()
        ),
        ("threads", str(found["threads"])),
        ("OpenMP", found["openmp"]),
        ("GPU", ", ".join(m["gpus"]) or "none"),
        *((name, why) for name, why in found["built"].items()),
    ]
    width = max(len(name) for name, _ in pairs) + 2
    lines = [f"{name:<{width}}{value}" for name, value in pairs]
    names = list(next(iter(found["support"].values())))
    rows = [["op", *names], *([op, *cells.values()] for op, cells in found["support"].items())]
    lines += ["", "Runs here", *table(rows)]
    lines += [f"  {name}: {why}" for name, why in found["reasons"].items()]
    families = list(next(iter(found["limits"].values())))
    rows = [["op", *families], *([op, *cells.values()] for op, cells in found["limits"].items())]
    return [*lines, "", "Takes", *table(rows)]
