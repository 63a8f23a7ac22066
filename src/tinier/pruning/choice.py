"""Which parts go: layers by one of five methods, widths by importance, sizes by a target.

Start at `choose`. For a target, sizes are enumerated; how much divergence each dimension costs is
measured on four cuts, which predicts the cost of the others; the most promising ones are measured.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from tinier.checkpoint import Checkpoint
from tinier.families import Geometry, geometry_of
from tinier.progress import say
from tinier.pruning.cut import Cut, Sizes
from tinier.pruning.importance import Importance, cut_to, measure_importance
from tinier.pruning.latency import StepTime
from tinier.pruning.plan import (
    PrunePlan,
    parse_target,
    possible_sizes,
    sizes_within,
    stored_cost,
    wanted_sizes,
)
from tinier.pruning.trial import divergences

# tokens of a trial at most
_TRIAL_TOKENS = 4096
# assumed growth of divergence with the share that is removed; it only picks what is measured.
# Between 1,024 and 960 of SmolLM2's 1,536 neurons the measured exponent was 1.7
_POWER = 1.5


@dataclass(frozen=True, slots=True)
class Choice:
    cut: Cut
    importance: Importance | None
    trials: list[dict[str, object]]
    """What was measured: sizes or dropped layers, and divergence in nats per token"""


def choose(
    source: Checkpoint, plan: PrunePlan, windows: Tensor | None, device: torch.device
) -> list[Choice]:
    """The cuts that fit the plan, best first; several only where a target left the sizes open."""
    geometry = geometry_of(source)
    if not plan.chooses:
        sizes = wanted_sizes(source, plan)
        dropped = plan.drop_layers or tuple(range(sizes.layers, geometry.layers))
        return [Choice(cut_to(geometry, sizes, _kept(geometry, dropped), None), None, [])]
    assert windows is not None
    trial = windows[: max(1, _TRIAL_TOKENS // windows.shape[1])]
    if plan.target is not None:
        # before the pass over the text: no sizes may fit
        costs = _fitting(source, plan, device)
        importance = measure_importance(source, windows, device=device)
        return _for_target(source, plan, costs, importance, trial, device)
    importance = measure_importance(source, windows, device=device)
    sizes = wanted_sizes(source, plan)
    dropped, trials = plan.drop_layers, list[dict[str, object]]()
    if not dropped and sizes.layers < geometry.layers:
        count = geometry.layers - sizes.layers
        dropped, trials = choose_layers(source, plan, count, importance, trial, device)
    cut = cut_to(geometry, sizes, _kept(geometry, dropped), importance)
    return [Choice(cut, importance, trials)]


def choose_layers(
    source: Checkpoint,
    plan: PrunePlan,
    count: int,
    importance: Importance,
    windows: Tensor,
    device: torch.device,
) -> tuple[tuple[int, ...], list[dict[str, object]]]:
    """The `count` layers to drop, and the trials that decided."""
    geometry = geometry_of(source)
    total = geometry.layers
    if plan.method == "last":
        return tuple(range(total - count, total)), []
    if plan.method == "influence":
        return importance.least_influential(count), []
    if plan.method == "angular":
        return importance.nearest_block(count), []

    def cost(candidates: list[tuple[int, ...]]) -> list[float]:
        cuts = [Cut(layers=_kept(geometry, dropped)) for dropped in candidates]
        return divergences(source, windows, cuts, device)

    trials: list[dict[str, object]] = []
    if plan.method == "loss":
        windows_of_layers = [tuple(range(s, s + count)) for s in range(total - count + 1)]
        candidates = list(dict.fromkeys([*windows_of_layers, importance.least_influential(count)]))
        found = cost(candidates)
        for dropped, kl in zip(candidates, found, strict=True):
            trials.append({"dropped": list(dropped), "kl": round(kl, 5)})
        return candidates[found.index(min(found))], trials
    gone: tuple[int, ...] = ()
    for _ in range(count):
        candidates = [tuple(sorted((*gone, i))) for i in range(total) if i not in gone]
        found = cost(candidates)
        gone = candidates[found.index(min(found))]
        trials.append({"dropped": list(gone), "kl": round(min(found), 5)})
    return gone, trials


def _kept(geometry: Geometry, dropped: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(layer for layer in range(geometry.layers) if layer not in dropped)


def _for_target(
    source: Checkpoint,
    plan: PrunePlan,
    costs: dict[Sizes, float],
    importance: Importance,
    windows: Tensor,
    device: torch.device,
) -> list[Choice]:
    """The candidates for a target, by measured divergence. costs: of the sizes that fit it."""
    assert plan.target is not None
    geometry = geometry_of(source)
    target = parse_target(plan.target)
    dropped_by_count: dict[int, tuple[int, ...]] = {}

    def cut(sizes: Sizes) -> Cut:
        count = geometry.layers - sizes.layers
        if count not in dropped_by_count:
            # of the methods that need no trial of their own
            method = plan.method if plan.method in ("angular", "last") else "influence"
            quick = replace(plan, method=method)
            dropped_by_count[count] = (
                choose_layers(source, quick, count, importance, windows, device)[0] if count else ()
            )
        return cut_to(geometry, sizes, _kept(geometry, dropped_by_count[count]), importance)

    predict = measure_cuts(source, plan, windows, cut, device)
    finalists = sorted(costs, key=predict)[: plan.candidates]
    say(f"target {plan.target}: {len(costs)} sizes fit, {len(finalists)} are measured")
    cuts = [cut(sizes) for sizes in finalists]
    found = divergences(source, windows, cuts, device)
    trials: list[dict[str, object]] = [
        asdict(sizes) | {"kl": round(kl, 5), target.kind: round(costs[sizes], 3)}
        for sizes, kl in zip(finalists, found, strict=True)
    ]
    order = sorted(range(len(cuts)), key=lambda i: found[i])
    return [Choice(cuts[i], importance, [trials[j] for j in order]) for i in order]


def _fitting(source: Checkpoint, plan: PrunePlan, device: torch.device) -> dict[Sizes, float]:
    """The sizes that come near a target from below, and what they cost. Raises InputError."""
    assert plan.target is not None
    target = parse_target(plan.target)
    if target.kind == "milliseconds":
        return sizes_within(source, plan, target, StepTime(source, device))
    return sizes_within(source, plan, target, stored_cost(source, target))


@dataclass(frozen=True)
class CutCosts:
    """An estimate of what sizes cost in divergence: each dimension's, measured on one cut, grown with the
    share that is removed, and added up."""

    whole: Sizes
    per_share: dict[str, float]
    """Nats per token, by dimension; in the order that they were measured in"""

    def __call__(self, sizes: Sizes) -> float:
        costs = self.per_share.items()
        return sum((cost * self.share(name, sizes) ** _POWER for name, cost in costs), 0.0)

    def share(self, name: str, sizes: Sizes) -> float:
        """How much of a dimension is removed."""
        before = float(getattr(self.whole, name))  # of experts there may be none
        return 1 - float(getattr(sizes, name)) / before if before else 0.0


def measure_cuts(
    source: Checkpoint,
    plan: PrunePlan,
    windows: Tensor,
    cut: Callable[[Sizes], Cut],
    device: torch.device,
) -> CutCosts:
    """What each dimension that the plan may change costs. windows: [n, length]. cut: makes one."""
    costs = CutCosts(Sizes.of(geometry_of(source)), {})
    possible = list(possible_sizes(geometry_of(source), plan))
    # the cut of each dimension that comes nearest to a quarter of it and touches the others least
    probes: dict[str, Sizes] = {}
    for name in ("layers", "intermediate", "kv_heads", "experts", "hidden"):
        touching = [sizes for sizes in possible if costs.share(name, sizes) > 0]
        others = [n for n in asdict(costs.whole) if n not in (name, "heads")]
        if touching:
            probes[name] = min(
                touching,
                key=lambda s: (
                    sum(costs.share(n, s) for n in others),
                    abs(costs.share(name, s) - 0.25),
                ),
            )
    found = divergences(source, windows, [cut(sizes) for sizes in probes.values()], device)
    for (name, sizes), kl in zip(probes.items(), found, strict=True):
        # a hidden size may be possible with fewer heads only: their part is known by then
        left = max(0.0, kl - costs(sizes))
        costs.per_share[name] = left / costs.share(name, sizes) ** _POWER
    return costs
