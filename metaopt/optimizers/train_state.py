"""Flax's TrainState for optimizers that need the loss, and for guards."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax.training import train_state

from metaopt.core.types import with_extra_args


class TrainState(train_state.TrainState):
    """A `flax.training.train_state.TrainState` that passes the loss to the optimizer.

    Flax's own class gives an optimizer gradients and params only. L3RS and VeLO also need the
    loss: ``state.apply_gradients(grads=grads, value=loss)``. A guard needs the loss as a function
    instead: ``state.apply_gradients(grads=None, value_fn=value_fn)``.
    """

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable,
        params: Any,
        tx: optax.GradientTransformation,
        model_state: Any = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Creates the state of a run.

        Args:
          apply_fn: usually ``model.apply``.
          params: params of the model.
          tx: the optimizer, or a guard.
          model_state: for a guard, the model state, such as the running statistics of BatchNorm.
            It becomes part of `opt_state`; ``metaopt.guards.model_state(state.opt_state)`` reads
            the one that belongs to `params`.
          **kwargs: fields of a subclass.

        Returns:
          The state before the first step.
        """
        if model_state is None:
            return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        init: Any = tx.init
        init_fn = lambda params: init(params, model_state)
        with_model_state = optax.GradientTransformation(init_fn, tx.update)
        state = super().create(apply_fn=apply_fn, params=params, tx=with_model_state, **kwargs)
        return state.replace(tx=tx)

    def apply_gradients(
        self,
        *,
        grads: Any,
        value: jax.Array | None = None,
        value_fn: Callable | None = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Takes one step.

        Args:
          grads: gradients, like `params`; None for a guard, which computes its own.
          value: the loss at the current params, scalar; passed to the optimizer as `value`.
          value_fn: ``params -> loss`` on this mini-batch, passed to the optimizer as `value_fn`;
            ``(params, model_state) -> (loss, new_model_state)`` for a guard with a model state.
          **kwargs: other fields of the state to replace.

        Returns:
          The state after the step.
        """
        given = {"value": value, "value_fn": value_fn}
        extra_args = {name: arg for name, arg in given.items() if arg is not None}
        tx = with_extra_args(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra_args)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
