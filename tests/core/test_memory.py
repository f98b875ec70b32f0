"""Memory: what a program needs, what there is, and the message where it does not suffice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.core import cpu, memory


def test_a_programs_memory_is_that_of_its_arguments_results_and_temporaries():
    compiled = []
    program = cpu.jit(lambda x, n: (compiled.append(1), jnp.outer(x, x) * n)[1])
    x = jnp.ones(1000)
    least = 4 * (1000 + 1 + 1000 * 1000)
    assert least <= cpu.memory_of(program, x, np.float32(2.0)) <= 2.5 * least
    program(x, np.float32(2.0))
    assert len(compiled) == 1  # traced once for both


def test_a_cpu_has_the_memory_of_its_host():
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0 < memory.available(jax.devices("cpu")[0]) <= 1.01 * total


def test_what_needs_too_much_is_told_with_advice():
    for needed, there in ((5, 5), (None, 5), (5, None)):
        memory.check("a step", needed, there, "do less")
    message = r"^a step needs about 2.5 GB of memory, but there are 1 GB: do less.$"
    with pytest.raises(MemoryError, match=message):
        memory.check("a step", 2_500_000_000, 1_000_000_000, "do less")


def huge_in_jax():
    return jax.block_until_ready(jax.jit(lambda: jnp.ones((1 << 24, 1 << 22)))())


def huge_in_numpy():
    return np.ones((1 << 24, 1 << 36), np.int8)


@pytest.mark.parametrize("allocate", [huge_in_jax, huge_in_numpy])
def test_running_out_of_memory_is_one_message(allocate):
    with pytest.raises(MemoryError, match=r"^a job ran out of memory: do less\.$"):
        with memory.explained("a job", "do less"):
            allocate()


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), jax.errors.JaxRuntimeError("other")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, memory.explained("a job", "do less"):
        raise error
    assert caught.value is error
