"""What `tinier fit` found, as sentences. Start at `fit_text`."""

from dataclasses import asdict

from tinier.fitting import Draft, Figures, FitResults

# below it a draft is not worth its memory
_PAYS = 1.05

_NAMES = {
    "size": "--max-size", "memory": "--max-memory", "throughput": "--min-throughput",
    "latency": "--max-latency", "quality": "--min-quality",
}  # fmt: skip


def fit_text(found: FitResults) -> str:
    """The winner, why it won, its neighbours, and how far the predictions were off."""
    lines = _winner(found) if found.winner else _nearest(found)
    if found.draft is not None:
        lines.append(_draft(found.draft, found.model))
    worst = {
        name: max(abs(value) for value in values)
        for name, values in found.prediction_errors.items()
        if name != "quality" and values
    }
    if worst:
        told = ", ".join(f"{name} {100 * value:.0f} %" for name, value in worst.items())
        lines.append(f"Predictions of what was made were off by at most: {told}.")
    lines.append(f"Found in {found.seconds / 60:.1f} minutes; the whole front is in front.csv.")
    return "\n".join(lines)


def figures_text(figures: Figures) -> str:
    """Size, memory, speed and quality in one line."""
    return (
        f"{figures.size / 1e6:.1f} MB on disk, {figures.memory / 1e6:.0f} MB serving, "
        f"{figures.throughput:.1f} tok/s, {figures.latency:.2f} ms between tokens, "
        f"{100 * figures.quality:.1f} % quality"
    )


def _winner(found: FitResults) -> list[str]:
    assert found.winner is not None
    assert found.winner_figures is not None
    limits = {name: value for name, value in asdict(found.limits).items() if value is not None}
    kept = ", ".join(f"{_NAMES[name]} {_value(name, value)}" for name, value in limits.items())
    why = found.candidates[found.winner].why
    lines = [
        f"Winner: {found.winner} ({why}): {figures_text(found.winner_figures)}. It is in "
        f"variants/{found.winner}.",
        f"It keeps {kept}; of the models that were made and do, it has the best "
        + ("quality." if set(limits) != {"quality"} else "size and speed together."),
    ]
    for other in found.alternatives:
        lines.append(f"The next {other.what} would have, as predicted: {figures_text(other)}.")
    return lines


def _draft(draft: Draft, model: str) -> str:
    gain = f"{draft.gain:.2f} × the tokens/s of one text (it says the same in {100 * draft.greedy:.0f} %)"
    if draft.gain < _PAYS:
        return (
            f"Lossless: no candidate makes {model} itself faster as its draft; the best is {draft.name}, "
            f"{gain}."
        )
    return (
        f"Lossless: {model} itself, its text unchanged, with {draft.name} as its draft: {gain}. "
        f"tinier serve {model} --draft variants/{draft.name}"
    )


def _nearest(found: FitResults) -> list[str]:
    lines = ["No model keeps this budget. As predicted, it would be kept with:"]
    for name, value in (found.nearest or {}).items():
        if value is None:
            lines.append(f"  {_NAMES[name]}: whatever its value, the other limits cannot be kept")
        else:
            lines.append(f"  {_NAMES[name]} {_value(name, value)}, the other limits kept")
    return lines


def _value(name: str, value: float) -> str:
    if name in ("size", "memory"):
        return f"{value / 1e6:.1f}MB"
    if name == "quality":
        return f"{100 * value:.1f}%"
    return f"{value:.2f}ms" if name == "latency" else f"{value:.1f} tok/s"
