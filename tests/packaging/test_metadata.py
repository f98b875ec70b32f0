"""Files that state the same fact agree; the repository holds what it should, and no more."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

import metaopt

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
LARGEST_PICTURE = 150_000  # bytes


def committed(*patterns: str) -> list[Path]:
    """The files of the repository that match; skips where this is no clone."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *patterns]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.exists()]


def recipe(target: str) -> str:
    """The commands of a target of the Makefile."""
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]


def test_citation_and_changes_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == metaopt.__version__
    assert citation["license"] == "Apache-2.0"
    assert PROJECT["license"] == "Apache-2.0 AND MIT"  # MIT: published weights in the zoo
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["authors"] == PROJECT["authors"]
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == metaopt.__version__


def test_hooks_run_what_make_test_runs():
    assert re.search(r"^test: lint pytest$", MAKEFILE, re.M)
    commands = re.findall(
        r"\$\(BIN\)/(ruff check|ruff format --check|pyright|python -m pytest)",
        recipe("lint") + recipe("pytest"),
    )
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in config["repos"][0]["hooks"]]
    assert [re.sub(r" -n \d+ --dist worksteal$", "", hook) for hook in hooks] == commands


def test_workflows_run_targets_of_the_makefile_on_all_supported_pythons():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    assert jobs.keys() == {"lint", "test", "docs", "wheel"}
    matrix = jobs["test"]["strategy"]["matrix"]
    classifiers = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert matrix["python"] == classifiers
    assert PROJECT["requires-python"] == f">={classifiers[0]}"
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {command.split()[1] for command in commands if command.startswith("make ")} - {"${{"}
    targets |= {*matrix["target"], *(entry["target"] for entry in matrix["include"])}
    assert targets == {"lint", "pytest", "test-oldest", "docs", "wheel"}
    for target in targets:
        assert recipe(target)


def test_make_clean_keeps_what_users_made():
    assert "runs" not in recipe("clean")


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = "metaopt|experiments|benchmarks|tests|docs|\\.config"
    paths = set(re.findall(rf"`((?:{folders})/[\w./]*)`", text))
    assert len(paths) > 25
    missing = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_committed_pictures_are_small_and_shown():
    pictures = committed("*.png", "*.pdf", "*.jpg", "*.svg")
    pages = "".join(page.read_text() for page in committed("*.md", "*.yml", "docs/*.html"))
    assert len(pictures) > 10
    for path in pictures:
        assert path.stat().st_size <= LARGEST_PICTURE, path
        assert path.name in pages, f"{path}: no page shows it"
        if path.suffix == ".png":
            Image.open(path).verify()


def test_figures_that_the_docs_build_draws_are_not_committed():
    assert not committed("docs/results/**/figures/**", "docs/results/**/report.html")
