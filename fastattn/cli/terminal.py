"""What commands print with: a progress bar on stderr and tables of text on stdout."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

EVERY = 20.0  # seconds between lines where stderr is a file


class Progress:
    """``with Progress(40, "verify") as bar: bar.step("attention")``: a bar, or a line now and then in a log."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label = total, label
        self.done, self.began, self.shown = 0, time.monotonic(), 0.0
        self.bar = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._clear()

    def step(self, text: str, count: int = 1) -> None:
        """``count`` more are done; ``text`` says what runs now."""
        self.done += count
        now = time.monotonic()
        if (
            now - max(self.shown, self.began) < (0.1 if self.bar else EVERY)
            and self.done < self.total
        ):
            return
        self.shown = now
        share = min(self.done / max(self.total, 1), 1.0)
        left = (now - self.began) * (1 - share) / share if share else 0.0
        head = f"{self.label} {self.done}/{self.total}"
        if not self.bar:
            print(f"{head}  {text}", file=sys.stderr, flush=True)
            return
        cells = round(24 * share)
        line = f"{head} {'█' * cells}{'░' * (24 - cells)} {left:3.0f} s left  {text}"
        print(
            f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def say(self, line: str = "") -> None:
        """Print a line of the result without tearing the bar."""
        self._clear()
        print(line, flush=True)

    def _clear(self) -> None:
        if self.bar:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[str]], right: str = "", widths: Sequence[int] = ()) -> list[str]:
    """Lines of aligned columns; the first row is the header, ``right`` names columns set flush right."""
    header = rows[0]
    fitting = [max(len(row[i]) for row in rows) for i in range(len(header))]
    widths = [max(pair) for pair in zip(fitting, widths or fitting, strict=True)]
    flush = [name in right.split("|") for name in header]
    return [
        "  ".join(
            f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in [header, ["─" * w for w in widths], *rows[1:]]
    ]


def duration(seconds: float) -> str:
    """Three digits in the unit that fits, as in 10.3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
