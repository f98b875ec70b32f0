"""The import rule: data flows one way, and a module may import only modules before it."""

import ast
import re
from pathlib import Path

import pytest

import metaopt

ROOT = Path(metaopt.__file__).parent
BASE = {"base", "checks", "trees", "rollouts"}
# What each module or package may import of metaopt ("" is the package itself: its version).
ALLOWED = {
    "base": set(),
    "trees": {"base"},
    "names": set(),
    "zoo": {"files", "names"},
    "checks": set(),
    "datasets": {"base", "checks", "files", "names"},
    "networks": set(),
    "tasks": {"base", "checks", "trees", "datasets", "networks"},
    "rollouts": {"base", "checks", "trees"},
    "contracts": {"base", "rollouts", "trees"},
    "optimizers": {"base", "checks", "trees"},
    "guards": BASE,
    "meta": BASE | {"contracts", "devices", "names"},
    "checkpoints": {"", "zoo", "base", "checks", "files", "trees", "optimizers"},
    "files": set(),
    "train_state": set(),
    "devices": {"programs"},
    "training": {"base", "checks", "devices", "files", "meta"},
    "records": {"checks", "files"},
    "programs": set(),
    "evaluation": {*BASE, "programs", "records"},
    "pretraining": {"", "base", "datasets", "files", "rollouts", "tasks"},
    "catalog": {
        "base",
        "contracts",
        "datasets",
        "files",
        "names",
        "networks",
        "pretraining",
        "tasks",
    },
    "hub": {"checkpoints", "files"},
    "suites": set(),
    "baselines": {"", "base", "evaluation", "optimizers", "records", "rollouts"},
    "contenders": {"base", "checkpoints", "guards", "optimizers", "records", "rollouts"},
    "statistics": set(),
    "plots": {"records", "statistics"},
    "config": {"baselines", "checks", "meta", "names", "suites"},
    "jobs": {
        *(
            "",
            "base",
            "baselines",
            "catalog",
            "checkpoints",
            "config",
            "contenders",
            "datasets",
            "devices",
        ),
        *("evaluation", "files", "meta", "names", "records", "statistics", "suites"),
        *("training", "trees"),
    },
    "report": {"checks", "files", "plots", "records", "statistics"},
    "benchmarks": BASE
    | {"datasets", "devices", "programs", "networks", "tasks", "optimizers", "guards", "meta"},
    "cli": {"zoo", "config", "datasets", "jobs", "report", "benchmarks"},
}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def metaopt_imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
            if node.module == "metaopt":
                modules = [
                    "metaopt" if alias.name == "__version__" else f"metaopt.{alias.name}"
                    for alias in node.names
                ]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            if module.split(".")[0] == "metaopt":
                yield (module.split(".") + [""])[1]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_only_what_comes_before_them(path):
    if path == ROOT / "__init__.py":
        return  # the public names
    own = part(path)
    assert own in ALLOWED, f"{own} is new: say in ALLOWED what it may import"
    assert set(metaopt_imports(path)) - {own} <= ALLOWED[own]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_imports_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for module in ("pickle", "gin", "haiku", "tensorflow"):
        assert not re.search(rf"import {module}\b", text)  # tensorflow_datasets is another
    assert ("evosax" in text and "import" in text and part(path) != "meta") is False or not any(
        line.startswith(("import evosax", "from evosax")) for line in text.splitlines()
    )
