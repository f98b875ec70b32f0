"""Networks of which a part is trained: chosen leaves, adapters, and a new read-out layer."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from metaopt.core.checks import check_callable, check_choice, check_integer, check_number, show
from metaopt.core.types import Batch, Key, Params
from metaopt.tasks.modules import Classifier
from metaopt.tasks.networks.weights import check_fits

Predicate: TypeAlias = Callable[[str], bool]
Path: TypeAlias = tuple[str, ...]
Flat: TypeAlias = dict[Path, Any]
Statistics: TypeAlias = Literal["train", "frozen"]

A, B = "lora_a", "lora_b"  # names of an adapter's two matrices in the params


class LoRA(NamedTuple):
    """Low-rank adapters of chosen kernels (Hu et al. 2021, section 4.1).

    The network computes with ``kernel + alpha / rank * a @ b``. `a`, of shape
    ``[*kernel.shape[:-1], rank]``, starts from a normal distribution with variance 1 / fan-in;
    `b`, of shape ``[rank, kernel.shape[-1]]``, starts at zero. (Flax has LoRA for NNX only.)

    Attributes:
      kernels: ``name -> bool``, which leaves get an adapter; names as ``"Dense_0/kernel"``. The
        new read-out layer gets none.
      rank: of the adapters.
      alpha: their scale.
    """

    kernels: Predicate
    rank: int = 4
    alpha: float = 8.0


class PartlyTrained(NamedTuple):
    """The functions of a network that is partly trained.

    They take `arrays`, which hold what is not trained, and then what those of `Classifier` take.
    Params hold the trained leaves alone.

    Attributes:
      arrays: ``{"frozen": params, "start": params, "model_state": tree or None}``: the leaves that
        are not trained, those that training starts from, and the pretrained model state.
      init: ``(arrays, key, x) -> params``.
      loss: as in `Classifier`, after `arrays`.
      accuracy: likewise.
      eval_loss: likewise; None: `loss`.
      keeps_state: whether the losses take a model state, which starts as that of `arrays`.
      with_keys: see `Classifier`.
    """

    arrays: dict[str, Any]
    init: Callable[..., Params]
    loss: Callable[..., Any]
    accuracy: Callable[..., jax.Array]
    eval_loss: Callable[..., jax.Array] | None
    keeps_state: bool
    with_keys: Callable[..., Batch]


def partly_trained(
    where: str,
    net: nn.Module,
    functions: Classifier,
    example: Any,
    pretrained: Any,
    *,
    trainable: Predicate | None,
    head: str | None,
    lora: LoRA | None,
    statistics: Statistics,
) -> PartlyTrained:
    """Splits a pretrained network in what is trained and what is not.

    Args:
      where: the caller's name in messages.
      net: the network.
      functions: its functions.
      example: inputs ``[1, ...]`` of the network, an array or a `jax.ShapeDtypeStruct`.
      pretrained: its collections, ``{"params": ..., "batch_stats": ...}``.
      trainable: see `metaopt.tasks.finetune`; as are the others.
      head: name of the module that starts anew.
      lora: the adapters.
      statistics: whether the model state is trained.

    Raises:
      ValueError: see `metaopt.tasks.finetune`.
    """
    check_choice(f"{where}: statistics", statistics, ("train", "frozen"))
    if not isinstance(pretrained, Mapping) or "params" not in pretrained:
        names = ", ".join(map(str, pretrained)) if isinstance(pretrained, Mapping) else None
        raise ValueError(
            f'{where}: pretrained must be the collections of net, {{"params": ..., ...}}, got '
            f"{names or show(pretrained)}."
        )
    key = jax.random.key(0)
    expected: dict[str, Any] = {"params": jax.eval_shape(functions.init, key, example)}
    stateful = functions.init_model_state is not None
    if functions.init_model_state is not None:
        expected |= jax.eval_shape(functions.init_model_state, key, example)
    if head is not None and head not in expected["params"]:
        raise ValueError(
            f"{where}: head {head!r} is not in the params of net: {', '.join(expected['params'])}."
        )
    check_fits(f"{where}: pretrained", _without(expected, head), _without(pretrained, head))
    leaves: Flat = flatten_dict(expected["params"])
    new = {path for path in leaves if path[0] == head}
    chosen = _chosen(where, leaves, trainable)
    adapted = _adapted(where, {path: leaves[path] for path in leaves if path not in new}, lora)
    if both := sorted(adapted & chosen):
        raise ValueError(
            f"{where}: leaf {_name(both[0])!r} is accepted by trainable and by lora; choose one."
        )
    trained = chosen | new
    if not trained | adapted:
        raise ValueError(
            f"{where}: nothing would be trained; give trainable, head or lora. The leaves of net "
            f"are {', '.join(map(_name, leaves))}."
        )
    added = _separable(net, example, adapted) if adapted else set()
    rank, scale = (lora.rank, lora.alpha / lora.rank) if lora else (0, 0.0)

    def init(arrays: dict[str, Any], key: Key, x: jax.Array) -> Params:
        flat: Flat = flatten_dict(arrays["start"])
        if new:
            fresh = flatten_dict(functions.init(key, x))
            flat |= {path: fresh[path] for path in new}
        for number, path in enumerate(sorted(adapted)):
            *inputs, outputs = leaves[path].shape
            k, dtype = jax.random.fold_in(key, number), leaves[path].dtype
            spread = math.prod(inputs) ** -0.5
            flat[*path, A] = spread * jax.random.normal(k, (*inputs, rank), dtype)
            flat[*path, B] = jnp.zeros((rank, outputs), dtype)
        return unflatten_dict(flat)

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of the whole params, and of the model state where that is frozen."""

        def of_part(arrays: dict[str, Any], params: Params, *rest: Any) -> Any:
            flat: Flat = flatten_dict(params)
            pairs = {path: (flat.pop((*path, A)), flat.pop((*path, B))) for path in adapted}
            flat |= flatten_dict(arrays["frozen"])
            for path in adapted - added:
                a, b = pairs[path]
                flat[path] = flat[path] + scale * (a @ b)
            add = _adds({path: pairs[path] for path in added}, scale)
            state = (arrays["model_state"],) if stateful and statistics == "frozen" else ()
            with nn.intercept_methods(add) if added else nullcontext():
                return function(unflatten_dict(flat), *state, *rest)

        return of_part

    eval_loss = functions.loss if functions.eval_loss is None else functions.eval_loss
    if statistics == "frozen":  # training is in evaluation mode, which draws no random numbers
        functions = functions._replace(loss=eval_loss, eval_loss=None, is_random=False)
    given: Flat = {path: jnp.asarray(a) for path, a in flatten_dict(pretrained["params"]).items()}
    others = {name: tree for name, tree in pretrained.items() if name != "params"}
    return PartlyTrained(
        arrays={
            "frozen": unflatten_dict({k: given[k] for k in leaves if k not in trained}),
            "start": unflatten_dict({k: given[k] for k in chosen - new}),
            "model_state": jax.tree.map(jnp.asarray, others) if stateful else None,
        },
        init=init,
        loss=whole(functions.loss),
        accuracy=whole(functions.accuracy),
        eval_loss=None if functions.eval_loss is None else whole(functions.eval_loss),
        keeps_state=stateful and statistics == "train",
        with_keys=functions.with_keys,
    )


def _without(variables: Any, head: str | None) -> dict[str, Any]:
    params = {name: tree for name, tree in variables["params"].items() if name != head}
    return {**variables, "params": params}


def _name(path: Path) -> str:
    return "/".join(path)


def _chosen(where: str, leaves: Flat, trainable: Predicate | None) -> set[Path]:
    """The leaves that `trainable` accepts."""
    if trainable is None:
        return set()
    check_callable(f"{where}: trainable", trainable)
    chosen = _accepted(f"{where}: trainable", leaves, trainable)
    if not chosen:
        raise ValueError(
            f"{where}: trainable accepts no leaf, so that nothing would be trained; the leaves of "
            f"net are {', '.join(map(_name, leaves))}."
        )
    return chosen


def _adapted(where: str, leaves: Flat, lora: LoRA | None) -> set[Path]:
    """The kernels that get an adapter."""
    if lora is None:
        return set()
    check_callable(f"{where}: lora.kernels", lora.kernels)
    check_integer(f"{where}: lora.rank", lora.rank, 1)
    check_number(f"{where}: lora.alpha", lora.alpha)
    chosen = _accepted(f"{where}: lora.kernels", leaves, lora.kernels)
    kernels = [path for path, leaf in leaves.items() if leaf.ndim >= 2]
    vectors = sorted(chosen.difference(kernels))
    if not chosen or vectors:
        wrong = f"{_name(vectors[0])!r}, which is no matrix" if vectors else "no leaf"
        raise ValueError(
            f"{where}: lora.kernels accepts {wrong}; the kernels of net are "
            f"{', '.join(map(_name, kernels))}."
        )
    return chosen


def _accepted(where: str, leaves: Flat, predicate: Predicate) -> set[Path]:
    accepted = set()
    for path in leaves:
        answer = predicate(_name(path))
        if not isinstance(answer, bool):
            raise ValueError(
                f"{where} must return True or False for the name of a leaf, got {show(answer)} for "
                f"{_name(path)!r}."
            )
        if answer:
            accepted.add(path)
    return accepted


def _separable(net: nn.Module, example: Any, adapted: set[Path]) -> set[Path]:
    """The adapted kernels of layers that are linear in their kernel and have one output axis.

    Such a layer adds its adapter as ``layer(x; a) @ b``. The sum of kernel and adapter, which the
    backward pass would keep for every layer, is then never computed.
    """
    found: set[Path] = set()

    def record(next_function, arguments, options, context):
        layer = context.module
        path = (*layer.path, "kernel")
        plain = hasattr(layer, "use_bias") and isinstance(getattr(layer, "features", None), int)
        is_call = context.method_name == "__call__" and len(arguments) == 1 and not options
        grouped = getattr(layer, "feature_group_count", 1) != 1
        if path in adapted and plain and is_call and not grouped:
            found.add(path)
        return next_function(*arguments, **options)

    def trace(key: Key, x: jax.Array) -> Any:
        with nn.intercept_methods(record):
            return net.init(key, x)

    jax.eval_shape(trace, jax.random.key(0), example)
    return found


def _adds(pairs: dict[Path, tuple[jax.Array, jax.Array]], scale: float) -> Callable[..., Any]:
    """An interceptor of Flax that adds the adapters' outputs to those of their layers."""

    def add(next_function, arguments, options, context):
        outputs = next_function(*arguments, **options)
        layer = context.module
        if context.method_name != "__call__" or (*layer.path, "kernel") not in pairs:
            return outputs
        a, b = pairs[*layer.path, "kernel"]
        narrow = layer.clone(parent=None, name=None, features=a.shape[-1], use_bias=False)
        return outputs + scale * (narrow.apply({"params": {"kernel": a}}, *arguments) @ b)

    return add
