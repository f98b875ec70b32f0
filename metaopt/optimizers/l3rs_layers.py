"""The layers of an L3RS, and whether theta is made for them."""

from collections.abc import Mapping
from typing import Any, Literal

import jax

from metaopt.core.trees import check_same_structure

Variant = Literal["embedding", "none", "per_layer", "global"]


def layers_of(leaf_layers: list[str], params: Any) -> tuple[list[str], list[int]]:
    """Layer names in order of first appearance, and the layer index of every leaf."""
    if len(leaf_layers) != len(jax.tree.leaves(params)):
        raise ValueError(
            f"l3rs: layer_names gave {len(leaf_layers)} names for "
            f"{len(jax.tree.leaves(params))} leaves; give one per leaf."
        )
    names = list(dict.fromkeys(leaf_layers))
    return names, [names.index(name) for name in leaf_layers]


def check_layers(theta: Any, names: list[str], variant: Variant) -> None:
    """Raises `ValueError` for layers that theta holds nothing for."""
    known = {"embedding": theta.get("embedding"), "per_layer": theta["net"]}.get(variant)
    if known is not None and (missing := [name for name in names if name not in known]):
        raise ValueError(
            f"l3rs: theta was made for layers {sorted(known)}, but params also has {missing}. "
            'Meta-train on this structure, map names with `layer_names`, or use variant="none".'
        )


def check_parts(theta: Any, base: Any, net: Any, embedding: Any, variant: Variant) -> None:
    """Raises `ValueError` unless theta is made of such parts, for whatever layers."""
    parts = theta if isinstance(theta, Mapping) else {}
    layers = parts.get({"embedding": "embedding", "per_layer": "net"}.get(variant, ""))
    names = layers if isinstance(layers, Mapping) else ()
    expected = {"base": base, "net": dict.fromkeys(names, net) if variant == "per_layer" else net}
    if variant == "embedding":
        expected["embedding"] = dict.fromkeys(names, embedding)
    check_same_structure("l3rs: theta", expected, theta)
