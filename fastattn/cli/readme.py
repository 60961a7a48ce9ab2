"""The generated tables of README.md: speed from committed results, support from the descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastattn.bench.figures import torch_ratio
from fastattn.bench.records import Record, by_machine
from fastattn.cli import support
from fastattn.cli.terminal import duration

DTYPES, DIRECTIONS = ("float32", "bfloat16", "float16"), ("forward", "backward")


def speed(records: Sequence[Record]) -> str:
    """A table for each machine: time, ratio to PyTorch and share of the measured ceiling of every row."""
    parts = []
    for name, rows in by_machine(records).items():
        newest = max(rows, key=lambda record: str(record["date"]))
        versions = newest["versions"]
        parts.append(
            f"**{name}**, torch {versions['torch']}, fastattn {newest['commit'] or versions['fastattn']}, "
            f"{newest['date'][:10]}. Time, times faster than PyTorch, share of the measured ceiling.\n\n"
            + _markdown(_speed_rows(rows))
        )
    return (
        "\n\n".join(parts)
        or "No results yet: `fastattn bench --json bench/results/<name>.jsonl` makes some."
    )


def _speed_rows(rows: Sequence[Record]) -> list[list[str]]:
    columns = [
        (t, d)
        for t in DTYPES
        for d in DIRECTIONS
        if any((r["dtype"], r["direction"]) == (t, d) for r in rows)
    ]
    lines = [["op", "case", *(f"{dtype} {direction}" for dtype, direction in columns)]]
    for op, label in dict.fromkeys((r["op"], r["label"]) for r in rows):
        found = {
            (r["dtype"], r["direction"]): r for r in rows if (r["op"], r["label"]) == (op, label)
        }
        lines.append([op, label, *(cell(found[c]) if c in found else "" for c in columns)])
    return lines


def cell(record: Record) -> str:
    """What is known of a row, as in 10.3 ms, 1.35x, 88%."""
    ratio, share = torch_ratio(record), record.get("share")
    words = [
        ("" if record["clean"] else "~") + duration(record["seconds"]),
        f"**{ratio:.2f}x**" if ratio else "",
        f"{share:.0%}" if share else "",
    ]
    return ", ".join(filter(None, words))


def _markdown(rows: list[list[str]]) -> str:
    body = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in body)


def rendered(text: str, records: Sequence[Record]) -> str:
    """``text`` with the blocks between its markers written anew; a missing block stays missing."""
    for name, block in (("speed", speed(records)), ("support", _markdown(support.matrix()))):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != text.count(end) or text.count(begin) > 1:
            raise ValueError(
                f"README has {text.count(begin)} {begin} and {text.count(end)} {end}; it takes one of each"
            )
        if begin in text:
            head, tail = text.split(begin)[0], text.split(end)[1]
            text = f"{head}{begin}\n{block}\n{end}{tail}"
    return text


def rewrite(path: Path, records: Sequence[Record]) -> bool:
    """Render the file's blocks in place; whether anything changed."""
    if not path.is_file():
        raise ValueError(
            f"--readme is {path}; it takes a file with <!-- speed:begin --> and its like"
        )
    before = path.read_text()
    after = rendered(before, records)
    path.write_text(after)
    return after != before
