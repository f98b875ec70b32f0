"""The types that every part of the library meets in.

`Task`, `TaskFamily` and `metaopt.meta.MetaTrainer` are pytrees: their leaves are the arrays that
their functions work on, and the functions are static. They are arguments of jitted programs, so
that a data set is neither compiled into a program nor copied.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jaxtyping
import optax
from jaxtyping import PRNGKeyArray, UInt32

Key: TypeAlias = PRNGKeyArray
Keys: TypeAlias = jaxtyping.Key[jax.Array, "..."] | UInt32[jax.Array, "..."]  # several, any shape
Params: TypeAlias = Any  # what an optimizer changes (the optimizee's weights)
Theta: TypeAlias = Any  # what meta-training changes (a learned optimizer's weights)
Batch: TypeAlias = Any
Split: TypeAlias = Literal["train", "valid", "test"]

T = TypeVar("T")

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def transformation(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """optax's constructor for functions whose types its protocols do not accept.

    `optax.GradientTransformationExtraArgs` declares an update without required keyword arguments.
    """
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.with_extra_args_support`, which drops the extra args of `optax.MultiSteps`."""
    if isinstance(tx, optax.MultiSteps):
        tx = transformation(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


class HoldsModelState(optax.GradientTransformationExtraArgs):
    """A transformation whose state holds a model state too, if `init` is given one.

    ``init(params, model_state=None)``. The state has a field `model_state`: the one that belongs to
    the params of the caller, or None.
    """

    init: Callable[..., Any]  # type: ignore  # optax's takes no model state


class WindowForm(HoldsModelState):
    """A transformation whose `update` takes a window of mini-batches.

    ``update(None, state, params, *, loss_fn, train_batches, eval_batches=None)``.
    """

    update: Callable[..., tuple[Any, Any]]  # type: ignore  # optax's wants gradients, not None


def window_form(init_fn: Callable[..., Any], update_fn: Callable[..., Any]) -> WindowForm:
    """`WindowForm`, for functions whose types optax's protocols do not accept."""
    make: Any = WindowForm
    return make(init_fn, update_fn)


def identity_absorb(theta: Theta, state: Any) -> Theta:
    """The `absorb` of an optimizer without memory: returns `theta`."""
    del state
    return theta


class LearnedOptimizer(NamedTuple):
    """A family of optax transformations indexed by meta-parameters theta; all functions are pure.

    Attributes:
      init: ``(key, params) -> theta``. Uses the structure of `params` only.
      apply: ``(theta, *, num_steps=None) -> optax.GradientTransformationExtraArgs``. A closure:
        `num_steps`, the horizon K of the run, may be a traced integer. Optimizers that do not
        use it ignore it; those that need it raise `ValueError` when it is missing.
      absorb: ``(theta, state) -> theta``. Writes the final memory of a run back into theta, so
        that the next run starts from it (the Meta Guards need this). Without memory: theta itself.
    """

    init: Callable[[Key, Params], Theta]
    apply: Callable[..., optax.GradientTransformationExtraArgs]
    absorb: Callable[[Theta, Any], Theta] = identity_absorb


def functions_with_data(*names: str) -> Callable[[type[T]], type[T]]:
    """Registers a class as a pytree whose leaves are `data` and whose functions are static.

    Two objects have one tree structure if their functions are the same objects. Programs that take
    such an object as an argument are then compiled once for both.

    Args:
      *names: attributes that hold the functions.
    """

    def register(cls: type[T]) -> type[T]:
        def flatten_with_keys(obj):
            functions = tuple(getattr(obj, name) for name in names)
            return ((jax.tree_util.GetAttrKey("data"), obj.data),), functions

        def unflatten(functions, children):
            obj: Any = object.__new__(cls)  # leaves may be placeholders: no checks here
            for name, function in zip(names, functions, strict=True):
                setattr(obj, name, function)
            (obj.data,) = children
            return obj

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
        return cls

    return register


def with_data(function: Callable[..., Any], data: Any) -> Callable[..., Any]:
    """`function` with `data` as its first argument, or `function` itself where `data` is None."""
    return function if data is None else partial(function, data)


def loss_arguments(params: Params, model_state: Any) -> tuple[Any, ...]:
    """The arguments of a loss in front of the mini-batch: params, and the model state if any."""
    return (params,) if model_state is None else (params, model_state)


@functions_with_data(
    "init_fn",
    "loss_fn",
    "sample_fn",
    "whole_fn",
    "accuracy_fn",
    "init_model_state_fn",
    "eval_loss_fn",
)
class Task:
    """One optimization problem: pure functions, and the arrays that they work on.

    A task is a pytree. Its leaves are the arrays of `data`; its functions are static. Jitted
    programs take it as an argument, and it can be placed on a mesh with `jax.device_put`.

    A task may have a model state, such as the running statistics of BatchNorm: a pytree of arrays
    that training changes beside the params. The loss takes it and returns the next one. Held-out
    losses and accuracies are computed in evaluation mode, with the model state of the params.

    Attributes:
      data: a pytree of arrays, or None.
    """

    def __init__(
        self,
        init: Callable[..., Params],
        loss: Callable[..., Any],
        sample: Callable[..., Batch],
        whole: Callable[..., Batch],
        accuracy: Callable[..., jax.Array] | None = None,
        *,
        init_model_state: Callable[..., Any] | None = None,
        eval_loss: Callable[..., jax.Array] | None = None,
        data: Any = None,
    ):
        """Makes a task of its functions.

        With `data`, every function takes it as an additional first argument. Without it, functions
        that close over arrays work as well; `jax.jit` then compiles these arrays into each program.

        Args:
          init: ``key -> params``.
          loss: ``(params, batch) -> scalar``; of a task with a model state
            ``(params, model_state, batch) -> (scalar, model_state)``.
          sample: ``(key, leading_shape, split="train") -> batches`` with axes
            ``[*leading_shape, ...]`` in front of each array of a batch.
          whole: ``(split="test") -> batch``: all examples of a split as one batch (of a noisy
            problem: its noiseless batch).
          accuracy: ``(params, batch) -> scalar in [0, 1]``, in evaluation mode, or None where it is
            undefined; of a task with a model state ``(params, model_state, batch) -> scalar``.
          init_model_state: ``key -> model_state``, the model state of ``init(key)``; None: the task
            has no model state.
          eval_loss: the loss in evaluation mode, by which params are judged, with the arguments of
            `accuracy`. A task with a model state needs it. None: `loss` itself.
          data: arrays that the functions work on.

        Raises:
          ValueError: `init_model_state` is given without `eval_loss`.
        """
        if init_model_state is not None and eval_loss is None:
            raise ValueError(
                "Task: init_model_state is given without eval_loss; add "
                "eval_loss=(params, model_state, batch) -> scalar, the loss in evaluation mode."
            )
        self.init_fn = init
        self.loss_fn = loss
        self.sample_fn = sample
        self.whole_fn = whole
        self.accuracy_fn = accuracy
        self.init_model_state_fn = init_model_state
        self.eval_loss_fn = eval_loss
        self.data = data

    def replace(self, **changes: Any) -> "Task":
        """A task with other functions or other data; arguments as for the constructor.

        Examples:
          >>> task = metaopt.tasks.quadratic(2)
          >>> twice = task.replace(loss=lambda params, batch: 2 * task.loss(params, batch))
        """
        arguments = {
            "init": self.init_fn,
            "loss": self.loss_fn,
            "sample": self.sample_fn,
            "whole": self.whole_fn,
            "accuracy": self.accuracy_fn,
            "init_model_state": self.init_model_state_fn,
            "eval_loss": self.eval_loss_fn,
            "data": self.data,
        }
        return Task(**{**arguments, **changes})

    def init(self, key: Key) -> Params:
        """Initial params."""
        return with_data(self.init_fn, self.data)(key)

    def init_model_state(self, key: Key) -> Any:
        """The model state of the params ``init(key)``; None if the task has no model state."""
        if self.init_model_state_fn is None:
            return None
        return with_data(self.init_model_state_fn, self.data)(key)

    def loss(self, *point_and_batch: Any) -> Any:
        """The loss that is trained: ``loss(params, batch)``, a scalar.

        With a model state ``loss(params, model_state, batch)``: a scalar, and the next model state.
        """
        self._check_arguments("loss", point_and_batch)
        return with_data(self.loss_fn, self.data)(*point_and_batch)

    def eval_loss(self, *point_and_batch: Any) -> jax.Array:
        """The loss in evaluation mode, a scalar: ``eval_loss(params, batch)``.

        With a model state ``eval_loss(params, model_state, batch)``.
        """
        self._check_arguments("eval_loss", point_and_batch)
        function = self.loss_fn if self.eval_loss_fn is None else self.eval_loss_fn
        return with_data(function, self.data)(*point_and_batch)

    def _check_arguments(self, name: str, given: tuple[Any, ...]) -> None:
        stateful = self.init_model_state_fn is not None
        if len(given) == 2 + stateful:
            return
        if stateful:
            raise ValueError(
                f"Task.{name}: this task has a model state; call {name}(params, model_state, batch)"
                ", and metaopt.unroll with the state "
                "metaopt.init_state(tx, params, task.init_model_state(key))."
            )
        raise ValueError(
            f"Task.{name}: takes (params, batch), got {len(given)} arguments; a task with a model "
            "state is made with Task(..., init_model_state=..., eval_loss=...)."
        )

    def sample(self, key: Key, shape: tuple[int, ...], split: Split = "train") -> Batch:
        """Random mini-batches of `split`, with leading axes `shape`."""
        return with_data(self.sample_fn, self.data)(key, shape, split)

    def whole(self, split: Split = "test") -> Batch:
        """All examples of `split` as one batch."""
        return with_data(self.whole_fn, self.data)(split)

    @property
    def accuracy(self) -> Callable[..., jax.Array] | None:
        """``(params, batch) -> scalar in [0, 1]``, or None where it is undefined.

        With a model state ``(params, model_state, batch) -> scalar``.
        """
        return None if self.accuracy_fn is None else with_data(self.accuracy_fn, self.data)


@functions_with_data("sample_fn", "task_fn")
class TaskFamily:
    """A distribution of tasks of one structure, so that a meta-batch of them is one `vmap`.

    A family is a pytree, as `Task` is. Its `data` is shared by all of its tasks and has no axis of
    tasks under `vmap`.

    Attributes:
      data: a pytree of arrays, or None.
    """

    def __init__(
        self,
        sample: Callable[..., Any],
        task: Callable[..., Task],
        *,
        data: Any = None,
    ):
        """Makes a family of its functions.

        With `data`, both functions take it as an additional first argument.

        Args:
          sample: ``key -> task_params``, a pytree of arrays whose shapes do not depend on the key.
          task: ``task_params -> Task``.
          data: arrays that the tasks share.
        """
        self.sample_fn = sample
        self.task_fn = task
        self.data = data

    def sample(self, key: Key) -> Any:
        """Random task params."""
        return with_data(self.sample_fn, self.data)(key)

    def task(self, task_params: Any) -> Task:
        """The task that `task_params` describe."""
        return with_data(self.task_fn, self.data)(task_params)


# One or several distributions of tasks; a task stands for the one that always gives it.
Families: TypeAlias = Task | TaskFamily | Sequence[Task | TaskFamily]


def single(task: Task) -> TaskFamily:
    """The distribution that always gives `task` (its params and batches still vary with keys)."""
    return TaskFamily(sample=_no_task_params, task=_task_itself, data=task)


def _no_task_params(task: Task, key: Key) -> tuple[()]:
    del task, key
    return ()


def _task_itself(task: Task, task_params: tuple[()]) -> Task:
    del task_params
    return task
