"""The Pareto curves: retained quality against throughput, and against size. SVG and PNG."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib import pyplot

from tinier.recipe import RunResults, VariantResult

# ids inside an SVG come from this salt: equal results give equal pictures
matplotlib.rcParams["svg.hashsalt"] = "tinier"


def draw_pareto(results: RunResults, folder: Path) -> list[Path]:
    """Write pareto-throughput and pareto-size as .svg and .png; returns the paths."""
    rows, written = results.variants, []
    for kind, front, gains, label in (
        (
            "throughput", results.pareto.throughput, [row.speedup for row in rows],
            "throughput, times the base model's",
        ),
        (
            "size", results.pareto.size, [row.shrinkage for row in rows],
            "size, the base model's divided by the variant's",
        ),
    ):  # fmt: skip
        figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
        line = []
        for x, row in zip(gains, rows, strict=True):
            y = 100 * row.retained_quality
            color = "#b03a2e" if row.collapsed else "#1f6f8b"
            axes.scatter(x, y, s=48, color=color, alpha=1.0 if row.name in front else 0.45)
            if row.name in front:
                line.append((x, y))
        for names, x, y in _labels(rows, gains):
            axes.annotate(names, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9)
        axes.plot(
            *zip(*sorted(line), strict=True), color="#1f6f8b", linewidth=1, linestyle="--", zorder=0
        )
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


def _labels(
    rows: Sequence[VariantResult], gains: Sequence[float]
) -> list[tuple[str, float, float]]:
    """Text and place of each label; variants that lie on one spot share one."""
    spread = max(gains) - min(gains) or 1.0
    spots: dict[tuple[int, int], list[tuple[VariantResult, float]]] = {}
    for row, gain in zip(rows, gains, strict=True):
        spot = round(gain / spread * 40), round(row.retained_quality * 40)
        spots.setdefault(spot, []).append((row, gain))
    return [
        (", ".join(row.name for row, _ in here), here[0][1], 100 * here[0][0].retained_quality)
        for here in spots.values()
    ]


def _title(results: RunResults) -> str:
    environment = results.environment
    return f"{results.recipe['base']} on {environment.get('gpu') or environment['cpu']}"
