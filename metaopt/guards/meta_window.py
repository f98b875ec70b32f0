"""The window of the Meta Guards, whole and mini-batch by mini-batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.base import LearnedOptimizer, Params, Theta
from metaopt.guards.core import (
    Guard,
    Process,
    batch_losses,
    became_nonfinite,
    check_lengths,
    check_sizes,
    check_window,
    inner,
    new_info,
    record,
    score,
    select,
)
from metaopt.rollouts import step, unroll
from metaopt.trees import all_finite, check_float_tree


class Pair(NamedTuple):
    """What a Meta Guard optimizes: params and meta-parameters together."""

    params: Params
    theta: Theta


class Method(NamedTuple):
    """In what SMG and AMG differ.

    Attributes:
      name: how messages call it.
      propose: ``(objective, loss, start, rates) -> learned, fallback, used_gradient``, where
        ``objective(pair) -> loss on C after T steps, pair after T steps``, and ``loss(params)``
        is the loss on C.
      unrolled: ``(learned, fallback) -> pairs`` that take T more steps on B2.
      candidates: ``(start, learned, fallback, ends) -> pairs, points``: what can be kept, and the
        params at which each is judged.
      pick: scores (finite or +inf) -> index of the candidate to keep.
      num_candidates, gradients, losses: how many there are; what a window costs.
    """

    name: str
    propose: Callable[..., tuple[Pair, Pair, jax.Array]]
    unrolled: Callable[[Pair, Pair], tuple[Pair, ...]]
    candidates: Callable[..., tuple[tuple[Pair, ...], tuple[Params, ...]]]
    pick: Callable[[jax.Array], jax.Array]
    num_candidates: int
    gradients: int
    losses: int


class Run(NamedTuple):
    """The learned optimizer on its way: params, theta (fixed) and the transformation's state."""

    params: Params
    theta: Theta
    memory: Any


class MetaWork(NamedTuple):
    """A window in the middle, for the streaming form.

    Attributes:
      start: the pair at the start of the window.
      run: the learned optimizer on B1.
      seen: losses ``[T]`` and gradients ``[T, ...]`` that it saw; as constants they make the
        first-order gradient exact after the mini-batches themselves are gone.
      proposals: what `Method.propose` found on C.
      ends: the runs on B2.
      losses: validation losses ``[candidates, n_c]`` so far.
    """

    start: Pair
    run: Run
    seen: tuple[jax.Array, Params]
    proposals: tuple[Pair, Pair, jax.Array]
    ends: tuple[Run, ...]
    losses: jax.Array


class Setting(NamedTuple):
    """One Meta Guard: a `Method` and the user's options; see `smg`."""

    method: Method
    learned: LearnedOptimizer
    make: Callable[[Theta], optax.GradientTransformationExtraArgs]
    make_state: Callable[..., Any]
    n_t: int
    n_c: int
    rates: Pair
    second_order: bool


def meta_guard(
    method: Method,
    learned: LearnedOptimizer,
    theta: Theta,
    make_state: Callable[..., Any],
    *,
    n_t: int,
    n_c: int,
    lr_params: float,
    lr_theta: float,
    second_order: bool,
    num_steps: Any,
) -> Guard:
    """The guard of a `Method`; see `smg` for the arguments."""
    name = method.name
    check_sizes(name, n_t, n_c, least=0)
    if not isinstance(learned, LearnedOptimizer):
        raise ValueError(
            f"{name}: learned must be a LearnedOptimizer, whose theta can adapt, got {learned!r}."
        )
    check_float_tree(f"{name}: theta", theta)
    for key, lr in {"lr_params": lr_params, "lr_theta": lr_theta}.items():
        if lr < 0:
            raise ValueError(f"{name}: {key} must not be negative, got {lr}.")

    def make(theta):
        return inner(name, "learned", learned.apply(theta, num_steps=num_steps))

    rates = Pair(lr_params, lr_theta)
    setting = Setting(method, learned, make, make_state, n_t, n_c, rates, second_order)

    def init_fn(params):
        del params
        own = jax.tree.map(jnp.array, theta)  # a copy: the state may be donated
        return make_state(own, jnp.array(False), new_info(method.num_candidates, 2 * n_t + 1, n_c))

    process: Process | str = _process(setting)
    if second_order:
        process = (
            f"{name} has no streaming form with second_order=True: the mini-batches whose "
            "derivatives it needs are gone by then. Use the window form."
        )
    return Guard(init_fn, _window_update(setting), (2 * n_t + 1, n_c), process)


def _begin(setting: Setting, pair: Pair) -> Run:
    return Run(pair.params, pair.theta, setting.make(pair.theta).init(pair.params))


def _end(setting: Setting, run: Run) -> Pair:
    return Pair(run.params, setting.learned.absorb(run.theta, run.memory))


def _decide(setting: Setting, state, params, proposals, ends, losses) -> tuple[Params, Any]:
    """Keeps one pair, given the validation losses ``[candidates, n_c]``."""
    method, start = setting.method, Pair(params, state.theta)
    learned, fallback, used_gradient = proposals
    ends = tuple(_end(setting, run) for run in ends)
    pairs, points = method.candidates(start, learned, fallback, ends)
    mask = jnp.ones(setting.n_c, bool)
    scores = []
    for pair, point, loss in zip(pairs, points, losses, strict=True):
        broken = became_nonfinite(start.theta, pair.theta) | ~all_finite(pair.params)
        scores.append(jnp.where(broken, jnp.inf, score(loss, mask, point)))
    scores = jnp.stack(scores)
    kept_start = ~jnp.any(jnp.isfinite(scores[:3]))  # all proposals; AMG's 3 is the start
    winner = jnp.where(jnp.any(jnp.isfinite(scores)), method.pick(scores), -1)
    kept = select(winner, pairs, start)
    info = record(
        state.info,
        winner,
        winner == 0,
        scores,
        kept_start,
        gradients=method.gradients,
        losses=method.losses,
    )
    return kept.params, setting.make_state(kept.theta, used_gradient, info)


def _window_update(setting: Setting):
    method, n_t, n_c = setting.method, setting.n_t, setting.n_c

    def update_fn(
        updates,
        state,
        params=None,
        *,
        loss_fn: Any = None,
        train_batches=None,
        eval_batches=None,
        **extra_args,
    ):
        del extra_args
        lengths = check_window(method.name, updates, params, loss_fn, train_batches, eval_batches)
        check_lengths(method.name, lengths, (2 * n_t + 1, n_c))
        cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], train_batches)
        held_out = jax.tree.map(lambda leaf: leaf[n_t], train_batches)
        loss = lambda params: loss_fn(params, held_out)

        def go(pair, batches):
            run, tx = _begin(setting, pair), setting.make(pair.theta)
            params, memory, _ = unroll(
                tx, run.params, run.memory, loss_fn, batches, second_order=setting.second_order
            )
            return Run(params, pair.theta, memory)

        def objective(pair):
            end = _end(setting, go(pair, cut(0, n_t)))
            return loss(end.params), end

        start = Pair(params, state.theta)
        proposals = method.propose(objective, loss, start, setting.rates)
        ends = tuple(go(pair, cut(n_t + 1, None)) for pair in method.unrolled(*proposals[:2]))
        points = _points(setting, start, proposals, ends)
        losses = jnp.stack([batch_losses(loss_fn, point, eval_batches) for point in points])
        new_params, state = _decide(setting, state, params, proposals, ends, losses)
        return optax.tree.sub(new_params, params), state

    return update_fn


def _points(setting: Setting, start: Pair, proposals, ends) -> tuple[Params, ...]:
    """The params at which the candidates are judged."""
    ends = tuple(_end(setting, run) for run in ends)
    return setting.method.candidates(start, *proposals[:2], ends)[1]


def _process(setting: Setting) -> Process:
    method, n_t, n_c = setting.method, setting.n_t, setting.n_c
    rows, dtype = max(n_t, 1), jnp.result_type(float)

    def start(state, params):
        pair = Pair(params, state.theta)
        run = _begin(setting, pair)
        seen_grads = jax.tree.map(lambda p: jnp.zeros((rows, *jnp.shape(p)), p.dtype), params)
        return MetaWork(
            start=pair,
            run=run,
            seen=(jnp.zeros(rows, dtype), seen_grads),
            proposals=(pair, pair, jnp.array(False)),
            ends=tuple(run for _ in method.unrolled(pair, pair)),
            losses=jnp.zeros((method.num_candidates, n_c), dtype),
        )

    def advance(run: Run, value_fn) -> tuple[Run, Any]:
        tx = setting.make(run.theta)
        params, memory, seen = step(tx, run.params, run.memory, value_fn)
        return Run(params, run.theta, memory), seen

    def explore(work: MetaWork, index, value_fn):
        run, seen = advance(work.run, value_fn)
        put = lambda rows, row: rows.at[index].set(row.astype(rows.dtype))
        return work._replace(run=run, seen=jax.tree.map(put, work.seen, seen))

    def propose(work: MetaWork, index, value_fn):
        del index
        seen = jax.tree.map(lambda rows: rows[:n_t], work.seen)

        def objective(pair):
            end = _end(setting, _replay(setting, pair, seen))
            return value_fn(end.params), end

        proposals = method.propose(objective, value_fn, work.start, setting.rates)
        ends = tuple(_begin(setting, pair) for pair in method.unrolled(*proposals[:2]))
        return work._replace(proposals=proposals, ends=ends)

    def evaluate(work: MetaWork, index, value_fn):
        del index
        return work._replace(ends=tuple(advance(run, value_fn)[0] for run in work.ends))

    def validate(work: MetaWork, index, value_fn):
        points = _points(setting, work.start, work.proposals, work.ends)
        losses = jnp.stack([value_fn(point) for point in points])
        return work._replace(losses=work.losses.at[:, index].set(losses.astype(dtype)))

    def decide(state, params, work: MetaWork, _):
        return _decide(setting, state, params, work.proposals, work.ends, work.losses)

    return Process(
        start=start,
        phases=(explore, propose, evaluate, validate),
        lengths=lambda state: jnp.array([n_t, 1, n_t, n_c], jnp.int32),
        decide=decide,
    )


def _replay(setting: Setting, pair: Pair, seen: tuple[jax.Array, Params]) -> Run:
    """The run of `pair` over losses ``[T]`` and gradients ``[T, ...]`` recorded before."""
    start, tx = _begin(setting, pair), setting.make(pair.theta)

    def body(carry, seen):
        (params, memory), (value, grad) = carry, seen
        updates, memory = tx.update(grad, memory, params, value=value, grad=grad)
        return (optax.apply_updates(params, updates), memory), None

    (params, memory), _ = jax.lax.scan(body, (start.params, start.memory), seen)
    return Run(params, pair.theta, memory)
