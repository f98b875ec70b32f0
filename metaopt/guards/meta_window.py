"""The window of the Meta Guards."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from metaopt.core.checks import check_choice, check_number
from metaopt.core.rollouts import scalar, unroll
from metaopt.core.trees import check_float_tree
from metaopt.core.types import LearnedOptimizer, Theta
from metaopt.guards.core import (
    Guard,
    batch_losses,
    check_lengths,
    check_sizes,
    check_window,
    inner,
    new_info,
)
from metaopt.guards.meta_core import (
    Method,
    Objective,
    Pair,
    Run,
    Setting,
    begin,
    decide,
    end,
    points_of,
)
from metaopt.guards.meta_stream import meta_process


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
    objective: Objective,
    num_steps: Any,
) -> Guard:
    """The guard of a `Method`; see `smg` for the arguments."""
    name = method.name
    check_sizes(name, n_t, n_c, least=0)
    check_choice(f"{name}: objective", objective, get_args(Objective))
    if not isinstance(learned, LearnedOptimizer):
        raise ValueError(
            f"{name}: learned must be a LearnedOptimizer, whose theta can adapt, got {learned!r}."
        )
    check_float_tree(f"{name}: theta", theta)
    for key, lr in {"lr_params": lr_params, "lr_theta": lr_theta}.items():
        check_number(f"{name}: {key}", lr, least=0)

    def make(theta):
        return inner(name, "learned", learned.apply(theta, num_steps=num_steps))

    make(theta)  # what is wrong with it is said now, not inside of the first window
    rates = Pair(lr_params, lr_theta)
    setting = Setting(method, learned, make, make_state, n_t, n_c, rates, second_order, objective)
    window = (2 * n_t + (objective == "next"), n_c)

    def init_fn(params):
        del params
        own = jax.tree.map(jnp.array, theta)  # a copy: the state may be donated
        return make_state(own, jnp.array(False), new_info(method.num_candidates, *window))

    return Guard(init_fn, _window_update(setting, window), window, meta_process(setting))


def _window_update(setting: Setting, window: tuple[int, int]):
    method, n_t = setting.method, setting.n_t

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
        loss_fn = scalar(loss_fn)
        check_lengths(method.name, lengths, window)
        cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], train_batches)

        def loss(params):
            if setting.objective == "validation":
                return jnp.mean(batch_losses(loss_fn, params, eval_batches))
            return loss_fn(params, jax.tree.map(lambda leaf: leaf[n_t], train_batches))

        def go(pair, batches):
            run, tx = begin(setting, pair), setting.make(pair.theta)
            params, memory, _ = unroll(
                tx, run.params, run.memory, loss_fn, batches, second_order=setting.second_order
            )
            return Run(params, pair.theta, memory)

        def objective(pair):
            last = end(setting, go(pair, cut(0, n_t)))
            return loss(last.params), last

        start = Pair(params, state.theta)
        proposals = method.propose(objective, loss, start, setting.rates)
        ends = tuple(
            go(pair, cut(window[0] - n_t, None)) for pair in method.unrolled(*proposals[:2])
        )
        points = points_of(setting, start, proposals, ends)
        losses = jnp.stack([batch_losses(loss_fn, point, eval_batches) for point in points])
        new_params, state = decide(setting, state, params, proposals, ends, losses)
        return optax.tree.sub(new_params, params), state

    return update_fn
