"""Random changes of the scale of params: one task becomes tasks of many step sizes."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from metaopt.core.checks import check_choice, check_number
from metaopt.core.types import Batch, Key, Params, Split, Task, TaskFamily, single

Level: TypeAlias = Literal["global", "tensor", "parameter"]


def reparametrised(
    task: Task | TaskFamily, *, low: float = 1e-3, high: float = 1e3, level: Level = "global"
) -> TaskFamily:
    r"""The tasks of `task` in params of random scale, for meta-training that is to generalise.

    With a random scale s the params are those of the task divided by s, and the loss multiplies
    them by s again:

    .. math:: \tilde w_0 = w_0 / s, \qquad \tilde f(\tilde w) = f(s \tilde w), \qquad
       \nabla \tilde f = s \nabla f

    The function is the same, but the best step is 1/s times as long. s is log-uniform in
    ``[low, high]``, and drawn for each run.

    Args:
      task: a task or a distribution of tasks.
      low: smallest scale.
      high: largest scale.
      level: whether one s holds for all params ("global"), one for each leaf ("tensor"), or one
        for each number ("parameter").

    Raises:
      ValueError: a number is not positive, `low` is above `high`, or `level` is unknown.

    References:
      Moudgil et al., [Celo](https://arxiv.org/abs/2501.12670), 2025
    """
    check_number("reparametrised: low", low, above=0)
    check_number("reparametrised: high", high, least=low)
    check_choice("reparametrised: level", level, ("global", "tensor", "parameter"))
    family = task if isinstance(task, TaskFamily) else single(task)

    def draw_scales(key: Key, params: Params) -> Params:
        """A tree like `params` of arrays that can be multiplied with its leaves."""
        leaves, structure = jax.tree.flatten(params)
        keys = [key] * len(leaves) if level == "global" else jax.random.split(key, len(leaves))
        shapes = [leaf.shape if level == "parameter" else () for leaf in leaves]
        logs = [
            jax.random.uniform(k, shape, minval=jnp.log(low), maxval=jnp.log(high))
            for k, shape in zip(keys, shapes, strict=True)
        ]
        return jax.tree.unflatten(structure, [jnp.exp(log) for log in logs])

    def sample_task(family: TaskFamily, key: Key) -> Any:
        k_task, k_scales = jax.random.split(key)
        chosen = family.sample(k_task)
        params = jax.eval_shape(lambda: family.task(chosen).init(key))
        return {"task": chosen, "scales": draw_scales(k_scales, params)}

    def make_task(family: TaskFamily, task_params: Any) -> Task:
        inner, scales = family.task(task_params["task"]), task_params["scales"]

        def multiplied(params: Params) -> Params:
            return jax.tree.map(lambda s, w: (s * w).astype(w.dtype), scales, params)

        def at_scale(function: Any) -> Any:
            return lambda params, *arguments: function(multiplied(params), *arguments)

        def init(key: Key) -> Params:
            return jax.tree.map(lambda s, w: (w / s).astype(w.dtype), scales, inner.init(key))

        def sample(key: Key, shape: tuple[int, ...], split: Split = "train") -> Batch:
            return inner.sample(key, shape, split)

        stateful = inner.init_model_state_fn is not None
        return Task(
            init=init,
            loss=at_scale(inner.loss),
            sample=sample,
            whole=inner.whole,
            accuracy=inner.accuracy and at_scale(inner.accuracy),
            init_model_state=inner.init_model_state if stateful else None,
            eval_loss=at_scale(inner.eval_loss),
        )

    return TaskFamily(sample_task, make_task, data=family)
