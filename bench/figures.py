"""Two figures from records: the share of the machine's ceiling, and the ratio to PyTorch, per case."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.bench.records import Record

COLOURS = {"float32": "#3b6ea5", "bfloat16": "#e08a3c", "float16": "#5b9a68"}
GREY = "#8a8f98"


def installed() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: Sequence[Record], title: str) -> dict[str, Any]:
    """{file stem: matplotlib figure} for each op; empty figures are left out."""
    figures = {}
    for op in dict.fromkeys(r["op"] for r in records):
        rows = [r for r in records if r["op"] == op and r["kind"] == "speed"]
        shares = [(r, r["share"]) for r in rows if r.get("share")]
        if shares:
            figures[f"{op}-share"] = _bars(
                shares, f"{op}: share of this machine's measured ceiling", title, False
            )
        ratios = [(r, ratio) for r in rows if (ratio := torch_ratio(r))]
        if ratios:
            figures[f"{op}-ratio"] = _bars(ratios, f"{op}: times faster than PyTorch", title, True)
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
    ratios = [
        peer["ratio"] for name, peer in record.get("peers", {}).items() if name.startswith("torch")
    ]
    return min(ratios) if ratios else None


def _bars(values: list[tuple[Record, float]], heading: str, title: str, ratios: bool) -> Any:
    """Horizontal bars: a panel for each direction, a group for each case, a colour for each dtype.

    Ratios stand on a logarithmic axis, to the right of 1 where fastattn is faster and to the left where not.
    """
    from matplotlib.figure import Figure

    names, common = _short([r["label"] for r, _ in values])
    cases = list(dict.fromkeys(names.values()))
    dtypes = [d for d in COLOURS if any(r["dtype"] == d for r, _ in values)]
    directions = list(dict.fromkeys(r["direction"] for r, _ in values))
    height, inches = 0.8 / len(dtypes), 1.4 + len(cases) * (0.16 + 0.14 * len(dtypes))
    figure = Figure(figsize=(4.6 * len(directions) + 1.8, inches))
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    for panel, direction in zip(panels, directions, strict=True):
        for k, dtype in enumerate(dtypes):
            found = {
                names[r["label"]]: v
                for r, v in values
                if (r["dtype"], r["direction"]) == (dtype, direction)
            }
            places = [cases.index(case) + (k - (len(dtypes) - 1) / 2) * height for case in found]
            start = 1.0 if ratios else 0.0
            panel.barh(
                places,
                [v - start for v in found.values()],
                height * 0.9,
                start,
                color=COLOURS[dtype],
                label=dtype,
            )
            for y, v in zip(places, found.values(), strict=True):
                left = ratios and v < 1
                text = f"{v:.2f}" if ratios else f"{v:.0%}"
                panel.annotate(
                    text, (v, y), (-3 if left else 3, 0), textcoords="offset points", va="center",
                    ha="right" if left else "left", fontsize=7, color="#333333",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                )  # fmt: skip
        _axes(panel, [v for _, v in values], ratios)
        panel.set_yticks(range(len(cases)), cases)
        panel.set_title(direction, loc="left", fontsize=10, color="#333333")
        panel.tick_params(axis="y", length=0, labelsize=8)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.spines["bottom"].set_color("#cccccc")
    panels[0].set_ylim(len(cases) - 0.4, -0.6)
    whole = heading + (f"   ({common})" if common else "")
    figure.text(0.012, 1 - 0.12 / inches, whole, fontsize=13, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.38 / inches, title, fontsize=8, color="#666666", va="top")
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="upper right", ncols=len(texts), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.52 / inches))
    return figure


def _axes(panel: Any, values: list[float], ratios: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    panel.axvline(1.0, color=GREY, linewidth=1, linestyle="-" if ratios else (0, (4, 3)), zorder=0)
    if ratios:
        top, bottom = max(*values, 1.6), min(*values, 0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlim(bottom / 1.25, top * (top / bottom) ** 0.12)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("PyTorch's time / fastattn's", fontsize=8, color="#555555")
    else:
        panel.set_xlim(0, max(1.08, min(max(values) * 1.1, 1.5)))
        panel.xaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_xlabel("of the ceiling", fontsize=8, color="#555555")
    panel.tick_params(axis="x", labelsize=8, colors="#555555")


def _short(labels: Sequence[str]) -> tuple[dict[str, str], str]:
    """Labels without the words that all of them share, and those words."""
    words = [label.split() for label in dict.fromkeys(labels)]
    common = [w for w in words[0] if all(w in other for other in words)] if len(words) > 1 else []
    names = {" ".join(ws): " ".join(w for w in ws if w not in common) or "plain" for ws in words}
    return names, " ".join(common)
