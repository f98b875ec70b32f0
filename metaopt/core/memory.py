"""Memory of devices: what there is, and one message where it does not suffice."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

# Limits of a container, in version 2 and version 1 of Linux' control groups.
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available(device: Any) -> int | None:
    """Bytes that JAX may use on a device; the devices of a CPU share those of the host.

    Args:
      device: a `jax.Device`.

    Returns:
      The bytes, or None where the system does not tell.
    """
    stats = device.memory_stats() or {}
    if device.platform != "cpu":
        return stats.get("bytes_limit")
    limits = []
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _CGROUPS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits, default=None)


def check(what: str, needed: int | None, there: int | None, advice: str) -> None:
    """Checks that a program fits.

    Args:
      what: the program's name in the message.
      needed: bytes; None: unknown.
      there: bytes, from `available`.
      advice: what to change.

    Raises:
      MemoryError: when more bytes are needed than there are.
    """
    if needed is not None and there is not None and needed > there:
        raise MemoryError(
            f"{what} needs about {_gigabytes(needed)} of memory, but there are "
            f"{_gigabytes(there)}: {advice}."
        )


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turns the error that JAX raises where memory does not suffice into one with instructions.

    Args:
      what: what ran.
      advice: what to change.

    Raises:
      MemoryError: when memory did not suffice.
    """
    try:
        yield
    except Exception as error:
        if not _is_exhausted(error):
            raise
        raise MemoryError(f"{what} ran out of memory: {advice}.") from error


def _is_exhausted(error: Exception) -> bool:
    """Whether XLA, or NumPy, found too little memory."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
    return type(error).__module__.startswith("numpy") and isinstance(error, MemoryError)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
