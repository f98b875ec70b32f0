"""The type checker that jaxtyping's import hook uses in tests (conftest.py installs the hook).

It is beartype, restricted to the dtypes and shapes of arrays. Arguments of all other types are left
to the library's own checks, whose messages are tested in tests/robustness.
"""

import collections.abc
import inspect
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the annotations of `function` that contain a jaxtyping array, and no others."""
    annotations = inspect.get_annotations(function)
    function.__annotations__ = {k: hint for k, hint in annotations.items() if contains_array(hint)}
    return beartype.beartype(function) if function.__annotations__ else function


def contains_array(hint: Any) -> bool:
    """True for ``Float[Array, "n"]``, and for unions, tuples, lists, ... of such."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    if typing.get_origin(hint) is collections.abc.Callable:
        return False  # beartype does not check the arguments and results of callables
    return any(contains_array(argument) for argument in typing.get_args(hint))
