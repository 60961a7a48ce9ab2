"""Results as JSON lines, one a row, and how they are read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
IDENTITY = ("kind", "op", "case", "dtype", "direction", "backend", "threads")


def append(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def load(directory: Path) -> list[Record]:
    """Every record in a directory's .jsonl files; a sentence when there is none."""
    if not directory.is_dir():
        raise ValueError(f"report: DIR is {directory}; it takes a directory with .jsonl files")
    records: list[Record] = []
    for path in sorted(directory.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def identity(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in IDENTITY)


def by_machine(
    records: Sequence[Record], kinds: Sequence[str] = ("speed",)
) -> dict[str, list[Record]]:
    """For each machine its newest record of every row, in the order in which rows were first timed."""
    found: dict[str, dict[tuple[Any, ...], Record]] = {}
    for record in sorted(records, key=lambda record: str(record.get("date", ""))):
        if record.get("kind") in kinds:
            found.setdefault(machine_name(record), {})[identity(record)] = record
    return {name: list(rows.values()) for name, rows in found.items()}


def machine_name(record: Record) -> str:
    m = record["machine"]
    if record.get("device") == "cuda":
        return str(m["gpus"][0])
    return f"{m['cpu']}, {m['cores']} cores, {record['threads']} threads"
