"""The import rule: data flows one way, and a room of the package imports only rooms before it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import metaopt

ROOT = Path(metaopt.__file__).parent
# What each room may import of metaopt, beside itself and `_version`.
ALLOWED = {
    "core": set(),
    "datasets": {"core"},
    "tasks": {"core", "datasets"},
    "optimizers": {"core"},
    "guards": {"core"},
    "meta": {"core", "tasks", "optimizers"},
    "zoo": {"core", "optimizers"},
    "evaluation": {"core", "datasets", "tasks", "optimizers", "guards", "zoo"},
    "report": {"core", "evaluation"},
    "jobs": {"core", "datasets", "tasks", "optimizers", "meta", "zoo", "evaluation", "report"},
    "cli": {"core", "jobs"},
}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem == "cli")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path):
    """Full names of the modules, or names in modules, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_rooms_import_only_what_comes_before_them():
    for path in SOURCES:
        own = room(path)
        assert own in ALLOWED, f"{own} is new: say in ALLOWED what it may import"
        parts = [name.split(".") for name in imported(path) if name.startswith("metaopt.")]
        others = {part[1] for part in parts} - {own, "_version"}
        assert others <= ALLOWED[own], f"{path} imports {others - ALLOWED[own]}"


def test_no_file_imports_what_would_execute_a_file_or_be_heavy():
    for path in SOURCES:
        names = set(imported(path))
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"pickle", "gin", "haiku", "tensorflow", "torch"}, path
        assert "evosax" not in roots or room(path) == "meta", path


def modules_after(code: str) -> set[str]:
    """What a fresh process has imported after running `code`."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_light():
    assert not modules_after("import metaopt") & {"jax", "numpy", "flax", "optax", "evosax"}


@pytest.mark.parametrize("package", [metaopt, metaopt.datasets, metaopt.evaluation])
def test_a_lazy_package_offers_what_it_shows_to_type_checkers(package):
    """Its names stand in it twice: as imports for type checkers, and in a table."""
    (block,) = [
        node
        for node in ast.parse(Path(package.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    for node in block.body:
        for alias in node.names:
            code = f"from {node.module} import {alias.name} as value"
            exec(code, values := {})
            assert getattr(package, alias.asname) is values["value"]


def test_records_are_read_and_drawn_without_jax():
    code = "import metaopt.report, metaopt.evaluation.records, metaopt.evaluation.statistics"
    assert not modules_after(code) & {"jax", "flax", "optax", "orbax"}


def test_data_sets_are_listed_without_jax():
    found = modules_after("from metaopt.jobs.data import DataJob, run; run(DataJob('list'))")
    assert "spirals" in found  # a row of the table
    assert not found & {"jax", "flax", "optax"}


def test_the_package_imports_where_there_is_no_fcntl():
    """As on Windows, where `msvcrt` locks files instead."""
    hide = "import sys, types, jax, orbax.checkpoint; sys.modules['fcntl'] = None; "
    hide += "sys.modules['msvcrt'] = types.ModuleType('msvcrt'); "
    found = modules_after(f"{hide}import metaopt; metaopt.load; import metaopt.meta.loop")
    assert "metaopt.zoo.exports" in found


def test_public_names_are_those_that_type_checkers_see():
    """The names that are imported when they are first used, and those under TYPE_CHECKING."""
    text = (ROOT / "__init__.py").read_text()
    static = set(re.findall(r" as (\w+)$", text.partition("if TYPE_CHECKING:")[2], re.M))
    lazy = {*metaopt._MODULES, *metaopt._NAMES}
    assert static == lazy
    assert all(getattr(metaopt, name) is not None for name in lazy)
    assert lazy <= set(dir(metaopt))
