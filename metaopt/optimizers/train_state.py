"""Flax's TrainState for optimizers that need the loss."""

from typing import Any

import jax
import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """A `flax.training.train_state.TrainState` that passes the loss to the optimizer.

    Flax's own class gives an optimizer gradients and params only. L3RS and VeLO also need the
    loss: ``state.apply_gradients(grads=grads, value=loss)``.
    """

    def apply_gradients(
        self, *, grads: Any, value: jax.Array | None = None, **kwargs: Any
    ) -> "TrainState":
        """Takes one step.

        Args:
          grads: gradients, like `params`.
          value: the loss at the current params, scalar; passed to the optimizer as `value`.
          **kwargs: other fields of the state to replace.

        Returns:
          The state after the step.
        """
        extra_args = {} if value is None else {"value": value}
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, **extra_args)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
