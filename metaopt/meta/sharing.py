"""The devices that share inner runs evenly."""

import jax
from jax.sharding import Mesh

from metaopt.meta import devices


def even_mesh(setting: str, value: int, unit: int = 1) -> Mesh | None:
    """The mesh of the devices that take equal shares of ``value // unit`` inner runs.

    One process leaves out the devices that would make the shares uneven. Several processes use
    all their devices.

    Args:
      setting: the name of the setting, for the message.
      value: its value.
      unit: what makes one run: 2 where the setting counts members of pairs.

    Returns:
      The mesh, or None for a single device.

    Raises:
      ValueError: the devices of several processes cannot share the runs evenly.
    """
    count, runs = jax.device_count(), value // unit
    if count == 1:
        return None
    if jax.process_count() > 1 and runs % count:
        raise ValueError(
            f"{setting} must be a multiple of {unit * count} on {count} devices, got {value}."
        )
    used = max(n for n in range(1, count + 1) if runs % n == 0)
    return devices.mesh_for(runs, 1, jax.devices()[:used]) if used > 1 else None
