"""The Pareto curves: retained quality against throughput, and against size. SVG and PNG."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot

# ids inside an SVG come from this salt: equal results give equal pictures
matplotlib.rcParams["svg.hashsalt"] = "tinier"

_AXES = {
    "throughput": ("speedup", "throughput, times the base model's"),
    "size": ("shrinkage", "size, the base model's divided by the variant's"),
}


def draw_pareto(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write pareto-throughput and pareto-size as .svg and .png; returns the paths."""
    written = []
    for kind, (gain, label) in _AXES.items():
        figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
        rows = results["variants"]
        front = set(results["pareto"][kind])
        for row in rows:
            x, y = row[gain], 100 * row["retained_quality"]
            color = "#b03a2e" if row["collapsed"] else "#1f6f8b"
            axes.scatter(x, y, s=48, color=color, alpha=1.0 if row["name"] in front else 0.45)
        for names, x, y in _labels(rows, gain):
            axes.annotate(names, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9)
        line = sorted((r[gain], 100 * r["retained_quality"]) for r in rows if r["name"] in front)
        axes.plot(*zip(*line, strict=True), color="#1f6f8b", linewidth=1, linestyle="--", zorder=0)
        axes.set_xlabel(f"{label} (right is better)")
        axes.set_ylabel("retained quality, 100·exp(-KL) (up is better)")
        axes.set_ylim(0, 108)
        axes.margins(x=0.14)
        axes.grid(alpha=0.25)
        axes.set_title(_title(results), fontsize=9)
        for suffix in ("svg", "png"):
            path = folder / f"pareto-{kind}.{suffix}"
            # no date inside: equal results give equal pictures
            figure.savefig(path, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
            written.append(path)
        pyplot.close(figure)
    return written


def _labels(rows: list[dict[str, Any]], gain: str) -> list[tuple[str, float, float]]:
    """Text and place of each label; variants that lie on one spot share one."""
    spread = max(row[gain] for row in rows) - min(row[gain] for row in rows) or 1.0
    spots: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        spot = round(row[gain] / spread * 40), round(row["retained_quality"] * 40)
        spots.setdefault(spot, []).append(row)
    return [
        (", ".join(row["name"] for row in here), here[0][gain], 100 * here[0]["retained_quality"])
        for here in spots.values()
    ]


def _title(results: dict[str, Any]) -> str:
    environment = results["environment"]
    return f"{results['recipe']['base']} on {environment.get('gpu') or environment['cpu']}"
