"""``fastattn report DIR``: one self-contained HTML page from the JSON results in a directory."""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastattn.bench import figures
from fastattn.bench.records import Record, by_machine, load
from fastattn.cli import readme
from fastattn.cli.terminal import duration

STYLE = """
:root { --ink: #20242a; --soft: #667; --line: #e3e5ea; --bar: #cfe0f1; --good: #2c7a4b; --bad: #b03a2e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { margin: 0; font-size: 1.8rem; letter-spacing: -0.02em; }
h2 { margin: 2.8rem 0 0.2rem; font-size: 1.25rem; }
h3 { margin: 1.6rem 0 0.4rem; font-size: 1rem; }
p { margin: 0.2rem 0; color: var(--soft); max-width: 46rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 0.4rem 1.2rem 1.2rem;
          margin-top: 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; white-space: nowrap; }
th, td { padding: 0.28rem 0.7rem 0.28rem 0; white-space: nowrap; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; white-space: nowrap; }
td.b { width: 9rem; }
.bar { position: relative; background: #f0f2f5; border-radius: 3px; height: 1.25rem; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--bar); border-radius: 3px; }
.bar b { position: relative; padding-left: 0.4rem; font-weight: 500; }
.good { color: var(--good); } .bad { color: var(--bad); }
img { width: 100%; height: auto; margin-top: 0.8rem; }
"""


def main(arguments: argparse.Namespace) -> int:
    directory = Path(arguments.dir)
    records = load(directory)
    out = Path(arguments.out) if arguments.out else directory / "report.html"
    out.write_text(page(records))
    print(f"wrote {out} from {len(records)} records")
    if arguments.readme:
        changed = readme.rewrite(Path(arguments.readme), records)
        print(f"{arguments.readme}: {'rewritten' if changed else 'unchanged'}")
    return 0


def page(records: Sequence[Record]) -> str:
    body = [*_speed(records), *_proof(records)] or ["<p>The directory holds no results yet.</p>"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fastattn: results</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n<h1>fastattn: results</h1>\n"
        "<p>Times are medians of undisturbed samples, ours and each peer's taken in turns in one process. "
        "A ratio above 1 means that fastattn is faster. The ceiling is what loops that do nothing else reached "
        "on the same machine in the same run. ~ marks a row that a busy machine disturbed.</p>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _speed(records: Sequence[Record]) -> Iterable[str]:
    for name, rows in by_machine(records, ("speed", "call", "threads", "isa")).items():
        newest = max(rows, key=lambda record: str(record["date"]))
        about = f"torch {newest['versions']['torch']}, fastattn {newest['versions']['fastattn']} {newest['commit']}"
        yield f"<h2>{html.escape(name)}</h2><p>{html.escape(about)}, {newest['date'][:10]}</p>"
        for op in dict.fromkeys(r["op"] for r in rows):
            own = [r for r in rows if r["op"] == op]
            yield f"<section><h3>{op}</h3>{_pictures(own, name)}{_table(own)}</section>"


def _pictures(rows: list[Record], name: str) -> str:
    if not figures.installed():
        return ""
    tags = []
    for figure in figures.draw(rows, name).values():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130)
        tags.append(
            f'<img alt="" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'
        )
    return "".join(tags)


def _table(rows: list[Record]) -> str:
    heads = [
        "case",
        "dtype",
        "",
        "backend",
        "time|n",
        "spread|n",
        "times faster than",
        "rate|n",
        "of ceiling",
        "memory|n",
    ]
    cells = [_th(*head.split("|")) for head in heads]
    return f"<table><tr>{''.join(cells)}</tr>{''.join(map(_row, rows))}</table>"


def _th(text: str, kind: str = "") -> str:
    return f'<th class="{kind}">{text}</th>'


def _row(r: Record) -> str:
    label = {"call": "call overhead", "threads": f"{r['label']} (threads)"}.get(
        r["kind"], r["label"]
    )
    against = "one thread" if r["kind"] == "threads" else ""
    peers = ", ".join(
        f'<span class="{"good" if p["ratio"] >= 1 else "bad"}">{p["ratio"]:.2f}</span> {html.escape(against or n)}'
        for n, p in r["peers"].items()
    )
    spread = (r["high"] - r["low"]) / 2 / r["seconds"]
    rate = (
        f"{r['rate'] / 1e9:.3g} {'GFLOP/s' if r['bound'] == 'compute' else 'GB/s'}"
        if r["kind"] != "call"
        else ""
    )
    memory = (
        f"{r['peak_bytes'] / 1e6:.1f} MB"
        if r["peak_bytes"] is not None and r["kind"] != "call"
        else ""
    )
    numbers = [("" if r["clean"] else "~") + duration(r["seconds"]), f"±{spread:.0%}"]
    return (
        f"<tr><td>{html.escape(label)}</td><td>{r['dtype']}</td><td>{r['direction']}</td><td>{r['backend']}</td>"
        + "".join(f'<td class="n">{n}</td>' for n in numbers)
        + f'<td>{peers}</td><td class="n">{rate}</td><td class="b">{_bar(r["share"])}</td><td class="n">{memory}</td></tr>'
    )


def _bar(share: float | None) -> str:
    return (
        f'<div class="bar"><i style="width:{min(share, 1):.0%}"></i><b>{share:.0%}</b></div>'
        if share
        else ""
    )


def _proof(records: Sequence[Record]) -> Iterable[str]:
    rows = {(r["op"], r["backend"], r["dtype"]): r for r in records if r.get("kind") == "verify"}
    if not rows:
        return
    newest = max(rows.values(), key=lambda record: str(record["date"]))
    yield f"<h2>Proof</h2><p>fastattn verify, {newest['date'][:10]}: every op, backend, dtype and case against "
    yield "the float64 reference. The bar is the largest share of the error budget that a case used.</p><section>"
    yield "<table><tr><th>op</th><th>backend</th><th>dtype</th><th class='n'>passed</th><th class='n'>failed</th>"
    yield "<th class='n'>skipped</th><th>of the budget</th></tr>"
    for (op, backend, dtype), r in sorted(rows.items()):
        bad = ' class="n bad"' if r["failed"] else ' class="n"'
        yield f"<tr><td>{op}</td><td>{backend}</td><td>{dtype}</td><td class='n'>{r['passed']}</td>"
        yield f"<td{bad}>{r['failed']}</td><td class='n'>{r['skipped']}</td><td class='b'>{_bar(r['worst'])}</td></tr>"
    yield "</table></section>"
