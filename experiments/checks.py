"""Claims of the papers, and the checks that decide them on the records of a figure.

A check is a function ``records -> (outcome, numbers)``. `below`, `level` and the others make one
for the optimizers that they are given, by name in the records.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from experiments.figure_records import FigureRecords
from metaopt.evaluation.statistics import final_mean, mean_interval

NEAR = 1.05  # losses within this factor of each other are level
SETTLED = 1.2  # a held-out loss within this factor of the final one has settled
MARKS = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)  # steps at which `best_of` compares

Outcome = Literal["reproduced", "partly", "not"]
Check: TypeAlias = Callable[[FigureRecords], tuple[Outcome, str]]
"""``records -> (outcome, our numbers in words)``."""


class Claim(NamedTuple):
    """A claim of a paper, or our own, and how it is decided.

    Attributes:
      source: number of the paper's figure or table, or "ours".
      text: the claim.
      figure: name of the figure whose records decide it; "": the meta-trainings of the paper.
      check: decides it.
      reason: why it came out as it did, in one line.
    """

    source: str
    text: str
    figure: str
    check: Check
    reason: str = ""


def graded(parts: Sequence[bool]) -> Outcome:
    """Whether all parts of a claim hold, some, or none."""
    if all(parts):
        return "reproduced"
    return "partly" if any(parts) else "not"


def every(*checks: Check) -> Check:
    """All of the checks; "partly" when only some are reproduced."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        outcomes, numbers = zip(*(part(records) for part in checks), strict=True)
        return graded([outcome == "reproduced" for outcome in outcomes]), "; ".join(numbers)

    return check


def negated(check: Check) -> Check:
    """The opposite of a claim that either holds or does not."""

    def opposite(records: FigureRecords) -> tuple[Outcome, str]:
        outcome, numbers = check(records)
        return graded([outcome == "not"]), numbers

    return opposite


def below(name: str, *others: str, step: int | None = None) -> Check:
    """`name` has a lower loss than each of the others, at a step (None: at the end)."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        loss = records.loss(name, step)
        parts = [loss < records.loss(other, step) for other in others]
        return graded(parts), losses_in_words(records, step, name, *others)

    return check


def ahead(name: str, *others: str) -> Check:
    """`name` ends below each of the others beyond chance.

    The 95% interval of the differences, seed by seed, is above zero.
    """

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        final_losses = final_mean(records.curves[name].loss)
        parts, words = [], []
        for other in others:
            gap = mean_interval(final_mean(records.curves[other].loss) - final_losses)
            mean, low, high = float(gap.mean), float(gap.low), float(gap.high)
            parts.append(low > 0)
            words.append(f"{short_name(other)} {mean:+.2g} [{low:+.2g}, {high:+.2g}]")
        own = losses_in_words(records, None, name)
        return graded(parts), f"{own}; above it: {', '.join(words)}"

    return check


def level(name: str, other: str, step: int | None = None) -> Check:
    """The two losses are within the factor `NEAR`, at a step (None: at the end)."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        ratio = records.loss(name, step) / records.loss(other, step)
        numbers = losses_in_words(records, step, name, other)
        return graded([1 / NEAR <= ratio <= NEAR]), numbers

    return check


def rises(name: str) -> Check:
    """The loss ends a tenth or more above its lowest point."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        step, lowest = records.lowest_loss(name)
        last = records.loss(name)
        numbers = f"{short_name(name)}: lowest {lowest:.3g} at step {step}, {last:.3g} at the end"
        return graded([not last < 1.1 * lowest]), numbers

    return check


def best_of(guard: str, *parts: str) -> Check:
    """At every mark, and at the end, `guard` is level with the best of `parts`, or below it."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        end = int(records.curves[guard].steps[-1])
        steps = [mark for mark in MARKS if mark < end] + [end]
        ratios = {}
        for step in steps:
            best = min(records.loss(part, step) for part in parts)
            ratios[step] = records.loss(guard, step) / best
        worst = max(steps, key=lambda step: ratios[step])
        numbers = (
            f"{short_name(guard)} over the best part: at worst {ratios[worst]:.2f} "
            f"(step {worst}), {ratios[end]:.2f} at the end"
        )
        return graded([ratio <= NEAR for ratio in ratios.values()]), numbers

    return check


def stuck(name: str) -> Check:
    """The loss ends above half of its initial value."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        start, end = records.initial_loss(name), records.loss(name)
        numbers = f"{short_name(name)}: start {start:.3g}, end {end:.3g}"
        return graded([not end < start / 2]), numbers

    return check


def never_diverges(name: str) -> Check:
    """Every seed ends below half of its initial loss, so not at chance either."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        start, worst = records.initial_loss(name), records.worst_final_loss(name)
        numbers = f"{short_name(name)}: worst seed {worst:.3g}, start {start:.3g}"
        return graded([worst < start / 2]), numbers

    return check


def diverges(name: str) -> Check:
    """Some seed ends above its initial loss, or not finite."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        start, worst = records.initial_loss(name), records.worst_final_loss(name)
        numbers = f"{short_name(name)}: worst seed {worst:.3g}, start {start:.3g}"
        return graded([not worst < start]), numbers

    return check


def switches(guard: str) -> Check:
    """The learned optimizer wins most windows at first, and fewer, but some, later."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        early, late = records.share_won(guard, 0, 0.02), records.share_won(guard, 0.5, 1)
        numbers = (
            f"won by L2O: {early:.0%} of the first 2 % of windows, {late:.0%} of the later half"
        )
        return graded([early > 0.5, 0 < late < early]), numbers

    return check


def trapped(guard: str) -> Check:
    """A seed loses what it had: both candidates end half above the lowest loss kept before."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        losses = records.curves[guard].state["losses"]  # [S, W, candidates]
        kept = losses.min(axis=2)
        lowest, last = kept.min(axis=1), kept[:, -1]
        lost = last > 1.5 * lowest
        numbers = f"{short_name(guard)}: {lost.sum()} of {len(lost)} seeds"
        if lost.any():
            numbers += f", from {lowest[lost].mean():.3g} to {last[lost].mean():.3g} on average"
        return graded([bool(lost.any())]), numbers

    return check


def faster(name: str, factor: float, *others: str) -> Check:
    """`name` needs `factor` times fewer steps than the best of the others.

    The best of the others is the one that ends lowest; steps count up to its final loss.
    """

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        best = min(others, key=records.loss)
        loss = records.loss(best)
        steps, best_steps = records.steps_to(name, loss), records.steps_to(best, loss)
        numbers = (
            f"to a loss of {loss:.3g}: {short_name(name)} {steps:.0f} steps, "
            f"{short_name(best)} {best_steps:.0f}"
        )
        return graded([steps * factor <= best_steps]), numbers

    return check


def mostly(name: str, base: str, start: float, end: float) -> Check:
    """Between two fractions of the run, `base` has more than half of the weight."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        alpha = records.mean_alpha(name, base, start, end)
        numbers = f"alpha of {base} from {start:.0%} to {end:.0%} of the run: {alpha:.2f}"
        return graded([alpha > 0.5]), numbers

    return check


def decays(name: str) -> Check:
    """Lambda is lower at first than in the middle of the run, and ends below half of that.

    At first: the first twentieth. Middle: from a tenth to a half. End: the last tenth.
    """

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        first = float(records.state(name, "lambda_", 0, 0.05).mean())
        middle = float(records.state(name, "lambda_", 0.1, 0.5).mean())
        last = float(records.state(name, "lambda_", 0.9, 1).mean())
        numbers = f"mean lambda: at first {first:.3g}, then {middle:.3g}, at the end {last:.3g}"
        return graded([first < middle, last < 0.5 * middle]), numbers

    return check


def settles(name: str, within: Callable[[float], bool]) -> Check:
    """The held-out loss of meta-training settles early, or late.

    It settles when it stays within the factor `SETTLED` of its final value, the mean of the last
    quarter.

    Args:
      name: the optimizer.
      within: whether the claim holds for a share of meta-training, the mean over its seeds.
    """

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        shares = []
        for updates, losses in records.held_out_losses(name):
            above = np.flatnonzero(~(losses <= SETTLED * last_quarter(losses)))
            first = above[-1] + 1 if above.size else 0
            shares.append(float(updates[first] / updates[-1]) if first < len(updates) else 1.0)
        share = float(np.mean(shares))
        return graded([within(share)]), f"{name} settles after {share:.0%} of meta-training"

    return check


def gains(name: str) -> Check:
    """The held-out loss is lower in the last quarter of meta-training than in the first."""

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        losses = [losses for _, losses in records.held_out_losses(name)]
        first = float(np.mean([first_quarter(one) for one in losses]))
        last = float(np.mean([last_quarter(one) for one in losses]))
        numbers = f"held-out loss of {name}: first quarter {first:.3g}, last {last:.3g}"
        return graded([last < first]), numbers

    return check


def steadier(name: str, other: str) -> Check:
    """Candidates of `name` explode in at most half as many generations as those of `other`.

    Candidates explode in a generation when their mean meta-loss is more than ten times its median
    over the generations after the first quarter of meta-training, which are the ones that count.
    """

    def exploding_share(records: FigureRecords, name: str) -> float:
        shares = []
        for run in records.meta_trainings(name):
            losses = run["meta_loss"]
            losses = losses[len(losses) // 4 :]
            shares.append(np.mean(~(losses <= 10 * np.nanmedian(losses))))
        return float(np.mean(shares))

    def check(records: FigureRecords) -> tuple[Outcome, str]:
        share, other_share = exploding_share(records, name), exploding_share(records, other)
        numbers = (
            f"candidates explode in {share:.1%} of the generations of {name}, "
            f"{other_share:.1%} of {other}"
        )
        return graded([2 * share <= other_share]), numbers

    return check


def first_quarter(losses: np.ndarray) -> float:
    """The mean of the first quarter of measurements."""
    return float(np.mean(np.array_split(losses, 4)[0]))


def last_quarter(losses: np.ndarray) -> float:
    """The mean of the last quarter of measurements."""
    return float(np.mean(np.array_split(losses, 4)[-1]))


def losses_in_words(records: FigureRecords, step: int | None, *names: str) -> str:
    """The losses of optimizers at a step (None: the end)."""
    where = "at the end" if step is None else f"at step {step}"
    losses = [f"{short_name(name)} {records.loss(name, step):.3g}" for name in names]
    return f"{where}: {', '.join(losses)}"


def short_name(name: str) -> str:
    """An optimizer's name in the table of claims.

    Leaves out the grid of SGD, SGD as the fallback of a guard, and "L2O" in a guard.
    """
    optimizer, _, arguments = name.partition("(")
    if optimizer.endswith(" "):  # for example "SGD (constant)", "Adam (head only)"
        return "SGD" if optimizer == "SGD " else name
    learned, _, rest = arguments.partition(", ")
    fallback = rest.partition(")")[0].partition(" (")[0]
    parts = []
    if learned.startswith("L2O-"):
        parts.append(learned)
    if fallback not in ("", "SGD"):
        parts.append(fallback)
    return f"{optimizer}({', '.join(parts)})" if parts else optimizer
