"""The Pareto curves: retained quality against throughput, and against size. SVG and PNG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinier.recipe import RunResults, VariantResult

if TYPE_CHECKING:  # its import takes half a second, and commands that draw nothing take us along
    from matplotlib.figure import Figure

Gain = Literal["throughput", "size"]
GAINS: tuple[Gain, ...] = ("throughput", "size")
_LABELS = {
    "throughput": "throughput, times the base model's",
    "size": "size, the base model's divided by the variant's",
}
# ids inside an SVG come from this salt, and no date is in it: equal results give equal pictures
_STYLE = {"svg.hashsalt": "tinier"}


def draw_pareto(results: RunResults, folder: Path) -> list[Path]:
    """Write pareto-throughput and pareto-size as .svg and .png; returns the paths."""
    written = []
    for gain in GAINS:
        figure = _pareto(results, gain)
        for suffix in ("svg", "png"):
            path = folder / f"pareto-{gain}.{suffix}"
            _save(figure, path, suffix)
            written.append(path)
    return written


def pareto_svg(results: RunResults, gain: Gain) -> str:
    """One of the curves as SVG."""
    written = io.BytesIO()
    _save(_pareto(results, gain), written, "svg")
    return written.getvalue().decode()


def _save(figure: "Figure", to: Path | io.BytesIO, suffix: str) -> None:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(to, format=suffix, dpi=130, metadata=metadata)


def _pareto(results: RunResults, gain: Gain) -> "Figure":
    # not pyplot: a notebook's own figures and backend stay as they are
    from matplotlib.figure import Figure

    rows = results.variants
    front = getattr(results.pareto, gain)
    gains = [row.speedup if gain == "throughput" else row.shrinkage for row in rows]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
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
    axes.set_xlabel(f"{_LABELS[gain]} (right is better)")
    axes.set_ylabel("retained quality, 100·exp(-KL) (up is better)")
    axes.set_ylim(0, 108)
    axes.margins(x=0.14)
    axes.grid(alpha=0.25)
    axes.set_title(_title(results), fontsize=9)
    return figure


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
