"""Checks of arguments: what passes, and the whole message of what does not."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.core import checks

INTEGERS = [3, np.int64(3), np.array(3), jnp.int32(3)]
NO_INTEGERS = {
    "2.0": 2.0,
    "'20'": "20",
    "True": True,
    "None": None,
    "nan": math.nan,
    "float32[]": jnp.float32(2),
    "int32[2]": jnp.arange(2),
}
NUMBERS = [3, 0.5, np.float32(0.5), jnp.float32(0.5), np.array(2), 10**300]
NO_NUMBERS = {
    "nan": math.nan,
    "-inf": -math.inf,
    "'0.1'": "0.1",
    "b'0.1'": b"0.1",
    "True": True,
    "None": None,
    "[0.1]": [0.1],
    "float32[1]": jnp.ones(1),
    "1j": 1j,
    f"1{'0' * 76}...": 10**400,
}


def refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_integers_of_every_kind_pass():
    for value in INTEGERS:
        checks.check_integer("f: n", value, 3)


@pytest.mark.parametrize("shown", NO_INTEGERS)
def test_what_is_no_integer_is_refused(shown):
    message = f"f: n must be an integer, got {shown}."
    refused(lambda: checks.check_integer("f: n", NO_INTEGERS[shown]), message)


def test_an_integer_below_the_least_is_refused():
    refused(lambda: checks.check_integer("f: n", 0, 1), "f: n must be at least 1, got 0.")


def test_numbers_of_every_kind_pass():
    for value in NUMBERS:
        checks.check_number("f: x", value)


@pytest.mark.parametrize("shown", NO_NUMBERS)
def test_what_is_no_finite_number_is_refused(shown):
    message = f"f: x must be a finite number, got {shown}."
    refused(lambda: checks.check_number("f: x", NO_NUMBERS[shown]), message)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "message"),
    [
        ({"least": 0}, 0, -0.1, "not be negative"),
        ({"least": 2}, 2, 1.9, "be at least 2"),
        ({"above": 0}, 0.1, 0, "be positive"),
        ({"above": 2}, 2.1, 2, "be above 2"),
        ({"least": 0, "below": 1}, 0, 1, "be in [0, 1)"),
        ({"above": 0, "most": 1}, 1, 0, "be in (0, 1]"),
    ],
)
def test_bounds_of_numbers(bounds, inside, outside, message):
    checks.check_number("f: x", inside, **bounds)
    refused(
        lambda: checks.check_number("f: x", outside, **bounds),
        f"f: x must {message}, got {outside}.",
    )


@pytest.mark.parametrize(("value", "shown"), [("c", "'c'"), (None, "None"), (["a"], "['a']")])
def test_a_choice_is_one_of_those_allowed(value, shown):
    checks.check_choice("f: kind", "a", ("a", "b"))
    message = f"f: kind must be one of a, b, got {shown}."
    refused(lambda: checks.check_choice("f: kind", value, ("a", "b")), message)


def test_an_unknown_name_is_refused_with_the_near_ones_or_with_all():
    table = {"adam": 1, "sgd": 2}
    checks.check_known("base", "adam", table)
    unknown = lambda name: lambda: checks.check_known("base", name, table)
    refused(unknown("adamm"), "unknown base 'adamm'; did you mean adam?")
    refused(unknown("x"), "unknown base 'x'; known: adam, sgd.")


def test_a_function_can_be_called():
    checks.check_callable("f: fn", len)
    refused(lambda: checks.check_callable("f: fn", 3), "f: fn must be a function, got 3.")


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 1
    rate: float = 0.1
    name: str = "a"
    on: bool = False
    kind: Literal["a", "b"] = "a"
    ends: tuple[int, ...] = (1, 2)
    limit: int | None = None
    out: Path = Path("x")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 2.5, "steps must be an integer, got 2.5."),
        ("rate", math.nan, "rate must be a finite number, got nan."),
        ("name", 3, "name must be a str, got 3."),
        ("on", 1, "on must be a bool, got 1."),
        ("kind", "c", "kind must be one of a, b, got 'c'."),
        ("ends", [1], "ends must be a tuple, got [1]."),
        ("ends", (1, "2"), "ends[1] must be an integer, got '2'."),
        ("limit", "3", "limit must be an integer, got '3'."),
        ("out", "runs", "out must be a Path, got 'runs'."),
    ],
)
def test_a_field_has_a_value_of_its_type(field, value, message):
    checks.check_fields(Settings())
    checks.check_fields(Settings(rate=1, limit=3))
    refused(lambda: checks.check_fields(Settings(**{field: value})), f"Settings.{message}")


KIND = {"name": str, "sizes": [int], "loss": float | None, "points": {str: float}}
GOOD = {"name": "a", "sizes": [1, 2], "loss": None, "points": {"x": 1, "y": 0.5}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "record must be an object, got []."),
        ({}, "record lacks 'name'."),
        ({**GOOD, "name": 3}, "record.'name' must be a string, got 3."),
        ({**GOOD, "sizes": 3}, "record.'sizes' must be a list, got 3."),
        ({**GOOD, "sizes": [1, True]}, "record.'sizes'[1] must be of type int, got True."),
        ({**GOOD, "loss": "a"}, "record.'loss' must be a number, got 'a'."),
        ({**GOOD, "points": {"x": None}}, "record.'points'.'x' must be a number, got None."),
    ],
)
def test_json_is_of_its_kind(value, message):
    checks.check_json("record", GOOD, KIND)
    checks.check_json("record", {**GOOD, "loss": 1, "more": None}, KIND)
    refused(lambda: checks.check_json("record", value, KIND), message)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/a", "a\0"])
def test_a_file_name_leads_nowhere_else(name):
    checks.check_file_name("record: file", "a.b")
    message = f"record: file must be the name of a file in this folder, got {name!r}."
    refused(lambda: checks.check_file_name("record: file", name), message)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a", "'a'"),
        (np.float64(0.5), "np.float64(0.5)"),
        (np.zeros((2, 3)), "float64[2, 3]"),
        (jax.random.key(0), "key<fry>[]"),
        ("x" * 100, f"'{'x' * 76}..."),
    ],
)
def test_messages_show_the_start_of_a_value_and_the_shape_of_an_array(value, shown):
    assert checks.show(value) == shown


def test_text_for_a_terminal_is_one_line_without_control():
    text = "\x1b[31mred\x1b[0m\r\nand\tthe rest \u202e\x00\x07 θ naïve"
    assert (
        checks.printable(text) == "\ufffd[31mred\ufffd[0m and the rest \ufffd\ufffd\ufffd θ naïve"
    )
