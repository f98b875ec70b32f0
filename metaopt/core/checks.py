"""Checks of arguments at the library's boundary.

Each check raises a one-line `ValueError` that names the argument, the requirement and the value
given. Checks need concrete values, so they run before any tracing.
"""

import contextlib
import dataclasses
import difflib
import math
import numbers
import operator
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_integer(where: str, value: Any, least: int | None = None) -> None:
    """Checks that `value` is an integer of any type except bool.

    Args:
      where: the argument's name in the message, for example ``"race: n_t"``.
      value: the argument.
      least: the smallest legal value.

    Raises:
      ValueError: when `value` is not an integer, or below `least`.
    """
    integer = None
    if not isinstance(value, bool):
        try:
            integer = operator.index(value)
        except TypeError:
            pass
    if integer is None:
        raise ValueError(f"{where} must be an integer, got {show(value)}.")
    if least is not None and integer < least:
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
    """Checks that `value` is a finite real number within bounds.

    Args:
      where: the argument's name in the message.
      value: the argument.
      least: inclusive lower bound.
      above: exclusive lower bound.
      most: inclusive upper bound.
      below: exclusive upper bound.

    Raises:
      ValueError: when `value` is not a number, not finite, or out of bounds.
    """
    number = math.nan
    if not isinstance(value, bool | str | bytes) and getattr(value, "shape", ()) == ():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a finite number, got {show(value)}.")
    legal = (
        (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    if not legal:
        bounds = _describe_bounds(least=least, above=above, most=most, below=below)
        raise ValueError(f"{where} must {bounds}, got {value}.")


def _describe_bounds(
    *, least: float | None, above: float | None, most: float | None, below: float | None
) -> str:
    if most is None and below is None:
        if above is None:
            return "not be negative" if least == 0 else f"be at least {least}"
        return "be positive" if above == 0 else f"be above {above}"
    low = f"({above}" if least is None else f"[{least}"
    high = f"{below})" if most is None else f"{most}]"
    return f"be in {low}, {high}"


def check_choice(where: str, value: Any, allowed: Any) -> None:
    """Checks that `value` is one of the strings in `allowed`.

    Args:
      where: the argument's name in the message.
      value: the argument.
      allowed: the legal strings.

    Raises:
      ValueError: when `value` is anything else.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(allowed)}, got {show(value)}.")


def check_known(kind: str, name: str, table: Iterable[str]) -> None:
    """Checks that `name` is in `table`.

    Args:
      kind: what the names stand for, for example ``"data set"``.
      name: the name to look up.
      table: all legal names.

    Raises:
      ValueError: when `name` is not in `table`; the message lists the closest names.
    """
    names = list(table)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}."
        raise ValueError(f"unknown {kind} {name!r}; {hint}")


def check_callable(where: str, value: Any) -> None:
    """Checks that `value` can be called.

    Args:
      where: the argument's name in the message.
      value: the argument.

    Raises:
      ValueError: when `value` is not callable.
    """
    if not callable(value):
        raise ValueError(f"{where} must be a function, got {show(value)}.")


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass against its annotation; floats must be finite.

    Args:
      settings: an instance of a dataclass whose annotations are int, float, str, bool or other
        classes, `Literal` of strings, ``tuple[kind, ...]``, or unions of these and None.

    Raises:
      ValueError: for the first field whose value has another type.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        where = f"{type(settings).__name__}.{field.name}"
        _check_type(where, getattr(settings, field.name), hints[field.name])


def _check_type(where: str, value: Any, kind: Any) -> None:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is not None or type(None) not in arguments:
            kinds = [argument for argument in arguments if argument is not type(None)]
            _check_any_type(where, value, kinds)
    elif origin is Literal:
        check_choice(where, value, arguments)
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{where} must be a tuple, got {show(value)}.")
        for index, entry in enumerate(value):
            _check_type(f"{where}[{index}]", entry, arguments[0])
    elif kind is int:
        check_integer(where, value)
    elif kind is float:
        check_number(where, value)
    elif not isinstance(value, kind):
        raise ValueError(f"{where} must be a {kind.__name__}, got {show(value)}.")


def _check_any_type(where: str, value: Any, kinds: Sequence[Any]) -> None:
    """Checks that `value` is of one of several types."""
    if len(kinds) == 1:
        return _check_type(where, value, kinds[0])
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return _check_type(where, value, kind)
    names: list[str] = []
    for kind in kinds:
        origin = get_origin(kind)
        names += map(str, get_args(kind)) if origin is Literal else [(origin or kind).__name__]
    raise ValueError(f"{where} must be one of {', '.join(names)}, got {show(value)}.")


def check_json(where: str, value: Any, kind: Any) -> None:
    """Checks the structure of parsed JSON.

    Args:
      where: the document's name in the message, which goes on with the path to the wrong value.
      value: the result of `json.loads`.
      kind: the required structure. A type stands for itself, and float for any number;
        ``kind | None`` also allows null; ``[kind]`` is a list of values of that kind;
        ``{str: kind}`` is an object with values of that kind; ``{"key": kind, ...}`` is an object
        with at least these keys.

    Raises:
      ValueError: for the first value that does not fit.
    """
    if isinstance(kind, types.UnionType):
        if value is not None:
            check_json(where, value, get_args(kind)[0])
    elif isinstance(kind, list):
        _check_json_type(where, value, list)
        for index, entry in enumerate(value):
            check_json(f"{where}[{index}]", entry, kind[0])
    elif isinstance(kind, dict):
        _check_json_type(where, value, dict)
        kinds = dict.fromkeys(value, kind[str]) if str in kind else kind
        for key, inner in kinds.items():
            if key not in value:
                raise ValueError(f"{where} lacks {key!r}.")
            check_json(f"{where}.{show(key)}", value[key], inner)
    else:
        _check_json_type(where, value, kind)


def _check_json_type(where: str, value: Any, kind: type) -> None:
    types_allowed = (int, float) if kind is float else kind
    bool_by_mistake = isinstance(value, bool) and kind is not bool  # bool is a subclass of int
    if not isinstance(value, types_allowed) or bool_by_mistake:
        names = {dict: "an object", list: "a list", str: "a string", float: "a number"}
        name = names.get(kind, f"of type {kind.__name__}")
        raise ValueError(f"{where} must be {name}, got {show(value)}.")


def check_file_name(where: str, name: str) -> None:
    """Checks that `name` is a file name without a path.

    Args:
      where: the argument's name in the message.
      name: the file name.

    Raises:
      ValueError: when `name` is empty or could lead to another folder.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise ValueError(f"{where} must be the name of a file in this folder, got {show(name)}.")


def show(value: Any) -> str:
    """A short description of `value` for messages.

    Args:
      value: anything.

    Returns:
      For an array its dtype and shape; for other values at most 80 characters of their `repr`.
    """
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, numbers.Real):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """A text from an untrusted source on one line, without characters that control a terminal.

    Args:
      text: the text.

    Returns:
      It, with white space as single spaces and unprintable characters as ``\ufffd``.
    """
    line = " ".join(text.split())
    return "".join(character if character.isprintable() else "\ufffd" for character in line)
