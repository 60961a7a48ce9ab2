"""``fastattn bench --base REF``: the same rows on another revision, built in a worktree of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fastattn.bench import records
from fastattn.cli.machine import PACKAGE
from fastattn.cli.terminal import duration, table


def compare(arguments: argparse.Namespace, found: list[records.Record]) -> list[str]:
    """Lines of a table: their time over ours, for each row that both have."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        raise ValueError(f"--base is {arguments.base!r}; it takes a git revision, and {root} is no git checkout")
    with tempfile.TemporaryDirectory(prefix="fastattn-base-") as folder:
        tree, site, results = (Path(folder, name) for name in ("tree", "site", "base.jsonl"))
        _do(f"no such revision {arguments.base!r}", root, "git", "worktree", "add", "--detach", str(tree), arguments.base)
        try:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
            _do("the revision does not build", tree, *pip, "--target", str(site), str(tree))
            command = [sys.executable, "-m", "fastattn", "bench", "--json", str(results)]
            for option in ("op", "backend", "device", "dtype", "threads"):
                if getattr(arguments, option):
                    command += [f"--{option}", str(getattr(arguments, option))]
            command += ["--quick"] * arguments.quick
            print(f"\nTiming {arguments.base} ...", file=sys.stderr)
            environment = os.environ | {"PYTHONPATH": str(site)}
            subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
            theirs = {records.identity(r): r for r in records.load(Path(folder))}
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=root, check=False)
    return _table(arguments.base, found, theirs)


def _table(
    ref: str, found: list[records.Record], theirs: dict[tuple[object, ...], records.Record]
) -> list[str]:
    rows = [["op", "case", "dtype", "", ref, "now", "times faster"]]
    for r in found:
        if other := theirs.get(records.identity(r)):
            times = [duration(other["seconds"]), duration(r["seconds"]), f"{other['seconds'] / r['seconds']:.2f}"]
            rows.append([r["op"], r["label"], r["dtype"], r["direction"], *times])
    if len(rows) == 1:
        return [f"No row of {ref} matches: does it have these ops?"]
    return ["", *table(rows, f"{ref}|now|times faster")]


def _do(otherwise: str, folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--base: {otherwise}: {done.stderr.strip()[-2000:]}")
