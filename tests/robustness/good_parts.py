"""Arguments that fit together; tests replace one of them by a bad one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import datasets
from metaopt.optimizers import lstm

NAN, INF = math.nan, math.inf
SGD = optax.sgd(0.1)
PARAMS = {"w": jnp.ones(3), "b": jnp.ones(())}
KEY = jax.random.key(0)
LSTM = lstm(2, layers=1)
THETA = LSTM.init(KEY, PARAMS)
LETTERS = datasets.text_from_string("letters", "ab" * 600)
WINDOW = {"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}


def loss_fn(params, batch):
    return jnp.sum(params["w"] * batch["w"]) + jnp.sum(params["b"] * batch["b"])
