"""The Meta Guards SMG and AMG: theta is part of the guard's state and adapts during the run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from metaopt.core.checks import check_number
from metaopt.core.rollouts import step_with_model_state
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
      model_state: model state that belongs to the params of the caller, or None.
      info: diagnostics. The candidates are (learned, fallback), and for `amg` then the fallback
        after T more steps and the starting pair.
    """

    theta: Theta
    used_gradient: Bool[Array, ""]
    model_state: Any
    info: GuardInfo


class Pair(NamedTuple):
    """What a Meta Guard optimizes.

    Attributes:
      params: weights of the optimizee.
      theta: meta-parameters of the learned optimizer.
    """

    params: Params
    theta: Theta


class Candidate(NamedTuple):
    """A pair, and what belongs to it.

    Attributes:
      pair: the pair.
      model_state: model state that belongs to its params, or None. No gradient goes through it.
    """

    pair: Pair
    model_state: Any


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
      2 n_c losses, and one more with a model state. The gradient in x and theta takes the losses
      and gradients that the learned optimizer saw, and the model state, as constants (first order;
      docs/guards/smg.md).

    Raises:
      ValueError: when an option is out of range; at `init`, when params are masked; at `update`,
        when `params` or `value_fn` is missing.

    References:
      Wang et al., *Continually Adapting Optimizers Improve Meta-Generalization* (Meta Guard),
      algorithm 1

      docs/guards/smg.md lists what the paper leaves open and what we chose.
    """
    method = Method(
        name="smg",
        propose=_propose_adapted_descent,
        unrolled=lambda proposals: (proposals.learned, proposals.fallback),
        candidates=lambda start, proposals, ends: (proposals.learned, proposals.fallback),
        judged=lambda start, proposals, ends: ends,
        pick=lambda losses: jnp.where(losses[0] > losses[1], 1, 0),
        num_candidates=2,
        gradient_evals=3 * n_t + 1,
        loss_evals=2 * n_c,
        for_model_state=1,
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
        candidates=_all_of_amg,
        judged=_all_of_amg,
        pick=jnp.argmin,  # the first of the lowest
        num_candidates=4,
        gradient_evals=2 * n_t + 1,
        loss_evals=4 * n_c + 2,
        for_model_state=0,  # AMG computes the loss at the start in any case
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
      learned: the candidate after T steps of the learned optimizer.
      fallback: the candidate after a gradient step. Its model state is that of the start, after the
        loss on C at the start.
      used_gradient: bool ``[]``, whether `fallback` is the plain gradient step in params.
    """

    learned: Candidate
    fallback: Candidate
    used_gradient: jax.Array


class Run(NamedTuple):
    """The learned optimizer during a run.

    Attributes:
      params: weights of the optimizee.
      theta: meta-parameters, which are fixed during the run.
      memory: state of the transformation ``learned.apply(theta)``.
      model_state: model state that belongs to `params`, or None.
    """

    params: Params
    theta: Theta
    memory: Any
    model_state: Any


class Method(NamedTuple):
    """The parts in which SMG and AMG differ.

    Attributes:
      name: name of the guard in error messages.
      propose: ``(adapted_loss, loss, start, rates) -> (learned, fallback, used_gradient)`` with
        pairs. Here ``adapted_loss(pair) -> (loss, pair)`` takes T steps and returns the loss on C
        and the pair after them, ``loss(params)`` is the loss on C without them, `start` is a pair,
        and `rates` is a `Pair` of step sizes.
      unrolled: ``Proposals -> candidates`` that take T further steps on B2.
      candidates: ``(start, Proposals, ends) -> candidates`` that can be kept; `ends` are the
        unrolled ones after their steps.
      judged: ``(start, Proposals, ends) -> candidates`` whose losses decide on each of them.
      pick: losses ``[candidates]``, finite or +inf -> index of the candidate to keep.
      num_candidates: number of candidates that can be kept.
      gradient_evals: gradients that a window takes.
      loss_evals: losses that a window takes.
      for_model_state: further ones with a model state.
    """

    name: str
    propose: Callable[..., tuple[Pair, Pair, jax.Array]]
    unrolled: Callable[[Proposals], tuple[Candidate, ...]]
    candidates: Callable[[Candidate, Proposals, tuple[Candidate, ...]], tuple[Candidate, ...]]
    judged: Callable[[Candidate, Proposals, tuple[Candidate, ...]], tuple[Candidate, ...]]
    pick: Callable[[jax.Array], jax.Array]
    num_candidates: int
    gradient_evals: int
    loss_evals: int
    for_model_state: int


def _propose_adapted_descent(
    adapted_loss: Callable, loss: Callable, start: Pair, rates: Pair
) -> tuple[Pair, Pair, jax.Array]:
    """SMG's fallback: a step along the gradient of the loss after T learned steps."""
    del loss
    (_, learned), gradients = jax.value_and_grad(adapted_loss, has_aux=True)(start)
    return learned, _descend_pair(start, gradients, rates), jnp.array(False)


def _propose_best_descent(
    adapted_loss: Callable, loss: Callable, start: Pair, rates: Pair
) -> tuple[Pair, Pair, jax.Array]:
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
    return learned, fallback, used_gradient


def _all_of_amg(
    start: Candidate, proposals: Proposals, ends: tuple[Candidate, ...]
) -> tuple[Candidate, ...]:
    """The four candidates of AMG, each of which is judged where it is."""
    return proposals.learned, proposals.fallback, ends[0], start


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

    def begin(self, candidate: Candidate) -> Run:
        """Starts a run of the learned optimizer from a candidate."""
        (params, theta), model_state = candidate
        return Run(params, theta, self.transformation(theta).init(params), model_state)

    def end(self, run: Run) -> Candidate:
        """Ends a run: writes its memory back into theta."""
        theta = self.learned.absorb(run.theta, run.memory)
        return Candidate(Pair(run.params, theta), run.model_state)


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
    """Keeps one candidate, given the validation losses of all of them."""
    method, has_model_state = setup.method, state.model_state is not None
    start = Candidate(Pair(params, state.theta), state.model_state)
    ends = tuple(setup.end(run) for run in runs)
    candidates = method.candidates(start, proposals, ends)
    judged = method.judged(start, proposals, ends)
    mask = jnp.ones(setup.n_c, bool)
    mean_losses = []
    for candidate, at, of_candidate in zip(candidates, judged, losses, strict=True):
        (candidate_params, theta), model_state = candidate
        broken = became_nonfinite(start.pair.theta, theta) | ~all_finite(
            candidate_params, model_state
        )
        mean = score(of_candidate, mask, at.pair.params)
        mean_losses.append(jnp.where(broken, jnp.inf, mean))
    mean_losses = jnp.stack(mean_losses)
    is_finite = jnp.isfinite(mean_losses)
    # The proposals are the first candidates; the fourth of AMG is the start.
    kept_start = ~jnp.any(is_finite[:3])
    winner = jnp.where(jnp.any(is_finite), method.pick(mean_losses), -1)
    kept = select(winner, candidates, start)
    info = record_decision(
        state.info,
        winner=winner,
        accepted=winner == 0,
        losses=mean_losses,
        kept_start=kept_start,
        gradient_evals=method.gradient_evals,
        loss_evals=method.loss_evals + (method.for_model_state if has_model_state else 0),
    )
    return kept.pair.params, MetaGuardState(
        theta=kept.pair.theta,
        used_gradient=proposals.used_gradient,
        model_state=kept.model_state,
        info=info,
    )


################################################################################
# The phases of a window
################################################################################


class MetaWork(NamedTuple):
    """Intermediate values of a window in a stream.

    Attributes:
      start: the candidate at the start of the window.
      run: the learned optimizer on B1.
      history: losses ``[T]`` and gradients ``[T, ...]`` that `run` saw. They are constants of the
        first-order gradient, which stays exact after the mini-batches themselves are gone.
      proposals: the learned candidate and the fallback.
      runs: the unrolled candidates on B2.
      losses: validation losses ``[candidates, n_c]`` so far.
    """

    start: Candidate
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
        copy = lambda tree: jax.tree.map(jnp.array, tree)  # so that the state can be donated
        state = MetaGuardState(
            theta=copy(theta),
            used_gradient=jnp.array(False),
            model_state=copy(model_state),
            info=init_info(method.num_candidates, *setup.window),
        )
        return state, None

    def start(state: MetaGuardState, work, params):
        del work
        candidate = Candidate(Pair(params, state.theta), state.model_state)
        run = setup.begin(candidate)
        # Split over devices as the params are.
        zero_rows = lambda p: jnp.zeros_like(jnp.broadcast_to(p, (num_rows, *jnp.shape(p))))
        proposals = Proposals(candidate, candidate, jnp.array(False))
        return MetaWork(
            start=candidate,
            run=run,
            history=(jnp.zeros(num_rows, dtype), jax.tree.map(zero_rows, params)),
            proposals=proposals,
            runs=tuple(run for _ in method.unrolled(proposals)),
            losses=jnp.zeros((method.num_candidates, n_c), dtype),
        )

    def advance(run: Run, losses: Losses) -> tuple[Run, Any]:
        params, memory, model_state, value_and_grad = step_with_model_state(
            setup.transformation(run.theta), run.params, run.memory, run.model_state, losses.train
        )
        return Run(params, run.theta, memory, model_state), value_and_grad

    def explore(state, work: MetaWork, index, losses: Losses):  # on B1
        del state
        run, value_and_grad = advance(work.run, losses)
        put = lambda rows, row: rows.at[index].set(row.astype(rows.dtype))
        return work._replace(run=run, history=jax.tree.map(put, work.history, value_and_grad))

    def propose(state, work: MetaWork, index, losses: Losses):  # on C
        del state, index
        history = jax.tree.map(lambda rows: rows[:n_t], work.history)
        start, explored = work.start, work.run.model_state

        def adapted_loss(pair):
            end = setup.end(_replay(setup, pair, history))
            return losses.at(explored)(end.pair.params), end.pair

        learned, fallback, used_gradient = method.propose(
            adapted_loss, losses.at(start.model_state), start.pair, setup.rates
        )
        model_state = start.model_state
        if model_state is not None:
            _, model_state = losses.train(start.pair.params, model_state)
        proposals = Proposals(
            learned=Candidate(learned, explored),
            fallback=Candidate(fallback, model_state),
            used_gradient=used_gradient,
        )
        runs = tuple(setup.begin(candidate) for candidate in method.unrolled(proposals))
        return work._replace(proposals=proposals, runs=runs)

    def evaluate(state, work: MetaWork, index, losses: Losses):  # on B2
        del state, index
        return work._replace(runs=tuple(advance(run, losses)[0] for run in work.runs))

    def validate(state, work: MetaWork, index, losses: Losses):  # on V
        del state
        ends = tuple(setup.end(run) for run in work.runs)
        judged = method.judged(work.start, work.proposals, ends)
        means = [jnp.mean(losses.judge(at.pair.params, at.model_state)) for at in judged]
        column = jnp.stack([mean.astype(dtype) for mean in means])
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
        model_state=lambda state, work: state.model_state,
    )


def _replay(setup: Setup, pair: Pair, history: tuple[jax.Array, Params]) -> Run:
    """Repeats the run from `pair` over recorded losses ``[T]`` and gradients ``[T, ...]``."""
    run, tx = setup.begin(Candidate(pair, None)), setup.transformation(pair.theta)

    def body(carry, value_and_grad):
        (params, memory), (value, grad) = carry, value_and_grad
        updates, memory = tx.update(grad, memory, params, value=value, grad=grad)
        return (optax.apply_updates(params, updates), memory), None

    (params, memory), _ = jax.lax.scan(body, (run.params, run.memory), history)
    return Run(params, pair.theta, memory, None)
