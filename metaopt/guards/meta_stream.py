"""The window of the Meta Guards mini-batch by mini-batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.core.rollouts import step
from metaopt.core.types import Params
from metaopt.guards.core import Process
from metaopt.guards.meta_core import Pair, Run, Setting, begin, decide, end, points_of


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


def meta_process(setting: Setting) -> Process | str:
    """The guard as a stream, or why it has none."""
    name, needs = setting.method.name, "Use the window form."
    if setting.second_order:
        return (
            f"{name} has no streaming form with second_order=True: the mini-batches whose "
            f"derivatives it needs are gone by then. {needs}"
        )
    if setting.objective == "validation":
        return (
            f"{name} has no streaming form with objective='validation': the validation "
            f"mini-batches are needed before the last learned steps and after them. {needs}"
        )
    method, n_t, n_c = setting.method, setting.n_t, setting.n_c
    rows, dtype = max(n_t, 1), jnp.result_type(float)

    def start(state, params):
        pair = Pair(params, state.theta)
        run = begin(setting, pair)
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
            last = end(setting, _replay(setting, pair, seen))
            return value_fn(last.params), last

        proposals = method.propose(objective, value_fn, work.start, setting.rates)
        ends = tuple(begin(setting, pair) for pair in method.unrolled(*proposals[:2]))
        return work._replace(proposals=proposals, ends=ends)

    def evaluate(work: MetaWork, index, value_fn):
        del index
        return work._replace(ends=tuple(advance(run, value_fn)[0] for run in work.ends))

    def validate(work: MetaWork, index, value_fn):
        points = points_of(setting, work.start, work.proposals, work.ends)
        losses = jnp.stack([value_fn(point) for point in points])
        return work._replace(losses=work.losses.at[:, index].set(losses.astype(dtype)))

    def finish(state, params, work: MetaWork, _):
        return decide(setting, state, params, work.proposals, work.ends, work.losses)

    return Process(
        start=start,
        phases=(explore, propose, evaluate, validate),
        lengths=lambda state: jnp.array([n_t, 1, n_t, n_c], jnp.int32),
        decide=finish,
    )


def _replay(setting: Setting, pair: Pair, seen: tuple[jax.Array, Params]) -> Run:
    """The run of `pair` over losses ``[T]`` and gradients ``[T, ...]`` recorded before."""
    start, tx = begin(setting, pair), setting.make(pair.theta)

    def body(carry, seen):
        (params, memory), (value, grad) = carry, seen
        updates, memory = tx.update(grad, memory, params, value=value, grad=grad)
        return (optax.apply_updates(params, updates), memory), None

    (params, memory), _ = jax.lax.scan(body, (start.params, start.memory), seen)
    return Run(params, pair.theta, memory)
