"""Names and shapes of the meta-parameters of VeLO, Celo, Celo-Adam, Celo2 and the adafac MLP.

They are those of the authors' code, so that published weights are taken as they are: theta is a
nest of dicts with the names of its files.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from metaopt.core.checks import check_known
from metaopt.core.types import Key, Theta
from metaopt.optimizers.velo_features import GROUP_SIZES

Path = tuple[str, ...]
Shapes = dict[Path, tuple[int, ...]]

################################################################################
# Shapes
################################################################################


def velo_shapes(hidden: int, bank: int) -> Shapes:
    """Returns the shape of every leaf of VeLO's theta by its path.

    Args:
      hidden: units of the LSTM.
      bank: number of networks in the bank.
    """
    return _lstm_shapes(30, hidden, bank) | _mlp_shapes(4, (bank,))


def celo_shapes(hidden: int, bank: int) -> Shapes:
    """Returns the shape of every leaf of Celo's theta; arguments as for `velo_shapes`."""
    return _lstm_shapes(18, hidden, bank) | _mlp_shapes(4, (bank,))


def celo_adam_shapes(hidden: int) -> Shapes:
    """Returns the shape of every leaf of Celo-Adam's theta; arguments as for `velo_shapes`."""
    return _lstm_shapes(18, hidden, 0)


def celo2_shapes() -> Shapes:
    """Returns the shape of every leaf of Celo2's theta by its path."""
    return _mlp_shapes(8, ())


def adafac_mlp_shapes() -> Shapes:
    """Returns the shape of every leaf of the adafac MLP's theta by its path."""
    layers = {"w0": (39, 4), "b0": (4,), "w1": (4, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}
    decays = {"momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}
    return {("nn", "~", name): shape for name, shape in layers.items()} | {
        (name,): shape for name, shape in decays.items()
    }


def _lstm_shapes(num_features: int, hidden: int, bank: int) -> Shapes:
    shapes: Shapes = {
        ("lstm_init_state", "hidden"): (1, hidden),
        ("lstm_init_state", "cell"): (1, hidden),
    }
    linear = {
        "linear": (num_features, hidden),  # not used, but part of the published files
        "linear_1": (num_features, hidden),
        "linear_2": (num_features, hidden),
        "rnn/linear": (2 * hidden, 4 * hidden),  # one name, not a path of two
        "rnn_to_controls": (hidden, bank),
        "step_size": (hidden, 1),
    }
    if not bank:
        del linear["rnn_to_controls"]
    for name, (num_inputs, num_outputs) in linear.items():
        shapes["rnn_params", name, "w"] = (num_inputs, num_outputs)
        shapes["rnn_params", name, "b"] = (num_outputs,)
    return shapes


def _mlp_shapes(units: int, bank: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for group, size in enumerate(GROUP_SIZES):
        shapes["ff_mod_stack", "~", f"w0__{group}"] = (*bank, size, units)
    rest = {"w1": (units, units), "w2": (units, 3), "b0": (units,), "b1": (units,), "b2": (3,)}
    for name, shape in rest.items():
        shapes["ff_mod_stack", "~", name] = (*bank, *shape)
    return shapes


def init_theta(key: Key, shapes: Shapes) -> Theta:
    """Returns random meta-parameters.

    Weights are truncated normal with standard deviation 1/sqrt(fan_in). All else is zero.

    Args:
      key: random key.
      shapes: of the leaves.
    """
    leaves = {}
    for path, k in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        name, shape = path[-1], shapes[path]
        leaves[path] = jnp.zeros(shape)
        if name.startswith("w"):
            fan_in = sum(GROUP_SIZES) if name.startswith("w0__") else shape[-2]
            leaves[path] = jax.random.truncated_normal(k, -2.0, 2.0, shape) * fan_in**-0.5
    return unflatten_dict(leaves)


################################################################################
# Kinds
################################################################################


class Kind(NamedTuple):
    """The layout of one optimizer's theta.

    Attributes:
      title: name of the optimizer in messages.
      shapes: sizes -> shape of every leaf by its path.
      sizes: arguments of `shapes`.
      sized_by: name of the leaf whose first axes are the sizes.
    """

    title: str
    shapes: Callable[..., Shapes]
    sizes: tuple[str, ...] = ()
    sized_by: str = ""


_BANK = (("hidden", "bank"), "rnn_params/rnn_to_controls/w")
KINDS = {
    "velo": Kind("VeLO", velo_shapes, *_BANK),
    "celo": Kind("Celo", celo_shapes, *_BANK),
    "celo_adam": Kind("Celo-Adam", celo_adam_shapes, ("hidden",), "rnn_params/step_size/w"),
    "celo2": Kind("Celo2", celo2_shapes),
    "adafac_mlp": Kind("the adafac MLP", adafac_mlp_shapes),
}


def find_kind(named: Mapping[str, Any], caller: str) -> str:
    """Returns the key of `KINDS` whose names the leaves have.

    VeLO and Celo have the same names; VeLO's LSTM has 30 inputs, Celo's 18.

    Args:
      named: leaves by name.
      caller: start of error messages.

    Raises:
      ValueError: when they are of no kind; the message compares them with the nearest one.
    """
    num_features = jnp.shape(named.get("rnn_params/linear_1/w", 0))[:1]
    kinds = [name for name in KINDS if name != ("velo" if num_features == (18,) else "celo")]
    nearest = min(kinds, key=lambda name: len(_names(KINDS[name]) ^ named.keys()))
    _check_names(KINDS[nearest], named, caller)
    return nearest


def sizes_of(name: str, theta: Theta) -> dict[str, int]:
    """Returns the sizes of a theta that `check_theta` has accepted, such as ``{"hidden": 64}``."""
    kind = KINDS[name]
    if not kind.sizes:
        return {}
    return dict(zip(kind.sizes, jnp.shape(leaves_by_name(theta)[kind.sized_by]), strict=False))


def theta_from_named(name: str, named: Mapping[str, np.ndarray]) -> Theta:
    """Makes theta from a flat dict of arrays, named as the published files name them.

    Args:
      name: of the optimizer: velo, celo, celo_adam, celo2 or adafac_mlp.
      named: for example ``{"rnn_params/step_size/w": ..., "ff_mod_stack/~/w0__0": ...}``, with
        or without ``theta/`` in front of every name. Sizes are read from the shapes.

    Returns:
      theta in float32, for ``apply(theta, num_steps=...)`` of that optimizer.

    Raises:
      ValueError: when names are missing or unknown (both are listed), shapes do not fit one
        another, or values are not finite floating-point numbers.
    """
    check_known("optimizer", name, KINDS)
    caller = f"theta_from_named({name!r})"
    plain = {str(key).removeprefix("theta/"): value for key, value in named.items()}
    if len(plain) != len(named):
        raise ValueError(f"{caller}: names occur with and without 'theta/' in front.")
    return theta_from_leaves(name, plain, caller)


def theta_from_leaves(name: str, named: Mapping[str, Any], caller: str) -> Theta:
    """Makes theta from its leaves by name, and checks them.

    Args:
      name: a key of `KINDS`.
      named: the leaves.
      caller: start of error messages.

    Raises:
      ValueError: see `theta_from_named`.
    """
    leaves = _check_leaves(KINDS[name], named, caller)
    for path, value in leaves.items():
        array = np.asarray(value)
        with np.errstate(over="ignore"):  # too large for float32: infinite, hence refused
            is_usable = jnp.issubdtype(array.dtype, jnp.floating) and np.all(
                np.isfinite(array.astype(np.float32))
            )
        if not is_usable:
            raise ValueError(f"{caller}: {'/'.join(path)} must hold finite floating-point numbers.")
        leaves[path] = jnp.asarray(array, jnp.float32)
    return unflatten_dict(leaves)


def check_theta(name: str, theta: Theta) -> None:
    """Checks names and shapes of the meta-parameters of an optimizer of any size.

    Args:
      name: a key of `KINDS`; the start of error messages.
      theta: what `init` of that optimizer returns.

    Raises:
      ValueError: when `theta` is of another structure.
    """
    if not isinstance(theta, Mapping):
        raise ValueError(f"{name}: theta must be a dict as `init` makes it, got {type(theta)}.")
    _check_leaves(KINDS[name], leaves_by_name(theta), name)


def leaves_by_name(tree: Any, path: Path = ()) -> dict[str, Any]:
    """Returns the leaves of nested dicts by name, such as ``"rnn_params/step_size/w"``."""
    if not isinstance(tree, Mapping):
        return {"/".join(path): tree}
    leaves: dict[str, Any] = {}
    for key, branch in tree.items():
        leaves.update(leaves_by_name(branch, (*path, str(key))))
    return leaves


def _names(kind: Kind) -> set[str]:
    return {"/".join(path) for path in kind.shapes(*[1 for _ in kind.sizes])}


def _check_names(kind: Kind, named: Mapping[str, Any], caller: str) -> None:
    missing = sorted(_names(kind) - named.keys())
    unknown = sorted(named.keys() - _names(kind))
    if missing or unknown:
        causes = []
        if missing:
            causes.append(f"missing: {_first_names(missing)}")
        if unknown:
            causes.append(f"not known: {_first_names(unknown)}")
        raise ValueError(
            f"{caller}: these are not {kind.title}'s meta-parameters; {'; '.join(causes)}."
        )


def _check_leaves(kind: Kind, named: Mapping[str, Any], caller: str) -> dict[Path, Any]:
    """Returns the leaves by path.

    Raises:
      ValueError: when names or shapes are not those of one theta of this kind.
    """
    _check_names(kind, named, caller)
    sizes: tuple[int, ...] = ()
    origin = ""
    if kind.sizes:
        sizes = jnp.shape(named[kind.sized_by])
        if len(sizes) != 2 or 0 in sizes:
            raise ValueError(
                f"{caller}: {kind.sized_by} must be [{kind.sizes[0]}, {(*kind.sizes, 1)[1]}], got "
                f"{sizes}. (A population of thetas is used under jax.vmap.)"
            )
        sizes = sizes[: len(kind.sizes)]
        given = " and ".join(f"{k}={n}" for k, n in zip(kind.sizes, sizes, strict=True))
        origin = f"with {given} (from {kind.sized_by}), "
    shapes = kind.shapes(*sizes)
    wrong = []
    for path, shape in shapes.items():
        leaf = "/".join(path)
        if jnp.shape(named[leaf]) != shape:
            wrong.append(f"{leaf} is {jnp.shape(named[leaf])}, not {shape}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{caller}: {origin}{'; '.join(wrong[:3])}{more}.")
    return {path: named["/".join(path)] for path in shapes}


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(name[:60] for name in names[:6]) + more
