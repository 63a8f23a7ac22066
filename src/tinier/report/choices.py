"""The three choices of a run as sentences."""

from typing import Any


def choices_text(results: dict[str, Any]) -> list[str]:
    """The three choices as sentences."""
    choices = results["choices"]
    if choices is None:
        return [
            "No variant is better than the base model here: those that have not collapsed are slower or "
            "larger."
        ]
    rows = {row["name"]: row for row in results["variants"]}
    labels = {"best_quality": "Best quality", "balance": "Balance",
              "greatest_efficiency": "Greatest efficiency"}  # fmt: skip
    return [
        f"{label}: **{choices[key]}** keeps {100 * rows[choices[key]]['retained_quality']:.1f} % "
        f"quality at {100 / rows[choices[key]]['shrinkage']:.0f} % of the size and "
        f"{rows[choices[key]]['speedup']:.2f} × the throughput."
        for key, label in labels.items()
        if choices[key] is not None
    ]
