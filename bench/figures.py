"""Two figures from records: the share of the machine's ceiling, and the ratio to PyTorch, per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.bench.records import Record

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#e08a3c", "float16": "#5b9a68"}
GREY = "#8a8f98"


def installed() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(records: Sequence[Record], title: str) -> dict[str, Any]:
    """{file stem: matplotlib figure} for each op; empty figures are left out."""
    figures = {}
    for op in dict.fromkeys(r["op"] for r in records):
        rows = [r for r in records if r["op"] == op and r["kind"] == "speed"]
        shares = [(r, r["share"]) for r in rows if r.get("share")]
        if shares:
            figures[f"{op}-share"] = _bars(
                shares, f"{op}: share of the machine's measured ceiling", title, 1.0, "{:.0%}", "share of the ceiling"
            )
        ratios = [(r, ratio) for r in rows if (ratio := torch_ratio(r))]
        if ratios:
            figures[f"{op}-ratio"] = _bars(
                ratios, f"{op}: speed as a multiple of PyTorch", title, 1.0, "{:.2f}x", "PyTorch's time / fastattn's"
            )
    return figures


def save(records: Sequence[Record], title: str, directory: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, figure in draw(records, title).items():
        paths.append(directory / f"{stem}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def torch_ratio(record: Record) -> float | None:
    """PyTorch's time over ours; its fastest way where it has several."""
    ratios = [peer["ratio"] for name, peer in record.get("peers", {}).items() if name.startswith("torch")]
    return min(ratios) if ratios else None


def _bars(values: Any, heading: str, title: str, line: float, form: str, label: str) -> Any:
    """Horizontal bars: a panel for each direction, a group for each case, a colour for each dtype."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(r["label"] for r, _ in values))
    dtypes = [d for d in COLOURS if any(r["dtype"] == d for r, _ in values)]
    directions = list(dict.fromkeys(r["direction"] for r, _ in values))
    height = 0.8 / len(dtypes)
    figure = Figure(figsize=(5.2 * len(directions) + 2.0, 1.5 + 0.3 * len(cases) * (0.6 + 0.4 * len(dtypes))))
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    top = max([value for _, value in values] + [line]) * 1.14
    for panel, direction in zip(panels, directions):
        for k, dtype in enumerate(dtypes):
            found = {r["label"]: v for r, v in values if r["dtype"] == dtype and r["direction"] == direction}
            spots = [(cases.index(case) + (k - (len(dtypes) - 1) / 2) * height, v) for case, v in found.items()]
            panel.barh([y for y, _ in spots], [v for _, v in spots], height * 0.9, color=COLOURS[dtype], label=dtype)
            for y, v in spots:
                panel.text(v + top * 0.008, y, form.format(v), va="center", fontsize=7, color="#333333")
        panel.axvline(line, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        panel.set(title=direction, xlabel=label, xlim=(0, top), yticks=range(len(cases)), yticklabels=cases)
        panel.tick_params(axis="y", length=0, labelsize=8)
        panel.tick_params(axis="x", labelsize=8, colors="#555555")
        panel.xaxis.label.set(size=8, color="#555555")
        panel.title.set(size=10, color="#333333")
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.spines["bottom"].set_color("#cccccc")
    panels[0].set_ylim(len(cases) - 0.4, -0.6)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.text(0.01, 1 - 0.42 / figure.get_figheight(), title, fontsize=8, color="#666666", va="top")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper right", ncols=len(names), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    return figure
