"""``fastattn bench --base REF``: the same rows on another revision, built in a worktree of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastattn.bench import records
from fastattn.bench.figures import torch_ratio
from fastattn.cli.machine import PACKAGE
from fastattn.cli.terminal import duration, table

ROOT = PACKAGE.parent
WORKTREE = ("git", "worktree")


def check(ref: str) -> None:
    """Refuse before anything is timed what could not be built afterwards."""
    if not (ROOT / ".git").exists():
        raise ValueError(
            f"--base is {ref!r}; it takes a git revision, and {ROOT} is no git checkout"
        )
    _do(f"{ref!r} is no revision", ROOT, "git", "rev-parse", "--verify", f"{ref}^{{commit}}")


def compare(arguments: argparse.Namespace, found: list[records.Record]) -> list[str]:
    """Lines of a table: their time over ours, and what each was beside PyTorch, for each row that both have."""
    python = [sys.executable, "-m"]
    pip = [*python, "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    bench = [*python, "fastattn", "bench", *["--quick"] * arguments.quick]
    for option in ("op", "backend", "device", "dtype", "threads"):
        if getattr(arguments, option):
            bench += [f"--{option}", str(getattr(arguments, option))]
    with tempfile.TemporaryDirectory(prefix="fastattn-base-") as folder:
        tree, site = f"{folder}/tree", f"{folder}/site"
        print(f"\nBuilding {arguments.base} ...", file=sys.stderr)
        _do("it has no worktree", ROOT, *WORKTREE, "add", "--detach", tree, arguments.base)
        try:
            _do(f"{arguments.base} does not build", Path(tree), *pip, site, tree)
            print(f"Timing {arguments.base} ...", file=sys.stderr)
            bench += ["--json", f"{folder}/base.jsonl"]
            where: dict[str, Any] = {"cwd": folder, "env": os.environ | {"PYTHONPATH": site}}
            subprocess.run(bench, stdout=subprocess.DEVNULL, check=False, **where)
            theirs = {records.identity(r): r for r in records.load(Path(folder))}
        finally:
            subprocess.run([*WORKTREE, "remove", "--force", tree], cwd=ROOT, check=False)
    return _table(arguments.base, found, theirs)


def _table(
    ref: str, found: list[records.Record], theirs: dict[tuple[object, ...], records.Record]
) -> list[str]:
    rows = [["op", "case", "dtype", "", ref, "now", "times faster", "beside PyTorch"]]
    for r in found:
        if other := theirs.get(records.identity(r)):
            times = [duration(other["seconds"]), duration(r["seconds"])]
            then, now = torch_ratio(other), torch_ratio(r)
            beside = f"{then:.2f} -> {now:.2f}" if then and now else ""
            gain = f"{other['seconds'] / r['seconds']:.2f}"
            rows.append([r["op"], r["label"], r["dtype"], r["direction"], *times, gain, beside])
    if len(rows) == 1:
        return [f"No row of {ref} matches: does it have these ops?"]
    return ["", *table(rows, f"{ref}|now|times faster")]


def _do(otherwise: str, folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--base: {otherwise}: {done.stderr.strip()[-2000:]}")
