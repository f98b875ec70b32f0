"""Theta with which L3RS takes the steps of one of its base optimizers, at given learning rates."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.checks import check_choice, check_number, show
from metaopt.core.types import Theta
from metaopt.optimizers.features import absolute_time, relative_time
from metaopt.optimizers.l3rs import L3RS, TIME_POINTS, TIME_SCALES, ema_decays

Schedule = Literal["constant", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
TYPICAL_HORIZON, TYPICAL_NORM = 100, 10.0  # at which powers change nothing


def imitate(
    settings: L3RS,
    theta: Theta,
    *,
    base: str,
    lr: float | Mapping[str, float],
    schedule: Schedule = "constant",
    share: float = 0.95,
    horizon_power: float = 0.0,
    norm_power: float = 1.0,
    constants: Mapping[str, float] | None = None,
) -> Theta:
    r"""Changes theta so that L3RS takes the steps of a base optimizer, until it is trained further.

    The step norm of a layer becomes
    :math:`\lambda = \eta \, s(t) \, (K / 100)^a \, (\|d\|_2 / 10)^{b - 1} \, \|d\|_2`, where
    :math:`\eta` is the learning rate, s the schedule, K the horizon and d the direction of the base
    optimizer. :math:`\log \lambda` is linear in inputs of the network (:math:`\log \|d\|_2` is
    one), except for :math:`\log s` and :math:`\log K`, which sums of time features approximate, the
    latter for horizons between 10 and 10,000. The first two units of each hidden layer hold its
    positive and its negative part. All other units stay as they are, and do not act on the outputs.

    Args:
      settings: of the L3RS; variant "embedding", "none" or "per_layer", with at least two units in
        each hidden layer.
      theta: its meta-parameters, as of `LearnedOptimizer.init`.
      base: name of one of its base optimizers.
      lr: of all layers, or of each layer by its name; not for variant "none", which
        cannot tell layers apart.
      schedule: of the learning rate, over the run.
      share: weight alpha of the base optimizer; the others share the rest equally. They would get
        no meta-gradient at 0.
      horizon_power: a. The best learning rate falls with the horizon: in theory, and nearly so in
        practice, with its root (Schaipp et al., [The Surprising Agreement Between Convex
        Optimization Theory and Learning-Rate Scheduling](https://arxiv.org/abs/2501.18965), 2025).
      norm_power: b. Below 1, large layers have lower learning rates than small ones.
      constants: of the base optimizer, by their names in theta; the others stay as they are.

    Returns:
      The new theta.

    Raises:
      ValueError: when an argument is out of range or unknown, or theta has no such layer.
    """
    check_choice("imitate: base", base, settings.base)
    check_choice("imitate: schedule", schedule, SCHEDULES)
    check_number("imitate: share", share, above=0, below=1)
    check_number("imitate: horizon_power", horizon_power)
    check_number("imitate: norm_power", norm_power)
    if settings.variant == "global":
        raise ValueError(
            'imitate: an L3RS of variant "global" has one step norm for all layers, but a base '
            "optimizer has one for each; take another variant."
        )
    if any(units < 2 for units in settings.hidden):
        raise ValueError(
            f"imitate: each hidden layer needs at least 2 units, got hidden={settings.hidden}."
        )
    theta = _with_constants(theta, base, constants or {})
    rates = _rates(settings, theta, lr)
    index, number = settings.base.index(base), len(settings.base)
    groups = 3 * len(ema_decays(settings.ema))  # averages of the loss and of the layer's two norms
    times = groups // 3 + np.arange(len(TIME_POINTS))
    lengths = times[-1] + 1 + np.arange(len(TIME_SCALES))
    direction = groups + len(TIME_POINTS) + len(TIME_SCALES) + index

    weights = np.zeros(groups + len(TIME_POINTS) + len(TIME_SCALES) + number)
    weights[direction] = norm_power
    bias = (1 - norm_power) * np.log(TYPICAL_NORM) - np.log(settings.lambda_0)
    slopes, constant = _log_horizon()
    weights[lengths] = horizon_power * slopes
    bias += horizon_power * (constant - np.log(TYPICAL_HORIZON))
    if schedule == "cosine":
        weights[times], log_scale = _log_cosine()
        bias += log_scale
    # softmax of zeros and this logit is `share` for the base; a single base has all weight anyway
    logits = np.zeros(number)
    logits[index] = np.log(share / (1 - share) * max(number - 1, 1))

    def changed(net: Any, offset: float, extra: Any = ()) -> Any:
        first = np.concatenate([weights, extra])
        return _linear_in_inputs(net, first, bias + offset, logits, len(settings.hidden))

    if settings.variant == "per_layer":
        nets = {name: changed(net, np.log(rates[name])) for name, net in theta["net"].items()}
        return {**theta, "net": nets}
    if settings.variant == "none":
        return {**theta, "net": changed(theta["net"], np.log(rates[""]))}
    # The first entry of an embedding is the layer's deviation from the mean log rate.
    mean = float(np.mean(np.log(list(rates.values()))))
    embedding = {
        name: jnp.asarray(row).at[0].set(np.log(rates[name]) - mean)
        for name, row in theta["embedding"].items()
    }
    one_hot = np.eye(1, settings.embedding_dim)[0]
    return {**theta, "net": changed(theta["net"], mean, one_hot), "embedding": embedding}


def layer_names_of(settings: L3RS, theta: Theta) -> list[str]:
    """Names of the layers that theta tells apart; none for the variants that tell none apart."""
    table = {"embedding": "embedding", "per_layer": "net"}.get(settings.variant)
    return list(theta[table]) if table else []


def _with_constants(theta: Theta, base: str, constants: Mapping[str, float]) -> Theta:
    """Theta with other constants of a base optimizer."""
    known = theta["base"].get(base, {})
    for name, value in constants.items():
        check_choice(f"imitate: constants of {base}", name, list(known))
        check_number(f"imitate: {name} of {base}", value)
    changed = {**known, **{name: jnp.float32(value) for name, value in constants.items()}}
    return {**theta, "base": {**theta["base"], base: changed}}


def _rates(settings: L3RS, theta: Theta, lr: float | Mapping[str, float]) -> dict[str, float]:
    """The learning rate of each layer that theta tells apart, or of ""."""
    names = layer_names_of(settings, theta) or [""]
    if not isinstance(lr, Mapping):
        check_number("imitate: lr", lr, above=0)
        return dict.fromkeys(names, lr)
    if set(names) != set(lr):
        raise ValueError(f"imitate: lr must name the layers {show(names)}, got {show(list(lr))}.")
    for name, rate in lr.items():
        check_number(f"imitate: lr of {name}", rate, above=0)
    return dict(lr)


def _linear_in_inputs(
    net: Any, weights: np.ndarray, bias: float, logits: np.ndarray, num_hidden: int
) -> Any:
    """The network with ``weights @ inputs + bias`` as output 0 and constant other outputs."""
    layers = [dict(net[f"Dense_{i}"]) for i in range(num_hidden + 1)]
    kernels = [np.array(layer["kernel"]) for layer in layers]
    biases = [np.array(layer["bias"]) for layer in layers]
    for i, (kernel, constant) in enumerate(zip(kernels[:-1], biases[:-1], strict=True)):
        if i == 0:
            kernel[:, 0], kernel[:, 1] = weights, -weights
            constant[:2] = bias, -bias
        else:  # passes both parts on
            kernel[:, :2], constant[:2] = 0.0, 0.0
            kernel[0, 0] = kernel[1, 1] = 1.0
    kernels[-1][:] = 0.0
    biases[-1][0], biases[-1][1:] = 0.0, logits
    if num_hidden:
        kernels[-1][0, 0], kernels[-1][1, 0] = 1.0, -1.0
    else:
        kernels[-1][:, 0], biases[-1][0] = weights, bias
    return {
        **net,
        **{
            f"Dense_{i}": {"kernel": jnp.asarray(k), "bias": jnp.asarray(b)}
            for i, (k, b) in enumerate(zip(kernels, biases, strict=True))
        },
    }


@cache
def _log_cosine() -> tuple[np.ndarray, float]:
    """Weights of the time features and a constant, whose sum is the log of a cosine decay to 0.

    Steps count by their learning rate, so that the end, where the logarithm goes to minus infinity,
    counts little.
    """
    scale = (1 + np.cos(np.pi * np.arange(1000) / 1000)) / 2
    features = jax.vmap(lambda t: relative_time(t, 1000, TIME_POINTS))(jnp.arange(1000))
    design = np.concatenate([np.asarray(features), np.ones((1000, 1))], axis=1) * scale[:, None]
    ridge = 1e-3 * np.eye(design.shape[1])
    design, target = np.vstack([design, ridge]), np.log(scale) * scale
    target = np.concatenate([target, np.zeros(len(ridge))])
    fitted = np.linalg.lstsq(design, target, rcond=None)[0]
    return fitted[:-1], float(fitted[-1])


@cache
def _log_horizon() -> tuple[np.ndarray, float]:
    """Weights of the features of the horizon and a constant, whose sum is the log of the horizon.

    Fitted between the shortest and the longest of `TIME_SCALES`.
    """
    horizons = np.geomspace(TIME_SCALES[0], TIME_SCALES[-1], 200).astype(int)
    features = np.stack([absolute_time(int(horizon), TIME_SCALES) for horizon in horizons])
    design = np.concatenate([features, np.ones((len(horizons), 1))], axis=1)
    fitted = np.linalg.lstsq(design, np.log(horizons), rcond=None)[0]
    return fitted[:-1], float(fitted[-1])
