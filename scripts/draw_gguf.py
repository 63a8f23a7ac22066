"""Draw docs/images/gguf-quality.svg from the result file of benchmarks/gguf_quality.py:

python -m scripts.draw_gguf benchmarks/results/gguf-quality_….json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

matplotlib.rcParams["svg.hashsalt"] = "tinier"
_TITLES = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
_COLORS = {"tinier": "#1f6f8b", "matrix": "#7d5a00", "plain": "#8a8a8a"}


def main() -> None:
    models = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["models"]
    figure, every = pyplot.subplots(1, len(models), figsize=(9.6, 4.2), layout="constrained")
    for axes, (name, rows) in zip(every, models.items(), strict=True):
        for row, found in rows.items():
            kind = "tinier" if "tinier" in row else "matrix" if "matrix" in row else "plain"
            label = row.replace("llama.cpp ", "").replace(" g32, INT8 embedding", "")
            label = label.replace(", importance matrix", " + imatrix")
            size = found["file_bytes"] / 1e6
            axes.scatter(size, found["kl"], s=46, color=_COLORS[kind])
            axes.annotate(label.replace("tinier ", ""), (size, found["kl"]), xytext=(6, 4),
                          textcoords="offset points", fontsize=8, color=_COLORS[kind])  # fmt: skip
        axes.set_title(_TITLES[name], fontsize=10)
        axes.set_xlabel("file, MB (left is better)")
        axes.set_ylabel("KL, nats (down is better)")
        axes.set_yscale("log")
        axes.margins(x=0.4, y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(alpha=0.25, which="both")
    path = Path(__file__).parent.parent / "docs" / "images" / "gguf-quality.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
