"""Checks of arguments at the library's boundary: which one, what was given, what it must be."""

import dataclasses
import difflib
import math
import numbers
import operator
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_integer(where: str, value: Any, least: int | None = None) -> None:
    """Raises `ValueError` unless `value` is an integer, of any kind but bool, of at least `least`.

    Args:
      where: how the message calls it, for example ``"race: n_t"``.
      value: what was given; it must be concrete.
      least: the smallest legal value.
    """
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise ValueError(f"{where} must be an integer, got {short(value)}.")
    if least is not None and whole < least:
        raise ValueError(f"{where} must be at least {least}, got {value}.")


def check_number(
    where: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises `ValueError` unless `value` is a finite real number within the bounds given.

    Args:
      where: how the message calls it.
      value: what was given; it must be concrete.
      least, most: bounds that are legal values; above, below: bounds that are not.
    """
    number = None
    if not isinstance(value, bool | str | bytes) and getattr(value, "shape", ()) == ():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
    if number is None or not math.isfinite(number):
        raise ValueError(f"{where} must be a finite number, got {short(value)}.")
    legal = (
        (above is None or number > above)
        and (least is None or number >= least)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    if not legal:
        raise ValueError(f"{where} must {_bounds(least, above, most, below)}, got {value}.")


def _bounds(
    least: float | None, above: float | None, most: float | None, below: float | None
) -> str:
    if most is None and below is None:
        if above is None:
            return "not be negative" if least == 0 else f"be at least {least}"
        return "be positive" if above == 0 else f"be above {above}"
    low = f"({above}" if least is None else f"[{least}"
    high = f"{below})" if most is None else f"{most}]"
    return f"be in {low}, {high}"


def check_choice(where: str, value: Any, allowed: Any) -> None:
    """Raises `ValueError` unless `value` is one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(allowed)}, got {short(value)}.")


def check_known(kind: str, name: str, table: Iterable[str]) -> None:
    """Raises `ValueError` with the near matches unless `name` is in `table`."""
    table = list(table)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(table)}."
        raise ValueError(f"unknown {kind} {name!r}; {hint}")


def check_callable(where: str, value: Any) -> None:
    """Raises `ValueError` unless `value` can be called."""
    if not callable(value):
        raise ValueError(f"{where} must be a function, got {short(value)}.")


def check_fields(settings: Any) -> None:
    """Raises `ValueError` for the first field of a dataclass whose value is not of its type.

    Types are what its annotations say. Floats must be finite.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        where = f"{type(settings).__name__}.{field.name}"
        _check_type(where, getattr(settings, field.name), hints[field.name])


def _check_type(where: str, value: Any, kind: Any) -> None:
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in choices and value is None:
            return
        (kind,) = [choice for choice in choices if choice is not type(None)]
        return _check_type(where, value, kind)
    if origin is Literal:
        return check_choice(where, value, choices)
    if origin is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{where} must be a tuple, got {short(value)}.")
        for index, entry in enumerate(value):
            _check_type(f"{where}[{index}]", entry, choices[0])
        return None
    if kind is int:
        return check_integer(where, value)
    if kind is float:
        return check_number(where, value)
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be a {kind.__name__}, got {short(value)}.")
    return None


def check_json(where: str, value: Any, kind: Any) -> None:
    """Raises `ValueError` unless parsed JSON is of a kind, with the path to what is not.

    Args:
      where: how the message calls it.
      value: what `json.loads` gave.
      kind: a type (float: any number); ``float | None``, null also; ``[kind]``, a list of such;
        ``{str: kind}``, an object of such values; ``{"key": kind, ...}``, an object with at least
        these keys.
    """
    if isinstance(kind, types.UnionType):
        if value is not None:
            check_json(where, value, get_args(kind)[0])
    elif isinstance(kind, list):
        _of(where, value, list)
        for index, entry in enumerate(value):
            check_json(f"{where}[{index}]", entry, kind[0])
    elif isinstance(kind, dict):
        _of(where, value, dict)
        named = kind if str not in kind else dict.fromkeys(value, kind[str])
        for key, inside in named.items():
            if key not in value:
                raise ValueError(f"{where} lacks {key!r}.")
            check_json(f"{where}.{short(key)}", value[key], inside)
    else:
        _of(where, value, kind)


def _of(where: str, value: Any, kind: type) -> None:
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        names = {dict: "an object", list: "a list", str: "a string", float: "a number"}
        wanted = names.get(kind, f"of type {kind.__name__}")
        raise ValueError(f"{where} must be {wanted}, got {short(value)}.")


def check_file_name(where: str, name: str) -> None:
    """Raises `ValueError` unless `name` is that of a file in its folder, not a path elsewhere."""
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise ValueError(f"{where} must be the name of a file in this folder, got {short(name)}.")


def short(value: Any) -> str:
    """What messages show of `value`: the start of its `repr`; of an array dtype and shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, numbers.Real):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
