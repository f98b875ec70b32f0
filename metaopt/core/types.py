"""The types that every part of the library meets in; this module imports nothing of metaopt."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import optax
from jaxtyping import PRNGKeyArray

Key: TypeAlias = PRNGKeyArray
Params: TypeAlias = Any  # what an optimizer changes (the optimizee's weights)
Theta: TypeAlias = Any  # what meta-training changes (a learned optimizer's weights)
Batch: TypeAlias = Any
LossFn: TypeAlias = Callable[[Params, Batch], jax.Array]
Split: TypeAlias = Literal["train", "valid", "test"]

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """optax's own constructor, without its wish that updates need no keyword arguments."""
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def identity_absorb(theta: Theta, state: Any) -> Theta:
    """The `absorb` of an optimizer that has no memory to write back."""
    del state
    return theta


class LearnedOptimizer(NamedTuple):
    """A family of optax transformations indexed by meta-parameters theta; all functions are pure.

    Attributes:
      init: ``(key, params) -> theta``. Sees `params` for its structure only.
      apply: ``(theta, *, num_steps=None) -> optax.GradientTransformationExtraArgs``. A closure:
        `num_steps`, the horizon K of the run, may be a traced integer. Optimizers that do not
        use it ignore it; those that need it raise `ValueError` when it is missing.
      absorb: ``(theta, state) -> theta``. Writes the final memory of a run back into theta, so
        that a next run starts from it (the Meta Guards need this). Without memory: theta itself.
    """

    init: Callable[[Key, Params], Theta]
    apply: Callable[..., optax.GradientTransformationExtraArgs]
    absorb: Callable[[Theta, Any], Theta] = identity_absorb


class Task(NamedTuple):
    """One optimization problem; all functions are pure.

    Attributes:
      init: ``key -> params``.
      loss: ``(params, batch) -> scalar``.
      sample: ``(key, leading_shape, split="train") -> batches`` with axes ``[*leading_shape, ...]``
        in front of each array of a batch.
      whole: ``(split="test") -> batch``, all that is held for a split as one batch (of a noisy
        problem: its noiseless batch).
      accuracy: ``(params, batch) -> scalar in [0, 1]``, or None where there is no such thing.
    """

    init: Callable[[Key], Params]
    loss: LossFn
    sample: Callable[..., Batch]
    whole: Callable[..., Batch]
    accuracy: Callable[[Params, Batch], jax.Array] | None = None


class TaskFamily(NamedTuple):
    """A distribution of tasks of one structure, so that a meta-batch of them is one `vmap`.

    Attributes:
      sample: ``key -> task_params``, a pytree of arrays whose shapes do not depend on the key.
      task: ``task_params -> Task``.
    """

    sample: Callable[[Key], Any]
    task: Callable[[Any], Task]


class _Always(NamedTuple):
    """The constant function; equal values make equal functions, and so one compiled program."""

    value: Any

    def __call__(self, argument):
        del argument
        return self.value


def single(task: Task) -> TaskFamily:
    """The distribution that always gives `task` (its `init` and batches still vary with keys)."""
    return TaskFamily(sample=_Always(()), task=_Always(task))
