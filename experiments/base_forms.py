"""Measures L3RS's own forms of SGD and Adam against optax's, in generations of NES on CPU.

    python -m experiments.base_forms

Needs no data. Takes a few minutes on 2 cores. Writes docs/results/bench-bases.json: seconds of a
generation with every form, and their ratios to metaopt's, medians of 15 rounds in which all forms
are timed in turn. `metaopt.core.cpu` computes both directions differently from optax, to save time
in populations on CPU. If the ratios are near 1, optax's own forms are fast enough and ours can go.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from benchmarks.workload import Workload, mlp_task, nes_generation
from experiments.timing import median_ratio, median_seconds, time_in_turn
from metaopt.core import cpu
from metaopt.evaluation.records import write_json
from metaopt.jobs.evaluate import environment
from metaopt.meta import devices
from metaopt.optimizers import BASES, Base, l3rs
from metaopt.optimizers.bases import constants

RESULT = Path("docs/results/bench-bases.json")
WORKLOADS = {"2 candidates": Workload(), "16 candidates": Workload(population=16, tasks=4)}
ROUNDS = 15

OPTAX_SGD = Base("sgd", hyper={}, make=lambda hyper: optax.sgd(1.0))
OPTAX_ADAM = Base(
    "adam",
    hyper=BASES["adam"].hyper,
    make=lambda hyper: optax.adam(1.0, **constants(hyper), eps_root=cpu.ADAM_EPS_ROOT),
)
FORMS: dict[str, Sequence[str | Base]] = {
    "metaopt": ("sgd", "adam"),
    "optax's SGD": (OPTAX_SGD, "adam"),
    "optax's Adam": ("sgd", OPTAX_ADAM),
    "optax's SGD and Adam": (OPTAX_SGD, OPTAX_ADAM),
}


def compiled_generation(
    bases: Sequence[str | Base], workload: Workload, mesh: Mesh | None
) -> Callable[[], Any]:
    """A generation of NES that is compiled and has run once."""
    update = nes_generation(l3rs(bases), mlp_task(workload), workload, devices.Spread(mesh))
    args = (update.trainer, update.key_data, update.state)
    out_shardings = devices.placed(devices.WHOLE, mesh) if mesh else None
    jitted = jax.jit(update.step, out_shardings=out_shardings, compiler_options=cpu.fast())
    compiled = jitted.lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    return lambda: jax.block_until_ready(compiled(*args))


def measure(workload: Workload, mesh: Mesh | None) -> dict[str, Any]:
    """Seconds of a generation with every form, and their ratios to metaopt's form."""
    generations = {
        name: compiled_generation(bases, workload, mesh) for name, bases in FORMS.items()
    }
    rounds = time_in_turn(generations, ROUNDS)
    return {
        "seconds": median_seconds(rounds),
        "ratios": {name: median_ratio(rounds, name, reference="metaopt") for name in FORMS},
    }


def main() -> None:
    """Times all workloads on one device and on all devices, and writes the record."""
    devices.initialise("none")  # every core becomes a device
    rows = []
    for name, workload in WORKLOADS.items():
        mesh = devices.mesh_for(workload.population, workload.tasks)
        for num_devices, mesh_or_none in {1: None, jax.device_count(): mesh}.items():
            row = {
                "workload": workload._asdict(),
                "devices": num_devices,
                **measure(workload, mesh_or_none),
            }
            rows.append(row)
            ratios = [f"{form} {ratio:.2f}" for form, ratio in row["ratios"].items()]
            print(f"{name}, {num_devices} devices:", *ratios, flush=True)
    record = {
        "environment": environment("python -m experiments.base_forms"),
        "load": os.getloadavg()[0],
        "rounds": ROUNDS,
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
