"""Arguments of constructors that are of a wrong type or size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from good_parts import INF, LSTM, NAN, PARAMS, SGD, THETA
from refusals import bad_inputs, refused

import metaopt
from metaopt import datasets, meta, optimizers, tasks
from metaopt.guards import Adaptive, gl2o, in_windows, lgl2o, race, smg, windows
from metaopt.optimizers import head_only, l3rs, lstm, velo
from metaopt.tasks.networks import MLP

CONSTRUCTORS = {
    "lstm: hidden 2.0": (lambda: lstm(2.0), "lstm: hidden must be an integer"),
    "lstm: layers 0": (lambda: lstm(layers=0), "lstm: layers must be at least 1"),
    "lstm: p 0": (lambda: lstm(p=0), "lstm: p must be positive"),
    "lstm: scale inf": (lambda: lstm(scale=INF), "lstm: scale must be a finite number"),
    "velo: hidden 0": (lambda: velo(0), "velo: hidden must be at least 1"),
    "velo: bank -1": (lambda: velo(4, -1), "velo: bank must be at least 1"),
    "l3rs: no base": (lambda: l3rs([]), "l3rs: base must be a sequence of at least one"),
    "l3rs: base a string": (lambda: l3rs("sgd"), "l3rs: base must be a sequence"),
    "l3rs: base unknown": (lambda: l3rs(["adamm"]), "l3rs: unknown base 'adamm'"),
    "l3rs: base a number": (lambda: l3rs([1e-3]), "l3rs: base .*0.001"),
    "l3rs: base a LearnedOptimizer": (lambda: l3rs([LSTM]), "l3rs: base .*LearnedOptimizer"),
    "l3rs: variant None": (lambda: l3rs(variant=None), "l3rs: variant must be"),
    "l3rs: ema of 1": (lambda: l3rs(ema=[1.0]), r"ema decays must be in \[0, 1\)"),
    "l3rs: hidden of 0": (lambda: l3rs(hidden=[0]), "hidden: each entry must be at least 1"),
    "l3rs: embedding_dim 0": (lambda: l3rs(embedding_dim=0), "embedding_dim must be at least 1"),
    "l3rs: lambda_0 0": (lambda: l3rs(lambda_0=0.0), "lambda_0 must be positive"),
    "l3rs: layer_names a list": (lambda: l3rs(layer_names=["w"]), "layer_names must be a function"),
    "adam: schedule unknown": (
        lambda: optimizers.adam(schedule="linear").apply({}, num_steps=3),
        "schedule must be 'constant' or 'cosine'",
    ),
    "adam: cosine without num_steps": (
        lambda: optimizers.adam(schedule="cosine").apply({}),
        "needs `num_steps`",
    ),
    "adam: lr a string": (lambda: optimizers.adam("1e-3"), "adam: lr must be"),
    "adam: lr negative": (lambda: optimizers.adam(-1e-3), "adam: lr must not be negative"),
    "adamw: weight_decay a string": (
        lambda: optimizers.adamw(weight_decay="0.1"),
        "adamw: weight_decay must be a finite number",
    ),
    "sgd: lr None": (lambda: optimizers.sgd(None), "sgd: lr must be"),
    "sgd: tau 0": (lambda: optimizers.sgd(tau=0.0), "sgd: tau must be positive"),
    "sgd: momentum 2": (lambda: optimizers.sgd(momentum=2.0), r"sgd: momentum must be in \[0, 1\)"),
    "handcrafted: no function": (lambda: optimizers.handcrafted(SGD), "handcrafted: make must be"),
    "head_only: no function": (lambda: head_only(SGD, "head"), "head_only: is_head must be"),
    "head_only: no leaf": (
        lambda: head_only(SGD, lambda name: False).init(PARAMS),
        "head_only: is_head is true of none of the leaves",
    ),
    "race: no fallback": (lambda: race(SGD), "race: give at least one fallback"),
    "race: learned None": (lambda: race(None, SGD), "race: learned must be an optax"),
    "race: learned a family": (lambda: race(LSTM, SGD), "race: learned is a LearnedOptimizer"),
    "race: fallback a schedule": (
        lambda: race(SGD, optax.constant_schedule(1)),
        "race: fallback 0 must be an optax",
    ),
    "race: fallback a window guard": (
        lambda: race(SGD, in_windows(lgl2o(SGD, SGD))),
        "race: fallback 0 is in window form.*without guards.in_windows",
    ),
    "race: n_t 2.5": (lambda: race(SGD, SGD, n_t=2.5), "race: n_t must be an integer"),
    "race: n_c None": (lambda: race(SGD, SGD, n_c=None), "race: n_c must be an integer"),
    "race: n_c negative": (lambda: race(SGD, SGD, n_c=-1), "race: n_c must be at least 0"),
    "race: smoothing 1": (lambda: race(SGD, SGD, smoothing=1.0), r"race: smoothing must be"),
    "race: smoothing negative": (lambda: race(SGD, SGD, smoothing=-0.1), "race: smoothing must be"),
    "race: patience 0": (lambda: race(SGD, SGD, patience=0), "race: patience must be at least 1"),
    "race: trial 0": (lambda: race(SGD, SGD, trial=0), "race: trial must be at least 1"),
    "race: budget 2": (lambda: race(SGD, SGD, budget=2), "race: budget must be"),
    "race: memory unknown": (lambda: race(SGD, SGD, memory="x"), "race: memory must be"),
    "lgl2o: fallback a family": (
        lambda: lgl2o(SGD, optimizers.adam()),
        "lgl2o: fallback is a LearnedOptimizer",
    ),
    "lgl2o: n_t negative": (lambda: lgl2o(SGD, SGD, n_t=-3), "lgl2o: n_t must be at least 1"),
    "lgl2o: on_reject unknown": (lambda: lgl2o(SGD, SGD, on_reject="x"), "on_reject must be"),
    "lgl2o: memory None": (lambda: lgl2o(SGD, SGD, memory=None), "memory must be one of"),
    "lgl2o: average no function": (lambda: lgl2o(SGD, SGD, average=1), "average must be"),
    "lgl2o: adaptive True": (
        lambda: lgl2o(SGD, SGD, adaptive=True),
        "adaptive must be an Adaptive",
    ),
    "lgl2o: adaptive with n_c 1": (
        lambda: lgl2o(SGD, SGD, n_c=1, adaptive=Adaptive()),
        "n_c must be at least 2",
    ),
    "lgl2o: adaptive beyond its cap": (
        lambda: lgl2o(SGD, SGD, n_t=20, adaptive=Adaptive(cap=10)),
        "cap must be at least n_t and n_c",
    ),
    "gl2o: sequence unknown": (lambda: gl2o(SGD, SGD, sequence="XY"), "gl2o: sequence must be"),
    "gl2o: alpha 2": (lambda: gl2o(SGD, SGD, alpha=2.0), r"gl2o: alpha must be in \[0, 1\]"),
    "gl2o: factor NaN": (lambda: gl2o(SGD, SGD, factor=NAN), "gl2o: factor must be"),
    "gl2o: m 0": (lambda: gl2o(SGD, SGD, m=0), "gl2o: m must be at least 1"),
    "gl2o: residual unknown": (lambda: gl2o(SGD, SGD, residual="loss"), "gl2o: residual must be"),
    "smg: learned a transformation": (lambda: smg(SGD, {}), "smg: learned must be a LearnedOpt"),
    "smg: theta of another": (lambda: smg(LSTM, {"a": jnp.ones(3)}).init(PARAMS), "lstm: theta"),
    "smg: n_t negative": (lambda: smg(LSTM, THETA, n_t=-1), "smg: n_t must be at least 0"),
    "smg: lr_params a string": (lambda: smg(LSTM, THETA, lr_params="3"), "smg: lr_params must be"),
    "smg: lr_theta NaN": (lambda: smg(LSTM, THETA, lr_theta=NAN), "smg: lr_theta must be"),
    "in_windows: a transformation": (lambda: in_windows(SGD), "in_windows: takes a guard"),
    "windows: n_t 0": (lambda: windows([], 0, 1), "windows: n_t must be at least 1"),
    "windows: n_c negative": (lambda: windows([], 1, -1), "windows: n_c must be at least 0"),
    "windows: no iterable": (lambda: windows(3, 1, 1), "windows: .*iterable"),
    "windows: batches of two shapes": (
        lambda: list(windows([np.ones(3), np.ones(2), np.ones(2)], 2, 1)),
        "mini-batches of a window must have one shape",
    ),
    "windows: batches of two structures": (
        lambda: list(windows([{"x": np.ones(3)}, {"z": np.ones(3)}, {"x": np.ones(3)}], 2, 1)),
        "windows: mini-batches of a window must have one structure",
    ),
    "windows: a size that a function gives": (
        lambda: list(windows([np.ones(3)] * 4, lambda: 0, 1)),
        "windows: n_t must be at least 1",
    ),
    "classification: batch_size 0": (
        lambda: tasks.classification(MLP((2,)), datasets.moons(), batch_size=0),
        "classification: batch_size must be at least 1",
    ),
    "classification: data a dict": (
        lambda: tasks.classification(MLP((2,)), {"x": 1}),
        "data must be a Dataset",
    ),
    "quadratic: dim 0": (lambda: tasks.quadratic(0), "quadratic: dim must be at least 1"),
    "quadratic: condition NaN": (
        lambda: tasks.quadratic(condition=NAN),
        "quadratic: condition must be a finite number",
    ),
    "quadratic: noise negative": (
        lambda: tasks.quadratic(noise=-1.0),
        "quadratic: noise must not be negative",
    ),
    "mlp_family: widths reversed": (
        lambda: tasks.mlp_family([datasets.moons()], widths=(8, 4)),
        "mlp_family: widths must be 1 <= low <= high",
    ),
    "mlp_family: no set": (lambda: tasks.mlp_family([]), "mlp_family: sets"),
    "language_model: length 0": (
        lambda: tasks.language_model(
            MLP((2,)), datasets.text_from_string("x", "ab" * 600), length=0
        ),
        "language_model: length must be at least 1",
    ),
    "text too short": (lambda: datasets.text_from_string("x", "ab"), "needs at least 1000"),
    "text beyond its vocabulary": (
        lambda: datasets.text_from_string("x", "abc" * 500, "ab"),
        "text 'x': .*'c'.*vocabulary",
    ),
    "moons: n 3": (lambda: datasets.moons(3), "needs at least 10 examples"),
    "moons: noise NaN": (lambda: datasets.moons(noise=NAN), "moons: noise must be a finite number"),
    "circles: factor 2": (lambda: datasets.circles(factor=2.0), r"circles: factor must be in"),
    "classes twice": (
        lambda: datasets.only_classes(datasets.digits(), [1, 1]),
        "classes must be distinct",
    ),
    "classes beyond": (
        lambda: datasets.only_classes(datasets.digits(), [1, 10]),
        r"classes must lie in 0..9",
    ),
    "train with an empty theta": (
        lambda: meta.nes(optimizers.sgd(), QUADRATIC, meta.NESConfig()).init(KEY, {}),
        "nes: theta is empty",
    ),
    "nes: theta of integers": (
        lambda: meta.nes(LSTM, QUADRATIC, meta.NESConfig()).init(KEY, {"a": jnp.ones(2, int)}),
        "nes: theta must be float32",
    ),
    "nes: no family": (
        lambda: meta.nes(LSTM, [], meta.NESConfig()),
        "nes: families is empty",
    ),
    "nes: a function, no family": (
        lambda: meta.nes(LSTM, [tasks.quadratic], meta.NESConfig()),
        r"nes: families\[0\] must be a TaskFamily or a Task, got a function",
    ),
    "nes: config of pes": (
        lambda: meta.nes(LSTM, QUADRATIC, meta.PESConfig()),
        "nes: config must be a NESConfig",
    ),
    "pes: theta of another": (
        lambda: meta.pes(LSTM, QUADRATIC, meta.PESConfig()).init(KEY, {"a": jnp.ones(2)}),
        "pes: .*lstm: theta",
    ),
}
KEY = jax.random.key(0)
QUADRATIC = metaopt.single(tasks.quadratic(3))


@bad_inputs(CONSTRUCTORS)
def test_a_bad_argument_is_refused(bad, match):
    refused(bad, match)
