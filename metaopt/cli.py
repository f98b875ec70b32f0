"""The command line: ``metaopt train | specialise | evaluate | report | data | zoo | bench``.

Each command is a module of `metaopt.jobs`. Only the module of the given command is imported, so
that ``metaopt report`` and ``metaopt zoo`` start without JAX.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from metaopt.core.checks import check_known, printable
from metaopt.core.extras import MissingExtra
from metaopt.jobs.subcommands import subcommands

# Command -> the settings class in the module of `metaopt.jobs` of the same name.
COMMANDS = {
    "train": "TrainJob",
    "specialise": "SpecialiseJob",
    "evaluate": "EvaluateJob",
    "report": "ReportJob",
    "data": "DataJob",
    "zoo": "ZooJob",
    "bench": "BenchJob",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a user's mistake is one line on stderr and exit code 2."""
    if "" not in sys.path:  # a user's own task is a module in the current folder
        sys.path.insert(0, "")
    for stream in (sys.stdout, sys.stderr):  # a locale may lack characters of names and help texts
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whatever read the output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, MissingExtra) as error:
        print(f"metaopt: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metaopt: interrupted; give the command again to go on.", file=sys.stderr)
        return 130
    return 0


def _run(arguments: Sequence[str]) -> None:
    if not arguments:
        raise ValueError(f"give a command: {', '.join(COMMANDS)}. See metaopt --help.")
    command, *rest = arguments
    if command in ("-h", "--help"):
        commands = subcommands({name: _job_class(name) for name in COMMANDS})
        parse(commands, ["--help"], "metaopt")
    check_known("command", command, COMMANDS)
    job = parse(_job_class(command), rest, f"metaopt {command}")
    module = importlib.import_module(f"metaopt.jobs.{command}")
    try:
        module.run(job)
    except SystemExit as stop:
        if type(stop) is not SystemExit:  # `Terminated` after SIGTERM, with a status of its own
            raise
        if isinstance(stop.__context__, BrokenPipeError):  # rich ends the process then
            raise stop.__context__ from None
        raise ValueError(
            f"{command}: a function that it called, perhaps of your own task, ended it by "
            f"sys.exit({stop.code!r}); raise an error there instead."
        ) from stop


def _job_class(command: str) -> Any:
    return getattr(importlib.import_module(f"metaopt.jobs.{command}"), COMMANDS[command])


registry = ConstructorRegistry()


@registry.primitive_rule
def _separated_by_commas(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Tuples of names and numbers are one word: ``--learned.base sgd,adam``."""
    kinds = {(kind, ...): kind for kind in (str, int, float)}
    kind = kinds.get(get_args(info.type)) if info.type_origin is tuple else None
    if kind is None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()},...",
        instance_from_str=lambda words: tuple(
            kind(entry.strip()) for entry in words[0].split(",") if entry.strip()
        ),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def parse(settings: Any, arguments: Sequence[str], prog: str) -> Any:
    """Parses the arguments of a command.

    Raises:
      ValueError: when tyro refuses them; its message, which is a box, becomes one line.
      SystemExit: after the help text.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                settings,
                args=list(arguments),
                prog=prog,
                config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagConversionOff),
                registry=registry,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_one_line(box.getvalue())} See {prog} --help.") from None


def _one_line(box: str) -> str:
    """The message in a box of tyro, with the flags or subcommands that it suggests."""
    lines = [line.strip(" │") for line in box.strip().splitlines()[1:]]  # without the title
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch("[╰─╯-]{9,}", line):
            parts.append([])
        elif line:
            parts[-1].append(line)
    message, *hints = [part for part in parts if part]  # a title in ASCII has a rule below it
    # Messages about the value of a field name the field; only those of a flag need the prefix.
    text = re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(message)).rstrip(".?")
    for title, *suggestions in hints:
        flags = _suggested_flags(suggestions)
        if title == "Perhaps you meant:" and len(flags) <= 3:
            return f"{text}; perhaps you meant {' or '.join(flags)}."
    for hint in hints:
        if hint[0].startswith("Available subcommands: "):
            return f"{text}; {' '.join(hint).replace('Available', 'available')}."
    return f"{text}."


def _suggested_flags(lines: Sequence[str]) -> list[str]:
    """``["--learned.base of learned:l3rs"]`` from the lines of a suggestion of tyro."""
    flags = []
    for line in lines:
        if line.startswith("--"):
            flags.append(line.split()[0])
        elif (place := re.fullmatch(r"in metaopt .*?(\w+:\w+) --help", line)) and flags:
            if " of " not in flags[-1]:
                flags[-1] += f" of {place[1]}"
    return flags
