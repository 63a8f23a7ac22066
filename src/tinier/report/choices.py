"""The three choices of a run as sentences."""

from tinier.recipe import RunResults


def choices_text(results: RunResults) -> list[str]:
    """The three choices as sentences."""
    choices = results.choices
    if choices is None:
        return [
            "No variant is better than the base model here: those that have not collapsed are slower or "
            "larger."
        ]
    named = {
        "Best quality": choices.best_quality, "Balance": choices.balance,
        "Greatest efficiency": choices.greatest_efficiency,
    }  # fmt: skip
    rows = {row.name: row for row in results.variants}
    return [
        f"{label}: **{name}** keeps {100 * rows[name].retained_quality:.1f} % quality at "
        f"{100 / rows[name].shrinkage:.0f} % of the size and {rows[name].speedup:.2f} × the throughput."
        for label, name in named.items()
        if name is not None
    ]
