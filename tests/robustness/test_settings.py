"""Settings that are out of range, of another type, NaN or infinite."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from refusals import bad_inputs, refused

from metaopt.guards import Adaptive
from metaopt.jobs.evaluate import EvaluateJob
from metaopt.jobs.specialise import SpecialiseJob
from metaopt.jobs.train import TrainJob
from metaopt.meta import NESConfig, PESConfig, TBPTTConfig
from metaopt.optimizers import L3RS, LSTM, Celo, Celo2, CeloAdam, VeLO

NAN, INF = math.nan, math.inf
# Field -> values that it must not have.
WINDOWS: dict[str, list[Any]] = {
    "rollout": [0, -20, 30, 100.0, "100", None, NAN, True],
    "truncation": [0, -1, 2.5, "20", None, 30],
    "tasks": [0, -1, 1.0, "1", None],
    "lengths": ["random", "", 3, None, ["fixed"]],
    "min_rollout": [0, -20, 20.0, "20", None],
    "curriculum": [0, -1, 1e3, "1000", None],
    "normalised": [1, "yes", None],
}
ESTIMATE: dict[str, list[Any]] = {
    "population": [0, 1, 3, -2, 32.0, "32", None, True],
    "sigma": [0, 0.0, -0.1, NAN, INF, "0.1", None, [0.1]],
    "lr": [0, -1e-2, NAN, INF, "0.01", None],
    "optimizer": ["adamm", "", None, 1],
    "half_life": [-1, 0.5, INF, "500", None],
    "weight_decay": [-1.0, NAN, INF, "0", None],
}
BAD: dict[Any, dict[str, list[Any]]] = {
    L3RS: {
        "base": ["sgd", None, ["sgd"], (), ("sgdd",), ("sgd", "sgd"), (3,)],
        "variant": ["both", "", None],
        "ema": ["two", "", 0.9, [0.9], (1.0,), (NAN,), None],
        "hidden": [32, (0,), (8.0,), ("8",), [32], None],
        "embedding_dim": [0, -1, 8.0, "8", None],
        "lambda_0": [0, -1.0, NAN, INF, "0.01", None],
    },
    LSTM: {
        "hidden": [0, -1, 8.0, "8", None, True],
        "layers": [0, -1, 2.0, "2", None],
        "p": [0, -1.0, NAN, INF, "7", None],
        "scale": [NAN, INF, "0.1", None],
        "warn_frozen": ["yes", 1],
    },
    VeLO: {
        "hidden": [0, -1, 8.0, "8", None],
        "bank": [0, -1, 8.0, "8", None],
        "warn_past_horizon": [1, "yes", None],
    },
    Celo: {
        "hidden": [0, 8.0],
        "bank": [0, "1"],
        "scheduler": [1, None],
        "warn_past_horizon": ["yes"],
    },
    CeloAdam: {"hidden": [-1, None], "warn_past_horizon": [1]},
    Celo2: {
        "orthogonalize": ["yes"],
        "lr": [-1.0, NAN, "1"],
        "weight_decay": [-0.1, INF],
        "adam_factor": [-1.0, None],
        "schedule": ["linear", "", None],
        "warn_frozen": [1],
    },
    NESConfig: {
        **ESTIMATE,
        "strategy": ["Open_Es", "PersistentES", "RandomSearch", "SV_CMA_ES", "", None, 3],
        "tasks": [0, -1, 4.0, "4", None],
        "min_steps": [0, -1, 101, 10.0, "10", None],
        "max_steps": [0, 99, 1e3, "1000", None],
        "lengths": ["fixed", "", None, 1],
        "objective": ["best", "", None, 1],
        "eval_batches": [0, -4, 4.0, "4", None],
    },
    PESConfig: {
        **WINDOWS,
        **ESTIMATE,
        "clip": [-1.0, NAN, INF, "1", None],
        "clip_difference": [-0.5, NAN, INF, "0.5", None],
        "persistent": [1, "no", None],
    },
    TBPTTConfig: {
        **WINDOWS,
        "lr": [-1.0, NAN, INF, "1", None],
        "half_life": [-1, 0.5, INF, "500", None],
        "clip": [-1.0, NAN, INF, "1", None],
        "objective": ["best", "", None, 1],
        "average": [-0.1, 1.0, NAN, INF, "0", None],
        "second_order": [1, "no", None],
    },
    TrainJob: {
        "task": ["", ",", 3, None, ["digits"]],
        "learned": ["lstm", None, 3, LSTM, {"hidden": 20}, NESConfig()],
        "method": ["nes", None, NESConfig, {"population": 4}, LSTM()],
        "steps": [0, -1, 2.5, "300"],
        "minutes": [-1.0, NAN, INF, "5", None],
        "validate_every": [0, -1, 2.5, None, "25"],
        "validate_on": ["end", "", None],
        "validate_at": ["shortest", "", None],
        "checkpoint_every": [0, -1, 2.5, None, "25"],
        "warm_start": [None, 3],
        "seed": [-1, 0.5, "0", None, NAN],
        "out": ["runs/x", None, 3],
        "overwrite": [1, "yes", None],
        "resume_changed": [1, None],
        "tensorboard": ["yes", None],
        "population_chunk": [-1, 0.5, None],
        "coordinator": [None, 3],
        "num_processes": ["2", 2.0],
        "process_id": ["0", 0.5],
        "cpu_devices": [-1, 0.5, None],
    },
    EvaluateJob: {
        "checkpoints": ["runs/x", [Path("runs/x")], ("runs/x",), None, 3],
        "suite": ["digit", "", 3],
        "task": [["moons"], None, 3],
        "baselines": ["sgdd", "adam,sgdd", 3],
        "guards": [3, ["race"]],
        "fallback": ["lion", "adamw", 3],
        "seeds": [0, -1, 2.5, "10"],
        "tuning_seeds": [0, -1, 2.5, "3"],
        "num_steps": [0, -10, 2.5, "100"],
        "window": [0, -1, 2.5, None],
        "workers": [0, -1, 2.5, None],
        "out": ["runs/x", None],
        "overwrite": [1, None],
    },
    SpecialiseJob: {
        "task": ["", " , ", 3, None],
        "held_out": [None, 3],
        "num_steps": [0, -1, 2.5, None],
        "min_steps": [-1, 101, 2.5, None],
        "minutes": [-1.0, NAN, INF, "5", None],
        "points": [0, -1, 2.5, None],
        "bases": ["", "sgdd", "adam,sgdd", 3, None],
        "any_network": [1, "yes", None],
        "baselines": ["", "sgdd", "adam,sgdd", 3, None],
        "seeds": [0, -1, 2.5, None],
        "workers": [0, -1, 2.5, None],
        "seed": [-1, 0.5, "0", None, NAN],
        "out": ["runs/x", None, 3],
        "overwrite": [1, "yes", None],
    },
    Adaptive: {
        "rule": ["both", "", None],
        "growth": [1, 0, -2, 2.5, None],
        "cap": [0, -1, 2.5, None, "160"],
    },
}
CASES = {
    f"{config.__name__}.{field}={value!r}"[:70]: (
        (config, {field: value}),
        # A message may name the setting that the value does not fit.
        rf"{config.__name__}\.?\w*.*\b{field}\b|unknown (suite|baseline|base) "
        rf"|(Adaptive|l3rs):.*{field}",
    )
    for config, fields in BAD.items()
    for field, values in fields.items()
    for value in values
}


@bad_inputs(CASES)
def test_a_bad_setting_is_refused(bad, match):
    config, settings = bad
    refused(lambda: config(**settings), match)


@pytest.mark.parametrize("config", BAD)
def test_every_setting_has_bad_values_in_the_table(config):
    assert BAD[config].keys() == {field.name for field in dataclasses.fields(config)}
    config()
