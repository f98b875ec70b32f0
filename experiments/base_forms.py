"""L3RS's own forms of SGD and Adam against optax's: generations of NES on CPU.

    python -m experiments.base_forms     # writes docs/results/bench-bases.json

`metaopt.core.cpu` computes both directions differently from optax, to save time in
populations on CPU. If the ratios are near 1, optax's own are fast enough and the forms can go.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from benchmarks.workload import Workload, mlp_task, nes_generation
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


def generation(
    bases: Sequence[str | Base], workload: Workload, mesh: Mesh | None
) -> Callable[[], Any]:
    """Returns a compiled generation, which has run once."""
    spread = devices.Spread(mesh)
    step, *args = nes_generation(l3rs(bases), mlp_task(workload), workload, spread)
    where = devices.placed(devices.WHOLE, mesh) if mesh else None
    program = jax.jit(step, out_shardings=where, compiler_options=cpu.fast())
    compiled = program.lower(*args).compile()
    call = lambda: jax.block_until_ready(compiled(*args))
    call()
    return call


def measure(workload: Workload, mesh: Mesh | None) -> dict[str, Any]:
    """Returns seconds of a generation, and the ratio of every form to that of metaopt.

    Both are medians of rounds in which all forms are timed in turn.
    """
    calls = {name: generation(bases, workload, mesh) for name, bases in FORMS.items()}
    rounds = []
    for _ in range(ROUNDS):
        seconds = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
        rounds.append(seconds)
    return {
        "seconds": {name: statistics.median(one[name] for one in rounds) for name in calls},
        "ratios": {
            name: statistics.median(one[name] / one["metaopt"] for one in rounds) for name in calls
        },
    }


def main() -> None:
    devices.initialise("none")  # every core becomes a device
    rows = []
    for name, workload in WORKLOADS.items():
        spread_mesh = devices.mesh_for(workload.population, workload.tasks)
        for num_devices, mesh in {1: None, jax.device_count(): spread_mesh}.items():
            row = {"workload": workload._asdict(), "devices": num_devices}
            row |= measure(workload, mesh)
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
