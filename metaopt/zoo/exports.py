"""An exported learned optimizer: one folder with weights (safetensors) and a JSON spec.

The spec holds everything else: the optimizer's name and settings, theta's tree with dtypes and
shapes, what is known of its meta-training, and the checksum of the weights. Nothing that is read
is executed, and no name in a file leads to another file.

An older export is replaced by one atomic exchange, that of its spec: new weights are written beside
the old ones under their checksum, then the spec that has this checksum replaces the old spec, then
the new weights replace the old ones. `load` takes the weights that have the checksum of the spec,
so that it finds a whole export at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from metaopt import zoo
from metaopt._version import __version__
from metaopt.core.checks import check_json, show
from metaopt.core.files import (
    LARGEST,
    PART,
    fcntl,
    parse_json,
    read_plain,
    sweep_parts,
    write_whole,
)
from metaopt.core.trees import check_same_structure as check_same_structure
from metaopt.core.types import LearnedOptimizer, Theta
from metaopt.optimizers import OPTIMIZERS, Settings, layouts

FORMAT = 2
SPEC, WEIGHTS = "spec.json", "theta.safetensors"
LARGEST_PUBLISHED = 1 << 28  # bytes; the published VeLO has 9 million
BESIDE = re.compile(r"theta-[0-9a-f]{64}\.safetensors")  # new weights, before they get their name


class CheckpointError(ValueError):
    """A folder or file that cannot be loaded; the message names the file and the cause."""


@dataclass(frozen=True)
class Exported:
    """A learned optimizer with its meta-parameters.

    Attributes:
      settings: the optimizer's settings, of a class in `metaopt.optimizers.OPTIMIZERS`.
      optimizer: the `LearnedOptimizer` with these settings.
      theta: its meta-parameters.
      trained: what is known of its meta-training (task, horizon, method, ...).
      sha256: checksum of the weights file.
    """

    settings: Settings
    optimizer: LearnedOptimizer
    theta: Theta
    trained: dict[str, Any]
    sha256: str

    @property
    def name(self) -> str:
        """The optimizer's name in `metaopt.optimizers.OPTIMIZERS`."""
        return self.settings.name

    @property
    def cost(self) -> dict[str, float] | None:
        """Inner steps and seconds of its meta-training; None where `trained` does not tell them."""
        cost = self.trained.get("cost")
        try:
            check_json("cost", cost, {"inner_steps": float, "seconds": float})
        except ValueError:  # written by something else, or by an older version
            return None
        return cost

    def apply(self, *, num_steps: Any = None) -> optax.GradientTransformationExtraArgs:
        """The optax transformation for a run of `num_steps` steps."""
        return self.optimizer.apply(self.theta, num_steps=num_steps)


def save(
    path: str | os.PathLike[str],
    settings: Settings,
    theta: Theta,
    trained: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an export folder; an older one at `path` is replaced by one atomic exchange.

    A process killed at any time leaves the old export or the new one. Other files beside an export,
    for example a model card, stay as they are.

    Args:
      path: the folder: a new one, an empty one, or that of an export.
      settings: the optimizer's settings, of a class in `metaopt.optimizers.OPTIMIZERS`.
      theta: its meta-parameters: nested dicts and tuples of float arrays.
      trained: free-form JSON data on the meta-training.

    Returns:
      The folder.

    Raises:
      ValueError: when `settings` is of another class, `trained` is no JSON data, the folder holds
        files but no export, or `load` would refuse the export, for example because theta holds NaN
        or does not fit `settings`. What is in the folder stays as it is.

    Examples:
      >>> import tempfile
      >>> from metaopt.optimizers import LSTM
      >>> settings = LSTM(hidden=4)
      >>> theta = settings.build().init(jax.random.key(0), {"w": jnp.ones(3)})
      >>> folder = save(f"{tempfile.mkdtemp()}/mine", settings, theta)
      >>> tx = load(folder).apply(num_steps=100)  # an optax transformation
    """
    if type(settings) not in OPTIMIZERS.values():
        known = ", ".join(settings.__name__ for settings in OPTIMIZERS.values())
        raise ValueError(
            f"save: settings must be one of {known} of metaopt.optimizers, got {show(settings)}. "
            "Optimizers built from your own transformations cannot be exported; keep their code "
            "beside theta."
        )
    names = Counter(name for name, _ in _named_leaves(theta))
    if collisions := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"save: theta has several leaves of the name {show(collisions[0])}; rename the keys of "
            "its dicts."
        )
    try:
        payload = save_safetensors({name: np.asarray(leaf) for name, leaf in _named_leaves(theta)})
    except Exception as error:  # safetensors and JAX raise errors of their own kinds
        raise ValueError(
            f"save: theta must hold arrays of floating-point numbers ({error})."
        ) from None
    spec = {
        "format": FORMAT,
        "metaopt": __version__,
        "optimizer": settings.name,
        "settings": dataclasses.asdict(settings),
        "trained": dict(trained or {}),
        "theta": _describe(theta),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    try:
        text = json.dumps(spec, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save: settings and trained must be plain JSON data ({error}).") from None
    return write(Path(path), text.encode(), payload, caller="save")


def write(folder: Path, spec: bytes, weights: bytes, caller: str) -> Path:
    """Writes the two files of an export, once `load` would accept them.

    Args:
      folder: a new folder, an empty one, or that of an export, which is replaced.
      spec: content of the spec.
      weights: content of the weights file.
      caller: the beginning of messages.

    Returns:
      `folder`.

    Raises:
      CheckpointError: when `load` would refuse the export, or the folder holds files but no export.
    """
    try:
        sha256 = _parse(spec, weights, Path()).sha256
    except CheckpointError as error:
        raise CheckpointError(f"{caller}: load would refuse this export: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder):
        _finish_exchange(folder, _replaceable(folder, caller))
        beside = _beside(folder, sha256)
        write_whole(beside, weights)
        try:
            write_whole(folder / SPEC, spec)
        except OSError:
            beside.unlink()
            raise
        os.replace(beside, folder / WEIGHTS)
    return folder


def _beside(folder: Path, sha256: str) -> Path:
    return folder / f"theta-{sha256}.safetensors"


def _finish_exchange(folder: Path, sha256: str) -> None:
    """Completes or removes what a process left that was killed while it wrote the export.

    Args:
      folder: of the export.
      sha256: checksum of the weights in its spec.
    """
    sweep_parts(folder)
    for path in folder.iterdir():
        if BESIDE.fullmatch(path.name):
            if path == _beside(folder, sha256):
                os.replace(path, folder / WEIGHTS)
            else:
                path.unlink()


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Waits while another process writes this export. The lock needs no file of its own."""
    if fcntl is None:  # Windows cannot lock folders
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replaceable(folder: Path, caller: str) -> str:
    """Checks that the folder is empty or that of an export; the checksum in its spec, or ""."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not (BESIDE.fullmatch(name) or PART.fullmatch(name))]
    if SPEC in names:
        with contextlib.suppress(ValueError):
            spec = parse_json(read_plain(folder / SPEC))
            if isinstance(spec, dict) and {"format", "optimizer", "theta"} <= spec.keys():
                return str(spec.get("sha256"))
        foreign = [SPEC]
    if foreign:
        raise CheckpointError(
            f"{caller}: {folder} holds {show(foreign[0])} and no export, so nothing is written "
            "there; choose another folder, or move away what is in this one."
        )
    return ""


def load(path: str | os.PathLike[str]) -> Exported:
    """Reads an export folder, the run folder of `metaopt train` that holds one, or a zoo entry.

    A name of `metaopt.zoo.names()` is that entry unless a folder of this name is there.

    Args:
      path: the folder, or the name.

    Raises:
      CheckpointError: when the folder is missing, truncated, foreign, or of another format.

    Examples:
      >>> tx = load("lstm-mlp-mnist").apply(num_steps=100)  # an optax transformation
    """
    folder = _export_folder(path)
    while True:
        before = _identity(folder)
        spec = _read(folder / SPEC)
        try:
            return _parse(spec, _read_weights(folder, spec), folder)
        except CheckpointError:
            if _identity(folder) == before:  # else another process replaces the export just now
                raise


def _identity(folder: Path) -> list[tuple[int, int]]:
    """Changes whenever a file of the export is replaced."""
    identity = []
    for name in (SPEC, WEIGHTS):
        with contextlib.suppress(OSError):
            status = (folder / name).lstat()
            identity.append((status.st_ino, status.st_mtime_ns))
    return identity


def _read_weights(folder: Path, spec: bytes) -> bytes:
    """The weights; those beside them while, or where, they have not got their name yet."""
    sha256 = _parse_spec(spec, folder / SPEC)["sha256"]
    beside = _beside(folder, sha256)
    if BESIDE.fullmatch(beside.name) and beside.is_file():
        return _read(beside)
    return _read(folder / WEIGHTS)


def _parse(spec_payload: bytes, payload: bytes, folder: Path) -> Exported:
    """The export of which the two files have these contents; `folder` is for messages."""
    spec = _parse_spec(spec_payload, folder / SPEC)
    if hashlib.sha256(payload).hexdigest() != spec["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS}: its checksum is not the one in {SPEC}; the file is truncated or "
            "changed. Export it again."
        )
    try:
        leaves = load_safetensors(payload)
    except Exception as error:
        raise CheckpointError(f"{folder / WEIGHTS}: not a safetensors file ({error}).") from None
    settings = _settings(spec["optimizer"], spec["settings"], folder / SPEC)
    optimizer = settings.build()
    try:
        theta = _rebuild(spec["theta"], leaves, folder / WEIGHTS)
        optimizer.apply(theta, num_steps=1)  # raises unless it is a theta of this optimizer
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: theta does not fit the settings of {settings.name!r} in {SPEC}: "
            f"{error}"
        ) from None
    return Exported(
        settings=settings,
        optimizer=optimizer,
        theta=theta,
        trained=spec["trained"],
        sha256=spec["sha256"],
    )


def load_published(path: str | os.PathLike[str]) -> Exported:
    """Reads meta-parameters that the authors of VeLO, Celo or Celo2 published.

    Needs neither TensorFlow nor gin nor haiku. Reading is safe for files of unknown origin: msgpack
    holds data only, nothing is executed.

    Args:
      path: a flax msgpack file of theta (Celo's ``theta.state``), of ``{"params": theta, ...}``
        (learned_optimization), or of the tuple ``(theta, ...)``. The optimizer and its sizes are
        read from the names and shapes: VeLO, Celo, Celo-Adam, Celo2, or the adafac MLP.

    Returns:
      The optimizer with its theta in float32: ``load_published(path).apply(num_steps=...)``.

    Raises:
      CheckpointError: when the file is missing, no regular file, larger than 256 MiB, cut short,
        not msgpack, or holds other meta-parameters. The message names the file and the cause.
    """
    payload = _read(Path(path), most=LARGEST_PUBLISHED)
    caller = f"load_published({str(path)!r})"
    try:
        content = serialization.msgpack_restore(payload)
    except Exception as error:  # msgpack, flax and numpy each raise their own kinds
        cause = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{caller}: not a whole flax msgpack file ({cause[:200]})."
        ) from error
    for key in ("params", "0"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise CheckpointError(f"{caller}: holds a {kind}, not a dict of meta-parameters.")
    named = layouts.leaves_by_name(content)
    try:
        name = layouts.find_kind(named, caller)
        theta = layouts.theta_from_leaves(name, named, caller)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    settings = OPTIMIZERS[name](**layouts.sizes_of(name, theta))
    sha256 = hashlib.sha256(payload).hexdigest()
    trained = {"published": Path(path).name, "sha256": sha256}
    return Exported(settings, settings.build(), theta, trained, sha256)


def _settings(name: str, values: Mapping[str, Any], spec: Path) -> Settings:
    """The settings in a spec; a setting that it lacks has its default."""
    if name not in OPTIMIZERS:
        raise CheckpointError(
            f"{spec}: unknown optimizer {show(name)}; this version knows {', '.join(OPTIMIZERS)}."
        )
    known = [field.name for field in dataclasses.fields(OPTIMIZERS[name])]
    if unknown := [key for key in values if key not in known]:
        raise CheckpointError(
            f"{spec}: {name!r} has no setting {show(unknown[0])}; it has {', '.join(known)}."
        )
    tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    try:
        return OPTIMIZERS[name](**tuples)
    except ValueError as error:
        raise CheckpointError(f"{spec}: {error}") from None


def _named_leaves(tree: Any, prefix: str = ""):
    """Yields (name, array); the name is the dict keys and tuple indices on the way, by '/'."""
    if isinstance(tree, Mapping):
        for key in sorted(tree):
            yield from _named_leaves(tree[key], f"{prefix}{key}/")
    elif isinstance(tree, (tuple, list)):
        for index, child in enumerate(tree):
            yield from _named_leaves(child, f"{prefix}{index}/")
    else:
        yield prefix.rstrip("/"), tree


def _describe(tree: Any) -> Any:
    """theta's tree as JSON: dicts as objects, tuples as lists, leaves as ``"float32[2,20]"``."""
    if isinstance(tree, Mapping):
        return {str(key): _describe(child) for key, child in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [_describe(child) for child in tree]
    array = np.asarray(tree)
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _rebuild(described: Any, leaves: Mapping[str, np.ndarray], where: Path) -> Theta:
    """The tree that `_describe` described, with the arrays of the weights file `where`."""
    used = set()

    def walk(node: Any, prefix: str) -> Any:
        if isinstance(node, dict):
            return {key: walk(child, f"{prefix}{key}/") for key, child in node.items()}
        if isinstance(node, list):
            return tuple(walk(child, f"{prefix}{index}/") for index, child in enumerate(node))
        name = prefix.rstrip("/")
        if name not in leaves:
            raise CheckpointError(f"{where}: leaf {name!r} of the spec is missing.")
        description = _describe(leaves[name])
        if description != node:
            raise CheckpointError(
                f"{where}: leaf {name!r} is {description}, but the spec says {node}."
            )
        if not jnp.issubdtype(leaves[name].dtype, jnp.floating):
            raise CheckpointError(
                f"{where}: leaf {name!r} of theta is {description}; theta holds floating-point "
                "numbers."
            )
        # float64 becomes float32, and may become inf, unless JAX has it enabled.
        dtype = jax.dtypes.canonicalize_dtype(leaves[name].dtype)
        with np.errstate(over="ignore"):
            array = leaves[name].astype(dtype)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{where}: leaf {name!r} holds NaN or inf as {dtype}.")
        used.add(name)
        return jnp.asarray(array)

    theta = walk(described, "")
    if extra := sorted(leaves.keys() - used):
        raise CheckpointError(f"{where}: leaves that the spec does not know: {extra}.")
    return theta


def _export_folder(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"load: path must be a str or a pathlib.Path, got {show(path)}.")
    folder = Path(path)
    try:
        if not (folder / SPEC).exists() and (folder / "export" / SPEC).exists():
            return folder / "export"
        exists = folder.is_dir()
    except OSError:  # a name that no folder can have
        exists = False
    if not exists and str(path) in zoo.names():
        return zoo.folder(str(path))
    if not exists:
        raise CheckpointError(
            f"{str(folder)[:300]}: there is no such folder. Give one written by `metaopt train` or "
            f"`metaopt.save`, or a name of the zoo ({', '.join(zoo.names())})."
        )
    return folder


def _read(path: Path, most: int = LARGEST) -> bytes:
    try:
        return read_plain(path, most)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _parse_spec(payload: bytes, path: Path) -> dict[str, Any]:
    try:
        spec = parse_json(payload)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(spec, dict) or type(spec.get("format")) is not int:
        raise CheckpointError(f"{path}: not the spec of a metaopt export (no format number).")
    if spec["format"] < 1:
        raise CheckpointError(f"{path}: there is no format {spec['format']}; formats begin at 1.")
    if spec["format"] < FORMAT:
        raise CheckpointError(
            f"{path}: format {spec['format']} was written by metaopt {show(spec.get('metaopt'))}; "
            f"this version reads format {FORMAT}. Load it with that version, and save theta again "
            "with this one."
        )
    if spec["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {show(spec['format'])} is newer than this version reads ({FORMAT}); "
            f"it was written by metaopt {show(spec.get('metaopt'))}. Upgrade metaopt-jax."
        )
    kinds = {"optimizer": str, "settings": dict, "trained": dict, "theta": dict, "sha256": str}
    for field, kind in kinds.items():
        if not isinstance(spec.get(field), kind):
            raise CheckpointError(f"{path}: field {field!r} is missing or not a {kind.__name__}.")
    return spec


def theta_size(theta: Theta) -> int:
    """The number of floats in theta."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(theta))
