"""Files that say the same thing agree: versions, licence, hooks and CI's commands."""

import re
from pathlib import Path

import yaml

import metaopt

ROOT = Path(__file__).parents[2]


def test_citation_and_changes_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == metaopt.__version__
    assert citation["license"] == "Apache-2.0"
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == metaopt.__version__


def test_hooks_run_what_make_test_runs():
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    commands = re.findall(
        r"\$\(BIN\)/(ruff check|ruff format --check|pyright|python -m pytest)", recipe
    )
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in config["repos"][0]["hooks"]]
    assert [re.sub(r" -n \d+$", "", hook) for hook in hooks] == commands
