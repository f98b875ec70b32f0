"""The race, our own guard: optimizers run side by side, and the caller holds the leader's point."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from metaopt.core.checks import check_choice, check_integer, check_number
from metaopt.core.trees import add_to_count, cast_like
from metaopt.guards.core import (
    GuardInfo,
    Losses,
    Process,
    advance_counts,
    check_lengths,
    check_sizes,
    choose,
    init_info,
    inner_transformation,
    keep_counts,
    record_decision,
)
from metaopt.guards.forms import Guard, guard_of
from metaopt.guards.runners import Runner, advance_if_finite, start


class Standing(NamedTuple):
    """What the decisions of a `race` leave. Runner 0 is the challenger; the fallbacks follow.

    Attributes:
      leader: int32 ``[]``, the runner whose point the caller holds.
      best: int32 ``[]``, the fallback with the lowest smoothed loss, 1 or more.
      smoothed: float ``[k + 1]``, moving average of each runner's window means; +inf before the
        first decision.
      variance: float ``[k]``, of the difference of `smoothed` between the challenger and each
        fallback, estimated from the differences on single mini-batches.
      lost: int32 ``[]``, windows that the challenger has clearly lost since it last had the lead or
        started again.
      spent: int32 ``[]``, windows that the challenger has begun without the lead; at least `trial`
        once it has been retired.
      runs: bool ``[]``, whether the challenger runs, or else is retired.
      missed: int32 ``[]``, mini-batches since the challenger was retired.
      restart: bool ``[]``, whether the challenger goes on from the best fallback's point at the
        next mini-batch.
      spoilt: bool ``[]``, whether the challenger was retired because it was not finite.
      info: diagnostics. The candidates are the runners; `winner` is the leader.
    """

    leader: Int[Array, ""]
    best: Int[Array, ""]
    smoothed: Float[Array, " runners"]
    variance: Float[Array, " fallbacks"]
    lost: Int[Array, ""]
    spent: Int[Array, ""]
    runs: Bool[Array, ""]
    missed: Int[Array, ""]
    restart: Bool[Array, ""]
    spoilt: Bool[Array, ""]
    info: GuardInfo


class Totals(NamedTuple):
    """The losses of a window so far.

    Attributes:
      sums: float ``[k + 1]``, sum of each runner's losses.
      squares: float ``[k]``, sum of the squared differences of the challenger's loss and each
        fallback's.
      count: int32 ``[]``, losses in `sums`. Those of which none was finite are left out.
    """

    sums: Float[Array, " runners"]
    squares: Float[Array, " fallbacks"]
    count: Int[Array, ""]


class Runners(NamedTuple):
    """The runners of a `race`, and their losses in the window so far.

    Attributes:
      runners: the challenger, then the fallbacks.
      totals: of the losses that enter the moving averages.
      held_out: of the losses of `eval_fn`, where they overrule the averages; else None.
      leader_loss: float ``[]``, loss of the leader on the last mini-batch, before its step on it.
      broken: bool ``[]``, whether the challenger's loss or step was not finite where a fallback's
        was.
      skipped: int32 ``[]``, steps that were not taken because they led to NaN or inf.
      judged: int32 ``[]``, losses without gradient that were computed.
    """

    runners: tuple[Runner, ...]
    totals: Totals
    held_out: Totals | None
    leader_loss: Float[Array, ""]
    broken: Bool[Array, ""]
    skipped: Int[Array, ""]
    judged: Int[Array, ""]


def race(
    learned: optax.GradientTransformation,
    *fallbacks: optax.GradientTransformation,
    n_t: int = 10,
    n_c: int = 0,
    eval_every: int = 1,
    overrule: float = 0.0,
    smoothing: float = 0.5,
    margin: float = 2.0,
    patience: int = 12,
    trial: int = 20,
    budget: float = 0.05,
    memory: Literal["carry", "reset"] = "carry",
) -> Guard:
    r"""Race: runs a challenger beside fallbacks, and gives the caller the leader's point.

    Every runner steps on every mini-batch from its own point. Its loss on a mini-batch is taken
    before its step on it, so that no runner is judged by data that it has seen:

    .. math:: \ell^i_t = f(z^i_t; B_t), \quad z^i_{t+1} = \text{step}_i(z^i_t; B_t), \quad
       \text{leader} = \arg\min_i \; \text{smoothed mean of } \ell^i

    After each window of `n_t` mini-batches the leader is chosen anew. The challenger takes the lead
    when its smoothed loss is below that of the best fallback by `margin` standard errors of their
    difference, and keeps it while its loss is the lower one. A challenger that has been behind by
    as much in `patience` windows is retired, and then costs no gradient. After m windows it has
    begun at most ``trial + budget * m`` of them without the lead: `trial` is for the time before it
    is first retired, and it starts again, from the best fallback's point, when the share `budget`
    pays for `patience` windows.

    Nothing that the challenger does reaches a fallback: its params and state are, bit for bit,
    those of the run without a guard on the same mini-batches (docs/guards/race.md has the theorem).
    A step of a runner to params that are not finite is not taken; `info.skipped` counts it. A
    challenger whose loss or step is not finite, where a fallback's is, loses the lead at once, and
    is retired at the end of the window.

    Neither side needs to be a learned optimizer: ``race(optax.contrib.muon(1e-2), adamw)`` is a
    trial of a new optimizer beside the one in use.

    Args:
      learned: the challenger, a per-step transformation.
      *fallbacks: at least one per-step transformation.
      n_t: mini-batches of a window.
      n_c: further mini-batches of a window that no runner trains on. With them, the mean losses
        on these (of `eval_fn`, if it is given) decide instead of the training losses. With
        ``n_c=0`` an `eval_fn` decides too: give it held-out data where training data are few, and
        no mini-batch is lost.
      eval_every: a divisor of `n_t`; with ``n_c=0``, `eval_fn` is computed after every so many
        steps. With ``eval_every=n_t`` it is computed once per window, at the points of which the
        caller gets one. It should then return several losses ``[m]``, of parts of the held-out
        data, since one loss says nothing of its error.
      overrule: with 0, the losses of `eval_fn` alone decide. Above 0, and with ``n_c=0``, the
        training losses decide, unless the mean losses of `eval_fn` in the window differ between
        the challenger and the best fallback by more than `overrule` standard errors; then these
        decide.
      smoothing: in [0, 1), weight of the past in the moving average of window means. 0 decides on
        the last window alone.
      margin: standard errors by which the challenger must be ahead to take the lead, or behind to
        lose a window clearly. 0 decides by the means alone.
      patience: windows that the challenger may lose by `margin` standard errors, since it last had
        the lead or started again, before it is retired.
      trial: windows that the challenger may begin without the lead before it is first retired.
      budget: in [0, 1], share of all windows that it may begin without the lead beyond these. With
        0 a retired challenger never starts again. With 1 there is no bound, and it starts again at
        once.
      memory: state of the challenger when it starts again: "carry" goes on with the old one
        unless it was not finite, "reset" starts afresh. Step counts (fields named ``count``,
        except next to moments ``mu``) are those of the run in both cases.

    Returns:
      A `Guard`. With k fallbacks a mini-batch costs k gradients, and one more while the challenger
      runs (under `vmap` always). The state holds the params and the state of each runner.
      ``optax.tree.get(state, "leader_loss")`` is the leader's loss on the last mini-batch.

    Raises:
      ValueError: when there is no fallback or an option is out of range; at `init`, when params
        are masked; at `update`, when `params` or `value_fn` is missing.

    Examples:
      >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
      >>> tx = race(optax.lion(1e-2), optax.adam(1e-3))
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> value_fn = lambda params: loss_fn(params, jnp.ones(3))
      >>> updates, state = tx.update(None, state, params, value_fn=value_fn)
      >>> params = optax.apply_updates(params, updates)

    References:
      docs/guards/race.md; not from a paper.
    """
    check_sizes("race", n_t, n_c, least=(1, 0))
    if not fallbacks:
        raise ValueError("race: give at least one fallback: race(learned, fallback).")
    check_integer("race: eval_every", eval_every, 1)
    if n_t % eval_every or (n_c and eval_every > 1):
        raise ValueError(
            f"race: eval_every must be a divisor of n_t={n_t}, and 1 with n_c above 0, got "
            f"{eval_every} with n_c={n_c}."
        )
    check_number("race: overrule", overrule, least=0)
    if overrule and n_c:
        raise ValueError(f"race: overrule needs n_c=0, got {overrule} with n_c={n_c}.")
    check_number("race: smoothing", smoothing, least=0, below=1)
    check_number("race: margin", margin, least=0)
    check_integer("race: patience", patience, 1)
    check_integer("race: trial", trial, 1)
    check_number("race: budget", budget, least=0, most=1)
    check_choice("race: memory", memory, ("carry", "reset"))
    challenger_tx = inner_transformation("race", "learned", learned)
    fallback_txs = [
        inner_transformation("race", f"fallback {index}", fallback)
        for index, fallback in enumerate(fallbacks)
    ]
    num_runners = 1 + len(fallback_txs)
    dtype = jnp.result_type(float)

    def no_losses() -> Totals:
        return Totals(
            sums=jnp.zeros(num_runners, dtype),
            squares=jnp.zeros(num_runners - 1, dtype),
            count=jnp.array(0, jnp.int32),
        )

    def init_fn(params, model_state):
        # Each number is a buffer of its own, so that a state can be donated.
        integer = lambda value: jnp.array(value, jnp.int32)
        standing = Standing(
            leader=integer(1),
            best=integer(1),
            smoothed=jnp.full(num_runners, jnp.inf, dtype),
            variance=jnp.zeros(num_runners - 1, dtype),
            lost=integer(0),
            spent=integer(0),
            runs=jnp.array(True),
            missed=integer(0),
            restart=jnp.array(False),
            spoilt=jnp.array(False),
            info=init_info(num_runners, n_t=n_t, n_c=n_c),
        )
        runners = Runners(
            runners=tuple(start(tx, params, model_state) for tx in (challenger_tx, *fallback_txs)),
            totals=no_losses(),
            held_out=no_losses() if overrule else None,
            leader_loss=jnp.zeros([], dtype),
            broken=jnp.array(False),
            skipped=integer(0),
            judged=integer(0),
        )
        return standing, runners

    def start_window(standing: Standing, work: Runners, params):
        del standing, params
        return work._replace(
            totals=no_losses(),
            held_out=no_losses() if overrule else None,
            broken=jnp.array(False),
            skipped=jnp.zeros_like(work.skipped),
            judged=jnp.zeros_like(work.judged),
        )

    def num_running(standing: Standing):
        return num_runners - 1 + standing.runs.astype(jnp.int32)

    def from_best_fallback(standing: Standing, work: Runners) -> Runner:
        """The challenger at the start of a new run."""
        challenger, rest = work.runners[0], work.runners[1:]
        params = choose(standing.best - 1, [runner.params for runner in rest])
        model_state = choose(standing.best - 1, [runner.model_state for runner in rest])
        old_state = advance_counts(challenger.state, standing.missed)
        state = keep_counts(challenger_tx.init(params), old_state)
        if memory == "carry":
            state = optax.tree.where(standing.spoilt, state, old_state)
        return Runner(params, state, model_state)

    def train(standing: Standing, work: Runners, index, losses: Losses):
        def step_challenger(challenger: Runner):
            is_new = standing.restart & (index == 0)
            challenger = jax.lax.cond(
                is_new,
                lambda challenger: cast_like(challenger, from_best_fallback(standing, work)),
                lambda challenger: challenger,
                challenger,
            )
            return _cast(advance_if_finite(challenger_tx, challenger, losses))

        def wait(challenger: Runner):
            return _cast((challenger, jnp.inf, True))

        def _cast(result):
            runner, loss, taken = result
            runner = cast_like(work.runners[0], runner)
            return runner, jnp.asarray(loss).astype(dtype), jnp.asarray(taken)

        runs = standing.runs
        results = [
            jax.lax.cond(runs, step_challenger, wait, work.runners[0]),
            *(
                advance_if_finite(tx, runner, losses)
                for tx, runner in zip(fallback_txs, work.runners[1:], strict=True)
            ),
        ]
        runners, values, taken = zip(*results, strict=True)
        values = jnp.stack([value.astype(dtype) for value in values])
        taken = jnp.stack(taken)
        healthy = taken & jnp.isfinite(values)
        work = work._replace(
            runners=tuple(runners),
            leader_loss=values[leader_now(standing, work)],
            broken=work.broken | (runs & ~healthy[0] & jnp.any(healthy[1:])),
            skipped=work.skipped + jnp.sum(~taken).astype(jnp.int32),
        )
        if n_c:
            return work
        if overrule or not losses.held_out:
            work = work._replace(totals=add_losses(work.totals, values[:, None]))
        if not losses.held_out:
            return work
        judge = lambda work: cast_like(work, validate(standing, work, index, losses))
        if eval_every == 1:
            return judge(work)
        return jax.lax.cond((index + 1) % eval_every == 0, judge, lambda work: work, work)

    def validate(standing: Standing, work: Runners, index, losses: Losses):
        del index
        loss_of = lambda runner: losses.judge(runner.params, runner.model_state).astype(dtype)
        rest = [loss_of(runner) for runner in work.runners[1:]]
        nothing = lambda runner: jnp.full_like(rest[0], jnp.inf)
        first = jax.lax.cond(standing.runs, loss_of, nothing, work.runners[0])
        values = jnp.stack([first, *rest])
        work = work._replace(judged=work.judged + num_running(standing))
        if work.held_out is not None:
            return work._replace(held_out=add_losses(work.held_out, values))
        return work._replace(totals=add_losses(work.totals, values))

    def add_losses(totals: Totals, values: jax.Array) -> Totals:
        """Adds losses ``[k + 1, m]``."""
        is_finite = jnp.isfinite(values)
        usable = jnp.any(is_finite, axis=0, keepdims=True)
        differences = jnp.where(is_finite[:1] & is_finite[1:], values[:1] - values[1:], 0.0)
        values = jnp.where(usable, jnp.where(is_finite, values, jnp.inf), 0.0)
        return Totals(
            sums=totals.sums + jnp.sum(values, axis=1),
            squares=totals.squares + jnp.sum(jnp.square(differences), axis=1),
            count=totals.count + jnp.sum(usable).astype(jnp.int32),
        )

    def means(standing: Standing, work: Runners, totals: Totals):
        """Each runner's mean loss, and the squared standard errors of the differences."""
        count = jnp.maximum(totals.count, 1).astype(dtype)
        losses = jnp.where(totals.count > 0, totals.sums / count, jnp.inf)
        losses = losses.at[0].set(jnp.where(standing.runs & ~work.broken, losses[0], jnp.inf))
        difference = jnp.where(jnp.isfinite(losses[0]), losses[0] - losses[1:], 0.0)
        spread = jnp.maximum(totals.squares / count - jnp.square(difference), 0.0)
        return losses, spread / jnp.maximum(count - 1, 1)

    def leader_now(standing: Standing, work: Runners):
        """The leader of the last decision, unless it is a challenger that has broken since."""
        return jnp.where(work.broken & (standing.leader == 0), standing.best, standing.leader)

    def point(standing: Standing, work: Runners):
        return choose(leader_now(standing, work), [runner.params for runner in work.runners])

    def model_state(standing: Standing, work: Runners):
        return choose(leader_now(standing, work), [runner.model_state for runner in work.runners])

    def decide(standing: Standing, work: Runners, params, lengths):
        del lengths
        runs = standing.runs
        losses, of_window = means(standing, work, work.totals)
        # An average that is not finite starts again from the next mean.
        has_past = jnp.isfinite(standing.smoothed)
        past = jnp.where(has_past, standing.smoothed, 0.0)
        averaged = smoothing * past + (1 - smoothing) * losses
        # A window of which no loss is finite says nothing.
        is_usable = work.totals.count > 0
        smoothed = jnp.where(is_usable, jnp.where(has_past, averaged, losses), standing.smoothed)
        best = jnp.where(is_usable, 1 + jnp.argmin(smoothed[1:]), standing.best)

        # Squared standard errors of the differences: of this window, and smoothed.
        averaged = smoothing**2 * standing.variance + (1 - smoothing) ** 2 * of_window
        variance = jnp.where(has_past[0], averaged, of_window)
        variance = jnp.where(is_usable, variance, standing.variance)

        had_lead = leader_now(standing, work) == 0
        error = margin * jnp.sqrt(variance[best - 1])
        needed = jnp.where(had_lead, 0.0, error)
        is_ahead = jnp.where(is_usable, smoothed[0] < smoothed[best] - needed, had_lead)

        is_behind = runs & is_usable & (smoothed[0] >= smoothed[best] + error)
        if work.held_out is not None:
            held_out, squared_errors = means(standing, work, work.held_out)
            needed = overrule * jnp.sqrt(squared_errors[best - 1])
            is_clear = (work.held_out.count > 0) & runs & ~work.broken
            is_better = is_clear & (held_out[0] < held_out[best] - needed)
            is_worse = is_clear & (held_out[0] > held_out[best] + needed)
            is_ahead = (is_ahead | is_better) & ~is_worse
            is_behind = (is_behind | is_worse) & ~is_better
        lost = jnp.where(is_usable & is_ahead, 0, add_to_count(standing.lost, is_behind))
        spent = add_to_count(standing.spent, runs & (standing.leader > 0))
        # When the next window begins.
        paid_for = trial + budget * (standing.info.windows.astype(dtype) + 2)
        can_go_on = is_ahead | (budget >= 1) | (spent.astype(dtype) + 1 <= paid_for)
        retired = runs & ((lost >= patience) | work.broken | ~can_go_on)
        # What the first trial leaves is not for later ones.
        spent = jnp.where(retired, jnp.maximum(spent, trial), spent)
        returns = (retired | ~runs) & ((budget >= 1) | (spent.astype(dtype) + patience <= paid_for))
        # A challenger that starts again has no lead and no arrears.
        smoothed = smoothed.at[0].set(jnp.where(returns, smoothed[best], smoothed[0]))
        variance = jnp.where(returns, 0.0, variance)
        leader = jnp.where(is_ahead, 0, best)

        nothing_finite = ~jnp.any(jnp.isfinite(losses))
        info = record_decision(
            standing.info,
            winner=jnp.where(nothing_finite, -1, leader),
            accepted=is_ahead,
            losses=losses,
            kept_start=nothing_finite,
            gradient_evals=num_running(standing) * n_t,
            loss_evals=work.judged,
            skipped=work.skipped,
        )
        new_standing = Standing(
            leader=leader,
            best=best,
            smoothed=smoothed,
            variance=variance,
            lost=jnp.where(retired | returns, 0, lost),
            spent=spent,
            runs=(runs & ~retired) | returns,
            missed=jnp.where(runs, 0, add_to_count(standing.missed, n_t)),
            restart=returns,
            spoilt=jnp.where(retired, work.broken, standing.spoilt),
            info=info,
        )
        return params, cast_like(standing, new_standing)

    def split(num_train: int, num_eval: int):
        check_lengths("race", (num_train, num_eval), (n_t, n_c))
        return lengths

    lengths = (n_t, n_c) if n_c else (n_t,)
    return guard_of(
        Process(
            name="race",
            window=(n_t, n_c),
            init=init_fn,
            start=start_window,
            phases=(train, validate) if n_c else (train,),
            lengths=lengths,
            split=split,
            decide=decide,
            point=point,
            model_state=model_state,
        )
    )
