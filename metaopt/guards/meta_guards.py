"""The Meta Guards SMG and AMG: theta is part of the guard's state and adapts during the run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from metaopt.core.checks import check_number
from metaopt.core.rollouts import step
from metaopt.core.trees import all_finite, check_float_tree
from metaopt.core.types import LearnedOptimizer, Params, Theta
from metaopt.guards.core import (
    GuardInfo,
    Losses,
    Process,
    became_nonfinite,
    check_lengths,
    check_sizes,
    init_info,
    inner_transformation,
    record_decision,
    score,
    select,
)
from metaopt.guards.forms import Guard, guard_of


class MetaGuardState(NamedTuple):
    """State of `smg` and `amg`.

    Attributes:
      theta: adapted meta-parameters, the averaged memory included. They have the structure of
        `LearnedOptimizer.init`, which `apply` takes and a checkpoint holds.
      used_gradient: bool ``[]``, whether the last fallback was the plain gradient step (`amg`;
        always False for `smg`).
      info: diagnostics. The candidates are (learned, fallback), and for `amg` then the fallback
        after T more steps and the starting pair.
    """

    theta: Theta
    used_gradient: Bool[Array, ""]
    info: GuardInfo


class Pair(NamedTuple):
    """What a Meta Guard optimizes.

    Attributes:
      params: weights of the optimizee.
      theta: meta-parameters of the learned optimizer.
    """

    params: Params
    theta: Theta


def smg(
    learned: LearnedOptimizer,
    theta: Theta,
    *,
    n_t: int = 10,
    n_c: int = 10,
    lr_params: float = 3.0,
    lr_theta: float = 0.1,
    num_steps: Any = None,
) -> Guard:
    r"""Simple Meta Guard: its fallback descends in params x and meta-parameters theta together.

    .. math:: \text{learned} = g^T(x, \theta; B_1), \quad
       \text{fallback} = (x, \theta) - (\lambda_x \nabla_x, \lambda_\theta \nabla_\theta)
       \, \ell(g^T(x, \theta; B_1); C)

    where :math:`g^T(x, \theta)` is T steps of the learned optimizer from x, whose final memory,
    averaged over coordinates, is written back into theta (`learned.absorb`). The guard keeps the
    pair whose T further steps on :math:`B_2` end at the lower mean loss on V. A tie keeps the
    learned pair, as in the paper's listing. A pair counts as +inf unless it and its end are finite.
    When neither is, the starting pair stays.

    Args:
      learned: the learned optimizer.
      theta: the meta-parameters to start with.
      n_t: T, steps of the learned optimizer per window. 0 gives plain gradient descent.
      n_c: validation mini-batches V of a window.
      lr_params: step size :math:`\lambda_x` of the fallback; 3.0 in the paper.
      lr_theta: step size :math:`\lambda_\theta` of the fallback; 0.1 in the paper.
      num_steps: horizon passed to ``learned.apply``.

    Returns:
      A `Guard`. Its window is :math:`B_1` (T mini-batches), C (1), :math:`B_2` (T) and V (n_c).
      Updates are zero until the last mini-batch of a window, whose update leads to the chosen
      point. A window costs 3 T + 1 gradients, one back-propagation through T learned steps, and
      2 n_c losses. The gradient in x and theta takes the losses and gradients that the learned
      optimizer saw as constants (first order; docs/guards/smg.md).

    Raises:
      ValueError: when an option is out of range; at `init`, when params are masked or a model
        state is given; at `update`, when `params` or `value_fn` is missing.

    References:
      Wang et al., *Continually Adapting Optimizers Improve Meta-Generalization* (Meta Guard),
      algorithm 1

      docs/guards/smg.md lists what the paper leaves open and what we chose.
    """
    method = Method(
        name="smg",
        propose=_propose_adapted_descent,
        unrolled=lambda proposals: (proposals.learned, proposals.fallback),
        pairs=lambda start, proposals, ends: (proposals.learned, proposals.fallback),
        points=lambda start, proposals, runs: tuple(run.params for run in runs),
        pick=lambda losses: jnp.where(losses[0] > losses[1], 1, 0),
        num_candidates=2,
        gradient_evals=3 * n_t + 1,
        loss_evals=2 * n_c,
    )
    return _meta_guard(
        method,
        learned,
        theta,
        n_t=n_t,
        n_c=n_c,
        lr_params=lr_params,
        lr_theta=lr_theta,
        num_steps=num_steps,
    )


def amg(
    learned: LearnedOptimizer,
    theta: Theta,
    *,
    n_t: int = 10,
    n_c: int = 10,
    lr_params: float = 3.0,
    lr_theta: float = 0.1,
    num_steps: Any = None,
) -> Guard:
    r"""Adaptive Meta Guard: keeps the best of four candidates, so that the loss never rises.

    .. math:: \text{fallback} = (x - \lambda_x \nabla \ell(x; C), \theta)
       \text{ if } \ell(x; C) \le \ell(x_T; C)
       \text{ else the fallback of } \text{smg}

    where :math:`x_T` is x after T steps of the learned optimizer on :math:`B_1`. The candidates
    are the learned pair and the fallback as in `smg`, the fallback after T more steps on
    :math:`B_2`, and the starting pair. The guard keeps the first with the lowest mean loss on V;
    `info.winner` is 0 to 3 in this order. On a full batch the loss therefore never rises, whatever
    theta. Equality satisfies both of the paper's cases, and we take the plain gradient step.

    Args:
      learned: see `smg`.
      theta: see `smg`.
      n_t: see `smg`.
      n_c: see `smg`.
      lr_params: see `smg`.
      lr_theta: see `smg`.
      num_steps: see `smg`.

    Returns:
      A `Guard` that is called as that of `smg`. It costs 2 T + 1 gradients, 4 n_c + 2 losses, and
      one back-propagation through T learned steps where it is needed (`lax.cond`; under `vmap`
      always).

    Raises:
      ValueError: see `smg`.

    References:
      Wang et al., *Continually Adapting Optimizers Improve Meta-Generalization* (Meta Guard),
      algorithm 2

      docs/guards/amg.md lists what the paper leaves open and what we chose.
    """
    method = Method(
        name="amg",
        propose=_propose_best_descent,
        unrolled=lambda proposals: (proposals.fallback,),
        pairs=lambda start, proposals, ends: (
            proposals.learned,
            proposals.fallback,
            ends[0],
            start,
        ),
        points=lambda start, proposals, runs: (
            proposals.learned.params,
            proposals.fallback.params,
            runs[0].params,
            start.params,
        ),
        pick=jnp.argmin,  # the first of the lowest
        num_candidates=4,
        gradient_evals=2 * n_t + 1,
        loss_evals=4 * n_c + 2,
    )
    return _meta_guard(
        method,
        learned,
        theta,
        n_t=n_t,
        n_c=n_c,
        lr_params=lr_params,
        lr_theta=lr_theta,
        num_steps=num_steps,
    )


################################################################################
# What SMG and AMG differ in
################################################################################


class Proposals(NamedTuple):
    """The proposals of a window.

    Attributes:
      learned: params after T steps of the learned optimizer, and theta with their memory.
      fallback: the pair after a gradient step.
      used_gradient: bool ``[]``, whether `fallback` is the plain gradient step in params.
    """

    learned: Pair
    fallback: Pair
    used_gradient: jax.Array


class Run(NamedTuple):
    """The learned optimizer during a run.

    Attributes:
      params: weights of the optimizee.
      theta: meta-parameters, which are fixed during the run.
      memory: state of the transformation ``learned.apply(theta)``.
    """

    params: Params
    theta: Theta
    memory: Any


class Method(NamedTuple):
    """The parts in which SMG and AMG differ.

    Attributes:
      name: name of the guard in error messages.
      propose: ``(adapted_loss, loss, start, rates) -> Proposals``. Here
        ``adapted_loss(pair) -> (loss, pair)`` takes T steps and returns the loss and the pair
        after them, and ``loss(params)`` is the loss on C. `rates` is a `Pair` of step
        sizes.
      unrolled: ``Proposals -> pairs`` that take T further steps on B2.
      pairs: ``(start, Proposals, ends) -> pairs`` that can be kept; `ends` are the unrolled pairs
        after their steps.
      points: ``(start, Proposals, runs) -> params`` at which each of `pairs` is judged; `runs`
        are the runs of the unrolled pairs.
      pick: losses ``[candidates]``, finite or +inf -> index of the pair to keep.
      num_candidates: number of pairs that can be kept.
      gradient_evals: gradients that a window takes.
      loss_evals: losses that a window takes.
    """

    name: str
    propose: Callable[..., Proposals]
    unrolled: Callable[[Proposals], tuple[Pair, ...]]
    pairs: Callable[[Pair, Proposals, tuple[Pair, ...]], tuple[Pair, ...]]
    points: Callable[[Pair, Proposals, tuple[Run, ...]], tuple[Params, ...]]
    pick: Callable[[jax.Array], jax.Array]
    num_candidates: int
    gradient_evals: int
    loss_evals: int


def _propose_adapted_descent(
    adapted_loss: Callable, loss: Callable, start: Pair, rates: Pair
) -> Proposals:
    """SMG's fallback: a step along the gradient of the loss after T learned steps."""
    del loss
    (_, learned), gradients = jax.value_and_grad(adapted_loss, has_aux=True)(start)
    return Proposals(learned, _descend_pair(start, gradients, rates), jnp.array(False))


def _propose_best_descent(
    adapted_loss: Callable, loss: Callable, start: Pair, rates: Pair
) -> Proposals:
    """AMG's fallback: the plain gradient step unless T learned steps lower the loss."""
    end_loss, backward, learned = jax.vjp(adapted_loss, start, has_aux=True)
    used_gradient = ~(end_loss < loss(start.params))  # also where the loss at the end is NaN

    def plain_descent():
        gradient = jax.grad(loss)(start.params)
        return Pair(_descend(start.params, gradient, rates.params), start.theta)

    def adapted_descent():
        (gradients,) = backward(jnp.ones_like(end_loss))
        return _descend_pair(start, gradients, rates)

    fallback = jax.lax.cond(used_gradient, plain_descent, adapted_descent)
    return Proposals(learned, fallback, used_gradient)


def _descend_pair(start: Pair, gradients: Pair, rates: Pair) -> Pair:
    return Pair(
        params=_descend(start.params, gradients.params, rates.params),
        theta=_descend(start.theta, gradients.theta, rates.theta),
    )


def _descend(point: Params, gradient: Params, lr: float) -> Params:
    """Returns exactly what a step of `optax.sgd(lr)` does."""
    return optax.apply_updates(point, optax.tree.scale(-lr, gradient))


################################################################################
# The guard of a method
################################################################################


class Setup(NamedTuple):
    """A method and the user's options.

    Attributes:
      method: `smg` or `amg`.
      learned: see `smg`.
      n_t: see `smg`.
      n_c: see `smg`.
      rates: `lr_params` and `lr_theta` of `smg`.
      num_steps: see `smg`.
    """

    method: Method
    learned: LearnedOptimizer
    n_t: int
    n_c: int
    rates: Pair
    num_steps: Any

    @property
    def window(self) -> tuple[int, int]:
        """Training mini-batches B1, C and B2; validation ones V."""
        return 2 * self.n_t + 1, self.n_c

    def transformation(self, theta: Theta) -> optax.GradientTransformationExtraArgs:
        """Returns the learned optimizer with meta-parameters `theta`."""
        tx = self.learned.apply(theta, num_steps=self.num_steps)
        return inner_transformation(self.method.name, "learned", tx)

    def begin(self, pair: Pair) -> Run:
        """Starts a run of the learned optimizer from a pair."""
        memory = self.transformation(pair.theta).init(pair.params)
        return Run(pair.params, pair.theta, memory)

    def end(self, run: Run) -> Pair:
        """Ends a run: writes its memory back into theta."""
        return Pair(run.params, self.learned.absorb(run.theta, run.memory))


def _meta_guard(
    method: Method,
    learned: LearnedOptimizer,
    theta: Theta,
    *,
    n_t: int,
    n_c: int,
    lr_params: float,
    lr_theta: float,
    num_steps: Any,
) -> Guard:
    """Makes the guard of a `Method`; see `smg` for the arguments."""
    name = method.name
    check_sizes(name, n_t, n_c, least=(0, 1))
    if not isinstance(learned, LearnedOptimizer):
        raise ValueError(
            f"{name}: learned must be a LearnedOptimizer, whose theta can adapt, got {learned!r}."
        )
    check_float_tree(f"{name}: theta", theta)
    check_number(f"{name}: lr_params", lr_params, least=0)
    check_number(f"{name}: lr_theta", lr_theta, least=0)
    setup = Setup(
        method=method,
        learned=learned,
        n_t=n_t,
        n_c=n_c,
        rates=Pair(lr_params, lr_theta),
        num_steps=num_steps,
    )
    setup.transformation(theta)  # raises here, not in the first window, if theta does not fit

    return guard_of(_process(setup, theta))


def _decide(
    setup: Setup,
    state: MetaGuardState,
    params: Params,
    proposals: Proposals,
    runs: tuple[Run, ...],
    losses: Float[Array, "candidates C"],
) -> tuple[Params, MetaGuardState]:
    """Keeps one pair, given the validation losses of all candidates."""
    method, start = setup.method, Pair(params, state.theta)
    ends = tuple(setup.end(run) for run in runs)
    pairs = method.pairs(start, proposals, ends)
    points = method.points(start, proposals, runs)
    mask = jnp.ones(setup.n_c, bool)
    candidate_losses = []
    for pair, point, pair_losses in zip(pairs, points, losses, strict=True):
        broken = became_nonfinite(start.theta, pair.theta) | ~all_finite(pair.params)
        candidate_losses.append(jnp.where(broken, jnp.inf, score(pair_losses, mask, point)))
    mean_losses = jnp.stack(candidate_losses)
    is_finite = jnp.isfinite(mean_losses)
    # The proposals are the first candidates; the fourth of AMG is the starting pair.
    kept_start = ~jnp.any(is_finite[:3])
    winner = jnp.where(jnp.any(is_finite), method.pick(mean_losses), -1)
    kept = select(winner, pairs, start)
    info = record_decision(
        state.info,
        winner=winner,
        accepted=winner == 0,
        losses=mean_losses,
        kept_start=kept_start,
        gradient_evals=method.gradient_evals,
        loss_evals=method.loss_evals,
    )
    return kept.params, MetaGuardState(kept.theta, proposals.used_gradient, info)


################################################################################
# The phases of a window
################################################################################


class MetaWork(NamedTuple):
    """Intermediate values of a window in a stream.

    Attributes:
      start: the pair at the start of the window.
      run: the learned optimizer on B1.
      history: losses ``[T]`` and gradients ``[T, ...]`` that `run` saw. They are constants of the
        first-order gradient, which stays exact after the mini-batches themselves are gone.
      proposals: what `Method.propose` returned on C.
      runs: the unrolled pairs on B2.
      losses: validation losses ``[candidates, n_c]`` so far.
    """

    start: Pair
    run: Run
    history: tuple[jax.Array, Params]
    proposals: Proposals
    runs: tuple[Run, ...]
    losses: Float[Array, "candidates C"]


def _process(setup: Setup, theta: Theta) -> Process:
    method, n_t, n_c = setup.method, setup.n_t, setup.n_c
    num_rows = max(n_t, 1)  # an array without rows cannot be indexed
    dtype = jnp.result_type(float)

    def init(params, model_state):
        del params
        if model_state is not None:
            raise ValueError(
                f"{method.name}: takes no model state, since its gradient in theta goes through "
                "all steps of a window; use race or lgl2o."
            )
        state = MetaGuardState(
            theta=jax.tree.map(jnp.array, theta),  # a copy, so that the state can be donated
            used_gradient=jnp.array(False),
            info=init_info(method.num_candidates, *setup.window),
        )
        return state, None

    def start(state: MetaGuardState, work, params):
        del work
        pair = Pair(params, state.theta)
        run = setup.begin(pair)
        # Split over devices as the params are.
        zero_rows = lambda p: jnp.zeros_like(jnp.broadcast_to(p, (num_rows, *jnp.shape(p))))
        proposals = Proposals(pair, pair, jnp.array(False))
        return MetaWork(
            start=pair,
            run=run,
            history=(jnp.zeros(num_rows, dtype), jax.tree.map(zero_rows, params)),
            proposals=proposals,
            runs=tuple(run for _ in method.unrolled(proposals)),
            losses=jnp.zeros((method.num_candidates, n_c), dtype),
        )

    def advance(run: Run, losses: Losses) -> tuple[Run, Any]:
        tx = setup.transformation(run.theta)
        params, memory, value_and_grad = step(tx, run.params, run.memory, losses.at(None))
        return Run(params, run.theta, memory), value_and_grad

    def explore(state, work: MetaWork, index, losses: Losses):  # on B1
        del state
        run, value_and_grad = advance(work.run, losses)
        put = lambda rows, row: rows.at[index].set(row.astype(rows.dtype))
        return work._replace(run=run, history=jax.tree.map(put, work.history, value_and_grad))

    def propose(state, work: MetaWork, index, losses: Losses):  # on C
        del state, index
        value_fn = losses.at(None)
        history = jax.tree.map(lambda rows: rows[:n_t], work.history)

        def adapted_loss(pair):
            end = setup.end(_replay(setup, pair, history))
            return value_fn(end.params), end

        proposals = method.propose(adapted_loss, value_fn, work.start, setup.rates)
        runs = tuple(setup.begin(pair) for pair in method.unrolled(proposals))
        return work._replace(proposals=proposals, runs=runs)

    def evaluate(state, work: MetaWork, index, losses: Losses):  # on B2
        del state, index
        return work._replace(runs=tuple(advance(run, losses)[0] for run in work.runs))

    def validate(state, work: MetaWork, index, losses: Losses):  # on V
        del state
        points = method.points(work.start, work.proposals, work.runs)
        column = jnp.stack([jnp.mean(losses.judge(point, None)).astype(dtype) for point in points])
        return work._replace(losses=work.losses.at[:, index].set(column))

    def decide(state: MetaGuardState, work: MetaWork, params, lengths):
        del lengths
        return _decide(setup, state, params, work.proposals, work.runs, work.losses)

    def split(num_train: int, num_eval: int):
        check_lengths(method.name, (num_train, num_eval), setup.window)
        return lengths

    lengths = (n_t, 1, n_t, n_c)
    return Process(
        name=method.name,
        window=setup.window,
        init=init,
        start=start,
        phases=(explore, propose, evaluate, validate),
        lengths=lengths,
        split=split,
        decide=decide,
    )


def _replay(setup: Setup, pair: Pair, history: tuple[jax.Array, Params]) -> Run:
    """Repeats the run from `pair` over recorded losses ``[T]`` and gradients ``[T, ...]``."""
    run, tx = setup.begin(pair), setup.transformation(pair.theta)

    def body(carry, value_and_grad):
        (params, memory), (value, grad) = carry, value_and_grad
        updates, memory = tx.update(grad, memory, params, value=value, grad=grad)
        return (optax.apply_updates(params, updates), memory), None

    (params, memory), _ = jax.lax.scan(body, (run.params, run.memory), history)
    return Run(params, pair.theta, memory)
