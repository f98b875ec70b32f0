"""Linen modules as the functions of a task: with or without a model state, dropout and modes."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError

from metaopt.core.types import Batch, Key, Params, Task
from metaopt.tasks.scores import negative_log_likelihood, scores

TRAIN = "train"  # the argument of a module's `__call__` that tells the mode
KEY = "key"  # where a mini-batch holds the key of a random module, such as one with dropout


class Classifier(NamedTuple):
    """The functions of a network that returns logits; they hold no arrays.

    A batch holds inputs "x", labels "y" and, where `is_random`, a "key".

    Attributes:
      init: ``(key, x) -> params``.
      loss: ``(params, batch) -> loss``; with a model state
        ``(params, model_state, batch) -> (loss, model_state)``.
      accuracy: ``(params, batch)`` or ``(params, model_state, batch) -> accuracy``.
      eval_loss: the loss in evaluation mode, with the arguments of `accuracy`; None: `loss`.
      init_model_state: ``(key, x) -> model_state``; None: the network has none.
      is_random: whether the loss draws random numbers.
    """

    init: Callable[..., Params]
    loss: Callable[..., Any]
    accuracy: Callable[..., jax.Array]
    eval_loss: Callable[..., jax.Array] | None = None
    init_model_state: Callable[..., Any] | None = None
    is_random: bool = False

    def with_keys(self, batches: Batch, key: Key, shape: tuple[int, ...]) -> Batch:
        """Mini-batches ``[*shape, ...]``, with a key for each if the loss is random."""
        if not self.is_random:
            return batches
        return {**batches, KEY: jax.random.split(jax.random.fold_in(key, 1), shape)}

    def task(
        self,
        example: Callable[[Any], Any],
        sample: Callable[..., Batch],
        whole: Callable[..., Batch],
        *,
        data: Any,
    ) -> Task:
        """The task on `data`, of which `example` returns the inputs of one example."""

        def without_data(function: Any) -> Any:
            return function and (lambda data, *arguments: function(*arguments))

        def on_example(function: Any) -> Any:
            return function and (lambda data, key: function(key, example(data)))

        return Task(
            init=on_example(self.init),
            loss=without_data(self.loss),
            sample=sample,
            whole=whole,
            accuracy=without_data(self.accuracy),
            init_model_state=on_example(self.init_model_state),
            eval_loss=without_data(self.eval_loss),
            data=data,
        )


def classifier(
    where: str,
    net: nn.Module,
    example: Any,
    prepare: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Classifier:
    """The functions of `net`, mean negative log-likelihoods of its logits.

    A module whose ``__call__`` has an argument `train` is called with ``train=True`` in the loss,
    and with ``train=False`` at initialisation and in evaluation. All its collections besides
    "params", such as BatchNorm's "batch_stats", are the model state. It may draw random numbers
    while it is trained, as dropout does; the key is that of the mini-batch.

    Args:
      where: the caller's name in messages.
      net: the module, ``x -> logits [..., classes]``.
      example: inputs of the shape and dtype of one example, ``[1, ...]``; an array or a
        `jax.ShapeDtypeStruct`.
      prepare: applied to inputs before the network.

    Raises:
      ValueError: at `init`, when a module without an argument `train` has a state.
    """
    if TRAIN not in inspect.signature(net.__call__).parameters:
        return _plain(where, net, prepare)

    def fresh(key: Key, x: jax.Array) -> tuple[Params, Any]:
        params, model_state = _split(net.init(key, prepare(x), train=False))
        return params, model_state or None

    def logits(params: Params, *model_state_and_x: Any) -> Any:
        *model_state, x = model_state_and_x
        variables = {"params": params, **(model_state[0] if model_state else {})}
        return net.apply(variables, prepare(x), train=False)

    def forward(params: Params, model_state: Any, x: Any, key: Key | None = None) -> Any:
        """Logits in training mode, and the collections that have changed."""
        variables = {"params": params, **(model_state or {})}
        rngs = None if key is None else {"params": key}  # Flax: the default of all streams
        mutable = list(model_state or {})
        return net.apply(variables, prepare(x), train=True, mutable=mutable, rngs=rngs)

    def train(params: Params, model_state: Any, batch: Batch) -> tuple[jax.Array, Any]:
        outputs, changed = forward(params, model_state, batch["x"], batch.get(KEY))
        loss = jnp.mean(negative_log_likelihood(outputs, batch["y"]))
        return loss, None if model_state is None else {**model_state, **changed}

    def train_without_state(params: Params, batch: Batch) -> jax.Array:
        return train(params, None, batch)[0]

    params, model_state = jax.eval_shape(fresh, jax.random.key(0), example)
    eval_loss, accuracy = scores(logits)
    stateful = model_state is not None
    return Classifier(
        init=lambda key, x: fresh(key, x)[0],
        loss=train if stateful else train_without_state,
        accuracy=accuracy,
        eval_loss=eval_loss,
        init_model_state=(lambda key, x: fresh(key, x)[1]) if stateful else None,
        is_random=_asks_for_a_key(forward, params, model_state, example),
    )


def _plain(where: str, net: nn.Module, prepare: Callable[[jax.Array], jax.Array]) -> Classifier:
    """The functions of a module with one mode."""

    def init(key: Key, x: jax.Array) -> Params:
        params, model_state = _split(net.init(key, prepare(x)))
        if model_state:
            raise ValueError(
                f"{where}: net keeps {', '.join(model_state)} besides its params; give its "
                "__call__ an argument `train`, True while it is trained and False in evaluation."
            )
        return params

    loss, accuracy = scores(lambda params, x: net.apply({"params": params}, prepare(x)))
    return Classifier(init=init, loss=loss, accuracy=accuracy)


def _split(variables: Any) -> tuple[Params, dict[str, Any]]:
    """Params, and all other collections."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return variables.get("params", {}), others


def _asks_for_a_key(forward: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a network draws random numbers; it is traced, not computed."""
    try:
        jax.eval_shape(forward, *arguments)
    except InvalidRngError:
        return True
    return False
