"""How claims are decided: functions ``panel -> (outcome, our numbers)``."""

from collections.abc import Callable

import numpy as np

from experiments.panels import Check, Outcome, Panel, graded
from metaopt.evaluation.statistics import final_mean, mean_interval

NEAR = 1.05  # losses closer than this factor count as level
SETTLED = 1.2  # a meta-training within this factor of its end has settled
MARKS = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)


def short(name: str) -> str:
    """What tables call an optimizer: SGD's grid, SGD as a fallback, and "L2O" are left out."""
    optimizer, _, inside = name.partition("(")
    if optimizer.endswith(" "):
        return "SGD" if optimizer == "SGD " else name
    learned, _, rest = inside.partition(", ")
    fallback = rest.partition(")")[0].partition(" (")[0]
    parts = [learned] * learned.startswith("L2O-") + [fallback] * (fallback not in ("", "SGD"))
    return f"{optimizer}({', '.join(parts)})" if parts else optimizer


def at(panel: Panel, step: int | None, *names: str) -> str:
    """The losses at a step (None: the end), in words."""
    where = "at the end" if step is None else f"at step {step}"
    return f"{where}: " + ", ".join(f"{short(n)} {panel.loss(n, step):.3g}" for n in names)


def below(name: str, *others: str, step: int | None = None) -> Check:
    """`name` has a lower loss than each of the others."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        own = panel.loss(name, step)
        parts = [own < panel.loss(other, step) for other in others]
        return graded(parts), at(panel, step, name, *others)

    return check


def ahead(name: str, *others: str) -> Check:
    """`name` ends below each of the others beyond chance: seed by seed, by a 95% interval."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        ends = lambda n: final_mean(panel.curves[n].loss)
        gaps = [mean_interval(ends(other) - ends(name)) for other in others]
        words = [
            f"{short(other)} {float(gap.mean):+.2g} [{float(gap.low):+.2g}, {float(gap.high):+.2g}]"
            for other, gap in zip(others, gaps, strict=True)
        ]
        parts = [float(gap.low) > 0 for gap in gaps]
        return graded(parts), f"{at(panel, None, name)}; above it: {', '.join(words)}"

    return check


def level(name: str, other: str, step: int | None = None) -> Check:
    """The two losses are within the factor `NEAR`."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        ratio = panel.loss(name, step) / panel.loss(other, step)
        return graded([1 / NEAR <= ratio <= NEAR]), at(panel, step, name, other)

    return check


def rises(name: str) -> Check:
    """The loss ends a tenth or more above its lowest point."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        step, lowest = panel.best(name)
        last = panel.loss(name)
        words = f"{short(name)}: lowest {lowest:.3g} at step {step}, {last:.3g} at the end"
        return graded([not last < 1.1 * lowest]), words

    return check


def best_of(guard: str, *parts: str) -> Check:
    """At every mark `guard` is level with the best of `parts`, or below."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        last = panel.curves[guard].steps[-1]
        ratios = {
            mark: panel.loss(guard, mark) / min(panel.loss(part, mark) for part in parts)
            for mark in (*(m for m in MARKS if m < last), int(last))
        }
        worst = max(ratios, key=lambda mark: ratios[mark])
        words = f"{short(guard)} over the best part: at worst {ratios[worst]:.2f} (step {worst}), "
        return graded(
            [r <= NEAR for r in ratios.values()]
        ), words + f"{ratios[last]:.2f} at the end"

    return check


def stuck(name: str) -> Check:
    """The loss ends above half of what it started from."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        start, last = panel.start(name), panel.loss(name)
        return graded([not last < start / 2]), f"{short(name)}: start {start:.3g}, end {last:.3g}"

    return check


def never_diverges(name: str) -> Check:
    """Every seed ends below half of the loss that it started from, so not at chance either."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        start, worst = panel.start(name), panel.worst_seed(name)
        words = f"{short(name)}: worst seed {worst:.3g}, start {start:.3g}"
        return graded([worst < start / 2]), words

    return check


def diverges(name: str) -> Check:
    """Some seed ends above the loss that it started from, or not finite."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        start, worst = panel.start(name), panel.worst_seed(name)
        words = f"{short(name)}: worst seed {worst:.3g}, start {start:.3g}"
        return graded([not worst < start]), words

    return check


def switches(guard: str) -> Check:
    """The learned optimizer wins most windows at first, and fewer, but some, later."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        early, late = panel.share(guard, 0, 0.02), panel.share(guard, 0.5, 1)
        words = f"won by L2O: {early:.0%} of the first 2 % of windows, {late:.0%} of the later half"
        return graded([early > 0.5, 0 < late < early]), words

    return check


def trapped(guard: str) -> Check:
    """A seed loses what it had: in the end both candidates are half above the lowest loss kept."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        kept = panel.curves[guard].state["losses"].min(axis=2)  # [S, W], of the better candidate
        lowest, last = kept.min(axis=1), kept[:, -1]
        lost = last > 1.5 * lowest
        words = f"{short(guard)}: {lost.sum()} of {len(lost)} seeds"
        if lost.any():
            words += f", from {lowest[lost].mean():.3g} to {last[lost].mean():.3g} on average"
        return graded([bool(lost.any())]), words

    return check


def faster(name: str, factor: float, *others: str) -> Check:
    """`name` needs `factor` times fewer steps than the best of the others for the loss it ends at.

    The best of the others is the one that ends lowest.
    """

    def check(panel: Panel) -> tuple[Outcome, str]:
        best = min(others, key=panel.loss)
        loss = panel.loss(best)
        steps, own = panel.steps_to(best, loss), panel.steps_to(name, loss)
        words = f"to a loss of {loss:.3g}: {short(name)} {own:.0f} steps, {short(best)} {steps:.0f}"
        return graded([own * factor <= steps]), words

    return check


def mostly(name: str, base: str, start: float, end: float) -> Check:
    """Between two fractions of the run `base` has more than half of the weight."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        weight = panel.weight(name, base, start, end)
        words = f"alpha of {base} from {start:.0%} to {end:.0%} of the run: {weight:.2f}"
        return graded([weight > 0.5]), words

    return check


def decays(name: str) -> Check:
    """lambda is lower in the first twentieth than in the first half, and lowest at the end."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        parts = ((0, 0.05), (0.1, 0.5), (0.9, 1))
        first, middle, last = (float(panel.state(name, "lambda_", *p).mean()) for p in parts)
        words = f"mean lambda: at first {first:.3g}, then {middle:.3g}, at the end {last:.3g}"
        return graded([first < middle, last < 0.5 * middle]), words

    return check


def settles(name: str, within: Callable[[float], bool]) -> Check:
    """When the held-out loss comes to within a fifth of where it ends, and stays there.

    The share of meta-training, as the mean over its seeds; it ends at the mean of the last quarter.
    """

    def check(panel: Panel) -> tuple[Outcome, str]:
        shares = []
        for steps, loss in panel.held_out(name):
            above = np.flatnonzero(~(loss <= SETTLED * _quarter(loss, -1)))
            first = above[-1] + 1 if above.size else 0
            shares.append(float(steps[first] / steps[-1]) if first < len(steps) else 1.0)
        share = float(np.mean(shares))
        return graded([within(share)]), f"{name} settles after {share:.0%} of meta-training"

    return check


def gains(name: str) -> Check:
    """The held-out loss of the last quarter of meta-training is below that of the first one."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        ends = np.array([[_quarter(loss, n) for n in (0, -1)] for _, loss in panel.held_out(name)])
        first, last = ends.mean(axis=0)
        words = f"held-out loss of {name}: first quarter {first:.3g}, last {last:.3g}"
        return graded([last < first]), words

    return check


def steadier(name: str, other: str) -> Check:
    """Candidates explode in half as many generations, or fewer.

    Counted are generations after the first quarter of meta-training in which the mean meta-loss of
    the population is more than ten times its median over those generations.
    """

    def check(panel: Panel) -> tuple[Outcome, str]:
        shares = []
        for one in (name, other):
            runs = [run["meta_loss"] for run in panel.meta_trainings(one)]
            later = [loss[len(loss) // 4 :] for loss in runs]
            shares.append(float(np.mean([~(x <= 10 * np.nanmedian(x)) for x in later])))
        words = f"candidates explode in {shares[0]:.1%} of the generations of {name}, "
        return graded([2 * shares[0] <= shares[1]]), words + f"{shares[1]:.1%} of {other}"

    return check


def _quarter(loss: np.ndarray, which: int) -> float:
    """The mean of the first quarter of measurements (0) or of the last one (-1)."""
    return float(np.mean(np.array_split(loss, 4)[which]))


def every(*checks: Check) -> Check:
    """All of them: partly, where only some hold."""

    def check(panel: Panel) -> tuple[Outcome, str]:
        found = [one(panel) for one in checks]
        return graded([outcome == "reproduced" for outcome, _ in found]), "; ".join(
            words for _, words in found
        )

    return check


def negated(check: Check) -> Check:
    """The opposite of a claim that either holds or does not."""

    def opposite(panel: Panel) -> tuple[Outcome, str]:
        outcome, words = check(panel)
        return graded([outcome == "not"]), words

    return opposite
